"""Grad-CAM: feature maps of a convolution, weighed by their mean gradients (thesis 3.3.7; Selvaraju et al. 2017).

Captum keeps the feature maps themselves, which a ReLU that works in place then writes over; here they are kept apart.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena.attribution.untouched import logits

__all__ = ["grad_cam", "like_images"]


def grad_cam(model: nn.Module, x: Tensor, target: Tensor, *, layer: str | None = None) -> Tensor:
    """``ReLU(sum_k alpha_k A_k)``, ``alpha_k`` the gradient's mean over the map ``A_k``, enlarged to the image.

    Args:
        model, target: as for `athena.attribution.attribute`.
        x: (batch, channels, h, w).
        layer: the path of the module whose output the feature maps are; None for the convolution called last.

    Raises:
        ValueError: there is no such module, no convolution, or its output does not reach the logit.
    """
    if x.dim() != 4:
        raise ValueError(f"Grad-CAM explains images (batch, channels, h, w); x has shape {tuple(x.shape)}")
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"{type(model).__name__} has no module {layer!r}; its modules are {list(modules)[1:]}")
    watched = [modules[layer]] if layer is not None else [m for m in modules.values() if isinstance(m, nn.Conv2d)]
    maps: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        maps.append(output)
        return output.clone()  # what works in place from here on writes over the copy

    handles = [module.register_forward_hook(keep) for module in watched]
    try:
        output = logits(model, x.requires_grad_(), target)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise ValueError(
            f"no module nn.Conv2d of {type(model).__name__} was called, so Grad-CAM has no feature maps: name the "
            "module whose output they are by layer="
        )
    features = maps[-1]
    if features.dim() != 4:
        raise ValueError(f"the output of {layer!r} has shape {tuple(features.shape)}; Grad-CAM needs (batch, k, h, w)")
    (gradient,) = torch.autograd.grad(output.sum(), features, allow_unused=True)
    if gradient is None:
        raise ValueError("the logit does not depend on the feature maps: name another module by layer=")
    weights = gradient.mean((2, 3), keepdim=True)
    return like_images((weights * features).sum(1, keepdim=True).relu(), x)


def like_images(heat: Tensor, x: Tensor) -> Tensor:
    """A map (batch, 1, h, w) enlarged to the images `x`, each channel holding an equal share."""
    larger = F.interpolate(heat, x.shape[2:], mode="bilinear", align_corners=False)
    return (larger / x.shape[1]).expand_as(x)
