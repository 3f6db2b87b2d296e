"""Relevance down a chain of linear layers, with nothing between them but what passes relevance on, as a ReLU does.

Going down a chain is one product for each layer, and a second run of autograd's engine costs a small network as much.
Where all that is guided stands in a chain of modules that are known, the graph of the forward pass tells the chain by
itself (`read`), and nobody has to watch the pass. Not here: any other network (`athena.interception`), and where
relevance starts (`athena.relevance`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from athena.interception import LRPLayer, Paths, packs_what_it_saves
from athena.layers import ConvolutionalLRP, LinearLRP
from athena.rules import Rule

__all__ = ["Link", "is_plain", "read", "relevances"]


class Link(NamedTuple):
    """A linear layer of a chain, with what stands between it and the layer above.

    Attributes:
        node: the graph node that made its output.
        path: its module path.
        weight: (outputs, inputs).
        rule: one that asks for no sums of its own.
        factor: the LRP factor; 0 where its relevance is not wanted.
        z: its output, or where `rectified` that of the ReLU above.
        passed: the graph nodes that relevance passes on its way down to `z` just as gradients do, from the top, each
            with the place of its operand; where `rectified`, the last is the ReLU.
    """

    node: Any
    path: str
    weight: Tensor
    rule: Rule
    factor: float
    z: Tensor
    rectified: bool
    passed: Sequence[tuple[Any, int]]


def relevances(links: Sequence[Link], d: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The paths and the relevance of those of `links` that have a factor, as the last one has.

    To be called under ``no_grad``.

    Args:
        links: a chain, from the top down.
        d: that of its output, to be written over.
    """
    for link in links:
        z, stabiliser, last = link.z, link.rule.stabiliser, link is links[-1]
        # a ReLU lets nothing through at 0, but there nothing is borne, nor goes any further
        by_relevance = link.rectified and (stabiliser > 0 or last)
        for node, way in link.passed[:-1] if by_relevance else link.passed:
            of_operands = node(d)
            d = of_operands if isinstance(of_operands, Tensor) else of_operands[way]
        if by_relevance or last:  # in the memory of `d`: new memory is what a small network waits for
            relevance = d.mul_(z)
        elif link.factor:
            relevance = z * d
        if link.factor:
            yield link.path, relevance
        if last:
            return
        if by_relevance:
            size = z + stabiliser
            d = torch.div(relevance, size, out=size)
        elif stabiliser:
            size = z.abs()
            d = (d * size).div_(size + stabiliser)
        d = d @ link.weight


PLAIN = frozenset(
    (
        *(nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.ReLU, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    )
)
"""Modules whose forward pass draws no numbers and leaves nothing behind, so that it may be run once more."""

AFFINE: dict[type[nn.Module], type[LRPLayer]] = {
    nn.Linear: LinearLRP,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvolutionalLRP),
}
"""Those of them that may be guided."""


def is_plain(model: nn.Module, hooks: int = 0) -> bool:
    """Whether `model` is made of modules of `PLAIN`, with so many `hooks` on its own forward pass and none on theirs.

    And whether autograd keeps what it saves as it is, to be looked at in the graph.
    """
    return not (_has_any_global_hook() or packs_what_it_saves()) and _is_plain(model, hooks)


def _is_plain(module: nn.Module | None, hooks: int = 0) -> bool:
    return (
        module is not None
        and type(module) in PLAIN
        and len(module._forward_hooks) == len(module._forward_pre_hooks) == hooks
        and all(map(_is_plain, module._modules.values()))
    )


def read(output: Any, paths: Paths, rule: Rule, factor_at: Callable[[str, type[LRPLayer]], float]) -> list[Link] | None:
    """The chain that makes the `output` of a plain model, from the top down to the lowest layer with a factor.

    None where the graph does not tell, or tells of no layer to guide. The layer that makes the output gets no factor.

    Args:
        output: that of the forward pass, with its graph.
        paths: of the model.
        rule: that of all its layers, which asks for no sums of its own.
        factor_at: from the path and the LRP layer to the factor of a layer.
    """
    if not isinstance(output, Tensor):
        return None
    links: list[Link] = []
    node: Any = output.grad_fn
    z: Tensor | None = output
    rectified, passed = False, list[tuple[Any, int]]()
    while node is not None:
        kind = node.name()
        if kind in PRODUCTS:
            *_, (below, _), (transposed, _) = node.next_functions
            weight = _leaf(transposed)
            path = None if weight is None else paths.of_layer(weight)
            if weight is None or path is None or z is None:
                return None
            factor = factor_at(path, LinearLRP) if links else 0.0
            links.append(Link(node, path, weight, rule, factor, z, rectified, passed))
            z, passed = None, []
        elif kind in PASSING:
            ((below, _),) = node.next_functions
            rectified = kind == RELU
            z = node._saved_result if rectified else None
            passed.append((node, 0))
        else:
            break
        node = below
    seen = {link.path for link in links}
    if len(seen) < len(links):  # a layer used twice
        return None
    if node is not None and any(
        path not in seen and type(module) in AFFINE and factor_at(path, AFFINE[type(module)])
        for path, module in paths.modules.items()
    ):
        return None
    while links and not links[-1].factor:
        links.pop()
    return links or None


PRODUCTS = ("AddmmBackward0", "MmBackward0")
RELU = "ReluBackward0"
PASSING = (RELU, "ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0")


def _leaf(transposed: Any) -> Tensor | None:
    """The parameter that the graph node transposes, as `F.linear` does; None where it is none."""
    if transposed is None or transposed.name() != "TBackward0":
        return None
    ((node, _),) = transposed.next_functions
    return getattr(node, "variable", None)
