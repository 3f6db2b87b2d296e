"""What the operations of a forward pass were, so that they can be run again at other inputs.

An operation without an LRP layer of its own is known by what it computes (`athena.propagation.euler`). `Operations`
sees every operation below autograd, also those within functions of PyTorch that call others, and keeps the ones that
may have to be tried, with what they were given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from athena.propagation.layer import layer_of_kind
from athena.propagation.notes import Notes, tensors_in
from athena.propagation.target import mapped

__all__ = ["Operation", "Operations", "recording"]


class Operation:
    """One operation, with what it was given.

    Args:
        function: of `torch.ops.aten`.
        args, kwargs: what it was given.
        base: what the tensor that it writes into is a part of, or None.
        copies: whether to keep copies of what it was given, as it was then.
    """

    def __init__(
        self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], base: Tensor | None, copies: bool
    ) -> None:
        self.function, self._base, self._edges = function, None, dict[int, Any]()
        self._numbers: list[int | None] = []
        self._writes = function._schema.is_mutable

        def kept(tensor: Tensor) -> Tensor:
            own = tensor.detach().clone() if copies or (tensor is args[0] and self._writes) else tensor.detach()
            self._edges[id(own)] = _edge(tensor)
            return own

        self._args, self._kwargs = mapped(tuple(args), kept), mapped(kwargs, kept)
        if base is not None:
            part = args[0]
            self._part = part.size(), part.stride(), part.storage_offset() - base.storage_offset()
            self._base = base.detach().clone()
            self._edges[id(self._base)] = _edge(base)

    def made(self, results: Sequence[Tensor]) -> None:
        """Takes note of which output of the graph node each result is."""
        self._numbers = [None if tensor.grad_fn is None else tensor.output_nr for tensor in results]

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.function.tags

    def operands(self, ways: Sequence[Any]) -> dict[Any, list[Tensor]] | None:
        """The operands at each of these places in the graph; None if one of the places has none."""
        values = tensors_in(self._args, self._kwargs)
        values = values if self._base is None else [self._base, *values[1:]]  # what is written into is a part of it
        found: dict[Any, list[Tensor]] = {way: [] for way in ways}
        for value in values:
            edge = self._edges[id(value)]
            for way, its in found.items():
                if edge is not None and (way == edge or getattr(way[0], "variable", None) is edge):
                    its.append(value)
        return found if all(found.values()) else None

    def at(self, scale: float, operands: dict[Any, list[Tensor]]) -> dict[int, Tensor]:
        """Its outputs with its operands multiplied by a number, by the number of the output of the graph node.

        In float64, which tells what is homogeneous from what is so nearly.
        """
        multiplied = {id(value) for values in operands.values() for value in values}

        def scaled(tensor: Tensor) -> Tensor:
            value = tensor
            if tensor.is_floating_point() or tensor.is_complex():
                value = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
            if id(tensor) in multiplied:
                return torch.zeros_like(value) if scale == 0 else value * scale
            return value.clone() if self._writes and value is tensor else value

        args, kwargs = mapped(self._args, scaled), mapped(self._kwargs, scaled)
        if self._base is not None:
            whole = scaled(self._base)
            self.function(whole.as_strided(*self._part), *args[1:], **kwargs)
            return {0: whole}
        results = tensors_in(self.function(*args, **kwargs))
        return {number: part for number, part in zip(self._numbers, results, strict=False) if number is not None}


class Operations(TorchDispatchMode):
    """A context for one forward pass.

    Args:
        copies: as for `Operation`.
    """

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        self._made: dict[Any, Operation] = {}
        self._last: tuple[Operation, list[Tensor], Tensor | None] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks; if so, it imports all of its compiler when the first operation is recorded."""
        return False

    def of(self, node: Any) -> Operation | None:
        """The operation that has made a graph node, if it was kept."""
        return self._made.get(node)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.settle()
        kwargs = kwargs or {}
        # within custom functions gradients are off
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors_in(args, kwargs)):
            return function(*args, **kwargs)
        writes = function._schema.is_mutable
        base = args[0]._base if writes and args and isinstance(args[0], Tensor) and args[0]._is_view() else None
        operation = Operation(function, args, kwargs, base, self.copies)
        out = function(*args, **kwargs)
        self._last = operation, tensors_in(out), base
        return out

    def settle(self) -> None:
        """The last operation has its graph node by now, which autograd has put above it."""
        if self._last is None:
            return
        (operation, results, base), self._last = self._last, None
        made = results if base is None else [base]
        for tensor in made:
            node = tensor.grad_fn
            if node is not None and node not in self._made and may_be_tried(node.name()):
                self._made[node] = operation
        operation.made(made)


@contextmanager
def recording(notes: Notes, copies: bool = False) -> Iterator[None]:
    """For the time of the block, records operations with `notes`."""
    notes.operations = operations = Operations(copies)
    with operations:
        yield
    operations.settle()


def may_be_tried(name: str) -> bool:
    """Whether graph nodes with this name may have to be tried."""
    kind = layer_of_kind(name)
    return kind is None or kind.is_tried


def _edge(tensor: Tensor) -> Any:
    """The place of a tensor in the graph, or itself where it is a leaf."""
    if not tensor.requires_grad:
        return None
    return tensor if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)
