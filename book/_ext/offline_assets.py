"""Sphinx extension: formulae are drawn by a script of the book's own where `make book` has fetched it.

Without the fetched file the usual content delivery network serves it, and formulae need a network.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

logger = logging.getLogger(__name__)

MATHJAX = "tex-svg.js"


def use_fetched_assets(app: Sphinx, config: Config) -> None:
    """Point formulae at `_assets/vendor`, if their script is there."""
    vendor = Path(app.srcdir) / "_assets" / "vendor"
    if (vendor / MATHJAX).is_file():
        config.mathjax_path = f"vendor/{MATHJAX}"
    else:
        logger.info("No %s: formulae will be loaded over the network.", vendor)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("config-inited", use_fetched_assets, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
