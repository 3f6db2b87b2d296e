"""The worked example of thesis 3.6.3, in numbers and as a figure, and a convolution with max pooling run backwards.

Not here: heat maps of trained networks (`athena.book.heatmaps`).
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.book.tables import shown
from athena.relevance import lrp

__all__ = [
    "beside",
    "by_lrp",
    "by_thesis",
    "drawn",
    "network",
    "tie_told",
    "unsigned_epsilon",
    "weights_matter",
    "winner_told",
]

FORMULAE = {"f": "z₄ + z₅", "R1": "z₄ f / (z₄ + z₅)", "R2": "z₅ f / (z₄ + z₅)"}
FORMULAE |= {f"R{k}{j}": f"z{'₁₂₃'[j - 1]} R{'₁₂'[k - 1]} / (z₁ + z₂ + z₃)" for k in (1, 2) for j in (1, 2, 3)}
FORMULAE |= {f"Rz{j}": f"R₁{'₁₂₃'[j - 1]} + R₂{'₁₂₃'[j - 1]}" for j in (1, 2, 3)}
"""The thesis's formula for the output and for each relevance: of the two hidden neurons, of the parts that they send to
the three inputs, and of the inputs."""

Found = dict[str, float]
"""A number for each name in `FORMULAE`."""


def network(hidden: Sequence[Sequence[float]], output: Sequence[float]) -> nn.Sequential:
    """Three inputs, two hidden neurons with ReLU and one output, without biases, in double precision.

    Args:
        hidden: the weights of each hidden neuron; output: those of the output.
    """
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    net[0].weight.data, net[2].weight.data = torch.tensor(hidden).double(), torch.tensor([output]).double()
    return net


def by_lrp(net: nn.Sequential, z: Tensor) -> Found:
    """What `athena.lrp` gives for a `network` and its inputs z, (1, 3), with LRP-0."""
    whole = lrp(net, z, rule=rules.Zero())
    found = {"f": whole.output.item()}
    found |= {f"R{k}": r for k, r in enumerate(whole.layers["0"][0].tolist(), 1)}
    for k in (1, 2):  # what each of the two sends down, by itself
        alone = torch.zeros(1, 2).double()
        alone[0, k - 1] = found[f"R{k}"]
        sent = lrp(net[:2], z, target=_just(alone), rule=rules.Zero()).input[0]
        found |= {f"R{k}{j}": r for j, r in enumerate(sent.tolist(), 1)}
    return found | {f"Rz{j}": r for j, r in enumerate(whole.input[0].tolist(), 1)}


def _just(relevance: Tensor) -> Callable[[Tensor], Tensor]:
    """Relevance to start from, whatever the output is."""
    return lambda output: relevance


def by_thesis(net: nn.Sequential, z: Tensor) -> Found:
    """What the thesis's formulae, which have no weights, give for the same."""
    z4, z5 = net[:2](z)[0].tolist()
    f, total, inputs = net(z).item(), z.sum().item(), z[0].tolist()
    R = {1: z4 * f / (z4 + z5), 2: z5 * f / (z4 + z5)}
    parts = {(k, j): inputs[j - 1] * R[k] / total for k in (1, 2) for j in (1, 2, 3)}
    found = {"f": f, "R1": R[1], "R2": R[2]} | {f"R{k}{j}": r for (k, j), r in parts.items()}
    return found | {f"Rz{j}": parts[1, j] + parts[2, j] for j in (1, 2, 3)}


def beside(theirs: Mapping[str, float], ours: Mapping[str, float]) -> pd.DataFrame:
    """Each formula of the thesis, its value, and that of `athena.lrp`, for reading."""
    columns = {
        "relevance": list(FORMULAE),
        "thesis's formula": list(FORMULAE.values()),
        "its value": [f"{theirs[name]:.4g}" for name in FORMULAE],
        "athena.lrp": [f"{ours[name]:.4g}" for name in FORMULAE],
    }
    return shown(pd.DataFrame(columns), "relevance")


def weights_matter(without: Mapping[str, float], ours: Mapping[str, float]) -> pd.DataFrame:
    """The relevance of each neuron by formulae without weights and by LRP-0, for reading.

    Both must add up to the output, and disagree on the sign of the second input.
    """
    names = ["f", "R1", "R2", "Rz1", "Rz2", "Rz3"]
    assert all(abs(sum(found[name] for name in names[3:]) - found["f"]) < 1e-9 for found in (without, ours))
    assert without["Rz2"] > 0 > ours["Rz2"]
    columns = {
        "relevance": names,
        "formulae without weights": [f"{without[name]:.4g}" for name in names],
        "athena.lrp, LRP-0": [f"{ours[name]:.4g}" for name in names],
    }
    return shown(pd.DataFrame(columns), "relevance")


def drawn(net: nn.Sequential, z: Tensor, found: Mapping[str, float]) -> Figure:
    """A `network` twice: with its values and weights, and with the relevance found and the parts that arrows carry."""
    into, (out,) = (weight.detach() for weight in net.parameters())
    values = [z[0].tolist(), net[:2](z)[0].tolist(), [found["f"]]]
    R = [[found[f"Rz{j}"] for j in (1, 2, 3)], [found["R1"], found["R2"]], [found["f"]]]
    up = {(0, j, k): into[k, j].item() for j in range(3) for k in range(2)}
    up |= {(1, k, 0): out[k].item() for k in range(2)}
    sent = {(0, j, k): found[f"R{k + 1}{j + 1}"] for j in range(3) for k in range(2)}
    sent |= {(1, k, 0): R[1][k] for k in range(2)}
    layers = ["z₁ to z₃", "z₄, z₅", "f"]
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (7.4, 3.0))
        for axis, numbers, arrows, coloured in ((left, values, up, None), (right, R, sent, R)):
            written = [[_short(value) for value in layer] for layer in numbers]
            edges = {place: _short(value) for place, value in arrows.items()}
            figures.network(axis, written, edges, layers, coloured, backwards=coloured is not None)
        left.set_title("forward: values and weights")
        right.set_title("backward: relevance")
    return figure


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def unsigned_epsilon() -> pd.DataFrame:
    """What the only input of a neuron with z = −0.1 and relevance 1 gets, with ε as in the thesis and with the sign."""
    one, rows = nn.Linear(1, 1, bias=False), []
    one.weight.data.fill_(-1.0)
    for epsilon in (0.05, 0.1, 0.2):
        out = lrp(one, torch.tensor([[0.1]]), target=lambda o: torch.ones_like(o), rule=rules.Epsilon(epsilon))
        unsigned = f"{-0.1 / (epsilon - 0.1):.3g}" if epsilon != 0.1 else "division by 0"
        signed = f"{out.input.item():.3g}"
        rows.append({"ε": f"{epsilon:g}", "ε without a sign": unsigned, "ε with the sign of z": signed})
        assert 0 < out.input.item() < 1
    return shown(pd.DataFrame(rows), "ε")


def winner_told(image: Tensor, kernel: Tensor, forward: Tensor, won: Tensor) -> str:
    """How the neuron that holds the most relevance shares it out over its window.

    Args:
        image: (h, w); kernel: (3, 3), with zeros around the image.
        forward: (h, w), the convolution after ReLU; won: (h, w), relevance before pooling.
    """
    i, j = (won == won.max()).nonzero()[0].tolist()
    terms = [
        f"{image[i + di, j + dj]:g} · {kernel[1 + di, 1 + dj]:g}".replace("-", "−")
        for di in (-1, 0, 1)
        for dj in (-1, 0, 1)
        if kernel[1 + di, 1 + dj] and 0 <= i + di < len(image) and 0 <= j + dj < image.shape[1]
    ]
    return (
        f"The strongest winner stands in row {i + 1}, column {j + 1}. Its sum is {' + '.join(terms)} = "
        f"{forward[i, j]:g}; it holds relevance {won[i, j]:g}, so each pixel of its window gets its own term of that "
        f"sum. Relevance adds up to {won.sum():g} in each array. With LRP-0 and a start at the output itself the "
        "shares are the terms; a loser of its field, however close, gets nothing."
    )


def tie_told() -> str:
    """Which of four equal numbers in a field gets the relevance of its maximum."""
    copied = nn.Conv2d(1, 1, 1, bias=False)
    copied.weight.data.fill_(1.0)
    tie = nn.Sequential(copied, nn.MaxPool2d(2))
    equal = lrp(tie, torch.ones(1, 1, 2, 2), target=lambda output: output, rule=rules.Zero()).input.flatten().tolist()
    assert equal[1:] == [0, 0, 0]
    return (
        "Where two are equal the first wins, as in PyTorch's own backward pass: four ones in one field get relevance "
        f"{', '.join(f'{value:g}' for value in equal)}."
    )
