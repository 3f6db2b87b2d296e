"""KernelSHAP: Shapley values by a weighted linear model of sampled coalitions (thesis 3.2.2; Lundberg, Lee 2017)."""

import warnings

import captum.attr
import torch
from torch import Tensor, nn

from athena.attribution.completeness import IncompleteWarning, missing
from athena.attribution.superpixels import label_maps, spread
from athena.attribution.untouched import baseline_like, logits

__all__ = ["kernel_shap"]


def kernel_shap(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    segments: int | Tensor = 50,
    samples: int = 1000,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
    chunk: int = 64,
    progress: bool = False,
) -> Tensor:
    """The weights of the linear model, which approach `shapley`'s values as samples grow.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        segments: about how many superpixels, or the superpixels themselves, integers (h, w) or (batch, h, w). Without
            images each element is a feature.
        samples: coalitions asked for each sample of the batch.
        baseline: what takes the place of a superpixel that is left out: a number, or what broadcasts to `x`.
        seed: of the coalitions.
        chunk: how many of them go through the network at once.
        progress: whether to show a bar.

    Warns:
        IncompleteWarning: the values miss ``f(x) - f(baseline)`` by more than 1 %.
    """
    other = baseline_like(baseline, x)
    with torch.no_grad():
        difference = logits(model, x, target) - logits(model, other, target)
    found = []
    for i, labels in enumerate(label_maps(x, segments)):
        if not labels.any():  # a single feature, for which Captum would divide by 0
            found.append(spread(difference[i : i + 1], labels))
            continue
        torch.manual_seed(seed)
        values = captum.attr.KernelShap(
            lambda images, i=i: logits(model, images, target[i].expand(len(images)))
        ).attribute(
            x[i : i + 1],
            baselines=other[i : i + 1],
            feature_mask=labels[None],
            n_samples=samples,
            perturbations_per_eval=chunk,
            return_input_shape=False,
            show_progress=progress,
        )
        found.append(spread(values.flatten().to(x), labels))
    if missed := missing(torch.stack(found), difference):
        warnings.warn(f"{missed}; give more samples", IncompleteWarning, stacklevel=3)
    return torch.stack(found)
