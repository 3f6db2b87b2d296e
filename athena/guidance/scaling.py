"""From relevance to the factors that gradients are scaled by, and the scaling itself in the backward pass."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from athena.propagation.affine import Layer
from athena.propagation.layer import UnsupportedLayer
from athena.propagation.notes import keeps_graph

__all__ = ["GRANULARITY", "NORMALISE", "DivergedError", "Scaling", "Signal", "Signals"]

NORMALISE = (None, "max", "rms")
GRANULARITY = ("sample", "neuron")
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


class Signals:
    """What gradients are scaled by: relevance, or a signal in its place, normalised and averaged.

    Args:
        normalise, granularity, signal: as for `athena.Guidance`.
    """

    def __init__(self, normalise: str | None, granularity: str, signal: Signal | None) -> None:
        self.normalise, self.granularity, self.signal = normalise, granularity, signal
        self.needs_relevance = signal is None or getattr(signal, "needs_relevance", True)
        self.needs_samples = normalise is not None or granularity != "sample" or signal is not None

    def shaped(self, relevance: Tensor, shape: torch.Size) -> Tensor:
        """The relevance of one layer, (batch, ...) in `shape`, as it is multiplied with: in its own shape."""
        if not self.needs_samples:
            return relevance
        own, relevance = relevance.shape, relevance.view(shape)
        if self.normalise is not None:
            size = relevance.flatten(1)
            size = size.abs().amax(1) if self.normalise == "max" else size.square().mean(1).sqrt()
            relevance = relevance / size.clamp_min(torch.finfo(size.dtype).tiny).view(-1, *[1] * (relevance.dim() - 1))
        if self.granularity == "neuron":
            relevance = relevance.mean(0, keepdim=True)
            return relevance if own == shape else relevance.expand(shape).reshape(own)
        return relevance.reshape(own)

    def of(self, relevance: Tensor | None, gradient: Tensor, output: Tensor, shape: torch.Size, path: str) -> Tensor:
        """The signal at the layer at `path`, as it is multiplied with."""
        assert self.signal is not None
        given = None if relevance is None else relevance.view(shape)
        found = self.signal(given, gradient.view(shape), output.view(shape))
        if found.shape != shape:
            raise ValueError(
                f"the signal gives {tuple(found.shape)} for {path!r}, whose output is {tuple(shape)}: return one "
                "number for each neuron of each sample"
            )
        return self.shaped(found.reshape(gradient.shape), shape)


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

    def at(self, number: int, layer: Layer, shape: torch.Size) -> None:
        """Has the gradient that comes to `layer` scaled, once there is relevance."""
        scale = functools.partial(self._scale, number, layer.path, float(layer.wanted), shape)
        (layer.node if layer.top is None else layer.top).register_prehook(scale)

    def _scale(
        self, number: int, path: str, factor: float, shape: torch.Size, gradients: tuple[Tensor | None]
    ) -> tuple[Tensor] | None:
        (gradient,) = gradients
        if gradient is None or number not in self.relevance:
            return None
        relevance = self.relevance[number]
        if self.signals.signal is not None:
            relevance = self.signals.of(relevance, gradient, self.outputs[number], shape, path)
        assert relevance is not None
        if not keeps_graph():
            del self.relevance[number]
            self.outputs.pop(number, None)
        if relevance.dtype != gradient.dtype:
            relevance = relevance.to(gradient.dtype)
        if relevance.dim() != gradient.dim():
            relevance = relevance.view(gradient.shape)
        scaled = torch.addcmul(gradient, gradient, relevance, value=factor)
        self._sums.pop(number, None)
        # in float16 gradients overflow without relevance too, and a loss scaler leaves out the step
        watched = relevance if gradient.dtype == torch.float16 else scaled
        whole = watched.sum(dtype=torch.float32)
        if is_batched(whole):
            raise UnsupportedLayer(
                "several backward passes at once, as autograd.grad(..., is_grads_batched=True), torch.func.vmap and "
                "jacrev make them, cannot be guided; take them one after the other"
            )
        self._sums[number] = path, factor, whole.item() if whole.device.type == "cpu" else whole
        if len(self._sums) == self.layers:
            self._look()
        return (scaled,)

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
