"""Where relevance starts: the relevance of a model's output that a target stands for."""

import copy
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from athena.propagation.layer import known, nonzero
from athena.propagation.notes import tensors_in

__all__ = ["Target", "described", "mapped", "start", "starts_down"]

Target = None | int | Tensor | str | Callable[[Any], Any] | tuple[Any, Any]


def start(output: Any, target: Any) -> Any:
    """The relevance of the output neurons that a pass starts from, (batch, classes).

    Args:
        output: of the model.
        target: as for `athena.lrp`.

    Raises:
        TypeError, ValueError: the output or the target is not of the form that `athena.lrp` takes.
    """
    if callable(target):
        relevance = target(mapped(output, known))
        if isinstance(relevance, Tensor) and isinstance(output, dict) and "logits" in output:
            relevance = {"logits": relevance}
        if relevance is None or not _alike(relevance, output):
            what = f"the structure of what the model returned, {described(output)}, with None where nothing is to start"
            if isinstance(output, Tensor):
                what = f"the output's shape {tuple(output.shape)}"
            raise ValueError(f"target(output) gave {described(relevance)}; it must have {what}")
        if not _pairs(output, relevance):
            raise ValueError("target(output) gave None for all that the model returned; relevance has nowhere to start")
        return mapped(relevance, known)
    if isinstance(target, tuple):
        return _of_token(known(_tensor(output)), *target)
    output = known(_logits(_tensor(output)))
    if isinstance(target, str):
        if target not in ("softmax", "logits"):
            raise ValueError(f"target={target!r}: the starts with a name are 'softmax' and 'logits'")
        return output.softmax(1) if target == "softmax" else output
    if target is None:
        logits, chosen = output.max(1, keepdim=True)
    else:
        chosen = _chosen(target, output)
        logits = output.gather(1, chosen)
    return torch.zeros_like(output).scatter(1, chosen, logits)


def starts_down(output: Any, target: Any, zeros: bool = False) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The relevance to start with, and each output tensor that has some, with the ``d`` it starts down with.

    Args:
        output, target: as for `start`.
        zeros: whether outputs of exactly 0 can have relevance; else it is lost there, and ``d`` is 0.

    Raises:
        TypeError, ValueError: as `start`.
    """
    relevance = start(output, target)
    if not callable(target):
        output, target = _tensor(output), target[1] if isinstance(target, tuple) else target
    if zeros or callable(target) or isinstance(target, str):
        return relevance, [(part, _over(its, part, zeros)) for part, its in _pairs(output, relevance)]
    return relevance, [(output, (relevance != 0).to(relevance.dtype))]  # a logit over itself


def _over(relevance: Tensor, output: Tensor, zeros: bool) -> Tensor:
    """``relevance / output``."""
    if zeros:
        return relevance / nonzero(known(output))
    is_zero = output == 0
    return (relevance / known(output).masked_fill(is_zero, 1)).masked_fill(is_zero, 0).nan_to_num(0.0, 0.0, 0.0)


def _tensor(output: Any) -> Tensor:
    """The output, or the logits in it."""
    if isinstance(output, dict) and isinstance(logits := output.get("logits"), Tensor):
        return logits
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {described(output)}; LRP starts from one tensor (batch, classes). For several give "
            "target as a function from the output to its relevance"
        )
    return output


def _logits(output: Tensor) -> Tensor:
    """The output, checked."""
    if output.dim() != 2:
        for_tokens = ", or for (batch, tokens, classes) as a pair (token, class)" if output.dim() == 3 else ""
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}; for anything but (batch, classes) give target as a "
            f"function from the output to its relevance{for_tokens}"
        )
    return output


def _of_token(output: Tensor, token: Any, target: Any) -> Tensor:
    """The relevance of an output (batch, tokens, classes), of which one token of each sample is to be explained."""
    if output.dim() != 3 or callable(target):
        raise ValueError(
            f"target=({described(token)}, {described(target)}) is for an output (batch, tokens, classes) and a target "
            f"that is no function; the model's output has shape {tuple(output.shape)}"
        )
    batch, tokens, _ = output.shape
    places = torch.as_tensor(token, device=output.device)
    if places.is_floating_point() or places.shape not in ((), (batch,)):
        raise TypeError(f"the token of target is {described(token)}; give an int, or integers ({batch},)")
    places = places.long().expand(batch)
    if batch and not (-tokens <= int(places.min()) and int(places.max()) < tokens):
        raise ValueError(f"the token of target is {described(token)}; the model's output has {tokens} tokens")
    chosen = torch.arange(batch, device=output.device), places % max(tokens, 1)
    return torch.zeros_like(output).index_put(chosen, start(output[chosen], target))


def _chosen(target: Any, output: Tensor) -> Tensor:
    """The class to explain for each sample, (batch, 1), which the target names."""
    batch, classes = output.shape
    given = target
    if hasattr(target, "__array__") and not isinstance(target, Tensor):  # numpy's numbers and arrays
        target = torch.as_tensor(target)
        target = int(target) if target.dim() == 0 and target.dtype == torch.long else target
    if isinstance(target, int) and not isinstance(target, bool):
        chosen = torch.full((batch,), target, device=output.device)
    elif isinstance(target, Tensor) and not target.is_floating_point() and target.dtype != torch.bool:
        chosen = target.to(output.device, torch.long)
    else:
        raise TypeError(
            f"target is {described(given)}; give None, a class, a LongTensor (batch,), 'softmax', 'logits' or a "
            "function"
        )
    if chosen.shape != (batch,):
        raise ValueError(f"target has shape {tuple(chosen.shape)}; for this batch it must be ({batch},)")
    low, high = (int(chosen.min()), int(chosen.max())) if batch else (0, 0)
    if not 0 <= low <= high < classes:
        raise ValueError(f"target holds classes {low} to {high}; the model has classes 0 to {classes - 1}")
    return chosen[:, None]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with all tensors changed that are in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = copy.copy(value)  # with the attributes of a class of its own
        for name, item in value.items():
            changed[name] = mapped(item, change)
        return changed
    return value


def described(value: Any) -> str:
    """What `value` is, for a message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict) and tensors_in(value):
        return (
            f"a {type(value).__name__} of {', '.join(f'{name!r}: {described(part)}' for name, part in value.items())}"
        )
    if isinstance(value, tuple | list) and tensors_in(value):
        return f"a {type(value).__name__} of {', '.join(map(described, value))}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _pairs(output: Any, relevance: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of an output with their relevance, without those from which nothing starts."""
    if relevance is None:
        return []
    if isinstance(output, Tensor):
        return [(output, relevance)]
    names = output if isinstance(output, dict) else range(len(output))
    return [pair for name in names for pair in _pairs(output[name], _part(relevance, name))]


def _part(relevance: Any, name: Any) -> Any:
    """The part by that name or number; None where a dict has none."""
    return relevance.get(name) if isinstance(relevance, dict) else relevance[name]


def _alike(relevance: Any, output: Any) -> bool:
    """Whether `relevance` is of the structure and shapes of `output`, None standing for any part."""
    if relevance is None:
        return True
    if isinstance(output, Tensor):
        return isinstance(relevance, Tensor) and relevance.shape == output.shape
    if isinstance(output, dict):
        return (
            isinstance(relevance, dict)
            and relevance.keys() <= output.keys()
            and all(_alike(relevance.get(name), part) for name, part in output.items())
        )
    return (
        isinstance(output, tuple | list)
        and isinstance(relevance, tuple | list)
        and len(relevance) == len(output)
        and all(_alike(*pair) for pair in zip(relevance, output, strict=True))
    )
