"""Sphinx extension: the pages load their scripts from the book itself where `make book` has fetched them.

Without the fetched files the usual content delivery network serves them, and only widgets and formulae need a network.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

logger = logging.getLogger(__name__)

WIDGETS = ("require.js", "embed-amd.js")  # in the order in which a page needs them
MATHJAX = "tex-svg.js"


def use_fetched_assets(app: Sphinx, config: Config) -> None:
    """Point widgets and formulae at `_assets/vendor`, if everything they need is there."""
    vendor = Path(app.srcdir) / "_assets" / "vendor"
    if all((vendor / name).is_file() for name in (*WIDGETS, MATHJAX)):
        config.nb_ipywidgets_js = {f"vendor/{name}": {} for name in WIDGETS}
        config.mathjax_path = f"vendor/{MATHJAX}"
        config.html_extra_path = ["_extra"]  # the widgets' icons, where their script looks for them: beside the pages
    else:
        logger.info("No %s: widgets and formulae will be loaded over the network.", vendor)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("config-inited", use_fetched_assets, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
