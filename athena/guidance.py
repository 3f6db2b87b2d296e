"""Relevance-guided training: `Guidance` scales the gradients of a model by relevance while it trains.

Thesis 6.1.2 and Algorithm 1: in each step, after the forward pass, one relevance pass runs over the same graph, and in
the ordinary backward pass that follows, the gradient that reaches the output of each guided layer is multiplied by
``1 + factor R``. The scaled gradient goes on to the layers below, so factors compound downwards. The layer that makes
the network's output is left alone. Not here: the training loop (`athena.training`, or the user's own).
"""

import copyreg
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from athena import chain
from athena.interception import (
    Interception,
    LRPLayer,
    Paths,
    UnsupportedLayer,
    keeps_graph,
    layer_of,
    nodes_below,
    tensors_in,
)
from athena.layers import Affine, ConvolutionalLRP, LinearLRP
from athena.relevance import Target, relevances, starts_down
from athena.rules import Epsilon, Rule, RuleChoice, RuleFor

__all__ = ["DivergedError", "Guidance"]

SCOPES: dict[str, tuple[type[LRPLayer], ...]] = {
    "all": (LinearLRP, ConvolutionalLRP),
    "linear": (LinearLRP,),
    "convolutional": (ConvolutionalLRP,),
}
NORMALISE = (None, "max", "rms")
GRANULARITY = ("sample", "neuron")
Signal = Callable[[Any, Tensor, Tensor], Tensor]
"""What may stand in the place of relevance: from relevance (None where it is not needed), gradient and output."""
REENTRANT = "CheckpointFunctionBackward"
"""The node of the graph that holds what `torch.utils.checkpoint` runs with ``use_reentrant=True``."""


class DivergedError(ArithmeticError):
    """Scaling by relevance has made a gradient infinite or not a number.

    Attributes:
        step: the forward pass, counted from 1 as `Guidance.step` counts.
        layer: the module path of the uppermost layer whose scaled gradient is not finite.
    """

    def __init__(self, step: int, layer: str, factor: float) -> None:
        super().__init__(
            f"step {step}: the gradient at {layer!r} is not finite after scaling by 1 + {factor:g} * relevance; take "
            "a smaller factor, a rule with a larger epsilon, normalise='max', or on_divergence='record' to go on and "
            "look at it afterwards"
        )
        self.step, self.layer = step, layer


class Guidance:
    """Guides the training of `model` by relevance from now on, until `remove` or the end of a ``with`` block.

    It acts on forward passes in training mode with gradients enabled. A pass in eval mode or under ``no_grad``, one
    whose factors are all 0, and one that `every` leaves out, is exactly the model's own. Of a model made of nothing but
    linear, convolutional, pooling and ReLU modules the first pass may be run twice, to the same output.

    Under autocast the gradient at a layer has the lower precision. In bfloat16, a scaling by less than one part in 512
    is rounded away: a factor of 0.001 then does nothing where relevance stays below 2. In float16 a gradient that
    overflows is left to the loss scaler (`torch.amp.GradScaler`), as without guidance; a relevance that does is not.

    A copy of the model trains plainly, be it made by ``copy.deepcopy`` or in another process.

    Args:
        model: the network, which maps a batch to (batch, classes), or with a function as `target` to whatever that
            takes. Its parameters and its code stay as they are.
        factor: the LRP factor, lambda in thesis 6.1.2. One number, or ``{module path: number}``, whose keys are then
            the guided layers. Negative numbers damp what is relevant.
        rule: as for `athena.lrp`.
        scope: which layers are guided: ``"all"``, ``"linear"``, ``"convolutional"``, or a list of module paths.
        target: what relevance starts from, as for `athena.lrp`, or ``"label"``: the logit of the true class; then set
            ``guidance.labels = y`` before each forward pass.
        normalise: None as in the thesis, or divide the relevance of each sample in each layer by its largest
            magnitude (``"max"``) or its root mean square (``"rms"``).
        granularity: ``"sample"``, one relevance for each neuron and sample as in the thesis, or ``"neuron"``, the
            mean over the batch.
        on_divergence: ``"raise"`` a `DivergedError` out of the backward pass, before the optimiser can take the step,
            or ``"record"`` the first one in `diverged` and go on.
        every: guide one forward pass in so many, from the first on. What guidance costs falls in the same proportion.
        signal: what to scale by in the place of relevance, to ask what relevance itself contributes. A function
            ``signal(relevance, gradient, output)``, called when the loss gradient reaches a guided layer, with three
            tensors in the shape of the layer's output: its relevance (not normalised), the gradient, and the output.
            Where a ReLU follows the layer, that of the ReLU may be given for the output: where they differ, relevance
            and gradient are 0. It returns a tensor of that shape; `normalise` and `granularity` then apply to it. If
            the function has an attribute ``needs_relevance`` that is False, relevance is not computed, and is None.

    Attributes:
        labels: (batch,) class indices for the next forward pass, with ``target="label"``; used up by it.
        step: how many forward passes there have been that it acts on, those that `every` leaves out among them.
        diverged: the `DivergedError` recorded, or None.

    Raises:
        ValueError, TypeError: an argument is none of the above; the message names the value and what there is.
        RuntimeError: the model, or a part of it, is guided already.
    """

    _passing = False
    _interception: Interception | None = None

    def __init__(
        self,
        model: nn.Module,
        factor: float | Mapping[str, float] = 0.1,
        rule: RuleFor = Epsilon(),  # noqa: B008
        scope: str | Sequence[str] = "linear",
        target: Target = None,
        normalise: str | None = None,
        granularity: str = "sample",
        on_divergence: str = "raise",
        every: int = 1,
        signal: Signal | None = None,
    ) -> None:
        _one_of("normalise", normalise, NORMALISE)
        _one_of("granularity", granularity, GRANULARITY)
        _one_of("on_divergence", on_divergence, ("raise", "record"))
        self.model, self.factor, self.rule, self.scope, self.target = model, factor, RuleChoice(rule), scope, target
        self.normalise, self.granularity, self.on_divergence = normalise, granularity, on_divergence
        self.every, self.signal = every, signal
        self._needs_relevance = signal is None or getattr(signal, "needs_relevance", True)
        self._paths = Paths(model)
        self._check()
        # Of all layers, as long as the graph of a forward pass is asked what the pass did; None once it could not tell.
        self._rule_by_graph = rule if isinstance(rule, Rule) and not rule.asks_for_sums else None
        self.labels: Tensor | None = None
        self.step = 0
        self.diverged: DivergedError | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """What hangs on a copy of the model: a guidance of no model."""
        return object.__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """What hangs on a model that was pickled."""
        warnings.warn("guidance is not pickled with its model; guide the loaded model anew", stacklevel=2)
        return copyreg.__newobj__, (type(self),)  # type: ignore[attr-defined]

    def _is_of(self, model: nn.Module) -> bool:
        """Whether it guides `model`; what hangs on a copy has no attributes and guides none."""
        return vars(self).get("model") is model

    def remove(self) -> None:
        """Ends the guidance; the model trains plainly again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _check(self) -> None:
        """Raises where factor, scope or target is not of the form documented, or the model is guided already."""
        for path, module in self.model.named_modules():
            owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
            if any(isinstance(owner, Guidance) and owner._is_of(module) for owner in owners):
                raise RuntimeError(
                    f"{f'the part {path!r} of ' if path else ''}this model is guided already, and a second guidance "
                    "would scale its gradients twice: call remove() on the first, or give one a factor for each layer"
                )
        factors = dict(self.factor) if isinstance(self.factor, Mapping) else {"": self.factor}
        for path, factor in factors.items():
            if not isinstance(factor, int | float) or not math.isfinite(factor):
                raise TypeError(f"factor{f' of {path!r}' if path else ''} is {factor!r}; give a finite number")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every={self.every!r}: give a whole number of forward passes, at least 1")
        if self.signal is not None and not callable(self.signal):
            raise TypeError(f"signal={self.signal!r}: give a function of relevance, gradient and output, or None")
        if isinstance(self.target, str):
            _one_of("target", self.target, ("softmax", "logits", "label"))
        paths = set(factors) - {""}
        if isinstance(self.scope, str):
            _one_of("scope", self.scope, tuple(SCOPES), "or a list of module paths")
        else:
            paths.update(self.scope)
        known = {layer_of(path) for path, _ in self.model.named_parameters() if not path.endswith("bias")}
        if unknown := sorted(paths - known):
            raise ValueError(f"the model has no layer with weights at {unknown}; it has {sorted(known)}")

    def _factor_at(self, path: str, layer: type[LRPLayer]) -> float:
        """The factor of a layer; 0 where it is not guided."""
        # asking what is no float whether it is a mapping takes long
        if not isinstance(self.factor, float) and isinstance(self.factor, Mapping):
            return float(self.factor.get(path, 0.0))
        inside = layer in SCOPES[self.scope] if isinstance(self.scope, str) else path in self.scope
        return float(self.factor) if inside else 0.0

    def _guides(self) -> bool:
        """Whether there is a factor that is not 0."""
        if not isinstance(self.factor, float) and isinstance(self.factor, Mapping):
            return any(self.factor.values())
        return bool(self.factor)

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if not (model.training and torch.is_grad_enabled() and not self._passing):
            return
        if "_is_replica" in vars(model):
            raise UnsupportedLayer(
                "nn.DataParallel trains copies of the model, one on each device, which cannot be guided; "
                "DistributedDataParallel can"
            )
        if not (self._is_of(model) and self._guides()):
            return
        if self.step % self.every:
            self.step, self.labels = self.step + 1, None
            return
        self._passing = True
        # by keyword its input is not seen here, and could not be given to it again
        if self._rule_by_graph is None or not inputs or not chain.is_plain(model, hooks=1):
            self._interception = Interception(self._paths, self.rule, self._factor_at)
            self._interception.__enter__()

    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        passing, self._passing = self._passing, False
        interception, self._interception = self._interception, None
        if not passing:
            return None
        if interception is None:
            return None if output is None or self._guided_by_graph(output) else self._run_again(model, inputs)
        interception.__exit__(None, None, None)
        try:
            if output is not None:  # None: the forward pass itself has raised
                self.step += 1
                self._guide(interception, output)
        finally:
            interception.forget()

    def _guided_by_graph(self, output: Tensor) -> bool:
        """As `_guide`, where the graph tells what the forward pass did; else False, and nothing is done."""
        assert self._rule_by_graph is not None
        links = chain.read(output, self._paths, self._rule_by_graph, self._factor_at)
        if links is None:
            return False
        self.step += 1
        with torch.set_grad_enabled(False):
            layers = [(link.node, link.path, link.factor, link.z) for link in links if link.factor]
            if self._needs_relevance:
                ((_, d),) = starts_down(output, self._target())
                self._have_scaled(layers, chain.relevances(links, d))
            else:
                self._have_scaled(layers, ())
        return True

    def _run_again(self, model: nn.Module, inputs: Any) -> Any:
        """The output of a plain model's forward pass, run once more and watched, as all that follow."""
        self._rule_by_graph = None
        self._before_forward(model, inputs)
        output = None
        try:
            output = model.forward(*inputs)
        finally:
            self._after_forward(model, inputs, output)
        return output

    def _guide(self, interception: Interception, output: Any) -> None:
        """The relevance pass; leaves with each guided layer how to scale the gradient that will come down to it."""
        target, outputs = self._target() if self._needs_relevance else None, tensors_in(output)
        if interception.without_graph and any(node.name() == REENTRANT for node in nodes_below(*outputs)):
            raise UnsupportedLayer(
                f"{interception.without_graph[0]!r} runs under torch.utils.checkpoint with use_reentrant=True, and so "
                "cannot be guided; with use_reentrant=False it can"
            )
        layers = [
            (record, edge)
            for record, edge in zip(interception.records, interception.edges, strict=True)
            if isinstance(record, Affine)
        ]
        makers = _makers_of(outputs, {edge.node for _, edge in layers})
        guided = [(record, edge) for record, edge in layers if record.factor and edge.node not in makers]
        if not guided:
            raise UnsupportedLayer(
                f"scope={self.scope!r} guides no layer that {type(self.model).__name__} used in this forward pass "
                "(the layer that makes the output is never guided; a compiled or scripted model cannot be)"
            )
        with torch.set_grad_enabled(False):
            self._have_scaled(
                [(edge.node, record.path, record.factor, record.z) for record, edge in guided],
                relevances(output, target, guided, interception) if self._needs_relevance else (),
            )

    def _have_scaled(
        self, layers: Sequence[tuple[Any, str, float, Tensor]], found: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Has the gradients at `layers`, graph nodes with path, factor and output, scaled by what is `found`.

        To be called with gradients off, by ``set_grad_enabled``, which does what ``no_grad`` does in a third of the
        calls. Hooks come before the arithmetic of relevance, which takes what they need out of the processor's caches.
        """
        watch = _Watch(self)
        for node, path, factor, _ in layers:
            watch.over(node, path, factor)
        if self.signal is None:
            for path, relevance in found:
                watch.relevance[path] = self._shaped(relevance)
        else:
            watch.outputs = {path: output.detach() for _, path, _, output in layers}
            watch.relevance = dict(found) if self._needs_relevance else dict.fromkeys(watch.outputs)
        watch.layers = len(watch.relevance)

    def _signalled(self, relevance: Tensor | None, gradient: Tensor, output: Tensor, path: str) -> Tensor:
        """What `signal` puts in the place of relevance, normalised and averaged as asked for."""
        assert self.signal is not None
        found = self.signal(relevance, gradient, output)
        if found.shape != output.shape:
            raise ValueError(
                f"the signal gives {tuple(found.shape)} for {path!r}, whose output is {tuple(output.shape)}: return "
                "one number for each neuron of each sample"
            )
        return self._shaped(found)

    def _target(self) -> Target:
        if not (isinstance(self.target, str) and self.target == "label"):
            return self.target
        labels, self.labels = self.labels, None
        if labels is None:
            raise RuntimeError("target='label' needs the classes: set guidance.labels = y before each forward pass")
        return labels

    def _shaped(self, relevance: Tensor) -> Tensor:
        """The relevance of one layer, normalised and averaged as asked for."""
        if self.normalise is not None:
            size = relevance.flatten(1)
            size = size.abs().amax(1) if self.normalise == "max" else size.square().mean(1).sqrt()
            relevance = relevance / size.clamp_min(torch.finfo(size.dtype).tiny).view(-1, *[1] * (relevance.dim() - 1))
        return relevance.mean(0, keepdim=True) if self.granularity == "neuron" else relevance


class _Watch:
    """Scales the gradients of one backward pass, and looks once, at its end, whether all of them are finite.

    Attributes:
        relevance: by path, that of the guided layers it came to, as long as the graph keeps what it has saved; None
            where a signal does without.
        outputs: by path, those of the guided layers, where there is a signal that asks for them.
        layers: how many these are.
        sums: of those whose gradient has come, the factor and the sum of what was scaled; a tensor on a GPU, where a
            number has to be waited for.
    """

    def __init__(self, guidance: Guidance) -> None:
        self.guidance, self.step = guidance, guidance.step
        self.relevance: dict[str, Any] = {}
        self.outputs: dict[str, Tensor] = {}
        self.layers = 0
        self.sums: dict[str, tuple[float, float | Tensor]] = {}

    def over(self, node: Any, path: str, factor: float) -> None:
        """Has the gradient that comes to `node` scaled, once there is relevance."""
        node.register_prehook(functools.partial(self._scale, path, factor))

    def _scale(self, path: str, factor: float, gradients: tuple[Tensor | None]) -> tuple[Tensor] | None:
        (gradient,) = gradients
        if gradient is None or path not in self.relevance:
            return None
        relevance = self.relevance[path]
        if self.guidance.signal is not None:
            relevance = self.guidance._signalled(relevance, gradient, self.outputs[path], path)
        if not keeps_graph():
            del self.relevance[path]
            self.outputs.pop(path, None)
        if relevance.dtype != gradient.dtype:
            relevance = relevance.to(gradient.dtype)
        scaled = torch.addcmul(gradient, gradient, relevance, value=factor)
        self.sums.pop(path, None)
        # in float16 gradients overflow without relevance too, and a loss scaler leaves out the step
        watched = relevance if gradient.dtype == torch.float16 else scaled
        total = watched.sum(dtype=torch.float32)
        self.sums[path] = factor, total.item() if total.device.type == "cpu" else total
        if len(self.sums) == self.layers:
            self._look()
        return (scaled,)

    def _look(self) -> None:
        """Waits for the device once in a step, where all is well."""
        sums, self.sums = self.sums, {}
        if math.isfinite(functools.reduce(operator.add, (total for _, total in sums.values()))):
            return
        # in the order of the backward pass, so the first is the uppermost layer
        path = next((path for path, (_, total) in sums.items() if not math.isfinite(total)), next(iter(sums)))
        error = DivergedError(self.step, path, sums[path][0])
        if self.guidance.on_divergence == "raise":
            raise error
        self.guidance.diverged = self.guidance.diverged or error


def _makers_of(outputs: Sequence[Tensor], layers: set[Any]) -> set[Any]:
    """Those of the graph nodes `layers` that make an output: it reaches them without passing another one."""
    makers: set[Any] = set()
    seen: set[Any] = set()
    ahead: list[Any] = [output.grad_fn for output in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in layers:
            makers.add(node)
        else:
            ahead.extend(below for below, _ in node.next_functions)
    return makers


def _one_of(name: str, value: Any, allowed: tuple[Any, ...], otherwise: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))} {otherwise}".rstrip())
