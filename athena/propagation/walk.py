"""The walk down the graph of a forward pass, by which relevance is found.

After the model's own forward pass, `Walk` goes through the graph that autograd has recorded, from the output down. At
each node the LRP layer for its kind (`athena.propagation.layer`) says what ``d`` becomes below it, by calling the node
itself wherever relevance goes as the gradient does. Where the graph serves one explanation alone, nodes are let go of
as the walk passes them, and with them what autograd has saved there. Not here: which nodes relevance may come to
(`athena.propagation.graph`), where it starts (`athena.propagation.target`), and what is done with it (`athena.lrp`,
`athena.Guidance`).
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from athena.propagation.account import Account
from athena.propagation.affine import Layer, LinearLRP
from athena.propagation.euler import EulerLRP
from athena.propagation.graph import Graph, Wanted
from athena.propagation.layer import UnsupportedLayer, known, number_of_outputs
from athena.propagation.notes import Notes
from athena.propagation.operations import Operation
from athena.propagation.paths import Paths
from athena.propagation.products import makes_a_divisor
from athena.propagation.through import Through
from athena.propagation.trace import Trace
from athena.propagation.values import edge_of, value_of
from athena.rules import RuleChoice

__all__ = ["NotesNeeded", "Refusal", "Walk", "within_backward"]


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


class Walk(Graph):
    """One relevance pass.

    Args:
        notes, paths, rules, wanted: as for `Graph`.
        take: is called with each layer wanted and its relevance, from the top down.
        account: records what each operation holds and absorbs, or None.
        is_complete: whether notes were taken, or cannot be; else `NotesNeeded` is raised if any are missed.
        unknown: what becomes of relevance at an operation that no rule fits, ``"refuse"`` or ``"gradient"``.
        through: where relevance is let through at some channels alone, or None.

    Attributes:
        values: outputs of nodes that an operation above has saved, until they are used.
        rectified: nodes for which that is the output of the ReLU above: where the two differ, relevance is 0.
        scores: inputs of softmax, up to a constant, for the account.
        exponentials: those that are divided by their sums, with the sum of the relevance that came to the quotients,
            and that of its magnitudes.
        tries: whether an operation had to be tried.
        merges: whether batch norm in eval mode is merged into the layer below it.
        zeros: whether neurons that are 0 may have relevance.
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
        super().__init__(notes, paths, rules, wanted, account is not None)
        self.take, self.account, self.unknown, self.through = take, account, unknown, through
        self.merges, self.zeros, self.tries = wanted is None, notes.zeros, False
        self.values: dict[Any, Tensor] = {}
        self.rectified: set[Any] = set()
        self.scores: dict[Any, Tensor] = {}
        self.exponentials: dict[Any, tuple[float, float]] = {}
        self._ds: dict[Any, Tensor] = {}
        self._is_complete = is_complete

    def run(self, starts: list[tuple[Tensor, Tensor]]) -> dict[Any, Tensor]:
        """Sends relevance down, with gradients off unless the relevance itself is to have a graph.

        Args:
            starts: outputs of the model, each with its ``d``, in its shape. They are let go of.

        Returns:
            The ``d`` of each source that relevance came to.

        Raises:
            Refusal: it came to an operation that it cannot pass.
        """
        order, relevant, divisors, ds, account = self.order, self.relevant, self.divisors, self._ds, self.account
        sources, lets_go = self._sources, self.wanted is None
        found: dict[Any, Tensor] = {}
        while starts:
            self._begin(*starts.pop())
        while order:
            node = order.pop()
            if self.through is not None and node in self.through:
                self.through.cut(self, node, ds)
            kind, ways = self.kinds.pop(node, None) or EulerLRP, self.ways.pop(node)
            d = ds.pop((node, 0), None)
            if node in sources:
                if d is not None:
                    found[node] = d
            elif node in divisors:
                if d is not None:
                    self.refuse(node)
            else:
                given = [d]
                if kind.has_many_outputs:
                    given += [ds.pop((node, number), None) for number in range(1, number_of_outputs(node))]
                if d is not None or any(part is not None for part in given):
                    if divisors and not kind.divides:
                        for below, _ in ways:
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
                    for way, down in zip(ways, downs, strict=False):
                        if down is not None and way[0] in relevant:
                            if kind.broadcasts and down.shape != (shape := way[0]._input_metadata[way[1]].shape):
                                down = down.sum_to_size(shape)
                            ds[way] = ds[way] + down if way in ds else down
                    downs = down = None  # type: ignore[assignment]
            if lets_go:
                self._let_go(node)
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

    def _let_go(self, node: Any) -> None:
        """With the last reference to a node goes what it has saved. Those above it have been passed."""
        for nodes in (self.relevant, self.shared, self.merged, self.rectified):
            if nodes:
                nodes.discard(node)
        for noted in (self.layers, self.values, self.notes_of, self._folds):
            if noted:
                noted.pop(node, None)

    # What an LRP layer may ask

    def shape_of(self, layer: Layer) -> torch.Size:
        """The shape of a layer's output as the model sees it, (batch, ...); the node may have folded it."""
        node = layer.node
        if layer.kind.public is LinearLRP and node not in self.shared:
            node = self._folds.get(node, node)
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

    def reads_output(self, node: Any) -> bool:
        """Whether what `node` gave is of use: to a layer, or to one that it hands it on to."""
        layer = self.layers.get(node)
        if layer is not None:
            return layer.reads
        kind = self.kinds.get(node)
        return kind is not None and kind.hands_on_output and node not in self.shared

    def remember(self, edge: Any, z: Tensor, rectified: bool = False) -> None:
        """Takes note that the operation at `edge` gave `z`, or that this is what the ReLU above made of it."""
        node, number = edge
        if number == 0 and self.reads_output(node) and not (rectified and node in self.shared):
            self.values[node] = z
            if rectified:
                self.rectified.add(node)

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
