"""Sphinx extension: the theme's icons, 1.5 MB of script in the head of a page, load after the text."""

from pathlib import Path

from sphinx.application import Sphinx

SCRIPT = '<script src="{}_static/scripts/fontawesome.js'


def defer(app: Sphinx, error: Exception | None) -> None:
    """Mark the script in every page that was written; the theme's template has it fixed."""
    for path in Path(app.outdir).rglob("*.html") if error is None else ():
        above = "../" * (len(path.relative_to(app.outdir).parts) - 1)
        text = path.read_text("utf8")
        now = SCRIPT.format(above)
        if now in text:
            path.write_text(text.replace(now, now.replace("<script ", "<script defer ")), "utf8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("build-finished", defer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
