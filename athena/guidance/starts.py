"""Where relevance starts in training, also in outputs with a class at each of many places: maps and token logits."""

from typing import Any

import torch
from torch import Tensor

from athena.guidance.settings import one_of
from athena.propagation.target import Target

__all__ = ["IGNORED", "known_target", "labels_for", "target_of"]
IGNORED = -100
"""The label from which nothing starts, as that of which `torch.nn.functional.cross_entropy` takes no notice."""


def known_target(name: str, target: Target) -> Target:
    """`target`; raises a ValueError, which names the argument, where it is a text that says nothing."""
    return one_of(name, target, ("softmax", "logits", "label")) if isinstance(target, str) else target


def target_of(output: Any, target: Target) -> Target:
    """A target that `athena.lrp` has, for an output with more dimensions than (batch, classes) as well.

    Classes stand in the second dimension, as `torch.nn.functional.cross_entropy` has them. In the ``logits`` of an
    output that is a dict, of shape (batch, tokens, classes), they stand in the last, as language models have them.
    Labels in the shape of the other dimensions decide where only one of the two fits.

    Args:
        output: of the model.
        target: None, ``"softmax"``, ``"logits"``, class indices in the shape of the output without its classes, or
            anything else, which is given back.

    Raises:
        ValueError: the labels have another shape, or classes that the output does not.
    """
    whole = isinstance(output, Tensor)
    tensor = output if whole else output.get("logits") if isinstance(output, dict) else None
    if not isinstance(tensor, Tensor) or tensor.dim() < 3 or not (target is None or isinstance(target, str | Tensor)):
        return target
    z = tensor.detach()
    dim = -1 if not whole and z.dim() == 3 else 1
    if isinstance(target, str):
        relevance = z.softmax(dim) if target == "softmax" else z
    elif target is None:
        relevance = torch.zeros_like(z).scatter_(dim, z.argmax(dim, keepdim=True), z.amax(dim, keepdim=True))
    else:
        relevance = _of_labels(z, target.to(z.device), dim)
    return lambda _: relevance if whole else {"logits": relevance}


def _of_labels(z: Tensor, labels: Tensor, dim: int) -> Tensor:
    """The logit of the true class at each place."""
    shapes = {1: z.shape[:1] + z.shape[2:], -1: z.shape[:-1]}
    if labels.shape != shapes[dim]:
        dim = -dim
    if labels.shape != shapes[dim]:
        raise ValueError(
            f"the labels have shape {tuple(labels.shape)}; for the model's output {tuple(z.shape)} they must have "
            f"{tuple(shapes[1])} or {tuple(shapes[-1])}"
        )
    counted = labels != IGNORED
    chosen = labels.where(counted, 0).long().unsqueeze(dim)
    if labels.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < z.shape[dim]:
        raise ValueError(
            f"the labels hold classes {int(chosen.min())} to {int(chosen.max())}; the model has classes 0 to "
            f"{z.shape[dim] - 1}, and {IGNORED} stands for none"
        )
    logits = z.gather(dim, chosen).masked_fill(~counted.unsqueeze(dim), 0)
    return torch.zeros_like(z).scatter_(dim, chosen, logits)


def labels_for(labels: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The class indices for a forward pass with these arguments: those set, as `Guidance.labels`, or its own."""
    found = labels(*args, **kwargs) if callable(labels) else labels
    found = kwargs.get("labels") if found is None else found
    if found is None:
        raise RuntimeError(
            "target='label' needs the classes: set guidance.labels = y before each forward pass, or to a function "
            "of the forward pass's arguments, or call the model with labels=y"
        )
    return found
