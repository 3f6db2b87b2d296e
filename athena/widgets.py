"""The book's interactive parts. What is here works on a static page as well, with no kernel and no network.

A static page has no Python behind it: what a slider shows must have been drawn before. So a widget here is made of
frames, pictures drawn once, and of a link that the browser alone can follow.
"""

import io
from collections.abc import Mapping

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["frames"]


def frames(pictures: Mapping[str, Figure], label: str, value: str | None = None) -> ipywidgets.VBox:
    """A slider that goes through figures drawn beforehand.

    Args:
        pictures: the figure for each stop of the slider, in order.
        label: what the slider moves, for the reader.
        value: the stop to begin with; by default the first.

    Raises:
        ValueError: there is no picture, or none for `value`.
    """
    stops = list(pictures)
    if not stops or (value is not None and value not in stops):
        raise ValueError(f"a slider from {stops} cannot begin at {value!r}")
    images = [
        ipywidgets.Image(value=_png(figure), format="png", layout={"width": "100%", "max_width": "924px"})
        for figure in pictures.values()
    ]
    slider = ipywidgets.SelectionSlider(
        options=stops,
        index=stops.index(value or stops[0]),
        description=label,
        continuous_update=True,
        style={"description_width": "initial"},
        layout={"width": "100%", "max_width": "480px"},
    )
    stack = ipywidgets.Stack(images, selected_index=slider.index)
    # "index", not "value": the browser knows nothing of a SelectionSlider's value
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    return ipywidgets.VBox([slider, stack])


def _png(figure: Figure) -> bytes:
    """The figure in 256 colours, by which a page with its frames has less than half the size."""
    drawn, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(reduced, format="png", optimize=True)
    return reduced.getvalue()
