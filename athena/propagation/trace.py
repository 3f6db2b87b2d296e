"""Which module called which function for each node of a graph: to name operations in messages and in the account.

A relevance pass does without. Where one was refused, or where its account is asked for, the forward pass is traced.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from athena.propagation.layer import layer_of_kind
from athena.propagation.notes import Notes, tensors_in, writes_in_place

__all__ = ["Call", "Trace"]

TENSOR_PARALLEL = ("_FromTorchTensorBackward", "_ToTorchTensorBackward", "RedistributeBackward")
"""The nodes by which `torch.distributed.tensor` hands tensors to its layers, moves their parts and gives them back."""


class Call(NamedTuple):
    """One call of a function of PyTorch.

    Attributes:
        order: how many came before.
        path: of the innermost module that was running; empty for the model itself.
        name: of the function.
        operands: by their places in the graph, operands that asked for gradients.
        out: the output, where constants may keep a share of its relevance.
    """

    order: int
    path: str
    name: str
    operands: dict[Any, Tensor]
    out: Tensor | None


class Trace(Notes):
    """Notes that also tell who has made what.

    Args:
        modules: those of the model, by path.
        outputs, zeros, sources: as for `Notes`.
    """

    def __init__(
        self, modules: dict[str, nn.Module], outputs: bool = True, zeros: bool = False, sources: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(outputs, zeros, sources)
        self.modules = modules
        self._running: list[str] = []
        self._made: dict[Any, Call] = {}
        self._returned: dict[Any, tuple[int, str]] = {}
        self._readers: dict[Any, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of the block, knows which module runs. Other threads that use the model are not looked at."""
        thread = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                for tensor in tensors_in(args):  # made by the module that calls this one, if no function has made it
                    if tensor.grad_fn not in self._made:
                        path = self._running[-1] if self._running else ""
                        self._returned.setdefault(tensor.grad_fn, (len(self._made), path))
                self._running.append(paths[id(module)])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread and self._running:
                path = self._running.pop()
                for tensor in tensors_in(output):
                    self._returned.setdefault(tensor.grad_fn, (len(self._made), path))

        paths = {id(module): path for path, module in self.modules.items()}
        handles = [module.register_forward_pre_hook(enter) for module in self.modules.values()]
        handles += [module.register_forward_hook(leave, always_call=True) for module in self.modules.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = {}
        in_place = writes_in_place(function, args, kwargs or {})
        for tensor in tensors_in(args, kwargs):
            if tensor.requires_grad:
                try:
                    edge = get_gradient_edge(tensor)
                except AssertionError:  # the part of a DTensor that is here has no place in the graph
                    continue
                operands[edge.node, edge.output_nr] = tensor.detach().clone() if in_place else tensor.detach()
        out = super().__torch_function__(function, types, args, kwargs)
        name = getattr(function, "__name__", "operation")
        for tensor in (*tensors_in(out), *(args[:1] if in_place else ())):
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            while node is not None and node not in self._made:
                kind = layer_of_kind(node.name())
                keeps = (kind is not None and kind.constants_keep) or self.zeros
                kept = tensor.detach().clone() if keeps else None
                path = self._running[-1] if self._running else ""
                self._made[node] = Call(len(self._made), path, name, operands, kept)
                node = node.next_functions[0][0] if in_place and "AsStrided" in node.name() else None
        return out

    def outputs_of(self, node: Any) -> Tensor | None:
        """See `Notes.outputs_of`."""
        call = self._made.get(node)
        return None if call is None else call.out

    def learn(self, order: Sequence[Any]) -> None:
        """Takes note of who reads what, for nodes that no function gave out, as those within attention."""
        for node in reversed(order):
            for below, _ in node.next_functions:
                self._readers.setdefault(below, node)

    def call_of(self, node: Any) -> Call | None:
        """The call that has made the node itself, or None."""
        return self._made.get(node)

    def caller_of(self, node: Any) -> Call | None:
        """The call within which the node was made, also where the function has called others."""
        while node is not None and node not in self._made:
            node = self._readers.get(node)
        return self._made.get(node)

    def place_of(self, node: Any) -> tuple[int, str]:
        """When the node was made, and the path of the module that was running."""
        while node is not None:
            call = self._made.get(node)
            if call is not None:
                return call.order, call.path
            if node in self._returned:
                return self._returned[node]
            node = self._readers.get(node)
        return 0, ""

    def name_of(self, node: Any) -> str:
        """The path of an operation: that of the module that called it, and its name."""
        call = self._made.get(node)
        name = call.name.strip("_") if call is not None else node.name().partition("Backward")[0].lower()
        return f"{self.place_of(node)[1]}.{name}".removeprefix(".")

    def explained(self, node: Any, what: str) -> str:
        """Why relevance cannot pass the node, in a sentence that names the module and the operation."""
        where = self.place_of(node)[1] or type(self.modules[""]).__name__
        call, kind = self._made.get(node), node.name()
        if what and call is not None:
            what = f"{call.name!r}, {what}"
        elif not what:
            if call is not None:
                what = repr(call.name)
            elif kind in TENSOR_PARALLEL:
                what = "tensor parallelism (DTensor; under DDP and FSDP layers are whole)"
            elif kind.startswith("CompiledFunction"):
                what = "a compiled function"
            elif kind.rstrip("0123456789") == kind:
                what = f"a custom autograd function ({kind})"
            else:
                what = repr(kind.partition("Backward")[0])
        return f"{where!r} uses {what}, and LRP has no rule to pass relevance through it"
