"""Sphinx extension: all that leads from a page to the repository follows from its address in `_config.yml`.

With an address: the buttons for the repository, its issues and the page's source, the launch buttons named in
`_config.yml`, and sphinx_thebe for live code. With none: no button, and no script of Thebe's on any page.
"""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

GITHUB = re.compile(r"https://github\.com/[\w-]+/[\w.-]+(?<!\.git)")  # Colab and Thebe open no other host


def draw_buttons(app: Sphinx, config: Config) -> None:
    """Give the theme what its buttons need, or take away those that would lead nowhere."""
    options = config.html_theme_options
    address = options.get("repository_url")
    if not address:
        options["launch_buttons"] = {}
        return
    if not GITHUB.fullmatch(address):
        raise ConfigError(f"repository.url in _config.yml is {address!r}; write it as https://github.com/OWNER/NAME")
    for button in ("repository", "issues", "edit_page"):
        options[f"use_{button}_button"] = True
    app.setup_extension("sphinx_thebe")
    app.connect("html-page-context", drop_doubled_scripts, priority=900)
    config.thebe_config = {"path_to_docs": options["path_to_docs"]}  # the folder that live code runs in


def drop_doubled_scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], document: object) -> None:
    """Sphinx 7 lists a script that has no file twice, as None and as "", and Thebe's must not be read twice."""
    context["script_files"][:] = [script for script in context["script_files"] if script.filename is not None]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("config-inited", draw_buttons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
