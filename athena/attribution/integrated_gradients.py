"""Integrated gradients (thesis 3.3.6, equation 3.4; Sundararajan, Taly, Yan 2017)."""

import warnings

import captum.attr
import torch
from torch import Tensor, nn
from tqdm import tqdm

from athena.attribution.completeness import IncompleteWarning, missing
from athena.attribution.untouched import baseline_like, logits

__all__ = ["integrated_gradients"]


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    baseline: float | Tensor = 0.0,
    steps: int = 64,
    most_steps: int = 1024,
    chunk: int = 64,
    progress: bool = False,
) -> Tensor:
    """``(x - x') int_0^1 df/dx (x' + alpha (x - x')) d alpha``, which adds up to ``f(x) - f(x')``.

    Where a sum misses that by more than 1 %, the steps for that image are doubled, up to `most_steps`.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        baseline: ``x'``: a number, or a tensor that broadcasts to `x`.
        steps, most_steps: points of the Gauss-Legendre rule, to begin with and at most.
        chunk: how many images go through the network at once.
        progress: whether to show a bar.

    Warns:
        IncompleteWarning: `most_steps` do not suffice.
    """
    method = captum.attr.IntegratedGradients(model)
    other = baseline_like(baseline, x)
    with torch.no_grad():
        difference = logits(model, x, target) - logits(model, other, target)
    found = []
    for i in tqdm(range(len(x)), "integrated gradients", disable=not progress):
        one, n = slice(i, i + 1), steps
        while True:
            part = method.attribute(
                x[one].clone().requires_grad_(), other[one], target[one], n_steps=n, internal_batch_size=chunk
            )
            missed = missing(part, difference[one])
            if not missed or 2 * n > most_steps:
                break
            n *= 2
        if missed:
            warnings.warn(f"with {n} steps {missed}; give more steps", IncompleteWarning, stacklevel=4)
        found.append(part)
    return torch.cat(found)
