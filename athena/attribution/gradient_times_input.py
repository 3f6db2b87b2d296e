"""Gradient times input (thesis 3.3.5; Shrikumar et al. 2016)."""

import captum.attr
from torch import Tensor, nn

__all__ = ["gradient_times_input"]


def gradient_times_input(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """``x df/dx``. On a network of ReLUs without biases its sum is the output."""
    found: Tensor = captum.attr.InputXGradient(model).attribute(x.requires_grad_(), target)
    return found
