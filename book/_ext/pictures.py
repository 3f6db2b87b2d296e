"""Sphinx extension: the pictures of a page's sliders become files, which a browser loads when it shows them.

`athena.widgets.frames` writes them into the page itself, as a notebook needs it.
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PICTURE = re.compile(r'(?<=<img src=")data:image/png;base64,([A-Za-z0-9+/=]+)(?=")')


def to_files(app: Sphinx, page: str, template: str, context: dict[str, Any], document: object) -> None:
    """Write each picture that stands in the page's text to a file named after its content, and refer to that."""
    folder = Path(app.outdir) / "_images"

    def written(found: re.Match[str]) -> str:
        content = base64.b64decode(found[1])
        name = f"frame-{hashlib.sha256(content).hexdigest()[:16]}.png"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return "../" * page.count("/") + f"_images/{name}"

    if "body" in context:
        context["body"] = PICTURE.sub(written, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("html-page-context", to_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
