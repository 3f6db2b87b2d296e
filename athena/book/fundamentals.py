"""What the first chapter draws, and the small networks that it trains in seconds.

Not here: what the chapter works out number by number, which stands in its own cells.
"""

from collections.abc import Mapping, Sequence
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

__all__ = [
    "bare",
    "channels",
    "channels_told",
    "classical",
    "coarser",
    "cross_entropy",
    "filters",
    "levels",
    "numbers",
    "overfitting",
    "overfitting_told",
    "pixels",
    "probabilities",
    "signed",
    "softmax",
    "softmax_told",
]

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


def overfitting_told(found: Mapping[int, tuple[float, float, float]]) -> str:
    """What `overfitting` has found, in words; found: by the number of images, few of them first."""
    (few, everything), ((train_few, test_few, least), (train_all, test_all, _)) = found, found.values()
    assert train_few > 0.99 and test_few < test_all
    rise = f"With {few} images the loss on the test set ends {1 / least:.2f} times as high as it was at its lowest. "
    return (
        f"**That is overfitting.** With {few} images the network gets {100 * train_few:.0f} % of them right, and "
        f"{100 * test_few:.0f} % of the test set; with all {everything:,} it is {100 * train_all:.0f} % and "
        f"{100 * test_all:.0f} %. {rise if least < 0.99 else ''}Training accuracy that rises while test accuracy does "
        "not is the sign of overfitting. Where both fall together it is something else, which the chapter on guided "
        "training comes back to."
    )


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


def softmax(z: Tensor) -> Tensor:
    """The formula as it stands, for logits (classes,)."""
    return z.exp() / z.exp().sum()


def probabilities(logits: Tensor, temperature: float) -> Figure:
    """Logits (classes,) over a temperature, and what softmax makes of them."""
    scaled = logits / temperature
    with style():
        figure, axes = canvas(1, 2, (5.6, 2.1), sharey=True)
        for axis, values, digits, tone in zip(
            axes, (scaled, 100 * softmax(scaled)), (2, 1), (PLAIN, THESIS), strict=True
        ):
            bars = axis.barh(range(len(logits)), values, color=tone, height=0.6)
            axis.bar_label(bars, [signed(value, digits) for value in values], padding=3, fontsize=9)
        axes[0].set(xlim=(-6, 10.5), xlabel="logit / T", title=f"T = {temperature:g}", xticks=range(-4, 9, 4))
        axes[1].set(xlim=(0, 118), xlabel="probability (%)", title="after softmax", xticks=range(0, 101, 25))
        axes[0].set_yticks(range(len(logits)), [f"class {c}" for c in range(len(logits))])
        axes[0].invert_yaxis()
    return figure


def softmax_told(logits: Tensor, temperatures: Sequence[float]) -> str:
    """What temperatures and a shift do to the probabilities, and where the formula fails."""
    shifted = softmax(logits + 5)
    assert torch.allclose(shifted, softmax(logits)) and torch.allclose(softmax(logits), logits.softmax(0))
    sharp, flat = softmax(logits / 0.25), softmax(logits / 10)
    assert all(torch.equal(softmax(logits / T).argsort(), logits.argsort()) for T in temperatures)
    huge = torch.tensor([1000.0, 999.0])
    assert torch.isnan(softmax(huge)).all() and torch.allclose(huge.softmax(0), torch.tensor([1.0, 0.0]).softmax(0))
    return (
        f"A low temperature makes the winner certain ({100 * sharp.max():.1f} % at T = 0.25), a high one makes all "
        f"classes nearly alike (from {100 * flat.min():.1f} to {100 * flat.max():.1f} % at T = 10); the order never "
        "changes. **Adding the same number to all logits changes nothing**: with 5 added to each, the probabilities "
        f"differ by at most {(shifted - softmax(logits)).abs().max():.0e}. Only differences of logits count. PyTorch "
        "makes use of that and subtracts the largest first: the formula as it stands fails for logits of 1000, where "
        "the exponential overflows."
    )


def cross_entropy(p: Tensor, gradient: Tensor) -> Figure:
    """The loss against the probability of the right class, with a dot for each class, and the gradient of the logits.

    Args:
        p, gradient: (classes,).
    """
    with style():
        figure, (left, right) = canvas(1, 2, (5.6, 2.2))
        given = torch.linspace(0.005, 1, 200)
        left.plot(given, -given.log(), color=PLAIN)
        left.plot(p, -p.log(), "o", color=THESIS)
        left.set(xlabel="probability of the right class", ylabel="loss")
        right.barh(range(len(p)), gradient, color=[GUIDED if g < 0 else THESIS for g in gradient], height=0.6)
        right.axvline(0, color="black", linewidth=0.8)
        right.set_yticks(range(len(p)), [f"class {c}" for c in range(len(p))])
        right.set(xlabel="gradient of the logit")
        right.invert_yaxis()
    return figure


def pixels(picture: Tensor, side: int = 10) -> Figure:
    """A picture (32, 32), and its brightest field of `side` × `side` as the numbers that are stored."""
    ink = F.avg_pool2d(picture[None], side, stride=1)[0]
    top, left = divmod(int(ink.argmax()), ink.shape[1])
    crop = (255 * picture).round().int()[top : top + side, left : left + side]
    with style():
        figure, axes = canvas(1, 2, (7.0, 3.5))
        axes[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes[0].add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=THESIS, linewidth=2.5))
        axes[0].set(xlabel="column", ylabel="row", xticks=range(0, 32, 5), yticks=range(0, 32, 5), title="as a picture")
        axes[0].grid(visible=False)
        numbers(axes[1], crop, "as numbers", 0, 255)
        axes[1].set_xticks(range(0, side, 3), range(left, left + side, 3))
        axes[1].set_yticks(range(0, side, 3), range(top, top + side, 3))
        axes[1].set_xlabel("column")
    return figure


CHANNELS = ("red", "green", "blue")


def channels(photograph: Tensor) -> Figure:
    """A colour image (3, h, w) and its channels."""
    with style():
        figure, axes = canvas(1, 4, (7.2, 2.1))
        axes[0].imshow(photograph.permute(1, 2, 0))
        bare(axes[0], "colour image")
        for axis, channel, title in zip(axes[1:], photograph, CHANNELS, strict=True):
            axis.imshow(channel, cmap="gray", vmin=0, vmax=1)
            bare(axis, f"{title} channel")
    return figure


def channels_told(photograph: Tensor, picture: Tensor) -> str:
    """One pixel of the colour image, and how many numbers both images are."""
    middle = (255 * photograph[:, 16, 16]).round().int().tolist()
    assert photograph.numel() == 3 * picture.numel()
    return (
        "Of the colour image above, the pixel in row 16, column 16 is "
        f"{', '.join(f'{name} {value}' for name, value in zip(CHANNELS, middle, strict=True))}. Each of the three is "
        "one byte, so a pixel takes three bytes; the thesis's three bytes for each colour would allow "
        f"{256**3:,} values, not the 0 to 255 that it goes on to name. The grey digit is {picture.numel():,} numbers, "
        f"the colour image {photograph.numel():,}, and the 256 × 256 colour image of the thesis's example "
        f"{256 * 256 * 3:,}."
    )


def coarser(picture: Tensor, photograph: Tensor, side: int) -> Figure:
    """A grey (32, 32) and a colour image (3, 32, 32) with `side` × `side` pixels."""
    with style():
        figure, axes = canvas(1, 2, (5.6, 2.7))
        for axis, image in zip(axes, (picture[None], photograph), strict=True):
            part = F.avg_pool2d(image, 32 // side)
            axis.imshow(part.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            bare(axis, f"{side} × {side} pixels, {part.numel():,} numbers")
    return figure


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
