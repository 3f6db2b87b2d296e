"""What stands in the place of relevance, to ask what relevance itself contributes to guided training.

Each control is a function of the relevance of a guided layer, the loss gradient that reaches it and its output, all
(batch, ...) in one shape, and of a generator of random numbers; it returns what to scale gradients by, in that shape.
To add one, write its function and enter it in `CONTROLS`. Not here: how gradients are scaled (`athena.Guidance`, whose
`signal` each is), and the null arms that need no function: another seed, and a factor of 1e-6, which is rounding alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONTROLS", "Signal"]


def shuffled(relevance: Tensor, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers, in each sample dealt anew to the neurons whose relevance is not 0.

    Over all neurons most of it would land where the gradient is 0 as well, and do nothing.
    """
    flat = relevance.flatten(1)
    samples, neurons = flat.nonzero(as_tuple=True)
    keys = torch.rand(len(samples), generator=generator, device=flat.device, dtype=torch.float64)
    order = (samples + keys).argsort()  # within each sample, since a key is below 1
    dealt = flat.clone()
    dealt[samples, neurons] = flat[samples, neurons][order]
    return dealt.view_as(relevance)


def another_sample(relevance: Tensor, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """The relevance of another sample of the batch: each gives its own to one and takes that of one."""
    order = torch.randperm(len(relevance), generator=generator, device=relevance.device)
    given = torch.empty_like(relevance)
    given[order] = relevance[order.roll(1)]
    return given


def mean(relevance: Tensor, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """In each sample the mean over the neurons whose relevance is not 0, on these neurons.

    Divided by its maximum it is 1 or -1.
    """
    active = relevance != 0
    axes = tuple(range(1, relevance.dim()))
    return active * (relevance.sum(axes, keepdim=True) / active.sum(axes, keepdim=True).clamp_min(1))


def noise(relevance: None, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers between 0 and 2, of mean one."""
    return 2 * torch.rand(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def activation(relevance: None, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """The layer's output after the ReLU."""
    return output.relu()


def gradient_activation(relevance: None, gradient: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """The loss gradient times the output: below 0 where a neuron lowers the loss; a positive factor then damps."""
    return gradient * output


def absolute_gradient_activation(
    relevance: None, gradient: Tensor, output: Tensor, generator: torch.Generator
) -> Tensor:
    """The magnitude of the loss gradient times the output."""
    return (gradient * output).abs()


CONTROLS: dict[str, Callable[..., Tensor]] = {
    "shuffled": shuffled,
    "another sample": another_sample,
    "mean": mean,
    "noise": noise,
    "activation": activation,
    "gradient_activation": gradient_activation,
    "|gradient_activation|": absolute_gradient_activation,
}
"""The controls by the name that a run has them under."""
OF_RELEVANCE = ("shuffled", "another sample", "mean")


class Signal:
    """A control as the `signal` of `athena.Guidance`, with random numbers of its own.

    Args:
        control: a name of `CONTROLS`.
        seed: of its random numbers.
        device: where the network is.

    Attributes:
        needs_relevance: whether it is made of relevance.
    """

    def __init__(self, control: str, seed: int, device: torch.device | str = "cpu") -> None:
        self.needs_relevance = control in OF_RELEVANCE
        self._control = CONTROLS[control]
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, relevance: Any, gradient: Tensor, output: Tensor) -> Tensor:
        """What to scale by, (batch, ...) in the shape of `output`."""
        return self._control(relevance, gradient, output, self._generator)
