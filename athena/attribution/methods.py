"""`attribute`, and the list of methods. To add one, write its file and enter its function here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from athena.attribution.cam import cam
from athena.attribution.deep_lift import deep_lift
from athena.attribution.deep_shap import deep_shap
from athena.attribution.grad_cam import grad_cam
from athena.attribution.gradient_times_input import gradient_times_input
from athena.attribution.guided_backpropagation import deconvolution, guided_backpropagation
from athena.attribution.integrated_gradients import integrated_gradients
from athena.attribution.kernel_shap import kernel_shap
from athena.attribution.lime import lime
from athena.attribution.saliency import saliency
from athena.attribution.shapley import shapley
from athena.attribution.smooth_grad import smooth_grad
from athena.attribution.untouched import untouched
from athena.relevance import lrp

__all__ = ["METHODS", "attribute"]


def _lrp(model: nn.Module, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    relevance: Tensor = lrp(model, x, target, **options).input
    return relevance


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "lime": lime,
    "shapley": shapley,
    "kernel_shap": kernel_shap,
    "deep_shap": deep_shap,
    "saliency": saliency,
    "deconvolution": deconvolution,
    "guided_backpropagation": guided_backpropagation,
    "smooth_grad": smooth_grad,
    "gradient_times_input": gradient_times_input,
    "integrated_gradients": integrated_gradients,
    "cam": cam,
    "grad_cam": grad_cam,
    "deep_lift": deep_lift,
    "lrp": _lrp,
}
METHODS = tuple(_FUNCTIONS)
"""The names of the methods, in the thesis's order."""


def attribute(method: str, model: nn.Module, x: Tensor, target: int | Tensor | None = None, **options: Any) -> Tensor:
    """How much each element of `x` matters for the output of `model`, by one of `METHODS` (thesis chapter 3).

    What is explained is always the logit of a class. The model is explained in eval mode without autocast, and comes
    back as it was: training mode, hooks, ``.grad`` and the state of random numbers. The same call gives the same map,
    and an image the same one alone and in a batch.

    Args:
        method: one of `METHODS`.
        model: gives (batch, classes).
        x: floating point (batch, ...); images (batch, channels, h, w) for CAM and Grad-CAM.
        target: the class to explain, one or integers (batch,); None for the class predicted.
        options: of the method, as its function in the file of its name has them, such as ``baseline=0.5``; ``rule=``
            for LRP.

    Returns:
        The map, in the shape, dtype and device of `x`. Where a method finds one value for a pixel or a superpixel, its
        elements get equal shares of it, so that sums are kept.

    Raises:
        ValueError: there is no such method, it cannot explain this model, or an argument has a wrong value.
        TypeError: an argument is not of the form above.
        UnsupportedLayer: a method went through the network and met an operation that it has no rule for.

    Warns:
        IncompleteWarning: attributions should add up to a difference of outputs, and miss it by more than 1 %.
    """
    if method not in _FUNCTIONS:
        raise ValueError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not len(x):
        what = f"a {x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {what}; it must be floating point (batch, ...) with at least one sample")
    with untouched(model, x.device):
        given = x.detach().clone()
        found = _FUNCTIONS[method](model, given, _classes(model, given, target), **options)
    return found.detach().to(x.dtype)


def _classes(model: nn.Module, x: Tensor, target: int | Tensor | None) -> Tensor:
    """The class to explain for each sample, (batch,) int64 on the device of `x`."""
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"the model gave {what}; it must give a tensor ({len(x)}, classes)")
    if target is None:
        return output.argmax(1)
    chosen = torch.as_tensor(target, device=x.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.shape not in ((), (len(x),)):
        raise TypeError(f"target is {target!r}; give None, a class, or integers of shape ({len(x)},)")
    if chosen.min() < 0 or chosen.max() >= output.shape[1]:
        raise ValueError(
            f"target has classes {int(chosen.min())} to {int(chosen.max())}; the model has 0 to {output.shape[1] - 1}"
        )
    return chosen.long().expand(len(x))
