"""Does the class depend on what a heat map marks? Against the network's own answer with pixels taken away."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from athena.evaluation.checks import classes, copied, summed


class Flipping(NamedTuple):
    """What `pixel_flipping` measured, both with one column for each map and a last one, ``random``.

    Attributes:
        curves: the mean probability over the batch, 0 to 1, by the share of pixels flipped, 0 to 1 (the index).
        areas: one row an image: the area under its own curve, which is its mean probability, 0 to 1; less is better.
    """

    curves: pd.DataFrame
    areas: pd.DataFrame


def pixel_flipping(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None,
    maps: Mapping[str, Tensor],
    *,
    steps: int = 32,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
) -> Flipping:
    """How soon the probability of a class falls when pixels are taken away, the most relevant ones first.

    A pixel goes with all its channels. Pixels of equal relevance go in random order, drawn from `seed` for each image
    and the same for every map; the column ``random`` takes all pixels in that order. The probability is the softmax
    of the output: logits have another unit in every network, and fall below 0. What is measured is the network on
    images such as it has never seen, so compare maps under more than one baseline before preferring one.

    Args:
        model: gives logits (batch, classes). A copy in eval mode is asked.
        x: (batch, channels, h, w), in the range that the model was trained on.
        target: the class to follow, one or (batch,) int64; None for the class predicted.
        maps: for each name, a heat map (batch, channels, h, w); pixels are ordered by its signed sum over channels.
        steps: into how many equal parts the pixels are cut, 1 to h * w; a curve has ``steps + 1`` points.
        baseline: what takes a pixel's place: a number, 0 being black, or a tensor that broadcasts to `x`. The mean
            colour is ``x.mean((2, 3), keepdim=True)``; ``1 - x`` inverts; ``torch.rand_like(x)`` is noise.
        seed: of the random order.

    Raises:
        TypeError, ValueError: an argument is not of the form above, or relevance is not finite.

    Sources: Bach et al., On pixel-wise explanations, PLoS ONE 10 (2015), "pixel-flipping", with inverted pixels; Samek
    et al., Evaluating the visualization of what a deep neural network has learned, IEEE TNNLS 28 (2017), with noise.
    """
    asked = copied(model)
    chosen = classes(asked, x, target)
    batch, _, height, width = x.shape
    pixels = height * width
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps is {steps}; for images of {height} by {width} pixels it must be 1 to {pixels}")
    if "random" in maps:
        raise ValueError('maps has the name "random", which is that of the control')
    try:
        other = torch.as_tensor(baseline).to(x).expand_as(x)
    except RuntimeError as error:
        raise ValueError(f"baseline does not broadcast to x of shape {tuple(x.shape)}: {error}") from None

    noise = torch.rand(batch, pixels, generator=torch.Generator().manual_seed(seed))
    by_chance = noise.argsort(1).to(x.device)
    orders = {}
    for name, relevance in maps.items():
        drawn = summed(relevance, f"maps[{name!r}]", x).to(x.device).flatten(1).gather(1, by_chance)
        orders[name] = by_chance.gather(1, drawn.argsort(stable=True, dim=1, descending=True))
    orders["random"] = by_chance

    counts = torch.linspace(0, pixels, steps + 1, dtype=torch.float64).round().long()
    shares = counts.double() / pixels
    curves, areas = {}, {}
    for name, order in orders.items():
        turn = order.argsort(1).view(batch, 1, height, width)  # when a pixel is flipped, from 0 on
        curve = torch.stack([_probability(asked, torch.where(turn < n, other, x), chosen) for n in counts.tolist()])
        curves[name] = curve.mean(1).numpy()
        areas[name] = torch.trapezoid(curve, shares, dim=0).numpy()
    return Flipping(
        pd.DataFrame(curves, index=pd.Index(shares.numpy(), name="share")),
        pd.DataFrame(areas).rename_axis("sample"),
    )


def _probability(model: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """The probability of the chosen class for each image, (batch,) float64 on the CPU."""
    with torch.no_grad():
        return model(x).double().softmax(1).gather(1, chosen[:, None])[:, 0].cpu()
