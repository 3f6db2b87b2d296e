"""What the measures share: arguments are checked, and relevance is summed over channels."""

import copy
import reprlib
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode: what happens to it does not happen to the user's model."""
    return copy.deepcopy(model).eval()


def summed(relevance: Tensor, what: str, x: Tensor | None = None) -> Tensor:
    """Relevance summed over channels, (batch, h, w) float64, checked; `x` is the batch that it is to fit."""
    if not isinstance(relevance, Tensor) or not relevance.is_floating_point() or relevance.dim() != 4:
        raise TypeError(f"{what} is {described(relevance)}; it must be floating point (batch, channels, h, w)")
    if x is not None and (len(relevance), *relevance.shape[2:]) != (len(x), *x.shape[2:]):
        raise ValueError(f"{what} is {described(relevance)}, which does not fit x of shape {tuple(x.shape)}")
    broken = ~relevance.isfinite().flatten(1).all(1)
    if broken.any():
        raise ValueError(f"{what} is not finite for image {int(broken.nonzero()[0])} of the batch")
    return relevance.detach().double().sum(1)


def classes(model: nn.Module, x: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of each image, (batch,) int64 on the device of `x`, checked against the model's output."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4 or not len(x):
        raise TypeError(f"x is {described(x)}; it must be floating point (batch, channels, h, w)")
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        raise TypeError(f"the model gave {described(output)}; it must give (batch, classes)")
    if target is None:
        return output.argmax(1)
    chosen = torch.as_tensor(target, device=x.device)
    if chosen.dtype != torch.int64 or chosen.shape not in ((), (len(x),)):
        raise TypeError(f"target is {described(target)}; give None, a class, or int64 of shape ({len(x)},)")
    if chosen.min() < 0 or chosen.max() >= output.shape[1]:
        raise ValueError(
            f"target has classes {int(chosen.min())} to {int(chosen.max())}; the model has 0 to {output.shape[1] - 1}"
        )
    return chosen.expand(len(x))


def described(value: Any) -> str:
    """A value as an error names it: a tensor by its dtype and shape."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"
