"""How the forward pass of a model is seen: each PyTorch operation meets its LRP layer, which leaves a record behind.

`Interception` sees every operation of a forward pass, whether a module or a function makes it, and has its LRP layer
run it; what none is known for is refused where relevance reaches it. Relevance and ordinary gradients go down through
one graph, and what is different for relevance lives in one node of it: that of an affine layer itself, with a hook of
its record on it, or, where relevance goes another way than gradients do, a node `Fork` above it. Parameters, modules
and the user's code stay as they are. Not here: the LRP layers themselves (`athena.layers`), what relevance to start
from (`athena.relevance`), what to do with it (`athena.guidance`).
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from athena.rules import Rule, RuleChoice, least

__all__ = ["Interception", "LRPLayer", "Paths", "Phase", "Record", "UnsupportedLayer"]


class UnsupportedLayer(TypeError):
    """Relevance reached an operation it cannot pass through; the message names the module path and the operation."""


class LRPLayer:
    """How relevance passes through some functions of PyTorch: as the gradient does, unless a subclass says otherwise.

    Attributes:
        functions: which ones. To define a subclass is to have them run by it.
        affine: whether what they run may be a layer with weights, and so the first that guidance wants.
        passes: whether relevance goes from its output to its one operand just as the gradient does.
    """

    functions: ClassVar[tuple[Any, ...]] = ()
    affine: ClassVar[bool] = False
    passes: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        LAYERS.update(dict.fromkeys(vars(cls).get("functions", ()), cls))

    @classmethod
    def run(cls, interception: "Interception", function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` as the network does."""
        return function(*args, **kwargs)


LAYERS: dict[Any, type[LRPLayer]] = {}
"""The LRP layer of each function of PyTorch that has one."""


def named(*names: str) -> tuple[Any, ...]:
    """The functions of PyTorch by these names, wherever they stand."""
    homes = (torch, Tensor, F, torch.special, torch._C._nn)
    return tuple(getattr(home, name) for name in names for home in homes if callable(getattr(home, name, None)))


def nonzero(z: Tensor) -> Tensor:
    """``z`` with values as good as 0 moved off it, so that ``R = z d`` can hold any ``R``."""
    small = torch.full_like(z, least(z.dtype)).copysign_(z)
    return torch.where(z.abs() < small.abs(), small, z)


# Whether the backward pass that runs now was asked to ``retain_graph``.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def packs_what_it_saves() -> bool:
    """Whether autograd saves just now by hooks, as `torch.utils.checkpoint` and `torch.autograd.graph` set them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Phase:
    """Which way gradients travel through one forward graph just now, and what relevance looks like there.

    Attributes:
        relevance: as relevance, or as ordinary gradients.
        absolute: whether a rule gives relevance to neurons that are 0; ``R = z d`` is then read with `nonzero`.
        account: whether records are read once relevance has gone through, and so keep what they know.
    """

    relevance = False
    absolute = False
    account = True

    @property
    def passes_once(self) -> bool:
        """Whether nothing goes through the graph any more after the pass that runs now, nor is read of its records."""
        return self.relevance and not self.account and not keeps_graph()

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
        self.path, self.value, self._version, self._address = path, tensor, tensor._version, None

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
        layer: the LRP layer.
        z: the output.
        bias: what is added to the output whatever the input is, in a shape that adds to ``z``, or None.
    """

    bias: Tensor | None = None

    def __init__(self, path: str, layer: type[LRPLayer], phase: Phase) -> None:
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
    def needs_z(self) -> bool:
        """Whether sending relevance on takes `z`."""
        return False

    def down(self, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What relevance goes on into ``z`` itself, and what goes straight to the input it was forked with."""
        return d, None

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
            return gradient, None, None
        if record.phase.passes_once:
            ctx.record = None
        return *record.down(gradient), None


# A layer's weight, and what it is computed from by weight norm, spectral norm or pruning.
WEIGHT = re.compile(r"\.(weight(_g|_v|_orig)?|parametrizations\.weight\..+)$")


def layer_of(path: str) -> str:
    """The path of the layer with the parameter at `path`: that of its module, if it is the weight of it."""
    return WEIGHT.sub("", path)


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
        self.of_module: dict[int, str] = {}
        self._parameters: dict[int, tuple[Tensor, str]] = {}
        for path, module in self.modules.items():
            if "_orig_mod" in module._modules:
                raise UnsupportedLayer(
                    "torch.compile hides what a model does from LRP; give the model before compilation"
                )
            self.of_module[id(module)] = path
            for name, weight in module._parameters.items():
                if weight is not None and id(weight) not in self._parameters:
                    self._parameters[id(weight)] = weight, layer_of(f"{path}.{name}".removeprefix("."))

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
        account: whether it is also wanted what each operation held and absorbed of the relevance.

    Attributes:
        phase: shared by everything this pass leaves behind.
        ends: the places of the sources in the graph.
        records: what the affine layers (and whatever else absorbs relevance) left behind, in forward order.
        edges: the place of each record's `z` in the graph.
    """

    def __init__(
        self,
        paths: Paths,
        rules: RuleChoice,
        guided: Callable[[str, type[LRPLayer]], float] | None = None,
        sources: Sequence[Tensor] = (),
        account: bool = False,
    ) -> None:
        super().__init__()
        self.paths, self.rules, self.guided, self.sources = paths, rules, guided, sources
        self.absolute = rules.absolute
        self.phase = Phase()
        self.phase.account = account
        self.records: list[Record] = []
        self.edges: list[GradientEdge] = []
        self.affine: dict[Any, tuple[int, Tensor]] = {}
        """For the graph node of an affine layer's output its place in `records`, and the layer's input. Layers whose
        weights were themselves computed are not in it."""
        self.passing: set[Any] = set()
        """The graph nodes that pass relevance from their one operand on just as they pass the gradient."""
        self.without_graph: list[str] = []
        """The paths of the layers to guide that ran without a graph, though their weights ask for gradients."""
        # The nodes that relevance is wanted from: of the sources, and of all outputs in the account.
        self.ends = [get_gradient_edge(source) for source in sources]
        self._goals: set[Any] = {end.node for end in self.ends}
        self._divisors: set[Any] = set()
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

    def attach(self) -> None:
        """Has the graph send relevance down as the records say."""
        for record, edge in zip(self.records, self.edges, strict=True):
            record.attach(edge.node)

    def let_go(self) -> None:
        """Lets go of all that is remembered, of which the graph holds what relevance needs on its way down."""
        for held in (self.records, self.edges, self.affine, self._kept, self._fresh):
            held.clear()

    @property
    def account(self) -> bool:
        """Whether it is also wanted what each operation held and absorbed."""
        return self.phase.account

    @property
    def explains(self) -> bool:
        """Whether relevance itself is wanted, and no weight gradients."""
        return self.guided is None

    @property
    def recomputed(self) -> bool:
        """Whether what runs now may be run once more for the backward pass (`torch.utils.checkpoint`), and alike."""
        return packs_what_it_saves()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = operation(function)
        layer = known.layer
        if self.guided is not None and not self.records:  # before all that is guided, where no relevance comes
            return layer.run(self, function, args, kwargs) if layer and layer.affine else function(*args, **kwargs)
        operands = tensors_in(*args, *kwargs.values())
        rectified = self.note(operands, known.rectifies)
        if known.inplace is not None and self._kept and writes_in_place(known.inplace, args, kwargs):
            self.keep_what_is_written_over(operands, rectified)
        if layer is None:
            out = function(*args, **kwargs)
            for tensor in tensors_in(out):
                if tensor.grad_fn not in self._known:
                    self.refuse(tensor.grad_fn, repr(getattr(function, "__name__", function)))
            return out
        out = layer.run(self, function, args, kwargs)
        if rectified is not None:
            rectified.take(out)
            rectified.rectified = True
        if isinstance(out, Tensor):
            self._known.add(out.grad_fn)
            if layer.passes and not self.absolute:
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

    def path_of(self, weight: Tensor | None) -> str:
        """The path of the layer that owns `weight`, and of the module that runs now where none does."""
        path = None if weight is None else self.paths.of_layer(weight)
        return self.running if path is None else path

    def rule(self, path: str, convolutional: bool, a: Tensor) -> Rule:
        """The rule of the affine layer at `path` with the input `a`."""
        return self.rules.of(
            path,
            self.paths.modules,
            convolutional,
            lambda: {edge.node for edge in self.edges}.isdisjoint(nodes_below(a)),
        )

    def carries(self, value: Any) -> bool:
        """Whether `value` is a tensor through which relevance can come down to the input or to a guided layer."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if any(value is source for source in self.sources):
            return True
        return not self._goals.isdisjoint(nodes_below(value, without=self._divisors))

    def divides(self, value: Any) -> bool:
        """Whether `value` would carry relevance but that it is a divisor (`divide`), or comes from divisors alone."""
        if not self._divisors or not isinstance(value, Tensor) or self.carries(value):
            return False
        return not self._divisors.isdisjoint(nodes_below(value))

    def divide(self, z: Tensor, what: str) -> None:
        """Takes `z` for a divisor: a constant in a product, and refused where relevance comes to it elsewhere."""
        self._divisors.add(z.grad_fn)
        self.refuse(z.grad_fn, what)

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
        self._known.add(node)
        if self.account or self.guided is not None or record.needs_z:
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
                self.refuse(node, UNSEEN.format(node.name()))
        return found

    def refuse(self, node: Any, what: str) -> None:
        """Lets no relevance pass through a graph node."""
        self._known.add(node)
        node.register_prehook(self._refusal(what))

    def _refusal(self, what: str) -> Callable[[Any], None]:
        phase, where = self.phase, self.running or type(self.paths.model).__name__

        def refuse(gradients: Any) -> None:
            if phase.relevance and any(gradient is not None for gradient in gradients):
                raise UnsupportedLayer(f"{where!r} uses {what}, and LRP has no rule to pass relevance through it")

        return refuse


class Operation(NamedTuple):
    """What is known of a function of PyTorch.

    Attributes:
        layer: its LRP layer, or None.
        rectifies: whether it is ReLU itself.
        inplace: where the argument ``inplace`` stands; -1 where it always writes in place, None where it never does.
    """

    layer: type[LRPLayer] | None
    rectifies: bool
    inplace: int | None


@functools.cache
def operation(function: Any) -> Operation:
    """What is known of `function`."""
    return Operation(LAYERS.get(function), function in RECTIFIERS, _position_of_inplace(function))


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


def writes_in_place(position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments does, by where the function has its argument ``inplace``."""
    if position is None or position < 0:
        return position is not None
    return bool(kwargs.get("inplace") or args[position : position + 1] == (True,))


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


def nodes_below(*tensors: Tensor, without: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph that took part in making `tensors`, each once, from the top, and stops at `without`."""
    seen: set[Any] = {None, *without}
    ahead: list[Any] = [tensor.grad_fn for tensor in tensors]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead.extend(below for below, _ in node.next_functions)


def _address(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 for what has none of its own, as under vmap."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return 0
