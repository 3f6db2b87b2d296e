"""LRP factors, one for all guided layers or one by path, which may be learned; and which layers a scope names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from athena.guidance.settings import one_of
from athena.propagation.affine import AffineLRP, ConvolutionalLRP, LinearLRP
from athena.propagation.paths import path_of_parameter

__all__ = ["LEARN", "SCOPES", "Factors"]

LEARN = "learn"
"""In the place of a factor: one for each layer, learned from held-out data."""

SCOPES: dict[str, tuple[type[AffineLRP], ...]] = {
    "all": (LinearLRP, ConvolutionalLRP),
    "linear": (LinearLRP,),
    "convolutional": (ConvolutionalLRP,),
}
NEVER_GUIDED = (*(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU),)
"""Modules whose parameters are the weights of no linear layer or convolution that autograd shows."""


class Factors:
    """The LRP factor of each layer.

    Args:
        factor, scope: as for `athena.Guidance`.
        model: whose layers they name.

    Attributes:
        learned: with the factor ``"learn"``, that of each layer that was guided so far, by path.

    Raises:
        ValueError, TypeError: they are not of that form, or name what the model does not have or what is never guided.
    """

    def __init__(self, factor: float | Mapping[str, float] | str, scope: str | Sequence[str], model: nn.Module) -> None:
        self.scope, self.model, self.factor = scope, model, factor
        self.learned: dict[str, Tensor] = {}
        if isinstance(factor, Mapping):
            self.factor = {path: _number(value, f" of {path!r}") for path, value in factor.items()}
        elif not isinstance(factor, str) or factor != LEARN:
            self.factor = _number(factor)
        self.by_path = self.factor if isinstance(self.factor, dict) else None
        paths = set(self.by_path or ())
        if isinstance(scope, str):
            one_of("scope", scope, tuple(SCOPES), "or a list of module paths")
        else:
            paths.update(scope)
        known, never = {path_of_parameter(name) for name, _, _ in _weights(model)}, _never_guided(model)
        if unknown := sorted(paths - known):
            raise ValueError(f"the model has no layer with weights at {unknown}; it has {sorted(known - set(never))}")
        if named := sorted(paths & set(never)):
            raise ValueError(
                f"{', '.join(f'{path!r} ({never[path]})' for path in named)} can never be guided: guidance acts at "
                f"linear layers and convolutions, here {sorted(known - set(never))}"
            )

    def guides(self, path: str, kind: type[AffineLRP]) -> bool:
        """Whether the layer at `path` is to be guided."""
        if self.by_path is not None:
            return bool(self.by_path.get(path))
        return bool(self.factor) and (kind in SCOPES[self.scope] if isinstance(self.scope, str) else path in self.scope)

    def of(self, path: str) -> float | Tensor:
        """The factor of a guided layer; while it is learned, a leaf () of the graph, in float64, that starts at 0."""
        if self.factor == LEARN:
            if path not in self.learned:
                self.learned[path] = torch.zeros((), dtype=torch.float64, requires_grad=True)
            return self.learned[path]
        return self.factor if self.by_path is None else self.by_path[path]  # type: ignore[return-value]

    def names_frozen(self) -> bool:
        """Whether a weight that would be guided asks for no gradient now."""
        never = _never_guided(self.model)
        for name, weight, _ in _weights(self.model):
            path, kind = path_of_parameter(name), LinearLRP if weight.dim() <= 2 else ConvolutionalLRP
            if not weight.requires_grad and path not in never and self.guides(path, kind):
                return True
        return False

    def sentence(self) -> str:
        """What to tell the user where factors that were to be learned have not been; empty where all is well."""
        if not self.learned or any(self.learned.values()):
            return ""
        return (
            f"factor={LEARN!r}, and all factors are still 0, with which training is plain: call "
            "guidance.learn(loss, held_out) between the forward pass and backward()"
        )

    def __bool__(self) -> bool:
        """Whether there is one that is not 0."""
        return bool(self.factor) if self.by_path is None else any(self.by_path.values())


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """The name of each parameter but biases, by its first place in the model; the parameter; the module it is of."""
    found, seen = [], set[int]()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and "bias" not in name:
                seen.add(id(parameter))
                found.append((f"{path}.{name}".removeprefix("."), parameter, module))
    return found


def _never_guided(model: nn.Module) -> dict[str, str]:
    """The kind of module at each path whose weights can never be guided. A weight shared with a linear layer can."""
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, NEVER_GUIDED)
        for parameter in module.parameters(recurse=False)
    }
    return {
        path_of_parameter(name): type(module).__name__
        for name, weight, module in _weights(model)
        if isinstance(module, NEVER_GUIDED) and id(weight) not in elsewhere
    }


def _number(value: Any, of: str = "") -> float:
    """A number of Python, numpy or torch, as a float."""
    try:
        number = math.nan if isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0 else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(f"factor{of} is {value!r}; give a finite number{'' if of else f', or {LEARN!r}'}")
    return number
