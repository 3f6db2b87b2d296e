"""The LRP layers, and how a PyTorch operation becomes one.

Relevance is a modified gradient: written as ``R = z d``, LRP sends ``d`` down through a network as autograd sends a
gradient. Most operations pass ``d`` on just as they pass the gradient. What a layer changes about it:

    affine, by its rule         d  ->  s = d z / (z + epsilon sign z), and then down as the gradient goes; rules with
                                other contributions (`athena.rules`) send it down through sums of their own
    activation f                d  ->  d f(z) / z, which for ReLU is the gradient
    product of n factors        d  ->  1 / n of the gradient to each; to a constant nothing
    layer norm and its kin      the gradient, had the standard deviation been a constant
    softmax, attention          the gradient, products as above (AttnLRP, Achtibat et al. 2024)

Both ways down live in one node of the graph: that of an affine layer itself, with a hook of its record on it, or, where
relevance goes another way than gradients do, a node `Fork` above it. `Interception` sees every operation of a forward
pass, whether a module or a function makes it, and looks its LRP layer up in `LAYERS`. Parameters, modules and the
user's code stay as they are. Not here: what relevance to start from (`athena.relevance`), what to do with it
(`athena.guidance`).
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from athena.rules import Preset, Rule, Shares, Sums, Zero, least

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
    "Interception",
    "LinearLRP",
    "MaxPoolingLRP",
    "NormalisationLRP",
    "ProductLRP",
    "ReLULRP",
    "Record",
    "RuleChoice",
    "SoftmaxLRP",
    "UnsupportedLayer",
    "stabilised",
]


class UnsupportedLayer(TypeError):
    """Relevance reached an operation it cannot pass through; the message names the module path and the operation."""


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """``z + epsilon sign z`` with sign 0 = 1. For epsilon 0 it is the smallest normal number, so that 0 / 0 is 0."""
    return z + torch.full_like(z, epsilon or torch.finfo(z.dtype).tiny).copysign_(z)


def nonzero(z: Tensor) -> Tensor:
    """``z`` with values as good as 0 moved off it, so that ``R = z d`` can hold any ``R``."""
    small = torch.full_like(z, least(z.dtype)).copysign_(z)
    return torch.where(z.abs() < small.abs(), small, z)


# Whether the backward pass that runs now was asked to ``retain_graph``.
_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


class Phase:
    """Which way gradients travel through one forward graph just now, and what relevance looks like there.

    Attributes:
        relevance: as relevance, or as ordinary gradients.
        absolute: whether a rule gives relevance to neurons that are 0; ``R = z d`` is then read with `nonzero`.
    """

    relevance = False
    absolute = False

    def of(self, z: Tensor, d: Tensor) -> Tensor:
        """The relevance ``z d``."""
        return (nonzero(z) if self.absolute else z) * d


class Kept:
    """A tensor of the forward pass, remembered in the state it is in now.

    Attributes:
        rectified: whether it is remembered as the ReLU's output: below 0 nothing comes down, and above it they are the
            same, so that one of them need not stay in memory.
    """

    rectified = False
    _address: int | None

    def __init__(self, tensor: Tensor, path: str) -> None:
        self.path = path
        self.take(tensor)

    def take(self, tensor: Tensor) -> None:
        """Remembers `tensor`, which shares its memory with the network's own."""
        self.value, self._version, self._address = tensor, tensor._version, None

    @property
    def address(self) -> int:
        """Where its memory is, which takes long to ask of a tensor."""
        if self._address is None:
            self._address = _address(self.value)
        return self._address

    def copy(self) -> None:
        """Moves to memory of its own, before the network writes over it."""
        self.take(self.value.detach().clone())

    def check(self) -> None:
        """Raises `UnsupportedLayer` where the tensor was written over without being seen."""
        if self.value._version != self._version:
            raise UnsupportedLayer(
                f"the output of {self.path!r} was changed in place in a way LRP cannot follow; change it out of place"
            )


class Record:
    """What an operation leaves behind in a forward pass.

    In training its `z` has the graph, until `Interception.forget`; elsewhere it loses it with `Interception.check`. A
    node of the graph may hold the record, and what holds one another so is never freed.

    Attributes:
        path: the module path, ``"features.0"``; a second use of the same weights is ``"features.0#2"``.
        layer: the LRP layer, a class of this module.
        z: the output.
        bias: what is added to the output whatever the input is, in a shape that adds to ``z``, or None.
        scale: what guidance does to a gradient that reaches ``z``; None to leave it alone. See `guided`.
    """

    bias: Tensor | None = None
    scale: Callable[[Tensor], Tensor] | None = None

    def __init__(self, path: str, layer: type, phase: Phase) -> None:
        self.path, self.layer, self.phase = path, layer, phase
        self.kept: Kept | None = None

    @property
    def z(self) -> Tensor:
        """The output."""
        assert self.kept is not None
        return self.kept.value

    @property
    def rectified(self) -> bool:
        """Whether `z` is that of the ReLU above, at least 0."""
        return self.kept is not None and self.kept.rectified

    @property
    def stabilises(self) -> bool:
        """Whether it sends on nothing from where `z` is 0."""
        return False

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What relevance goes on into ``z`` itself, and what goes straight to the input it was forked with."""
        return d, None

    def guided(self, gradient: Tensor) -> Tensor:
        """The gradient that goes on into ``z``; what scales it is let go of where the graph frees what it has saved."""
        scale = self.scale
        if scale is None:
            return gradient
        if not _keeps_graph():
            self.scale = None
        return scale(gradient)

    def below(self, d: Tensor, relevance: Tensor | None) -> Tensor | None:
        """The ``d`` of the input, to be worked out under ``no_grad``; None where that is left to the graph.

        `relevance` is that of `z`, where it is known.
        """
        return None

    def attach(self, node: Any) -> None:
        """Has the graph node that made `z` send things down as this record says, where no `Fork` stands above it."""

    def absorbed(self, d: Tensor) -> tuple[float, float]:
        """The relevance that the bias and the stabiliser keep, summed in float64, when ``d`` comes down to `z`."""
        return 0.0 if self.bias is None else (self.bias.double() * d.double()).sum().item(), 0.0


class Fork(torch.autograd.Function):
    """The identity on ``z = f(x)``, with two ways down: relevance as its record says, gradients into ``z``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor | None, record: Record) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return z.data  # not a view of z, which the network could not change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        record: Record = ctx.record
        if gradient is None:
            return None, None, None
        if not record.phase.relevance:
            return record.guided(gradient), None, None
        return *record.down(gradient), None


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


@dataclass(frozen=True)
class RuleChoice:
    """Which rule each affine layer gets: one for all, one by path and module, or one by kind."""

    rule: Rule | Preset | Callable[[str, nn.Module], Rule]

    @property
    def absolute(self) -> bool:
        """Whether a layer above an activation may get a rule that gives relevance to neurons that are 0."""
        if isinstance(self.rule, Preset):
            return self.rule.linear.absolute or self.rule.convolutional.absolute
        return not isinstance(self.rule, Rule) or self.rule.absolute

    def of(self, path: str, module: nn.Module, layer: type, first: Callable[[], bool]) -> Rule:
        """The rule of the layer at `path`; `first` tells whether no other stands below it.

        Raises:
            TypeError: what was given chose something else than a rule.
        """
        if isinstance(self.rule, Rule):
            return self.rule
        if isinstance(self.rule, Preset):
            if self.rule.first is not None and first():
                return self.rule.first
            return self.rule.convolutional if issubclass(layer, ConvolutionalLRP) else self.rule.linear
        chosen = self.rule(path, module)
        if not isinstance(chosen, Rule):
            raise TypeError(f"rule({path!r}, ...) gave {chosen!r}, which is not a rule of athena.rules")
        return chosen


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
        self._parameters = {
            id(weight): (weight, path.removesuffix(".weight")) for path, weight in self.model.named_parameters()
        }

    def of_layer(self, weight: Tensor) -> str | None:
        """The path of the layer that owns `weight`; None where it is no parameter of the model."""
        owner, path = self._parameters.get(id(weight), (None, None))
        if owner is None and isinstance(weight, nn.Parameter):
            self.read()
            owner, path = self._parameters.get(id(weight), (None, None))
        return path if owner is weight else None


UNSEEN = "what was made out of LRP's sight ({})"


class Interception(TorchFunctionMode):
    """A context for one forward pass of a model, in which its operations are LRP layers.

    Args:
        paths: of the model.
        rules: which rule each affine layer gets.
        guided: from the path and the LRP layer to the factor that its gradient is going to be scaled with. Layers that
            run before the first with one that is not 0 get no relevance and are left alone. None where relevance itself
            is wanted, and no weight gradients.
        sources: the tensors to explain, leaves of the graph.

    Attributes:
        phase: shared by everything this pass leaves behind.
        records: what the affine layers (and whatever else absorbs relevance) left behind, in forward order.
        edges: the place of each record's `z` in the graph.
    """

    def __init__(
        self,
        paths: Paths,
        rules: RuleChoice,
        guided: Callable[[str, type], float] | None = None,
        sources: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.paths, self.rules, self.guided, self.sources = paths, rules, guided, sources
        self.absolute = rules.absolute
        self.phase = Phase()
        self.records: list[Record] = []
        self.edges: list[GradientEdge] = []
        self.affine: dict[Any, tuple[int, Tensor]] = {}
        """For the graph node of an affine layer's output its place in `records`, and the layer's input. Layers whose
        weights were themselves computed are not in it."""
        self.passing: set[Any] = set()
        """The graph nodes that pass relevance from their one operand on just as they pass the gradient."""
        # The nodes that relevance is wanted from: of the sources, and of all outputs in the account.
        self._goals: set[Any] = {get_gradient_edge(source).node for source in sources}
        self._uses: dict[str, int] = {}
        self._known: set[Any] = {None}
        self._kept: list[Kept] = []
        # What is kept of the outputs that no operation has read yet, or a ReLU alone, by the node that made them.
        self._fresh: dict[Any, Kept] = {}

    def forget(self) -> None:
        """Lets go of all that is remembered, where no relevance is to come any more; the graph holds on to the rest."""
        for kept in self._kept:
            del kept.value
        self._kept.clear()

    @property
    def explains(self) -> bool:
        """Whether relevance itself is wanted, with its account, and no weight gradients."""
        return self.guided is None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = operation(function)
        layer = known.layer
        if self.guided is not None and not self.records:  # before all that is guided, where no relevance comes
            out = layer.run(self, function, args, kwargs) if layer in AFFINE else function(*args, **kwargs)
            self._known.update(tensor.grad_fn for tensor in tensors_in(out))
            return out
        operands = tensors_in(*args, *kwargs.values())
        rectified = self.note(operands, known.rectifies)
        if known.inplace is not None and self._kept and _writes_in_place(known.inplace, args, kwargs):
            self.keep_what_is_written_over(operands, rectified)
        if layer is None:
            out = function(*args, **kwargs)
            for tensor in tensors_in(out):
                if tensor.grad_fn not in self._known:
                    self._refuse(tensor.grad_fn, repr(getattr(function, "__name__", function)))
            return out
        out = layer.run(self, function, args, kwargs)
        if rectified is not None:
            rectified.take(out)
            rectified.rectified = True
        if isinstance(out, Tensor):
            self._known.add(out.grad_fn)
            if known.passes and not self.absolute:
                self.passing.add(out.grad_fn)
        else:
            self._known.update(tensor.grad_fn for tensor in tensors_in(out))
        return out

    @property
    def running(self) -> str:
        """The path of the innermost module on Python's stack; empty for the model itself."""
        # Not this frame: its locals would hold it, and it all that the forward pass has made.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = self.paths.of_module.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return ""

    def within(self, name: str) -> str:
        """The path of what is no module, `name`, within the module that runs now."""
        return f"{self.running}.{name}".removeprefix(".")

    def rule(self, path: str, layer: type, a: Tensor) -> Rule:
        """The rule of the affine layer at `path` with the input `a`."""
        if isinstance(self.rules.rule, Rule):
            return self.rules.rule
        module = self.paths.modules.get(path, self.paths.model)
        return self.rules.of(path, module, layer, lambda: not self._stands_on(a, {edge.node for edge in self.edges}))

    def carries(self, value: Any) -> bool:
        """Whether `value` is a tensor through which relevance can come down to the input or to a guided layer."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        return any(value is source for source in self.sources) or self._stands_on(value, self._goals)

    @staticmethod
    def _stands_on(tensor: Tensor, goals: set[Any]) -> bool:
        """Whether one of the graph nodes `goals` took part in making `tensor`."""
        seen: set[Any] = {None}
        ahead: list[Any] = [tensor.grad_fn]
        while ahead:
            node = ahead.pop()
            if node in goals:
                return True
            if node not in seen:
                seen.add(node)
                ahead.extend(below for below, _ in node.next_functions)
        return False

    def keep(self, tensor: Tensor, path: str) -> Kept:
        """Remembers `tensor` as it is now, without its graph."""
        return self._remember(tensor.detach(), path)

    def _remember(self, tensor: Tensor, path: str) -> Kept:
        kept = Kept(tensor, path)
        self._kept.append(kept)
        return kept

    def add(self, record: Record, z: Tensor) -> None:
        """Takes `z`, the output of an operation, into the account."""
        uses = self._uses[record.path] = self._uses.get(record.path, 0) + 1
        if uses > 1:
            record.path += f"#{uses}"
        self.records.append(record)
        self.edges.append(self._followed(record, z))

    def record_of(self, node: Any) -> Record | None:
        """The record of the affine layer whose output the graph node made."""
        place, _ = self.affine.get(node, (None, None))
        return None if place is None else self.records[place]

    def replace(self, place: int, record: Record, z: Tensor) -> None:
        """Puts another record with its output `z` in the place of one in `records`."""
        record.path = self.records[place].path
        self.records[place], self.edges[place] = record, self._followed(record, z)

    def _followed(self, record: Record, z: Tensor) -> GradientEdge:
        """The place of `z` in the graph, after `record` has kept it."""
        node: Any = z.grad_fn
        self._goals.add(node)
        record.kept = self._fresh[node] = self._remember(z, record.path)
        return GradientEdge(node, z.output_nr)

    def listens(self) -> bool:
        """Whether relevance may come down to the operation that runs now."""
        return self.guided is None or bool(self.records)

    def check(self) -> None:
        """Raises `UnsupportedLayer` where something that relevance needs was written over without being seen.

        Where relevance itself is wanted, which holds on to records, these let go of the graph.
        """
        for kept in self._kept:
            kept.check()
            if self.explains:
                kept.value = kept.value.detach()

    def keep_what_is_written_over(self, tensors: Sequence[Tensor], rectified: Kept | None = None) -> None:
        """Copies what is remembered of `tensors`, but for `rectified`, before they are written to."""
        written = {_address(tensor) for tensor in tensors}
        for kept in self._kept:
            if kept is not rectified and kept.address in written:
                kept.copy()

    def note(self, tensors: Sequence[Tensor], rectifies: bool = False) -> Kept | None:
        """Takes note that `tensors` are read, by a ReLU (`rectifies`) or anything else.

        Tensors whose making was not seen come to light here, as what an operation is called with or the model returns.
        They come from custom autograd functions, scripts and the like, and are refused.

        Returns:
            What is kept of one of them that may be remembered as the ReLU's output.
        """
        found: Kept | None = None
        for tensor in tensors:
            node: Any = tensor.grad_fn
            if node is None:
                continue
            kept = self._fresh.get(node)
            if kept is not None:
                if rectifies and not self.absolute and not kept.rectified:
                    found = kept
                else:
                    del self._fresh[node]
                    if kept.rectified:  # it seemed that a ReLU alone reads it
                        kept.take(tensor)
                        kept.rectified = False
            if node not in self._known:
                self._refuse(node, UNSEEN.format(node.name()))
        return found

    def _refuse(self, node: Any, what: str) -> None:
        """Lets no relevance pass through a graph node."""
        self._known.add(node)
        node.register_prehook(self._refusal(what))

    def _refusal(self, what: str) -> Callable[[Any], None]:
        phase, where = self.phase, self.running or type(self.paths.model).__name__

        def refuse(gradients: Any) -> None:
            if phase.relevance and any(gradient is not None for gradient in gradients):
                raise UnsupportedLayer(f"{where!r} uses {what}, and LRP has no rule to pass relevance through it")

        return refuse


def named(*names: str) -> tuple[Any, ...]:
    """The functions of PyTorch by these names, wherever they stand."""
    homes = (torch, Tensor, F, torch.special, torch._C._nn)
    return tuple(getattr(home, name) for name in names for home in homes if callable(getattr(home, name, None)))


class GradientLRP:
    """Operations through which relevance passes as the gradient does, so that its sum stays the same."""

    functions: tuple[Any, ...] = ()

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` as the network does."""
        return function(*args, **kwargs)


class MaxPoolingLRP(GradientLRP):
    """Max pooling and other maxima: the winner takes all (thesis 3.6.4)."""

    functions = (
        *named("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *named("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *named("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d"),
        *named("adaptive_max_pool3d_with_indices", "amax", "max"),
    )


class AveragePoolingLRP(GradientLRP):
    """Average pooling, means and sums, up-sampling: linear layers with fixed weights and no bias."""

    functions = (
        *named("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean", "neg", "negative", "__neg__"),
        *named("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *named("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"),
    )


class FlattenLRP(GradientLRP):
    """Flatten and its kin, which only rearrange, pick from or repeat what they are given."""

    functions = (
        *named("flatten", "reshape", "view", "view_as", "unflatten", "contiguous", "clone", "to", "type_as", "float"),
        *named("double", "half", "bfloat16", "cpu", "cuda", "squeeze", "unsqueeze", "transpose", "swapaxes", "t"),
        *named("swapdims", "permute", "movedim", "moveaxis", "expand", "expand_as", "broadcast_to", "repeat", "tile"),
        *named("repeat_interleave", "roll", "flip", "select", "narrow", "chunk", "split", "tensor_split", "unbind"),
        *named("unfold", "fold", "gather", "index_select", "take_along_dim", "pixel_shuffle", "pixel_unshuffle"),
        *named("channel_shuffle", "diagonal", "__getitem__", "ravel", "rot90"),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "data")),
    )


class DropoutLRP(GradientLRP):
    """Dropout: a linear layer whose weights were drawn."""

    functions = named(
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
        "feature_alpha_dropout",
    )


class ConcatenationLRP:
    """Concatenation, stacking, selection by a mask and padding: each gets back its own. What is constant keeps it."""

    functions = named(
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "where", "masked_fill", "pad"),
    )

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`, and takes the account of its constants where relevance is explained."""
        parts = tensors_in(*args, *kwargs.values())
        constant = function in PADDING and not (kwargs.get("value") or (len(args) > 3 and args[3]))
        constant = not constant and (function in FILLING or any(not interception.carries(part) for part in parts))
        if not (constant and interception.explains):
            return function(*args, **kwargs)
        return _measured(cls, interception, function, args, kwargs)


PADDING = named("pad")
FILLING = (*PADDING, *named("where", "masked_fill"))


class Sum(Record):
    """The record of a sum of `terms` tensors or elements. Not one of `Interception.records`."""

    def __init__(self, path: str, layer: type, phase: Phase, terms: float) -> None:
        super().__init__(path, layer, phase)
        self.terms = terms

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient; where all terms are 0, each gets an equal part of what an absolute rule has sent there."""
        return (torch.where(self.z == 0, d / self.terms, d) if self.phase.absolute else d), None

    @classmethod
    def fork(cls, interception: Interception, layer: type, z: Tensor, terms: float) -> Tensor:
        """`z`, a sum of `terms`, as relevance has to find it."""
        if not (interception.absolute and interception.listens() and terms > 1 and z.requires_grad):
            return z
        record = cls(interception.within("sum"), layer, interception.phase, terms)
        record.kept = interception.keep(z, record.path)
        z = Fork.apply(z, None, record)
        record.kept.take(z.detach())
        return z


class ReductionLRP:
    """Sums over a dimension: each element gets its share."""

    functions = named("sum")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        return Sum.fork(interception, cls, z, x.numel() / max(z.numel(), 1))


class AdditionLRP:
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
        if interception.explains and any(borne):
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


class ProductLRP:
    """Products, of elements or of matrices: each factor through which relevance can come gets an equal part.

    Constant factors get none, so that there is one bearer as in a linear layer. (AttnLRP's uniform rule, proposition
    3.3 of Achtibat et al. 2024.)
    """

    functions = (
        *named("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "__rmatmul__"),
        *named("mm", "bmm", "mv", "dot", "inner", "einsum"),
    )

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        factors = [factor for factor in tensors_in(*args, *kwargs.values()) if interception.carries(factor)]
        if len(factors) < 2 or not interception.listens():
            return function(*args, **kwargs)
        share, measured = 1 / len(factors), None
        if interception.explains and interception.absolute:  # no factor can bear what was sent to a product of 0
            measured = Measured(interception.within("product"), cls, interception.phase)

        def portion(factor: Tensor) -> Tensor:
            if not interception.carries(factor):
                return factor
            return Portion.apply(factor, share, interception.phase, measured)

        def fork(z: Tensor) -> Tensor:
            if measured is not None:
                interception.add(measured, z)
            return z

        return _out_of_place(interception, function, args, kwargs, lambda given: mapped(given, portion), fork)


class DivisionLRP:
    """Division: the dividend gets it all, as if the divisor were a constant."""

    functions = named("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        divisor = kwargs.get("other", args[1] if len(args) > 1 else None)
        if not interception.carries(divisor) or not interception.listens():
            return function(*args, **kwargs)

        def portion(operand: Tensor) -> Tensor:
            return Portion.apply(operand, 0.0, interception.phase, None) if operand is divisor else operand

        return _out_of_place(interception, function, args, kwargs, lambda given: mapped(given, portion))


class ReLULRP:
    """ReLU and what else is linear on both sides of 0: ``f(z) / z`` is the derivative, so relevance is a gradient.

    Only where a rule gives relevance to neurons that are 0 does the identity rule have to be written out.
    """

    functions = named("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_")

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


class ActivationLRP:
    """Element-wise activations: relevance goes on unchanged, ``d f(z) / z`` (identity rule).

    Where ``f(0)`` is not 0, as for the sigmoid, a ``z`` of exactly 0 can bear none, and ``f(0)`` keeps it like a bias.
    """

    functions = named(
        *("gelu", "silu", "silu_", "elu", "elu_", "celu", "celu_", "selu", "selu_", "mish", "mish_", "hardswish"),
        *("hardswish_", "hardtanh", "hardtanh_", "relu6", "hardsigmoid", "hardsigmoid_", "sigmoid", "sigmoid_", "tanh"),
        *("tanh_", "softplus", "logsigmoid", "softsign", "tanhshrink", "softshrink", "hardshrink", "expit"),
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
        x = args[0] if args else kwargs["input"]
        if not (x.requires_grad and interception.listens()):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", type(function).__name__).strip("_")

        def fork(z: Tensor) -> Tensor:
            path = interception.within(name)
            measured = None
            if interception.explains and name in ("hardsigmoid", "sigmoid", "softplus", "logsigmoid", "expit"):
                measured = Measured(path, cls, interception.phase)
            kept = interception.keep(x, path), interception.keep(z, path)
            z = Fork.apply(z, x, Activation(path, interception.phase, *kept, only_absolute, measured))
            if measured is not None:
                interception.add(measured, z)
            return z

        return _out_of_place(interception, function, args, kwargs, fork=fork)


class SoftmaxLRP:
    """Softmax: gradient times input, the first order of its Taylor series (AttnLRP); the rest is booked as a bias."""

    functions = named("softmax", "log_softmax")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        if not interception.explains:
            return function(*args, **kwargs)
        return _measured(cls, interception, function, args, kwargs)


class AttentionLRP:
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
        measured = (
            Measured(interception.within("attention"), cls, interception.phase) if interception.explains else None
        )
        for name, share in shares.items():
            operands[name] = Portion.apply(operands[name], share, interception.phase, measured)
        z = function(*(operands.pop(name) for name in ("query", "key", "value")), *args[3:], **operands)
        if measured is not None and shares:
            interception.add(measured, z)
        return z


class MultiheadAttentionLRP:
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
        layer: type,
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


class NormalisationLRP:
    """Layer, group, instance and RMS norm: what divides by the deviation takes no part (AttnLRP, section 3.3.2)."""

    functions = named("layer_norm", "group_norm", "instance_norm", "rms_norm")

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        if not (z.requires_grad and interception.listens()):
            return z
        given = _arguments(function, args, kwargs)
        if given.get("running_mean") is not None and not given.get("use_input_stats", True):
            return BatchNormLRP.fixed(interception, given, z)  # instance norm with statistics from training
        return cls.forked(interception, given, z)

    @classmethod
    def forked(cls, interception: Interception, given: dict[str, Any], z: Tensor) -> Tensor:
        """`z`, the output of a function called with `given`, with a way of its own for relevance."""
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        path = None if weight is None else interception.paths.of_layer(weight)
        path = interception.running if path is None else path
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
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`."""
        z = function(*args, **kwargs)
        if not (z.requires_grad and interception.listens()):
            return z
        given = _arguments(function, args, kwargs)
        return cls.forked(interception, given, z) if given["training"] else cls.fixed(interception, given, z)

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
        path = None if weight is None else interception.paths.of_layer(weight)
        record = Record(interception.running if path is None else path, cls, interception.phase)
        record.bias = shift.view(-1, *[1] * (x.dim() - 2))
        interception.add(record, z)
        return z


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
        layer: type,
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
        """Whether it is a transposed convolution, whose weights have the inputs first."""
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
    def stabilises(self) -> bool:
        """See `Record.stabilises`."""
        return self.rule.stabiliser > 0

    def below(self, d: Tensor, relevance: Tensor | None) -> Tensor | None:
        """See `Record.below`."""
        if self.a is not None or self.layer is not LinearLRP or d.dtype != self.weight.dtype:
            return None
        return self.share(d, relevance) @ self.weight

    def attach(self, node: Any) -> None:
        """See `Record.attach`."""
        if self.a is None and (self.factor or self.rule.stabiliser):
            node.register_prehook(self._before_backward)

    def _before_backward(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """What its node is to send down instead of `gradients`; None to leave them as they are."""
        (gradient,) = gradients
        if gradient is None:
            return None
        if self.phase.relevance:
            return (self.share(gradient),)
        return None if self.scale is None else (self.guided(gradient),)

    def share(self, d: Tensor, relevance: Tensor | None = None) -> Tensor:
        """``s = d z / (z + epsilon sign z)``; `relevance` is ``d z``, where it is known."""
        if self.rule.stabiliser == 0:
            return d
        if relevance is not None and self.rectified:  # z is at least 0
            return relevance / (self.z + self.rule.stabiliser)
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


class AffineLRP:
    """Layers ``z = W a + b``: relevance takes the way of the layer's rule (thesis 3.6.2)."""

    functions: tuple[Any, ...] = ()

    @classmethod
    def run(cls, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Calls `function` and gives its output."""
        (a, weight, bias), rest, named = _operands(args, kwargs)
        path = interception.paths.of_layer(weight)
        path = interception.running if path is None else path
        explains = interception.guided is None
        factor = 0.0 if interception.guided is None else interception.guided(path, cls)
        if explains:  # without weight gradients there is nothing to keep for them
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        z: Tensor = function(a, weight, bias, *rest, **named)
        if not z.requires_grad or not (explains or factor or interception.records):
            return z

        rule = interception.rule(path, cls, a)
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


AFFINE = (LinearLRP, ConvolutionalLRP)
PASSING = (ReLULRP, FlattenLRP, DropoutLRP)

LAYERS: dict[Any, Any] = {
    function: layer
    for layer in (
        *(LinearLRP, ConvolutionalLRP, MaxPoolingLRP, AveragePoolingLRP, ReLULRP, ActivationLRP, FlattenLRP),
        *(DropoutLRP, AdditionLRP, ReductionLRP, ConcatenationLRP, ProductLRP, DivisionLRP, SoftmaxLRP, AttentionLRP),
        *(MultiheadAttentionLRP, NormalisationLRP, BatchNormLRP),
    )
    for function in layer.functions
}


def _measured(
    layer: type, interception: Interception, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
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
    if not _writes_in_place(position, args, kwargs):
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


def _address(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 for what has none of its own, as under vmap."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return 0


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


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with all tensors changed that are in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    return value


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in `values`, however deep."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, SEQUENCE):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


SEQUENCE = (tuple, list)


class Operation(NamedTuple):
    """What is known of a function of PyTorch.

    Attributes:
        layer: its LRP layer, or None.
        rectifies: whether it is ReLU itself.
        passes: whether relevance goes through it, from its output to one operand, just as the gradient does.
        inplace: where the argument ``inplace`` stands; -1 where it always writes in place, None where it never does.
    """

    layer: Any
    rectifies: bool
    passes: bool
    inplace: int | None


@functools.cache
def operation(function: Any) -> Operation:
    """What is known of `function`."""
    layer = LAYERS.get(function)
    return Operation(layer, function in RECTIFIERS, layer in PASSING, _position_of_inplace(function))


RECTIFIERS = named("relu", "relu_")
INPLACE_OPERATORS = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imatmul__")


def _position_of_inplace(function: Any) -> int | None:
    name = getattr(function, "__name__", "")
    if name in ("__setitem__", *INPLACE_OPERATORS) or (name.endswith("_") and not name.startswith("_")):
        return -1
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _writes_in_place(position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments does, by where the function has its argument ``inplace``."""
    if position is None or position < 0:
        return position is not None
    return bool(kwargs.get("inplace") or args[position : position + 1] == (True,))
