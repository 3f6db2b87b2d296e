"""Accuracies, their differences and ratios, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from athena.book.figures.style import GUIDED, LOW_DATA, PLAIN, THESIS, canvas, style
from athena.experiments import statistics


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
    of_factor = f"factor {factor:g}, " if factor else "plain, "
    with style():
        figure, axes = canvas(1, 2, (8.4, 3.5))
        for axis, most, name in zip(axes, (100, LOW_DATA), ("full", "low"), strict=True):
            for label, (value, colour, marker) in arms.items():
                _mean_line(axis, frame[(frame["factor"] == value) & _upto(frame, most)], label, colour, marker)
            if published is not None:
                shown = published[published["percent"] <= most].sort_values("percent")
                for column, line, what in (("accuracy_standard", ":", "standard"), ("accuracy_lrp", "--", "LRP")):
                    axis.plot(shown["percent"], shown[column], line, color=THESIS, label=f"{published_name}, {what}")
            axis.set(
                xlabel="share of the training data (%)",
                title=of_factor + ("full range" if most == 100 else f"1 to {most} %"),
            )
            axis.set_ylim(limits[name] if limits else _around_the_lines(axis))
        axes[0].set_ylabel("test accuracy (%)")
        axes[0].legend(loc="best")
    return figure


def last_epochs(arms: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> Figure:
    """Mean test accuracy after each of two numbers of epochs, plain and guided, a panel for each arm.

    Args:
        arms: for each title the runs of one guided arm and their plain partners; `accuracies` holds the accuracy after
            each epoch, 0 to 1.
        epochs: the two numbers.
    """
    with style():
        figure, axes = canvas(1, len(arms), (8.4, 3.2), squeeze=False, sharey=True)
        for axis, (title, frame) in zip(axes[0], arms.items(), strict=True):
            for name, colour, own in (
                ("plain", PLAIN, frame[frame["factor"] == 0]),
                ("guided", GUIDED, frame[frame["factor"] != 0]),
            ):
                for count, line in zip(epochs, ("--", "-"), strict=True):
                    means = 100 * own["accuracies"].str[count - 1].groupby(own["fraction"]).mean()
                    axis.plot(
                        100 * means.index, means, line, color=colour, linewidth=1.3, label=f"{name}, {count} epochs"
                    )
            axis.set(title=title, xlabel="share of the training data (%)")
        axes[0, 0].set_ylabel("test accuracy (%)")
        axes[0, 0].legend(loc="lower right")
    return figure


def seeds(runs: pd.DataFrame) -> str:
    """How many seeds of an arm have run at a share of the data: one number, or the least and the most."""
    numbers = runs.groupby("fraction")["seed"].nunique()
    least, most = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    return f"{most}" if least == most else f"{least} to {most}"


def differences(table: pd.DataFrame, thesis: Mapping[float, pd.DataFrame] | None = None) -> Figure:
    """Guided minus plain accuracy against the share of the data, a panel for each factor, column by column.

    Each panel has its own scale.

    Args:
        table: from `athena.statistics.compare`, with columns factor and fraction.
        thesis: the thesis's table for a factor, to draw its difference as well.
    """
    factors = sorted(table["factor"].unique())
    columns = min(3, len(factors))
    rows = -(-len(factors) // columns)
    with style():
        figure, axes = canvas(rows, columns, (8.4, 2.5 * rows + 0.3), sharex=True, squeeze=False)
        down = list(axes.T.flat)  # column by column, in which order a phone stacks them
        for axis in down[len(factors) :]:
            axis.set_visible(False)
        for axis, factor in zip(down, factors, strict=False):
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
            axis.set_ylabel("guided − plain (points)")
        for column in axes.T:
            [axis for axis in column if axis.get_visible()][-1].set_xlabel("share of the training data (%)")
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
        axis.set_xlabel("guided − plain, test accuracy (points); dots: pairs; square: mean and 95 % interval")
    return figure


def two_arms(
    frame: pd.DataFrame,
    table: pd.DataFrame,
    baseline: tuple[str, Any],
    labels: tuple[str, str],
    title: str,
    limits: Mapping[str, tuple[float, float]],
    published: pd.DataFrame | None = None,
) -> Figure:
    """Two arms against the share of the data: left their accuracies, right their difference, with a dot for each pair.

    Args:
        frame: runs of both arms, as `athena.results` gives them.
        table: their rows of `athena.statistics.compare`, by fraction.
        baseline: the column that tells the arms apart, and its value in the first of them.
        labels: what to call the two.
        title: of the figure.
        limits: of the axes: ``"share"`` of both, ``"accuracy"`` and ``"difference"``, in percent and points.
        published: the thesis's accuracies of the two arms in percent, a column each, by percent of the data.
    """
    name, value = baseline
    frame = statistics.paired(frame, name)
    sides = frame[frame[name] == value], frame[frame[name] != value]
    one, other = (100 * side.set_index(["fraction", "seed"])["accuracy"] for side in sides)
    pairs = (other - one).dropna()
    part = table[table["n"] > 0].sort_values("fraction")
    with style():
        figure, (left, right) = canvas(1, 2, (8.4, 3.5))
        for side, label, colour, marker in zip(sides, labels, (PLAIN, GUIDED), "os", strict=True):
            if len(side):
                _mean_line(left, side, label, colour, marker)
        right.plot(100 * pairs.index.get_level_values(0), pairs, "o", color=GUIDED, alpha=0.4, markersize=4)
        _with_interval(right, 100 * part["fraction"], 100 * part[["difference", "low", "high"]], "", "black")
        if published is not None:
            for (_, column), line, label in zip(published.items(), (":", "--"), labels, strict=True):
                left.plot(column, line, color=THESIS, label=f"thesis, {label}")
            right.plot(published.iloc[:, 1] - published.iloc[:, 0], "--", color=THESIS)
        right.axhline(0, color="black", linewidth=0.8)
        if pairs.empty:
            right.set_title("not yet run" + ("" if published is None else ", the thesis alone"))
        across = {"xlabel": "share of the training data (%)", "xlim": limits["share"]}
        left.set(**across, ylabel="test accuracy (%)", ylim=limits["accuracy"])
        right.set(**across, ylabel=f"{labels[1]} − {labels[0]} (points)", ylim=limits["difference"])
        figure.suptitle(title, fontsize=10, fontweight="bold")
        if left.lines:
            left.legend(loc="lower right")
    return figure


def starts(table: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Guided minus plain accuracy for each start of relevance, epsilon, factor and share of the data, as a map.

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
        bar = figure.colorbar(image, ax=axes, shrink=0.7, label="guided − plain (points)")
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


def _around_the_lines(axis: Axes) -> tuple[float, float]:
    """Limits that hold every line; the band of a few runs of which one collapsed would reach far below 0 %."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    if np.isnan(values).all():
        return 0.0, 100.0
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
