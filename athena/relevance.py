"""One relevance pass over any model: `lrp`, and the `Relevance` it returns.

An explanation is one forward pass through LRP layers (`athena.layers`) and one gradient from a chosen start to the
input. Not here: training with relevance (`athena.guidance`).
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from athena.layers import AffineLRP, Interception, Paths, Record, UnsupportedLayer
from athena.rules import Epsilon, Rule

__all__ = ["Relevance", "lrp", "start"]

Target = None | int | Tensor | str | Callable[[Tensor], Tensor]
RuleFor = Rule | Callable[[str, nn.Module], Rule]


class Relevance:
    """What `lrp` returns.

    Attributes:
        input: relevance of the input, in its shape and dtype.
        output: the relevance the pass started from, (batch, classes).
    """

    def __init__(self, x: Tensor, d: Tensor, output: Tensor, records: list[tuple[Record, Tensor]]) -> None:
        self.input = x * d
        self.output = output
        self._records = records

    @cached_property
    def layers(self) -> dict[str, Tensor]:
        """The relevance of the output of each affine layer, by module path, in forward order, in that output's shape.

        Weights used again in the same pass are listed as ``path#2``, ``path#3``.
        """
        return {record.path: record.z * d for record, d in self._records if issubclass(record.layer, AffineLRP)}

    def conservation(self) -> pd.DataFrame:
        """Where the relevance went, summed over the batch in float64, from the output down.

        Returns:
            One row for each affine layer (and each constant that was added), then ``input``. Columns: ``layer``;
            ``relevance``, the sum over the layer's output; ``bias`` and ``stabiliser``, what these absorbed of it, in
            the same unit; ``absorbed``, their share of what the pass started from. On a chain, relevance less bias
            less stabiliser is the relevance of the next row; on any network the start is the relevance of the input
            and all that was absorbed (thesis 3.6.1).
        """
        total = self.output.double().sum().item()
        rows = []
        for record, d in reversed(self._records):
            bias, stabiliser = record.absorbed(d)
            relevance = (record.z.double() * d.double()).sum().item()
            rows.append((record.path, relevance, bias, stabiliser, (bias + stabiliser) / total if total else 0.0))
        rows.append(("input", self.input.double().sum().item(), 0.0, 0.0, 0.0))
        return pd.DataFrame(rows, columns=["layer", "relevance", "bias", "stabiliser", "absorbed"])


def lrp(model: nn.Module, x: Tensor, target: Target = None, rule: RuleFor = Epsilon(1e-6)) -> Relevance:  # noqa: B008
    """Explains the output of `model` for `x` by layer-wise relevance propagation (thesis 3.6).

    The model is explained in eval mode (dropout off, running statistics untouched) and comes back as it was.

    Args:
        model: any module that maps a floating point tensor to (batch, classes).
        x: (batch, ...).
        target: what relevance to share out. None: the logit of the class predicted. An int, or a LongTensor (batch,):
            the logit of that class. ``"softmax"``: every output neuron with its probability. ``"logits"``: every
            output neuron with its logit. Or a function from the output to the relevance of each of its neurons.
        rule: the rule of all affine layers, or a function from a layer's path and module to its rule.

    Raises:
        UnsupportedLayer: relevance reached an operation that LRP has no rule for, or could not reach the input.
        TypeError, ValueError: `x`, `target` or the model's output is not of the form above.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        raise TypeError(f"x is {_described(x)}; lrp explains a floating point tensor (batch, ...)")
    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(model):
        x = x.clone() if x.is_inference() else x.detach()
        source = x.detach().requires_grad_()
        interception = Interception(Paths(model), as_function(rule))
        with interception:
            output = model(source)
        relevance = start(output, target)
        edges = [torch.autograd.graph.get_gradient_edge(source), *interception.edges]
        d_input, *ds = propagate(output, relevance, edges, interception)
    if d_input is None or not interception.records:
        raise UnsupportedLayer(
            f"no relevance reached the input of {type(model).__name__}: its output does not depend on it through "
            "operations that autograd and LRP can see (a compiled or scripted model, or one that detaches?)"
        )
    reached = [(record, d) for record, d in zip(interception.records, ds, strict=True) if d is not None]
    return Relevance(x, d_input, relevance, reached)


def as_function(rule: RuleFor) -> Callable[[str, nn.Module], Rule]:
    """The rule of a layer as a function of its path and module, checked."""
    if isinstance(rule, Rule):
        return lambda path, module: rule
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(
            f"rule is {rule!r}; give a rule such as athena.rules.Epsilon(1e-6), or a function (path, module)"
        )

    def checked(path: str, module: nn.Module) -> Rule:
        chosen = rule(path, module)
        if not isinstance(chosen, Rule):
            raise TypeError(f"rule({path!r}, ...) gave {chosen!r}, which is not a rule of athena.rules")
        return chosen

    return checked


def start(output: Tensor, target: Target) -> Tensor:
    """The relevance of the output neurons that a pass starts from, (batch, classes); `target` as in `lrp`.

    Raises:
        TypeError, ValueError: the output or the target is not of the form that `lrp` takes.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned {_described(output)}; LRP starts from one tensor (batch, classes)")
    output = output.detach()
    if callable(target):
        relevance = target(output)
        if not isinstance(relevance, Tensor) or relevance.shape != output.shape:
            shape = tuple(output.shape)
            raise ValueError(f"target(output) gave {_described(relevance)}; it must have the output's shape {shape}")
        return relevance.detach()
    if output.dim() != 2:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}; for anything but (batch, classes) give target as a "
            "function from the output to its relevance"
        )
    match target:
        case "softmax":
            return output.softmax(1)
        case "logits":
            return output
        case str():
            raise ValueError(f"target={target!r}: the starts with a name are 'softmax' and 'logits'")
    if target is None:
        logit, chosen = output.max(1, keepdim=True)
    else:
        chosen = _chosen(target, output)
        logit = output.gather(1, chosen)
    return torch.zeros_like(output).scatter_(1, chosen, logit)


def _chosen(target: Any, output: Tensor) -> Tensor:
    """The class to explain for each sample, (batch, 1), from a target that names it."""
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
    output: Tensor, relevance: Tensor, edges: list[GradientEdge], interception: Interception, keep_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Sends `relevance`, that of `output`, down to `edges` and returns the ``d`` of each, or None where none came."""
    interception.note(output)
    for record in interception.records:
        record.check()
    d = (relevance / output.detach()).nan_to_num_(0.0)  # 0 / 0 is 0
    interception.phase.relevance = True
    try:
        return torch.autograd.grad(output, edges, d, retain_graph=keep_graph, allow_unused=True)
    finally:
        interception.phase.relevance = False


@contextmanager
def _eval_mode(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
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
    return f"{value!r} ({type(value).__name__})"
