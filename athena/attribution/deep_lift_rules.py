"""What DeepLIFT's multipliers become below each kind of operation.

The network runs on a batch and its baselines at once, the second half of each tensor being the baselines'. A rule is
given the graph node, its input where autograd does not save it, the gradients below, and those above; it gives the
gradients below that are to go on. The rescale rule for ``z = f(a)`` is ``m -> m (z - z') / (a - a')``; for what has
several operands it is the mean of the gradient over the straight way from the baseline, which is exact for products.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from athena.propagation.activations import ActivationLRP
from athena.propagation.affine import ConvolutionalLRP, LinearLRP, LinearWithBiasLRP
from athena.propagation.euler import CopyIntoPartLRP
from athena.propagation.layer import dimension
from athena.propagation.norms import BatchNormLRP
from athena.propagation.passing import (
    AdditionLRP,
    AveragePoolingLRP,
    ConcatenationLRP,
    CopyLRP,
    FlattenLRP,
    SelectionLRP,
    SumLRP,
)

__all__ = ["RULES"]

Rule = Callable[[Any, Tensor | None, tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...] | None]
LEAST = 1e-10
"""Where the input differs by less, the gradient is as good, and Captum takes it too."""


def _difference(tensor: Tensor) -> Tensor:
    """What differs from the baseline, for both halves."""
    here, there = tensor.chunk(2)
    return (here - there).repeat(2, *[1] * (tensor.dim() - 1))


def _elementwise(a: Tensor, z: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor]:
    da, dz = _difference(a), _difference(z)
    return (torch.where(da.abs() < LEAST, below, above * dz / da),)


def _relu(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    if a is None:
        raise RuntimeError("a ReLU was called past PyTorch's functions, so that its input is not known")
    return _elementwise(a, a.clamp(min=0), below[0], above[0])


def _activation(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    kind = node.name().partition("Backward")[0]
    x = node._saved_self if a is None else a
    ratio = ActivationLRP.ratios.get(kind)
    z = ActivationLRP.functions[kind](node, x) if ratio is None else x * ratio(node, x)
    return (*_elementwise(x, z, below[0], above[0]), *below[1:])


def _of(function: Callable[[Any, Tensor], Tensor], input_of: Callable[[Any], Tensor]) -> Rule:
    """The rule of an activation that LRP has no function for."""

    def rule(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
        x = input_of(node)
        return (*_elementwise(x, function(node, x), below[0], above[0]), *below[1:])

    return rule


def _max_pooling(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    """What is more than the larger baseline comes from this maximum's place, what is less from the baseline's."""
    x, places = node._saved_self, node._saved_result1
    spatial = x.dim() - (2 if "2D" in node.name() else 3)
    flat, at = x.flatten(spatial), places.flatten(spatial)
    z = flat.gather(-1, at)
    here, there = z.chunk(2)
    most = torch.maximum(here, there)
    parts = torch.cat([most - there, here - most])
    shares = torch.zeros_like(flat).scatter_add_(-1, at, above[0].flatten(spatial) * parts)
    mine, its = shares.chunk(2)
    dx = _difference(x)
    contributions = (mine + its).view(len(x) // 2, *x.shape[1:]).repeat(2, *[1] * (x.dim() - 1))
    return (torch.where(dx.abs() < LEAST, below[0], contributions / dx),)


def _mean(tensor: Tensor) -> Tensor:
    """The mean of the two halves, for both."""
    here, there = tensor.chunk(2)
    return ((here + there) / 2).repeat(2, *[1] * (tensor.dim() - 1))


def _product(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    """Each factor times the mean of the other: exact, for ``ab - a'b' = mean(b) (a - a') + mean(a) (b - b')``."""
    if len(below) < 2 or not (_depends(node, 0) and _depends(node, 1)):
        return None
    left, right = node._saved_self, node._saved_other
    return above[0] * _mean(right), above[0] * _mean(left)


def _matrix_product(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    if not (_depends(node, 0) and _depends(node, 1)):
        return None
    return above[0] @ _mean(node._saved_mat2).mT, _mean(node._saved_self).mT @ above[0]


def _softmax(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    """The mean gradient on the way between the scores; what is added to all scores plays no part in it."""
    z = node._saved_result
    dim = dimension(node._saved_dim, z)
    log = node.name().startswith("Log")
    scores = z if log else z.clamp(min=torch.finfo(z.dtype).tiny).log()
    here, there = scores.chunk(2)
    total = torch.zeros_like(z)
    for point, weight in zip(POINTS, WEIGHTS, strict=True):
        p = (there + point * (here - there)).softmax(dim).repeat(2, *[1] * (z.dim() - 1))
        d = above[0]
        total += weight * (d - p * d.sum(dim, keepdim=True) if log else p * (d - (p * d).sum(dim, keepdim=True)))
    return (total,)


def _layer_norm(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    """The mean gradient on the way between the inputs."""
    x, weight, shape = node._saved_input, node._saved_weight, node._saved_normalized_shape
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    d = above[0] if weight is None else above[0] * weight
    eps = (node._saved_result2**-2 - x.var(dims, correction=0, keepdim=True)).clamp(min=0).mean()
    here, there = x.chunk(2)
    total = torch.zeros_like(x)
    for point, share in zip(POINTS, WEIGHTS, strict=True):
        way = (there + point * (here - there)).repeat(2, *[1] * (x.dim() - 1))
        way = way - way.mean(dims, keepdim=True)
        scale = (way.square().mean(dims, keepdim=True) + eps).rsqrt()
        way = way * scale
        total += share * scale * (d - d.mean(dims, keepdim=True) - way * (d * way).mean(dims, keepdim=True))
    return (total, *below[1:])


def _division(node: Any, a: Tensor | None, below: Any, above: Any) -> Any:
    """A product with the reciprocal, whose difference is that of an activation."""
    if len(below) < 2 or not _depends(node, 1):
        return None
    divisor = node._saved_other
    dividend = node._saved_self
    inverse = 1 / divisor
    left = above[0] * _mean(inverse) if below[0] is not None else None
    dd = _difference(divisor)
    slope = torch.where(dd.abs() < LEAST, -inverse.square(), _difference(inverse) / dd)
    return left, above[0] * _mean(dividend) * slope


def _depends(node: Any, place: int) -> bool:
    """Whether an operand depends on the batch, rather than on parameters alone."""
    ahead, seen = [node.next_functions[place][0]], {None}
    while ahead:
        below = ahead.pop()
        if below not in seen:
            seen.add(below)
            if hasattr(below, "variable") and not isinstance(below.variable, torch.nn.Parameter):
                return True
            ahead.extend(lower for lower, _ in below.next_functions)
    return False


_NODES, _SHARES = np.polynomial.legendre.leggauss(24)
POINTS, WEIGHTS = (_NODES / 2 + 0.5).tolist(), (_SHARES / 2).tolist()
"""Of the mean over the way from 0 to 1."""
RULES: dict[str, Rule | None] = {
    **dict.fromkeys(
        (
            *(
                *FlattenLRP.kinds,
                *SelectionLRP.kinds,
                "IndexAdd",
                *AveragePoolingLRP.kinds,
                *AdditionLRP.kinds,
                *SumLRP.kinds,
            ),
            *(*ConcatenationLRP.kinds, *CopyLRP.kinds, *CopyIntoPartLRP.kinds, *BatchNormLRP.kinds),
            *(*LinearLRP.kinds, *LinearWithBiasLRP.kinds, *ConvolutionalLRP.kinds),
        )
    ),
    **dict.fromkeys(ActivationLRP.kinds, _activation),
    "Relu": _relu,
    "LeakyRelu": _of(
        lambda node, x: torch.where(x > 0, x, x * float(node._saved_negative_slope)), lambda n: n._saved_self
    ),
    "PreluKernel": _of(lambda node, x: torch.where(x > 0, x, x * node._saved_weight), lambda node: node._saved_self),
    "Abs": _of(lambda node, x: x.abs(), lambda node: node._saved_self),
    "Exp": _of(lambda node, x: x.exp(), lambda node: node._saved_result.log()),
    "Log": _of(lambda node, x: x.log(), lambda node: node._saved_self),
    "Reciprocal": _of(lambda node, x: 1 / x, lambda node: 1 / node._saved_result),
    "Rsqrt": _of(lambda node, x: x.rsqrt(), lambda node: node._saved_result**-2),
    **dict.fromkeys(
        ("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"), _max_pooling
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "SafeSoftmax"), _softmax),
    "NativeLayerNorm": _layer_norm,
    "Mul": _product,
    "Div": _division,
    **dict.fromkeys(("Mm", "Bmm"), _matrix_product),
}
"""By the kind of node; None where multipliers go down as the gradient does. What is not here is refused."""
