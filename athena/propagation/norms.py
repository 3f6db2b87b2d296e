"""The LRP layers of norms: the division by the deviation takes no part.

(AttnLRP, section 3.3.2 of Achtibat et al. 2024.) In eval mode batch norm is a fixed affine map. Right after an affine
layer whose rule is not LRP-0, both are explained as the one layer they are.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from athena.propagation.affine import Layer, merged
from athena.propagation.layer import LRPLayer, total

if TYPE_CHECKING:
    from athena.propagation.walk import Walk


def _without_mean(s: Tensor, dims: tuple[int, ...]) -> Tensor:
    return s.sub_(s.mean(dims, keepdim=True))


def _scaled(d: Tensor, weight: Tensor | None, inverse: Tensor) -> Tensor:
    """``d`` times the weight of a norm and the inverse of its deviation, in memory of its own."""
    if weight is None:
        return d * inverse
    s = d * weight
    return s * inverse if torch.is_grad_enabled() or s.dtype != inverse.dtype else s.mul_(inverse)


def epsilon_of(node: Any) -> float:
    """What batch norm adds to the variance; cuDNN's and MIOpen's nodes have another name for it."""
    return float(node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon)


def inverse_deviation(saved: Tensor, node: Any, variance: Callable[[Tensor], Tensor]) -> Tensor:
    """What a norm multiplies by, as it has saved it; where relevance is to have a graph, with that of its input."""
    if not torch.is_grad_enabled():
        return saved
    of_input = variance(node._saved_input).reshape(saved.shape)
    return (of_input + (saved.to(of_input.dtype).pow(-2) - of_input).detach()).rsqrt()


class BatchNormLRP(LRPLayer):
    """Batch norm, and instance norm, which PyTorch runs as batch norm of more channels."""

    hands_on_output = True
    kinds = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, had the deviation been a constant."""
        d = given[0]
        assert d is not None
        shape, none = (-1, *[1] * (d.dim() - 2)), [None] * (len(node.next_functions) - 1)
        weight, z = node._saved_weight, walk.values.pop(node, None)
        if getattr(node, "_saved_training", True):
            dims = 0, *range(2, d.dim())
            inverse = inverse_deviation(node._saved_result2, node, lambda x: x.var(dims, correction=0))
            scale = inverse if weight is None else inverse * weight
            down = _without_mean((d * scale.view(shape)).to(d.dtype), dims)
            if walk.account is not None:
                book(walk, node, down, node._saved_input, d, cls.bias(walk, node, d), shape)
            return [down, *none]
        scale = (node._saved_running_var + epsilon_of(node)).rsqrt()
        scale = scale if weight is None else scale * weight
        layer = walk.layers.get(node.next_functions[0][0])
        if layer is not None and walk.merges and merged(layer):
            return [cls.merge(walk, node, layer, scale, d, shape, z), *none]
        x, down = node._saved_input, d * scale.view(shape)
        if walk.account is not None:
            bias, shift = cls.bias(walk, node, d), -node._saved_running_mean * scale
            book(walk, node, down, x, d, shift if bias is None else bias + shift, shape)
        walk.remember(node.next_functions[0], x)
        return [down, *none]

    @classmethod
    def merge(
        cls, walk: "Walk", node: Any, layer: Layer, scale: Tensor, d: Tensor, shape: tuple[int, ...], z: Tensor | None
    ) -> Tensor | None:
        """Treats this and the layer below as one, by the layer's rule; the layer then only passes on the gradient."""
        shared = layer.node in walk.shared
        if shared:  # what comes down to the layer from elsewhere goes by the layer's own rule
            layer = copy.copy(layer)
        bias, mean = cls.bias(walk, node, scale), node._saved_running_mean
        layer.scale, layer.shift = scale, (0 if bias is None else bias) - mean * scale
        walk.merged.add(node)
        if node.next_functions[2][0] is not None:
            layer.bias_edge = node.next_functions[2]
        if z is None:
            z = (node._saved_input * scale.view(shape)).add_(layer.shift.view(shape))
        layer.z, layer.rectified = z, node in walk.rectified
        if walk.through is not None and layer.node in walk.through:
            d = walk.through.kept(walk, layer.node, d, z)
        s = layer.kind.at(walk, layer, d)
        layer.passes, layer.finished = True, isinstance(s, tuple)
        if not shared:
            return s[0] if layer.finished else s * scale.view(shape)
        down = s[0] if layer.finished else layer.kind.pull(layer, s * scale.view(shape), layer.w)
        walk.send(layer.node.next_functions[layer.kind.first + layer.place], down)
        return None

    @classmethod
    def bias(cls, walk: "Walk", node: Any, like: Tensor) -> Tensor | None:
        """What is added to each channel, or None."""
        note = walk.notes_of.get(node)
        return note.bias if note is not None else walk.constant(node.next_functions[2], like)


def book(
    walk: "Walk", node: Any, down: Tensor, x: Tensor, d: Tensor, shift: Tensor | None, shape: tuple[int, ...] = (-1,)
) -> None:
    """Takes what a norm adds to each channel into the account."""
    constant = 0.0 if shift is None else total(shift.view(shape).double() * d)
    walk.account.add(node, total(x * down) + constant, constant, is_module=True)  # type: ignore[union-attr]


class NormalisationLRP(LRPLayer):
    """Layer norm."""

    kinds = ("NativeLayerNorm",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, had the deviation been a constant."""
        d, weight = given[0], node._saved_weight
        assert d is not None
        dims = tuple(range(d.dim() - len(node._saved_normalized_shape), d.dim()))
        inverse = inverse_deviation(node._saved_result2, node, lambda x: x.var(dims, correction=0))
        down = _without_mean(_scaled(d, weight, inverse), dims).to(d.dtype)
        x = node._saved_input
        if walk.account is not None:
            shift = node._saved_bias
            book(walk, node, down, x, d, shift, (1,) if shift is None else shift.shape)
        walk.remember(node.next_functions[0], x)
        return [down, *[None] * (len(node.next_functions) - 1)]


class GroupNormLRP(LRPLayer):
    """Group norm."""

    kinds = ("NativeGroupNorm",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, had the deviation been a constant."""
        d, weight, channels = given[0], node._saved_weight, (-1, *[1] * (given[0].dim() - 2))  # type: ignore[union-attr]
        assert d is not None
        s = d if weight is None else d * weight.view(channels)
        grouped = len(d), node._saved_group, -1
        inverse = inverse_deviation(node._saved_result2, node, lambda x: x.reshape(grouped).var(2, correction=0))
        s = s.reshape(grouped) * inverse.view(len(d), -1, 1)
        down = _without_mean(s, (2,)).reshape(d.shape)
        if walk.account is not None:
            book(walk, node, down, node._saved_input, d, BatchNormLRP.bias(walk, node, d), channels)
        return [down, *[None] * (len(node.next_functions) - 1)]


class RMSNormLRP(LRPLayer):
    """The root mean square norm, where it is one operation."""

    kinds = ("FusedRmsNorm",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, had the root been a constant."""
        d, weight = given[0], node._saved_weight
        assert d is not None
        dims = tuple(range(d.dim() - len(node._saved_normalized_shape), d.dim()))
        inverse = inverse_deviation(node._saved_result1, node, lambda x: x.square().mean(dims))
        return [_scaled(d, weight, inverse).to(d.dtype), *[None] * (len(node.next_functions) - 1)]
