"""Relevance-guided training: `Guidance` scales the gradients of a model by relevance while it trains.

Thesis 6.1.2 and Algorithm 1: in each step, after the forward pass, one relevance pass goes down the same graph, and in
the ordinary backward pass that follows, the gradient that reaches the output of each guided layer is multiplied by
``1 + factor R``. The scaled gradient goes on to the layers below, so factors compound downwards. The layer that makes
the network's output is left alone. Not here: the training loop (`athena.training`, or the user's own).
"""

import copyreg
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from athena.guidance.factors import LEARN, Factors
from athena.guidance.guided import (
    GuidedForward,
    Here,
    Idle,
    gathered,
    refuse_checkpoints,
    refuse_guided,
    refuse_transforms,
    unwrapped,
)
from athena.guidance.learning import in_eval_mode, move
from athena.guidance.scaling import GRANULARITY, NORMALISE, DivergedError, Guided, Scaling, Signal, Signals
from athena.guidance.settings import Setting, count, one_of
from athena.guidance.starts import known_target, labels_for, target_of
from athena.propagation.affine import ConvolutionalLRP, Layer
from athena.propagation.layer import UnsupportedLayer
from athena.propagation.notes import Notes, tensors_in
from athena.propagation.operations import recording
from athena.propagation.paths import Paths
from athena.propagation.products import GATES
from athena.propagation.target import Target, starts_down
from athena.propagation.trace import Trace
from athena.propagation.walk import Refusal, Walk, within_backward
from athena.rules import Epsilon, RuleChoice, RuleFor

__all__ = ["Guidance"]


class Guidance:
    """Guides the training of `model` by relevance from now on, until `remove` or the end of a ``with`` block.

    It acts on forward passes in training mode with gradients enabled. Passes in eval mode or under ``no_grad``, passes
    whose factors are all 0, in which all layers to guide are frozen, and those that `every` skips run the unmodified
    model. Of a model in `DistributedDataParallel` or the like, the module inside is guided.

    All arguments but `model` and `signal` are attributes too, which may be set between two steps, and are checked as
    at the start. A factor that grows over the first thousand steps::

        for step, (x, y) in enumerate(loader):
            guidance.factor = 0.1 * min(step / 1000, 1)

    Under autocast the gradient at a layer has the lower precision. In bfloat16, a scaling by less than one part in 512
    is rounded away: a factor of 0.001 then does nothing where relevance stays below 2. In float16 a gradient that
    overflows is left to the loss scaler (`torch.amp.GradScaler`), as without guidance; a relevance that does is not.

    A copy of the model trains plainly, be it made by ``copy.deepcopy`` or in another process.

    Args:
        model: the network, which maps a batch to (batch, classes), to a map (batch, classes, ...), to a dict whose
            ``"logits"`` are either or (batch, tokens, classes), or with a function as `target` to whatever that takes.
            Its parameters and its code stay as they are.
        factor: the LRP factor, lambda in thesis 6.1.2. One number, or ``{module path: number}``, whose keys are then
            the guided layers. Negative numbers damp what is relevant. Or ``"learn"``: one for each guided layer, which
            starts at 0 and is moved by `learn` (thesis 8.3.1).
        rule: as for `athena.lrp`.
        scope: which layers are guided: ``"all"``, ``"linear"``, ``"convolutional"``, or a list of module paths.
        target: what relevance starts from, as for `athena.lrp`, at each place of a map or token alike; or
            ``"label"``: the logit of the true class, of `labels`.
        normalise: None as in the thesis, or divide the relevance of each sample in each layer by its largest
            magnitude (``"max"``) or its root mean square (``"rms"``).
        granularity: ``"sample"``, one relevance for each neuron and sample as in the thesis; ``"neuron"``, the mean
            over the batch; or ``"filter"`` (thesis 8.3.2): the gradient of a filter's weights, or of a neuron's, is
            multiplied by ``1 + factor R``, with R the relevance of all its outputs, added over positions, normalised,
            and averaged over the batch. The gradients of biases, and of all layers below, are then left as they are.
        on_divergence: ``"raise"`` a `DivergedError` out of the backward pass, before the optimiser can take the step,
            or ``"record"`` the first one in `diverged` and go on.
        every: guide one forward pass in so many, from the first on. What guidance costs falls in the same proportion.
        signal: what to scale by in the place of relevance, to ask what relevance itself contributes. A function
            ``signal(relevance, gradient, output)``, called when the loss gradient reaches a guided layer, with three
            tensors in the shape of the layer's output: its relevance (not normalised), the gradient, and the output.
            Where a ReLU follows the layer, that of the ReLU may be given for the output: where they differ, relevance
            and gradient are 0. It returns a tensor of that shape; `normalise` and `granularity` then apply to it. If
            the function has an attribute ``needs_relevance`` that is False, relevance is not computed, and is None.
        gates: how a product shares relevance where one factor is a gate, the result of a sigmoid, as in squeeze and
            excitation: ``"half"`` to each factor, or ``"signal"``, all of it to what is gated (Arras et al. 2019).

    Attributes:
        labels: with ``target="label"``, the class indices for the next forward pass, which uses them up: (batch,), or
            (batch, ...) for a map or tokens, -100 where there is none; or a function that finds them from the
            arguments of each forward pass. Where none are set, those that the model is called with,
            ``model(x, labels=y)``.
        step: how many forward passes there have been that it acts on, those that `every` skips among them.
        diverged: the `DivergedError` recorded, or None.

    Raises:
        ValueError, TypeError: an argument is none of the above; the message names the value and what there is.
        RuntimeError: the model, a part of it, or a model that it is a part of is guided already.
    """

    target: Setting[Target] = Setting(known_target)
    normalise: Setting[str | None] = Setting(one_of, NORMALISE)
    granularity: Setting[str] = Setting(one_of, GRANULARITY)
    on_divergence: Setting[str] = Setting(one_of, ("raise", "record"))
    every: Setting[int] = Setting(count, "forward passes")
    gates: Setting[str] = Setting(one_of, GATES)

    def __init__(
        self,
        model: nn.Module,
        factor: float | Mapping[str, float] | str = 0.1,
        rule: RuleFor = Epsilon(),  # noqa: B008
        scope: str | Sequence[str] = "linear",
        target: Target = None,
        normalise: str | None = None,
        granularity: str = "sample",
        on_divergence: str = "raise",
        every: int = 1,
        signal: Signal | None = None,
        gates: str = "half",
    ) -> None:
        if signal is not None and not callable(signal):
            raise TypeError(f"signal={signal!r}: give a function of relevance, gradient and output, or None")
        self.model = model = unwrapped(model)
        self._paths = Paths(model)
        refuse_guided(model)
        self._factors = Factors(factor, scope, model)
        self.rule, self.target, self.every, self.gates = rule, target, every, gates
        self.normalise, self.granularity, self.on_divergence = normalise, granularity, on_divergence
        self._signal = signal
        self.labels: Tensor | Callable[..., Tensor] | None = None
        self.step = 0
        self.diverged: DivergedError | None = None
        self._here, self._idle, self._ended = Here(), Idle(model), False
        self._parameters = list(model.parameters())
        self._called = model.register_forward_pre_hook(self._note_call)
        self._forward = GuidedForward(model, self._pass)

    @property
    def factor(self) -> float | Mapping[str, float] | str:
        """The LRP factor."""
        return self._factors.factor

    @factor.setter
    def factor(self, factor: float | Mapping[str, float] | str) -> None:
        self._factors = Factors(factor, self.scope, self.model)

    @property
    def scope(self) -> str | Sequence[str]:
        """The guided layers."""
        return self._factors.scope

    @scope.setter
    def scope(self, scope: str | Sequence[str]) -> None:
        self._factors = Factors(self.factor, scope, self.model)

    @property
    def rule(self) -> RuleFor:
        """How relevance is shared out."""
        return self._rules.rule

    @rule.setter
    def rule(self, rule: RuleFor) -> None:
        self._rules = RuleChoice(rule)
        self._zeros = self._rules.absolute is not False  # a function may choose any rule
        # What the graph does not tell is noted, and operations are recorded, until a pass has shown that nothing of
        # it is needed.
        self._takes_notes = self._tries = True

    @property
    def learned(self) -> dict[str, float]:
        """With ``factor="learn"``, the factors as they are now, by the module paths of the layers guided so far."""
        return {path: factor.item() for path, factor in self._factors.learned.items()}

    def learn(self, loss: Tensor, held_out: Callable[[], Tensor], rate: float = 0.01, bound: float = 1.0) -> None:
        """With ``factor="learn"``: moves the factors to where the next step lowers the loss on held-out data more.

        It is called between the forward pass and ``backward()``, in each step or in one of so many, and acts on this
        step already::

            loss = criterion(model(x), y)
            guidance.learn(loss, lambda: criterion(model(x_held_out), y_held_out))
            loss.backward()

        With G the guided gradient of all weights, which depends on the factors f, and v the gradient of the held-out
        loss, ``u = d cos(v, G) / d f`` and ``f <- clip(f + rate u / |u|, -bound, bound)``. A step of SGD of a given
        length changes the held-out loss by ``-length |v| cos(v, G)`` in first order; u is the direction of f in which
        that falls most. Length does not count, or factors would grow in the place of a learning rate. That scaled
        gradients go on to the layers below is part of u. Relevance is a constant. Momentum and the like are left out.

        It takes second derivatives, which fused attention and recurrent layers of cuDNN do not have, and each time
        four to five plain steps (network of table 6.1 on a CPU). With `DistributedDataParallel`, call the module inside
        for the held-out loss; each process then learns factors of its own.

        Args:
            loss: the training loss, of the guided forward pass.
            held_out: a function that gives the loss on data that the model is neither trained nor tested on. The model
                is in eval mode meanwhile.
            rate: by how much the factors move, all taken as one vector.
            bound: their largest magnitude. With ``normalise="max"``, 1 keeps gradients from changing their sign.

        Raises:
            ValueError: the factor is not ``"learn"``, or the loss is not of a guided forward pass.
        """
        if self.factor != LEARN:
            raise ValueError(f"factor={self.factor!r}: only factors of a guidance with factor={LEARN!r} are learned")
        weights = [parameter for parameter in self._parameters if parameter.requires_grad]
        with torch.enable_grad():
            with in_eval_mode(self.model):
                wished = held_out()
            depends = move(list(self._factors.learned.values()), loss, wished, weights, rate, bound)
        if not depends and (self.step - 1) % self.every == 0:
            raise ValueError("learn(loss, held_out): give the loss of the last forward pass in training mode")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a guided model is not guided: its copy of this object does nothing."""
        return object.__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """As `__deepcopy__`, with a warning."""
        warnings.warn("guidance is not pickled with its model; guide the loaded model anew", stacklevel=2)
        return copyreg.__newobj__, (type(self),)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Ends the guidance; the model trains plainly again.

        Warns where the model was trained and no forward pass was guided, with the likely cause.
        """
        self._end(stacklevel=3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._end(stacklevel=3, warns=kind is None)

    def _end(self, stacklevel: int, warns: bool = True) -> None:
        if "model" not in vars(self) or self._ended:  # the first: of a copy
            return
        self._ended = True
        self._called.remove()
        self._forward.remove()
        self._drop_late()
        if warns and self._factors and (sentence := (self._factors if self.step else self._idle).sentence()):
            warnings.warn(sentence, stacklevel=stacklevel)

    def _note_call(self, model: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or "model" not in vars(self):
            return
        if "_is_replica" in vars(model):
            raise UnsupportedLayer(
                "nn.DataParallel trains copies of the model, one on each device, which cannot be guided; "
                "DistributedDataParallel can"
            )
        self._here.called = True

    def _is_off(self) -> bool:
        """Whether a forward pass that runs now is none to be guided."""
        if self._ended or not self._factors or not torch.is_grad_enabled():
            self._idle.off |= not self._factors
            return True
        if not self.model.training:
            self._idle.reason = "its forward passes were in eval mode, in which guidance rests; call model.train()"
            return True
        return False

    def _pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass, after which the gradients that come back are scaled. Nothing stays behind if it fails."""
        here = self._here
        called, here.called = here.called, False
        if self._is_off() or here.passing:  # the latter: the model calls itself
            return forward(*args, **kwargs)
        if self.step % self.every:
            self.step += 1
            self._drop_labels()
            return forward(*args, **kwargs)
        refuse_transforms()
        self._drop_late()
        notes = Notes(zeros=self._zeros, given=tensors_in(args, kwargs))
        here.passing = True
        try:
            if self._takes_notes or not all(parameter.requires_grad for parameter in self._parameters):
                with recording(notes) if self._tries else nullcontext(), notes:
                    output = forward(*args, **kwargs)
            else:
                output = forward(*args, **kwargs)
        finally:
            here.passing = False

        def finish(output: Any) -> None:
            try:
                self._guide(notes, output, args, kwargs)
            except Refusal as refusal:
                sentence = self._sentence(refusal, forward, args, kwargs)
                raise UnsupportedLayer(sentence) from None

        if called and self.model._forward_hooks:  # they may change the output, or give another
            self._after_hooks(finish)
        else:
            finish(output)
        return output

    def _after_hooks(self, finish: Callable[[Any], None]) -> None:
        """Has `finish` see what the forward hooks of the model make of its output: one that is added now comes last."""

        def last(model: nn.Module, inputs: Any, output: Any) -> None:
            self._drop_late()
            finish(output)

        self._here.late = self.model.register_forward_hook(last)

    def _drop_late(self) -> None:
        if self._here.late is not None:
            self._here.late.remove()
            self._here.late = None

    def _drop_labels(self) -> None:
        if not callable(self.labels):
            self.labels = None

    def _guide(self, notes: Notes, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The relevance pass; leaves with each guided layer how to scale the gradient that will come down to it."""
        self.step += 1
        # set_grad_enabled does what no_grad does in a third of the calls
        with torch.set_grad_enabled(False), gathered(self.model):
            found = self._guided_layers(notes, output)
            if found is None:
                self.step -= 1
                self._drop_labels()
                self._takes_notes = self._tries = True
                return
            walk, scaling, guided = found
            if not scaling.signals.needs_relevance:
                scaling.relevance = dict.fromkeys(range(len(guided)))
            else:
                _, starts = starts_down(output, target_of(output, self._start(args, kwargs)), self._zeros)
                del output
                if notes.packs:
                    within_backward(walk, starts)
                else:
                    walk.run(starts)
            scaling.layers = len(scaling.relevance)
        self._tries = walk.tries
        self._takes_notes = notes.needed or walk.uses_notes or self._zeros or self._tries

    def _guided_layers(self, notes: Notes, output: Any) -> tuple[Walk, Scaling, list[Layer]] | None:
        """The walk, and the guided layers that it has found; None where all that would be guided are frozen."""
        outputs, signals = tensors_in(output), Signals(self.normalise, self.granularity, self._signal)
        scaling = Scaling(signals, self.step, self._note_divergence)
        numbers: dict[Any, tuple[int, Guided]] = {}

        def take(layer: Layer, relevance: Tensor) -> None:
            number, known = numbers[layer.node]
            scaling.relevance[number] = signals.shaped(relevance, known) if signals.signal is None else relevance

        walk = Walk(notes, self._paths, self._rules, self._factors.guides, take)
        walk.gates = self.gates
        walk.explore(outputs)
        refuse_checkpoints(walk)
        for node in walk.makers(outputs):
            walk.layers[node].wanted = False
        if self.granularity == "filter":
            for layer in walk.layers.values():
                layer.wanted &= layer.weight_shape is not None
        guided = [layer for layer in walk.layers.values() if layer.wanted]
        if not guided:
            if self._factors.names_frozen():
                self._idle.reason = f"all layers that scope={self.scope!r} guides were frozen"
                return None
            raise UnsupportedLayer(
                f"scope={self.scope!r} guides no layer that {type(self.model).__name__} used in this forward pass "
                "(the layer that makes the output is never guided; a compiled or scripted model cannot be)"
            )
        for number, layer in enumerate(guided):  # hooks first: the arithmetic of relevance evicts caches
            shape = walk.shape_by_samples(layer) if signals.needs_samples else torch.Size()
            channel = 1 if layer.kind.public is ConvolutionalLRP else len(shape) - 1
            known = Guided(layer.path, self._factors.of(layer.path), shape, channel)
            numbers[layer.node] = number, known
            scaling.at(number, layer, known)
            if signals.signal is not None:
                scaling.outputs[number] = layer.kind.output(walk, layer).detach()
                walk.values[layer.node] = scaling.outputs[number]
        return walk, scaling, guided

    def _note_divergence(self, error: DivergedError) -> None:
        if self.on_divergence == "raise":
            raise error
        self.diverged = self.diverged or error

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
        """The target of this forward pass."""
        if not (isinstance(self.target, str) and self.target == "label"):
            return self.target
        labels = labels_for(self.labels, args, kwargs)
        self._drop_labels()
        return labels

    def _sentence(self, refusal: Refusal, forward: Callable[..., Any], args: Any, kwargs: Any) -> str:
        """The message of a refusal, found by one more forward pass that traces who called what."""
        trace = Trace(self._paths.modules, zeros=self._zeros)
        try:
            with trace.watching(), recording(trace), trace:
                output = forward(*args, **kwargs)
            with torch.no_grad():
                found = self._guided_layers(trace, output)
                assert found is not None
                walk, _, _ = found
                ones = [(out, torch.ones_like(out)) for out in tensors_in(output) if out.is_floating_point()]
                walk.run(ones)
        except Refusal as again:
            return again.sentence
        except Exception:  # a forward pass that cannot be run twice; the step has failed already
            pass
        return str(refusal)
