"""Operations that have no LRP layer of their own, by Euler's theorem on homogeneous functions.

Where ``f(t x) = t^k f(x)``, the gradient times x is ``k f(x)``: the gradient over k passes on all relevance, and for a
product of k factors it is the uniform rule (proposition 3.3 of Achtibat et al. 2024). What ``f`` is at 0 is a constant
summand, which keeps its share. So an operation is tried, in float64, at multiples of the operands that carry relevance.
One that is no such function is refused, or passed as the gradient with what gets lost booked, where that is asked for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from athena.propagation.layer import LRPLayer, UnsupportedLayer, gradients, nonzero, total

if TYPE_CHECKING:
    from athena.propagation.walk import Walk

__all__ = ["CopyIntoPartLRP", "EulerLRP"]


class EulerLRP(LRPLayer):
    """Whatever is homogeneous of some degree k, and not random."""

    is_tried = True
    has_many_outputs = True
    broadcasts = True

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient over k."""
        operation = walk.operation(node)
        ways = [way for way in node.next_functions if way[0] in walk.relevant]
        operands = None if operation is None or operation.is_random else operation.operands(ways)
        if operation is None or operands is None:
            walk.refuse(node)
        outputs = [number for number, d in enumerate(given) if d is not None]
        try:
            values = {scale: operation.at(scale, operands) for scale in SCALES}
        except (RuntimeError, TypeError) as error:
            raise UnsupportedLayer(f"which cannot be tried in float64 ({error})") from None
        downs: list[Any] = list(super().down(walk, node, given))
        for place, (below, number) in enumerate(node.next_functions):
            if (down := downs[place]) is not None and down.is_complex():
                downs[place] = down if below._input_metadata[number].dtype.is_complex else down.real
        pairs = [(values[1.0][number], given[number]) for number in outputs]
        went = [
            (operands[way][0], down) for way, down in zip(node.next_functions, downs, strict=False) if way in operands
        ]
        k = degree(values, outputs)
        if (
            k is not None
            and not walk.zeros
            and not conserves(k, pairs, went, [values[0.0][number] for number in outputs])
        ):
            k = None  # the gradient is of somebody's own making
        if k is None and walk.unknown != "gradient":
            walk.refuse(node)
        if k is not None and k > 1:
            downs = [None if down is None else down / k for down in downs]
        if walk.account is not None:
            came, passed = borne(walk, pairs), borne(walk, went) / (k or 1)
            if abs(came - passed) > 1e-12 * abs(came):
                walk.account.add(node, came, came - passed)
        return downs


SCALES = (0.0, 0.25, 1.0, 2.0)
Pairs = Sequence[tuple[Tensor, Tensor | None]]


def degree(values: dict[float, dict[int, Tensor]], outputs: Sequence[int]) -> int | None:
    """The degree in which outputs grow from what they are at 0; 1 where they are constant, None where there is none.

    Args:
        values: the outputs by number, at multiples of the operands.
        outputs: which of them to look at.
    """
    zero = {number: values[0.0][number].nan_to_num(0.0, 0.0, 0.0) for number in outputs}
    steps = {scale: [values[scale][number] - zero[number] for number in outputs] for scale in SCALES}
    sizes = {scale: sum(step.abs().square().sum().item() for step in steps[scale]) ** 0.5 for scale in SCALES}
    if sizes[1.0] == 0:
        return 1 if sizes[0.25] == sizes[2.0] == 0 else None
    ratio = sizes[2.0] / sizes[1.0]
    if not 1 < ratio < torch.inf:
        return None
    k = round(torch.tensor(ratio).log2().item())
    for scale in (0.25, 2.0):
        for number, step, one in zip(outputs, steps[scale], steps[1.0], strict=True):
            error = (step - scale**k * one).abs()
            rounding = ROUNDING * (step.abs() + scale**k * one.abs() + zero[number].abs())
            if not bool((error <= rounding + ROUNDING * step.abs().amax()).all()):
                return None
    return k if k > 0 else None


ROUNDING = 1e-12
"""Of sums in float64, on a device that adds up in any order too; what is nearly linear differs by more."""


def conserves(k: int, outputs: Pairs, operands: Pairs, zeros: Sequence[Tensor]) -> bool:
    """Whether the gradient times the operands is k times the relevance of the outputs, but for what they are at 0."""
    came = sum(_relevance(z - zero, d) for (z, d), zero in zip(outputs, zeros, strict=True))
    went = sum(_relevance(x, down) for x, down in operands)
    size = sum(_relevance(part, d, size=True) for pairs in (outputs, operands) for part, d in pairs)
    return abs(went - k * came) <= 1e-3 * k * size


def borne(walk: "Walk", pairs: Pairs) -> float:
    """The relevance of tensors, each given with its ``d``."""
    moved = [(nonzero(z) if walk.zeros and not z.is_complex() else z, d) for z, d in pairs]
    return sum(_relevance(z, d) for z, d in moved)


def _relevance(z: Tensor, d: Tensor | None, size: bool = False) -> float:
    """The sum of ``z d``, or of its magnitudes; of complex numbers the real part of ``z`` times ``d`` conjugated."""
    if d is None:
        return 0.0
    complex_ones = z.is_complex() or d.is_complex()
    product = (z * d.conj()).real if complex_ones else z.double() * d.double()
    return total(product.abs() if size else product)


class ScatteringLRP(EulerLRP):
    """What puts its operands to other places and adds them up there, which needs no trial."""

    kinds: ClassVar[tuple[str, ...]] = (
        "Scatter",
        "ScatterAdd",
        "IndexAdd",
        "IndexPut",
        "IndexCopy",
        "PackPaddedSequence",
        "SparseAddmm",
    )

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient. For an account it is tried nevertheless, as something constant may keep a share."""
        if walk.account is not None and walk.operation(node) is not None:
            return super().down(walk, node, given)
        return gradients(node, given)


class CopyIntoPartLRP(ScatteringLRP):
    """A change of a part of a tensor in place; where it is a copy, what is written over gets nothing."""

    kinds = ("CopySlices",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient, where the node is known to copy and to do nothing else."""
        if node in walk.notes.copies:
            return super().down(walk, node, given)
        walk.require_notes()
        return EulerLRP.down(walk, node, given)


class ExponentialLRP(EulerLRP):
    """An exponential that is divided by its sums over groups, wherever these are added up: softmax."""

    kinds = ("Exp",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient; what softmax has beyond it is booked as a bias."""
        came, size = walk.exponentials.pop(node, (0.0, 0.0))
        if not size:
            return super().down(walk, node, given)
        (d,), e = given, node._saved_result
        assert d is not None
        down = d * e
        # softmax stays the same where all scores of a group grow by the same number
        if abs(total(down)) > 1e-3 * size and walk.unknown != "gradient":
            walk.refuse(node)
        if walk.account is not None:
            walk.account.add(node, came, came - total(e.log() * down))
        return (down,)
