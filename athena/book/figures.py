"""The book's figures, all in one look. Each function draws from what it is given and returns the figure.

Accuracies come in as 0 to 1 and are drawn in percent, differences in percentage points, both with 95 % intervals.
Relevance is drawn on a diverging scale with white at zero: red speaks for the class explained, blue against it.
Not here: the numbers themselves (`athena.statistics`), and anything that moves (`athena.widgets`).
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from athena.experiments import statistics

__all__ = [
    "accuracy",
    "answer",
    "arrays",
    "canvas",
    "conservation",
    "differences",
    "flipping",
    "heat_maps",
    "paired",
    "progress",
    "ratios",
    "relevance_limit",
    "seeds",
    "starts",
    "style",
]

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


def accuracy(
    frame: pd.DataFrame,
    factor: float,
    published: pd.DataFrame | None = None,
    published_name: str = "thesis",
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Test accuracy against the share of the data, plain and guided: the full range, and 1 to 30 %.

    Args:
        frame: runs as `athena.results` gives them, of one study.
        factor: the guided arm to draw.
        published: rows of the thesis's accuracy table to draw beside, with columns percent, accuracy_lrp and
            accuracy_standard in percent; None for none.
        published_name: what the legend calls them.
        limits: of the accuracy axes, ``{"full": (low, high), "low": (low, high)}`` in percent; by default what the
            lines need.
    """
    arms = {f"plain, factor 0 (n = {seeds(frame[frame['factor'] == 0])})": (0.0, PLAIN, "o")}
    if factor:
        guided = frame[frame["factor"] == factor]
        arms[f"guided, factor {factor:g} (n = {seeds(guided)})"] = (factor, GUIDED, "s")
    with style():
        figure, axes = canvas(1, 2, (8.4, 3.5))
        for axis, most, name in zip(axes, (100, LOW_DATA), ("full", "low"), strict=True):
            for label, (value, colour, marker) in arms.items():
                _mean_line(axis, frame[(frame["factor"] == value) & _upto(frame, most)], label, colour, marker)
            if published is not None:
                shown = published[published["percent"] <= most].sort_values("percent")
                for column, line, what in (("accuracy_standard", ":", "standard"), ("accuracy_lrp", "--", "LRP")):
                    axis.plot(shown["percent"], shown[column], line, color=THESIS, label=f"{published_name}, {what}")
            axis.set(xlabel="share of the training data (%)", title="full range" if most == 100 else f"1 to {most} %")
            axis.set_ylim(limits[name] if limits else _around_the_lines(axis))
        axes[0].set_ylabel("test accuracy (%)")
        axes[0].legend(loc="best")
    return figure


def seeds(runs: pd.DataFrame) -> str:
    """How many seeds of an arm have run at a share of the data: one number, or the least and the most."""
    numbers = runs.groupby("fraction")["seed"].nunique()
    least, most = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    return f"{most}" if least == most else f"{least} to {most}"


def differences(table: pd.DataFrame, thesis: Mapping[float, pd.DataFrame] | None = None) -> Figure:
    """Guided less plain accuracy against the share of the data, one panel for each factor, each with its own scale.

    Args:
        table: from `athena.statistics.compare`, with columns factor and fraction.
        thesis: the thesis's table for a factor, to draw its difference as well.
    """
    factors = sorted(table["factor"].unique())
    columns = min(3, len(factors))
    rows = -(-len(factors) // columns)
    with style():
        figure, axes = canvas(rows, columns, (8.4, 2.5 * rows + 0.3), sharex=True, squeeze=False)
        for axis in axes.flat[len(factors) :]:
            axis.set_visible(False)
        for axis, factor in zip(axes.flat, factors, strict=False):
            part = table[table["factor"] == factor].sort_values("fraction")
            _with_interval(axis, 100 * part["fraction"], 100 * part[["difference", "low", "high"]], "measured", GUIDED)
            if thesis and factor in thesis:
                published = thesis[factor].sort_values("percent")
                theirs = published["accuracy_lrp"] - published["accuracy_standard"]
                axis.plot(published["percent"], theirs, "--", color=THESIS, label="thesis")
                axis.legend()
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(f"factor {factor:g}")
            axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("guided less plain (points)")
        for axis in axes[-1]:
            axis.set_xlabel("share of the training data (%)")
    return figure


def paired(frame: pd.DataFrame, arms: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """The difference of each pair of runs, one dot for each seed, with the mean and its interval.

    Args:
        frame: runs as `athena.results` gives them, at one share of the data.
        arms: what to call each guided arm, and the columns that pick it.
    """
    same = ["precision", "seed"]
    plain = frame[frame["factor"] == 0].set_index(same)["accuracy"]
    with style():
        figure, axis = canvas(1, 1, (8.4, 0.55 * len(arms) + 1.0))
        for row, (_, chosen) in enumerate(arms):
            picked = frame[np.logical_and.reduce([frame[name] == value for name, value in chosen.items()])]
            gain = 100 * (picked.set_index(same)["accuracy"] - plain).dropna()
            centre, low, high = statistics.summary(gain)
            axis.plot(gain, np.full(len(gain), row) - 0.16, "o", color=GUIDED, alpha=0.45, markersize=5)
            axis.errorbar(centre, row + 0.16, xerr=[[centre - low], [high - centre]], fmt="s", color="black", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(arms)), [name for name, _ in arms])
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_xlabel("guided less plain, test accuracy (points); dots: pairs; square: mean and 95 % interval")
    return figure


def starts(table: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Guided less plain accuracy for each start of relevance, epsilon, factor and share of the data, as a map.

    Args:
        table: from `athena.statistics.compare`, with columns target, rule, factor and fraction.
        names: what to call each target, in the order of the panels.
    """
    rules = sorted(table["rule"].unique(), key=lambda rule: float(rule.partition("(")[2].rstrip(")")))
    with style():
        figure, axes = canvas(len(names), len(rules), (8.4, 1.75 * len(names) + 0.5), squeeze=False)
        for (target, name), row in zip(names.items(), axes, strict=True):
            for rule, axis in zip(rules, row, strict=True):
                part = table[(table["target"] == target) & (table["rule"] == rule)]
                grid = 100 * part.pivot_table(index="fraction", columns="factor", values="difference")
                image = axis.imshow(grid, cmap="RdBu", norm=_signed_scale(), aspect="auto")
                for (i, j), value in np.ndenumerate(grid.to_numpy()):
                    dark = abs(value) > 8
                    axis.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
                axis.set_xticks(range(grid.shape[1]), [f"{factor:g}" for factor in grid.columns])
                axis.set_yticks(range(grid.shape[0]), [f"{100 * fraction:g} %" for fraction in grid.index])
                axis.grid(visible=False)
                axis.set_title(f"{name}, ε = {float(rule.partition('(')[2].rstrip(')')):g}", fontsize=8.5)
        for axis in axes[-1]:
            axis.set_xlabel("factor")
        axes[len(names) // 2, 0].set_ylabel("share of the data")
        bar = figure.colorbar(image, ax=axes, shrink=0.7, label="guided less plain (points)")
        bar.set_ticks([-50, -10, -1, 0, 1, 10, 50], labels=["−50", "−10", "−1", "0", "1", "10", "50"])
    return figure


def ratios(table: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Training time guided over plain, against the share of the data.

    Args:
        table: from `athena.statistics.ratio`, with a column fraction.
        published: rows of the thesis's table of training times, to draw its ratio as well; None for none.
    """
    with style():
        figure, axis = canvas(1, 1, (8.4, 2.9))
        part = table.sort_values("fraction")
        _with_interval(axis, 100 * part["fraction"], part[["ratio", "low", "high"]], "measured here", GUIDED)
        if published is not None:
            theirs = published.sort_values("percent")
            ratio = theirs["seconds_lrp"] / theirs["seconds_standard"]
            axis.plot(theirs["percent"], ratio, "--o", color=THESIS, label="thesis")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xlabel="share of the training data (%)", ylabel="time guided / time plain", ylim=(0, None))
        axis.legend(loc="best")
    return figure


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
        later = []  # once both arms have learned something, the axis looks at what tells them apart
        for arm, colour, marker in (("plain", PLAIN, "o"), ("guided", GUIDED, "s")):
            for i, run in enumerate(curves.get(arm, ())):
                done, accuracy = zip(*run, strict=True)
                percent = [100 * value for value in accuracy]
                later += [value for at, value in zip(done, percent, strict=True) if at > 0.15 * epochs]
                label = arm if i == 0 else None
                axis.plot(
                    done, percent, marker=marker, markersize=2.5, linewidth=1.2, color=colour, label=label, alpha=0.8
                )
        axis.set(
            xlim=(0, epochs), ylim=(max(0, min(later, default=0) - 5), 101), xlabel="epochs", ylabel="test accuracy (%)"
        )
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


def _around_the_lines(axis: Axes) -> tuple[float, float]:
    """Limits that hold every line; the band of a few runs of which one collapsed would reach far below 0 %."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    return max(0.0, low - 0.1 * (high - low) - 0.5), min(100.5, high + 0.1 * (high - low) + 0.5)


def _upto(frame: pd.DataFrame, percent: float) -> pd.Series:
    return 100 * frame["fraction"] <= percent + 1e-9


def _mean_line(axis: Axes, runs: pd.DataFrame, label: str, colour: str, marker: str) -> None:
    shares = runs.groupby(100 * runs["fraction"])
    rows = [(share, *statistics.summary(100 * part["accuracy"])) for share, part in shares]
    table = pd.DataFrame(rows, columns=["percent", "mean", "low", "high"], dtype=float)
    axis.plot(table["percent"], table["mean"], marker=marker, markersize=4, color=colour, label=label)
    axis.fill_between(
        table["percent"], table["low"], table["high"].clip(upper=100), color=colour, alpha=0.15, linewidth=0
    )


def _with_interval(axis: Axes, x: pd.Series, values: pd.DataFrame, label: str, colour: str) -> None:
    centre, low, high = values.to_numpy().T
    axis.errorbar(
        x,
        centre,
        yerr=[centre - low, high - centre],
        fmt="s-",
        markersize=4,
        capsize=2.5,
        linewidth=1,
        color=colour,
        label=label,
    )


def _signed_scale() -> Any:
    from matplotlib.colors import SymLogNorm

    return SymLogNorm(linthresh=0.5, vmin=-80, vmax=80)
