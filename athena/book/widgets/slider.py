"""A slider, or buttons, over pictures drawn beforehand: plain HTML, with no kernel, network or script file behind it.

On a built page the pictures become files that are loaded when they are first shown (`book/_ext/pictures.py`); in a
notebook they are in the cell's own output.
"""

import base64
import html
import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence

from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FOLLOW = (
    "const frames = this.closest('.athena-frames'), slider = frames.querySelector('input[type=range]');"
    "let place = 0;"
    "frames.querySelectorAll('input[type=range], input:checked').forEach("
    "control => { place += control.value * control.dataset.step; });"
    "const all = [...frames.querySelectorAll('[data-stop]')];"
    "all.forEach((picture, i) => { picture.hidden = i !== place; });"
    "const said = all[place].dataset.stop;"
    "if (slider) { slider.setAttribute('aria-valuetext', said); frames.querySelector('output').value = said; }"
)
"""What a control does when it is moved: it shows the picture that all controls choose, and a slider says its stop."""
QUANTITY = re.compile(r"[−-]?\d[\d.,]*(e[+-]?\d+)?( ?%| epochs?)?")
"""Stops of which a slider can be made, since they have an order; others become buttons."""


def frames(pictures: Mapping[str, Figure], label: str, value: str | None = None) -> HTML:
    """A slider that goes through figures drawn beforehand; buttons, where the stops are no quantities.

    The text alternative of each picture says where the control stands and what the figure's axes are called.

    Args:
        pictures: the figure for each stop, in order.
        label: what is moved, for the reader.
        value: the stop to begin with; by default the first.

    Raises:
        ValueError: there is no picture, or none for `value`.
    """
    stops = list(pictures)
    if not stops or (value is not None and value not in stops):
        raise ValueError(f"a slider from {stops} cannot begin at {value!r}")
    first = stops.index(value or stops[0])
    images = _images(list(pictures.items()), first, label)
    kind = _kind(pictures.values())
    makes_slider = all(QUANTITY.fullmatch(stop) for stop in stops)
    control = _slider(stops, label, first) if makes_slider else _buttons(stops, label, first, images)
    return HTML(f'<div class="{kind}">{control}{images}</div>')


def choices(pictures: Mapping[str, Mapping[str, Figure]], buttons: str, label: str) -> HTML:
    """Buttons and a slider that go through figures drawn beforehand.

    Args:
        pictures: for each button the figure for each stop of the slider; the stops are the same for all.
        buttons, label: what the buttons choose and what the slider moves, for the reader.

    Raises:
        ValueError: there is no picture, or the stops differ.
    """
    stops = [list(its) for its in pictures.values()]
    if not stops or not stops[0] or any(its != stops[0] for its in stops):
        raise ValueError(f"each button needs pictures for the same stops, and at least one; given are {stops}")
    images = "".join(
        _images(list(its.items()), 0 if i == 0 else None, f"{buttons} {name}, {label}")
        for i, (name, its) in enumerate(pictures.items())
    )
    controls = _buttons(list(pictures), buttons, 0, images, step=len(stops[0])) + _slider(stops[0], label, 0)
    kind = _kind(figure for its in pictures.values() for figure in its.values())
    return HTML(f'<div class="{kind}">{controls}{images}</div>')


def described(figure: Figure) -> str:
    """What a figure shows, by the titles of its axes, or else by what is drawn against what."""
    own = figure.get_suptitle()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    against = [
        f"{axis.get_ylabel()} against {axis.get_xlabel()}"
        for axis in figure.axes
        if axis.get_ylabel() and axis.get_xlabel()
    ]
    return " ".join("; ".join(dict.fromkeys([*([own] if own else []), *titles, *against])).split()) or "a picture"


def png(figure: Figure, reduced: bool = True) -> bytes:
    """The figure, by default in 256 colours, by which a page with its frames has less than half the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    if not reduced:
        return drawn.getvalue()
    small, noted, picture = io.BytesIO(), PngInfo(), Image.open(drawn)
    if "panels" in picture.info:  # where its panels lie, for a phone
        noted.add_text("panels", picture.info["panels"])
    few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True, pnginfo=noted)
    return small.getvalue()


def _kind(figures: Iterable[Figure]) -> str:
    """The classes for the style sheet: charts, which hold no image, follow the page into the dark."""
    holds_images = any(axis.images for figure in figures for axis in figure.axes)
    return "athena-frames" if holds_images else "athena-frames chart"


def _images(pictures: Sequence[tuple[str, Figure]], first: int | None, label: str) -> str:
    return "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}" loading="lazy" '
        f'data-stop="{html.escape(stop)}" alt="{html.escape(f"{label} {stop}: {described(figure)}")}"'
        f"{'' if i == first else ' hidden'}>"
        for i, (stop, figure) in enumerate(pictures)
    )


def _slider(stops: list[str], label: str, first: int) -> str:
    named, said = html.escape(label), html.escape(stops[first])
    return (
        f'<p><label>{named} <input type="range" min="0" max="{len(stops) - 1}" value="{first}" '
        f'aria-valuetext="{said}" data-step="1" oninput="{html.escape(FOLLOW)}"></label> <output>{said}</output></p>'
    )


def _buttons(stops: list[str], label: str, first: int, images: str, step: int = 1) -> str:
    group = f"frames-{zlib.crc32(images.encode()):x}"  # buttons of one name exclude each other all over a page
    choices = "".join(
        f'<label><input type="radio" name="{group}" value="{i}"{" checked" if i == first else ""} '
        f'data-step="{step}" oninput="{html.escape(FOLLOW)}"> {html.escape(stop)}</label> '
        for i, stop in enumerate(stops)
    )
    return f"<fieldset><legend>{html.escape(label)}</legend>{choices}</fieldset>"
