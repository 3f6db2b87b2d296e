"""LIME: a sparse linear model of the network around one image (thesis 3.1; Ribeiro, Singh, Guestrin 2016)."""

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor, nn

from athena.attribution.superpixels import label_maps, spread
from athena.attribution.untouched import baseline_like, logits

__all__ = ["lime"]


def lime(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    segments: int | Tensor = 50,
    samples: int = 1000,
    width: float = 0.5,
    alpha: float = 0.01,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
    chunk: int = 64,
    progress: bool = False,
) -> Tensor:
    """The weights of a Lasso regression of the logit on which superpixels are there.

    Images in which each superpixel is there by the toss of a coin count ``exp(-d^2 / 2 (width D)^2)``, where ``d`` is
    their Euclidean distance to `x` and ``D`` that of the baseline.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        segments: about how many superpixels, or the superpixels themselves, integers (h, w) or (batch, h, w). Without
            images each element is a feature.
        samples: perturbed copies of each sample of the batch.
        width: of the kernel, as a share of the distance of the baseline.
        alpha: the Lasso's penalty, as a share of what the logit differs by from that for the baseline.
        baseline: what takes the place of a superpixel that is taken away: a number, or what broadcasts to `x`.
        seed: of the copies.
        chunk: how many of them go through the network at once.
        progress: whether to show a bar.
    """
    other = baseline_like(baseline, x)
    with torch.no_grad():
        differences = (logits(model, x, target) - logits(model, other, target)).abs().clamp(min=1e-12).tolist()
    found = []
    for i, labels in enumerate(label_maps(x, segments)):
        distance = float((x[i] - other[i]).norm()) or 1.0
        torch.manual_seed(seed)
        weights = captum.attr.Lime(
            lambda images, i=i: logits(model, images, target[i].expand(len(images))),
            interpretable_model=SkLearnLasso(alpha=alpha * differences[i]),
            similarity_func=get_exp_kernel_similarity_function("euclidean", width * distance),
        ).attribute(
            x[i : i + 1],
            baselines=other[i : i + 1],
            feature_mask=labels[None],
            n_samples=samples,
            perturbations_per_eval=chunk,
            return_input_shape=False,
            show_progress=progress,
        )
        found.append(spread(weights.flatten().to(x), labels))
    return torch.stack(found)
