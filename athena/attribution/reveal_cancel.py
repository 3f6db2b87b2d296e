"""DeepLIFT's reveal-cancel rule, for networks of linear layers with activations between (thesis 3.4).

Positive and negative parts of a difference are told apart, so that two inputs that cancel out are both seen.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from athena.attribution.completeness import missing

__all__ = ["reveal_cancel"]

ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Mish, nn.ReLU6),
)
PASSING = (nn.Flatten, nn.Dropout, nn.Identity)


class _Step(NamedTuple):
    """What one layer leaves for the way back.

    Attributes:
        layer: a linear layer, or an activation.
        up, down: for a linear layer the difference of its input in `up`; for an activation the shares of the positive
            and of the negative part of its input's difference that come out of it.
    """

    layer: nn.Module
    up: Tensor
    down: Tensor


def reveal_cancel(model: nn.Module, x: Tensor, target: Tensor, baseline: Tensor) -> Tensor:
    """DeepLIFT by equations of sections 3.5.1 and 3.5.3 of Shrikumar et al. 2017; `baseline` is of the shape of `x`.

    Raises:
        ValueError: the network is not a `nn.Sequential` of linear layers, activations, flattening and dropout.
    """
    layers = _chain(model)
    steps: list[_Step] = []
    with torch.no_grad():
        a, at = x.flatten(1), baseline.flatten(1)
        plus, minus = (a - at).clamp(min=0), (a - at).clamp(max=0)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                delta = plus + minus
                steps.append(_Step(layer, delta, delta))
                up, down = delta.clamp(min=0), delta.clamp(max=0)
                w, v = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
                plus, minus = up @ w.T + down @ v.T, up @ v.T + down @ w.T
                at = layer(at)
            else:
                f = layer.forward
                out, up, down, both = f(at.clone()), f(at + plus), f(at + minus), f(at + plus + minus)
                went_up, went_down = (up - out + both - down) / 2, (down - out + both - up) / 2
                steps.append(_Step(layer, _over(went_up, plus), _over(went_down, minus)))
                plus, minus, at = went_up, went_down, out
        difference = (plus + minus).gather(1, target[:, None])[:, 0]
        m_plus = m_minus = torch.zeros_like(plus).scatter_(1, target[:, None], 1.0)
        for step in reversed(steps):
            if isinstance(step.layer, nn.Linear):
                w, v = step.layer.weight.clamp(min=0), step.layer.weight.clamp(max=0)
                of_up, of_down = m_plus @ w + m_minus @ v, m_plus @ v + m_minus @ w
                mixed = torch.where(step.up > 0, of_up, torch.where(step.up < 0, of_down, (of_up + of_down) / 2))
                m_plus = m_minus = mixed
            else:
                m_plus, m_minus = m_plus * step.up, m_minus * step.down
        delta = x.flatten(1) - baseline.flatten(1)
        found = (torch.where(delta > 0, m_plus, m_minus) * delta).view_as(x)
    if missed := missing(found, difference):
        raise ValueError(f"DeepLIFT by reveal-cancel on {type(model).__name__}: {missed}. Use float64, or another rule")
    return found


def _chain(model: nn.Module) -> list[nn.Module]:
    """The linear layers and activations of a chain, in order."""
    layers: list[nn.Module] = []
    for module in model if isinstance(model, nn.Sequential) else [model]:
        if isinstance(module, nn.Sequential):
            layers += _chain(module)
        elif isinstance(module, (nn.Linear, *ACTIVATIONS)):
            layers.append(module)
        elif not isinstance(module, PASSING):
            raise ValueError(
                f"reveal-cancel is for nn.Sequential of linear layers and activations; {type(model).__name__} holds "
                f"{type(module).__name__}: use rule='rescale'"
            )
    return layers


def _over(went: Tensor, came: Tensor) -> Tensor:
    return torch.where(came == 0, 0.0, went / came)
