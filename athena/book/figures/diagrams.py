"""Diagrams: networks as circles and arrows, arrays as their numbers, a procedure as boxes and arrows."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from athena.book.figures.style import PLAIN, RELEVANCE, canvas, style

INK, LINE = "#222222", "#9a9a9a"
NEAR = 0.27
"""Where the number of an arrow stands between its two neurons: nearer to where the most arrows part from each other."""


def network(
    axis: Axes,
    neurons: Sequence[Sequence[str]],
    edges: Mapping[tuple[int, int, int], str],
    names: Sequence[str] = (),
    values: Sequence[Sequence[float]] | None = None,
    backwards: bool = False,
) -> None:
    """Draw a network on `axis`, from the input on the left to the output on the right.

    Args:
        axis: made by `canvas`, within `style`.
        neurons: for each layer, what to write into each of its neurons, from the top down.
        edges: the number at the arrow from a neuron to one of the next layer: ``{(layer, from, to): text}``.
        names: what to write above each layer.
        values: for each layer a number for each neuron, for its colour: red above zero, blue below. By default white.
        backwards: arrows point from the output to the input.
    """
    places = {
        (layer, k): (1.6 * layer, (len(own) - 1) / 2 - k) for layer, own in enumerate(neurons) for k in range(len(own))
    }
    most = max((abs(value) for own in values or () for value in own), default=1.0) or 1.0
    colours = plt.get_cmap(RELEVANCE)
    for (layer, start, end), text in edges.items():
        one, other = places[layer, start], places[layer + 1, end]
        tip, tail = (one, other) if backwards else (other, one)
        look = {"arrowstyle": "-|>", "color": LINE, "linewidth": 0.9, "shrinkA": 14, "shrinkB": 14}
        axis.annotate("", tip, tail, arrowprops=look, zorder=1)
        from_here = 1 - NEAR if backwards else NEAR
        x, y = (a + from_here * (b - a) for a, b in zip(one, other, strict=True))
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=PLAIN, bbox=box, zorder=2)
    for (layer, k), (x, y) in places.items():
        value = values[layer][k] if values else 0.0
        fill = colours(0.5 + 0.5 * value / most) if values else "white"
        axis.scatter(x, y, s=850, color=[fill], edgecolor=INK, linewidth=1, zorder=3)
        ink = "white" if values and abs(value) > 0.7 * most else INK
        axis.text(x, y, neurons[layer][k], ha="center", va="center", fontsize=9, color=ink, zorder=4)
    tallest = max(map(len, neurons))
    for layer, name in enumerate(names):
        axis.text(1.6 * layer, tallest / 2 + 0.25, name, ha="center", va="center", fontsize=9)
    axis.set(xlim=(-0.6, 1.6 * len(neurons) - 1), ylim=(-tallest / 2 - 0.1, tallest / 2 + (0.5 if names else 0.1)))
    axis.set_axis_off()


def flow(
    boxes: Mapping[str, tuple[float, float]],
    arrows: Sequence[tuple[str, str, str]],
    size: tuple[float, float],
    tones: Mapping[str, str] | None = None,
) -> Figure:
    """A procedure: boxes with a word or two in each, and arrows from box to box.

    Args:
        boxes: for each text, where its middle is, in columns to the right and in rows down.
        arrows: the texts of two boxes, and what to write at the arrow from the first to the second.
        size: in inches.
        tones: the colour of the edge of some of the boxes.
    """
    with style():
        figure, axis = canvas(1, 1, size)
        patches = {}
        for text, (x, y) in boxes.items():
            edge = (tones or {}).get(text, INK)
            patch = FancyBboxPatch(
                (x - 0.38, -y - 0.26), 0.76, 0.52, boxstyle="round,pad=0.02", facecolor="white", edgecolor=edge
            )
            patches[text] = axis.add_patch(patch)
            axis.text(x, -y, text, ha="center", va="center", fontsize=8.5)
        for start, end, text in arrows:
            (x1, y1), (x2, y2) = boxes[start], boxes[end]
            look = {"arrowstyle": "-|>", "color": PLAIN, "patchA": patches[start], "patchB": patches[end]}
            axis.annotate("", xy=(x2, -y2), xytext=(x1, -y1), arrowprops=look)
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            if text:
                axis.text((x1 + x2) / 2, -(y1 + y2) / 2, text, ha="center", va="center", fontsize=8, bbox=box)
        xs, ys = zip(*boxes.values(), strict=True)
        axis.set(xlim=(min(xs) - 0.45, max(xs) + 0.45), ylim=(-max(ys) - 0.4, -min(ys) + 0.4))
        axis.set_axis_off()
    return figure


def matrices(panels: Mapping[str, Any], signed: Sequence[str] = (), width: float = 5.6) -> Figure:
    """Arrays in a row, with their numbers in the cells.

    Args:
        panels: for each title an array of two dimensions; None for a sign, such as an arrow, which is its title.
        signed: the titles of those that are red above 0 and blue below, all on one scale. The others are grey, by size.
        width: in inches.
    """
    values: dict[str, Any] = {
        title: None if panel is None else np.asarray(panel, dtype=float) for title, panel in panels.items()
    }
    most = max((np.abs(values[title]).max() for title in signed), default=1) or 1
    columns = [0.35 if panel is None else max(panel.shape[1], 1.9) for panel in values.values()]
    tall = max(len(panel) for panel in values.values() if panel is not None)
    cell = (width - 0.17 * len(columns)) / sum(columns)
    with style():
        figure, axes = canvas(1, len(values), (width, cell * tall + 0.35), width_ratios=columns, squeeze=False)
        for axis, wide, (title, panel) in zip(axes[0], columns, values.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            sns.despine(ax=axis, left=True, bottom=True)
            if panel is None:
                axis.text(0.5, 0.5, title.strip(), ha="center", va="center", fontsize=13, transform=axis.transAxes)
                continue
            size = most if title in signed else 3 * (np.abs(panel).max() or 1)
            shade = panel if title in signed else np.abs(panel)
            axis.imshow(
                shade, cmap=RELEVANCE if title in signed else "Greys", vmin=-size * (title in signed), vmax=size
            )
            for (i, j), value in np.ndenumerate(panel):
                written = f"{round(value, 3) + 0.0:.4g}".replace("-", "−")
                dark = title in signed and abs(value) > 0.6 * size
                axis.text(j, i, written, ha="center", va="center", fontsize=9, color="w" if dark else "k")
            middle = (panel.shape[1] - 1) / 2
            axis.set(xlim=(middle - wide / 2, middle + wide / 2), ylim=(tall - 0.5, -0.5))
            axis.set_title(title, fontsize=9)
    return figure
