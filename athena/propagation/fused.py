"""The LRP layers of what is two operations in one: a product or a quotient that is added to something."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from athena.propagation.layer import LRPLayer

if TYPE_CHECKING:
    from athena.propagation.walk import Walk


class AddedProductLRP(LRPLayer):
    """``a + b c``: the product passes half of its share to each factor that depends on the input."""

    is_elementwise = True
    broadcasts = True
    divides = True
    constants_keep = True
    kinds = ("Addcmul",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, half of it to each of two factors."""
        downs = list(node(*given))
        if all(below in walk.relevant for below, _ in node.next_functions[1:]):
            downs[1:] = [None if down is None else down * 0.5 for down in downs[1:]]
        return downs


class AddedQuotientLRP(LRPLayer):
    """``a + b / c``: the divisor gets nothing."""

    is_elementwise = True
    broadcasts = True
    divides = True
    constants_keep = True
    kinds = ("Addcdiv",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, but to the divisor."""
        return (*super().down(walk, node, given)[:2], None)
