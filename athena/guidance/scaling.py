"""From relevance to the factors that gradients are scaled by, and the scaling itself in the backward pass."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from athena.propagation.affine import Layer, LinearLRP
from athena.propagation.layer import UnsupportedLayer
from athena.propagation.notes import keeps_graph

__all__ = ["GRANULARITY", "NORMALISE", "DivergedError", "Guided", "Scaling", "Signal", "Signals"]

NORMALISE = (None, "max", "rms")
GRANULARITY = ("sample", "neuron", "filter")
Signal = Callable[[Any, Tensor, Tensor], Tensor]
"""What may stand in the place of relevance: from relevance (None where it is not needed), gradient and output."""


class DivergedError(ArithmeticError):
    """Scaling by relevance has made a gradient infinite or not a number.

    Attributes:
        step: the forward pass, counted from 1 as `athena.Guidance.step` counts.
        layer: the module path of the uppermost layer whose scaled gradient is not finite.
    """

    def __init__(self, step: int, layer: str, factor: float) -> None:
        super().__init__(
            f"step {step}: the gradient at {layer!r} is not finite after scaling by 1 + {factor:g} * relevance; take "
            "normalise='max', a smaller factor, a rule with a larger epsilon, or on_divergence='record' to go on and "
            "look at it afterwards"
        )
        self.step, self.layer = step, layer


class Guided(NamedTuple):
    """A guided layer as its hooks know it. They keep nothing of the graph, which keeps them.

    Attributes:
        path: its module path.
        factor: its LRP factor; a leaf () of the graph while it is learned.
        shape: that of its output, (batch, ...); empty where samples need not be told apart.
        channel: the dimension of `shape` in which its filters, or neurons, stand.
    """

    path: str
    factor: float | Tensor
    shape: torch.Size
    channel: int

    def multiplier(self) -> Any:
        """The factor: a number, or the leaf itself where this backward pass is to have a graph."""
        if not isinstance(self.factor, Tensor) or torch.is_grad_enabled():
            return self.factor
        return self.factor.item()


class Signals:
    """What gradients are scaled by: relevance, or a signal in its place, normalised and averaged.

    Args:
        normalise, granularity, signal: as for `athena.Guidance`.
    """

    def __init__(self, normalise: str | None, granularity: str, signal: Signal | None) -> None:
        self.normalise, self.granularity, self.signal = normalise, granularity, signal
        self.needs_relevance = signal is None or getattr(signal, "needs_relevance", True)
        self.needs_samples = normalise is not None or granularity != "sample" or signal is not None

    def shaped(self, relevance: Tensor, layer: Guided) -> Tensor:
        """The relevance of one layer as it is multiplied with: in its own shape, or one number for each filter."""
        if not self.needs_samples:
            return relevance
        own, relevance = relevance.shape, relevance.view(layer.shape)
        if self.granularity == "filter":
            relevance = relevance.movedim(layer.channel, 1).flatten(2).sum(2) if relevance.dim() > 2 else relevance
        if self.normalise is not None:
            size = relevance.flatten(1)
            size = size.abs().amax(1) if self.normalise == "max" else size.square().mean(1).sqrt()
            relevance = relevance / size.clamp_min(torch.finfo(size.dtype).tiny).view(-1, *[1] * (relevance.dim() - 1))
        if self.granularity == "filter":
            return relevance.mean(0)
        if self.granularity == "neuron":
            relevance = relevance.mean(0, keepdim=True)
            return relevance if own == layer.shape else relevance.expand(layer.shape).reshape(own)
        return relevance.reshape(own)

    def of(self, relevance: Tensor | None, gradient: Tensor, output: Tensor, layer: Guided) -> Tensor:
        """The signal at a layer, as it is multiplied with."""
        assert self.signal is not None
        shape = layer.shape
        given = None if relevance is None else relevance.view(shape)
        found = self.signal(given, gradient.view(shape), output.view(shape))
        if found.shape != shape:
            raise ValueError(
                f"the signal gives {tuple(found.shape)} for {layer.path!r}, whose output is {tuple(shape)}: return one "
                "number for each neuron of each sample"
            )
        return self.shaped(found.reshape(gradient.shape), layer)


class Scaling:
    """Scales the gradients of one backward pass, and looks once, at its end, whether all of them are finite.

    Args:
        signals: what to scale by.
        step: which forward pass it belongs to.
        diverged: what to do with a `DivergedError`.

    Attributes:
        relevance: that of the guided layers it came to, as long as the graph keeps what it has saved; None where a
            signal does without.
        outputs: those of the guided layers, where a signal asks for them.
        layers: how many there are to scale at.
    """

    def __init__(self, signals: Signals, step: int, diverged: Callable[[DivergedError], None]) -> None:
        self.signals, self.step, self.diverged = signals, step, diverged
        self.relevance: dict[int, Tensor | None] = {}
        self.outputs: dict[int, Tensor] = {}
        self.layers = 0
        # Of the layers whose gradient has come: path, factor and the sum of what was scaled; a tensor on a GPU, where
        # a number has to be waited for.
        self._sums: dict[int, tuple[str, float, float | Tensor]] = {}

    def at(self, number: int, layer: Layer, guided: Guided) -> None:
        """Has the gradient that comes to `layer`, or that of its filters, scaled, once there is relevance."""
        if self.signals.granularity != "filter":
            node = layer.node if layer.top is None else layer.top
            node.register_prehook(functools.partial(self._scale_output, number, guided))
            return
        if layer.place or (layer.kind.public is LinearLRP and len(layer.weight_shape or (0, 0)) != 2):
            raise UnsupportedLayer(
                f"the weight of {layer.path!r}, as the model multiplies with it, has no filters or neurons to tell "
                "apart: leave the layer out of the scope, or take granularity='sample' or 'neuron'"
            )
        scale = functools.partial(self._scale_filters, number, guided, layer.kind.first + 1, layer.kind.scaler(layer))
        layer.node.register_hook(scale)

    def _scale_output(self, number: int, layer: Guided, gradients: tuple[Tensor | None]) -> tuple[Tensor] | None:
        (gradient,) = gradients
        if gradient is None or (relevance := self._relevance(number, layer, gradient)) is None:
            return None
        if relevance.dim() != gradient.dim():
            relevance = relevance.view(gradient.shape)
        factor = layer.multiplier()
        if isinstance(factor, Tensor):
            scaled = gradient + gradient * (factor * relevance)
        else:  # in the memory of the relevance, where nothing else asks for it
            out = relevance if self._may_write(number, relevance, gradient) else None
            scaled = torch.addcmul(gradient, gradient, relevance, value=factor, out=out)
        self._note(number, layer, relevance, scaled)
        return (scaled,)

    def _may_write(self, number: int, relevance: Tensor, gradient: Tensor) -> bool:
        """Whether the scaled gradient may take the place of the relevance."""
        is_last_use = number not in self.relevance and self.signals.signal is None
        looks_at_it_later = gradient.dtype == torch.float16
        is_plain = self.signals.granularity == "sample" and not (torch.is_grad_enabled() or is_batched(gradient))
        return is_last_use and is_plain and not looks_at_it_later and relevance.is_contiguous()

    def _scale_filters(
        self,
        number: int,
        layer: Guided,
        place: int,
        scaled_by: Callable[[Tensor, Tensor], Tensor],
        below: tuple[Tensor | None, ...],
        gradients: tuple[Tensor | None],
    ) -> tuple[Tensor | None, ...] | None:
        weight, gradient = below[place], gradients[0]
        if weight is None or gradient is None or (relevance := self._relevance(number, layer, gradient)) is None:
            return None
        scaled = scaled_by(weight, 1 + layer.multiplier() * relevance)
        self._note(number, layer, relevance, scaled)
        return *below[:place], scaled, *below[place + 1 :]

    def _relevance(self, number: int, layer: Guided, gradient: Tensor) -> Tensor | None:
        """What to scale by at a layer, to whose output `gradient` has come; None where relevance did not."""
        if number not in self.relevance:
            return None
        relevance = self.relevance[number]
        if self.signals.signal is not None:
            relevance = self.signals.of(relevance, gradient, self.outputs[number], layer)
        assert relevance is not None
        if not keeps_graph():
            del self.relevance[number]
            self.outputs.pop(number, None)
        return relevance if relevance.dtype == gradient.dtype else relevance.to(gradient.dtype)

    def _note(self, number: int, layer: Guided, relevance: Tensor, scaled: Tensor) -> None:
        """Takes note of whether what was scaled is finite; the last layer of the backward pass looks."""
        self._sums.pop(number, None)
        # in float16 gradients overflow without relevance too, and a loss scaler leaves out the step
        watched = relevance if scaled.dtype == torch.float16 else scaled
        whole = watched.sum(dtype=torch.float32)
        if is_batched(whole):
            raise UnsupportedLayer(
                "several backward passes at once, as autograd.grad(..., is_grads_batched=True), torch.func.vmap and "
                "jacrev make them, cannot be guided; take them one after the other"
            )
        seen = whole.item() if whole.device.type == "cpu" else whole.detach()
        factor = layer.factor.item() if isinstance(layer.factor, Tensor) else layer.factor
        self._sums[number] = layer.path, factor, seen
        if len(self._sums) == self.layers:
            self._look()

    def _look(self) -> None:
        """Waits for the device once in a step, where all is well."""
        sums, self._sums = list(self._sums.values()), {}
        if math.isfinite(functools.reduce(operator.add, (whole for _, _, whole in sums))):
            return
        # in the order of the backward pass, so the first is the uppermost layer
        path, factor = next(((p, f) for p, f, whole in sums if not math.isfinite(whole)), sums[0][:2])
        self.diverged(DivergedError(self.step, path, factor))


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several at once."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)
