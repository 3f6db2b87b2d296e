"""What a guided step costs: counted in multiply-adds, measured while the page is made, and stored.

Not here: how a step is timed (`athena.book.timing`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.figures import GUIDED, THESIS
from athena.book.heatmaps import named
from athena.book.tables import benchmark, percent, points, possible, shown
from athena.book.timing import step_ratios
from athena.experiments import models, published, results, statistics
from athena.rules import Rule

__all__ = [
    "bars",
    "cases",
    "count",
    "count_shown",
    "every_shown",
    "every_told",
    "measured_told",
    "on_gpu_told",
    "ratios",
]

EVERY = {1: "every step", 2: "one in two", 4: "one in four"}
"""Which steps are guided, by the argument `every` of `athena.Guidance`."""


class Case(NamedTuple):
    """A network, the images of a step, which layers are guided, the lowest of them, and the thesis's table."""

    network: nn.Module
    images: Tensor
    scope: str
    lowest: str
    table: str


def cases(batch: int, few: int, seed: int) -> dict[str, Case]:
    """The three cases of thesis tables 7.1 to 7.3, by what the page calls them.

    Args:
        batch, few: images of a step of the fully connected and of the convolutional network.
        seed: of weights and images.
    """
    torch.manual_seed(seed)
    return {
        "MLP, whole network": Case(models.mlp(), torch.rand(batch, 1, 32, 32), "all", "linear1", "7.1"),
        "CNN, linear part": Case(models.cnn(), torch.rand(few, 3, 32, 32), "linear", "linear1", "7.3"),
        "CNN, whole network": Case(models.cnn(), torch.rand(few, 3, 32, 32), "all", "conv1", "7.2"),
    }


def count(given: Mapping[str, Case]) -> pd.DataFrame:
    """Multiply-adds for one image: forward, backward, relevance; and the least that guided over plain can be (floor).

    Relevance goes down to the output of the lowest guided layer.
    """
    rows = {}
    for title, case in given.items():
        counted = _multiply_adds(case.network, case.images[:1])
        names, forward = list(counted), sum(counted.values())
        backward = 2 * forward - counted[names[0]]
        relevance = sum(counted[name] for name in names[names.index(case.lowest) + 1 :])
        rows[title] = (forward, backward, relevance, 1 + relevance / (forward + backward))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["forward", "backward", "relevance", "floor"])
    assert table["floor"].between(1, 4 / 3).all()
    return table


def _multiply_adds(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Of each affine layer's forward pass, in the order in which they run."""
    counted: dict[str, int] = {}

    def note(name: str, layer: nn.Linear | nn.Conv2d, out: Tensor) -> None:
        counted[name] = layer.weight[0].numel() * out[0].numel()

    hooks = [
        layer.register_forward_hook(lambda layer, _, out, name=name: note(name, layer, out))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return counted


def count_shown(counted: pd.DataFrame) -> pd.DataFrame:
    """A table of `count` for reading, in millions."""
    title = "millions for one image"
    columns: dict[str, Any] = {title: counted.index}
    columns |= {part: (counted[part] / 1e6).map("{:.2f}".format) for part in ("forward", "backward", "relevance")}
    columns |= {"guided / plain, least": counted["floor"].map("{:.3f}".format)}
    return shown(pd.DataFrame(columns), title)


def ratios(given: Mapping[str, Case], rounds: int, rule: Rule, seed: int) -> pd.DataFrame:
    """How many times as long a guided step takes as a plain one, measured now, and in the thesis.

    Args:
        given: of `cases`; the linear part is timed together with the whole network.
        rounds: how many steps each arm takes.

    Returns:
        For each case the median measured (here), and of the thesis's training times the median, least and largest
        (thesis, low, high).
    """
    mlp, cnn = given["MLP, whole network"], given["CNN, whole network"]
    clock = {
        "MLP": step_ratios(mlp.network, mlp.images, ["all"], rounds, rule, seed),
        "CNN": step_ratios(cnn.network, cnn.images, ["linear", "all"], rounds, rule, seed),
    }
    printed = published("training_time")
    times = {}
    for title, case in given.items():
        own = printed[printed["table"] == case.table]
        theirs = own["seconds_lrp"] / own["seconds_standard"]
        here = clock[title[:3]][case.scope].median()
        times[title] = {"here": here, "thesis": theirs.median(), "low": theirs.min(), "high": theirs.max()}
    table = pd.DataFrame(times).T
    assert (table > 0).all(axis=None)
    return table


def bars(counted: pd.DataFrame, times: pd.DataFrame) -> Figure:
    """The cost of a guided step over a plain one: by the count, measured here, and in the thesis with its range."""
    series = (
        ("by the count", counted["floor"], "#bdbdbd"),
        ("measured here", times["here"], GUIDED),
        ("thesis", times["thesis"], THESIS),
    )
    names = list(times.index)
    with figures.style():
        figure, axis = figures.canvas(1, 1, (7.0, 3.4))
        for place, (label, values, tone) in enumerate(series):
            where = np.arange(len(names)) + 0.27 * (place - 1)
            wide = [times["thesis"] - times["low"], times["high"] - times["thesis"]] if label == "thesis" else None
            axis.barh(where, values[names], 0.25, color=tone, label=label, xerr=wide, error_kw={"capsize": 3})
            ends = times["high"] if label == "thesis" else values
            for at, name in zip(where, names, strict=True):
                axis.text(ends[name] + 0.06, at, f"{values[name]:.2f}", va="center", fontsize=9)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(yticks=range(len(names)), xlabel="a guided step / a plain step", xlim=(0, None))
        axis.set_yticklabels(names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def measured_told(
    counted: pd.DataFrame, times: pd.DataFrame, given: Mapping[str, Case], rounds: int, rule: Rule
) -> str:
    """The bars in words, and under which conditions they were measured."""
    each = "; ".join(
        f"**{name}**: by the count at least {counted['floor'][str(name)]:.2f} times a plain step, measured here "
        f"{row['here']:.2f}, in the thesis, on a GPU, {row['low']:.1f} to {row['high']:.1f}"
        for name, row in times.iterrows()
    )
    batch, few = (len(given[name].images) for name in ("MLP, whole network", "CNN, whole network"))
    return (
        f"{each}. Measured is the median of {rounds} rounds by {named(rule)}, on one CPU thread, {batch} images in a "
        f"batch for the MLP and {few} for the CNN, on whatever else the machine was doing; more, and the memory, comes "
        "from `benchmarks/guidance.py`, which also times the method built in the thesis's manner."
    )


def on_gpu_told() -> str:
    """What a guided step costs on a GPU, with this package and written in the thesis's manner."""
    _, measured = benchmark("guidance-h100")
    cases = {("MLP", "all"): "MLP", ("CNN", "linear"): "CNN, linear part", ("CNN", "all"): "CNN, whole"}
    ours, theirs = (
        {
            case: float(table.set_index("arm")["of plain"][f"{who}, {scope}, Epsilon(1e-06)"])
            for title, table in measured.items()
            for (network, scope), case in cases.items()
            if title.startswith(network)
        }
        for who in ("ATHENA", "thesis's manner")
    )
    said, beside = [f"{ours[case]:.2f} ({case})" for case in ours], [f"{ratio:.2f}" for ratio in theirs.values()]
    return (
        f"On an H100 a guided step takes {', '.join(said[:-1])} and {said[-1]} times as long as a plain one; written "
        f"in the thesis's manner, {', '.join(beside[:-1])} and {beside[-1]} times. Both were measured with an earlier "
        "version of the package."
    )


def every_shown(compared: pd.DataFrame) -> pd.DataFrame:
    """Guided minus plain where only some steps are guided, for reading.

    Args:
        compared: of `statistics.compare`, with columns factor, fraction and every.
    """
    cells = {(row["factor"], row["fraction"], row["every"]): row for _, row in compared.iterrows()}
    places = sorted({(factor, share) for factor, share, _ in cells})
    columns = {
        "factor": [f"{factor:g}" for factor, _ in places],
        "data (%)": [f"{100 * share:g}" for _, share in places],
        "plain": [percent(cells[*place, 1]["baseline_mean"], 2) for place in places],
        **{name: [points(possible(cells[*place, n])) for place in places] for n, name in EVERY.items()},
    }
    return shown(pd.DataFrame(columns), "factor")


def every_told(compared: pd.DataFrame, counted: pd.DataFrame) -> tuple[str, str]:
    """What guiding fewer steps does to the harm of a factor, and to the cost.

    Args:
        compared: as for `every_shown`.
        counted: of `count`.
    """
    every_step = compared[compared["every"] == 1]
    worst = every_step.sort_values("difference", kind="stable").iloc[0]
    at_worst = compared[(compared["factor"] == worst["factor"]) & (compared["fraction"] == worst["fraction"])]
    lost = dict(zip(at_worst["every"], -100 * at_worst["difference"], strict=True))
    assert lost[1] > 2 * lost[2] > 2 * lost[4], "harm no longer falls with the share of guided steps"
    least = {n: 1 + (counted["floor"]["CNN, whole network"] - 1) / n for n in EVERY}
    image = results("cifar-every")
    gains = {row["every"]: points(possible(row)) for _, row in statistics.compare(image, any_code=True).iterrows()}
    return (
        f"In these pairs, guiding fewer steps does less harm. Factor {worst['factor']:g} on "
        f"{100 * worst['fraction']:g} % of the data loses {lost[1]:.2f} points where every step is guided, "
        f"{lost[2]:.2f} with one step in two and {lost[4]:.2f} with one in four. No gain is shown at any factor, nor "
        f"could {compared['n'].max()} pairs show one: their p cannot go below {2 / 2 ** compared['n'].max():.3f}.",
        f"The cost, by the count above, for the whole convolutional network: {least[1]:.2f} plain steps where every "
        f"step is guided, {least[2]:.2f} with one in two, {least[4]:.2f} with one in four. What that does to its "
        f"accuracy on {100 * image['fraction'].iloc[0]:g} % of CIFAR-10, at factor 0.1 and against plain training: "
        f"{gains[1]} points with every step, {gains[4]} with one in four.",
    )
