"""LRP factors that are learned from held-out data while the model trains (thesis 8.3.1).

Not here: the factors themselves (`athena.guidance.factors`), and how gradients depend on them
(`athena.guidance.scaling`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["in_eval_mode", "move"]


def move(
    factors: Sequence[Tensor],
    loss: Tensor,
    held_out: Tensor,
    weights: Sequence[nn.Parameter],
    rate: float,
    bound: float,
) -> bool:
    """Moves the factors as `athena.Guidance.learn` says.

    Args:
        factors: leaves (), of which some may have had no part in `loss`.
        loss: of a guided forward pass. Its graph is kept.
        held_out: the loss of a forward pass that was not guided.
        weights: the parameters that v and G are gradients for.
        rate, bound: as for `athena.Guidance.learn`.

    Returns:
        Whether `loss` depends on any factor.
    """
    wished = torch.autograd.grad(held_out, weights, allow_unused=True)
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    pairs = [(v.flatten(), g.flatten()) for v, g in zip(wished, found, strict=True) if v is not None and g is not None]
    if not pairs or not factors:
        return False
    v, g = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    agreement = F.cosine_similarity(v, g, dim=0)
    slopes = torch.autograd.grad(agreement, factors, allow_unused=True) if agreement.requires_grad else ()
    if all(slope is None for slope in slopes):
        return False
    u = torch.stack([torch.zeros_like(f) if slope is None else slope for f, slope in zip(factors, slopes, strict=True)])
    size = u.norm()
    if 0 < size < torch.inf:  # not where a gradient has diverged, or no relevance came down
        with torch.no_grad():
            for factor, slope in zip(factors, u / size, strict=True):
                factor.add_(rate * slope).clamp_(-bound, bound)
    return True


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """All of `model` in eval mode, in which it is not guided, and afterwards each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
