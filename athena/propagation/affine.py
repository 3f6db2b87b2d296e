"""The LRP layers with weights: at ``z = W a + b`` relevance takes the way of the layer's rule (thesis 3.6.2 and 3.6.4).

    LRP-0          s = d                                 d of a:  W^T s
    LRP-epsilon    s = d z / (z + epsilon sign z)                 W^T s
    rules with sums of their own (`athena.rules.Sums`)            sum over their terms, over a

A product of matrices of which one does not depend on the input is such a layer, however it is written.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from athena.propagation.layer import LRPLayer, nonzero, over, times_in_place, total
from athena.propagation.use import Layer
from athena.rules import Zero

if TYPE_CHECKING:
    from athena.propagation.walk import Walk

__all__ = ["AffineLRP", "ConvolutionalLRP", "Layer", "LinearLRP"]


class AffineLRP(LRPLayer):
    """Layers ``z = W a + b``."""

    is_affine = True
    first: ClassVar[int] = 0
    """The place of the first factor among the operands of the node; the second comes next."""
    public: ClassVar[Any] = None
    """`LinearLRP` or `ConvolutionalLRP`, by which scopes and presets tell layers apart."""

    @classmethod
    def operand(cls, node: Any, place: int) -> Any:
        """What the node has saved of its factor 0 or 1, or None."""
        raise NotImplementedError

    @classmethod
    def folded(cls, a: Tensor) -> Tensor:
        """An input as the node multiplies it."""
        return a

    @classmethod
    def turned(cls, weight: Tensor) -> Tensor:
        """A weight as the node multiplies with it."""
        return weight

    @classmethod
    def bias_edge(cls, node: Any) -> Any:
        """Where the bias comes from in the graph, or None."""
        raise NotImplementedError

    @classmethod
    def apply(cls, layer: Layer, a: Tensor, w: Tensor) -> Tensor:
        """``W a``."""
        raise NotImplementedError

    @classmethod
    def pull(cls, layer: Layer, s: Tensor, w: Tensor) -> Tensor:
        """``W^T s``."""
        raise NotImplementedError

    @classmethod
    def without_padding(cls, layer: Layer, x: Tensor) -> Tensor:
        """`x` with zeros where the layer itself has put zeros around its input."""
        below = layer.node.next_functions[0][0]
        if below.name() != "ConstantPadNdBackward0":
            return x
        pad = list(below._saved_pad)
        return F.pad(F.pad(x, [-size for size in pad]), pad)

    @classmethod
    def scaler(cls, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of the weight and of one number for each output channel, by which it multiplies that channel.

        It keeps nothing of the graph.
        """
        raise NotImplementedError

    @classmethod
    def channels(cls, layer: Layer, of_channels: Tensor) -> Tensor:
        """One number for each output channel (or more, where they are added as they are), to add to the output."""
        return of_channels

    @classmethod
    def output(cls, walk: "Walk", layer: Layer) -> Tensor:
        """``z``, from the nearest place where it is known; computed once more where it is not."""
        z = layer.z
        if z is None and (z := walk.values.pop(layer.node, None)) is not None:
            layer.rectified = layer.node in walk.rectified
        if z is None and layer.note is not None and layer.bias is None:
            z = layer.note.output()
        walk.uses_notes |= z is None or (layer.note is not None and z is layer.note.z)
        if z is None:
            layer.find_weight(walk)
            z, constant = cls.apply(layer, layer.a, layer.w), layer.constant(walk)
            z = z if constant is None else z.add_(constant)
        return z

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """``d`` by the layer's rule; a product of two factors that both depend on the input shares equally."""
        (d,) = given
        assert d is not None
        layer = walk.layers.pop(node, None)
        if layer is None:
            return cls.shared(walk, node, d)
        ways = node.next_functions
        downs: list[Tensor | None] = [None] * len(ways)
        place = cls.first + layer.place
        goes_on = ways[place][0] in walk.relevant
        s: Any = d
        if layer.reads and not (layer.passes or layer.finished):
            s = cls.at(walk, layer, d, goes_on)
        if goes_on:
            finished = layer.finished or isinstance(s, tuple)
            downs[place] = (s[0] if isinstance(s, tuple) else s) if finished else cls.pull(layer, s, layer.w)
        if (
            cls.first and ways[0][0] in walk.relevant
        ):  # what is added and depends on the input gets its share of the sum
            downs[0] = _times(d, node._saved_beta)
        return downs

    @classmethod
    def shared(cls, walk: "Walk", node: Any, d: Tensor) -> Sequence[Tensor | None]:
        """AttnLRP's uniform rule for a product of two factors, proposition 3.3 of Achtibat et al. 2024."""
        first = node.next_functions[cls.first][0] in walk.relevant
        second = node.next_functions[cls.first + 1][0] in walk.relevant
        downs = list(node(d))
        if first or second:
            for place in (cls.first, cls.first + 1):
                downs[place] = None if downs[place] is None else times_in_place(downs[place], 0.5)
        if walk.account is not None and cls.first and (z := walk.scores.pop(node, None)) is not None:
            factors = cls.operand(node, 0), cls.operand(node, 1)
            went = sum(total(x * down) for x, down in zip(factors, downs[1:], strict=True) if down is not None)
            if abs((came := total(z * d)) - went) > 1e-12 * abs(came):
                walk.account.add(node, came, came - went)  # a mask of numbers
        return downs

    @classmethod
    def at(cls, walk: "Walk", layer: Layer, d: Tensor, goes_on: bool = True) -> Any:
        """``s`` in the place of ``d``, or the ``d`` of ``a`` itself, in a tuple, where the rule asks for sums.

        Where relevance does not go on, it is only read.
        """
        rule, epsilon = layer.rule, layer.rule.stabiliser
        explains = walk.account is not None
        z = cls.output(walk, layer)
        z = z if z.shape == d.shape else z.reshape(d.shape)
        relevance = (nonzero(z) if walk.zeros else z) * d if layer.wanted or rule.asks_for_sums or explains else None
        if layer.wanted and relevance is not None:
            walk.take(layer, relevance)
        if not goes_on:
            return d
        if rule.asks_for_sums:
            return cls.by_sums(walk, layer, z, relevance, d)
        if epsilon == 0:
            s = d
        elif relevance is not None and not walk.zeros:
            if layer.rectified:
                size = z + epsilon
            else:
                size = torch.copysign(torch.scalar_tensor(epsilon, dtype=z.dtype), z).add_(z)
            s = torch.div(relevance, size, out=size)
        else:
            size = z if layer.rectified else z.abs()
            size = nonzero(size) if walk.zeros else size
            s = (d * size).div_(size + epsilon)
        if walk.account is not None:
            assert relevance is not None
            constant, whole = layer.constant(walk), total(relevance)
            of_bias = 0.0 if constant is None else total(constant.double() * s)
            walk.account.of_layer(walk, layer, relevance, of_bias, whole - total(z.double() * s))
            if walk.account.parameters is not None:
                w = layer.w if layer.scale is None else cls.scaler(layer)(layer.w, layer.scale)
                kept = [] if constant is None else [constant * s]
                walk.account.parameters.of_layer(layer, [(layer.a, w, s)], constant, kept)
        return s

    @classmethod
    def by_sums(cls, walk: "Walk", layer: Layer, z: Tensor, relevance: Any, d: Tensor) -> tuple[Tensor]:
        """The ``d`` of ``a`` by a rule with contributions of its own."""
        rule, a, w, constant = layer.rule, layer.a, layer.w, layer.constant(walk)
        if layer.scale is not None:
            w = cls.scaler(layer)(w, layer.scale)
        sums = rule.sums(a, w, constant)
        assert sums is not None
        inputs = sums.inputs
        if rule.absolute and layer.note is not None and layer.note.pads:
            inputs = [cls.without_padding(layer, x) for x in inputs]
        totals = []
        for row, bias in zip(sums.weights, sums.biases, strict=True):
            terms = [cls.apply(layer, x, of_x) for x, of_x in zip(inputs, row, strict=True)]
            whole = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
            totals.append(whole if bias is None else whole.add_(bias))
        kept = layer.wanted or walk.account is not None
        own, others = rule.share(relevance.clone() if kept else relevance, z, totals)
        if walk.account is not None:
            of_bias = 0.0 if own is None or constant is None else total(constant.double() * own)
            passed = 0.0 if own is None else total(z.double() * own)
            for s, whole, bias in zip(others, totals, sums.biases, strict=True):
                of_bias += 0.0 if bias is None else total(bias.double() * s)
                passed += total(whole.double() * s)
            walk.account.of_layer(walk, layer, relevance, of_bias, total(relevance) - passed)
            if walk.account.parameters is not None:
                products = [] if own is None else [(a, w, own)]
                absorbed = [] if own is None or constant is None else [constant * own]
                for s, row, bias in zip(others, sums.weights, sums.biases, strict=True):
                    products += [(x, of_x, s) for x, of_x in zip(inputs, row, strict=True)]
                    absorbed += [] if bias is None else [bias * s]
                walk.account.parameters.of_layer(layer, products, constant, absorbed)
        parts = []
        for place in range(len(inputs)):
            pulled = [cls.pull(layer, s, row[place]) for s, row in zip(others, sums.weights, strict=True)]
            parts.append(pulled[0] if len(pulled) == 1 else pulled[0].add_(pulled[1]))
        if len(parts) == 1 and inputs[0] is a:
            down = parts[0]
        else:  # relevance over what bears it
            shares = [x * part for x, part in zip(inputs, parts, strict=True)]
            share = shares[0] if len(shares) == 1 else shares[0].add_(shares[1])
            down = share.div_(nonzero(a)) if rule.absolute else over(share, a)
        return (down if own is None else down.add_(cls.pull(layer, own, w)),)


class LinearLRP(AffineLRP):
    """Fully connected layers (thesis 3.6.4), and other products of matrices."""

    kinds: ClassVar[tuple[str, ...]] = ("Mm", "Bmm", "Mv")

    @classmethod
    def operand(cls, node: Any, place: int) -> Any:
        """See `AffineLRP.operand`."""
        if place == 0:
            return node._saved_self
        return node._saved_vec if node.name() == "MvBackward0" else node._saved_mat2

    @classmethod
    def folded(cls, a: Tensor) -> Tensor:
        """With one dimension for all but the features."""
        return a.reshape(-1, a.shape[-1])

    @classmethod
    def turned(cls, weight: Tensor) -> Tensor:
        """See `AffineLRP.turned`."""
        return weight.T

    @classmethod
    def bias_edge(cls, node: Any) -> Any:
        """A product has none."""
        return None

    @classmethod
    def apply(cls, layer: Layer, a: Tensor, w: Tensor) -> Tensor:
        """``a W``, or ``W a`` where the weight comes first."""
        return a @ w if layer.place == 0 else w @ a

    @classmethod
    def pull(cls, layer: Layer, s: Tensor, w: Tensor) -> Tensor:
        """The other way."""
        if layer.place == 1:
            return w.mT @ s
        return s @ w.mT if w.dim() > 1 else s.unsqueeze(-1) * w

    @classmethod
    def scaler(cls, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
        """See `AffineLRP.scaler`."""
        return torch.mul


class LinearWithBiasLRP(LinearLRP):
    """Products of matrices to which something is added, a bias as a rule."""

    kinds: ClassVar[tuple[str, ...]] = ("Addmm", "Baddbmm")
    first = 1

    @classmethod
    def operand(cls, node: Any, place: int) -> Any:
        """See `AffineLRP.operand`."""
        if node.name() == "BaddbmmBackward0":
            return (node._saved_batch1, node._saved_batch2)[place]
        return node._saved_mat1 if place == 0 else node._saved_mat2

    @classmethod
    def bias_edge(cls, node: Any) -> Any:
        """The first operand."""
        return node.next_functions[0]

    @classmethod
    def channels(cls, layer: Layer, of_channels: Tensor) -> Tensor:
        """See `AffineLRP.channels`."""
        return _times(of_channels, layer.node._saved_beta)

    @classmethod
    def apply(cls, layer: Layer, a: Tensor, w: Tensor) -> Tensor:
        """See `AffineLRP.apply`."""
        return _times(super().apply(layer, a, w), layer.node._saved_alpha)

    @classmethod
    def pull(cls, layer: Layer, s: Tensor, w: Tensor) -> Tensor:
        """See `AffineLRP.pull`."""
        return super().pull(layer, _times(s, layer.node._saved_alpha), w)


class ConvolutionalLRP(AffineLRP):
    """Convolutions in one to three dimensions (thesis 3.6.4), also transposed; any stride, padding, groups."""

    kinds = ("Convolution", "ConvolutionOverrideable", "MkldnnConvolution", "CudnnConvolution", "MiopenConvolution")

    @classmethod
    def operand(cls, node: Any, place: int) -> Any:
        """See `AffineLRP.operand`."""
        return node._saved_input if place == 0 else node._saved_weight

    @classmethod
    def bias_edge(cls, node: Any) -> Any:
        """The third operand."""
        return node.next_functions[2]

    @classmethod
    def channels(cls, layer: Layer, of_channels: Tensor) -> Tensor:
        """See `AffineLRP.channels`."""
        return of_channels.view(-1, *[1] * (layer.w.dim() - 2))

    @classmethod
    def apply(cls, layer: Layer, a: Tensor, w: Tensor) -> Tensor:
        """The same convolution, without its bias."""
        n = layer.node
        return torch.ops.aten.convolution.default(
            *(a, w, None, n._saved_stride, n._saved_padding, n._saved_dilation),
            *(n._saved_transposed, n._saved_output_padding, n._saved_groups),
        )

    @classmethod
    def pull(cls, layer: Layer, s: Tensor, w: Tensor) -> Tensor:
        """Its gradient with respect to the input."""
        n = layer.node
        a = layer._a if layer._a is not None else cls.operand(n, 0)
        if a is None:
            a = layer.a
        return torch.ops.aten.convolution_backward.default(
            *(s, a, w, None, n._saved_stride, n._saved_padding, n._saved_dilation),
            *(n._saved_transposed, n._saved_output_padding, n._saved_groups, (True, False, False)),
        )[0]

    @classmethod
    def scaler(cls, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
        """See `AffineLRP.scaler`."""
        if not layer.node._saved_transposed:
            return lambda w, scale: w * scale.view(-1, *[1] * (w.dim() - 1))
        groups = layer.node._saved_groups

        def scaled(w: Tensor, scale: Tensor) -> Tensor:  # a transposed weight is (inputs, outputs of a group, ...)
            parts = w.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (w.dim() - 2))
            return parts.flatten(0, 1)

        return scaled


def _times(tensor: Tensor, number: float) -> Tensor:
    return tensor if number == 1 else tensor * number


def merged(layer: Layer) -> bool:
    """Whether a batch norm right above makes one layer with `layer`, by whose rule that makes a difference."""
    return not isinstance(layer.rule, Zero) and layer.bias is None


LinearLRP.public = LinearLRP
ConvolutionalLRP.public = ConvolutionalLRP
