"""The model that is guided: how its forward pass is taken over, who may be guided, and what it did without guidance."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from athena.propagation.layer import UnsupportedLayer
from athena.propagation.walk import Walk

__all__ = [
    "GuidedForward",
    "Here",
    "Idle",
    "gathered",
    "refuse_checkpoints",
    "refuse_guided",
    "refuse_transforms",
    "unwrapped",
]

_guided = weakref.WeakSet[nn.Module]()


class Here(threading.local):
    """What one thread does with a guided model.

    Attributes:
        passing: whether its forward pass is running.
        called: whether the module was called, so that its forward hooks will run, and not ``model.forward`` alone.
        late: the handle of what is to happen after those hooks.
    """

    passing = False
    called = False
    late: Any = None


class GuidedForward:
    """Stands in the place of a guided model's ``forward``.

    Args:
        model: that is guided.
        run: one forward pass, from the model's own ``forward``, the arguments and the named ones.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        self.model, self.run, self.__wrapped__ = model, run, model.forward
        self._own = vars(model).get("forward")
        _guided.add(model)
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass."""
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        return self.run(self.__wrapped__, args, kwargs)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.model.training or not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        return _uncompiled(self.run, self.__wrapped__, args, kwargs)

    def remove(self) -> None:
        """Gives the model its own back."""
        if vars(self.model).get("forward") is self:
            _guided.discard(self.model)
            del self.model.forward
            if self._own is not None:
                self.model.forward = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its own forward pass, which is not guided."""
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise for a model that is unpickled."""
        return getattr, (self.model, "forward")


@torch._disable_dynamo
def _uncompiled(run: Callable[..., Any], *arguments: Any) -> Any:
    """``run(*arguments)``, which torch.compile leaves alone."""
    return run(*arguments)


class Idle:
    """Whether a model was trained although no forward pass was guided, and why.

    Attributes:
        reason: of the last pass that was not guided, or None.
        off: whether there was a pass that was not meant to be guided.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.reason, self.off = model, "", False
        self._before = [(weakref.ref(p), p._version, p.grad is None) for p in model.parameters()]

    def sentence(self) -> str:
        """What to tell the user; empty where all is well."""
        trained = any(
            (parameter := reference()) is not None
            and (parameter._version != version or (had_none and parameter.grad is not None))
            for reference, version, had_none in self._before
        )
        if self.off or not trained:
            return ""
        name = type(self._model).__name__
        reason = self.reason or (
            f"{name} itself was not called in training. Guide the module that the loop calls: not the LightningModule "
            "whose training_step calls self.net(x), but self.net. And guide a model before torch.compile"
        )
        return f"guidance never acted, and {name} was trained plainly: {reason}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of PyTorch's wrappers for training on several devices."""
    while isinstance(model, DistributedDataParallel | DataParallel) or (
        type(model).__name__ == "FullyShardedDataParallel"
    ):
        inside = model.module
        assert isinstance(inside, nn.Module)
        model = inside
    return model


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Meanwhile, all of the parameters are here that parts of `model` have given back after their forward pass.

    So do the parts that `torch.distributed.fsdp` shards; the model itself keeps its own by default.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    first = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    handles = [handle for module in first if (handle := module._handle) is not None and handle.needs_unshard()]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for handle in handles:
        handle.pre_unshard()
        handle.unshard()
        handle.post_unshard()
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for handle in handles:
            handle.reshard(True)
            handle.post_reshard()
        for module in sharded:
            if module is not model:
                module.reshard()


def refuse_guided(model: nn.Module) -> None:
    """Raises a RuntimeError where the model, a part of it, or a model that it is a part of is guided already."""
    advice = (
        "is guided already, and a second guidance would scale its gradients twice: call remove() on the first, or give "
        "one a factor for each layer"
    )
    for path, module in model.named_modules():
        if isinstance(vars(module).get("forward"), GuidedForward):
            raise RuntimeError(f"{f'the part {path!r} of ' if path else ''}this model {advice}")
    for whole in _guided:
        for path, module in whole.named_modules():
            if module is model:
                raise RuntimeError(f"{type(whole).__name__}, of which this is the part {path!r}, {advice}")


def refuse_transforms() -> None:
    """Raises where the forward pass runs under a transform of torch.func that guidance cannot follow."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    for interpreter in retrieve_all_functorch_interpreters():
        if interpreter.key().name in ("Vmap", "Jvp"):
            raise UnsupportedLayer(
                f"a forward pass under torch.func.{interpreter.key().name.lower()} cannot be guided; for gradients of "
                "each sample call the model and backward() on one sample at a time, or remove() the guidance first"
            )


def refuse_checkpoints(walk: Walk) -> None:
    """Raises where relevance would have to come through a checkpoint that no second backward pass comes through."""
    if walk.has_reentrant_checkpoint and (hidden := walk.notes.without_graph):
        raise UnsupportedLayer(
            f"{walk.paths.of(hidden[0])!r} runs under torch.utils.checkpoint with use_reentrant=True, and so cannot be "
            "guided; with use_reentrant=False it can"
        )
    if once := [layer.path for layer in walk.layers.values() if layer.note is not None and layer.note.once]:
        raise UnsupportedLayer(
            f"{once[0]!r} runs under a selective checkpoint (context_fn=...), which lets one backward pass through, "
            "and relevance is one more: leave out context_fn, or guide only layers above that part"
        )
