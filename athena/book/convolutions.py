"""What the first chapter draws and says of convolution and pooling, and of the maps inside a whole network.

Not here: the book's convolutional network itself (`athena.models`), and filters that are learned
(`athena.book.fundamentals`).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena.book import figures
from athena.book.fundamentals import bare, numbers, signed
from athena.book.tables import shown

__all__ = [
    "filtered",
    "inside_shown",
    "inside_told",
    "maps_after",
    "pooled",
    "pooling",
    "pooling_told",
    "slide",
    "thesis_example",
    "thesis_example_told",
    "turned",
    "turned_figure",
    "turned_told",
    "window",
]


def slide(image: Tensor, kernel: Tensor) -> Tensor:
    """The filter's answer at each place of an image, both of two dimensions, without zeros around the image."""
    return F.conv2d(image[None, None], kernel[None, None])[0, 0]


def thesis_example(image: Tensor, kernel: Tensor, in_thesis: Tensor) -> Figure:
    """Figure 2.9 of the thesis beside the result computed, with the numbers outlined that differ."""
    result = slide(image, kernel)
    wrong = [(i, j, 1, 1) for i, j in (result != in_thesis).nonzero().tolist()]
    with figures.style():
        figure, axes = figures.canvas(1, 4, (7.2, 2.3), width_ratios=[5, 3, 3, 3])
        numbers(axes[0], image, "image", low=-9)
        numbers(axes[1], kernel, "filter", low=-3)
        numbers(axes[2], in_thesis, "thesis's result", -30, 2, wrong)
        numbers(axes[3], result, "computed", -30, 7)
    return figure


def thesis_example_told(image: Tensor, kernel: Tensor, in_thesis: Tensor) -> str:
    """Which numbers of figure 2.9 do not follow from its image and filter, and what would mend them."""
    result = slide(image, kernel)
    wrong = result != in_thesis
    terms = (image[:3, :3] * kernel).T.flatten()
    assert terms.sum() == result[0, 0] == 7 and in_thesis[0, 0] == 6 and int(wrong.sum()) == 5
    mended = image.clone()
    mended[2, 2] = 2
    assert torch.equal(slide(mended, kernel)[0], in_thesis[0]) and not torch.equal(slide(mended, kernel), in_thesis)
    assert not _one_change_mends(image, kernel, in_thesis)
    printed, computed = ("; ".join(", ".join(map(signed, row)) for row in rows) for rows in (in_thesis, result))
    written = f"{' + '.join(f'{v:g}' for v in terms[:3])} − {' − '.join(f'{-v:g}' for v in terms[6:])}"
    return (
        f"**{int(wrong.sum())} of the {result.numel()} results in figure 2.9 do not follow from its image and "
        f"filter.** The thesis prints {printed}. Its image and filter give {computed}. The sum that it writes out "
        f"below the figure, {written} without the zeros, is {terms.sum():g}, not {in_thesis[0, 0]:g}. With a 2 in the "
        f"middle of the image instead of {image[2, 2]:g} its first row would be right, but no change of a single "
        "number of the image makes all nine right."
    )


def _one_change_mends(image: Tensor, kernel: Tensor, wanted: Tensor) -> bool:
    """Whether some change of one number of the image gives the result wanted."""
    gap = wanted - slide(image, kernel)
    for place in itertools.product(range(len(image)), repeat=2):
        nudge = torch.zeros_like(image)
        nudge[place] = 1
        effect = slide(nudge, kernel)
        size = (gap * effect).sum() / effect.square().sum() if effect.any() else 0.0
        if torch.allclose(size * effect, gap):
            return True
    return False


def window(image: Tensor, kernel: Tensor, i: int, j: int) -> Figure:
    """The window at row i and column j of the result, its nine products, and the result up to there."""
    result, products = slide(image, kernel), image[i : i + 3, j : j + 3] * kernel
    known = torch.arange(9).reshape(3, 3) <= 3 * i + j
    parts = [signed(v) for v in products.T.flatten() if v]
    written = " + ".join(parts).replace("+ −", "− ") + f" = {signed(result[i, j])}"
    with figures.style():
        figure, axes = figures.canvas(1, 3, (5.6, 2.2), width_ratios=[5, 3.6, 3.6])
        numbers(axes[0], image, "image", low=-9, boxes=[(i, j, 3, 3)])
        numbers(axes[1], products, "window × filter", -25, 9)
        numbers(axes[2], torch.where(known, result, 7), "result", -30, 7, [(i, j, 1, 1)], known=known)
        figure.supxlabel(written, fontsize=10)
    return figure


def filtered(picture: Tensor, filters: Mapping[str, Tensor]) -> Figure:
    """A picture (h, w) and what four filters make of it, on one scale."""
    with figures.style():
        figure, axes = figures.canvas(1, 5, (7.4, 1.9))
        _grey(axes[0], picture)
        for axis, (name, kernel) in zip(axes[1:], filters.items(), strict=True):
            drawn = _answer(axis, slide(picture, kernel), name)
        _bar(figure, drawn, axes, label="filter's answer")
    return figure


def turned(kernel: Tensor, degrees: float) -> Tensor:
    """A filter for edges of another direction, from one for vertical edges."""
    angle = torch.tensor(degrees).deg2rad()
    return angle.cos() * kernel + angle.sin() * kernel.T


def turned_figure(picture: Tensor, kernel: Tensor, degrees: float) -> Figure:
    """A picture, the numbers of the filter after a turn, and its answer."""
    found = turned(kernel, degrees)
    with figures.style():
        figure, axes = figures.canvas(1, 3, (5.8, 2.1), width_ratios=[1, 0.75, 1.22])
        _grey(axes[0], picture)
        numbers(axes[1], found, f"filter, {degrees:g}°", low=-4, high=1.5)
        _bar(figure, _answer(axes[2], slide(picture, found), "filter's answer"), axes[2])
    return figure


def turned_told(picture: Tensor, kernel: Tensor, digit: int) -> str:
    """What half a turn does, and whether the digit has more vertical or more horizontal edges."""
    there, back = (slide(picture, turned(kernel, degrees)) for degrees in (0.0, 180.0))
    assert torch.allclose(there, -back, atol=1e-5)
    vertical, horizontal = (slide(picture, found).abs().mean().item() for found in (kernel, kernel.T))
    return (
        f"Half a turn swaps red and blue and changes nothing else. The mean size of the answer is {vertical:.2f} for "
        f"vertical and {horizontal:.2f} for horizontal edges: this {digit} has more of the "
        f"{'former' if vertical > horizontal else 'latter'}."
    )


def _grey(axis: Axes, picture: Tensor) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    bare(axis, "digit")


def _answer(axis: Axes, values: Tensor, title: str) -> Any:
    drawn = axis.imshow(values, cmap=figures.RELEVANCE, vmin=-3, vmax=3)
    bare(axis, title)
    return drawn


def _bar(figure: Figure, drawn: Any, axes: Any, **settings: Any) -> None:
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, ticks=[-3, 0, 3], extend="both", **settings)
    bar.ax.set_yticklabels(["−3", "0", "3"])


# Pooling


def pooled(value: float) -> tuple[Tensor, Tensor, Tensor]:
    """A map of 4 × 4 with this number in row 2, column 2, its max pooling and its average pooling."""
    image = torch.tensor([[1, 4, 2, 0], [3, value, 6, 2], [5, 1, 0, 2], [0, 2, 1, 5]])
    return image, F.max_pool2d(image[None], 2)[0], F.avg_pool2d(image[None], 2)[0]


def pooling(value: float) -> Figure:
    """The arrays of `pooled` with their numbers."""
    image, most, mean = pooled(value)
    with figures.style():
        figure, axes = figures.canvas(1, 3, (5.6, 2.3), width_ratios=[4, 2.6, 2.6])
        numbers(axes[0], image, "map", -15, 12, [(1, 1, 1, 1)])
        for edge in (axes[0].axhline, axes[0].axvline):
            edge(1.5, color="white", linewidth=4, zorder=0.5)
        numbers(axes[1], most, "max pooling", -15, 12)
        numbers(axes[2], mean, "average pooling", -15, 12)
    return figure


def pooling_told() -> str:
    """What the outlined number does to both poolings as it goes from 0 to 12."""
    image, most, mean = pooled(3.0)
    fields = image.unfold(0, 2, 2).unfold(1, 2, 2)
    assert torch.equal(most, fields.amax((2, 3))) and torch.equal(mean, fields.mean((2, 3)))
    corner = {value: [part[0, 0].item() for part in pooled(value)[1:]] for value in (0.0, 4.0, 12.0)}
    assert corner[0.0][0] == corner[4.0][0] == 4 and corner[12.0] == [12, 5] and corner[0.0][1] == 2
    return (
        f"From 0 to 4 the outlined number leaves the maximum of its field at {corner[0.0][0]:g}; above that, it is the "
        f"maximum. The mean follows every change, at a quarter of its size: from {corner[0.0][1]:g} to "
        f"{corner[12.0][1]:g} as the number goes from 0 to 12."
    )


# A whole network


def inside_shown(network: nn.Sequential, steps: Mapping[str, Tensor]) -> pd.DataFrame:
    """The shape of each layer's output and its parameters, for reading.

    Args:
        steps: the image and the output of each layer by its name, each (1, ...).
    """
    weights = _parameters(network)
    listed = [name for name in steps if not name.startswith("relu")]
    columns = {
        "layer": listed,
        "shape of its output": [" × ".join(str(size) for size in steps[name].shape[1:]) for name in listed],
        "numbers": [f"{steps[name].numel():,}" for name in listed],
        "parameters": [f"{weights.get(name, 0):,}" for name in listed],
    }
    return shown(pd.DataFrame(columns), "layer")


def inside_told(network: nn.Sequential, steps: Mapping[str, Tensor]) -> str:
    """Where the book's convolutional network has its parameters, and what convolution and pooling do to sizes."""
    weights = _parameters(network)
    total = sum(weights.values())
    assert total == sum(p.numel() for p in network.parameters())
    convolutions = sum(count for name, count in weights.items() if name.startswith("conv"))
    numbers_in, numbers_out = steps["image"].numel(), steps["conv1"].numel()
    dense = numbers_in * numbers_out + numbers_out
    sides = [out.shape[-1] for out in steps.values() if out.ndim == 4]
    assert sides == sorted(sides, reverse=True) and weights["conv1"] == 3 * 3 * 3 * 64 + 64
    before = {"pool1": "conv2", "pool2": "conv4", "pool3": "conv5"}
    assert all(steps[pool].shape[1] == steps[conv].shape[1] for pool, conv in before.items())
    assert convolutions < 0.15 * total < weights["linear1"]
    return (
        "No layer makes a map larger: convolutions with a border of zeros keep height and width and raise or keep the "
        "number of maps, poolings halve height and width and keep the number. Of its "
        f"{total:,} parameters, the five convolutions have {convolutions:,} ({100 * convolutions / total:.0f} %) and "
        f"the first fully connected layer alone {weights['linear1']:,}. The first convolution has "
        f"{weights['conv1']:,}; a fully connected layer with the same input and output would have {dense:,}."
    )


def _parameters(network: nn.Sequential) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in network.named_children()}


def maps_after(steps: Mapping[str, Tensor], name: str) -> Figure:
    """The first eight maps of a layer's output, each on its own scale; `steps` as for `inside_shown`."""
    maps: Sequence[Tensor] = list(steps[name][0])
    few = maps[:8]
    with figures.style():
        figure, axes = figures.canvas(1, 8, (7.4, 1.4))
        for axis in axes:
            bare(axis, "")
        for axis, found in zip(axes, few, strict=False):
            axis.imshow(found, cmap="gray", vmin=0, vmax=found.max() or 1)
        side = " × ".join(map(str, maps[0].shape))
        figure.suptitle(f"{name}: {len(few)} of {len(maps)} maps of {side}", fontsize=10)
    return figure
