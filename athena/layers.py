"""The LRP layers, and how a PyTorch operation becomes one.

Relevance is a modified gradient: written as ``R = z d``, LRP sends ``d`` down through a network as autograd sends a
gradient. Most operations pass ``d`` on just as they pass the gradient. An affine layer first changes it by its rule:

    d  ->  d z / (z' + epsilon sign z')        and then down through        z' = W' a + b'

Both ways down live in one autograd node, `Fork`. `Interception` sees every operation of a forward pass, whether a
module or a function makes it, and looks its LRP layer up in `LAYERS`. Parameters, modules and the user's code stay
as they are. Not here: what relevance to start from (`athena.relevance`), what to do with it (`athena.guidance`).
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from athena.rules import Rule, Zero

__all__ = [
    "AdditionLRP",
    "AveragePoolingLRP",
    "ConvolutionalLRP",
    "DropoutLRP",
    "FlattenLRP",
    "Interception",
    "LinearLRP",
    "MaxPoolingLRP",
    "ReLULRP",
    "Record",
    "UnsupportedLayer",
    "stabilised",
]


class UnsupportedLayer(TypeError):
    """Relevance reached an operation it cannot pass through; the message names the module path and the operation."""


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """``z + epsilon sign z`` with sign 0 = 1. For epsilon 0 it is the smallest normal number, so that 0 / 0 is 0."""
    return z + torch.full_like(z, epsilon or torch.finfo(z.dtype).tiny).copysign_(z)


class Phase:
    """Which way gradients travel through one forward graph just now: as relevance, or as ordinary gradients."""

    relevance = False


class Record:
    """What a layer with weights or constants leaves behind in a forward pass. It holds no graph that could outlive it.

    Attributes:
        path: the module path, ``"features.0"``; a second use of the same weights is ``"features.0#2"``.
        layer: the LRP layer, a class of this module.
        rule: the layer's rule.
        z: the output, without graph.
        modified: ``z'`` where the rule has weights of its own, else None.
        bias: ``b'``, in a shape that adds to ``z``, or None.
        scale: what guidance does to a gradient that reaches ``z``; None to leave it alone.
    """

    def __init__(
        self, path: str, layer: type, rule: Rule, phase: Phase, modified: Tensor | None, bias: Tensor | None
    ) -> None:
        self.path, self.layer, self.rule, self.phase = path, layer, rule, phase
        self.modified = None if modified is None else modified.detach()
        self.bias = bias
        self.scale: Callable[[Tensor], Tensor] | None = None

    def watch(self, z: Tensor) -> None:
        """Remembers `z`, which shares its memory with the network's own tensor, and the state it is in."""
        self.z = z.detach()
        self._version = z._version

    def keep(self) -> None:
        """Copies `z` before the network writes over it."""
        self.watch(self.z.clone())

    def check(self) -> None:
        """Raises `UnsupportedLayer` where `z` was written over without being seen."""
        if self.z._version != self._version:
            raise UnsupportedLayer(
                f"the output of {self.path!r} was changed in place in a way LRP cannot follow; change it out of place"
            )

    def share(self, d: Tensor) -> Tensor:
        """``d z / (z' + epsilon sign z')``: what goes on down through ``z'``."""
        if self.modified is not None:
            return d * self.z / stabilised(self.modified, self.rule.stabiliser)
        if self.rule.stabiliser == 0:
            return d
        size = self.z.abs()
        return (d * size).div_(size.add_(self.rule.stabiliser))

    def absorbed(self, d: Tensor) -> tuple[float, float]:
        """The relevance that the bias and the stabiliser keep, summed in float64, when ``d`` comes down to `z`."""
        shared = self.share(d).double()
        z = (self.z if self.modified is None else self.modified).double()
        bias = 0.0 if self.bias is None else (self.bias.double() * shared).sum().item()
        return bias, ((self.z.double() * d.double()).sum() - (z * shared).sum()).item()


class Fork(torch.autograd.Function):
    """The identity on ``z``, with two ways down: relevance into ``z'`` by the layer's rule, gradients into ``z``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, modified: Tensor | None, record: Record) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return z.data  # not a view of z, which the network could not change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        record: Record = ctx.record
        if gradient is None:
            return None, None, None
        if not record.phase.relevance:
            return gradient if record.scale is None else record.scale(gradient), None, None
        d = record.share(gradient)
        return (d, None, None) if record.modified is None else (None, d, None)


class Paths:
    """The module paths of a model and its parameters, read again when it shows a parameter that is new.

    Raises:
        UnsupportedLayer: the model, or a part of it, is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read()

    def read(self) -> None:
        """Looks through the model."""
        self.modules = dict(self.model.named_modules())
        if any(hasattr(module, "_orig_mod") for module in self.modules.values()):
            raise UnsupportedLayer("torch.compile hides what a model does from LRP; give the model before compilation")
        self.of_module = {id(module): path for path, module in self.modules.items()}
        self._parameters = {id(weight): (weight, path) for path, weight in self.model.named_parameters()}

    def of_layer(self, weight: Tensor) -> str | None:
        """The path of the layer that owns `weight`; None where it is no parameter of the model."""
        if id(weight) not in self._parameters and isinstance(weight, nn.Parameter):
            self.read()
        owner, path = self._parameters.get(id(weight), (None, ""))
        return path.removesuffix(".weight") if owner is weight else None


UNSEEN = "what was made out of LRP's sight ({})"


class Interception(TorchFunctionMode):
    """A context for one forward pass of a model, in which its operations are LRP layers.

    Args:
        paths: of the model.
        rule_for: from the path and the module of an affine layer to its rule.
        guided: from the path and the LRP layer to whether its gradient is going to be scaled. Layers that run before
            the first of these get no relevance and are left alone. None where relevance itself is wanted, and no
            weight gradients.

    Attributes:
        phase: shared by everything this pass leaves behind.
        records: what the affine layers (and constants added) left behind, in forward order.
        edges: the place of each record's `z` in the graph.
    """

    def __init__(
        self,
        paths: Paths,
        rule_for: Callable[[str, nn.Module], Rule],
        guided: Callable[[str, type], bool] | None = None,
    ) -> None:
        super().__init__()
        self.paths, self.rule_for, self.guided = paths, rule_for, guided
        self.phase = Phase()
        self.records: list[Record] = []
        self.edges: list[GradientEdge] = []
        self._known: set[Any] = {None}
        self._alive: list[Tensor] = []  # the edges are valid as long as these are

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = (*args, *kwargs.values())
        if self.records and _writes_in_place(function, args, kwargs):
            self._keep_what_is_written_over(operands)
        self.note(operands)
        layer = LAYERS.get(function)
        if layer is not None:
            out = layer.run(self, function, args, kwargs)
            self.note(out, refused=None)
        else:
            out = function(*args, **kwargs)
            self.note(out, refused=repr(getattr(function, "__name__", function)))
        return out

    @property
    def running(self) -> str:
        """The path of the innermost module on Python's stack; empty for the model itself."""
        frame = inspect.currentframe()
        while frame is not None:
            path = self.paths.of_module.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return ""

    def rule(self, path: str) -> Rule:
        """The rule of the affine layer at `path`."""
        return self.rule_for(path, self.paths.modules.get(path, self.paths.model))

    def add(self, record: Record, z: Tensor) -> None:
        """Takes `z`, the output of a layer, into the account."""
        record.watch(z)
        uses = sum(known.path.partition("#")[0] == record.path for known in self.records)
        record.path += f"#{uses + 1}" if uses else ""
        self.records.append(record)
        node: Any = z.grad_fn
        self.edges.append(GradientEdge(node, z.output_nr))
        self._alive.append(z)

    def listens(self, guided: bool = False) -> bool:
        """Whether relevance may come down to the operation that runs now."""
        return self.guided is None or guided or bool(self.records)

    def _keep_what_is_written_over(self, value: Any) -> None:
        memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)}
        for record in self.records:
            if record.z.untyped_storage().data_ptr() in memory:
                record.keep()

    def note(self, value: Any, refused: str | None = UNSEEN) -> None:
        """Lets relevance pass where `value` was made, or has it refused there.

        Tensors whose making was not seen come to light here too, as what a later operation is called with or the model
        returns. They come from custom autograd functions, scripts and the like, and are refused.
        """
        if isinstance(value, Tensor):
            node: Any = value.grad_fn
            if node not in self._known:
                self._known.add(node)
                if refused is not None:
                    node.register_prehook(self._refusal(refused.format(node.name())))
        elif isinstance(value, tuple | list):
            for item in value:
                self.note(item, refused)

    def _refusal(self, what: str) -> Callable[[Any], None]:
        phase, where = self.phase, self.running or type(self.paths.model).__name__

        def refuse(gradients: Any) -> None:
            if phase.relevance:
                raise UnsupportedLayer(f"{where!r} uses {what}, and LRP has no rule to pass relevance through it")

        return refuse


class GradientLRP:
    """Operations through which relevance passes as the gradient does, so that its sum stays the same."""

    functions: tuple[Any, ...] = ()

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` as the network does."""
        return function(*args, **kwargs)


class MaxPoolingLRP(GradientLRP):
    """Max pooling: the winner takes all (thesis 3.6.4)."""

    functions = (
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices),
        *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    )


class AveragePoolingLRP(GradientLRP):
    """Average pooling: a linear layer with equal weights."""

    functions = (
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    )


class ReLULRP(GradientLRP):
    """ReLU: ``f(z) / z`` is its derivative, so the identity rule and the gradient agree."""

    functions = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class FlattenLRP(GradientLRP):
    """Flatten and its kin, which only rearrange what they are given."""

    functions = (
        *(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.view_as),
        *(Tensor.unflatten, Tensor.contiguous, Tensor.clone, Tensor.to),
    )


class DropoutLRP(GradientLRP):
    """Dropout: a linear layer whose weights were drawn."""

    functions = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)


class AdditionLRP(GradientLRP):
    """Addition, as in a residual connection: each summand gets its share. A constant summand keeps it, like a bias."""

    functions = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` and takes a constant summand into the account."""
        z = function(*args, **kwargs)
        alpha = kwargs.get("alpha", 1)
        summands = (*args, *(kwargs[name] for name in ("input", "other") if name in kwargs))
        constants = [
            weight * summand
            for weight, summand in zip((1, alpha), summands, strict=True)
            if not isinstance(summand, Tensor)
            or not summand.requires_grad
            or interception.paths.of_layer(summand) is not None
        ]
        if len(constants) != 1 or not (z.requires_grad and interception.listens()):
            return z
        constant = torch.as_tensor(constants[0], dtype=z.dtype, device=z.device)
        path = f"{interception.running}.add".removeprefix(".")
        interception.add(Record(path, cls, Zero(), interception.phase, None, constant), z)
        return z


class AffineLRP:
    """Layers ``z = W a + b``: relevance takes the way of the layer's rule (thesis 3.6.2)."""

    functions: tuple[Any, ...] = ()

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Calls `function`, and once more with the weights of the rule where it has its own; gives its output."""
        (x, weight, bias), rest, named = _operands(args, kwargs)
        path = interception.paths.of_layer(weight)
        path = interception.running if path is None else path
        guided = interception.guided is not None and interception.guided(path, cls)
        if interception.guided is None:  # without weight gradients there is nothing to keep for them
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        z: Tensor = function(x, weight, bias, *rest, **named)
        if not (z.requires_grad and interception.listens(guided)):
            return z

        rule, modified = interception.rule(path), None
        own_weight = rule.weights(weight)
        if own_weight is not None:
            bias = None if bias is None else rule.weights(bias)
            modified = function(x, own_weight, bias, *rest, **named)
        if bias is not None and interception.guided is None:  # the account of an explanation names what it takes
            shape = [1] * z.dim()
            shape[1 - weight.dim()] = -1
            bias = bias.view(shape)
        record = Record(path, cls, rule, interception.phase, modified, bias)
        if guided or modified is not None or rule.stabiliser:
            z = Fork.apply(z, modified, record)
        interception.add(record, z)
        return z


class LinearLRP(AffineLRP):
    """Fully connected layers (thesis 3.6.4): ``a`` of shape (..., inputs), ``W`` of (outputs, inputs)."""

    functions = (F.linear,)


class ConvolutionalLRP(AffineLRP):
    """Convolutions in one to three dimensions (thesis 3.6.4), any stride, padding, dilation and groups."""

    functions = (F.conv1d, F.conv2d, F.conv3d)


LAYERS: dict[Any, Any] = {
    function: layer
    for layer in (
        *(LinearLRP, ConvolutionalLRP, MaxPoolingLRP, AveragePoolingLRP),
        *(ReLULRP, FlattenLRP, DropoutLRP, AdditionLRP),
    )
    for function in layer.functions
}


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """Input, weight and bias of an affine function, and what else it was called with."""
    named = dict(kwargs)
    missing = ("input", "weight", "bias")[len(args) :]
    return [*args[:3], *(named.pop(name, None) for name in missing)], args[3:], named


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value if isinstance(item, Tensor | tuple | list) for tensor in _tensors(item)]
    return []


def _writes_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.startswith("_")):
        return True
    position = _position_of_inplace(function)
    return bool(position is not None and (kwargs.get("inplace") or args[position : position + 1] == (True,)))


@cache
def _position_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
