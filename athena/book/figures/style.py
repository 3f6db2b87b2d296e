"""The look that all figures share."""

from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
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

    pyplot does not keep it: a notebook shows it once, as the value of its cell.
    """
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)
    plt.close(figure)
    return figure, axes
