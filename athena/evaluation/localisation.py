"""Does a heat map find the object? Against the pixels that are known to be the object's."""

import pandas as pd
import torch
from torch import Tensor

from athena.evaluation.checks import described, summed


def localisation(relevance: Tensor, mask: Tensor) -> pd.DataFrame:
    """How much of the relevance that speaks for a class lies on the object, for each image.

    Relevance is summed over channels, and what is then below 0 counts as 0, the pooling "sum,pos" of Arras et al. In
    a tie, every order of the tied pixels counts the same, so a map without any difference gets the chance level.

    Args:
        relevance: (batch, channels, h, w), any floating point dtype.
        mask: (batch, h, w) bool, True on the object, such as `athena.data.Data.test_masks`; no image without one.

    Returns:
        One row an image, in the order of the batch; all columns are shares from 0 to 1, more is better.
        mass: of the relevance, that on the object (Arras et al.: relevance mass accuracy); NaN if there is none.
        rank: of the k most relevant pixels, those on the object, which has k pixels (relevance rank accuracy).
        pointing: 1 if the most relevant pixel is on the object (Zhang et al.: pointing game, without their tolerance
        of 15 pixels), 0 if not, between them in a tie.
        chance: pixels on the object, of all. What a map of independent random numbers gets in each of the three.

    Raises:
        TypeError, ValueError: an argument is not of the form above, relevance is not finite, or a mask is empty.

    Sources: Arras, Osman, Samek, CLEVR-XAI, Information Fusion 81 (2022), section 3; Zhang et al., Top-down neural
    attention by excitation backprop, IJCV 126 (2018).
    """
    pooled = summed(relevance, "relevance")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != pooled.shape:
        raise ValueError(f"mask is {described(mask)}; for this relevance it must be bool {tuple(pooled.shape)}")
    inside = mask.flatten(1).to(pooled)
    pixels = inside.sum(1)
    if not pixels.all():
        raise ValueError(f"mask {int((pixels == 0).nonzero()[0])} of the batch is empty; leave that image out")
    positive = pooled.clamp(min=0).flatten(1)
    columns = {
        "mass": (positive * inside).sum(1) / positive.sum(1),
        "rank": _hits(positive, inside, pixels) / pixels,
        "pointing": _hits(positive, inside, torch.ones_like(pixels)),
        "chance": inside.mean(1),
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    return table.rename_axis("sample")


def _hits(values: Tensor, inside: Tensor, k: Tensor) -> Tensor:
    """How many of the `k` largest values lie inside, (batch,); in a tie, the mean over all orders of what is tied."""
    least = values.sort(1, descending=True).values.gather(1, k.long()[:, None] - 1)
    above, tied = (values > least).to(values), (values == least).to(values)
    left = k - above.sum(1)
    return (above * inside).sum(1) + left * (tied * inside).sum(1) / tied.sum(1)
