"""How sure a network is of what it says, and whether it is right as often as it is sure."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["scores"]

BINS = 10


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, loss, calibration and margin on labelled images.

    Args:
        logits: (batch, classes).
        labels: (batch,), the classes.

    Returns:
        ``"accuracy (%)"`` and ``"calibration error (%)"``, both from 0 to 1: the second is the mean distance, over ten
        bins of the largest probability, of that probability from the share that is right (Guo et al., On calibration of
        modern neural networks, 2017); ``"loss"``, the cross-entropy; ``"margin of the logits"``, the mean distance of
        the two largest.
    """
    largest = logits.topk(2).values
    sure, right = logits.softmax(1).amax(1), (logits.argmax(1) == labels).float()
    bins = (BINS * sure).clamp_max(BINS - 0.001).int()
    gaps = [
        (bins == i).float().mean() * (sure[bins == i].mean() - right[bins == i].mean()).abs() for i in bins.unique()
    ]
    return {
        "accuracy (%)": float(right.mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "calibration error (%)": float(sum(gaps)),
        "margin of the logits": float((largest[:, 0] - largest[:, 1]).mean()),
    }
