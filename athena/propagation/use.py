"""An affine layer where it was used: what the walk knows of it, until relevance has passed it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from athena.propagation.layer import UnsupportedLayer, known
from athena.propagation.notes import Note
from athena.rules import Rule

if TYPE_CHECKING:
    from athena.propagation.affine import AffineLRP
    from athena.propagation.walk import Walk

__all__ = ["Layer"]


class Layer:
    """An affine layer ``z = W a + b`` where it was used in the forward pass.

    Attributes:
        node: the graph node of its output.
        kind: the LRP layer.
        path: the module path that its weight belongs to; empty where that is no parameter.
        place: which operand of the node the input ``a`` is, by ``node.next_functions``.
        note: what was noted of the call, or None.
        wanted: whether its relevance is asked for, as it is in training where it is guided.
        rule: its rule.
        z: its output, where that is known already.
        rectified: whether that is the output of the ReLU above, its only reader: where they differ, relevance is 0.
        scale, shift: those of a batch norm that is merged into it, ``z -> scale z + shift`` for each channel, or None.
        bias: another constant that is added to its output.
        top: the graph node that adds it.
        bias_edge: where in the graph the constant comes from that bears the relevance kept by all constants, where
            that is not the bias of the node itself.
        reads: whether its rule, or anybody else, looks at its output.
        passes, finished: whether a batch norm above it has done its work already, but for the gradient, or all of it.
    """

    bias: Tensor | None = None
    top: Any = None
    bias_edge: Any = None
    z: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    reads = True
    rectified = passes = finished = False
    _a: Tensor | None = None
    _w: Tensor | None = None

    def __init__(
        self, node: Any, kind: "type[AffineLRP]", path: str, place: int, note: Note | None, wanted: bool, rule: Rule
    ) -> None:
        self.node, self.kind, self.path, self.place, self.note = node, kind, path, place, note
        self.wanted, self.rule = wanted, rule

    @property
    def a(self) -> Tensor:
        """The input, in the shape that the node multiplies.

        Raises:
            UnsupportedLayer: it was not kept.
        """
        if self._a is None:
            saved = self.kind.operand(self.node, self.place)
            if saved is None and self.note is not None and self.note.a is not None:
                saved = self.kind.folded(self.note.a)
            if saved is None:
                raise UnsupportedLayer(
                    f"the input of {self.path!r}, whose weight is frozen, was not kept; let the weight ask for "
                    "gradients"
                )
            self._a = known(saved)
        return self._a

    @property
    def w(self) -> Tensor:
        """The weight, as the node multiplies with it."""
        if self._w is None:
            self._w = known(self.kind.operand(self.node, 1 - self.place))
        return self._w

    def find_weight(self, walk: "Walk") -> None:
        """Looks for a weight that the node has not saved, as no gradient goes below it."""
        if self._w is not None:
            return
        saved = self.kind.operand(self.node, 1 - self.place)
        if saved is None and self.note is not None and self.note.weight is not None:
            saved = self.kind.turned(self.note.weight)
        elif saved is None:
            saved = walk.constant(self.node.next_functions[self.kind.first + 1 - self.place], self.a)
        assert saved is not None
        self._w = known(saved)

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the weight as the node multiplies with it; None where it asks for no gradient."""
        node, number = self.node.next_functions[self.kind.first + 1 - self.place]
        return None if node is None else tuple(node._input_metadata[number].shape)

    @property
    def divides(self) -> bool:
        """Whether its rule divides the relevance of its output by something else than the output."""
        return self.rule.stabiliser > 0 or self.rule.asks_for_sums

    def constant(self, walk: "Walk") -> Tensor | None:
        """The bias, in a shape that adds to ``z``, with what was merged into the layer."""
        bias, edge = self.bias, self.kind.bias_edge(self.node)
        if bias is None and (edge is None or edge[0] not in walk.relevant):
            bias = self.note.bias if self.note is not None else walk.constant(edge, self.w)
        constant = None if bias is None else self.kind.channels(self, known(bias))
        if self.scale is None or self.shift is None:
            return constant
        shift = self.kind.channels(self, self.shift)
        return shift if constant is None else constant * self.kind.channels(self, self.scale) + shift
