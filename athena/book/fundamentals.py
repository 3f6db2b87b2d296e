"""What the first chapter draws, and the small networks that it trains in seconds.

Not here: what the chapter works out number by number, which stands in its own cells.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from athena.attribution.superpixels import label_maps
from athena.book.figures import GUIDED, PLAIN, RELEVANCE, THESIS, canvas, style

__all__ = ["bare", "classical", "filters", "levels", "numbers", "overfitting", "signed"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def signed(value: Any, digits: int = 4) -> str:
    """A number without superfluous zeros, its minus as long as a plus: ``"−0.5"``."""
    return f"{round(float(value), digits) + 0.0:g}".replace("-", "−")


def bare(axis: Axes, title: str) -> None:
    """A picture's axes: nothing but a title."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9.5)
    axis.grid(visible=False)
    for side in axis.spines.values():
        side.set_visible(False)


def numbers(
    axis: Axes,
    values: Any,
    title: str,
    low: float | None = None,
    high: float | None = None,
    boxes: Sequence[tuple[int, int, int, int]] = (),
    known: Any = None,
) -> None:
    """An array in grey with its numbers written into the cells.

    Args:
        axis: to draw on.
        values: of two dimensions.
        title: above it.
        low, high: what is black and what is white, by default the least and the largest value.
        boxes: (row, column, height, width) of what to outline.
        known: of the same shape, false where the number is not written. By default all are.
    """
    values = np.asarray(values, dtype=float)
    black, white = values.min() if low is None else low, values.max() if high is None else high
    axis.imshow(values, cmap="gray", vmin=black, vmax=white)
    for (i, j), value in np.ndenumerate(values):
        if known is None or known[i, j]:
            ink = "w" if value < (black + white) / 2 else "k"
            axis.text(j, i, signed(value, 2), ha="center", va="center", fontsize=9, color=ink)
    for place, (row, column, height, width) in enumerate([(0, 0, *values.shape), *boxes]):
        edge, line = (THESIS, 2.5) if place else ("#8c8c8c", 1.0)
        corner = (column - 0.5, row - 0.5)
        axis.add_patch(Rectangle(corner, width, height, fill=False, clip_on=False, edgecolor=edge, linewidth=line))
    bare(axis, title)


def levels(image: Tensor, mask: Tensor, digit: int) -> Figure:
    """One image on the three levels of computer vision, the highest with its three common questions.

    Args:
        image: (3, h, w), from 0 to 1.
        mask: (h, w), true on the pixels of the digit.
        digit: what it is.
    """
    grey = image.mean(0)
    edges = (grey.diff(dim=0)[:, 1:] ** 2 + grey.diff(dim=1)[1:] ** 2).sqrt()
    regions = label_maps(image[None], 12)[0, 0]
    averaged = torch.zeros_like(image)
    for region in regions.unique():
        averaged[:, regions == region] = image[:, regions == region].mean(1, keepdim=True)
    rows, columns = mask.nonzero(as_tuple=True)
    painted = torch.where(mask, torch.tensor(to_rgb(THESIS))[:, None, None], 0.5 + 0.5 * grey)
    titles = ("low level:\nedges", "middle level:\nregions", f"classification:\n“{WORDS[digit]}”")
    pictures = (edges, averaged, image, image, painted)
    with style():
        figure, axes = canvas(1, 5, (7.4, 1.95))
        names = (*titles, f"detection:\n“{WORDS[digit]}”, here", "segmentation:\nthese pixels")
        for axis, picture, title in zip(axes, pictures, names, strict=True):
            axis.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="gray")
            bare(axis, title)
        left, top = columns.min() - 0.5, rows.min() - 0.5
        size = columns.max() + 0.5 - left, rows.max() + 0.5 - top
        axes[3].add_patch(Rectangle((float(left), float(top)), *map(float, size), fill=False, edgecolor=THESIS, lw=2.5))
    return figure


def classical(seed: int, points: int = 200) -> tuple[Figure, dict[str, float]]:
    """Two half moons, which no straight line divides: logistic regression, a decision tree and a network.

    Returns:
        The figure, and for each of the three the share of 1,000 other points that it gets right.
    """
    x, y = make_moons(points, noise=0.2, random_state=seed)
    new_x, new_y = make_moons(1000, noise=0.2, random_state=seed + 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    _train(network, torch.tensor(x).float(), torch.tensor(y), steps=300, batch=points, rate=0.02, seed=seed)
    line = LogisticRegression().fit(x, y)
    tree = DecisionTreeClassifier(max_depth=4, random_state=seed).fit(x, y)

    def by_network(at: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor(at).float()).argmax(1).numpy()

    answers = {"logistic regression": line.predict, "decision tree": tree.predict, "a network": by_network}
    right = {name: float((answer(new_x) == new_y).mean()) for name, answer in answers.items()}
    a, b = np.meshgrid(np.linspace(-1.7, 2.7, 150), np.linspace(-1.4, 1.9, 150))
    with style():
        figure, axes = canvas(1, 3, (7.4, 2.3))
        for axis, (name, answer) in zip(axes, answers.items(), strict=True):
            side = answer(np.stack([a.ravel(), b.ravel()], 1)).reshape(a.shape)
            axis.contourf(a, b, side, levels=[-1, 0.5, 2], colors=[GUIDED, THESIS], alpha=0.2)
            for kind, (mark, tone) in enumerate((("o", GUIDED), ("s", THESIS))):
                axis.plot(*x[y == kind].T, mark, color=tone, markersize=2.5)
            bare(axis, f"{name}: {100 * right[name]:.0f} % right")
    return figure, right


def overfitting(
    images: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], few: int, steps: int, seed: int
) -> tuple[Figure, dict[int, tuple[float, float, float]]]:
    """A network with one hidden layer, trained on few images and on all of them for as many steps.

    Args:
        images, labels: of the training set and of the test set; images (n, c, h, w).
        few: how many are few.

    Returns:
        The figure, and for each number of images the accuracy on them, that on the test set, both after the last step,
        and the least cross-entropy on the test set over the last one.
    """
    found, curves = {}, {}
    inputs = images[0][0].numel()
    for count in (few, len(labels[0])):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 10))
        seen = (images[0][:count], labels[0][:count]), (images[1], labels[1])
        curves[count] = _train(network, *seen[0], steps, batch=50, rate=1e-3, seed=seed, watch=seen)
        with torch.no_grad():
            train, test = ((network(x).argmax(1) == y).float().mean().item() for x, y in seen)
        losses = [row[2] for row in curves[count]]
        found[count] = train, test, min(losses) / losses[-1]
    with style():
        figure, axes = canvas(1, 2, (7.0, 2.5), sharey=True)
        for axis, (count, rows) in zip(axes, curves.items(), strict=True):
            at, train_loss, test_loss = zip(*rows, strict=True)
            axis.semilogy(at, train_loss, color=PLAIN, label="training set")
            axis.semilogy(at, test_loss, color=THESIS, linestyle="--", label="test set")
            axis.set(title=f"{count:,} images", xlabel=f"step ({-(-count // 50)} are an epoch)")
        axes[0].set_ylabel("cross-entropy")
        axes[0].legend()
    return figure, found


def filters(
    images: Tensor, labels: Tensor, picture: Tensor, seed: int, epochs: int = 3
) -> tuple[Figure, nn.Sequential]:
    """Eight filters of 7 × 7 before and after training, and what the trained ones answer to a picture.

    Args:
        images: (n, 1, 32, 32); labels: (n,), of ten classes.
        picture: (32, 32), on which the trained filters are tried.

    Returns:
        The figure, and the trained network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        filters = nn.Conv2d(1, 8, 7, padding=3)
        network = nn.Sequential(filters, nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    first = filters.weight.detach().clone()
    _train(network, images, labels, epochs * -(-len(labels) // 50), batch=50, rate=3e-3, seed=seed)
    last = filters.weight.detach()
    with torch.no_grad():
        maps = network[:2](picture[None, None])[0]
    most = float(torch.stack([first, last]).abs().max())
    with style():
        figure, axes = canvas(3, 8, (7.4, 3.1))
        for column in axes.T:
            for axis in column:
                bare(axis, "")
        for k in range(8):
            for row, weight in enumerate((first, last)):
                axes[row, k].imshow(weight[k, 0], cmap=RELEVANCE, vmin=-most, vmax=most)
            axes[2, k].imshow(maps[k], cmap="gray", vmin=0, vmax=float(maps.max()))
        for axis, name in zip(axes[:, 0], ("at random", "learned", "its map"), strict=True):
            axis.set_ylabel(name)
    return figure, network


def _train(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    watch: tuple[tuple[Tensor, Tensor], ...] = (),
) -> list[tuple[float, ...]]:
    """Adam on batches drawn anew in each epoch; at every tenth step the step and the loss on each set of `watch`."""
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), rate)
    rows: list[tuple[float, ...]] = []
    batches: list[Tensor] = []
    for step in range(steps + 1):
        if watch and step % 10 == 0:
            with torch.no_grad():
                rows.append((step, *(F.cross_entropy(network(a), b).item() for a, b in watch)))
        batches = batches or list(torch.randperm(len(y), generator=order).split(batch))
        index = batches.pop()
        optimiser.zero_grad()
        F.cross_entropy(network(x[index]), y[index]).backward()
        optimiser.step()
    return rows
