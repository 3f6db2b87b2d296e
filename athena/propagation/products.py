"""The LRP layers of products and quotients of what depends on the input, and of softmax and attention.

A product of n factors passes 1 / n of the gradient to each (AttnLRP's uniform rule, proposition 3.3 of Achtibat et al.
2024); a constant factor gets nothing, and neither does a divisor. What is a product only by its spelling, as
``x * sigmoid(x)``, is the activation that it is.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from athena.propagation.layer import LRPLayer, dimension, layer_of_kind, over, shares_memory, times_in_place, total

if TYPE_CHECKING:
    from athena.propagation.walk import Walk


GATES = ("half", "signal")
"""How a product of a gate and what is gated shares relevance: see `athena.Guidance`."""


class ProductLRP(LRPLayer):
    """Products of elements."""

    is_elementwise = True
    broadcasts = True
    divides = True
    kinds = ("Mul",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient to a single factor, half of it to each of two."""
        if len(node.next_functions) == 1:  # a number, as within attention
            return super().down(walk, node, given)
        (left, _), (right, _) = node.next_functions
        if walk.notes.given and None in (left, right):
            (d,), place = given, 0 if right is None else 1
            assert d is not None
            factor = node._saved_other if place == 0 else node._saved_self
            down = d * factor
            if shares_memory(factor, walk.notes.given):
                down *= 0.5
            return [down, None] if place == 0 else [None, down]
        (d,) = given
        assert d is not None
        alone: int | None = None  # the place of the only factor that gets any
        if left in walk.relevant and right in walk.relevant:
            edges = node.next_functions
            if is_linear_in_all_of(walk, edges[0], edges[1]):
                alone = 0
            elif is_linear_in_all_of(walk, edges[1], edges[0]):
                alone = 1
            elif walk.gates == "signal" and is_gate(left) != is_gate(right):
                alone = int(is_gate(left))
            else:
                d = d * 0.5
        downs = list(node(d))
        if alone is not None:
            downs[1 - alone] = None
        if walk.account is not None and walk.zeros:  # no factor can bear what was sent to a product of 0
            walk.account.measure(walk, node, given, downs)
        return downs


def is_gate(node: Any) -> bool:
    """Whether a factor is the result of a sigmoid, perhaps in another shape."""
    while node is not None and (kind := layer_of_kind(node.name())) is not None:
        if node.name() in ("SigmoidBackward0", "HardsigmoidBackward0"):
            return True
        if not kind.is_view and node.name() != "ExpandBackward0":
            return False
        node = node.next_functions[0][0]
    return False


def is_linear_in_all_of(walk: "Walk", edge: Any, other: Any) -> bool:
    """Whether the operand at `edge` is some ``x`` times constants, and `other` an element-wise function of ``x``.

    Their product is then an activation of ``x`` that is 0 at 0, and ``f(x) / x`` is `other` times the constants.
    """
    multiples = {edge}
    node, _ = edge
    while node is not None:
        kind = layer_of_kind(node.name())
        ways = [way for way in node.next_functions if way[0] in walk.relevant]
        if kind is None or len(ways) != 1 or node.name() not in SCALING:
            break
        multiples.add(ways[0])
        node, _ = ways[0]
    found, ahead, looked = set[Any](), [other], 0
    while ahead:
        edge, looked = ahead.pop(), looked + 1
        node, _ = edge
        if edge in multiples:
            found.add(edge)
            continue
        kind = layer_of_kind(node.name())
        if looked > 30 or kind is None or not kind.is_elementwise:
            return False
        ahead.extend(way for way in node.next_functions if way[0] in walk.relevant)
    return len(found) == 1


SCALING = ("MulBackward0", "DivBackward0", "NegBackward0")


class DivisionLRP(LRPLayer):
    """Division: the dividend gets it all, as if the divisor were a constant. Softmax written out is softmax."""

    is_elementwise = True
    broadcasts = True
    divides = may_divide = True
    kinds = ("Div",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient to the dividend."""
        downs = super().down(walk, node, given)
        if is_normalised(walk, node):
            assert downs[0] is not None
            exponential = node.next_functions[0][0]
            parts = exponential._saved_result * downs[0]
            came, size = walk.exponentials.get(exponential, (0.0, 0.0))
            walk.exponentials[exponential] = came + total(parts), size + total(parts.abs())
            return downs
        return (downs[0], *(None for _ in node.next_functions[1:]))


class AddedProductLRP(LRPLayer):
    """``a + b c``: the product passes half of its share to each factor that depends on the input."""

    is_elementwise = broadcasts = divides = constants_keep = True
    kinds = ("Addcmul",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, half of it to each of two factors."""
        downs = list(super().down(walk, node, given))
        if all(below in walk.relevant for below, _ in node.next_functions[1:]):
            downs[1:] = [None if down is None else down * 0.5 for down in downs[1:]]
        return downs


class AddedQuotientLRP(LRPLayer):
    """``a + b / c``: the divisor gets nothing."""

    is_elementwise = broadcasts = divides = constants_keep = True
    kinds = ("Addcdiv",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, but to the divisor."""
        return (*super().down(walk, node, given)[:2], None)


def is_normalised(walk: "Walk", node: Any) -> bool:
    """Whether a quotient is that of an exponential and of something made from it, such as its sums over groups."""
    exponential = node.next_functions[0][0]
    if exponential is None or exponential.name() != "ExpBackward0" or exponential not in walk.relevant:
        return False
    seen, ahead = set[Any](), [node.next_functions[1][0]]
    while ahead and len(seen) < 30:
        below = ahead.pop()
        if below is exponential:
            return True
        if below in walk.relevant and below not in seen:
            seen.add(below)
            ahead.extend(way[0] for way in below.next_functions)
    return False


class ReciprocalLRP(LRPLayer):
    """Reciprocals, also of roots: what multiplies by one divides, and a divisor gets nothing."""

    may_divide = True
    kinds = ("Reciprocal", "Rsqrt")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Nothing may come here."""
        walk.refuse(node)


def makes_a_divisor(node: Any, relevant: Any) -> bool:
    """Whether the operation divides by what depends on the input, with nothing else that does."""
    kind = node.name()
    if kind in ("ReciprocalBackward0", "RsqrtBackward0"):
        return True
    if kind == "PowBackward0":
        return bool(node._saved_exponent < 0)
    return kind == "DivBackward0" and node.next_functions[0][0] not in relevant


class LengthLRP(LRPLayer):
    """A norm over dimensions: homogeneous of degree one, so that gradient times input is the length itself."""

    kinds = ("LinalgVectorNorm", "Norm")


class GatedLRP(LRPLayer):
    """The gated linear unit: one half of the channels times the sigmoid of the other, a product of two factors."""

    kinds = ("Glu",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Half to what passes, and half to the gate, of which ``sigmoid(0)`` keeps its share."""
        (d,), both = given, node._saved_self
        assert d is not None
        dim = dimension(node._saved_dim, both)
        x, gate = both.chunk(2, dim)
        open_ = gate.sigmoid()
        if walk.gates == "signal":
            return (torch.cat([d * open_, torch.zeros_like(d)], dim),)
        half = d * 0.5
        of_gate = over(half * x * (open_ - 0.5), gate)
        if walk.account is not None:
            walk.account.add(node, total(d * x * open_), total(half * x * torch.where(gate == 0, open_, 0.5)))
        return (torch.cat([half * open_, of_gate], dim),)


class SoftmaxLRP(LRPLayer):
    """Softmax: gradient times input, the first order of its Taylor series (AttnLRP); the rest is booked as a bias."""

    kinds = ("Softmax", "LogSoftmax", "SafeSoftmax")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient."""
        if walk.account is None:
            return super().down(walk, node, given)
        (d,), z, log = given, node._saved_result, node.name().startswith("Log")
        assert d is not None
        dim = dimension(node._saved_dim, z)
        down = d - z.exp() * d.sum(dim, keepdim=True) if log else z * (d - (z * d).sum(dim, keepdim=True))
        # the input but for a constant, which takes no part as `down` sums to 0
        x = z if log else z.log()
        below = node.next_functions[0][0]
        walk.scores[below] = x
        walk.account.add(node, total(z * d), total(z * d) - total(x * down))
        return (down,)


class AttentionLRP(LRPLayer):
    """Attention by scaled dot products: the rules of its two products and of softmax, in PyTorch's fused operation.

    The values get half of the relevance and the weights the other half, which the scores pass on to queries and keys,
    a quarter each. All the ways between are gradients, so parts of the operands' gradients are all there is to it.
    """

    has_many_outputs = True
    kinds = (
        *(
            "ScaledDotProductFlashAttentionForCpu",
            "ScaledDotProductFlashAttention",
            "ScaledDotProductEfficientAttention",
        ),
        *("ScaledDotProductCudnnAttention", "ScaledDotProductFusedAttentionOverrideable"),
    )

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients, each times its share."""
        ways, names = node.next_functions[:3], ("_saved_query", "_saved_key", "_saved_value")
        query, key, value = (
            way[0] in walk.relevant or walk.is_input(way, functools.partial(getattr, node, name))
            for way, name in zip(ways, names, strict=True)
        )
        if walk.account is not None:
            operands = node._saved_query, node._saved_key, node._saved_value
            z = node._saved_output
        scored, ways = query + key, int(query or key) + int(value)
        shares = [bears / ways / scored if scored else 0.0 for bears in (query, key)] + [value / ways]
        downs: list[Tensor | None] = [
            times_in_place(down, share) if share and down is not None else None
            for down, share in zip(node(*given), shares, strict=False)
        ]
        if walk.account is not None:
            inflow = total(z * given[0])
            outflow = sum(total(x * down) for x, down in zip(operands, downs, strict=False) if down is not None)
            walk.account.add(node, inflow, inflow - outflow)
        return [*downs, *[None] * (len(node.next_functions) - len(downs))]
