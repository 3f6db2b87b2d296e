"""Where the growth of gradients at factor 10 comes from: from layer to layer, over the steps, and through Adam.

Each thing looked at has a function that measures it, one that draws what was measured, and one that says it in words
(thesis 7.1.3). Not here: that factor 10 collapses at all (`athena.book.gradients`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.figures import GUIDED, PLAIN, THESIS
from athena.book.gradients import gradients, holds
from athena.book.tables import percent
from athena.experiments.data import Data
from athena.rules import Rule

__all__ = [
    "adam_told",
    "by_depth",
    "by_depth_told",
    "depths",
    "four_arms",
    "over_steps",
    "over_steps_told",
    "put_back_told",
]

DEPTHS, WARM = (1, 2, 4, 8), 100
"""Numbers of hidden layers, and the plain steps after which a network is looked at again."""
STEPS, EVERY, KEEP = 400, 25, 100
"""Of a run that is followed: its steps, how often it is looked at, and after how many its weights are kept."""
WIDTHS = (1024, 128, 64, 10)
"""Of the network that is followed."""
BACK = "factor 10, lengths put back"
ARMS = {
    "plain": (0.0, PLAIN, "o"),
    "factor 1": (1.0, GUIDED, "s"),
    "factor 10": (10.0, THESIS, "^"),
    BACK: (10.0, "#009e73", "D"),
}
"""The factor of each arm that is followed, its colour and its marker."""

Lengths = dict[tuple[int, str], dict[float, list[float]]]
"""For a number of hidden layers and ``"untrained"`` or ``"trained"``, and for factors 1 and 10: how many times as long
the guided gradient of each layer's weights is as the plain one, from the output layer down."""


def depths(digits: Data, batch: int, rule: Rule, seed: int) -> Lengths:
    """Networks with `DEPTHS` hidden layers before training and after `WARM` plain steps, asked with one batch."""
    x, y = digits.train_images[:batch], digits.train_labels[:batch]

    def longer(network: nn.Module) -> dict[float, list[float]]:
        found = {}
        for factor in (1.0, 10.0):
            plain, guided = (gradients(network, x, y, value, rule) for value in (0.0, factor))
            names = [name for name in reversed(plain) if name.endswith("weight")]
            found[factor] = [(guided[name].norm() / plain[name].norm()).item() for name in names]
        return found

    growth: Lengths = {}
    for depth in DEPTHS:
        deep = _chain(seed, 1024, *[128] * depth, 10)
        growth[depth, "untrained"] = longer(deep)
        optimizer = torch.optim.Adam(deep.parameters(), fused=True)
        for _, (xs, ys) in zip(range(WARM), _batches(digits, batch, seed), strict=False):
            optimizer.zero_grad()
            F.cross_entropy(deep(xs), ys).backward()
            optimizer.step()
        growth[depth, "trained"] = longer(deep)
    return growth


def by_depth(growth: Lengths) -> Figure:
    """What `depths` has measured, against the layer, on a logarithmic axis."""
    tones = dict(zip(DEPTHS, sns.color_palette("viridis", len(DEPTHS)).as_hex(), strict=True))
    panels = (("untrained", 10.0), ("trained", 1.0), ("trained", 10.0))
    with figures.style():
        figure, axes = figures.canvas(1, 3, (8.4, 3.0), sharey=True)
        for axis, (state, factor) in zip(axes, panels, strict=True):
            for depth, marker in zip(DEPTHS, "os^D", strict=True):
                lengths = growth[depth, state][factor]
                look = {"marker": marker, "markersize": 4, "color": tones[depth], "label": str(depth)}
                axis.plot(range(len(lengths)), lengths, **look)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(yscale="log", xticks=range(0, 9, 2), title=f"{state}, factor {factor:g}")
        axes[0].set_ylabel("length, guided / plain")
        axes[1].set_xlabel("layers below the output layer")
        axes[0].legend(title="hidden layers", loc="upper left")
    return figure


def by_depth_told(growth: Lengths, own: bool) -> str:
    """What `depths` has measured, in words; `own`: whether the chapter runs with its own parameters."""
    one, ten = ([growth[depth, "trained"][factor][-1] for depth in DEPTHS] for factor in (1.0, 10.0))
    calm = [ratio for (_, state), found in growth.items() if state == "untrained" for ratio in found[10.0]]
    compound = holds(ten[3] > 10 * ten[1] and max(calm) < 2, own)
    return (
        ("**Scales compound downwards, once there is something to compound.** " if compound else "")
        + "With factor 10, the gradient of the lowest layer of a trained network is "
        f"{ten[0]:.3g} times as long as the plain one with one hidden layer, {ten[1]:.3g} times with two, "
        f"{ten[2]:,.0f} times with four and {ten[3]:,.0f} times with eight. With factor 1 it is {min(one):.2g} to "
        f"{max(one):.2g} times as long. Before training, factor 10 makes it {min(calm):.2f} to {max(calm):.2f} times "
        "as long, over all layers and depths."
    )


def four_arms(digits: Data, batch: int, rule: Rule, seed: int) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """`ARMS` with the same start and the same batches, over `STEPS` steps.

    Returns:
        At every `EVERY`-th step of each arm the length of the gradient that the optimiser is given (gradient), that of
        its step (moved), test accuracy in percent (right), how many times as long factor 10, or the arm's own, makes
        the plain gradient (ratio), and the mean size of a logit (logit); and for each arm all weights after `KEEP`
        steps in one row.
    """
    runs = {arm: _follow(arm, digits, batch, rule, seed) for arm in ARMS}
    columns = ["arm", "step", "gradient", "moved", "right", "ratio", "logit"]
    followed = pd.DataFrame([row for rows, _ in runs.values() for row in rows], columns=columns)
    return followed, {arm: kept for arm, (_, kept) in runs.items()}


def over_steps(followed: pd.DataFrame) -> Figure:
    """Length of the gradient, length of Adam's step and test accuracy of each arm of `four_arms`."""
    panels = {"gradient": "length of the gradient", "moved": "length of Adam's step", "right": "test accuracy (%)"}
    with figures.style():
        figure, axes = figures.canvas(1, 3, (8.4, 3.3))
        for axis, (column, title) in zip(axes, panels.items(), strict=True):
            for arm, (_, tone, marker) in ARMS.items():
                part = followed[followed["arm"] == arm]
                axis.plot(part["step"], part[column], marker=marker, markersize=3, linewidth=1.2, color=tone, label=arm)
            axis.set(title=title, xlabel="step", yscale="log" if column == "gradient" else "linear")
        axes[1].set_ylim(0, None)
        axes[2].set_ylim(max(0, followed.loc[followed["step"] > 50, "right"].min() - 5), 100)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


def over_steps_told(followed: pd.DataFrame, own: bool) -> str:
    """What grows over the steps in the arms of `four_arms`, a list; `own` as for `by_depth_told`."""
    late = {arm: _late(followed, arm) for arm in ARMS}
    plain, one, ten = late["plain"], late["factor 1"], late["factor 10"]
    first = followed[(followed["arm"] == "plain") & (followed["step"] == 0)].iloc[0]
    longer, wider = ten["gradient"] / plain["gradient"], ten["moved"] / plain["moved"]
    grows = holds(plain["ratio"] > 1.5 * first["ratio"] and plain["logit"] > 5 * first["logit"], own)
    feeds_back = holds(ten["ratio"] > 2 * plain["ratio"] and ten["logit"] > 1.2 * plain["logit"], own)
    contained = holds(longer > 20 and wider < longer / 10, own)
    lines = [
        ("**The scale grows in plain training too**, where no gradient was ever scaled. " if grows else "")
        + "Asked at each step what factor 10 *would* make of the plain run's gradient, the answer is "
        f"{first['ratio']:.2f} times its length at the first step and {plain['ratio']:.1f} times over the last fifth, "
        f"while the mean size of a logit goes from {first['logit']:.2g} to {plain['logit']:.2g}. "
        + (
            "What grows is not the number of scalings but the logits, as training wants them to, and relevance is "
            "shared out from them."
            if grows
            else ""
        ),
        (
            "**With factor 10 in the loop both grow further**: something does build up from batch to batch, in the "
            "weights. "
            if feeds_back
            else ""
        )
        + f"There, guidance makes the gradient {ten['ratio']:.0f} times as long as the plain one of the same weights "
        f"over the last fifth, the mean size of a logit is {ten['logit']:.2g}, and the gradient that the optimiser is "
        f"given is {longer:,.0f} times as long as in the plain run.",
        (
            "**The steps do not explode.** Adam divides each weight's gradient by the size of its recent ones. "
            if contained
            else ""
        )
        + f"Adam's steps with factor 10 are {wider:.1f} times as long as those of the plain run over the last fifth.",
        f"Accuracy over the last fifth is {plain['right']:.1f} % in the plain run, {one['right']:.1f} % with factor 1 "
        f"and {ten['right']:.1f} % with factor 10.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def put_back_told(followed: pd.DataFrame, own: bool) -> str:
    """Whether gradients of their plain length bring back what factor 10 loses; `own` as for `by_depth_told`."""
    plain, ten, back = (_late(followed, arm)["right"] for arm in ("plain", "factor 10", BACK))
    text = f"With its lengths put back, factor 10 is at {back:.1f} % over the last fifth. "
    if holds(plain - ten > 1 and plain - back > 1, own):
        text += (
            "**That does not bring back what plain training has**, although its gradients are no longer than the plain "
            f"ones of the same weights. So in these {STEPS} steps of one seed, before any collapse, the harm "
            "comes without longer gradients too. Whether the collapse would come without them was not measured. "
            "What guidance still does in that arm is to shift gradients against each other, between the weights of a "
            "layer and between samples, some of them to the other sign."
        )
    return text


def adam_told(kept: Mapping[str, Tensor], digits: Data, batch: int, rule: Rule, seed: int, own: bool) -> str:
    """What Adam makes of gradients that are multiplied, in each layer, by a constant.

    Args:
        kept: the weights of `four_arms`.
        digits, batch, rule, seed: as for `four_arms`.
        own: whether the chapter runs with its own parameters.
    """
    begun = _chain(seed, *WIDTHS)
    by_layer = {"1": 1024.0, "3": 32.0, "5": 1.0}
    constants = {name: by_layer[name[0]] for name, _ in begun.named_parameters()}
    _, scaled = _follow("plain", digits, batch, rule, seed, KEEP, constants)
    travelled = (kept["plain"] - _row(begun.parameters())).norm()
    by_constants, by_factor = (
        ((after - kept["plain"]).norm() / travelled).item() for after in (scaled, kept["factor 10"])
    )
    text = (
        f"After {KEEP} steps, the weights are apart from those of plain training by {percent(by_constants)} of the way "
        f"that these have travelled; with factor 10 it is {percent(by_factor)}. "
    )
    if holds(by_constants < 0.3 * by_factor, own):
        text += (
            "**A scale that is the same for all of a layer's weights in every step, Adam takes out**, but for the "
            "small constant in its denominator and for rounding. What acts is the variation: over neurons, over "
            "samples, and over time, as long as Adam's averages have not caught up with it."
        )
    return text


def _late(followed: pd.DataFrame, arm: str, part: float = 0.2) -> pd.Series:
    """Each column's median over the last fifth of the steps."""
    rows = followed[(followed["arm"] == arm) & (followed["step"] >= (1 - part) * STEPS)]
    return rows.drop(columns="arm").median()


def _chain(seed: int, *widths: int) -> nn.Sequential:
    """A fully connected network with ReLU between its layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    torch.manual_seed(seed)
    return nn.Sequential(*layers[:-1])


def _batches(digits: Data, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(digits.train_labels), generator=order).split(batch):
            yield digits.train_images[index], digits.train_labels[index]


def _row(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _follow(
    arm: str,
    digits: Data,
    batch: int,
    rule: Rule,
    seed: int,
    steps: int = STEPS,
    constants: Mapping[str, float] | None = None,
) -> tuple[list[tuple[str | float, ...]], Tensor]:
    """One arm: what `four_arms` gives of it, where each parameter's gradient may be multiplied by a constant."""
    factor, network = ARMS[arm][0], _chain(seed, *WIDTHS)
    rows: list[tuple[str | float, ...]] = []
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for step, (x, y) in zip(range(steps + 1), _batches(digits, batch, seed), strict=False):
        if step == KEEP:
            kept = _row(parameters.values())
        look = step % EVERY == 0
        given = gradients(network, x, y, factor, rule)
        if look or arm == BACK:
            plain = gradients(network, x, y, 0.0, rule)
        if look:
            compared = gradients(network, x, y, factor or 10.0, rule)
        if arm == BACK:
            given = {name: g * (plain[name].norm() / g.norm().clamp(min=1e-30)) for name, g in given.items()}
        if constants:
            given = {name: g * constants[name] for name, g in given.items()}
        before = _row(parameters.values())
        for name, parameter in parameters.items():
            parameter.grad = given[name]
        optimizer.step()
        if look:
            moved = (_row(parameters.values()) - before).norm().item()
            with torch.no_grad():
                answers = network(digits.test_images)
            right = (answers.argmax(1) == digits.test_labels).float().mean().item()
            length = _row(given.values()).norm().item()
            ratio = _row(compared.values()).norm().item() / _row(plain.values()).norm().item()
            rows.append((arm, step, length, moved, 100 * right, ratio, answers.abs().mean().item()))
    return rows, kept
