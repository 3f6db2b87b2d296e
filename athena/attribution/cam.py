"""CAM: feature maps before global average pooling, weighed by the last layer (thesis 3.3.7; Zhou et al. 2016)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from athena.attribution.grad_cam import like_images
from athena.propagation.notes import named, operands_of

__all__ = ["cam"]


def cam(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """``sum_k w_k A_k``, with the weights ``w_k`` of the class in the last layer, enlarged to the image.

    Args:
        model: convolutions, then the mean over each feature map, then one linear layer, as modules or functions.
        x: (batch, channels, h, w).
        target: as for `athena.attribution.attribute`.

    Raises:
        ValueError: the network does not end so; the message says what it lacks.
    """
    lacks = f"CAM cannot explain {type(model).__name__}: it needs feature maps, their global average pooling and one "
    lacks += "linear layer at the end, and "
    if x.dim() != 4:
        raise ValueError(f"{lacks}x has shape {tuple(x.shape)} instead of (batch, channels, h, w). Use another method")
    watch = _Watch()
    with torch.no_grad(), watch:
        output = model(x)
    if watch.weight is None or watch.out is None or not torch.equal(watch.out, output):
        raise ValueError(f"{lacks}its output is not that of a linear layer. Grad-CAM works on any convolution")
    for features in reversed(watch.pooled):
        pooled = features.mean((2, 3))
        if watch.given is not None and pooled.shape == watch.given.shape and torch.allclose(pooled, watch.given, 1e-4):
            weights = watch.weight[target][:, :, None, None]
            return like_images((weights * features).sum(1, keepdim=True), x)
    raise ValueError(
        f"{lacks}its last linear layer, of {watch.weight.shape[1]} inputs, does not stand right on the means of "
        "feature maps. Grad-CAM works on any convolution"
    )


class _Watch(TorchFunctionMode):
    """Takes note of what is pooled, and of the last linear layer's input, weight and output."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled: list[Tensor] = []
        self.given: Tensor | None = None
        self.weight: Tensor | None = None
        self.out: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            (self.given, self.weight, _), self.out = (*operands_of(args, kwargs or {}), None)[:3], out
        elif function in POOLING:
            features = args[0] if args else (kwargs or {})["input"]
            if features.dim() == 4:
                self.pooled.append(features)
        return out


POOLING = frozenset(named("adaptive_avg_pool2d", "avg_pool2d", "mean"))
