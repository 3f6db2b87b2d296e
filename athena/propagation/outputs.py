"""The relevance of what chosen modules give out, whatever they do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from athena.propagation.layer import nonzero
from athena.propagation.notes import tensors_in
from athena.propagation.paths import numbered

__all__ = ["ModuleOutputs"]


class ModuleOutputs:
    """What is found while relevance comes down.

    Args:
        modules: those asked for, by path.
        zeros: whether outputs that are 0 may have relevance.
    """

    def __init__(self, modules: dict[str, nn.Module], zeros: bool) -> None:
        self._modules, self._zeros = modules, zeros
        self._calls: list[tuple[str, list[tuple[Any, Tensor]]]] = []
        self._relevance: dict[Any, Tensor] = {}
        self._values: dict[Any, Tensor] = {}
        self._layers: set[Any] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of the block, remembers what the modules give out."""

        def leave(path: str, output: Any) -> None:
            parts = []
            for tensor in tensors_in(output):
                edge, value = None, tensor.detach().clone()  # it may be changed in place
                if tensor.requires_grad:
                    place = get_gradient_edge(tensor)
                    edge = place.node, place.output_nr
                    self._values[edge] = value
                parts.append((edge, value))
            self._calls.append((path, parts))

        handles = [
            module.register_forward_hook(lambda _module, _args, output, path=path: leave(path, output))
            for path, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of_layer(self, node: Any, relevance: Tensor) -> None:
        """Takes the relevance of an affine layer's output, which tells more than its ``d``."""
        edge = node, 0
        if edge in self._values:
            before = self._relevance.get(edge)
            self._layers.add(node)
            self._relevance[edge] = relevance if before is None else before + relevance

    def take(self, node: Any, given: Sequence[Tensor | None]) -> None:
        """Takes the ``d`` of each output of a graph node."""
        for number, d in enumerate(given):
            if d is not None and (value := self._values.get((node, number))) is not None and node not in self._layers:
                self._relevance[node, number] = (nonzero(value) if self._zeros else value) * d

    @property
    def found(self) -> dict[str, Any]:
        """The relevance of each module's output in forward order; ``path#2`` for a second call."""
        found: dict[str, Any] = {}
        for path, (_, parts) in zip(numbered(path for path, _ in self._calls), self._calls, strict=True):
            relevance = tuple(
                value.new_zeros(value.shape) if (its := self._relevance.get(edge)) is None else its.reshape(value.shape)
                for edge, value in parts
            )
            found[path] = relevance[0] if len(relevance) == 1 else relevance
        return found
