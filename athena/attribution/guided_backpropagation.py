"""Deconvolutional networks and guided backpropagation: gradients changed at each ReLU (thesis 3.3.2, 3.3.3).

Captum changes them at modules ``nn.ReLU`` alone. Here it is done at each ReLU of the graph, whoever called it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from athena.attribution.untouched import logits
from athena.propagation.activations import ActivationLRP, ReLULRP

__all__ = ["deconvolution", "guided_backpropagation", "kind_of", "nodes_below"]

Hook = Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]]


def deconvolution(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """What comes to a ReLU from above goes on where it is positive, whatever the ReLU's input was (Zeiler, Fergus).

    Raises:
        ValueError: the network has no ReLU, or other activations, for which the method says nothing.
    """
    return _gradient_with(lambda below, above: (above[0].clamp(min=0),), model, x, target, "a deconvolutional network")


def guided_backpropagation(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """What the gradient is below a ReLU goes on where it is positive (Springenberg et al. 2015).

    Raises:
        ValueError: the network has no ReLU, or other activations, for which the method says nothing.
    """
    return _gradient_with(lambda below, above: (below[0].clamp(min=0),), model, x, target, "guided backpropagation")


def _gradient_with(hook: Hook, model: nn.Module, x: Tensor, target: Tensor, method: str) -> Tensor:
    """The gradient of the logit with respect to `x`, changed by `hook` at each ReLU."""
    leaf = x.detach().requires_grad_()
    output = logits(model, leaf, target)
    found = False
    for node in nodes_below([output]):
        kind = kind_of(node)
        if kind == "Relu":
            found = True
            node.register_hook(hook)
        elif kind in (*ReLULRP.kinds, *ActivationLRP.kinds) and kind not in ("Abs", "Pow", "Sqrt"):
            raise ValueError(
                f"{type(model).__name__} uses {kind.lower()!r}; {method} is defined for ReLU alone, and would give the "
                "plain gradient there without a word"
            )
    if not found:
        raise ValueError(f"{type(model).__name__} has no ReLU, so that {method} would be the plain gradient: saliency")
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    return gradient


def nodes_below(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that `outputs` depend on, each once."""
    ahead: list[Any] = [out.grad_fn for out in outputs]
    seen = {None}
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead.extend(below for below, _ in node.next_functions)


def kind_of(node: Any) -> str:
    """The name of a node as the LRP layers list it: ``"Relu"`` for ``"ReluBackward0"``."""
    return re.sub(r"(^torch::autograd::)|(Backward\d*$)", "", node.name())
