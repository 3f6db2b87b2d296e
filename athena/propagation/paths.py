"""The names of layers: from a weight, or what it is computed from, to the module path of the layer that owns it."""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from athena.propagation.layer import UnsupportedLayer

__all__ = ["Paths", "path_of_parameter"]

# A layer's weight, and what it is computed from by weight norm, spectral norm or pruning.
_WEIGHT = re.compile(r"\.(weight(_g|_v|_orig)?|parametrizations\.weight\..+)$")


def path_of_parameter(name: str) -> str:
    """The path of the layer with the parameter called `name`: that of its module, if it is the module's weight."""
    return _WEIGHT.sub("", name)


class Paths:
    """The module paths of a model and of its parameters, read again when it uses a parameter that is new.

    Attributes:
        model: the model.
        modules: each module by its path; that of the model itself is ``""``.

    Raises:
        UnsupportedLayer: the model, or a part of it, is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._read()

    def _read(self) -> None:
        self.modules = dict(self.model.named_modules())
        self._parameters: dict[int, tuple[Tensor, str]] = {}
        for path, module in self.modules.items():
            if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
                raise UnsupportedLayer(
                    f"{path or type(module).__name__!r} is compiled, and torch.compile hides what a model does from "
                    "LRP; give the model before compilation"
                )
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self._parameters:
                    path_of_layer = path_of_parameter(f"{path}.{name}".removeprefix("."))
                    self._parameters[id(parameter)] = parameter, path_of_layer

    def of(self, parameter: Tensor | None) -> str | None:
        """The path of the layer that owns `parameter`; None where it is no parameter of the model."""
        owner, path = self._parameters.get(id(parameter), (None, None))
        if owner is None and isinstance(parameter, nn.Parameter):
            self._read()
            owner, path = self._parameters.get(id(parameter), (None, None))
        return path if owner is parameter else None

    def below(self, node: Any, original: Callable[[Tensor], Tensor | None]) -> str | None:
        """The path of the layer whose parameters alone the operation at a graph node depends on; None where others are.

        Looks a few operations far: a weight that is transposed, cast, scaled, or computed by a parametrisation.

        Args:
            node: of the graph, or None.
            original: from a leaf of the graph to the parameter that it stands for.
        """
        found: str | None = None
        ahead, looked = [node], 0
        while ahead:
            node, looked = ahead.pop(), looked + 1
            if node is None:
                continue
            if looked > 24:
                return None
            parameter = getattr(node, "variable", None)
            if parameter is None:
                ahead.extend(lower for lower, _ in node.next_functions)
                continue
            path = self.of(original(parameter))
            if path is None or found not in (None, path):
                return None
            found = path
        return found
