"""What the graph tells of parameters: their values after they were moved about, and which are biases added by hand."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from athena.propagation.affine import LinearLRP
from athena.propagation.layer import known, layer_of_kind, number_of_outputs

if TYPE_CHECKING:
    from athena.propagation.graph import Graph

__all__ = ["FOLDS", "edge_of", "is_leaf", "join_bias", "value_of"]

SELECTIONS = tuple(f"{name}Backward0" for name in ("Split", "SplitWithSizes", "Select", "Slice", "Unbind"))
REPETITIONS = ("ExpandBackward0", "RepeatBackward0", "NegBackward0")
FOLDS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
"""What only folds dimensions together or apart."""


def edge_of(out: Tensor) -> tuple[Any, int] | None:
    """The place of an output in the graph; a model may return what it was given as it is."""
    if out.grad_fn is not None:
        return out.grad_fn, out.output_nr
    return (get_gradient_edge(out).node, 0) if out.requires_grad else None


def value_of(edge: Any) -> Tensor | None:
    """The value of a parameter, or of one that is given another shape, cast, split, repeated or negated; else None."""
    node, number = edge
    if node is None:
        return None
    leaf: Tensor | None = getattr(node, "variable", None)
    if leaf is not None:
        return known(leaf)
    name = node.name()
    if not is_view(node) and name not in (*SELECTIONS, *REPETITIONS):
        return None
    below = value_of(node.next_functions[0])
    if below is None or name == "ToCopyBackward0":
        return below
    if name == "NegBackward0":
        return -below
    shape = torch.Size(node._input_metadata[number].shape)
    if name == "ExpandBackward0":
        return below.expand(shape)
    if name == "RepeatBackward0":
        return below.repeat(node._saved_repeats)
    # The way back tells for each element below which one of the output it is, from 1 on.
    places = torch.arange(1, shape.numel() + 1, dtype=torch.float64, device=below.device).view(shape)
    found = node(*(places if other == number else None for other in range(number_of_outputs(node)))).long()
    value, chosen = below.new_empty(shape.numel()), found > 0
    value[found[chosen] - 1] = below[chosen]
    return value.view(shape)


def is_view(node: Any) -> bool:
    """Whether a graph node only gives its operand another shape."""
    kind = layer_of_kind(node.name())
    return kind is not None and kind.is_view


def is_leaf(node: Any) -> bool:
    """Whether a graph node is that of a parameter, also of one that is transposed."""
    if node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return hasattr(node, "variable")


def join_bias(graph: "Graph", node: Any, below: Any) -> None:
    """Makes a parameter that is added to a product the bias of the layer that both are, as in ``a @ W + b``."""
    (edge,) = (way for way in node.next_functions if way[0] is not below)
    while below.name() in FOLDS and below not in graph.shared:
        below = below.next_functions[0][0]
    layer = graph.layers.get(below)
    if layer is None or layer.kind.public is not LinearLRP or below in graph.shared or layer.bias is not None:
        return
    subtracts = node.name() == "SubBackward0"
    if layer.kind.first == 1 or node._saved_alpha != 1 or (subtracts and edge == node.next_functions[0]):
        return
    bias = value_of(edge)
    if bias is None or bias.dim() == 0 or bias.shape[-1] != below._input_metadata[0].shape[-1]:
        return
    if all(size == 1 or step == 0 for size, step in zip(bias.shape[:-1], bias.stride(), strict=False)):
        bias = bias[(0,) * (bias.dim() - 1)]
        while edge[0].name() in ("NegBackward0", "ExpandBackward0") or is_view(edge[0]):
            edge = edge[0].next_functions[0]  # where its relevance goes: neither sign nor shape matters to it
        layer.bias, layer.top, layer.bias_edge = -bias if subtracts else bias, node, edge
        graph.merged.add(node)
