"""Saliency maps: the absolute gradient (thesis 3.3.1; Simonyan, Vedaldi, Zisserman 2014)."""

import captum.attr
from torch import Tensor, nn

__all__ = ["saliency"]


def saliency(model: nn.Module, x: Tensor, target: Tensor, *, absolute: bool = True) -> Tensor:
    """``|df/dx|``, or the gradient itself.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        absolute: whether the sign is dropped, as in the thesis.
    """
    found: Tensor = captum.attr.Saliency(model).attribute(x.requires_grad_(), target, abs=absolute)
    return found
