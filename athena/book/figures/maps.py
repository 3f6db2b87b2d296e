"""Heat maps, and what is drawn beside them."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from athena.book.figures.style import BIAS, GUIDED, PLAIN, RELEVANCE, STABILISER, canvas, style

COVERED = 0.6
"""How much of the fullest colour covers the page: writing on it stays readable on a white and on a black one."""
HEARD = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);user-select:none"
"""The style of what a screen reader says and nobody sees."""


def heat_maps(
    images: Any,
    maps: Mapping[str, Any],
    names: Sequence[str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    outlines: Any = None,
    limit: float | None = None,
    each: bool = False,
    across: bool = False,
) -> Figure:
    """Images and their heat maps side by side, all maps on one scale with one colour bar.

    Args:
        images: (n, channels, height, width), from 0 to 1.
        maps: for each title, relevance (n, channels, height, width), which is summed over the channels, in the unit of
            the output that was explained.
        names: what to write beside each image.
        notes: for a title, what to write below each of its maps.
        outlines: (n, height, width), true where the object is; its edge is drawn on the maps.
        limit: relevance drawn in the fullest colour; by default `relevance_limit` of all maps. What lies beyond is
            drawn in that colour too, and the ends of the colour bar say so.
        each: every map on a scale of its own, for relevance that differs much in size.
        across: each image gets a column; by default a row.
    """
    pictures = _array(images)
    summed = {title: _array(relevance).sum(1) for title, relevance in maps.items()}
    most = limit or relevance_limit(*maps.values())
    shape = (len(summed) + 1, len(pictures)) if across else (len(pictures), len(summed) + 1)
    side = 7.4 / shape[1]
    below = 0.18 * max((text.count("\n") + 1 for texts in (notes or {}).values() for text in texts), default=0)
    with style():
        with_notes = len(notes or {}) if across else len(pictures)
        figure, axes = canvas(*shape, (8.4, side * shape[0] + below * with_notes + 0.3), squeeze=False)
        grid = axes.T if across else axes
        for i, row in enumerate(grid):
            row[0].imshow(pictures[i].transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
            for axis, (title, relevance) in zip(row[1:], summed.items(), strict=True):
                scale = relevance_limit(relevance[i][None, None]) if each else most
                drawn = axis.imshow(relevance[i] / scale, cmap=RELEVANCE, vmin=-1, vmax=1)
                if outlines is not None:
                    axis.contour(_array(outlines)[i], levels=[0.5], colors="black", linewidths=0.6)
                if notes is not None and title in notes:
                    axis.set_xlabel(notes[title][i], fontsize=8)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            sns.despine(ax=axis, left=True, bottom=True)
        for i, name in enumerate(names or []):
            grid[i, 0].set_title(name, fontsize=9) if across else grid[i, 0].set_ylabel(name)
        for j, title in enumerate(["image", *summed]):
            grid[0, j].set_ylabel(title) if across else grid[0, j].set_title(title, fontsize=9)
        bar = figure.colorbar(drawn, ax=axes, aspect=12 * shape[0], pad=0.015, extend="both")
        bar.set_ticks([-1, 0, 1], labels=["−1", "0", "1"] if each else [f"−{most:.2g}", "0", f"{most:.2g}"])
        bar.set_label("relevance / scale of each map" if each else "relevance")
    return figure


def text(tokens: Sequence[Any], relevance: Any, limit: float | None = None) -> Any:
    """A text with the relevance of each token as its background: red speaks for the class explained, blue against it.

    The background is see-through, and so the writing has the colour of the page, be it light or dark. A token's number
    shows under the mouse, and a screen reader says it after the token.

    Args:
        tokens: (n,), words or parts of words as they are to be shown.
        relevance: (n,) or (n, width), which is summed over the width, in the unit of the output that was explained.
        limit: relevance drawn in the fullest colour; by default the largest in size. What lies beyond has it too.

    Returns:
        What a notebook shows as HTML.

    Raises:
        ValueError: there are not as many relevances as tokens.
    """
    from IPython.display import HTML  # of the extra `book`

    values = _array(relevance).astype(float)
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and relevance of shape {values.shape}: give each token its relevance")
    values = values.reshape(len(tokens), -1).sum(1)
    most = limit or float(np.abs(values).max(initial=0)) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        share = float(np.clip(value / most, -1, 1))
        full = ",".join(f"{255 * part:.0f}" for part in colormaps[RELEVANCE](0.85 if value > 0 else 0.15)[:3])
        number = f"{value:+.3g}".replace("-", "−")
        spans.append(
            f'<span title="{number}" style="background:rgba({full},{COVERED * abs(share):.2f});border-radius:3px;'
            f'padding:.1em .25em">{html.escape(str(token))}<span style="{HEARD}"> {number} </span></span>'
        )
    ends = f"{-most:.2g} (blue) to {most:+.2g} (red)".replace("-", "−")
    return HTML(
        f'<p style="line-height:1.9;overflow-wrap:anywhere">{" ".join(spans)}<br><small>relevance, {ends}</small></p>'
    )


def relevance_limit(*maps: Any, share: float = 0.998) -> float:
    """The size of relevance, summed over channels, that `share` of the pixels of all `maps` stay below.

    The very largest pixels would set a scale on which nothing else is seen.
    """
    sizes = np.concatenate([np.abs(_array(relevance).sum(1)).ravel() for relevance in maps])
    return float(np.quantile(sizes, share)) or float(sizes.max()) or 1.0


def conservation(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Where the relevance goes from layer to layer: what each layer holds, and what it loses on the way to the next.

    Args:
        tables: for each rule, what `athena.Relevance.conservation` gives for a chain of layers.
    """
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    with style():
        figure, axes = canvas(rows, columns, (8.4, 2.3 * rows + 0.4), sharey=True, squeeze=False)
        for axis in axes.flat[len(tables) :]:
            axis.set_visible(False)
        for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
            share = 100 * table[["relevance", "bias", "stabiliser"]] / table["relevance"].iloc[0]
            place = np.arange(len(table))
            axis.bar(place, share["relevance"], 0.5, color=PLAIN, linewidth=0, label="relevance")
            after_bias = share["relevance"] - share["bias"]
            between = {"x": place[:-1] + 0.5, "width": 0.3, "linewidth": 0}
            for what, bottom, colour in (("bias", share["relevance"], BIAS), ("stabiliser", after_bias, STABILISER)):
                axis.bar(**between, height=-share[what][:-1], bottom=bottom[:-1], color=colour, label=f"{what} absorbs")
            axis.axhline(100, color="black", linewidth=0.8)
            axis.set_xticks(place, table["layer"], rotation=30, ha="right", rotation_mode="anchor")
            axis.set_title(title, fontsize=9)
            axis.grid(visible=False, axis="x")
        for axis in axes[:, 0]:
            axis.set_ylabel("share of the start (%)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def flipping(curves: pd.DataFrame) -> Figure:
    """The probability of a class while pixels are taken away, the most relevant first.

    Args:
        curves: from `athena.quality.pixel_flipping`. Columns called ``random`` or ``control: ...`` are drawn in grey.
    """
    names = [str(name) for name in curves]
    controls = [name for name in names if name == "random" or name.startswith("control: ")]
    maps = [name for name in names if name not in controls]
    share = 100 * curves.index
    with style():
        figure, axis = canvas(1, 1, (8.4, 3.4))
        for i, (name, colour) in enumerate(zip(maps, sns.color_palette("colorblind", len(maps)), strict=True)):
            marker = "osDv^P*X"[i % 8]
            axis.plot(share, 100 * curves[name], marker=marker, markersize=3.5, linewidth=1.2, color=colour, label=name)
        for i, name in enumerate(controls):
            line = "-" if name == "random" else ("--", ":", "-.")[i % 3]
            axis.plot(share, 100 * curves[name], line, linewidth=1.2, color="#8c8c8c", label=name)
        axis.set(xlabel="pixels taken away (%)", ylabel="probability of the answer (%)", ylim=(0, None))
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def arrays(panels: Mapping[str, Any], relevance: Sequence[str] = (), digits: int = 2) -> Figure:
    """Small arrays with their numbers written into the cells.

    Args:
        panels: for each title, an array (height, width).
        relevance: the titles of those that hold relevance, coloured on one scale; the others are shaded by value.
        digits: decimals at most.
    """
    values = {title: _array(panel).astype(float) for title, panel in panels.items()}
    most = max((np.abs(values[title]).max() for title in relevance), default=1.0) or 1.0
    tallest = max(panel.shape[0] for panel in values.values())
    widths = [max(panel.shape[1], 3) for panel in values.values()]  # room for a title
    cell = min(8.4 / (sum(widths) + 0.6 * len(widths)), 0.5)
    with style():
        figure, axes = canvas(1, len(values), (8.4, cell * tallest + 0.5), width_ratios=widths, squeeze=False)
        for axis, width, (title, panel) in zip(axes[0], widths, values.items(), strict=True):
            signed = title in relevance
            size = most if signed else 2 * (np.abs(panel).max() or 1.0)  # half the scale: the writing stays readable
            axis.imshow(panel, cmap=RELEVANCE if signed else "Greys", vmin=-size if signed else 0, vmax=size)
            for (i, j), value in np.ndenumerate(panel):
                text = f"{round(value, digits) + 0.0:g}".replace("-", "−")
                dark = signed and abs(value) > 0.6 * size
                axis.text(j, i, text, ha="center", va="center", fontsize=9, color="w" if dark else "k")
            middle = (panel.shape[1] - 1) / 2
            axis.set(xlim=(middle - width / 2, middle + width / 2), ylim=(tallest - 0.5, -0.5), xticks=[], yticks=[])
            axis.set_title(title, fontsize=9)
            axis.grid(visible=False)
            sns.despine(ax=axis, left=True, bottom=True)
    return figure


def answer(image: Any, relevance: Any, probabilities: Any, asked: int) -> Figure:
    """An image, the heat map of one class, and what the network makes of the image.

    Args:
        image: (channels, height, width), from 0 to 1.
        relevance: of the same shape, for the class `asked`.
        probabilities: (classes,), the network's softmax output.
        asked: the class that the map explains, marked among the bars.
    """
    shares = 100 * _array(probabilities)
    with style():
        figure, axes = canvas(1, 3, (8.4, 2.9), width_ratios=[1, 1.12, 1.25])
        _picture(axes[0], image, "the image")
        drawn = _picture(axes[1], relevance, f"for class {asked}", relevance_limit(_array(relevance)[None]))
        figure.colorbar(drawn, ax=axes[1], label="relevance", fraction=0.05)
        colours = [GUIDED if index == asked else "#bdbdbd" for index in range(len(shares))]
        axes[2].barh(range(len(shares)), shares, color=colours)
        axes[2].set(xlim=(0, 100), xlabel="probability (%)", ylabel="class", yticks=range(len(shares)))
        axes[2].set_title(f"the network says {int(shares.argmax())}")
        axes[2].invert_yaxis()
    return figure


def progress(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], epochs: float, image: Any, maps: Mapping[str, Any]
) -> Figure:
    """Two arms as they train, and how both explain one image.

    Args:
        curves: for ``"plain"`` and ``"guided"`` and each of their runs, pairs of epochs done and accuracy from 0 to 1.
        epochs: how long the runs are to be.
        image: (channels, height, width), from 0 to 1.
        maps: for up to three networks by name, relevance of the shape of `image`, on a common scale.
    """
    with style():
        figure, axes = canvas(2, 4, (8.4, 3.4), width_ratios=[1.6, 1.6, 1.2, 1.2])
        grid = axes[0, 0].get_gridspec()
        for axis in axes[:, :2].flat:
            axis.remove()
        axis = figure.add_subplot(grid[:, :2])
        for arm, colour, marker in (("plain", PLAIN, "o"), ("guided", GUIDED, "s")):
            for i, run in enumerate(curves.get(arm, ())):
                done, accuracy = zip(*run, strict=True)
                percent = [100 * value for value in accuracy]
                label = arm if i == 0 else None
                axis.plot(
                    done, percent, marker=marker, markersize=2.5, linewidth=1.2, color=colour, label=label, alpha=0.8
                )
        axis.set(xlim=(0, epochs), ylim=(0, 101), yticks=range(0, 101, 20))  # the same in every picture of a run
        axis.set(xlabel="epochs", ylabel="test accuracy (%)")
        if axis.lines:
            axis.legend(loc="lower right")
        most = relevance_limit(*(_array(relevance)[None] for relevance in maps.values())) if maps else 1.0
        places = axes[:, 2:].flat
        _picture(next(places), image, "the image")
        for title, relevance in maps.items():
            _picture(next(places), relevance, title, most)
        for axis in places:
            axis.set_axis_off()
    return figure


def _picture(axis: Axes, values: Any, title: str, most: float | None = None) -> Any:
    """An image (channels, height, width), or, with the relevance `most` in the fullest colour, its heat map."""
    pixels = _array(values)
    if most is None:
        drawn = axis.imshow(pixels.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
    else:
        drawn = axis.imshow(pixels.sum(0), cmap=RELEVANCE, vmin=-most, vmax=most)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    axis.grid(visible=False)
    sns.despine(ax=axis, left=True, bottom=True)
    return drawn


def _array(values: Any) -> Any:
    """A tensor, wherever it is, or anything like an array, as numpy's."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
