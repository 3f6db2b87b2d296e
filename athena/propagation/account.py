"""The account of a relevance pass: what each layer held, and what each operation kept of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from athena.propagation.layer import layer_of_kind, nonzero, total
from athena.propagation.notes import tensors_in
from athena.propagation.outputs import ModuleOutputs
from athena.propagation.parameters import ParameterRelevance
from athena.propagation.paths import numbered
from athena.propagation.trace import Trace

if TYPE_CHECKING:
    from athena.propagation.affine import Layer
    from athena.propagation.walk import Walk

__all__ = ["Account", "Row"]


class Row(NamedTuple):
    """What one operation held, and kept.

    Attributes:
        path: of the layer, or of the operation within the module that called it.
        relevance: of its output, summed over the batch.
        bias: what constants kept of it.
        stabiliser: what the stabiliser kept of it.
    """

    path: str
    relevance: float
    bias: float
    stabiliser: float


class Account:
    """What is booked while relevance comes down.

    Args:
        trace: of the forward pass.
        parameters: collects what the model's parameters get, or None.
        outputs: collects what modules asked for hold, or None.
    """

    def __init__(
        self, trace: Trace, parameters: ParameterRelevance | None = None, outputs: ModuleOutputs | None = None
    ) -> None:
        self.trace, self.parameters, self.outputs = trace, parameters, outputs
        self.lost: Row | None = None
        self._rows: list[tuple[int, int, Row]] = []
        self._layers: list[tuple[int, int, str, Tensor]] = []

    def start(self, relevance: Any, starts: Sequence[tuple[Tensor, Tensor]], zeros: bool) -> None:
        """Books what is lost because it is to start at outputs of 0, unless these may have relevance."""
        if not zeros and any(bool((out == 0).any()) for out, _ in starts):
            whole = sum(total(part) for part in tensors_in(relevance))
            lost = whole - sum(total(out * d) for out, d in starts)
            self.lost = Row("output", whole, lost, 0.0) if lost else None

    def of_layer(self, walk: "Walk", layer: "Layer", relevance: Tensor, bias: float, stabiliser: float) -> None:
        """Books an affine layer."""
        when, _ = self.trace.place_of(layer.node)
        path = layer.path or self.trace.name_of(layer.node)
        if self.trace.call_of(layer.node) is None:  # it is folded within the function that was called
            relevance = relevance.view(walk.shape_of(layer))
        self._layers.append((when, -len(self._rows), path, relevance))
        self._rows.append((when, -len(self._rows), Row(path, total(relevance), bias, stabiliser)))
        if self.outputs is not None:
            self.outputs.of_layer(layer.node, relevance)

    def add(self, node: Any, relevance: float, bias: float, is_module: bool = False) -> None:
        """Books another operation, of which constants keep `bias`; one that is a module has that module's path."""
        when, path = self.trace.place_of(node)
        name = path if is_module and path else self.trace.name_of(node)
        self._rows.append((when, -len(self._rows), Row(name, relevance, bias, 0.0)))

    def cut(self, node: Any, path: str, relevance: float, away: float) -> None:
        """Books what was cut away of the relevance of a module's output (see `athena.propagation.through`)."""
        self._rows.append(
            (self.trace.place_of(node)[0], -len(self._rows), Row(f"{path} (through)", relevance, away, 0.0))
        )

    def measure(self, walk: "Walk", node: Any, given: Sequence[Tensor | None], downs: Sequence[Tensor | None]) -> None:
        """Books what came to an operation and did not go on to its operands, if it has constant ones."""
        ways = node.next_functions
        call = self.trace.call_of(node)
        if call is None and (scores := walk.scores.pop(node, None)) is not None:
            self._measure_mask(walk, node, given, downs, scores)
        every = len(ways) > 1 and all(below in walk.relevant for below, _ in ways)  # numbers have no way of their own
        if node in walk.merged or call is None or call.out is None or (every and not walk.zeros):
            return
        z = nonzero(call.out) if walk.zeros else call.out
        came = sum(total(z * d) for d in given if d is not None)
        went = 0.0
        for way, down in zip(ways, downs, strict=False):
            if down is not None and way[0] in walk.relevant:
                if way not in call.operands:  # a part of a function that calls others
                    return
                x = call.operands[way]
                went += total((nonzero(x) if walk.zeros else x) * down)
        if abs(came - went) > 1e-12 * abs(came):
            self.add(node, came, came - went)

    def _measure_mask(
        self, walk: "Walk", node: Any, given: Any, downs: Sequence[Tensor | None], scores: Tensor
    ) -> None:
        """Books what a learned bias keeps that attention adds to its scores; these are known but for a constant."""
        call, kept = self.trace.caller_of(node), 0.0
        operands = {} if call is None else call.operands
        for way, down in zip(node.next_functions, downs, strict=False):
            if way[0] not in walk.relevant and down is not None:
                while way not in operands and way[0].name() in ("UnsqueezeBackward0", "ExpandBackward0"):
                    way = way[0].next_functions[0]  # its shape is broadcast
                if way not in operands:
                    return
                kept += total(operands[way] * down)
        self.add(node, total(scores * given[0]), kept)

    def passed(self, walk: "Walk", node: Any, given: Sequence[Tensor | None], downs: Sequence[Tensor | None]) -> None:
        """Books what an operation was given and what it sent down."""
        kind = layer_of_kind(node.name())
        if kind is not None and kind.constants_keep:
            self.measure(walk, node, given, downs)
        if self.parameters is not None:
            self.parameters.of_operation(walk, node, given)
        if self.outputs is not None:
            self.outputs.take(node, given)

    @property
    def layers(self) -> dict[str, Any]:
        """The relevance of the output of each affine layer, or module asked for; a second use is ``path#2``."""
        if self.outputs is not None:
            return self.outputs.found
        return dict(zip(*self._named(self._layers), strict=True))

    @property
    def rows(self) -> list[Row]:
        """The rows from the output down."""
        paths, rows = self._named([(when, turn, row.path, row) for when, turn, row in self._rows])
        table = [row._replace(path=path) for path, row in zip(paths, rows, strict=True)][::-1]
        return table if self.lost is None else [self.lost, *table]

    @staticmethod
    def _named(entries: Sequence[tuple[int, int, str, Any]]) -> tuple[list[str], list[Any]]:
        ordered = sorted(entries, key=lambda entry: entry[:2])
        return numbered(path for _, _, path, _ in ordered), [value for *_, value in ordered]
