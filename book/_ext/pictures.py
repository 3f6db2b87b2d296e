"""Sphinx extension: what a page does with the pictures of a notebook that the notebook itself need not do.

The pictures of sliders become files, which a browser loads when it shows them; `athena.widgets.frames` writes them into
the page itself, as a notebook needs it. Charts of several panels are cut between them, where `athena.figures` has noted
in the PNG that nothing is drawn, so that `athena.css` can put the panels one below the other on a phone. Side by side,
they look as before.
"""

import base64
import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from sphinx.application import Sphinx

PICTURE = re.compile(r'(?<=<img src=")data:image/png;base64,([A-Za-z0-9+/=]+)(?=")')
CHART = re.compile(r'<img [^>]*class="(?:[^"]* )?chart"[^>]*>|(?s:<div class="athena-frames chart">.*?</div>)')
IMAGE = re.compile(r"<img [^>]*>")
OF_FRAME = re.compile(r' (?:data-stop="[^"]*"|hidden\b)')
"""What a slider reads and writes of its picture; it goes to the element around the panels."""


def to_files(app: Sphinx, page: str, template: str, context: dict[str, Any], document: object) -> None:
    """Write each picture that stands in the page's text to a file named after its content, and refer to that."""
    folder, above = Path(app.outdir) / "_images", "../" * page.count("/")

    def written(found: re.Match[str]) -> str:
        content = base64.b64decode(found[1])
        name = f"frame-{hashlib.sha256(content).hexdigest()[:16]}.png"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return f"{above}_images/{name}"

    def cut(found: re.Match[str]) -> str:
        return IMAGE.sub(lambda image: _panels(image[0], files), found[0])

    if "body" in context:
        body = PICTURE.sub(written, context["body"])
        files = {f"{above}_images/{path.name}": path for path in folder.glob("frame-*.png")}
        files |= {
            f"{above}{app.builder.imagedir}/{name}": Path(app.srcdir) / source
            for source, name in app.builder.images.items()
        }
        context["body"] = CHART.sub(cut, body)


def _panels(image: str, files: dict[str, Path]) -> str:
    """The tag of a chart, or one for each of its panels, all of the same file."""
    source = re.search(r'src="([^"]*)"', image)
    path = files.get(source[1]) if source else None
    if path is None or path.suffix != ".png":
        return image
    with Image.open(path) as picture:
        edges, width = [float(edge) for edge in picture.info.get("panels", "").split()], picture.width
    if not edges:
        return image
    first = OF_FRAME.sub("", image)
    others = re.sub(r'alt="[^"]*"', 'alt=""', first)
    panels = "".join(
        f'<span class="panel" style="--from: {start:.4f}; --share: {end - start:.4f}">'
        f"{others if start else first}</span>"
        for start, end in pairwise(edges)
    )
    return f'<span class="panels" style="--width: {width}px"{"".join(OF_FRAME.findall(image))}>{panels}</span>'


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads this extension."""
    app.connect("html-page-context", to_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
