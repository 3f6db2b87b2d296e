"""How a model is called, and which tensors are explained: its inputs, or what one of its modules makes of them."""

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from athena.propagation.notes import tensors_in
from athena.propagation.target import described, mapped

__all__ = ["Inputs", "module_at", "outside_inference_mode"]


def module_at(model: nn.Module, path: str, argument: str) -> nn.Module:
    """The module at `path`.

    Raises:
        ValueError: there is none; the message names the argument of `athena.lrp`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        near = " or ".join(map(repr, difflib.get_close_matches(str(path), modules, 3, 0.4))) or "model.named_modules()"
        raise ValueError(f"{argument}: {type(model).__name__} has no module {path!r}; see {near}")
    return modules[path]


def outside_inference_mode() -> AbstractContextManager[Any]:
    """A block in which autograd records; to leave a mode that is not on takes time."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Inputs:
    """What a model is given.

    Args:
        x, at: as for `athena.lrp`.
        model: the model.
        full: what a tensor is cast by.
        keeps_graph: whether `x` keeps its graph.

    Attributes:
        sources: after a call, the tensors that are explained, leaves of the graph.
        device: of the first tensor.

    Raises:
        TypeError, ValueError: `x` or `at` is not of the form that `athena.lrp` takes.
    """

    def __init__(
        self, model: nn.Module, x: Any, at: str | None, full: Callable[[Tensor], Tensor], keeps_graph: bool
    ) -> None:
        self.at, self.sources, self._goes_on = at, list[Tensor](), False
        self._module = None if at is None else module_at(model, at, "at")
        self._is_single = not isinstance(x, tuple | dict)
        self._names = list(x) if isinstance(x, dict) else None
        values = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else [x]
        with outside_inference_mode():
            own = Tensor.clone if any(value.is_inference() for value in tensors_in(values)) else Tensor.detach
            self._values = mapped(values, lambda tensor: full(tensor if keeps_graph else own(tensor)))
        floating = [isinstance(value, Tensor) and value.is_floating_point() for value in values]
        self._explained = [at is None and its for its in floating]
        if at is None:
            for value, is_explained in zip(values, floating, strict=True):
                if not is_explained and (self._names is None or not any(floating)):
                    raise TypeError(
                        f"x is {described(value)}; lrp explains a floating point tensor (batch, ...): give an image as "
                        "x.float(), and for tokens name the module that embeds them, at='path'"
                    )
        tensors = tensors_in(self._values) or list(model.parameters())[:1]
        self.device = tensors[0].device if tensors else torch.device("cpu")

    def call(self, model: nn.Module, differentiable: bool = False) -> Any:
        """The output of the model, with its graph down to new `sources`, and below them if it is to be differentiable.

        Autograd knows each source by a graph node of its own.
        """
        self.sources.clear()
        self._goes_on = differentiable
        if self._module is None:
            values = [
                self._source(value) if is_explained else value
                for value, is_explained in zip(self._values, self._explained, strict=True)
            ]
            return self._called(model, values)
        handle = self._module.register_forward_hook(lambda module, args, output: mapped(output, self._cut))
        try:
            output = self._called(model, self._values)
        finally:
            handle.remove()
        if not self.sources:
            raise ValueError(
                f"at={self.at!r}: the model did not call that module for this x, or it gave no floating point tensor"
            )
        return output

    def _called(self, model: nn.Module, values: Sequence[Any]) -> Any:
        return model(*values) if self._names is None else model(**dict(zip(self._names, values, strict=True)))

    def _source(self, tensor: Tensor) -> Tensor:
        goes_on = self._goes_on and tensor.requires_grad
        self.sources.append(source := tensor.view_as(tensor) if goes_on else tensor.detach().requires_grad_())
        return source

    def _cut(self, tensor: Tensor) -> Tensor:
        """What a module has made, with no graph below it; the model may change it in place."""
        return self._source(tensor).clone() if tensor.is_floating_point() else tensor

    def arranged(self, relevance: Sequence[Tensor]) -> Any:
        """The relevance of `sources` as `athena.lrp` returns it."""
        if self.at is not None:
            return relevance[0] if len(relevance) == 1 else tuple(relevance)
        if self._names is not None:
            names = [name for name, its in zip(self._names, self._explained, strict=True) if its]
            return dict(zip(names, relevance, strict=True))
        return relevance[0] if self._is_single else tuple(relevance)
