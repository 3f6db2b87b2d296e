"""LRP factors: one number for all guided layers, or one by path; and which layers a scope names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from athena.propagation.affine import AffineLRP, ConvolutionalLRP, LinearLRP
from athena.propagation.paths import path_of_parameter

__all__ = ["SCOPES", "Factors", "one_of"]

SCOPES: dict[str, tuple[type[AffineLRP], ...]] = {
    "all": (LinearLRP, ConvolutionalLRP),
    "linear": (LinearLRP,),
    "convolutional": (ConvolutionalLRP,),
}


class Factors:
    """The LRP factor of each layer.

    Args:
        factor, scope: as for `athena.Guidance`.
        model: whose layers they name.

    Raises:
        ValueError, TypeError: they are not of that form, or name what the model does not have.
    """

    def __init__(self, factor: float | Mapping[str, float], scope: str | Sequence[str], model: nn.Module) -> None:
        self.factor, self.scope = factor, scope
        self.by_path = dict(factor) if isinstance(factor, Mapping) else None
        given = {"": factor} if self.by_path is None else self.by_path
        for path, number in given.items():
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise TypeError(f"factor{f' of {path!r}' if path else ''} is {number!r}; give a finite number")
        paths = set() if self.by_path is None else set(self.by_path)
        if isinstance(scope, str):
            one_of("scope", scope, tuple(SCOPES), "or a list of module paths")
        else:
            paths.update(scope)
        known = {path_of_parameter(name) for name, _ in model.named_parameters() if not name.endswith("bias")}
        if unknown := sorted(paths - known):
            raise ValueError(f"the model has no layer with weights at {unknown}; it has {sorted(known)}")

    def of(self, path: str, kind: type[AffineLRP]) -> float:
        """The factor of the layer at `path`; 0 where it is not guided."""
        if self.by_path is not None:
            return float(self.by_path.get(path, 0.0))
        inside = kind in SCOPES[self.scope] if isinstance(self.scope, str) else path in self.scope
        return float(self.factor) if inside else 0.0  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """Whether there is one that is not 0."""
        return bool(self.factor) if self.by_path is None else any(self.by_path.values())


def one_of(name: str, value: Any, allowed: tuple[Any, ...], otherwise: str = "") -> None:
    """Raises a ValueError that names the argument and its value, unless that is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))} {otherwise}".rstrip())
