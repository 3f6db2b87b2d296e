"""What the chapter on guided training draws and says of one small batch that is followed by hand, and of the idea.

Not here: the steps of Algorithm 1 themselves, which stand in the chapter's cells, and larger networks
(`athena.book.growth`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.figures import GUIDED, PLAIN
from athena.book.tables import percent

__all__ = [
    "against",
    "forward_told",
    "ideal",
    "network",
    "one_step",
    "pair_of_runs",
    "relevance_flow",
    "relevance_told",
    "scales_told",
    "turned_round",
    "weight_gradients",
]


def ideal() -> Figure:
    """A sketch of the effect that is hoped for, not a measurement (thesis figure 6.1)."""
    share = np.linspace(1, 100, 200)
    plain_curve, guided_curve = 97 - 30 / share**0.5, 97 - 20 / share**0.5
    level = 90
    needed = [np.interp(level, curve, share) for curve in (guided_curve, plain_curve)]
    with figures.style():
        figure, axis = figures.canvas(1, 1, (5.6, 2.5))
        axis.plot(share, plain_curve, color=PLAIN, label="plain")
        axis.plot(share, guided_curve, "--", color=GUIDED, label="guided")
        axis.plot(needed, [level, level], color="black", linewidth=2.5)
        arrow = {"arrowstyle": "->", "color": "black"}
        axis.annotate("data saved", (needed[1], level), (28, 84), arrowprops=arrow, fontsize=9)
        axis.set(xlabel="share of the training data (%)", ylabel="accuracy", xlim=(0, 60), ylim=(75, 97), yticks=[])
        axis.legend(loc="lower right")
    return figure


def one_step() -> Figure:
    """The flow of one guided step, what guidance adds in blue (thesis figures 6.2 and 6.3)."""
    layers, relevance, gradient = "layers,\nas they are", "relevance R\nof each neuron", "gradient\nat the neuron"
    product, weights, step = "gradient\n× (1 + λR)", "gradients\nof the weights", "optimiser's\nstep"
    boxes = {
        "images": (0, 0),
        layers: (1, 0),
        "output": (2, 0),
        "loss": (3, 0),
        relevance: (2, 1),
        gradient: (3, 1),
        product: (3, 2),
        weights: (1, 2),
        step: (0, 2),
    }
    arrows = [
        ("images", layers, ""),
        (layers, "output", ""),
        ("output", "loss", ""),
        ("output", relevance, "LRP"),
        ("loss", gradient, "chain rule"),
        (relevance, product, ""),
        (gradient, product, ""),
        (product, weights, "and on to the layers below"),
        (weights, step, ""),
    ]
    return figures.flow(boxes, arrows, (6.2, 3.1), dict.fromkeys([relevance, product], GUIDED))


def pair_of_runs() -> Figure:
    """The flow of the experiment: what a plain and a guided run share, and what differs (thesis figure 6.4)."""
    shared, plain, guided = "initial weights,\nimages, order", "plain\ntraining", "guided\ntraining"
    boxes = {
        "seed": (0, 1),
        shared: (1, 1),
        plain: (2, 0.4),
        guided: (2, 1.6),
        "test set": (3, 1),
        "difference": (4, 1),
    }
    arrows = [
        ("seed", shared, ""),
        (shared, plain, ""),
        (shared, guided, ""),
        (plain, "test set", ""),
        (guided, "test set", ""),
        ("test set", "difference", ""),
    ]
    return figures.flow(boxes, arrows, (7.0, 2.2), {guided: GUIDED})


def network() -> nn.Sequential:
    """Three inputs, hidden layers of three and two neurons with ReLU, two outputs, in double precision.

    Its weights are chosen so that all numbers can be followed; its affine layers are called linear1 to linear3.
    """
    chosen = {
        "linear1": ([[1, -1, 0.5], [0.5, 1, -1], [-0.5, 0.5, 1]], [0, 0.5, 0]),
        "linear2": ([[1, 1, -0.5], [-0.5, 0.5, 1]], [0.5, 0]),
        "linear3": ([[1, -1], [-0.5, 0.5]], [0, 0.5]),
    }
    found = nn.Sequential()
    for name, (weight, bias) in chosen.items():
        matrix = torch.tensor(weight).double()
        layer = nn.Linear(*matrix.T.shape).double()
        layer.weight.data, layer.bias.data = matrix, torch.tensor(bias).double()
        found.add_module(name, layer)
        if name != "linear3":
            found.add_module(f"relu{name[-1]}", nn.ReLU())
    return found


def forward_told(logits: Tensor, labels: Tensor, sums: Sequence[Tensor]) -> str:
    """The probabilities and the loss of two samples, and how many neurons are shut.

    Args:
        logits: (2, classes); labels: (2,).
        sums: of each hidden layer what its neurons hold before ReLU, (2, neurons).
    """
    chances = logits.softmax(1)
    dead = sum(int((z <= 0).sum()) for z in sums)
    right = [percent(float(chances[n, labels[n]])) for n in (0, 1)]
    return (
        f"The samples belong to classes {labels[0]} and {labels[1]}. The output neurons hold logits; softmax makes "
        f"them probabilities, {right[0]} and {right[1]} for the right class, and the loss is "
        f"{F.cross_entropy(logits, labels):.4g}. At {dead} of the {sum(z.numel() for z in sums)} hidden values, a "
        "neuron for a sample, ReLU gives 0."
    )


def relevance_told(relevance: Sequence[Tensor], gap: float) -> str:
    """What becomes of the first sample's relevance from layer to layer.

    Args:
        relevance: of the output and of both hidden layers, from the output down, each (samples, neurons).
        gap: the largest difference between the formula and `athena.lrp`.
    """
    assert not torch.allclose(relevance[0].sum(1), relevance[1].sum(1))
    sums = [f"{R[0].sum().item():.3g}".replace("-", "−") for R in relevance]
    return (
        f"The formula and `athena.lrp` agree to {gap:.0e}. The first sample's relevance adds up to {sums[0]} at the "
        f"output, {sums[1]} in hidden layer 2 and {sums[2]} in hidden layer 1: the differences are what the biases "
        "keep. ReLU hands relevance on unchanged, so a neuron has one relevance, before and after it."
    )


def relevance_flow(
    relevance: Sequence[Tensor], layers: Sequence[tuple[Tensor, Tensor, Tensor]], stabiliser: float
) -> Figure:
    """The first sample's relevance in the circles of the network, and at the arrows what each carries.

    Args:
        relevance: of each layer, from the lowest up, (samples, neurons).
        layers: between two of them the values below (samples, j), the weights (k, j) and the sums (samples, k).
        stabiliser: the epsilon of the rule.
    """
    carried: dict[tuple[int, int, int], str] = {}
    for layer, ((a, weight, z), above) in enumerate(zip(layers, relevance[1:], strict=True)):
        signed = stabiliser * torch.where(z[0] >= 0, 1.0, -1.0)
        terms = (a[0][:, None] * weight.T / (z[0] + signed) * above[0]).tolist()
        for j, row in enumerate(terms):
            carried |= {(layer, j, k): term for k, term in enumerate(_written(row))}
    held = [R[0].tolist() for R in relevance]
    with figures.style():
        figure, axis = figures.canvas(1, 1, (5.6, 3.0))
        names = ["hidden 1", "hidden 2", "output"]
        figures.network(axis, [_written(R) for R in held], carried, names, held, backwards=True)
    return figure


def _written(values: Sequence[float]) -> list[str]:
    return [f"{round(value, 3) + 0.0:.3g}".replace("-", "−") for value in values]


def scales_told(scales: Mapping[int, Tensor]) -> str:
    """What the scales 1 + λR do, with the first that is negative.

    Args:
        scales: of each hidden layer by its number, (samples, neurons).
    """
    turned = [
        (layer, n + 1, k + 1, S[n, k].item())
        for layer, S in scales.items()
        for n, k in np.ndindex(*S.shape)
        if S[n, k] < 0
    ]
    text = "A scale above 1 enlarges, one between 0 and 1 reduces. "
    if turned:
        layer, n, k, scale = turned[0]
        text += (
            f"**Below 0 it turns the gradient round**: neuron {k} of hidden layer {layer} spoke against the logits of "
            f"sample {n} so strongly that its scale is {scale:.3g}. ".replace("-", "−")
            + "For that sample, its weights are then pushed the other way. "
        )
    return text + (
        "The thesis has negative relevance reduce a gradient (section 7.1.3); it does so only down to λR = −1."
    )


def weight_gradients(plain: Mapping[str, Tensor], guided: Mapping[str, Tensor]) -> Figure:
    """The gradients of the weights of both hidden layers, by the names of the parameters, plain and guided."""
    panels = {
        f"{what}: {name}": gradient[f"{name}.weight"]
        for name in ("linear1", "linear2")
        for what, gradient in (("plain", plain), ("guided", guided))
    }
    return figures.matrices(panels, list(panels), width=7.4)


def against(gradient: Tensor, reference: Tensor) -> str:
    """How many times as long a gradient is as another, and how far the two point the same way."""
    ratio = gradient.norm() / reference.norm()
    cosine = F.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0)
    return f"{ratio:.2f} times as long, cosine {cosine:.2f}".replace("-", "−")


def turned_round(relevance: Tensor) -> tuple[float, int, int] | None:
    """The smallest factor that turns a gradient round, with the sample and the neuron, counted from 1.

    Args:
        relevance: of one layer, (samples, neurons). None is returned where none of it is negative.
    """
    found = [
        (-1 / relevance[n, k].item(), n + 1, k + 1) for n, k in np.ndindex(*relevance.shape) if relevance[n, k] < 0
    ]
    return min(found) if found else None
