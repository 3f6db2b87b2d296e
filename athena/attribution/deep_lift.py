"""DeepLIFT: the difference from a baseline is sent down the network (thesis 3.4; Shrikumar, Greenside, Kundaje 2017).

Captum hooks modules of a few types, and is silently wrong where an activation is a function, works in place or is
used again, and where pooling windows overlap. Here each operation of the graph gets its rule, whoever called it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from athena.attribution.completeness import missing
from athena.attribution.deep_lift_rules import RULES
from athena.attribution.guided_backpropagation import kind_of, nodes_below
from athena.attribution.reveal_cancel import reveal_cancel
from athena.attribution.untouched import baseline_like, logits
from athena.propagation.layer import UnsupportedLayer
from athena.propagation.notes import Notes

__all__ = ["deep_lift", "rescaled"]


def deep_lift(
    model: nn.Module, x: Tensor, target: Tensor, *, baseline: float | Tensor = 0.0, rule: str = "rescale"
) -> Tensor:
    """Contributions to ``f(x) - f(baseline)``, which add up to it.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        baseline: a number, or a tensor that broadcasts to `x`.
        rule: ``"rescale"``, or ``"reveal_cancel"`` for networks of linear layers with activations between.

    Raises:
        ValueError: there is no such rule, or a network is not one for reveal-cancel, or contributions miss the
            difference by more than 1 %.
        UnsupportedLayer: the network uses an operation that DeepLIFT has no rule for.
    """
    other = baseline_like(baseline, x)
    if rule not in ("rescale", "reveal_cancel"):
        raise ValueError(f"rule={rule!r}; DeepLIFT has the rules 'rescale' and 'reveal_cancel'")
    return (rescaled if rule == "rescale" else reveal_cancel)(model, x, target, other)


def rescaled(model: nn.Module, x: Tensor, target: Tensor, baseline: Tensor) -> Tensor:
    """DeepLIFT by the rescale rule, checked; `baseline` is of the shape of `x`. Errors as `deep_lift`."""
    both = torch.cat([x, baseline]).detach().requires_grad_()
    notes = Notes(outputs=False, zeros=True, sources=[both])
    with notes, sdpa_kernel(SDPBackend.MATH):  # attention as the products and the softmax that it is
        output = logits(model, both, target.repeat(2))
    source = both.view_as(both).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    for node in relevant_nodes(output, source):
        kind = kind_of(node)
        if kind not in RULES:
            raise UnsupportedLayer(
                f"{type(model).__name__} uses {kind.lower()!r}, and DeepLIFT has no rule to pass a difference through "
                "it"
            )
        if (rule := RULES[kind]) is not None:
            note = notes.calls.get(node)
            node.register_hook(_hook(rule, node, None if note is None else note.a))
    (multipliers,) = torch.autograd.grad(output.sum(), both)
    found = multipliers[: len(x)] * (x - baseline)
    here, there = output.detach().chunk(2)
    if missed := missing(found, here - there):
        raise ValueError(f"DeepLIFT on {type(model).__name__}: {missed}. Use integrated_gradients")
    return found


def _hook(rule: Callable[..., Any], node: Any, a: Tensor | None) -> Callable[[Any, Any], Any]:
    def hook(below: tuple[Any, ...], above: tuple[Any, ...]) -> Any:
        return rule(node, a, below, above)

    return hook


def relevant_nodes(output: Tensor, source: Any) -> list[Any]:
    """The nodes between `output` and the node `source` of the input, without that itself."""
    order = list(nodes_below([output]))
    readers: dict[Any, list[Any]] = {}
    for node in order:
        for below, _ in node.next_functions:
            readers.setdefault(below, []).append(node)
    found: set[Any] = set()
    ahead = list(readers.get(source, []))
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead.extend(readers.get(node, []))
    return [node for node in order if node in found]
