"""The names of layers: from a weight, or what it is computed from, to the module path of the layer that owns it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from athena.propagation.layer import UnsupportedLayer

__all__ = ["Paths", "numbered", "path_of_parameter"]

# A layer's weight, and what it is computed from by weight norm, spectral norm or pruning.
_WEIGHT = re.compile(r"\.(weight(_g|_v|_orig)?|parametrizations\.weight\..+)$")

JOINING = ("AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0")


def numbered(paths: Iterable[str]) -> list[str]:
    """`paths`, each further use of one with its number: ``path#2``."""
    uses: Counter[str] = Counter()
    found = []
    for path in paths:
        uses[path] += 1
        found.append(path if uses[path] == 1 else f"{path}#{uses[path]}")
    return found


def path_of_parameter(name: str) -> str:
    """The path of the layer with the parameter called `name`: that of its module, if it is the module's weight."""
    return _WEIGHT.sub("", name)


class Paths:
    """The module paths of a model and of its parameters, read again when it uses a parameter that is new.

    Attributes:
        model: the model.
        modules: each module by its path; that of the model itself is ``""``.
        has_frozen_parameters: whether some ask for no gradients.

    Raises:
        UnsupportedLayer: the model, or a part of it, is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self._parameters: dict[int, tuple[Tensor, str]] | None = None
        self._read()

    def _read(self) -> None:
        """`nn.Module.named_modules`, in a quarter of its time."""
        self.modules, found, self._parameters, self.has_frozen_parameters = {}, set[int](), None, False
        ahead: list[tuple[str, nn.Module]] = [("", self.model)]
        while ahead:
            path, module = ahead.pop()
            if id(module) in found:
                continue
            found.add(id(module))
            self.modules[path] = module
            children = module._modules
            if "_orig_mod" in children or module._compiled_call_impl is not None:
                raise UnsupportedLayer(
                    f"{path or type(module).__name__!r} is compiled, and torch.compile hides what a model does from "
                    "LRP; give the model before compilation"
                )
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.requires_grad:
                    self.has_frozen_parameters = True
            if children:
                start = f"{path}." if path else ""
                ahead.extend((start + name, child) for name, child in reversed(children.items()) if child is not None)

    def module_at(self, path: str) -> nn.Module:
        """The module at `path`; the model where that is the path of a parameter."""
        return self.modules.get(path, self.model)

    def _read_parameters(self) -> dict[int, tuple[Tensor, str]]:
        read: dict[int, tuple[Tensor, str]] = {}
        for path, module in self.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in read:
                    read[id(parameter)] = parameter, path_of_parameter(f"{path}.{name}".removeprefix("."))
        return read

    def of(self, parameter: Tensor | None) -> str | None:
        """The path of the layer that owns `parameter`; None where it is no parameter of the model."""
        if self._parameters is None:
            self._parameters = self._read_parameters()
        owner, path = self._parameters.get(id(parameter), (None, None))
        if owner is None and isinstance(parameter, nn.Parameter):
            self._read()
            self._parameters = self._read_parameters()
            owner, path = self._parameters.get(id(parameter), (None, None))
        return path if owner is parameter else None

    def buffers(self) -> list[Tensor]:
        """The buffers of the model."""
        return [tensor for module in self.modules.values() for tensor in module._buffers.values() if tensor is not None]

    def below(self, node: Any, original: Callable[[Tensor], Tensor | None], alone: bool = False) -> str | None:
        """The path of the layer whose parameters alone the operation at a graph node depends on; None where others are.

        Looks a few operations far: a weight that is transposed, cast, scaled, or computed by a parametrisation.

        Args:
            node: of the graph, or None.
            original: from a leaf of the graph to the parameter that it stands for.
            alone: whether nothing that asks for no gradients, as the input in training, may be added or joined to it.
        """
        found: str | None = None
        ahead, looked = [node], 0
        while ahead:
            node, looked = ahead.pop(), looked + 1
            if node is None:
                continue
            if looked > 300:
                return None
            parameter = getattr(node, "variable", None)
            if parameter is None:
                if alone and node.name() in JOINING and any(lower is None for lower, _ in node.next_functions):
                    return None
                ahead.extend(lower for lower, _ in node.next_functions)
                continue
            path = self.of(original(parameter))
            if path is None or found not in (None, path):
                return None
            found = path
        return found
