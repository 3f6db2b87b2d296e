"""What every LRP layer is: the way relevance takes through one kind of operation.

Relevance is a modified gradient. Written as ``R = z d``, LRP sends ``d`` down the graph that autograd has recorded as
autograd sends a gradient; an LRP layer says what ``d`` becomes at its kind of graph node. Not here: the layers
themselves, which stand in the files beside this one, and the walk that calls them (`athena.propagation.walk`).
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from athena.propagation.walk import Walk

__all__ = [
    "LRPLayer",
    "UnsupportedLayer",
    "dimension",
    "gradients",
    "known",
    "layer_of_kind",
    "nonzero",
    "number_of_outputs",
    "over",
    "shares_memory",
    "times_in_place",
    "total",
]


class UnsupportedLayer(TypeError):
    """Relevance reached an operation it cannot pass through; the message names the module path and the operation."""


class LRPLayer:
    """How relevance passes through some kinds of graph nodes: as the gradient does, unless a subclass says otherwise.

    To add an operation, put the name of its node in the `kinds` of the class that treats it rightly, or write a new
    subclass: to define it is to have it used.

    Attributes:
        kinds: names of nodes as ``tensor.grad_fn.name()`` gives them, without ``Backward0``.
        is_affine: whether it is a product that may be a layer with weights.
        is_view: whether it only gives its operand another shape, every element once.
        hands_on_output: whether its output, where it is known, tells that of the layer below it.
        is_elementwise: whether each output element depends on the input element at the same place alone.
        may_divide: whether it may divide by its operand alone, and so make a divisor.
        is_tried: whether what its nodes have computed may have to be run again.
        divides: whether a divisor (see `Walk.divisors`) may be one of its operands.
        has_many_outputs: whether its nodes may have more than one output.
        broadcasts: whether its operands may have been broadcast, which autograd's engine undoes, not the node.
        constants_keep: whether a constant operand keeps a share of the relevance, as a bias does.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    is_affine: ClassVar[bool] = False
    is_view: ClassVar[bool] = False
    hands_on_output: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False
    may_divide: ClassVar[bool] = False
    is_tried: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    has_many_outputs: ClassVar[bool] = False
    broadcasts: ClassVar[bool] = False
    constants_keep: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _LAYERS.update(dict.fromkeys(vars(cls).get("kinds", ()), cls))
        _BY_NAME.clear()

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What ``d`` becomes below `node`.

        Args:
            walk: the relevance pass.
            node: the graph node. Each tensor that it has saved is to be looked at once at most: where the forward pass
                runs under `torch.utils.checkpoint`, a second look computes it again.
            given: the ``d`` of each of its outputs, None where none came.

        Returns:
            The ``d`` of each entry of ``node.next_functions``.
        """
        return gradients(node, given)


def gradients(node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What autograd makes of ``d`` at a graph node: one for each of its operands."""
    downs = node(*given)
    return downs if isinstance(downs, tuple) else (downs,)


_LAYERS: dict[str, type[LRPLayer]] = {}
_BY_NAME: dict[str, type[LRPLayer] | None] = {}
_NUMBERED = re.compile(r"(^torch::autograd::)|(Backward\d*$)")


def layer_of_kind(name: str) -> type[LRPLayer] | None:
    """The LRP layer of the graph nodes with this name, ``"AddmmBackward0"``; None where there is none."""
    try:
        return _BY_NAME[name]
    except KeyError:
        return _BY_NAME.setdefault(name, _LAYERS.get(_NUMBERED.sub("", name)))


def number_of_outputs(node: Any) -> int:
    """How many outputs of a graph node can have a gradient."""
    return len(node._input_metadata)


def shares_memory(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether `tensor` is one of the others, or a view of one."""
    if not _has_memory(tensor):
        return any(tensor is other for other in others)
    memory = tensor.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == memory for other in others if _has_memory(other))


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has a memory of its own: one that is sparse, or made of others as a DTensor is, has none."""
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def dimension(saved: int, z: Tensor) -> int:
    """A dimension of `z` as a graph node has saved it: one counted from the last is a number near 2 ** 64."""
    return saved if saved < z.dim() else saved - 2**64


def nonzero(z: Tensor) -> Tensor:
    """``z`` with values as good as 0 moved off it, so that ``R = z d`` can hold any ``R``."""
    least = max(1e-20, torch.finfo(z.dtype).tiny)  # adds nothing to anything, and its inverse is finite
    small = torch.full_like(z, least).copysign_(z.detach())
    return torch.where(z.abs() < least, small, z)


def known(tensor: Tensor) -> Tensor:
    """A value of the forward pass; it keeps its graph where relevance is to have one."""
    return tensor if torch.is_grad_enabled() else tensor.detach()


def over(share: Tensor, a: Tensor) -> Tensor:
    """``share / a`` in the memory of `share`, and 0 where ``a`` is; with a gradient that is finite, if it has one."""
    if torch.is_grad_enabled():
        return (share / a.masked_fill(a == 0, 1)).masked_fill(a == 0, 0)
    # a mask of booleans would take ten times as long on a CPU
    return share.mul_(a.sign().div_(a.abs().clamp_min_(torch.finfo(a.dtype).tiny)))


def times_in_place(d: Tensor, number: float) -> Tensor:
    """``d number`` in the memory of `d`, unless it is to have a graph."""
    return d * number if torch.is_grad_enabled() else d.mul_(number)


def total(relevance: Tensor) -> float:
    """The sum in float64. What is infinite, as a masked score, passes nothing on and counts as nothing."""
    return relevance.double().nan_to_num(0.0, 0.0, 0.0).sum().item()
