"""Early stopping: the rule at work, where it ended runs, and the thesis's tables beside each other."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from athena.book.figures.style import GUIDED, PLAIN, THESIS, canvas, style

__all__ = ["epochs_trained", "stopping", "thesis_columns"]

KEPT, NEVER_SEEN = "#009e73", "#c8c8c8"


def stopping(looks: pd.DataFrame, end: int | None, kept: int, title: str, in_epoch: int) -> Figure:
    """One run under early stopping: what each look saw, the best one, and where the run ended.

    Args:
        looks: by batch, accuracy from 0 to 1 on the images held out, ``"held out"``, and on test images, ``"test"``.
        end: the batch after which the rule ends the run, or None.
        kept: the batch whose weights are kept.
        title: of the figure.
        in_epoch: batches in an epoch.
    """
    seen = 100 * (looks if end is None else looks.loc[:end])
    with style():
        figure, axis = canvas(1, 1, (8.4, 3.2))
        beyond = {"color": NEVER_SEEN, "linewidth": 1, "label": "what it would have learned"}
        axis.plot(100 * looks["held out"], "o-", markersize=3.5, **beyond)
        axis.plot(seen["held out"], "o-", markersize=4, color=PLAIN, label="held out, by which it stops")
        axis.plot(seen["test"], ":", color=PLAIN, linewidth=1.4, label="test")
        best = 100 * looks["held out"][kept]
        axis.plot(kept, best, "*", color=KEPT, markersize=14, label="best look: these weights are kept")
        if end is not None:
            axis.axvline(end, color="black", linewidth=1)
        axis.set_title(title)
        axis.set(xlabel=f"batches ({in_epoch} are an epoch)", ylabel="accuracy (%)", xlim=(0, looks.index[-1] + 1))
        axis.legend(loc="lower right", frameon=True, framealpha=1, edgecolor="none")
    return figure


def epochs_trained(trained: pd.DataFrame, names: Mapping[str, str], most: Mapping[str, int]) -> Figure:
    """How many epochs runs were trained before early stopping ended them, a mark each, a panel for each scope.

    Args:
        trained: a row a run, with `scope`, `factor`, `fraction` and `epochs`.
        names: by scope, in the order of the panels, what to call it.
        most: by scope, the epochs that a run may have.
    """
    with style():
        figure, axes = canvas(1, len(names), (8.4, 3.1), squeeze=False)
        for axis, (scope, name) in zip(axes[0], names.items(), strict=True):
            own = trained[trained["scope"] == scope]
            factors = list(dict.fromkeys(own["factor"]))
            for i, factor in enumerate(factors):
                runs = own[own["factor"] == factor]
                aside = 1.6 * (i - (len(factors) - 1) / 2)
                colour, marker, label = (GUIDED, "s", f"guided, {factor:g}") if factor else (PLAIN, "o", "plain")
                look = {"color": colour, "marker": marker, "label": label, "markersize": 4.5, "alpha": 0.55}
                axis.plot(100 * runs["fraction"] + aside, runs["epochs"], linestyle="", **look)
            axis.axhline(most[scope], color="black", linewidth=0.8)
            nothing = "" if len(own) else ": not yet run"
            axis.set_title(f"{name}, at most {most[scope]} epochs{nothing}")
            across = {"xlabel": "share of the training data (%)", "xlim": (-3, 103)}
            axis.set(**across, ylim=(0, most[scope] + 0.25), yticks=range(most[scope] + 1))
        axes[0, 0].set_ylabel("epochs trained")
        axes[0, 0].legend(loc="lower right")
    return figure


def thesis_columns(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """The columns of the thesis's four CIFAR-10 tables, minus the standard column of 7.2.3.

    Args:
        tables: by number, by percent of the data, with `accuracy_standard` and `accuracy_lrp` in percent.
    """
    zero = tables["7.2.3"]["accuracy_standard"]
    lines = [
        ("7.2.3", "accuracy_lrp", "7.2.3 LRP, at most 4 epochs", THESIS, "s-"),
        ("7.2.4", "accuracy_lrp", "7.2.4 LRP, at most 3", GUIDED, "D-"),
        ("7.2.4", "accuracy_standard", "7.2.4 standard, at most 3", PLAIN, "o-"),
        ("7.2.2", "accuracy_standard", "7.2.2 standard, 3, no stopping", "#8c8c8c", "v:"),
        ("7.2.1", "accuracy_standard", "7.2.1 standard, 3, no stopping", "#8c8c8c", "^:"),
    ]
    with style():
        figure, axis = canvas(1, 1, (8.4, 3.5))
        for number, column, label, colour, line in lines:
            gap = (tables[number][column] - zero).dropna()
            axis.plot(gap, line, color=colour, markersize=4.5, linewidth=1.2, label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="share of the training data (%)", ylabel="minus 7.2.3 standard (points)")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
