"""The LRP layers of element-wise activations: relevance goes on unchanged (identity rule).

For ``z = f(x)`` with ``f(0) = 0`` that is ``d -> d f(x) / x``. Where ``f(0)`` is not 0, as for the sigmoid, it is a
constant summand that keeps its share as any other does: ``d -> d (f(x) - f(0)) / x``, which is bounded where
``f(x) / x`` is not.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from athena.propagation.layer import LRPLayer, known, nonzero, over, total

if TYPE_CHECKING:
    from athena.propagation.walk import Walk


class ReLULRP(LRPLayer):
    """ReLU and what else is linear on both sides of 0: ``f(x) / x`` is the derivative, so relevance is a gradient."""

    is_elementwise = True
    kinds: ClassVar[tuple[str, ...]] = ("LeakyRelu", "Abs", "PreluKernel", "RreluWithNoise")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, unless neurons that are 0 may have relevance."""
        if walk.zeros and (x := input_of(walk, node)) is not None and (z := walk.output(node)) is not None:
            (d,) = given
            assert d is not None
            return (d * nonzero(z) / nonzero(x), *(None for _ in node.next_functions[1:]))
        return super().down(walk, node, given)


class RectifierLRP(ReLULRP):
    """ReLU itself. Its output serves as that of an affine layer below: where they differ, no relevance is."""

    kinds = ("Relu",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, which a layer below that divides its relevance by its output need not be sent at all."""
        if walk.zeros:
            return super().down(walk, node, given)
        d, z = given[0], node._saved_result
        assert d is not None
        (edge,) = node.next_functions
        walk.remember(edge, z, rectified=True)
        layer = walk.layers.get(edge[0])
        if layer is not None and edge[0] not in walk.shared and layer.divides:
            return (d,)
        return (torch.ops.aten.threshold_backward.default(d, z, 0),)


class ActivationLRP(LRPLayer):
    """Element-wise activations, each with ``f(x)`` and ``f(0)``."""

    is_elementwise = True
    may_divide = True  # as a power does
    ratios: ClassVar[dict[str, Callable[[Any, Tensor], Tensor]]] = {
        "Silu": lambda node, x: x.sigmoid(),
        "Hardswish": lambda node, x: F.hardsigmoid(x),
    }
    """Where ``f(x) / x`` is a function that PyTorch has."""
    functions: ClassVar[dict[str, Callable[[Any, Tensor], Tensor]]] = {
        "Gelu": lambda node, x: F.gelu(x, approximate=node._saved_approximate),
        "Elu": lambda node, x: torch.ops.aten.elu(x, node._saved_alpha, node._saved_scale, node._saved_input_scale),
        "Celu": lambda node, x: F.celu(x, float(node._saved_alpha)),
        "Mish": lambda node, x: F.mish(x),
        "Hardtanh": lambda node, x: x.clamp(float(node._saved_min_val), float(node._saved_max_val)),
        "Hardsigmoid": lambda node, x: F.hardsigmoid(x),
        "Sigmoid": lambda node, x: x.sigmoid(),
        "Tanh": lambda node, x: x.tanh(),
        "Erf": lambda node, x: x.erf(),
        "Softplus": lambda node, x: F.softplus(x, float(node._saved_beta), float(node._saved_threshold)),
        "LogSigmoid": lambda node, x: F.logsigmoid(x),
        "Softshrink": lambda node, x: F.softshrink(x, float(node._saved_lambd)),
        "Hardshrink": lambda node, x: F.hardshrink(x, float(node._saved_lambd)),
        "Threshold": lambda node, x: torch.where(x > node._saved_threshold, x, 0.0),
        "Clamp": lambda node, x: x.clamp(node._saved_min, node._saved_max),
        "ClampMin": lambda node, x: x.clamp_min(node._saved_min),
        "ClampMax": lambda node, x: x.clamp_max(node._saved_max),
        "Pow": lambda node, x: x.pow(node._saved_exponent),
        "Sqrt": lambda node, x: x.sqrt(),
    }
    kinds = (*ratios, *functions)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """``d (f(x) - f(0)) / x``, and nothing where ``x`` is 0."""
        (d,), x = given, input_of(walk, node)
        assert d is not None
        kind = node.name().partition("Backward")[0]
        if x is None or len([1 for below, _ in node.next_functions if below in walk.relevant]) != 1:
            walk.refuse(node)
        walk.remember(node.next_functions[0], x)
        if kind in cls.ratios and not walk.zeros:
            return (d * cls.ratios[kind](node, x),)
        function = cls.functions.get(kind) or (lambda node, x: x * cls.ratios[kind](node, x))
        z = function(node, x)
        at_zero = 0.0 if kind in ZERO_AT_ZERO else function(node, torch.zeros((), dtype=x.dtype)).item()
        if walk.zeros:
            down = d * (nonzero(z) - at_zero) / nonzero(x)
        elif torch.is_grad_enabled():
            down = over((z - at_zero) * d, x)
        else:
            # in one tensor: memory that is new costs more than arithmetic
            down = (z.sub_(at_zero) if at_zero else z).div_(x).nan_to_num_(0.0).mul_(d)
        if at_zero and walk.account is not None:
            walk.account.add(node, total(d * function(node, x)), at_zero * total(d))
        return (down,)


ZERO_AT_ZERO = ("Gelu", "Elu", "Celu", "Mish", "Tanh", "Erf", "Softshrink", "Hardshrink", "Threshold", "Sqrt")
"""Activations that are 0 at 0 whatever their parameters."""
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "SigmoidBackward0": torch.logit,
    "TanhBackward0": torch.atanh,
    "SqrtBackward0": torch.square,
}
"""By the node of an activation that is remembered by its output: from that to its input."""


def input_of(walk: "Walk", node: Any) -> Tensor | None:
    """The input of an activation, if there is a way to tell."""
    note, name = walk.notes_of.pop(node, None), node.name()
    if note is not None and note.a is not None:
        walk.uses_notes = True
        return note.a
    if name not in INVERSES:
        saved = getattr(node, "_saved_self", None)
        return known(saved) if isinstance(saved, Tensor) else None
    if name != "SqrtBackward0":
        walk.uses_notes = True
        layer = walk.layers.get(node.next_functions[0][0])
        if layer is not None and layer.node not in walk.shared:
            layer.z = layer.kind.output(walk, layer)
            return layer.z
        walk.require_notes()
    return INVERSES[name](node._saved_result)
