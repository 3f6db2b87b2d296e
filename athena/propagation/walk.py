"""The walk down the graph of a forward pass, by which relevance is found.

After the model's own forward pass, `Walk` goes through the graph that autograd has recorded, from the output down. At
each node the LRP layer for its kind (`athena.propagation.layer`) says what ``d`` becomes below it, by calling the node
itself wherever relevance goes as the gradient does. Where the graph serves one explanation alone, nodes are let go of
as the walk passes them, and with them what autograd has saved there. Not here: where relevance starts
(`athena.propagation.target`), and what is done with it (`athena.lrp`, `athena.Guidance`).
"""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from athena.propagation.account import Account
from athena.propagation.affine import AffineLRP, ConvolutionalLRP, Layer, LinearLRP
from athena.propagation.euler import EulerLRP
from athena.propagation.layer import LRPLayer, UnsupportedLayer, known, layer_of_kind, number_of_outputs, shares_memory
from athena.propagation.notes import Note, Notes
from athena.propagation.operations import Operation
from athena.propagation.paths import Paths
from athena.propagation.products import makes_a_divisor
from athena.propagation.through import Through
from athena.propagation.trace import Trace
from athena.propagation.values import FOLDS, edge_of, is_leaf, join_bias, value_of
from athena.rules import RuleChoice

__all__ = ["NotesNeeded", "Refusal", "Walk", "within_backward"]

Wanted = Callable[[str, type[AffineLRP]], bool]


class Refusal(UnsupportedLayer):
    """Relevance cannot pass a node of the graph.

    Attributes:
        sentence: which, with the module that made it, where the forward pass was traced.
    """

    def __init__(self, node: Any, notes: Notes, what: str = "") -> None:
        if isinstance(notes, Trace):
            self.sentence = notes.explained(node, what)
        else:
            self.sentence = f"the model uses {what or node.name()}, and LRP has no rule to pass relevance through it"
        super().__init__(self.sentence)


class NotesNeeded(Exception):
    """The graph does not tell what relevance needs to know, and it was not noted down.

    Attributes:
        zeros: whether inputs of activations that are 0 are what is missing.
        operations: whether the operations themselves are.
    """

    def __init__(self, zeros: bool = False, operations: bool = False) -> None:
        super().__init__()
        self.zeros, self.operations = zeros, operations


class Walk:
    """One relevance pass.

    Args:
        notes: of the forward pass.
        paths: of the model.
        rules: which rule each affine layer gets.
        wanted: in training, whether an affine layer is guided, by its path and LRP layer. None where it is the input
            that is explained.
        take: is called with each layer wanted and its relevance, from the top down.
        account: records what each operation holds and absorbs, or None.
        is_complete: whether notes were taken, or cannot be; else `NotesNeeded` is raised if any are missed.
        unknown: what becomes of relevance at an operation that no rule fits, ``"refuse"`` or ``"gradient"``.
        through: where relevance is let through at some channels alone, or None.

    Attributes:
        relevant: nodes that relevance may come to: they depend on the input, or in training on a guided layer.
        divisors: nodes that only divide, such as reciprocals; though they depend on the input, they get no relevance.
        layers: the affine layers that relevance has not reached yet, by node.
        shared: nodes whose output more than one operation reads.
        values: outputs of nodes that an operation above has saved, until they are used.
        rectified: outputs of ReLUs that serve as the outputs of the nodes below them, until they are used.
        scores: inputs of softmax, up to a constant, for the account.
        exponentials: those that are divided by their sums, with the sum of the relevance that came to the quotients,
            and that of its magnitudes.
        merged: additions of a bias that are part of the layer below them.
        uses_notes: whether notes were used, or would have saved a computation.
        tries: whether an operation had to be tried.
        has_reentrant_checkpoint: whether a part of the forward pass is hidden in a checkpoint.
        merges: whether batch norm in eval mode is merged into the layer below it.
        zeros: whether neurons that are 0 may have relevance.
        gives_to_zeros: whether a layer that stands on others has a rule that gives them relevance.
        reaches_zeros: whether any layer has such a rule.
        gates: one of `athena.propagation.products.GATES`.
    """

    gates = "half"

    def __init__(
        self,
        notes: Notes,
        paths: Paths,
        rules: RuleChoice,
        wanted: Wanted | None = None,
        take: Callable[[Layer, Tensor], None] = lambda layer, relevance: None,
        account: Account | None = None,
        is_complete: bool = True,
        unknown: str = "refuse",
        through: Through | None = None,
    ) -> None:
        self.notes, self.paths, self.rules, self.wanted, self.take = notes, paths, rules, wanted, take
        self.account, self.merges, self.zeros = account, wanted is None, notes.zeros
        self.unknown, self.tries, self.through = unknown, False, through
        self.gives_to_zeros = self.reaches_zeros = False
        self.relevant: set[Any] = set()
        self.divisors: set[Any] = set()
        self.layers: dict[Any, Layer] = {}
        self.shared: set[Any] = set()
        self.merged: set[Any] = set()
        self.values: dict[Any, Tensor] = {}
        self.rectified: dict[Any, Tensor] = {}
        self.scores: dict[Any, Tensor] = {}
        self.exponentials: dict[Any, tuple[float, float]] = {}
        self.notes_of: dict[Any, Note] = {}
        self.order: list[Any] = []
        self._ds: dict[Any, Tensor] = {}
        self.uses_notes = self.has_reentrant_checkpoint = False
        self._views: dict[Any, Any] = {}
        self._kinds: dict[Any, type[LRPLayer] | None] = {}
        self._is_complete = is_complete
        self._rule_asks_for_paths = rules.asks_for_paths
        self._asks_for_paths = wanted is not None or account is not None or self._rule_asks_for_paths

    # Before relevance comes down

    def explore(self, outputs: Iterable[Tensor], sources: Iterable[Any] = ()) -> None:
        """Finds the order of the nodes, the affine layers, and the nodes that relevance may come to.

        Args:
            outputs: of the model, with their graph.
            sources: the nodes of the tensors to explain.
        """
        calls, order, kinds, relevant, divisors = (
            self.notes.calls,
            self.order,
            self._kinds,
            self.relevant,
            self.divisors,
        )
        self._sources, gates = (goals := set(sources)), self.notes.gates
        ahead = [edge[0] for out in outputs if (edge := edge_of(out)) is not None]
        entered, done, read = set[Any](), set[Any]((None,)), set[Any]()
        below_layer = self._above_layers = set[Any]()
        while ahead:  # depth first: in `order` each node comes after all that lie below it
            node = ahead.pop()
            if node in done:
                continue
            if node not in entered:
                entered.add(node)
                ahead.append(node)
                kind = kinds[node] = layer_of_kind(node.name())
                note = calls.pop(node, None) if calls else None
                for lower in self._operands(node, kind, note):
                    if lower in read:
                        self.shared.add(lower)
                    read.add(lower)
                    if lower not in entered:
                        ahead.append(lower)
                continue
            done.add(node)
            order.append(node)
            kind = kinds[node]
            if node in goals:
                relevant.add(node)
                continue
            if kind is not None and kind.is_affine and self._find_layer(node, kind):
                relevant.add(node)
                below_layer.add(node)
                continue
            lower_relevant = [below for below, _ in node.next_functions if below in relevant]
            if lower_relevant:
                if node in gates:
                    continue
                if kind is not None and kind.may_divide and makes_a_divisor(node, relevant):
                    divisors.add(node)
                    continue
                relevant.add(node)
                if len(lower_relevant) == 1 and node.name() in ("AddBackward0", "SubBackward0"):
                    join_bias(self, node, lower_relevant[0])
                if not below_layer.isdisjoint(lower_relevant):
                    below_layer.add(node)
            elif divisors and any(below in divisors for below, _ in node.next_functions):
                divisors.add(node)
        del self._above_layers
        if isinstance(self.notes, Trace):
            self.notes.learn(order)

    def _operands(self, node: Any, kind: Any, note: Note | None) -> list[Any]:
        """The nodes below `node` that may depend on the input: not weights and biases that are leaves."""
        ways = node.next_functions
        if kind is None:
            self.has_reentrant_checkpoint |= node.name() == "CheckpointFunctionBackward"
        elif kind.is_affine:
            if note is not None:
                self.notes_of[node] = note
                is_leaf_weight = note.weight is not None and note.weight.grad_fn is None
                self.uses_notes |= not is_leaf_weight
                if note.weight is not None and (is_leaf_weight or self.wanted is not None):
                    return [] if (lower := ways[kind.first][0]) is None else [lower]
            lowers = []
            for lower, _ in ways:
                if lower is not None and (lower in self._sources or not is_leaf(lower)):
                    lowers.append(lower)
            return lowers
        elif kind.is_view:
            if node.name() in FOLDS:
                self._views[ways[0][0]] = node
            if note is not None:
                self.notes.calls[ways[0][0]] = note  # as a linear layer on more than two dimensions ends
        elif note is not None:
            self.notes_of[node] = note
        return [lower for lower, _ in ways if lower is not None]

    def _find_layer(self, node: Any, kind: Any) -> bool:
        """Whether relevance may come to the product, which is a layer if it does not come to one of its factors."""
        relevant, ways = self.relevant, node.next_functions
        first, second = ways[kind.first][0] in relevant, ways[kind.first + 1][0] in relevant
        if first and second:
            return True
        other = ways[kind.first + first]
        if (first or second) and other[0] is None and self.is_input(other, lambda: kind.operand(node, int(first))):
            return True
        note, path, place = self.notes_of.pop(node, None), None, 1 if second else 0
        wanted = False
        if self._asks_for_paths or not (first or second):
            if note is not None and note.weight is not None and not second:
                path = self.paths.of(self.notes.original(note.weight))
            if path is None:
                path = self._path_below(ways[kind.first + 1 - place][0])
            if path is None and not (first or second) and kind.public is LinearLRP:  # ``W^T a^T``
                place, path = 1, self._path_below(ways[kind.first][0])
            if path is None and note is not None and note.weight is not None:  # made of several parameters
                path = (self.paths.of(self.notes.original(note.bias)) or "").removesuffix(".bias")
            if self.wanted is not None and path is not None:
                wanted = self.wanted(path, kind.public)
                if wanted and not (first or second) and self._is_constant(node, kind, place):
                    wanted = False  # of parameters alone, as a weight is computed from them
        if not (first or second or wanted):
            return kind.first == 1 and ways[0][0] in relevant
        is_first = ways[kind.first + place][0] not in self._above_layers
        module = self.paths.module_at(path or "") if self._rule_asks_for_paths else None
        rule = self.rules.of(path or "", module, kind.public is ConvolutionalLRP, is_first)
        if rule.absolute:
            self.reaches_zeros = True
            self.gives_to_zeros |= not is_first
        layer = self.layers[node] = Layer(node, kind, path or "", place, note, wanted, rule)
        layer.reads = bool(wanted or rule.stabiliser or rule.asks_for_sums or self.account is not None)
        return True

    def _path_below(self, node: Any) -> str | None:
        """The path of the layer whose parameters alone a factor depends on."""
        if node is None:
            return None
        leaf = node.next_functions[0][0] if node.name() == "TBackward0" else node
        parameter = getattr(leaf, "variable", None)
        if parameter is not None:
            return self.paths.of(self.notes.original(parameter))
        return self.paths.below(node, self.notes.original)

    def _is_constant(self, node: Any, kind: Any, place: int) -> bool:
        """Whether a factor of a product is known not to depend on the input: made of a parameter alone, or a buffer."""
        (below, _) = edge = node.next_functions[kind.first + place]
        if below is not None:
            return self.paths.below(below, self.notes.original, alone=True) is not None
        if self.notes.packs or (a := kind.operand(node, place)) is None or self.is_input(edge, lambda: a):
            return False
        return shares_memory(a, self.paths.buffers())

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

    # Relevance comes down

    def run(self, starts: list[tuple[Tensor, Tensor]]) -> dict[Any, Tensor]:
        """Sends relevance down, with gradients off unless the relevance itself is to have a graph.

        Args:
            starts: outputs of the model, each with its ``d``, in its shape. They are let go of.

        Returns:
            The ``d`` of each source that relevance came to.

        Raises:
            Refusal: it came to an operation that it cannot pass.
        """
        order, relevant, divisors, kinds = self.order, self.relevant, self.divisors, self._kinds
        found: dict[Any, Tensor] = {}
        ds, account, through, lets_go = self._ds, self.account, self.through, self.wanted is None
        while starts:
            self._begin(*starts.pop())
        d: Tensor | None
        while order:
            node = order.pop()
            kind, is_source = kinds.pop(node) or EulerLRP, node in self._sources
            if through is not None and node in through:
                through.cut(self, node, ds)
            d = ds.pop((node, 0), None)
            if node not in relevant:
                if d is not None and node in divisors:
                    self.refuse(node)
            elif is_source:
                if d is not None:
                    found[node] = d
            else:
                given = [d]
                if kind.has_many_outputs:
                    given += [ds.pop((node, number), None) for number in range(1, number_of_outputs(node))]
                if d is not None or any(part is not None for part in given):
                    if divisors and not kind.divides:
                        for below, _ in node.next_functions:
                            if below in divisors:
                                self.refuse(below)
                    try:
                        downs = kind.down(self, node, given)
                    except Refusal:
                        raise
                    except UnsupportedLayer as error:
                        self.require_notes()
                        raise Refusal(node, self.notes, str(error)) from None
                    if account is not None:
                        account.passed(self, node, given, downs)
                    for way, down in zip(node.next_functions, downs, strict=False):
                        if down is not None and way[0] in relevant:
                            if kind.broadcasts and down.shape != (shape := way[0]._input_metadata[way[1]].shape):
                                down = down.sum_to_size(shape)
                            ds[way] = ds[way] + down if way in ds else down
                    downs = down = None  # type: ignore[assignment]
            if lets_go:  # with the last reference to a node goes what it has saved; those above have been passed
                relevant.discard(node)
                for noted in (self.values, self.notes_of, self._views, self.layers):
                    if noted:
                        noted.pop(node, None)
        return found

    def _begin(self, out: Tensor, d: Tensor) -> None:
        """Has `d` start at an output of the model."""
        if (edge := edge_of(out)) is not None:
            self.send(edge, d)
            if edge[1] == 0 and edge[0] in self.layers:
                self.layers[edge[0]].z = known(out)

    def send(self, way: Any, d: Tensor) -> None:
        """Has `d` come to an output of a graph node, given as (node, number)."""
        ds = self._ds
        ds[way] = ds[way] + d if way in ds else d

    # What an LRP layer may ask

    def is_input(self, edge: Any, operand: Callable[[], Tensor | None]) -> bool:
        """Whether an operand at `edge` is what the model was given: in training, that may ask for no gradient."""
        if edge[0] is not None or not self.notes.given or self.notes.packs:  # what is packed can be looked at once
            return False
        return (found := operand()) is not None and shares_memory(found, self.notes.given)

    def shape_of(self, layer: Layer) -> torch.Size:
        """The shape of a layer's output as the model sees it, (batch, ...); the node may have folded it."""
        node = layer.node
        if layer.kind.public is LinearLRP and node not in self.shared:
            node = self._views.get(node, node)
        return torch.Size(node._input_metadata[0].shape)

    def shape_by_samples(self, layer: Layer) -> torch.Size:
        """`shape_of`, for what treats each sample by itself.

        Raises:
            UnsupportedLayer: the layer is a part of attention, where tokens come first.
        """
        if isinstance(self.paths.module_at(layer.path.rpartition(".")[0]), nn.MultiheadAttention):
            raise UnsupportedLayer(
                f"{layer.path!r} is a part of nn.MultiheadAttention, within which tokens come first and samples second:"
                " normalise, granularity and signal would take one for the other. Leave them at None, 'sample' and "
                "None, or leave attention out of the scope"
            )
        return self.shape_of(layer)

    def require_notes(self) -> None:
        """Raises where notes are missed that could have been taken."""
        if not self._is_complete:
            raise NotesNeeded

    def operation(self, node: Any) -> Operation | None:
        """What has made a graph node, so that it can be tried; None where it is not known."""
        self.tries = True
        if self.notes.operations is None and self.wanted is None:
            raise NotesNeeded(operations=True)
        return None if self.notes.operations is None else self.notes.operations.of(node)

    def refuse(self, node: Any) -> NoReturn:
        """Raises where relevance came to a node that cannot pass it."""
        self.require_notes()
        below = node
        while below in self.divisors and not makes_a_divisor(below, self.relevant):
            below = next(way[0] for way in below.next_functions if way[0] in self.divisors)
        raise Refusal(below, self.notes)

    def reads_value(self, node: Any) -> bool:
        """Whether the output of `node`, or of one that it only gives another shape, is of use."""
        if node in self.layers:
            return True
        kind = self._kinds.get(node)
        return kind is not None and kind.is_view and node not in self.shared

    def remember_input(self, node: Any, x: Tensor) -> None:
        """Takes note that the first operand of `node` is `x`."""
        below, number = node.next_functions[0]
        if number == 0 and self.reads_value(below):
            self.values[below] = x

    def input(self, node: Any) -> Tensor | None:
        """The input of an activation, if there is a way to tell."""
        note = self.notes_of.pop(node, None)
        if note is not None and note.a is not None:
            self.uses_notes = True
            return note.a
        name = node.name()
        if name in INVERSES:
            if name != "SqrtBackward0":
                self.uses_notes = True
                layer = self.layers.get(node.next_functions[0][0])
                if layer is not None and layer.node not in self.shared:
                    layer.z = layer.kind.output(self, layer)
                    return layer.z
                self.require_notes()
            return INVERSES[name](node._saved_result)
        saved = getattr(node, "_saved_self", None)
        return known(saved) if isinstance(saved, Tensor) else None

    def output(self, node: Any) -> Tensor | None:
        """The output of an operation, as far as it was noted."""
        saved, note = getattr(node, "_saved_result", None), self.notes_of.get(node)
        if isinstance(saved, Tensor):
            return saved
        return self.notes.outputs_of(node) if note is None else note.output()

    def constant(self, edge: Any, like: Tensor) -> Tensor | None:
        """The value of a parameter, or of what a cast, a split and the like make of one; None where there is none.

        Raises:
            UnsupportedLayer: it is computed in another way.
        """
        if edge is None or edge[0] is None:
            return None
        value = value_of(edge)
        if value is None:
            self.require_notes()
            raise UnsupportedLayer(
                f"a weight or a bias that is made by {edge[0].name()}, of which LRP cannot tell the value"
            )
        return value.to(like.dtype)


INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "SigmoidBackward0": torch.logit,
    "TanhBackward0": torch.atanh,
    "SqrtBackward0": torch.square,
}
"""By the node of an activation that is remembered by its output: from that to its input."""


def within_backward(walk: Walk, starts: list[tuple[Tensor, Tensor]]) -> dict[Any, Tensor]:
    """``walk.run(starts)`` within a backward pass of autograd, in which a checkpoint is computed again only once."""
    found: dict[Any, Tensor] = {}

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, nothing: Tensor) -> Tensor:
            return nothing.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            found.update(walk.run(starts))
            return gradient

    with torch.enable_grad():
        nothing = torch.zeros((), requires_grad=True)
        torch.autograd.grad(Within.apply(nothing), nothing)
    return found
