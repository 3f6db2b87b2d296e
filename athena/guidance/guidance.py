"""Relevance-guided training: `Guidance` scales the gradients of a model by relevance while it trains.

Thesis 6.1.2 and Algorithm 1: in each step, after the forward pass, one relevance pass goes down the same graph, and in
the ordinary backward pass that follows, the gradient that reaches the output of each guided layer is multiplied by
``1 + factor R``. The scaled gradient goes on to the layers below, so factors compound downwards. The layer that makes
the network's output is left alone. Not here: the training loop (`athena.training`, or the user's own).
"""

import copy
import copyreg
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from athena.guidance.factors import Factors, one_of
from athena.guidance.scaling import GRANULARITY, NORMALISE, DivergedError, Scaling, Signal, Signals
from athena.propagation.affine import Layer
from athena.propagation.layer import UnsupportedLayer
from athena.propagation.notes import Notes, tensors_in
from athena.propagation.operations import recording
from athena.propagation.paths import Paths
from athena.propagation.target import Target, starts_down
from athena.propagation.trace import Trace
from athena.propagation.walk import Refusal, Walk, within_backward
from athena.rules import Epsilon, RuleChoice, RuleFor

__all__ = ["Guidance"]


class Guidance:
    """Guides the training of `model` by relevance from now on, until `remove` or the end of a ``with`` block.

    It acts on forward passes in training mode with gradients enabled. Passes in eval mode or under ``no_grad``, passes
    whose factors are all 0, and those that `every` skips run the unmodified model.

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
        step: how many forward passes there have been that it acts on, those that `every` skips among them.
        diverged: the `DivergedError` recorded, or None.

    Raises:
        ValueError, TypeError: an argument is none of the above; the message names the value and what there is.
        RuntimeError: the model, or a part of it, is guided already.
    """

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
        one_of("normalise", normalise, NORMALISE)
        one_of("granularity", granularity, GRANULARITY)
        one_of("on_divergence", on_divergence, ("raise", "record"))
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: give a whole number of forward passes, at least 1")
        if signal is not None and not callable(signal):
            raise TypeError(f"signal={signal!r}: give a function of relevance, gradient and output, or None")
        if isinstance(target, str):
            one_of("target", target, ("softmax", "logits", "label"))
        self.model, self.rule, self.target, self.every = model, RuleChoice(rule), target, every
        self.on_divergence = on_divergence
        self._paths = Paths(model)
        _refuse_guided_parts(model)
        self._factors = Factors(factor, scope, model)
        self._signals = Signals(normalise, granularity, signal)
        self.labels: Tensor | None = None
        self.step = 0
        self.diverged: DivergedError | None = None
        self._zeros = self.rule.absolute is not False  # a function may choose any rule
        self._here = threading.local()
        self._parameters = list(model.parameters())
        # What the graph does not tell is noted, and operations are recorded, until a pass has shown that nothing of
        # it is needed.
        self._takes_notes = self._tries = True
        self._replicas = model.register_forward_pre_hook(self._refuse_replica)
        self._own = vars(model).get("forward")
        model.forward = GuidedForward(self, model.forward)

    @property
    def factor(self) -> float | Mapping[str, float]:
        """The LRP factor. It may be set between two steps, and is checked as at the start."""
        return self._factors.factor

    @factor.setter
    def factor(self, factor: float | Mapping[str, float]) -> None:
        self._factors = Factors(factor, self.scope, self.model)

    @property
    def scope(self) -> str | Sequence[str]:
        """The guided layers. They may be set between two steps, and are checked as at the start."""
        return self._factors.scope

    @scope.setter
    def scope(self, scope: str | Sequence[str]) -> None:
        self._factors = Factors(self.factor, scope, self.model)

    @property
    def normalise(self) -> str | None:
        """How relevance is normalised."""
        return self._signals.normalise

    @property
    def granularity(self) -> str:
        """Over what relevance is averaged."""
        return self._signals.granularity

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a guided model is not guided: its copy of this object does nothing."""
        return object.__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """As `__deepcopy__`, with a warning."""
        warnings.warn("guidance is not pickled with its model; guide the loaded model anew", stacklevel=2)
        return copyreg.__newobj__, (type(self),)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Ends the guidance; the model trains plainly again."""
        self._replicas.remove()
        if isinstance(guided := vars(self.model).get("forward"), GuidedForward) and guided.guidance is self:
            del self.model.forward
            if self._own is not None:
                self.model.forward = self._own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _refuse_replica(self, model: nn.Module, inputs: Any) -> None:
        if "model" in vars(self) and "_is_replica" in vars(model):
            raise UnsupportedLayer(
                "nn.DataParallel trains copies of the model, one on each device, which cannot be guided; "
                "DistributedDataParallel can"
            )

    def _pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass, after which the gradients that come back are scaled. Nothing stays behind if it fails."""
        if not self.model.training or not torch.is_grad_enabled() or not self._factors:
            return forward(*args, **kwargs)
        if getattr(self._here, "passing", False):  # the model calls itself
            return forward(*args, **kwargs)
        if self.step % self.every:
            self.step, self.labels = self.step + 1, None
            return forward(*args, **kwargs)
        notes = Notes(zeros=self._zeros, given=tensors_in(args, kwargs))
        self._here.passing = True
        try:
            if self._takes_notes or not all(parameter.requires_grad for parameter in self._parameters):
                with recording(notes) if self._tries else nullcontext(), notes:
                    output = forward(*args, **kwargs)
            else:
                output = forward(*args, **kwargs)
        finally:
            self._here.passing = False
        self.step += 1
        try:
            self._guide(notes, output)
        except Refusal as refusal:
            sentence = self._sentence(refusal, forward, args, kwargs)
            raise UnsupportedLayer(sentence) from None
        return output

    def _guide(self, notes: Notes, output: Any) -> None:
        """The relevance pass; leaves with each guided layer how to scale the gradient that will come down to it."""
        # set_grad_enabled does what no_grad does in a third of the calls
        with torch.set_grad_enabled(False):
            walk, scaling, guided = self._guided_layers(notes, output)
            if not self._signals.needs_relevance:
                scaling.relevance = dict.fromkeys(range(len(guided)))
            else:
                _, starts = starts_down(output, self._target(), self._zeros)
                del output
                if notes.packs:
                    within_backward(walk, starts)
                else:
                    walk.run(starts)
            scaling.layers = len(scaling.relevance)
        self._tries = walk.tries
        self._takes_notes = notes.needed or walk.uses_notes or self._zeros or self._tries

    def _guided_layers(self, notes: Notes, output: Any) -> tuple[Walk, Scaling, list[Layer]]:
        outputs, signals = tensors_in(output), self._signals
        scaling = Scaling(signals, self.step, self._note_divergence)
        numbers: dict[Any, tuple[int, torch.Size]] = {}

        def take(layer: Layer, relevance: Tensor) -> None:
            number, shape = numbers[layer.node]
            scaling.relevance[number] = signals.shaped(relevance, shape) if signals.signal is None else relevance

        walk = Walk(notes, self._paths, self.rule, self._factors.of, take)
        walk.explore(outputs)
        if notes.without_graph and walk.has_reentrant_checkpoint:
            path = self._paths.of(notes.without_graph[0])
            raise UnsupportedLayer(
                f"{path!r} runs under torch.utils.checkpoint with use_reentrant=True, and so cannot be guided; with "
                "use_reentrant=False it can"
            )
        for node in walk.makers(outputs):
            walk.layers[node].wanted = 0.0
        guided = [layer for layer in walk.layers.values() if layer.wanted]
        if not guided:
            raise UnsupportedLayer(
                f"scope={self.scope!r} guides no layer that {type(self.model).__name__} used in this forward pass "
                "(the layer that makes the output is never guided; a compiled or scripted model cannot be)"
            )
        for number, layer in enumerate(guided):  # hooks first: the arithmetic of relevance evicts caches
            shape = walk.shape_by_samples(layer) if signals.needs_samples else torch.Size()
            numbers[layer.node] = number, shape
            scaling.at(number, layer, shape)
            if signals.signal is not None:
                scaling.outputs[number] = layer.kind.output(walk, layer).detach()
                walk.values[layer.node] = scaling.outputs[number]
        return walk, scaling, guided

    def _note_divergence(self, error: DivergedError) -> None:
        if self.on_divergence == "raise":
            raise error
        self.diverged = self.diverged or error

    def _target(self) -> Target:
        if not (isinstance(self.target, str) and self.target == "label"):
            return self.target
        labels, self.labels = self.labels, None
        if labels is None:
            raise RuntimeError("target='label' needs the classes: set guidance.labels = y before each forward pass")
        return labels

    def _sentence(self, refusal: Refusal, forward: Callable[..., Any], args: Any, kwargs: Any) -> str:
        """The message of a refusal, found by one more forward pass that traces who called what."""
        trace = Trace(self._paths.modules, zeros=self._zeros)
        try:
            with trace.watching(), recording(trace), trace:
                output = forward(*args, **kwargs)
            with torch.no_grad():
                walk, _, _ = self._guided_layers(trace, output)
                ones = [(out, torch.ones_like(out)) for out in tensors_in(output) if out.is_floating_point()]
                walk.run(ones)
        except Refusal as again:
            return again.sentence
        except Exception:  # a forward pass that cannot be run twice; the step has failed already
            pass
        return str(refusal)


class GuidedForward:
    """Stands in the place of a guided model's ``forward``.

    Args:
        guidance: by which it is guided.
        forward: the model's own.
    """

    def __init__(self, guidance: Guidance, forward: Callable[..., Any]) -> None:
        self.guidance, self.__wrapped__ = guidance, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass."""
        return self.guidance._pass(self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its own forward pass, which is not guided."""
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise for a model that is unpickled."""
        return getattr, (self.guidance.model, "forward")


def _refuse_guided_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(vars(module).get("forward"), GuidedForward):
            raise RuntimeError(
                f"{f'the part {path!r} of ' if path else ''}this model is guided already, and a second guidance "
                "would scale its gradients twice: call remove() on the first, or give one a factor for each layer"
            )
