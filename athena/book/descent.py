"""What the first chapter draws and says of gradient descent: on the loss w², and on that of a straight line.

Not here: how a gradient is found (`athena.book.neurons` draws the chain rule).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from athena.book import figures
from athena.book.figures import GUIDED, PLAIN, THESIS
from athena.book.fundamentals import signed

__all__ = ["Line", "line", "valley", "walks_told"]

BATCH, PASSES = 8, 15
"""Points in a batch of SGD, and passes over the data."""


def valley(path: Tensor, rate: float) -> Figure:
    """A walk on the loss w²: on the curve, and the loss after each step.

    Args:
        path: w before and after each step, (steps + 1,).
        rate: the learning rate.
    """
    w = torch.linspace(-2.6, 2.6, 200)
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (5.6, 2.3))
        left.plot(w, w**2, color=PLAIN, linewidth=1.2)
        left.plot(path, path**2, "o-", color=THESIS, markersize=5, linewidth=1)
        left.plot(path[0], path[0] ** 2, "s", color=GUIDED, markersize=8)
        left.set(xlabel="weight w", ylabel="loss w²", xlim=(-2.6, 2.6), ylim=(-0.3, 6.5))
        losses = (path**2).clamp(min=1e-12)
        right.semilogy(torch.arange(len(path)), losses, "o-", color=THESIS, markersize=5, linewidth=1)
        right.axhline(path[0] ** 2, color=GUIDED, linewidth=1, linestyle="--")
        right.set(xlabel="step", ylabel="loss (log)", ylim=(1e-7, 1e3))
        right.set_title(f"each step: w times {signed(1 - 2 * rate)}")
    return figure


def walks_told(paths: Mapping[float, Tensor]) -> str:
    """What each learning rate does to w; the walks are held against the formula.

    Args:
        paths: as for `valley`, among others for the rates 0.01, 0.5, 0.8, 1 and 1.1.
    """
    for rate, path in paths.items():
        by_formula = path[0] * (1 - 2 * rate) ** torch.arange(len(path)).double()
        assert torch.allclose(path, by_formula), "autograd and formula differ"
    slow, leaving = paths[0.01], paths[1.1]
    assert paths[0.5][1].abs() < 1e-12 and paths[1.0][-1].abs() == paths[1.0][0].abs() and leaving[-1].abs() > 5
    assert (paths[0.8][1:] * paths[0.8][:-1] < 0).all() and paths[0.8][-1].abs() < 0.01 and slow[-1].abs() > 1
    return (
        f"With η = 0.01, {len(slow) - 1} steps take w no further than from {signed(slow[0], 2)} to "
        f"{signed(slow[-1], 2)}. With 0.5 one step is enough. With 0.8 w jumps across the valley and still comes down, "
        f"with 1 it jumps back and forth and never gets lower, and with 1.1 it leaves: after {len(leaving) - 1} steps "
        f"w is {signed(leaving[-1], 1)}."
    )


@dataclass(frozen=True)
class Line:
    """A straight line to be fitted to noisy points by the mean squared error.

    Attributes:
        X, y: (points, 2), ones and the place of each point; (points,).
        start: where both walks begin, (2,).
        seed: of the order of the points in batches.
    """

    X: Tensor
    y: Tensor
    start: Tensor
    seed: int

    @property
    def best(self) -> Tensor:
        """The parameters with the least loss, (2,)."""
        return torch.linalg.lstsq(self.X, self.y).solution

    @property
    def limit(self) -> float:
        """The learning rate above which the steps of gradient descent grow: 2 over the largest curvature."""
        return float(2 / torch.linalg.eigvalsh(2 * self.X.T @ self.X / len(self.y)).max())

    def loss(self, w: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """The mean squared error of some of the points."""
        return ((self.X[rows] @ w - self.y[rows]) ** 2).mean()

    def gradient(self, w: Tensor, rows: Tensor) -> Tensor:
        """Of the loss, by autograd."""
        w = w.clone().requires_grad_()
        return torch.autograd.grad(self.loss(w, rows), w)[0]

    def descend(self, rate: float, batch: int) -> Tensor:
        """A walk of `PASSES` passes over the data, (steps + 1, 2); all points in a batch are gradient descent."""
        order, path = torch.Generator().manual_seed(self.seed), [self.start]
        for _ in range(PASSES):
            for rows in torch.randperm(len(self.y), generator=order).split(batch):
                path.append(path[-1] - rate * self.gradient(path[-1], rows))
        return torch.stack(path)

    def landscape(self, rate: float) -> Figure:
        """Both walks on lines of equal loss, and how far each is above the least loss."""
        a, b = torch.meshgrid(
            torch.linspace(-2, 4, 120).double(), torch.linspace(-1.5, 4.5, 120).double(), indexing="xy"
        )
        surface = ((torch.stack([a, b], -1) @ self.X.T - self.y) ** 2).mean(-1)
        walks = (
            (f"SGD, batches of {BATCH}", self.descend(rate, BATCH), THESIS, "-"),
            ("GD", self.descend(rate, len(self.y)), GUIDED, "-o"),
        )
        levels = np.geomspace(0.4, 60, 6)
        with figures.style():
            figure, (left, right) = figures.canvas(1, 2, (5.6, 2.6))
            left.contour(a, b, surface, levels=levels, colors="#bbbbbb", linewidths=1, antialiased=False)
            for name, path, tone, mark in walks:
                excess = torch.stack([self.loss(w) for w in path]) - self.loss(self.best)
                near = int((excess < 60).cumprod(0).sum()) + 1  # of a walk that leaves, the beginning
                left.plot(*path[:near].T, mark, color=tone, markersize=3.5, linewidth=1)
                passed = torch.linspace(0, PASSES, len(path))
                above = excess.clamp(min=1e-12)
                right.semilogy(passed, above, mark, color=tone, markersize=3.5, linewidth=1, label=name)
            left.plot(*self.start, "s", color="black", markersize=6)
            left.plot(*self.best, "*", color="black", markersize=11)
            left.set(xlim=(-2, 4), ylim=(-1.5, 4.5), xlabel="w₀", ylabel="w₁", title=f"η = {rate:.3g}")
            right.set(xlabel="passes over the data", ylabel="loss above the least", ylim=(1e-7, 1e4))
            right.set_yticks([1e-6, 1e-3, 1, 1e3])
            right.legend(loc="lower left" if rate < 0.1 or rate > self.limit else "upper right")
        return figure

    def told(self, beyond: float) -> str:
        """How far both walks are above the least loss in the end, at a small, a large and a too large rate."""

        def above(rate: float, batch: int, last: int = 5) -> float:
            path = self.descend(rate, batch)[-last * len(self.y) // batch :]
            return (torch.stack([self.loss(w) for w in path]).mean() - self.loss(self.best)).item()

        every = len(self.y)
        slow, fast, lost = ({batch: above(rate, batch) for batch in (every, BATCH)} for rate in (0.01, 0.4, beyond))
        first = (self.loss(self.start) - self.loss(self.best)).item()
        assert slow[BATCH] < slow[every] and fast[every] < fast[BATCH] and lost[every] > first
        return (
            "How far is each walk above the least loss, on average over its last five passes? With a small rate, 0.01, "
            f"SGD is ahead: {slow[BATCH]:.2g}, GD {slow[every]:.2g}. It has taken {every // BATCH} times as many steps "
            f"from the same data. With a large rate, 0.4, GD gets closer: {fast[every]:.2g} against {fast[BATCH]:.2g}, "
            f"because each batch pulls SGD towards a minimum of its own. Above {self.limit:.3f}, which is 2 over the "
            f"largest curvature of this loss, GD leaves: at {beyond:.3g} it is at {lost[every]:.0f}, having started at "
            f"{first:.1f}."
        )


def line(seed: int, points: int = 40) -> Line:
    """Points near 1 + 2 x; the gradient by autograd is held against the formula."""
    x = torch.linspace(0, 2, points, dtype=torch.float64)
    X = torch.stack([torch.ones_like(x), x], 1)
    noise = torch.randn(points, generator=torch.Generator().manual_seed(seed)).double()
    made = Line(X, 1.0 + 2.0 * x + 0.5 * noise, torch.tensor([-1.5, 1.5]).double(), seed)
    for rows in (torch.arange(points), torch.arange(BATCH)):
        by_formula = 2 * X[rows].T @ (X[rows] @ made.start - made.y[rows]) / len(rows)
        assert torch.allclose(made.gradient(made.start, rows), by_formula)
    return made
