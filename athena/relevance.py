"""One relevance pass over any model: `lrp`, and the `Relevance` it returns.

An explanation is one forward pass through LRP layers (`athena.layers`) and one gradient from a chosen start to the
input; what the layers between held is found by a second such pass, where it is asked for. Not here: training with
relevance (`athena.guidance`).
"""

import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from athena import chain
from athena._imports import needed
from athena.interception import Interception, Paths, Phase, Record, UnsupportedLayer, mapped, tensors_in
from athena.layers import Affine, LinearLRP
from athena.rules import Epsilon, RuleChoice, RuleFor

if TYPE_CHECKING:
    import pandas

__all__ = ["Relevance", "lrp", "start"]

Target = None | int | Tensor | str | Callable[[Any], Any]


class Relevance:
    """What `lrp` returns.

    Beside the model and `x` themselves it holds no more than input and output. `layers` and `conservation` are worked
    out by a second pass, when one of them is first asked for, and kept from then on. Until then the model and `x` have
    to stay as they were.

    Attributes:
        input: relevance of the input, in its shape and dtype; a tuple where there were several.
        output: the relevance the pass started from, (batch, classes), or as `target` gave it.
    """

    def __init__(self, found: "_Pass", again: Callable[[], "_Pass"], single: bool) -> None:
        self.input: Any = found.inputs[0] if single else found.inputs
        self.output = found.output
        self._sizes, self._again = _sizes(found.inputs), again

    @cached_property
    def _account(self) -> "_Pass":
        """The same pass once more, with the account of all layers."""
        found = self._again()
        for part, before, now in zip(found.inputs, self._sizes, _sizes(found.inputs), strict=True):
            if not torch.allclose(now, before, rtol=torch.finfo(part.dtype).eps ** 0.5, atol=0.0, equal_nan=True):
                raise RuntimeError(
                    "the model explains this input differently by now, so what its layers held can no longer be told: "
                    "ask for layers or conservation() before it is trained on or changed, or explain it anew"
                )
        return found

    @cached_property
    def layers(self) -> dict[str, Tensor]:
        """The relevance of the output of each affine layer, by module path, in forward order, in that output's shape.

        Weights used again in the same pass are listed as ``path#2``, ``path#3``. Where batch norm is merged into a
        layer, it is the output of both.

        Raises:
            RuntimeError: the model, or the input, has changed since the explanation.
        """
        found = self._account
        reached = [(record, d) for record, d in found.records if isinstance(record, Affine)]
        return {record.path: found.phase.of(record.z, d) for record, d in reached}

    def conservation(self) -> "pandas.DataFrame":
        """Where the relevance went, summed over the batch in float64, from the output down.

        Returns:
            One row for each layer and operation that can absorb relevance, then ``input``. Columns: ``layer``;
            ``relevance``, the sum over the layer's output; ``bias`` and ``stabiliser``, what these absorbed of it, in
            the same unit; ``absorbed``, their share of what the pass started from. On a chain, relevance less bias
            less stabiliser is the relevance of the next row; on any network the start is the relevance of the input
            and all that was absorbed (thesis 3.6.1). ``bias`` holds whatever is added to a sum regardless of the
            input: biases, constants, the shift of a norm, and what softmax has beyond the first order of its Taylor
            series.

        Raises:
            RuntimeError: the model, or the input, has changed since the explanation.
        """
        pd = needed("pandas", "experiments", "conservation()")
        found, rows = self._account, []
        total = sum(part.double().sum().item() for part in tensors_in(found.output))
        for record, d in reversed(found.records):
            bias, stabiliser = record.absorbed(d)
            relevance = found.phase.of(record.z, d).double().nan_to_num(0.0).sum().item()
            share = (bias + stabiliser) / total if total else 0.0
            rows.append((record.path, relevance, bias, stabiliser, share))
        rows.append(("input", sum(part.double().sum().item() for part in found.inputs), 0.0, 0.0, 0.0))
        table: pandas.DataFrame = pd.DataFrame(rows, columns=["layer", "relevance", "bias", "stabiliser", "absorbed"])
        return table


def lrp(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    target: Target = None,
    rule: RuleFor = Epsilon(1e-6),  # noqa: B008
) -> Relevance:
    """Explains the output of `model` for `x` by layer-wise relevance propagation (thesis 3.6).

    The model is explained in eval mode (dropout off, running statistics untouched) and comes back as it was. Autocast
    is off meanwhile: numbers rounded to bfloat16 put ReLUs and maxima on the other side, and the map of LRP-0 on the
    CNN of table 6.1 then correlates with that of float32 by no more than 0.97. On a GPU convolutions multiply in TF32,
    which does so to fewer, unless the program says ``torch.backends.cudnn.conv.fp32_precision = "ieee"``.

    Args:
        model: any module that maps a floating point tensor to (batch, classes).
        x: (batch, ...), or a tuple of such tensors, which the model is called with one by one.
        target: what relevance to share out. None: the logit of the class predicted. An int, or a LongTensor (batch,):
            the logit of that class. ``"softmax"``: every output neuron with its probability. ``"logits"``: every
            output neuron with its logit. Or a function from the output to the relevance of each of its neurons; where
            the model returns a tuple, a list or a dict of tensors, it is given that and returns the like, with None
            where nothing is to start.
        rule: the rule of all affine layers, a preset of `athena.rules`, or a function from a layer's path and module
            to its rule.

    Raises:
        UnsupportedLayer: relevance reached an operation that LRP has no rule for, or could not reach the input.
        TypeError, ValueError: `x`, `target` or the model's output is not of the form above.
    """
    given = x if isinstance(x, tuple) else (x,)
    for tensor in given:
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise TypeError(
                f"x is {_described(tensor)}; lrp explains a floating point tensor (batch, ...): give an image as "
                "x.float(), and tokens as what their embedding makes of them, to the part of the model above it"
            )
    with torch.inference_mode(False):
        given = tuple(_full(tensor.clone() if tensor.is_inference() else tensor.detach()) for tensor in given)
    explain, device = functools.partial(_explain, model, given, target, rule), given[0].device
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    again = functools.partial(_once_more, explain, device, *drawn)
    return Relevance(explain(account=False), again, single=not isinstance(x, tuple))


class _Pass(NamedTuple):
    """What one relevance pass found.

    Attributes:
        inputs: the relevance of each input.
        output: that of the output.
        records: with an account, what relevance came through and the ``d`` that came; of `phase`.
    """

    inputs: tuple[Tensor, ...]
    output: Any
    phase: Phase
    records: list[tuple[Record, Tensor]]


def _explain(model: nn.Module, given: tuple[Tensor, ...], target: Target, rule: RuleFor, account: bool) -> _Pass:
    """One forward pass of the model and one relevance pass down to what it was given; arguments as for `lrp`."""
    paths, device = Paths(model), given[0].device.type
    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(paths.modules.values()), _full_precision(device):
        sources = [tensor.detach().requires_grad_() for tensor in given]
        interception = Interception(paths, RuleChoice(rule), sources=sources, account=account)
        with interception:
            output = model(*sources)
        relevance = start(output, target)
        starts = [(part, _each(its, part)) for part, its in _pairs(output, relevance)]
        records = list(interception.records) if account else []
        seen = bool(interception.records)
        ds = propagate(starts, interception.ends + (interception.edges if account else []), interception)
    of_inputs, of_records = ds[: len(sources)], ds[len(sources) :]
    if all(d is None for d in of_inputs) or not seen:
        raise UnsupportedLayer(
            f"no relevance reached the input of {type(model).__name__}: its output does not depend on it through "
            "operations that autograd and LRP can see (a compiled or scripted model, or one that detaches?)"
        )
    phase = interception.phase
    inputs = tuple(
        torch.zeros_like(tensor) if d is None else phase.of(tensor, d)
        for tensor, d in zip(given, of_inputs, strict=True)
    )
    reached = [(record, d) for record, d in zip(records, of_records, strict=True) if d is not None]
    return _Pass(inputs, relevance, phase, reached)


def _once_more(explain: Callable[..., _Pass], device: torch.device, drawn: Tensor, drawn_there: Tensor | None) -> _Pass:
    """The pass of `explain` with an account; a model that draws numbers draws them from these states of generators."""
    with torch.random.fork_rng([device] if drawn_there is not None else []):
        torch.set_rng_state(drawn)
        if drawn_there is not None:
            torch.cuda.set_rng_state(drawn_there, device)
        return explain(account=True)


def _sizes(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What tells the same explanation from another: the sum of the magnitudes, for each input."""
    norm = functools.partial(torch.linalg.vector_norm, ord=1)
    return [norm(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in inputs]


def start(output: Any, target: Target) -> Any:
    """The relevance of the output neurons that a pass starts from, (batch, classes); `target` as in `lrp`.

    Raises:
        TypeError, ValueError: the output or the target is not of the form that `lrp` takes.
    """
    if callable(target):
        relevance = target(mapped(output, Tensor.detach))
        if relevance is None or not _alike(relevance, output):
            shape = tuple(output.shape) if isinstance(output, Tensor) else "and structure"
            raise ValueError(f"target(output) gave {_described(relevance)}; it must have the output's shape {shape}")
        if not _pairs(output, relevance):
            raise ValueError("target(output) gave None for all that the model returned; relevance has nowhere to start")
        return mapped(relevance, Tensor.detach)
    output = _logits(output).detach()
    match target:
        case "softmax":
            return output.softmax(1)
        case "logits":
            return output
        case str():
            raise ValueError(f"target={target!r}: the starts with a name are 'softmax' and 'logits'")
    chosen = _chosen(target, output)
    return torch.zeros_like(output).scatter_(1, chosen, output.gather(1, chosen))


def starts_down(output: Any, target: Target) -> list[tuple[Tensor, Tensor]]:
    """Each output tensor that `start` gives relevance, with the ``d`` it starts down with: that over it, and 0 at 0.

    Raises:
        TypeError, ValueError: as `start`.
    """
    if callable(target) or isinstance(target, str):
        return [(part, _each(relevance, part)) for part, relevance in _pairs(output, start(output, target))]
    output = _logits(output)
    return [(output, torch.zeros_like(output).scatter_(1, _chosen(target, output), 1.0).logical_and_(output))]


def _logits(output: Any) -> Tensor:
    """The output, checked."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {_described(output)}; LRP starts from one tensor (batch, classes). For several give "
            "target as a function from the output to its relevance"
        )
    if output.dim() != 2:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}; for anything but (batch, classes) give target as a "
            "function from the output to its relevance"
        )
    return output


def _each(relevance: Tensor, output: Tensor) -> Tensor:
    """``relevance / output``, and 0 where the output is 0, which can bear none."""
    return (relevance / output.detach()).nan_to_num_(0.0, 0.0, 0.0)


def _chosen(target: Any, output: Tensor) -> Tensor:
    """The class to explain for each sample, (batch, 1): the one predicted, or that which the target names."""
    if target is None:
        return output.argmax(1, keepdim=True)
    batch, classes = output.shape
    if isinstance(target, int) and not isinstance(target, bool):
        chosen = torch.full((batch,), target, device=output.device)
    elif isinstance(target, Tensor) and not target.is_floating_point() and target.dtype != torch.bool:
        chosen = target.to(output.device, torch.long)
    else:
        raise TypeError(
            f"target is {_described(target)}; give None, a class, a LongTensor (batch,), 'softmax', 'logits' or a "
            "function"
        )
    if chosen.shape != (batch,):
        raise ValueError(f"target has shape {tuple(chosen.shape)}; for this batch it must be ({batch},)")
    low, high = (int(chosen.min()), int(chosen.max())) if batch else (0, 0)
    if not 0 <= low <= high < classes:
        raise ValueError(f"target holds classes {low} to {high}; the model has classes 0 to {classes - 1}")
    return chosen[:, None]


def propagate(
    starts: Sequence[tuple[Tensor, Tensor]],
    edges: Sequence[GradientEdge],
    interception: Interception,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Sends relevance down from `starts`, pairs of an output and its ``d``, to `edges`.

    Returns:
        The ``d`` of each edge, or None where none came.
    """
    outputs, ds = [output for output, _ in starts], [d for _, d in starts]
    interception.note(outputs)
    interception.check()
    interception.attach()
    if interception.explains and not interception.account:
        interception.let_go()
    interception.phase.relevance = True
    try:
        return torch.autograd.grad(outputs, edges, ds, retain_graph=keep_graph, allow_unused=True)
    finally:
        interception.phase.relevance = False


def relevances(
    output: Any, target: Target, layers: Sequence[tuple[Record, GradientEdge]], interception: Interception
) -> Iterator[tuple[str, Tensor]]:
    """The paths and the relevance of those of `layers`, in training, that some came to; the graph stays.

    To be called under ``no_grad``. One at a time, so that what each is the product of can go as it comes.

    Args:
        output, target: of the model, and as for `lrp`.
        layers: records with their edges.
        interception: of the forward pass.
    """
    edges = [edge for _, edge in layers]
    starts = starts_down(output, target)
    links = _chain(starts[0][0], edges, interception) if len(starts) == 1 else None
    if links is not None:
        yield from chain.relevances(links, starts[0][1])
        return
    ds = list(propagate(starts, edges, interception, keep_graph=True))
    for place, (record, _) in enumerate(layers):
        arrived, ds[place] = ds[place], None
        if arrived is not None:
            yield record.path, record.z * arrived


def _chain(output: Tensor, edges: Sequence[GradientEdge], interception: Interception) -> list[chain.Link] | None:
    """The chain from `output` down to the lowest of `edges`, where there is nothing else between them; else None."""
    if interception.absolute:
        return None
    wanted = {edge.node for edge in edges}
    interception.note([output])
    interception.check()
    links: list[chain.Link] = []
    node: Any = output.grad_fn
    passed: list[tuple[Any, int]] = []
    while wanted:
        record = interception.record_of(node)
        if isinstance(record, Affine):
            if record.layer is not LinearLRP or record.a is not None:
                return None
            if not record.weight.dtype == record.z.dtype == output.dtype:
                return None
            weight = record.weight.T if record.transposed else record.weight
            factor = record.factor if node in wanted else 0.0
            links.append(chain.Link(node, record.path, weight, record.rule, factor, record.z, record.rectified, passed))
            wanted.discard(node)
            passed, node = [], interception.affine[node][1].grad_fn
        elif node in interception.passing:
            ways = [(place, lower) for place, (lower, _) in enumerate(node.next_functions) if lower is not None]
            if len(ways) != 1:
                return None
            ((way, lower),) = ways
            passed.append((node, way))
            node = lower
        else:
            return None
    return links


def _pairs(output: Any, relevance: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of an output with their relevance, without those from which nothing starts."""
    if relevance is None:
        return []
    if isinstance(output, Tensor):
        return [(output, relevance)]
    names = output if isinstance(output, dict) else range(len(output))
    return [pair for name in names for pair in _pairs(output[name], relevance[name])]


def _alike(relevance: Any, output: Any) -> bool:
    """Whether `relevance` is of the structure and shapes of `output`, None standing for any part."""
    if relevance is None:
        return True
    if isinstance(output, Tensor):
        return isinstance(relevance, Tensor) and relevance.shape == output.shape
    if isinstance(output, dict):
        return isinstance(relevance, dict) and all(
            name in relevance and _alike(relevance[name], part) for name, part in output.items()
        )
    return (
        isinstance(output, tuple | list)
        and isinstance(relevance, tuple | list)
        and len(relevance) == len(output)
        and all(_alike(*pair) for pair in zip(relevance, output, strict=True))
    )


def _full(tensor: Tensor) -> Tensor:
    """What autocast may have cast, in the precision of parameters."""
    cast = tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(tensor.device.type)
    return tensor.float() if cast else tensor


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast off; where it is off already, to say so would only take its time."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list | dict) and tensors_in(value):
        parts = value.values() if isinstance(value, dict) else value
        return f"a {type(value).__name__} of {', '.join(map(_described, parts))}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"
