"""The LRP layers: what each operation of a network does to relevance on its way down.

Relevance is a modified gradient: written as ``R = z d``, LRP sends ``d`` down through a network as autograd sends a
gradient. Most operations pass ``d`` on just as they pass the gradient. What a layer changes about it:

    affine, by its rule         d  ->  s = d z / (z + epsilon sign z), and then down as the gradient goes; rules with
                                other contributions (`athena.rules`) send it down through sums of their own
    activation f                d  ->  d f(z) / z, which for ReLU is the gradient
    product of n factors        d  ->  1 / n of the gradient to each; to a constant nothing
    layer norm and its kin      the gradient, had the standard deviation been a constant; a length likewise
    softmax, attention          the gradient, products as above (AttnLRP, Achtibat et al. 2024)

Not here: how an operation of the forward pass comes to its layer (`athena.interception`).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena.interception import (
    Fork,
    Interception,
    Kept,
    LRPLayer,
    Phase,
    Record,
    UnsupportedLayer,
    mapped,
    named,
    nonzero,
    operation,
    tensors_in,
    writes_in_place,
)
from athena.rules import Rule, Shares, Sums, Zero

__all__ = [
    "ActivationLRP",
    "AdditionLRP",
    "AttentionLRP",
    "AveragePoolingLRP",
    "BatchNormLRP",
    "ConcatenationLRP",
    "ConvolutionalLRP",
    "DivisionLRP",
    "DropoutLRP",
    "FlattenLRP",
    "GatedLRP",
    "LinearLRP",
    "MatrixProductLRP",
    "MaxPoolingLRP",
    "MultiheadAttentionLRP",
    "NormalisationLRP",
    "ProductLRP",
    "ReLULRP",
    "ReciprocalLRP",
    "ReductionLRP",
    "SoftmaxLRP",
    "UnitLengthLRP",
]


class Affine(Record):
    """The record of an affine layer ``z = W a + b``.

    Args:
        rule: the layer's rule.
        function, weight, bias, rest, named: what is called and with what, apart from the input; `bias` in a shape that
            adds to ``z``.
        a: its input, where the rule asks for sums of its own.
        factor: the LRP factor in training; 0 where the layer is not guided.
    """

    def __init__(
        self,
        path: str,
        layer: type[LRPLayer],
        phase: Phase,
        rule: Rule,
        function: Any,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        named: dict[str, Any],
        a: Kept | None,
        factor: float = 0.0,
    ) -> None:
        super().__init__(path, layer, phase)
        self.function, self.weight, self.bias, self.rest, self.named = function, weight, bias, rest, named
        self.rule, self.a, self.factor = rule, a, factor
        phase.absolute = phase.absolute or rule.absolute

    @property
    def transposed(self) -> bool:
        """Whether its weights have the inputs first, as in a transposed convolution or in ``a @ W``."""
        return "transpose" in self.function.__name__

    @property
    def groups(self) -> int:
        """How many groups of channels it has; their place is the same in all convolutions of PyTorch."""
        return int(self.named.get("groups", self.rest[3] if len(self.rest) > 3 else 1))

    @property
    def can_be_scaled(self) -> bool:
        """Whether a fixed affine map of each channel of ``z`` makes a difference to the rule, and can be merged."""
        return not isinstance(self.rule, Zero) and not (self.transposed and self.groups > 1)

    def scaled(self, scale: Tensor, shift: Tensor) -> "Affine":
        """This layer and the map ``scale z + shift`` after it as one; of itself it then shares nothing any more."""
        outputs = 1 if self.transposed else 0
        shape = [-1 if dim == outputs else 1 for dim in range(self.weight.dim())]
        channels = [1] * (self.weight.dim() - 1)
        channels[0] = -1
        bias = shift.view(channels if self.weight.dim() > 2 else -1)
        if self.bias is not None:
            bias = bias + self.bias * scale.view(bias.shape)
        weight = self.weight * scale.view(shape) if self.rule.asks_for_sums else self.weight  # nothing else looks at it
        what = self.function, weight, bias, self.rest, self.named
        merged = Affine(self.path, self.layer, self.phase, self.rule, *what, self.a)
        self.rule, self.a = Zero(), None
        return merged

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``s`` for the contributions to ``z``, and the ``d`` of the input from contributions to other sums."""
        if self.a is None:
            return self.share(d), None
        a, sums = self.a.value, self.rule.sums(self.a.value, self.weight, self.bias)
        assert sums is not None
        with torch.enable_grad():
            inputs = _joined(sums.inputs, self._channels).detach().requires_grad_()
            joined = self._sums(inputs, sums)
        shares = self._shares(d, self._totals(joined, sums))
        (down,) = torch.autograd.grad(joined, inputs, _joined(shares.others, self._channels))
        parts = down.chunk(len(sums.inputs), self._channels)
        if self.rule.absolute:
            relevance = sum(x * part for x, part in zip(sums.inputs, parts, strict=True))
            return shares.own, relevance / nonzero(a)
        return shares.own, parts[0] if len(parts) == 1 else torch.where(a > 0, parts[0], parts[1])

    @property
    def needs_z(self) -> bool:
        """See `Record.needs_z`."""
        return self.rule.stabiliser > 0 or self.a is not None

    def attach(self, node: Any) -> None:
        """See `Record.attach`."""
        if self.a is None and self.rule.stabiliser:
            node.register_prehook(self._before_backward)

    def _before_backward(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """What its node is to send down instead of `gradients`; None to leave them as they are."""
        (gradient,) = gradients
        if gradient is None or not self.phase.relevance:
            return None
        s = self.share(gradient)
        if self.phase.passes_once:
            self.kept = None
        return (s,)

    def share(self, d: Tensor) -> Tensor:
        """``s = d z / (z + epsilon sign z)``."""
        if self.rule.stabiliser == 0:
            return d
        size = self.z if self.rectified else self.z.abs()
        if self.phase.absolute:
            size = nonzero(size)
        return (d * size).div_(size + self.rule.stabiliser)

    def absorbed(self, d: Tensor) -> tuple[float, float]:
        """See `Record.absorbed`."""
        total = _total(self.phase.of(self.z, d))
        if self.a is None:
            s = self.share(d)
            bias = 0.0 if self.bias is None else _total(self.bias.double() * s)
            return bias, total - _total(self.z.double() * s)
        sums = self.rule.sums(self.a.value, self.weight, self.bias)
        assert sums is not None
        totals = self._totals(self._sums(_joined(sums.inputs, self._channels), sums), sums)
        own, others = self._shares(d, totals)
        bias = passed = 0.0
        if own is not None:
            bias += 0.0 if self.bias is None else _total(self.bias.double() * own)
            passed += _total(self.z.double() * own)
        for s, z, b in zip(others, totals, sums.biases, strict=True):
            bias += 0.0 if b is None else _total(b.double() * s)
            passed += _total(z.double() * s)
        return bias, total - passed

    def _shares(self, d: Tensor, totals: Sequence[Tensor]) -> Shares:
        return self.rule.share(self.phase.of(self.z, d), self.z, totals)

    def _sums(self, inputs: Tensor, sums: Sums) -> Tensor:
        """The sums without their biases, joined: one call of the layer's function, or one for each term."""
        if self.groups > 1:  # joined, each group would have channels more; PyTorch is slow with two to a group
            parts = inputs.chunk(len(sums.inputs), self._channels)
            rows = [zip(parts, row, strict=True) for row in sums.weights]
            terms = [[self.function(part, w, None, *self.rest, **self.named) for part, w in row] for row in rows]
            return _joined([functools.reduce(torch.add, row) for row in terms], self._channels)
        outputs, of_inputs = (1, 0) if self.transposed else (0, 1)
        weight = _joined([_joined(row, of_inputs) for row in sums.weights], outputs)
        joined: Tensor = self.function(inputs, weight, None, *self.rest, **self.named)
        return joined

    def _totals(self, joined: Tensor, sums: Sums) -> Sequence[Tensor]:
        """The sums one by one, in the same memory, which then has their biases."""
        totals = joined.detach().chunk(len(sums.weights), self._channels)
        return [total if bias is None else total.add_(bias) for total, bias in zip(totals, sums.biases, strict=True)]

    @property
    def _channels(self) -> int:
        """The dimension of the channels in ``a`` and ``z``, from the last one."""
        return 1 - self.weight.dim()


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenated along `dim`."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class AffineLRP(LRPLayer):
    """Layers ``z = W a + b``: relevance takes the way of the layer's rule (thesis 3.6.2)."""

    affine = True

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Calls `function` and gives its output."""
        (a, weight, bias), rest, named = _operands(args, kwargs)
        path = interception.path_of(weight)
        explains = interception.guided is None
        factor = 0.0 if interception.guided is None else interception.guided(path, cls)
        if explains and not interception.recomputed:  # without weight gradients there is nothing to keep for them
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        z: Tensor = function(a, weight, bias, *rest, **named)
        if not z.requires_grad:
            if factor and weight.requires_grad:
                interception.without_graph.append(path)
            return z
        if not (explains or factor or interception.records):
            return z

        rule = interception.rule(path, cls is ConvolutionalLRP, a)
        kept = None
        if asks_for_sums := rule.asks_for_sums:
            weight, kept = weight.detach(), interception.keep(a, path)
        if bias is not None and (explains or asks_for_sums):
            bias = bias.detach().view(-1, *[1] * (weight.dim() - 2))
        record = Affine(path, cls, interception.phase, rule, function, weight, bias, rest, named, kept, factor)
        if kept is not None:
            z = Fork.apply(z, a if a.requires_grad else None, record)
        interception.add(record, z)
        if weight.is_leaf:
            interception.affine[z.grad_fn] = len(interception.records) - 1, a
        return z


class LinearLRP(AffineLRP):
    """Fully connected layers (thesis 3.6.4): ``a`` of shape (..., inputs), ``W`` of (outputs, inputs)."""

    functions = (F.linear,)


class ConvolutionalLRP(AffineLRP):
    """Convolutions in one to three dimensions (thesis 3.6.4), also transposed; any stride, padding, groups."""

    functions = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class MaxPoolingLRP(LRPLayer):
    """Max pooling and other maxima: the winner takes all (thesis 3.6.4)."""

    functions = (
        *named("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *named("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *named("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d"),
        *named("adaptive_max_pool3d_with_indices", "amax", "max", "maximum"),
        *named("amin", "min", "minimum"),
    )


class AveragePoolingLRP(LRPLayer):
    """Average pooling, means and sums, up-sampling: linear layers with fixed weights and no bias."""

    functions = (
        *named("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean", "neg", "negative", "__neg__"),
        *named("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *named("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"),
    )


class FlattenLRP(LRPLayer):
    """Flatten and its kin, which only rearrange, pick from or repeat what they are given."""

    passes = True
    functions = (
        *named("flatten", "reshape", "view", "view_as", "unflatten", "contiguous", "clone", "to", "type_as", "float"),
        *named("double", "half", "bfloat16", "cpu", "cuda", "squeeze", "unsqueeze", "transpose", "swapaxes", "t"),
        *named("swapdims", "permute", "movedim", "moveaxis", "expand", "expand_as", "broadcast_to", "repeat", "tile"),
        *named("repeat_interleave", "roll", "flip", "select", "narrow", "chunk", "split", "tensor_split", "unbind"),
        *named("unfold", "fold", "gather", "index_select", "take_along_dim", "pixel_shuffle", "pixel_unshuffle"),
        *named("channel_shuffle", "diagonal", "__getitem__", "ravel", "rot90", "reshape_as", "type", "tril", "triu"),
        *named("hsplit", "vsplit", "dsplit", "take", "masked_select"),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "data")),
    )


class DropoutLRP(LRPLayer):
    """Dropout: a linear layer whose weights were drawn."""

    passes = True
    functions = named(
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
        "feature_alpha_dropout",
    )


class Portion(torch.autograd.Function):
    """The identity on one operand ``x`` of an operation, which gets the portion ``share`` of what it is sent down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, phase: Phase, measured: "Measured | None") -> Tensor:
        ctx.share, ctx.phase, ctx.measured = share, phase, measured
        ctx.x = None if measured is None else x.detach()
        return x.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.phase.relevance:
            return gradient, None, None, None
        if ctx.share == 0:
            return None, None, None, None
        d = gradient * ctx.share if ctx.share != 1 else gradient
        if ctx.measured is not None:
            ctx.measured.passed += _total(ctx.phase.of(ctx.x, d))
        return d, None, None, None


class Measured(Record):
    """The record of an operation whose constant part is what did not arrive at its operands."""

    passed = 0.0

    def absorbed(self, d: Tensor) -> tuple[float, float]:
        """See `Record.absorbed`."""
        return _total(self.phase.of(self.z, d)) - self.passed, 0.0


class ReLULRP(LRPLayer):
    """ReLU and what else is linear on both sides of 0: ``f(z) / z`` is the derivative, so relevance is a gradient.

    Only where a rule gives relevance to neurons that are 0 does the identity rule have to be written out.
    """

    passes = True
    functions = named("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "abs", "abs_")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` as the network does."""
        if interception.absolute and interception.listens():
            return ActivationLRP.run(interception, function, args, kwargs, only_absolute=True)
        return function(*args, **kwargs)


class Activation(Record):
    """The record of ``z = f(x)``, element by element. Not one of `Interception.records`."""

    def __init__(
        self, path: str, phase: Phase, x: Kept, z: Kept, only_absolute: bool, measured: Measured | None
    ) -> None:
        super().__init__(path, ActivationLRP, phase)
        self.x, self.kept = x, z
        self.only_absolute, self.measured = only_absolute, measured

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The identity rule: ``d f(x) / x``."""
        x, z = self.x.value, self.z
        if self.only_absolute and not self.phase.absolute:
            return d, None
        d = d * nonzero(z) / nonzero(x) if self.phase.absolute else (d * z).div_(x).masked_fill_(x == 0, 0)
        if self.measured is not None:
            self.measured.passed += _total(self.phase.of(x, d))
        return None, d


class ActivationLRP(LRPLayer):
    """Element-wise activations: relevance goes on unchanged, ``d f(z) / z`` (identity rule).

    Where ``f(0)`` is not 0, as for the sigmoid, a ``z`` of exactly 0 can bear none, and ``f(0)`` keeps it like a bias.
    """

    functions = named(
        *("gelu", "silu", "silu_", "elu", "elu_", "celu", "celu_", "selu", "selu_", "mish", "mish_", "hardswish"),
        *("hardswish_", "hardtanh", "hardtanh_", "relu6", "hardsigmoid", "hardsigmoid_", "sigmoid", "sigmoid_", "tanh"),
        *("tanh_", "softplus", "logsigmoid", "softsign", "tanhshrink", "softshrink", "hardshrink", "expit"),
        *("erf", "erf_"),
        *("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "square"),
        *("square_", "sqrt", "sqrt_", "pow", "pow_", "__pow__", "__ipow__"),
    )

    @classmethod
    def run(
        cls,
        interception: Interception,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        only_absolute: bool = False,
    ) -> Any:
        """Calls `function`; in-place ones end with a copy into their operand."""
        if not interception.listens():
            return function(*args, **kwargs)
        name = getattr(function, "__name__", type(function).__name__).strip("_")
        others = *args[1:], *(value for key, value in kwargs.items() if key != "input")
        if any(map(interception.carries, others)):
            z = function(*args, **kwargs)
            interception.refuse(z.grad_fn, f"{name!r} by what depends on the input")
            return z
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and x.requires_grad):
            return function(*args, **kwargs)
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        if name in ("pow", "ipow") and isinstance(exponent, int | float) and exponent < 0:
            return ReciprocalLRP.run(interception, function, args, kwargs)

        def fork(z: Tensor) -> Tensor:
            path = interception.within(name)
            measured = None
            if interception.account and name in NOT_0_AT_0:
                measured = Measured(path, cls, interception.phase)
            kept = interception.keep(x, path), interception.keep(z, path)
            z = Fork.apply(z, x, Activation(path, interception.phase, *kept, only_absolute, measured))
            if measured is not None:
                interception.add(measured, z)
            return z

        return _out_of_place(interception, function, args, kwargs, fork=fork)


NOT_0_AT_0 = (
    *("hardsigmoid", "sigmoid", "softplus", "logsigmoid", "expit", "pow", "ipow"),
    *("clamp", "clip", "clamp_min", "clamp_max"),
)


class ConcatenationLRP(LRPLayer):
    """Concatenation, stacking, selection by a mask and padding: each gets back its own. What is constant keeps it."""

    functions = named(
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"),
        *("where", "masked_fill", "pad"),
    )

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`, and takes its constants into the account."""
        parts = tensors_in(*args, *kwargs.values())
        constant = function in PADDING and not (kwargs.get("value") or (len(args) > 3 and args[3]))
        constant = not constant and (function in FILLING or any(not interception.carries(part) for part in parts))
        if not (constant and interception.account):
            return function(*args, **kwargs)
        return _measured(cls, interception, function, args, kwargs)


PADDING = named("pad")
FILLING = (*PADDING, *named("where", "masked_fill"))


class Sum(Record):
    """The record of a sum of `terms` tensors or elements. Not one of `Interception.records`."""

    def __init__(self, path: str, layer: type[LRPLayer], phase: Phase, terms: float) -> None:
        super().__init__(path, layer, phase)
        self.terms = terms

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient; where all terms are 0, each gets an equal part of what an absolute rule has sent there."""
        return (torch.where(self.z == 0, d / self.terms, d) if self.phase.absolute else d), None

    @classmethod
    def fork(cls, interception: Interception, layer: type[LRPLayer], z: Tensor, terms: float) -> Tensor:
        """`z`, a sum of `terms`, as relevance has to find it."""
        if not (interception.absolute and interception.listens() and terms > 1 and z.requires_grad):
            return z
        record = cls(interception.within("sum"), layer, interception.phase, terms)
        record.kept = interception.keep(z, record.path)
        z = Fork.apply(z, None, record)
        record.kept.take(z.detach())
        return z


class ReductionLRP(LRPLayer):
    """Sums over a dimension: each element gets its share."""

    functions = named("sum")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        return Sum.fork(interception, cls, z, x.numel() / max(z.numel(), 1))


class AdditionLRP(LRPLayer):
    """Addition, as in a residual connection: each summand gets its share. A constant summand keeps it, like a bias."""

    functions = (
        *named("add", "add_", "__add__", "__radd__", "__iadd__"),
        *named("sub", "subtract", "sub_", "__sub__", "__isub__", "rsub", "__rsub__"),
    )

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` and takes a constant summand into the account."""
        if not interception.listens():
            return function(*args, **kwargs)
        summands = (*args, *(kwargs[name] for name in ("input", "other") if name in kwargs))
        borne = [interception.carries(summand) for summand in summands]
        if all(borne):
            return (
                _out_of_place(interception, function, args, kwargs, fork=lambda z: Sum.fork(interception, cls, z, 2))
                if interception.absolute
                else function(*args, **kwargs)
            )
        z = function(*args, **kwargs)
        if interception.account and any(borne):
            weights = cls._weights(function, kwargs.get("alpha", 1))
            constant = next(
                w * summand for w, summand, bears in zip(weights, summands, borne, strict=True) if not bears
            )
            record = Record(interception.within("add"), cls, interception.phase)
            record.bias = torch.as_tensor(constant, dtype=z.dtype, device=z.device).detach()
            interception.add(record, z)
        return z

    @staticmethod
    def _weights(function: Any, alpha: Any) -> tuple[Any, Any]:
        name = getattr(function, "__name__", "")
        if "rsub" in name:
            return -alpha, 1
        return 1, -alpha if "sub" in name else alpha


class ProductLRP(LRPLayer):
    """Products, of elements or of matrices: each factor through which relevance can come gets an equal part.

    Constant factors get none, so that there is one bearer as in a linear layer. (AttnLRP's uniform rule, proposition
    3.3 of Achtibat et al. 2024.)
    """

    functions = (
        *named("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__", "__rmatmul__"),
        *named("bmm", "mv", "dot", "inner", "einsum"),
    )

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        operands = tensors_in(*args, *kwargs.values())
        factors = sum(map(interception.carries, operands))
        divided = any(map(interception.divides, operands))
        if not interception.listens() or factors + divided < 2:
            return function(*args, **kwargs)
        measured = None
        if interception.account and interception.absolute:  # no factor can bear what was sent to a product of 0
            measured = Measured(interception.within("product"), cls, interception.phase)

        def portion(factor: Tensor) -> Tensor:
            if interception.carries(factor):
                return Portion.apply(factor, 1 / factors, interception.phase, measured)
            return Portion.apply(factor, 0.0, interception.phase, None) if interception.divides(factor) else factor

        def fork(z: Tensor) -> Tensor:
            if measured is not None:
                interception.add(measured, z)
            return z

        return _out_of_place(interception, function, args, kwargs, lambda given: mapped(given, portion), fork)


class MatrixProductLRP(ProductLRP):
    """Products of two matrices: of ``a W`` with a parameter ``W`` it makes the linear layer that it is."""

    functions = named("matmul", "__matmul__", "mm", "addmm", "baddbmm")
    affine = True

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`, or what does the same."""
        operands = [*args, *(kwargs[name] for name in ("input", *FACTORS) if name in kwargs)]
        added = operands.pop(0) if function in ADDING else None
        a, b = operands
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        is_bias = added is None or (added.dim() == 1 and alpha == beta == 1)
        if isinstance(b, nn.Parameter) and b.dim() == 2 and a.dim() > 1 and is_bias:
            return LinearLRP.run(interception, linear_transpose, (a, b, added), {})
        if added is None:
            return super().run(interception, function, args, kwargs)
        with interception:
            return beta * added + alpha * (a @ b)


ADDING = named("addmm", "baddbmm")
FACTORS = ("mat1", "batch1", "mat2", "batch2", "other")


def linear_transpose(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with weights (inputs, outputs)."""
    return F.linear(a, weight.T, bias)


class DivisionLRP(LRPLayer):
    """Division: the dividend gets it all, as if the divisor were a constant."""

    functions = named("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        divisor = kwargs.get("other", args[1] if len(args) > 1 else None)
        divided = interception.carries(divisor) or interception.divides(divisor)
        if not divided or not interception.listens():
            return function(*args, **kwargs)

        def portion(operand: Tensor) -> Tensor:
            return Portion.apply(operand, 0.0, interception.phase, None) if operand is divisor else operand

        return _out_of_place(interception, function, args, kwargs, lambda given: mapped(given, portion))


class UnitLengthLRP(LRPLayer):
    """Division by the length, as of queries and keys in cosine attention, written out in operations with LRP layers."""

    functions = named("normalize")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the parts of `function`."""
        given = _arguments(function, args, kwargs)
        if given["out"] is not None or not interception.listens():
            return function(*args, **kwargs)
        x = given["input"]
        with interception:
            return x / x.norm(given["p"], given["dim"], keepdim=True).clamp_min(given["eps"])


class GatedLRP(LRPLayer):
    """The gated linear unit: one half of the channels times the sigmoid of the other, a product of two factors."""

    functions = named("glu")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the parts of `function`."""
        if not interception.listens():
            return function(*args, **kwargs)
        given = _arguments(function, args, kwargs)
        with interception:
            x, gate = given["input"].chunk(2, given["dim"])
            return x * gate.sigmoid()


class ReciprocalLRP(LRPLayer):
    """Reciprocals, also of roots: what multiplies by one divides, and a divisor gets nothing."""

    functions = named("reciprocal", "rsqrt", "__rtruediv__", "__rdiv__")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        if interception.listens() and any(map(interception.carries, tensors_in(*args, *kwargs.values()))):
            interception.divide(z, repr(getattr(function, "__name__", function)))
        return z


class SoftmaxLRP(LRPLayer):
    """Softmax: gradient times input, the first order of its Taylor series (AttnLRP); the rest is booked as a bias."""

    functions = named("softmax", "log_softmax")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        if not interception.account:
            return function(*args, **kwargs)
        return _measured(cls, interception, function, args, kwargs)


class AttentionLRP(LRPLayer):
    """Attention by scaled dot products: the rules of its two products and of softmax, in PyTorch's fused operation.

    The values get half of the relevance and the weights the other half, which the scores pass on to queries and keys,
    a quarter each. All the ways between are gradients, so portions of the operands' gradients are all there is to it.
    """

    functions = named("scaled_dot_product_attention")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        if not interception.listens():
            return function(*args, **kwargs)
        operands = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        scored = [name for name in ("query", "key") if interception.carries(operands[name])]
        weighed = interception.carries(operands["value"])
        ways = (1 if scored else 0) + (1 if weighed else 0)
        shares = {name: 1 / ways / len(scored) for name in scored} | ({"value": 1 / ways} if weighed else {})
        measured = Measured(interception.within("attention"), cls, interception.phase) if interception.account else None
        for name, share in shares.items():
            operands[name] = Portion.apply(operands[name], share, interception.phase, measured)
        z = function(*(operands.pop(name) for name in ("query", "key", "value")), *args[3:], **operands)
        if measured is not None and shares:
            interception.add(measured, z)
        return z


class MultiheadAttentionLRP(LRPLayer):
    """Multi-head attention, written out in operations that have LRP layers."""

    functions = named("multi_head_attention_forward")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the parts of `function`, which gives (output, weights or None) as `function` does."""
        if not interception.listens():
            return function(*args, **kwargs)
        bound = _signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name in ("bias_k", "bias_v", "static_k", "static_v"):
            if given[name] is not None:
                raise UnsupportedLayer(
                    f"{interception.running!r} uses attention with {name}, which LRP has no rule for"
                )
        if given["add_zero_attn"]:
            raise UnsupportedLayer(
                f"{interception.running!r} uses attention with add_zero_attn, which LRP cannot follow"
            )
        with interception:
            return cls._forward(given)

    @classmethod
    def _forward(cls, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        query, key, value = given["query"], given["key"], given["value"]
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        heads = given["num_heads"]
        length, batch, width = query.shape
        if given["use_separate_proj_weight"]:
            weights = [given[f"{name}_proj_weight"] for name in "qkv"]
        elif given["query"] is given["key"] is given["value"]:
            weights = [given["in_proj_weight"]]
        else:
            weights = list(given["in_proj_weight"].chunk(3))
        biases: Sequence[Any] = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
        if len(weights) == 1:
            projected = F.linear(query, weights[0], given["in_proj_bias"]).chunk(3, -1)
        else:
            operands = zip((query, key, value), weights, biases, strict=True)
            projected = tuple(F.linear(tensor, weight, bias) for tensor, weight, bias in operands)
        # (length, batch, width) -> (batch, heads, length, width of a head)
        q, k, v = (t.reshape(t.shape[0], batch, heads, -1).permute(1, 2, 0, 3) for t in projected)
        mask = cls._mask(given, q, k)
        dropout = given["dropout_p"] if given["training"] else 0.0
        weights_of_heads = None
        if given["need_weights"]:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights_of_heads = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights_of_heads, dropout) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
        out = F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
        if weights_of_heads is not None and given["average_attn_weights"]:
            weights_of_heads = weights_of_heads.mean(1)
        if not batched:
            out = out.squeeze(1)
            weights_of_heads = None if weights_of_heads is None else weights_of_heads.squeeze(0)
        return out, weights_of_heads

    @staticmethod
    def _mask(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that adds to the scores (batch, heads, queries, keys)."""
        mask: Tensor | None = None
        for name in ("attn_mask", "key_padding_mask"):
            one = given[name]
            if one is None:
                continue
            if one.dtype == torch.bool:
                one = torch.zeros_like(one, dtype=q.dtype).masked_fill(one, -torch.inf)
            if name == "key_padding_mask":
                one = one.reshape(-1, 1, 1, k.shape[-2])
            elif one.dim() == 3:
                one = one.reshape(q.shape[0], -1, *one.shape[1:])
            mask = one if mask is None else mask + one
        return mask


class Normalisation(Record):
    """The record of ``z = weight (x - mean) / deviation + bias``, the deviation taken as a constant.

    Args:
        x: the input.
        weight: in a shape that multiplies ``x``, or None.
        shape, dims: mean and deviation are those over `dims` of ``x`` in this `shape`.
        epsilon: what the variance has added to it.
        centred: whether the mean is subtracted.
    """

    def __init__(
        self,
        path: str,
        layer: type[LRPLayer],
        phase: Phase,
        x: Kept,
        weight: Tensor | None,
        shape: tuple[int, ...],
        dims: tuple[int, ...],
        epsilon: float,
        centred: bool,
    ) -> None:
        super().__init__(path, layer, phase)
        self.x, self.weight, self.shape, self.dims = x, weight, shape, dims
        self.epsilon, self.centred = epsilon, centred

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of ``z`` had the deviation been a constant."""
        x = self.x.value.reshape(self.shape)
        squares = (x - x.mean(self.dims, keepdim=True)).square_() if self.centred else x.square()
        inverse = (squares.mean(self.dims, keepdim=True) + self.epsilon).rsqrt()
        if self.weight is None:
            s = d.reshape(self.shape) * inverse
        else:
            s = (d * self.weight).reshape(self.shape).mul_(inverse)
        if self.centred:
            s = s.sub_(s.mean(self.dims, keepdim=True))
        return None, s.reshape(d.shape)


class NormalisationLRP(LRPLayer):
    """Layer, group, instance and RMS norm: what divides by the deviation takes no part (AttnLRP, section 3.3.2)."""

    functions = named("layer_norm", "group_norm", "instance_norm", "rms_norm")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        if not (z.requires_grad and interception.listens()):
            return z
        given = _arguments(function, args, kwargs)
        of_batch = given.get("training", given.get("use_input_stats", True))
        if of_batch or given.get("running_mean") is None:
            return cls.forked(interception, given, z)
        return BatchNormLRP.fixed(interception, given, z)  # instance norm, too, may have statistics from training

    @classmethod
    def forked(cls, interception: Interception, given: dict[str, Any], z: Tensor) -> Tensor:
        """`z`, the output of a function called with `given`, with a way of its own for relevance."""
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        path = interception.path_of(weight)
        shape, dims = tuple(x.shape), tuple(range(2, x.dim()))
        if "normalized_shape" in given:
            dims = tuple(range(x.dim() - len(given["normalized_shape"]), x.dim()))
        else:
            weight, bias = (None if v is None else v.view(-1, *[1] * (x.dim() - 2)) for v in (weight, bias))
            if "num_groups" in given:
                shape, dims = (len(x), given["num_groups"], -1), (2,)
            elif "training" in given:
                dims = (0, *dims)
        record = Normalisation(
            path,
            cls,
            interception.phase,
            interception.keep(x, path),
            None if weight is None else weight.detach(),
            shape,
            dims,
            torch.finfo(x.dtype).eps if given["eps"] is None else given["eps"],
            centred=given["function"] != "rms_norm",
        )
        record.bias = None if bias is None else bias.detach()
        z = Fork.apply(z, x, record)
        interception.add(record, z)
        return z


class BatchNormLRP(NormalisationLRP):
    """Batch norm: a fixed affine map in eval mode, and in training one whose deviation is taken as a constant.

    In eval mode, right after an affine layer whose rule is not LRP-0, both are explained as the one layer they are.
    """

    functions = named("batch_norm")

    @classmethod
    def fixed(cls, interception: Interception, given: dict[str, Any], z: Tensor) -> Tensor:
        """`z`, the output of a function called with `given` whose statistics are fixed."""
        if not interception.explains:
            return z
        x, weight, bias = given["input"], given["weight"], given["bias"]
        scale = (given["running_var"] + given["eps"]).rsqrt()
        scale = scale if weight is None else scale * weight.detach()
        shift = -given["running_mean"] * scale
        shift = shift if bias is None else shift + bias.detach()
        place, a = interception.affine.get(x.grad_fn, (-1, x))
        below = interception.records[place] if place >= 0 else None
        if isinstance(below, Affine) and below.can_be_scaled:
            merged = below.scaled(scale, shift)
            if merged.a is not None:
                z = Fork.apply(z, a, merged)
            interception.replace(place, merged, z)
            return z
        if interception.account:
            record = Record(interception.path_of(weight), cls, interception.phase)
            record.bias = shift.view(-1, *[1] * (x.dim() - 2))
            interception.add(record, z)
        return z


def _measured(
    layer: type[LRPLayer], interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls `function`; what does not arrive at its operands is booked as its bias."""
    name = getattr(function, "__name__", "operation")
    measured = Measured(interception.within(name), layer, interception.phase)

    def portion(operand: Tensor) -> Tensor:
        return Portion.apply(operand, 1.0, interception.phase, measured) if interception.carries(operand) else operand

    z = function(*mapped(args, portion), **mapped(kwargs, portion))
    if z.requires_grad:
        interception.add(measured, z)
    return z


def _out_of_place(
    interception: Interception,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prepare: Callable[[Any], Any] = lambda given: given,
    fork: Callable[[Tensor], Tensor] = lambda z: z,
) -> Any:
    """Calls `function` on prepared operands and forks its output; where it writes in place, that is done at the end."""
    position = operation(function).inplace
    if not writes_in_place(position, args, kwargs):
        return fork(function(*prepare(args), **prepare(kwargs)))
    target = args[0] if args else kwargs["input"]
    if position == -1:
        function = getattr(torch, function.__name__.strip("_").removeprefix("i"))  # mul_ and __imul__ alike
    else:
        args, kwargs = args[:position], {name: value for name, value in kwargs.items() if name != "inplace"}
    original = target.clone()  # which the backward pass of `function` may need
    args, kwargs = (mapped(given, lambda t: original if t is target else t) for given in (args, kwargs))
    z = fork(function(*prepare(args), **prepare(kwargs)))
    interception.keep_what_is_written_over([target])
    return target.copy_(z)


def _total(relevance: Tensor) -> float:
    """The sum in float64; where nothing is passed on by what is infinite, as by a masked score, that is nothing."""
    return relevance.double().nan_to_num(0.0).sum().item()


_signature = functools.cache(inspect.signature)


def _arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `function` was called with, by name, its defaults among it; its own name as ``"function"``."""
    bound = _signature(getattr(F, function.__name__)).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments | {"function": function.__name__}


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], tuple[Any, ...], dict[str, Any]]:
    """Input, weight and bias of an affine function, and what else it was called with."""
    if len(args) >= 3:
        return args[:3], args[3:], kwargs
    named = dict(kwargs)
    missing = ("input", "weight", "bias")[len(args) :]
    return [*args[:3], *(named.pop(name, None) for name in missing)], args[3:], named
