"""The relevance of a model's parameters: what each weight contributed, and what each bias kept.

A weight ``w`` of an affine layer gets the contributions that pass through it, ``w a^T s``, summed over the batch and
over all places where it is used. Any other operation treats its parameters alike, with its ``d``: a norm's weight, an
embedding of positions that is added, a class token. Where a weight is computed from parameters, as by weight norm, each
of these gets itself times the gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from athena.propagation.layer import gradients, layer_of_kind, nonzero, number_of_outputs
from athena.propagation.passing import SelectionLRP

if TYPE_CHECKING:
    from athena.propagation.affine import Layer
    from athena.propagation.walk import Walk

__all__ = ["ParameterRelevance", "Term", "asking_for_gradients"]

Term = tuple[Tensor, Tensor, Tensor]
"""Inputs, weights and ``s`` of one of the sums of a rule."""


class ParameterRelevance:
    """What is found while relevance comes down.

    Args:
        model: whose parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._named.items()}
        self._found: dict[str, Tensor] = {}

    @property
    def found(self) -> dict[str, Tensor]:
        """The relevance of each parameter that some came to, in its shape, in the order of `named_parameters`."""
        return {name: self._found[name] for name in self._named if name in self._found}

    def of_layer(self, layer: "Layer", terms: Sequence[Term], constant: Tensor | None, kept: Sequence[Tensor]) -> None:
        """Adds what an affine layer has shared out.

        Args:
            layer: the layer.
            terms: those of its rule.
            constant: the bias as it is added to the output, or None.
            kept: what it kept, in the shape of the output, one for each sum.
        """
        kind, node = layer.kind, layer.node
        shares = [_share(layer, *term) for term in terms]
        weight = node.next_functions[kind.first + 1 - layer.place]
        self._send(weight, sum(shares[1:], shares[0]), layer.w)
        edge = layer.bias_edge or kind.bias_edge(node)
        if constant is not None and edge is not None and edge[0] is not None:
            parts = [part.sum_to_size(constant.shape) for part in kept]
            self._send(edge, sum(parts, torch.zeros_like(constant)), constant)

    def of_operation(self, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> None:
        """Adds what the constant operands of an operation that is no affine layer have kept."""
        ways = node.next_functions
        constant = [
            place
            for place, (below, _) in enumerate(ways)
            if below is not None and below not in walk.relevant and below not in walk.divisors
        ]
        kind = layer_of_kind(node.name())
        if not constant or node in walk.merged or kind is None or kind.is_affine:
            return
        downs = gradients(node, given)
        for place in constant:
            is_divisor = place == 1 and node.name() == "DivBackward0"
            if (down := downs[place]) is not None and not is_divisor:
                shape = ways[place][0]._input_metadata[ways[place][1]].shape
                self._send_gradient(ways[place], down.sum_to_size(shape))

    def _send(self, edge: Any, relevance: Tensor, value: Tensor) -> None:
        """Has relevance come to `value`, which stands at `edge` of the graph."""
        if not _is_moved(edge):
            return self._send_gradient(edge, relevance / nonzero(value))
        node, number = edge
        relevance = relevance.reshape(node._input_metadata[number].shape)
        while getattr(node, "variable", None) is None:
            given: list[Tensor | None] = [None] * number_of_outputs(node)
            given[number] = relevance
            down = node(*given)
            relevance = down[0] if isinstance(down, tuple) else down
            node, number = node.next_functions[0]
        self._add(node.variable, relevance)
        return None

    def _send_gradient(self, edge: Any, gradient: Tensor) -> None:
        """Each parameter that lies below `edge` gets itself times its gradient."""
        node, number = edge
        if (leaf := getattr(node, "variable", None)) is not None:
            return self._add(leaf, leaf.detach() * gradient.reshape(leaf.shape))
        parameters = [parameter for parameter in self._named.values() if parameter.requires_grad]
        gradient = gradient.reshape(node._input_metadata[number].shape)
        gradients = torch.autograd.grad(
            (GradientEdge(node, number),), parameters, (gradient,), retain_graph=True, allow_unused=True
        )
        for parameter, its in zip(parameters, gradients, strict=True):
            if its is not None:
                self._add(parameter, parameter.detach() * its)
        return None

    def _add(self, parameter: Tensor, relevance: Tensor) -> None:
        if (name := self._names.get(id(parameter))) is not None:
            before = self._found.get(name)
            self._found[name] = relevance if before is None else before + relevance


def _share(layer: "Layer", x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """``w x^T s``."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        z = layer.kind.apply(layer, x.detach(), w)
    (gradient,) = torch.autograd.grad(z, w, s.reshape(z.shape))
    return w.detach() * gradient


def _is_moved(edge: Any) -> bool:
    """Whether a parameter stands at `edge` as it is, but for its shape, its dtype, or as a part."""
    node = edge[0]
    while getattr(node, "variable", None) is None:
        kind = None if node is None else layer_of_kind(node.name())
        if kind is None or not (kind.is_view or issubclass(kind, SelectionLRP)) or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return True


@contextmanager
def asking_for_gradients(model: nn.Module) -> Iterator[None]:
    """For the time of the block, frozen parameters ask for gradients, so that the graph holds them."""
    frozen = [
        parameter
        for parameter in model.parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_inference()
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
