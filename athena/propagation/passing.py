"""The LRP layers of sums, selections and pooling, which relevance passes as the gradient does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from athena.propagation.layer import LRPLayer

if TYPE_CHECKING:
    from athena.propagation.walk import Walk


def _each(*names: str) -> tuple[str, ...]:
    return tuple(name for group in names for name in group.split())


class FlattenLRP(LRPLayer):
    """Flatten and its kin: the same elements in another shape, each of them once."""

    is_view = hands_on_output = True
    kinds = _each("View UnsafeView ReshapeAlias Squeeze Unsqueeze Transpose T Permute Clone ToCopy Alias Contiguous")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient; where the output is known, so is the input."""
        if node in walk.values:  # the way back of a new shape is the old one
            walk.remember(node.next_functions[0], node(walk.values.pop(node)), node in walk.rectified)
        return super().down(walk, node, given)


class SelectionLRP(LRPLayer):
    """What picks from its operand, repeats it or moves it to other places."""

    has_many_outputs = True
    kinds = _each(
        "Select Slice Split SplitWithSizes Unbind Index IndexSelect Gather Take MaskedSelect Narrow Diagonal Expand",
        "Topk Repeat Roll Flip Rot90 Tril Triu Unfold Im2Col Col2Im PixelShuffle PixelUnshuffle",
        "ChannelShuffle AsStrided",
    )


class AveragePoolingLRP(LRPLayer):
    """Average pooling, means, up-sampling and the like: linear layers with fixed weights and no bias.

    So are products with a matrix for each group of rows, by which transformers computes a mixture of experts; they are
    explained by LRP-0.
    """

    kinds = _each(
        "AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D Mean Neg ReflectionPad1D ReflectionPad2D",
        "ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D UpsampleNearest1D UpsampleNearest2D",
        "UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleLinear1D",
        "UpsampleBilinear2D UpsampleBilinear2DAa UpsampleBicubic2D UpsampleBicubic2DAa UpsampleTrilinear3D",
        "NativeDropout MkldnnAdaptiveAvgPool2D GroupedMm",
    )

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient; padding keeps its part of what a rule has given to a window of zeros."""
        downs = super().down(walk, node, given)
        if walk.zeros and walk.account is not None and any(getattr(node, "_saved_padding", ())):
            walk.account.measure(walk, node, given, downs)
        return downs


class MaxPoolingLRP(LRPLayer):
    """Max pooling and other maxima: the winner takes all (thesis 3.6.4)."""

    broadcasts = True
    constants_keep = True
    kinds = _each(
        "MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin Max Min",
        "Maximum Minimum MaxPool2D MaxPool3D",
    )


class AdditionLRP(LRPLayer):
    """Addition, as in a residual connection: each summand gets its share. A constant summand keeps it, like a bias."""

    is_elementwise = True
    broadcasts = True
    constants_keep = True
    kinds = ("Add", "Sub", "Rsub")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient; a sum of zeros shares what a rule has given to it equally."""
        (d,) = given
        if walk.zeros and d is not None:
            z, operands = walk.output(node), sum(below in walk.relevant for below, _ in node.next_functions)
            if z is not None and operands > 1:
                given = [torch.where(z == 0, d / operands, d)]
        return super().down(walk, node, given)


class SumLRP(LRPLayer):
    """A sum over dimensions: each element gets its share."""

    kinds = ("Sum",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient; a sum of zeros shares what a rule has given to it equally."""
        (d,) = given
        if walk.zeros and d is not None:
            z, elements = walk.output(node), torch.Size(node._saved_self_sym_sizes).numel()
            if z is not None:
                given = [torch.where(z == 0, d * (d.numel() / max(elements, 1)), d)]
        return super().down(walk, node, given)


class ConcatenationLRP(LRPLayer):
    """Concatenation, stacking, selection by a mask, padding: each gets back its own. What is constant keeps it."""

    broadcasts = True
    constants_keep = True
    kinds = ("Cat", "Stack", "Where", "MaskedFill", "ConstantPadNd")


class CopyLRP(LRPLayer):
    """A copy: all goes to what was copied."""

    kinds = ("CopyBackwards",)

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Nothing to what was written over."""
        return (None, *super().down(walk, node, given)[1:])


class IdentityLRP(LRPLayer):
    """PyTorch's own custom functions that pass on all: hooks of modules, DDP's sink, FSDP2's blocks."""

    has_many_outputs = True
    kinds = ("BackwardHookFunction", "_DDPSink", "RegisterPostBackwardFunction")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The same; their nodes cannot be called."""
        return given
