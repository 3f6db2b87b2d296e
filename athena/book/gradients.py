"""What a factor does to the gradients of a network that has been trained, and the collapse at factor 10 (thesis 7.1.3).

Each thing looked at has a function that measures it, one that draws or tabulates what was measured, and one that says
it in words. Not here: the batch that is followed by hand (`athena.book.one_batch`), and where the growth of gradients
comes from (`athena.book.growth`).
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.figures import GUIDED, PLAIN, THESIS
from athena.book.tables import percent, shown
from athena.experiments.data import Data
from athena.guidance import Guidance
from athena.relevance import lrp
from athena.rules import Rule

__all__ = [
    "STARTS",
    "collapse",
    "collapse_told",
    "direction_told",
    "directions",
    "directions_shown",
    "distribution",
    "gradients",
    "holds",
    "looked_at",
    "measures",
    "sizes",
    "turned_told",
]

LAYERS = ("linear1", "linear2", "linear3")
"""The affine layers of the fully connected network; the last makes the output and is not guided."""
BINS = np.linspace(-9, 1, 61)
"""Of the histograms of gradients, powers of ten."""
STARTS: dict[str | None, str] = {
    "logits": "all logits",
    None: "predicted logit",
    "label": "logit of the true class",
    "softmax": "probabilities",
}
"""Where relevance may start, as `athena.Guidance` takes it, with what the page calls it."""
Gradients = dict[str, Tensor]


def holds(finding: Any, own: bool) -> bool:
    """Whether a finding holds; with the chapter's own parameters (`own`) it has to, since the text around says so."""
    assert finding or not own, "the measurement no longer shows what the text says"
    return bool(finding)


def gradients(
    network: nn.Module, x: Tensor, y: Tensor, factor: float, rule: Rule, target: str | None = "logits"
) -> Gradients:
    """The gradient of each parameter by its name, for one batch, with all layers guided; factor 0 is plain.

    Args:
        network: in training mode.
        x, y: the batch, (n, c, h, w) and (n,).
        target: where relevance starts, as for `athena.Guidance`.
    """
    network.zero_grad()
    with Guidance(network, factor, rule, scope="all", target=target, on_divergence="record") as guidance:
        guidance.labels = y
        F.cross_entropy(network(x), y).backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


# What a factor does to a real gradient


def sizes(by_factor: Mapping[float, Gradients]) -> dict[tuple[float, str], np.ndarray]:
    """For each factor and layer, the percent of weights whose gradient is as large as each of `BINS`.

    Args:
        by_factor: for each factor, gradients by the names of the parameters.
    """
    found = {}
    for (factor, own), name in itertools.product(by_factor.items(), LAYERS):
        size = own[f"{name}.weight"].abs().flatten()
        found[factor, name] = 100 * np.histogram(size[size > 0].log10(), BINS)[0] / len(size)
    return found


def distribution(spreads: Mapping[tuple[float, str], np.ndarray], *factors: float) -> Figure:
    """Histograms of the sizes of gradients, a panel for each layer and a line for each of up to three factors.

    Args:
        spreads: of `sizes`.
    """
    with figures.style():
        figure, axes = figures.canvas(1, 3, (8.4, 2.9), sharey=True)
        for axis, name in zip(axes, LAYERS, strict=True):
            for factor, tone, line in zip(factors, (PLAIN, GUIDED, THESIS), ("-", "-", "--"), strict=False):
                label = f"factor {factor:g}" if factor else "plain"
                look: dict[str, Any] = {"color": tone, "linestyle": line, "linewidth": 1.5, "label": label}
                axis.stairs(spreads[factor, name], 10**BINS, **look)
            axis.set(xscale="log", xlim=(1e-8, 1), xticks=[1e-7, 1e-5, 1e-3, 1e-1], title=name)
            axis.minorticks_off()
        axes[0].set_ylabel("weights (%)")
        axes[1].set_xlabel("size of a weight's gradient")
        axes[0].legend(loc="upper left")
    return figure


def turned_told(network: nn.Module, images: Tensor, rule: Rule) -> str:
    """For how many active neurons of each hidden layer factor 10 turns the gradient round, reduces and enlarges it."""
    relevance = lrp(network, images, target="logits", rule=rule).layers
    told = []
    for name in LAYERS[:2]:
        scale = 1 + 10 * relevance[name][relevance[name] != 0]
        kinds = (scale < 0, (scale >= 0) & (scale < 1), scale >= 1)
        down, less, more = (kind.float().mean().item() for kind in kinds)
        assert abs(down + less + more - 1) < 1e-3
        told.append(
            f"in {name} it turns the gradient round for {percent(down)}, reduces it for {percent(less)} and enlarges "
            f"it for {percent(more)}"
        )
    return f"What factor 10 does to the neurons that are active, counted over the batch: {'; '.join(told)}."


def measures(
    network: nn.Module, x: Tensor, y: Tensor, factor: float, rule: Rule, target: str | None = "logits"
) -> tuple[float, float, float]:
    """Of the weights of both hidden layers together: length guided over plain, cosine, and share of turned signs."""
    one, other = (
        torch.cat([found[f"{name}.weight"].flatten() for name in LAYERS[:2]])
        for found in (gradients(network, x, y, value, rule, target) for value in (0.0, factor))
    )
    if not other.isfinite().all():
        return float("inf"), float("nan"), float("nan")
    turned = (one * other < 0).float().sum() / (one != 0).sum()
    return (other.norm() / one.norm()).item(), F.cosine_similarity(one, other, dim=0).item(), turned.item()


def directions(network: nn.Module, x: Tensor, y: Tensor, rule: Rule) -> pd.DataFrame:
    """`measures` for every start of relevance and three factors, in the columns length, cosine and turned."""
    cases = [(target, factor) for target in STARTS for factor in (0.1, 1.0, 10.0)]
    return pd.DataFrame(
        [(target, factor, *measures(network, x, y, factor, rule, target)) for target, factor in cases],
        columns=["target", "factor", "length", "cosine", "turned"],
    )


def directions_shown(measured: pd.DataFrame) -> pd.DataFrame:
    """A table of `directions` for reading."""
    columns = {
        "relevance from": measured["target"].map(STARTS),
        "factor": measured["factor"].map("{:g}".format),
        "length": measured["length"].map("{:.3g}".format),
        "cosine": measured["cosine"].map("{:.3f}".format).str.replace("-", "−"),
        "turned": measured["turned"].map(percent),
    }
    return shown(pd.DataFrame(columns), "relevance from")


def direction_told(measured: pd.DataFrame, untrained: float, own: bool) -> str:
    """What the factor does where relevance starts from all logits.

    Args:
        measured: of `directions`.
        untrained: the cosine with factor 10 before the first step.
        own: whether the chapter runs with its own parameters.
    """
    by_factor = measured[measured["target"] == "logits"].set_index("factor")
    found = dict(by_factor.iterrows())
    text = (
        f"From all logits, the cosine is {found[0.1]['cosine']:.3f} with factor 0.1, {found[1.0]['cosine']:.3f} with "
        f"factor 1 and {found[10.0]['cosine']:.2f} with factor 10, where the length is {found[10.0]['length']:.2f} "
        f"times the plain one and {percent(found[10.0]['turned'])} of the signs are turned. In the same network before "
        f"its first step, it is {untrained:.3f} with factor 10. "
    )
    if holds(untrained > 0.95 > 0.9 > found[10.0]["cosine"], own):
        text += (
            "**What a factor does depends on how far the network is trained**: relevance is shared out from the "
            "logits, and is as large as they are."
        )
    return text


# The collapse at factor 10


def looked_at(network: nn.Sequential, digits: Data) -> dict[str, float]:
    """Of a network of three affine layers at places 1, 3 and 5, whose weights have gradients.

    Returns:
        Accuracy on both sets (train, test), mean size of a logit (logit), the larger share of a layer's hidden neurons
        that no test image opens (shut), and the length of each layer's gradient ("1", "2", "3").
    """
    weights = {str(k): network.get_parameter(f"{place}.weight") for k, place in enumerate((1, 3, 5), 1)}
    lengths = {k: weight.grad.norm().item() for k, weight in weights.items() if weight.grad is not None}
    network.eval()  # guidance acts in training mode alone
    with torch.no_grad():
        train = (network(digits.train_images).argmax(1) == digits.train_labels).float().mean().item()
        logits = network(digits.test_images)
        test = (logits.argmax(1) == digits.test_labels).float().mean().item()
        shut = [(network[:layer](digits.test_images) <= 0).all(0).float().mean().item() for layer in (3, 5)]
    network.train()
    return {"train": train, "test": test, "logit": logits.abs().mean().item(), "shut": max(shut), **lengths}


def collapse(runs: Mapping[tuple[float, int], pd.DataFrame], seed: int) -> Figure:
    """Accuracy, size of the logits and length of the gradients over the steps.

    Args:
        runs: for each factor and seed, the column `step` and those of `looked_at`.
        seed: the one whose gradients are drawn.
    """
    with figures.style():
        figure, axes = figures.canvas(1, 3, (8.4, 3.3))
        for (factor, s), run in runs.items():
            look: dict[str, Any] = {"color": THESIS if factor else PLAIN, "marker": "os"[s == seed], "markersize": 3.5}
            name = f"{f'factor {factor:g}' if factor else 'plain'}, seed {s}"
            axes[0].plot(run["step"], 100 * run["train"], **look, label=f"{name}, training set")
            open_dots = {"linestyle": ":", "fillstyle": "none", "label": f"{name}, test set"}
            axes[0].plot(run["step"], 100 * run["test"], **look, **open_dots)
            axes[1].semilogy(run["step"], run["logit"], **look)
            if s == seed:
                for layer, dashes in zip("123", ("-", "--", ":"), strict=True):
                    axes[2].semilogy(run["step"], run[layer], dashes, color=look["color"], linewidth=1.2)
        titles = ("accuracy (%)", "mean size of a logit", f"length of the gradient, seed {seed}")
        for axis, title in zip(axes, titles, strict=True):
            axis.set(title=title, xlabel="step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def collapse_told(runs: Mapping[tuple[float, int], pd.DataFrame], seed: int, own: bool) -> str:
    """Whether factor 10 collapses, whether that is overfitting, and what logits and gradients do: a list.

    Args:
        runs: as for `collapse`, with factor 10 and two seeds at least.
        seed: of the plain run.
        own: whether the chapter runs with its own parameters.
    """
    guided = {s: rows for (factor, s), rows in runs.items() if factor == 10}
    best = {s: rows.sort_values("test", ascending=False, kind="stable").iloc[0] for s, rows in guided.items()}
    end = {s: rows.iloc[-1] for s, rows in guided.items()}
    plain = runs[0.0, seed].iloc[-1]
    falls = holds(all(best[s]["test"] - end[s]["test"] > 0.1 for s in guided), own)
    explodes = holds(all(end[s]["1"] > 1000 * plain["1"] for s in guided), own)
    together = holds(all(abs(end[s]["train"] - end[s]["test"]) < 0.05 for s in guided), own)
    ends = "; ".join(
        f"seed {s}, {percent(best[s]['test'])} of the test set at its best, at step {best[s]['step']:,.0f}, and after "
        f"{end[s]['step']:,.0f} steps {percent(end[s]['test'])} of the test set and {percent(end[s]['train'])} of the "
        "training set"
        for s in guided
    )

    def ending(what: str) -> str:
        return " and ".join(f"{end[s][what]:.2g}" for s in guided)

    lines = [
        ("**Factor 10 collapses here too.** " if falls else "")
        + f"With it: {ends}. Plain training ends at {percent(plain['test'])} and {percent(plain['train'])}.",
        "**It is no overfitting**: accuracy on the training set falls along with that on the test set."
        if falls and together
        else "Overfitting would show as a training accuracy that stays high while test accuracy falls.",
        f"The mean size of a logit ends at {ending('logit')} with factor 10, and at {plain['logit']:.2g} in plain "
        "training.",
        ("**The gradients do explode.** " if explodes else "")
        + f"Those of the first layer's weights end at a length of {ending('1')} with factor 10, and of "
        f"{plain['1']:.2g} in plain training. And neurons freeze: of a hidden layer's, "
        f"{percent(max(end[s]['shut'] for s in guided), 0)} at most are opened by no test image with factor 10, "
        f"{percent(plain['shut'], 0)} in plain training.",
    ]
    return "\n".join(f"- {line}" for line in lines)
