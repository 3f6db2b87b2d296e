"""Shapley values of a few superpixels, exactly: every coalition is asked (thesis 3.2.1; Shapley 1953)."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from athena.attribution.superpixels import label_maps, spread
from athena.attribution.untouched import baseline_like, logits

__all__ = ["shapley", "shapley_values"]

MOST = 16


def shapley(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    segments: int | Tensor = 9,
    baseline: float | Tensor = 0.0,
    chunk: int = 64,
    progress: bool = False,
) -> Tensor:
    """``phi_i = sum_S |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))``; the values add up to ``v(all) - v(none)``.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        segments: about how many superpixels, or the superpixels themselves, integers (h, w) or (batch, h, w). Without
            images each element is a feature.
        baseline: what takes the place of a superpixel that is left out: a number, or what broadcasts to `x`.
        chunk: how many coalitions go through the network at once.
        progress: whether to show a bar.

    Raises:
        ValueError: there are more than 16 features, that is 65,536 coalitions.
    """
    other = baseline_like(baseline, x)
    maps = label_maps(x, segments)
    found = []
    for i, labels in enumerate(maps):
        n = int(labels.max()) + 1
        if n > MOST:
            raise ValueError(
                f"sample {i} has {n} features, that is 2^{n} coalitions: give at most {MOST}, or kernel_shap"
            )
        values = []
        for numbers in tqdm(torch.arange(2**n).split(chunk), f"Shapley values {i + 1}/{len(x)}", disable=not progress):
            present = (numbers[:, None] >> torch.arange(n) & 1).bool().to(x.device)
            images = torch.where(present[:, labels], x[i], other[i])
            with torch.no_grad():
                values.append(logits(model, images, target[i].expand(len(images))).double())
        found.append(spread(shapley_values(torch.cat(values)), labels))
    return torch.stack(found)


def shapley_values(v: Tensor) -> Tensor:
    """The Shapley value of each of n players, (n,).

    Args:
        v: (2^n,) what each coalition is worth; player i is in coalition number c if bit i of c is set.
    """
    n = len(v).bit_length() - 1
    numbers = torch.arange(len(v), device=v.device)
    sizes = (numbers[:, None] >> torch.arange(n, device=v.device) & 1).sum(1)
    shares = torch.tensor([1 / (n * math.comb(n - 1, size)) for size in range(n)], dtype=v.dtype, device=v.device)
    values = []
    for i in range(n):
        without = numbers[numbers >> i & 1 == 0]
        values.append((shares[sizes[without]] * (v[without | 1 << i] - v[without])).sum())
    return torch.stack(values)
