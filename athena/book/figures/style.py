"""The look that all figures share."""

from contextlib import contextmanager
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PLAIN, GUIDED, THESIS = "#4d4d4d", "#0072b2", "#d55e00"
"""Colours of the three arms, told apart by colour-blind readers and, by their markers, without colour."""
BIAS, STABILISER = THESIS, GUIDED
"""Colours of what absorbs relevance, beside `PLAIN` for the relevance itself."""
RELEVANCE = "RdBu_r"
"""The map of relevance."""
LOW_DATA = 30
"""The thesis's second plot of each experiment goes up to this share of the data, in percent."""


@contextmanager
def style() -> Any:
    """The look of every figure; use it around drawing."""
    look: dict[Any, Any] = {
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "figure.facecolor": "white",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "athena",
    }
    with sns.axes_style("whitegrid", {"grid.color": "#e6e6e6"}), plt.rc_context(look):
        yield


def canvas(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes, as ``plt.subplots`` gives them; call it within `style`.

    pyplot does not keep it: a notebook shows it once, as the value of its cell. Panels that share an axis are labelled
    each, since a phone shows them one below the other.
    """
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)
    plt.close(figure)
    PanelCanvas(figure)
    for axis in figure.axes:
        axis.tick_params(labelleft=True)
    return figure, axes


class PanelCanvas(FigureCanvasAgg):
    """Notes in a PNG where its panels lie, so that a page can stack them on a phone (`book/_ext/pictures.py`).

    The note is the entry `panels` of the PNG's text: the left edge of each column of panels and the right edge of the
    last, as shares of the width. A picture of one column has none.
    """

    def print_png(self, filename_or_obj: Any, *, metadata: Any = None, pil_kwargs: Any = None, **_: Any) -> None:
        """Called by matplotlib, to write the figure."""
        self.draw()
        edges = self._edges()
        noted = {"panels": " ".join(f"{edge:.4f}" for edge in edges)} if len(edges) > 2 else {}
        matplotlib.image.imsave(
            filename_or_obj,
            self.buffer_rgba(),
            format="png",
            dpi=self.figure.dpi,
            metadata=noted | (metadata or {}),
            pil_kwargs=pil_kwargs,
        )

    def _edges(self) -> list[float]:
        """Cuts the width in the middle of each gap that nothing is drawn in but the background."""
        drawn = [*self.figure.axes, *self.figure.legends, *self.figure.texts]
        boxes = [box for artist in drawn if (box := artist.get_tightbbox(self.get_renderer())) and box.width > 0]
        edges, reached = [0.0], None
        for left, right in sorted((box.x0, box.x1) for box in boxes):
            if reached is not None and left > reached:
                edges.append((left + reached) / 2 / self.figure.bbox.width)
            reached = right if reached is None else max(reached, right)
        return [*edges, 1.0]
