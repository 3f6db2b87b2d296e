"""What every method leaves as it was, and the logit that every method explains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["baseline_like", "gradient", "logits", "untouched"]


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which the model is in eval mode, gradients are on, autocast is off and random numbers are its own."""
    training = [module for module in model.modules() if module.training]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def logits(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The output for the class of each sample, (batch,)."""
    output: Tensor = model(x)
    return output.gather(1, target[:, None])[:, 0]


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of each sample's value with respect to that sample; no parameter gets a ``.grad``."""
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return found


def baseline_like(baseline: float | Tensor, x: Tensor) -> Tensor:
    """What stands for "nothing" in the place of `x`, in its shape.

    Raises:
        ValueError: `baseline` does not broadcast to `x`.
    """
    try:
        return torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x).clone()
    except RuntimeError as error:
        raise ValueError(f"baseline does not broadcast to x of shape {tuple(x.shape)}: {error}") from None
