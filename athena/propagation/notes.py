"""What the graph of a forward pass does not tell, noted down as the forward pass runs.

Autograd saves what a gradient needs. Relevance may need a little more: the output of an affine layer, the input of a
sigmoid, the bias of a layer whose parameters are frozen. `Notes` sees each function of PyTorch that the model calls,
and remembers these by the graph node of the output. It belongs to one forward pass in one thread, and ends with it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from athena.propagation.layer import shares_memory

if TYPE_CHECKING:
    from athena.propagation.operations import Operations

__all__ = [
    "Note",
    "Notes",
    "keeps_graph",
    "named",
    "operands_of",
    "packs_what_it_saves",
    "runs_under_a_selective_checkpoint",
    "tensors_in",
    "writes_in_place",
]

# Whether the backward pass that runs now was asked to ``retain_graph``.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def packs_what_it_saves() -> bool:
    """Whether autograd saves just now by hooks, as `torch.utils.checkpoint` and `torch.autograd.graph` set them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def runs_under_a_selective_checkpoint() -> bool:
    """Whether the forward pass is in a part with a `context_fn`, through which only one backward pass may come."""
    return any(type(mode).__name__ == "_CachingTorchDispatchMode" for mode in _get_current_dispatch_mode_stack())


class Note:
    """What one call of an affine function, a norm, a sigmoid or the like leaves behind.

    Attributes:
        z: the output as it was, or None.
        version: of its memory then; where that has changed, the output was written over.
        a: the input, where the graph does not keep it.
        weight, bias: of an affine function or a norm.
        pads: whether a convolution may have had zeros put around its input.
        once: whether only one backward pass may come through the call.
    """

    __slots__ = ("a", "bias", "once", "pads", "version", "weight", "z")

    def __init__(
        self,
        z: Tensor | None = None,
        a: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.z = None if z is None else z.detach()
        self.version = 0 if z is None else z._version
        self.a, self.weight, self.bias, self.pads, self.once = a, weight, bias, False, False

    def output(self) -> Tensor | None:
        """The output, if it is still what it was."""
        return self.z if self.z is not None and self.z._version == self.version else None


class Notes(TorchFunctionMode):
    """A context for one forward pass of a model.

    Args:
        outputs: whether inputs and outputs of affine layers will be looked at.
        zeros: whether inputs of ReLUs will be looked at, as where neurons that are 0 get relevance.
        sources: the tensors to explain, leaves of the graph.
        given: what the model was called with, where that need not be in the graph, as in training.

    Attributes:
        calls: the note of each call, by the graph node of its output.
        operations: those that may have to be tried, where they are recorded.
        gates: nodes of gates in recurrent layers, which get no relevance.
        copies: nodes that copy into a part of a tensor, and do nothing else to it.
        aliases: for what stands in for a frozen parameter, that parameter, by its id.
        without_graph: weights that ask for gradients and were used where none are recorded.
        needed: whether anything has been noted that the graph would not have told.
        differentiable: whether relevance is to have a graph, so that inputs are noted with theirs.
        packs: whether some of the forward pass is to be computed again for the backward pass.
    """

    def __init__(
        self,
        outputs: bool = True,
        zeros: bool = False,
        sources: Sequence[Tensor] = (),
        given: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.outputs, self.zeros, self.sources, self.given = outputs, zeros, sources, given
        self.calls: dict[Any, Note] = {}
        self.operations: Operations | None = None
        self.gates: set[Any] = set()
        self.copies: set[Any] = set()
        self.aliases: dict[int, tuple[Tensor, Tensor]] = {}
        self.without_graph: list[Tensor] = []
        self.needed = self.packs = self.differentiable = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.differentiable:
            self.packs = self.packs or packs_what_it_saves()
        noted = NOTED.get(function)
        if noted is None:
            return function(*args, **(kwargs or {}))
        return noted(self, function, args, kwargs or {})

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is noted."""
        return tensor if self.differentiable else tensor.detach()

    def thawed(self, tensor: Tensor) -> Tensor:
        """`tensor` as a leaf that asks for gradients, so that autograd saves what it is multiplied with."""
        alias = tensor.detach().requires_grad_()
        self.aliases[id(alias)] = alias, tensor
        self.needed = True
        return alias

    def outputs_of(self, node: Any) -> Tensor | None:
        """The output of the call that has made a graph node, as far as it was noted."""
        note = self.calls.get(node)
        return None if note is None else note.output()

    def mark_copies(self, tensor: Tensor, above: Any = None) -> None:
        """Takes note that parts of `tensor` were copied into; what lies at the node `above` or below it is older."""
        ahead = [tensor.grad_fn]
        while ahead:
            node: Any = ahead.pop()
            if node is None or node is above or node in self.copies:
                continue
            copies = "CopySlices" in node.name()
            if copies:
                self.copies.add(node)
            if (not copies or above is not None) and (copies or node.name().startswith(PARTS)):
                ahead.extend(lower for lower, _ in node.next_functions)

    def original(self, parameter: Tensor | None) -> Tensor | None:
        """The parameter that `thawed` has made an alias of, or `parameter` itself."""
        return self.aliases.get(id(parameter), (None, parameter))[1]


def named(*names: str) -> tuple[Any, ...]:
    """The functions of PyTorch by these names, wherever they stand."""
    homes = (torch, Tensor, F, torch.special, torch._C._nn)
    return tuple(getattr(home, name) for name in names for home in homes if callable(getattr(home, name, None)))


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in `values`, however deep in tuples, lists and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def operands_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Input, weight and bias of an affine function, which may be given by name."""
    if len(args) >= 3:
        return args[:3]
    return [*args, *(kwargs.get(name) for name in ("input", "weight", "bias")[len(args) :])]


# What is done at each function


def _affine(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A linear layer or a convolution."""
    a, weight, bias = operands_of(args, kwargs)
    if function is F.linear and a.dim() > 2 and args and not a.is_contiguous():
        args = (a := a.contiguous(), *args[1:])  # or it would run as a product and a sum, two nodes of the graph
    z: Tensor = function(*args, **kwargs)
    node = z.grad_fn
    if node is None:
        if weight.requires_grad and not torch.is_grad_enabled():
            notes.without_graph.append(weight)
        return z
    packs, frozen = packs_what_it_saves(), not weight.requires_grad
    notes.packs = notes.packs or packs
    notes.needed = notes.needed or frozen or packs
    keeps = notes.outputs and not packs and not notes.differentiable
    note = Note(z if keeps else None, notes.kept(a) if frozen and notes.outputs else None, weight, bias)
    note.pads = "same" in (kwargs.get("padding"), *args[4:5])
    note.once = packs and runs_under_a_selective_checkpoint()
    notes.calls[node] = note
    return z


def _relu(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A ReLU keeps its own output, which serves as well as that of the layer below it."""
    if notes.zeros:
        return _by_output(notes, function, args, kwargs)
    x = args[0] if args else kwargs["input"]
    note = notes.calls.get(x.grad_fn)
    if note is not None:
        note.z = None
    return _in_place(notes, function, args, kwargs)


def _by_output(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An activation that autograd remembers by its output: its input is noted."""
    if writes_in_place(function, args, kwargs):
        return _copied_in_place(notes, function, args, kwargs)
    z: Tensor = function(*args, **kwargs)
    if z.grad_fn is not None:
        x = args[0] if args else kwargs["input"]
        notes.calls[z.grad_fn] = Note(a=notes.kept(x))
        notes.needed = True
    return z


def _norm(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Batch norm keeps all but its bias."""
    z: Tensor = function(*args, **kwargs)
    bias = kwargs.get("bias", args[4] if len(args) > 4 else None)
    if z.grad_fn is not None and bias is not None:
        notes.calls[z.grad_fn] = Note(bias=bias)
    return z


def _product(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product of matrices, of which one may be a weight that asks for no gradient."""
    if notes.outputs:
        tensors = tensors_in(args, kwargs)
        if any(tensor.grad_fn is not None or any(tensor is source for source in notes.sources) for tensor in tensors):
            args, kwargs = _thawed(notes, args), _thawed(notes, kwargs)
    z: Tensor = function(*args, **kwargs)
    if z.grad_fn is not None and function in WITH_BIAS:
        notes.calls[z.grad_fn] = Note(bias=args[0] if args else kwargs["input"])
    return z


def _thawed(notes: Notes, value: Any) -> Any:
    """`value` with each tensor in it that asks for no gradient thawed, but for what the model was given."""
    if isinstance(value, Tensor):
        stays = value.requires_grad or not value.is_floating_point() or shares_memory(value, notes.given)
        return value if stays else notes.thawed(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_thawed(notes, item) for item in value)
    return {name: _thawed(notes, item) for name, item in value.items()} if isinstance(value, dict) else value


def _attention(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multi-head attention, of which no part is seen, but all are in the graph where its parameters are."""
    given = dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs
    for name, value in given.items():
        if name.endswith(("weight", "bias")) and isinstance(value, Tensor) and not value.requires_grad:
            given[name] = notes.thawed(value)
    notes.needed = True
    return function(**given)


def _in_place(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Autograd's node for writing into a view does not tell what was written, unless it is a copy."""
    if writes_in_place(function, args, kwargs):
        target = args[0] if args else kwargs["input"]
        if target._base is not None or function in REMEMBERED_BY_OUTPUT_IN_PLACE:
            return _copied_in_place(notes, function, args, kwargs)
    return function(*args, **kwargs)


def _copied_in_place(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls `function` out of place on a copy of its first operand, and copies the result into that."""
    target = args[0] if args else kwargs["input"]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors_in(args, kwargs)):
        return function(*args, **kwargs)
    notes.needed = True
    position = _position_of_inplace(function)
    if position == ALWAYS:
        name = function.__name__.strip("_").removeprefix("i")  # mul_ and __imul__ alike
        function = getattr(torch, name, None) or getattr(F, name)
    else:
        args, kwargs = args[:position], {name: value for name, value in kwargs.items() if name != "inplace"}
    original = target.clone()  # autograd may save it
    args = tuple(original if arg is target else arg for arg in args)
    kwargs = {name: original if value is target else value for name, value in kwargs.items()}
    with notes:
        z = function(*args, **kwargs)
    target.copy_(z)
    notes.mark_copies(target)
    return target


def _sum(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A sum, of which zeros may have relevance, and a summand may be a bias that asks for no gradient."""
    if notes.outputs and any(tensor.grad_fn is not None for tensor in tensors_in(args)):
        first = int(writes_in_place(function, args, kwargs))
        args = (*args[:first], *(notes.thawed(arg) if _is_frozen(arg) else arg for arg in args[first:]))
    z: Tensor = _in_place(notes, function, args, kwargs)
    if notes.zeros and isinstance(z, Tensor) and z.grad_fn is not None:
        notes.calls[z.grad_fn] = Note(z.clone())
    return z


def _is_frozen(value: Any) -> bool:
    """Whether it is a parameter that asks for no gradients, or a view of one."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return False
    return isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)


def _padding(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Circular padding copies into parts of a new tensor."""
    z: Tensor = function(*args, **kwargs)
    if z.grad_fn is not None and "circular" in (kwargs.get("mode"), *args[2:3]):
        notes.needed = True
        notes.mark_copies(z, above=(args[0] if args else kwargs["input"]).grad_fn or notes)
    return z


def _assignment(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An assignment to a part of a tensor copies into it."""
    function(*args, **kwargs)
    if args[0].grad_fn is not None:
        notes.needed = True
        notes.mark_copies(args[0])


WITH_BIAS = frozenset(named("addmm", "baddbmm"))
PARTS = ("Slice", "AsStrided", "View", "Select", "Transpose", "Permute", "Squeeze", "Unsqueeze")
ALWAYS = -1
IN_PLACE_OPERATORS = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__")
IN_PLACE_METHODS = (
    *("add_", "sub_", "mul_", "div_", "pow_", "neg_", "square_", "sqrt_", "rsqrt_", "reciprocal_", "abs_", "erf_"),
    *("clamp_", "clip_", "clamp_min_", "clamp_max_", "masked_fill_", "silu_", "mish_", "hardswish_", "hardtanh_"),
    *("relu6", "silu", "mish", "hardswish", "hardtanh", "hardsigmoid", "leaky_relu", "leaky_relu_", "threshold"),
    *("threshold_", "rrelu", "rrelu_", "dropout", "dropout_", "feature_dropout_", "dropout1d", "dropout2d"),
    *("dropout3d", "alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "hardsigmoid_"),
)
REMEMBERED_BY_OUTPUT_IN_PLACE = frozenset(
    named("elu", "elu_", "celu", "celu_", "selu", "selu_", "leaky_relu", "leaky_relu_", "rrelu", "rrelu_")
)
AFFINE_FUNCTIONS = (
    F.linear,
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
NOTED: dict[Any, Callable[[Notes, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(named(*IN_PLACE_OPERATORS, *IN_PLACE_METHODS), _in_place),
    **dict.fromkeys(REMEMBERED_BY_OUTPUT_IN_PLACE, _in_place),
    **dict.fromkeys(AFFINE_FUNCTIONS, _affine),
    **dict.fromkeys(named("relu", "relu_"), _relu),
    **dict.fromkeys(named("sigmoid", "sigmoid_", "tanh", "tanh_", "expit"), _by_output),
    **dict.fromkeys(named("batch_norm"), _norm),
    **dict.fromkeys(
        named("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot"),
        _product,
    ),
    **dict.fromkeys(named("inner"), _product),
    **dict.fromkeys(named("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "rsub"), _sum),
    **dict.fromkeys(named("__isub__", "__rsub__", "subtract", "sum"), _sum),
    **dict.fromkeys(named("multi_head_attention_forward"), _attention),
    **dict.fromkeys(named("pad"), _padding),
    Tensor.__setitem__: _assignment,
}
"""What is noted at each function of PyTorch that leaves something to note; all others run as they are."""


@functools.cache
def _position_of_inplace(function: Any) -> int | None:
    """Where the argument ``inplace`` of `function` stands; `ALWAYS` if it always writes in place, None if never."""
    name = getattr(function, "__name__", "")
    if name in ("__setitem__", *IN_PLACE_OPERATORS) or (name.endswith("_") and not name.startswith("_")):
        return ALWAYS
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def writes_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments writes into its first operand."""
    position = _position_of_inplace(function)
    if position is None or position == ALWAYS:
        return position == ALWAYS
    return bool(kwargs.get("inplace") or args[position : position + 1] == (True,))
