"""The graph of a forward pass: its operations in order, the affine layers among them, and where relevance may come to.

Relevance comes to what depends on the input, in training to what depends on a guided layer, and to nothing else.
`Graph` finds that once, from the output of the model down, before relevance takes the same way
(`athena.propagation.walk`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from athena.propagation.affine import AffineLRP, ConvolutionalLRP, Layer, LinearLRP
from athena.propagation.layer import LRPLayer, layer_of_kind, shares_memory
from athena.propagation.notes import Note, Notes
from athena.propagation.paths import Paths
from athena.propagation.products import makes_a_divisor
from athena.propagation.trace import Trace
from athena.propagation.values import FOLDS, edge_of, is_leaf, join_bias
from athena.rules import RuleChoice

__all__ = ["Graph", "Wanted"]

Wanted = Callable[[str, type[AffineLRP]], bool]


class Graph:
    """What a forward pass has left behind.

    Args:
        notes: of the forward pass.
        paths: of the model.
        rules: which rule each affine layer gets.
        wanted: in training, whether an affine layer is guided, by its path and LRP layer. None where it is the input
            that is explained.
        is_accounted: whether an account of the relevance of each layer is to be kept.

    Attributes:
        order: the nodes that relevance may come to, and the divisors, each after all that lie below it.
        ways: the operands of each node, as ``node.next_functions`` gives them.
        kinds: the LRP layer of each node, or None.
        relevant: nodes that relevance may come to: they depend on the input, or in training on a guided layer.
        divisors: nodes that only divide, such as reciprocals; though they depend on the input, they get no relevance.
        layers: the affine layers that relevance has not reached yet, by node.
        shared: nodes whose output more than one operation reads.
        merged: additions of a bias that are part of the layer below them.
        uses_notes: whether notes were used, or would have saved a computation.
        has_reentrant_checkpoint: whether a part of the forward pass is hidden in a checkpoint.
        gives_to_zeros: whether a layer that stands on others has a rule that gives relevance to neurons that are 0.
        reaches_zeros: whether any layer has such a rule.
    """

    def __init__(
        self, notes: Notes, paths: Paths, rules: RuleChoice, wanted: Wanted | None, is_accounted: bool
    ) -> None:
        self.notes, self.paths, self.rules, self.wanted = notes, paths, rules, wanted
        self.order: list[Any] = []
        self.ways: dict[Any, Sequence[tuple[Any, int]]] = {}
        self.kinds: dict[Any, type[LRPLayer] | None] = {}
        self.relevant: set[Any] = set()
        self.divisors: set[Any] = set()
        self.layers: dict[Any, Layer] = {}
        self.shared: set[Any] = set()
        self.merged: set[Any] = set()
        self.notes_of: dict[Any, Note] = {}
        self.uses_notes = self.has_reentrant_checkpoint = self.gives_to_zeros = self.reaches_zeros = False
        self._sources: set[Any] = set()
        self._above_layers: set[Any] = set()
        self._folds: dict[Any, Any] = {}
        self._is_accounted = is_accounted
        self._asks_for_paths = wanted is not None or is_accounted or rules.asks_for_paths

    def explore(self, outputs: Iterable[Tensor], sources: Iterable[Any] = ()) -> None:
        """Finds all of the above.

        Args:
            outputs: of the model, with their graph.
            sources: the nodes of the tensors to explain.
        """
        order, all_ways, kinds, relevant = self.order, self.ways, self.kinds, self.relevant
        divisors, above_layers, calls, gates = self.divisors, self._above_layers, self.notes.calls, self.notes.gates
        self._sources = set(sources)
        ahead = [edge[0] for out in outputs if (edge := edge_of(out)) is not None]
        read, done = set(ahead), dict[Any, None]()
        while ahead:  # depth first
            node = ahead.pop()
            if node in done:
                continue
            if node not in all_ways:
                ways = all_ways[node] = node.next_functions
                if not ways or node in self._sources:  # nothing that matters lies below it
                    done[node] = None
                    if node in self._sources:
                        relevant.add(node)
                        order.append(node)
                    continue
                ahead.append(node)
                kind = kinds[node] = layer_of_kind(node.name())
                for lower in self._operands(node, kind, ways, calls.pop(node, None) if calls else None):
                    if lower in read:
                        self.shared.add(lower)
                    read.add(lower)
                    if lower not in all_ways:
                        ahead.append(lower)
                continue
            done[node] = None
            kind, ways = kinds[node], all_ways[node]
            if kind is not None and kind.is_affine and self._find_layer(node, kind, ways):
                above_layers.add(node)
            else:
                lowers = [below for below, _ in ways if below in relevant]
                if not lowers:
                    if divisors and any(below in divisors for below, _ in ways):
                        divisors.add(node)
                        order.append(node)
                    continue
                if node in gates:
                    continue
                if kind is not None and kind.may_divide and makes_a_divisor(node, relevant):
                    divisors.add(node)
                    order.append(node)
                    continue
                if len(lowers) == 1 and node.name() in ("AddBackward0", "SubBackward0"):
                    join_bias(self, node, lowers[0])
                if not above_layers.isdisjoint(lowers):
                    above_layers.add(node)
            relevant.add(node)
            order.append(node)
        above_layers.clear()  # or its nodes would live on
        if isinstance(self.notes, Trace):
            self.notes.learn(list(done))

    def _operands(self, node: Any, kind: Any, ways: Sequence[tuple[Any, int]], note: Note | None) -> list[Any]:
        """The nodes below `node` that may depend on the input: not weights and biases that are leaves."""
        if kind is None:
            self.has_reentrant_checkpoint |= node.name() == "CheckpointFunctionBackward"
        elif kind.is_affine:
            if note is not None:
                self.notes_of[node] = note
                is_leaf_weight = note.weight is not None and note.weight.grad_fn is None
                self.uses_notes |= not is_leaf_weight
                if note.weight is not None and (is_leaf_weight or self.wanted is not None):
                    ways = ways[kind.first : kind.first + 1]
            return [
                below
                for place, (below, _) in enumerate(ways)
                if below is not None and (place == kind.first or below in self._sources or not is_leaf(below))
            ]
        elif kind.is_view:
            if node.name() in FOLDS:
                self._folds[ways[0][0]] = node
            if note is not None:
                self.notes.calls[ways[0][0]] = note  # as a linear layer on more than two dimensions ends
        elif note is not None:
            self.notes_of[node] = note
        return [below for below, _ in ways if below is not None]

    def _find_layer(self, node: Any, kind: Any, ways: Sequence[tuple[Any, int]]) -> bool:
        """Whether relevance may come to the product, which is a layer if it does not come to one of its factors."""
        first, second = ways[kind.first][0] in self.relevant, ways[kind.first + 1][0] in self.relevant
        if first and second:
            return True
        other = ways[kind.first + first]
        if (first or second) and other[0] is None and self.is_input(other, lambda: kind.operand(node, int(first))):
            return True
        note, wanted, place = self.notes_of.pop(node, None), False, int(second)
        path: str | None = ""
        if self._asks_for_paths and (first or second or self.wanted is not None):
            path, place = self._path_of(kind, ways, note, first, second)
            if self.wanted is not None and path is not None:
                wanted = self.wanted(path, kind.public)
                if wanted and not (first or second) and self._is_constant(node, kind, place):
                    wanted = False  # of parameters alone, as a weight is computed from them
        if not (first or second or wanted):
            return kind.first == 1 and ways[0][0] in self.relevant
        is_first = ways[kind.first + place][0] not in self._above_layers
        module = self.paths.module_at(path or "") if self.rules.asks_for_paths else None
        rule = self.rules.of(path or "", module, kind.public is ConvolutionalLRP, is_first)
        if rule.absolute:
            self.reaches_zeros = True
            self.gives_to_zeros |= not is_first
        layer = self.layers[node] = Layer(node, kind, path or "", place, note, wanted, rule)
        layer.reads = bool(wanted or rule.stabiliser or rule.asks_for_sums or self._is_accounted)
        return True

    def _path_of(
        self, kind: type[AffineLRP], ways: Sequence[tuple[Any, int]], note: Note | None, first: bool, second: bool
    ) -> tuple[str | None, int]:
        """The path of a layer, and which factor of its product the input is."""
        place, weight = int(second), None if note is None else note.weight
        path = None if second or weight is None else self.paths.of(self.notes.original(weight))
        if path is None:
            path = self.paths.below(ways[kind.first + 1 - place][0], self.notes.original)
        if path is None and not (first or second) and kind.public is LinearLRP:  # ``W^T a^T``
            place, path = 1, self.paths.below(ways[kind.first][0], self.notes.original)
        if path is None and note is not None and weight is not None:  # made of several parameters
            path = (self.paths.of(self.notes.original(note.bias)) or "").removesuffix(".bias")
        return path, place

    def _is_constant(self, node: Any, kind: Any, place: int) -> bool:
        """Whether a factor of a product is known not to depend on the input: made of a parameter alone, or a buffer."""
        (below, _) = edge = self.ways[node][kind.first + place]
        if below is not None:
            return self.paths.below(below, self.notes.original, alone=True) is not None
        if self.notes.packs or (a := kind.operand(node, place)) is None or self.is_input(edge, lambda: a):
            return False
        return shares_memory(a, self.paths.buffers())

    def is_input(self, edge: Any, operand: Callable[[], Tensor | None]) -> bool:
        """Whether an operand at `edge` is what the model was given: in training, that may ask for no gradient."""
        if edge[0] is not None or not self.notes.given or self.notes.packs:  # what is packed can be looked at once
            return False
        return (found := operand()) is not None and shares_memory(found, self.notes.given)

    def makers(self, outputs: Iterable[Tensor]) -> set[Any]:
        """The affine layers that make an output: it reaches them without passing another one."""
        found, seen = set[Any](), {None}
        ahead: list[Any] = [out.grad_fn for out in outputs]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.layers:
                found.add(node)
            else:
                ahead.extend(below for below, _ in node.next_functions)
        return found
