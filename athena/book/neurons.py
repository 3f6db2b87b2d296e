"""What the first chapter draws and says of single neurons: what one can do, XOR, activations, and the chain rule.

Not here: gradient descent (`athena.book.descent`) and convolutions (`athena.book.convolutions`).
"""

import itertools
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.figures import GUIDED, PLAIN, THESIS
from athena.book.fundamentals import signed
from athena.book.tables import shown

__all__ = [
    "activations",
    "activations_told",
    "chain_rule",
    "logic",
    "neuron",
    "one_neuron_told",
    "xor",
    "xor_network",
    "xor_table",
]

ONE, ZERO = THESIS, GUIDED
"""Colours of the answers 1 and 0."""
CORNERS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))
LOGIC = {"0000": "never", "0001": "AND", "0010": "x₁ and not x₂", "0011": "x₁", "0111": "OR", "1111": "always"}
"""What a neuron is called that gives these answers at the four corners."""


def logic(w1: float, w2: float, b: float) -> str:
    """What a neuron with two inputs computes, such as ``"AND"``, for weights and a bias that give a name in `LOGIC`."""
    return LOGIC[_answers(w1, w2, b)]


def neuron(w1: float, w2: float, b: float) -> Figure:
    """A neuron with two inputs: the plane of its inputs with its answers, and its weighted sums at the four corners."""
    total = _sums(w1, w2, b)
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (5.6, 2.4))
        _plane(left, lambda x: x @ torch.tensor([w1, w2]) + b)
        _corners(left, CORNERS, total > 0)
        left.set(xlabel="input x₁", ylabel="input x₂", title=f"answers: {logic(w1, w2, b)}")
        right.barh(range(4), total, color=[ONE if value > 0 else ZERO for value in total], height=0.6)
        right.axvline(0, color="black", linewidth=1.2)
        right.set_yticks(range(4), [f"{x1:g}, {x2:g}" for x1, x2 in CORNERS.tolist()])
        right.set(xlim=(-3, 3), xlabel="weighted sum (threshold: 0)", ylabel="inputs x₁, x₂")
        right.set_title(f"w₁ = {signed(w1)}, w₂ = {signed(w2)}, b = {signed(b)}")
    return figure


def one_neuron_told() -> str:
    """Which of the 16 ways to answer at four corners one neuron reaches, tried on a grid of weights and biases."""
    grid = torch.arange(-2, 2.1, 0.5).tolist()
    reached = {_answers(w1, w2, b) for w1, w2, b in itertools.product(grid, repeat=3)}
    every = {"".join(bits) for bits in itertools.product("01", repeat=4)}
    missing = every - reached
    assert missing == {"0110", "1001"}
    return (
        f"The output equals XOR at all four corners. Of the {len(every)} ways to answer at four corners, one neuron "
        f"reaches {len(reached)} when its weights and bias go through a grid from −2 to 2; the {len(missing)} that it "
        "never reaches are XOR and its opposite."
    )


def xor_network() -> nn.Sequential:
    """Two hidden neurons, ReLU(x₁ + x₂) and ReLU(x₁ + x₂ − 1), and the output h₁ − 2 h₂."""
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    values = {"0": ([[1.0, 1.0], [1.0, 1.0]], [0.0, -1.0]), "2": ([[1.0, -2.0]], [0.0])}
    for place, (weight, bias) in values.items():
        layer = network.get_submodule(place)
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return network


def xor(network: nn.Sequential) -> Figure:
    """The plane of the inputs and that of the hidden values of `xor_network`, each with the line between its sides."""
    hidden, _, exclusive = _at_corners(network)
    with figures.style(), torch.no_grad():
        figure, (left, right) = figures.canvas(1, 2, (5.6, 2.7))
        _plane(left, lambda x: network(x)[..., 0] - 0.5)
        _corners(left, CORNERS, exclusive)
        left.set(xlabel="input x₁", ylabel="input x₂", title="what goes in")
        _plane(right, lambda h: network[2](h)[..., 0] - 0.5, high=2.5)
        _corners(right, hidden, exclusive)
        right.set(xlabel="hidden h₁", ylabel="hidden h₂", title="what the output neuron sees", xticks=[0, 1, 2])
    return figure


def xor_table(network: nn.Sequential) -> pd.DataFrame:
    """All values of `xor_network` at the four corners, for reading."""
    hidden, output, exclusive = _at_corners(network)
    assert torch.equal(output, exclusive.float())
    columns = {
        "x₁, x₂": [f"{x1:g}, {x2:g}" for x1, x2 in CORNERS.tolist()],
        "h₁": [signed(value) for value in hidden[:, 0]],
        "h₂": [signed(value) for value in hidden[:, 1]],
        "output h₁ − 2 h₂": [signed(value) for value in output],
        "XOR": exclusive.int().tolist(),
    }
    return shown(pd.DataFrame(columns), "x₁, x₂")


def _at_corners(network: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values (4, 2), output (4,), and whether XOR is true (4,)."""
    with torch.no_grad():
        return network[:2](CORNERS), network(CORNERS)[:, 0], CORNERS[:, 0] != CORNERS[:, 1]


def _sums(w1: float, w2: float, b: float) -> Tensor:
    return CORNERS @ torch.tensor([w1, w2]) + b


def _answers(w1: float, w2: float, b: float) -> str:
    return "".join(str(int(total > 0)) for total in _sums(w1, w2, b))


def _plane(axis: Axes, value: Callable[[Tensor], Tensor], low: float = -0.5, high: float = 1.5) -> None:
    """Colours the side where the function is above zero, and draws the line between the sides."""
    x1, x2 = torch.meshgrid(*2 * [torch.linspace(low, high, 200)], indexing="xy")
    above = value(torch.stack([x1, x2], -1))
    axis.contourf(x1, x2, above, levels=[-1e9, 0, 1e9], colors=[ZERO, ONE], alpha=0.2)
    axis.contour(x1, x2, above, levels=[0], colors="black", linewidths=1.5)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=[0, 1], yticks=[0, 1])


def _corners(axis: Axes, points: Tensor, answers: Tensor) -> None:
    for (x1, x2), answer in zip(points.tolist(), answers, strict=True):
        axis.plot(x1, x2, "s" if answer else "o", color=ONE if answer else ZERO, markersize=11)
        axis.text(x1, x2, str(int(answer)), color="w", fontsize=8.5, ha="center", va="center")


# Activations

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, str, str]] = {
    "ReLU": (torch.relu, ONE, "-", "s"),
    "sigmoid": (torch.sigmoid, ZERO, "--", "o"),
    "tanh": (torch.tanh, PLAIN, "-.", "^"),
}
"""Each function with its colour, line and marker."""
LINE = torch.linspace(-5, 5, 400, dtype=torch.float64)
"""No point of it is 0, where ReLU has no slope."""


def activations(z: float) -> Figure:
    """Three activation functions and their slopes, with the point z marked on each."""
    with figures.style():
        figure, axes = figures.canvas(1, 2, (5.6, 2.3))
        for name, (function, tone, dashes, marker) in ACTIVATIONS.items():
            curves, points = _value_and_slope(function, LINE), _value_and_slope(function, torch.tensor([z]).double())
            for axis, curve, point in zip(axes, curves, points, strict=True):
                axis.plot(LINE, curve, dashes, color=tone, linewidth=1.6)
                axis.plot(z, point, marker, color=tone, markersize=7, label=f"{name}: {signed(point, 3)}")
        for axis, what in zip(axes, ("value", "slope"), strict=True):
            axis.axvline(z, color="black", linewidth=0.8, linestyle=":")
            axis.set(xlabel="weighted sum z", ylabel=what, xticks=[-4, 0, 4])
            axis.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="white")
        axes[0].set_ylim(-1.2, 5.2)
        axes[1].set(ylim=(-0.1, 1.75), yticks=[0, 0.5, 1])
    return figure


def activations_told() -> str:
    """How steep the activation functions are; autograd's slopes are held against the formulae."""
    s, t = LINE.sigmoid(), LINE.tanh()
    formulae = {"ReLU": (LINE > 0).double(), "sigmoid": s * (1 - s), "tanh": 1 - t**2}
    slopes = {name: _value_and_slope(function, LINE)[1] for name, (function, *_) in ACTIVATIONS.items()}
    assert all(torch.allclose(slopes[name], formulae[name], atol=1e-12) for name in slopes)
    four = torch.tensor([4.0]).double()
    far = {name: _value_and_slope(function, four)[1].item() for name, (function, *_) in ACTIVATIONS.items()}
    steepest = slopes["sigmoid"].max().item()
    assert 0.249 < steepest <= 0.25 and slopes["tanh"].max() <= 1 and set(slopes["ReLU"].tolist()) == {0.0, 1.0}
    assert far["ReLU"] == 1 and far["sigmoid"] < 0.02 and far["tanh"] < 0.002
    return (
        f"The sigmoid never has a slope above {steepest:.2f}: through five such layers an error keeps at most "
        f"{steepest**5:.1g} of its size, weights aside. At z = 4 the slope is {far['sigmoid']:.3f} for the sigmoid, "
        f"{far['tanh']:.4f} for tanh and {far['ReLU']:g} for ReLU. ReLU pays for it on the other side: below zero its "
        "slope is exactly 0, and nothing gets through."
    )


def _value_and_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    out = function(z)
    return out.detach(), torch.autograd.grad(out.sum(), z)[0]


def chain_rule(
    values: Sequence[Tensor], weights: Sequence[Tensor], at: Sequence[Tensor], of: Sequence[Tensor]
) -> Figure:
    """A network of two inputs, three hidden neurons and one output, forward and backward.

    Args:
        values: of the inputs (2,), of the hidden neurons (3,) and of the output (1,).
        weights: (3, 2), a row for each hidden neuron, and (3,).
        at: the gradient of the loss at the hidden sums (3,) and at the output (1,).
        of: the gradients of the weights, in their shapes.
    """
    names = ["inputs", "hidden", "output"]
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (7.4, 3.0))
        figures.network(left, [[signed(v) for v in layer] for layer in values], _on_arrows(*weights), names)
        down = [["", ""], *([signed(v) for v in layer] for layer in at)]
        figures.network(right, down, _on_arrows(*of), names, backwards=True)
        left.set_title("forward: values and weights")
        right.set_title("backward: gradients")
    return figure


def _on_arrows(lower: Tensor, upper: Tensor) -> dict[tuple[int, int, int], str]:
    text = {(0, j, k): signed(lower[k, j]) for k in range(3) for j in range(2)}
    return text | {(1, k, 0): signed(upper[k]) for k in range(3)}
