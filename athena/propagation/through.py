"""Relevance that is let through at some channels of a module alone: that of a concept which these channels stand for.

Concept-conditional relevance (Achtibat et al. 2023, doi 10.1038/s42256-023-00711-8): on its way down, relevance is kept
at the channels that are named and set to 0 at all others of the same output. What goes around the module, as by a
residual connection, is not cut.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from athena.propagation.inputs import module_at
from athena.propagation.layer import nonzero, total
from athena.propagation.notes import tensors_in
from athena.propagation.target import described

if TYPE_CHECKING:
    from athena.propagation.walk import Walk

__all__ = ["Channels", "Through"]

Channels = Sequence[int] | Sequence[bool] | Tensor
"""Numbers of channels, or a mask."""


class Cut(NamedTuple):
    """What is let through at one output of a graph node.

    Attributes:
        path: of the module.
        mask: that broadcasts to the output.
        value: the output, where there is an account.
    """

    path: str
    mask: Tensor
    value: Tensor | None


class Through:
    """Where relevance is let through, in one pass.

    Args:
        model, channels: as for `athena.lrp`.
        keeps_values: whether there is an account.

    Raises:
        ValueError: the model has no module at one of the paths.
    """

    def __init__(self, model: nn.Module, channels: Mapping[str, Channels], keeps_values: bool) -> None:
        self._modules = {path: module_at(model, path, "through") for path in channels}
        self._channels, self._keeps_values = channels, keeps_values
        self._cuts: dict[Any, dict[int, Cut]] = defaultdict(dict)
        self._reached: set[str] = set()

    def __contains__(self, node: Any) -> bool:
        return node in self._cuts

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of the block, takes note of what the modules give out.

        Raises:
            TypeError, ValueError: channels that their outputs do not have.
        """
        given: dict[str, set[Any]] = {}

        def enter(path: str, *arguments: Any) -> None:
            given[path] = {_edge(tensor) for tensor in tensors_in(arguments) if tensor.requires_grad}

        def leave(path: str, output: Any) -> Any:
            outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
            if len(outputs) != 1:
                raise ValueError(f"through: {path!r} gives {described(output)}; name a module that gives one tensor")
            if not outputs[0].requires_grad:
                return output
            mask = _mask(path, self._channels[path], outputs[0])
            if _edge(outputs[0]) in given[path]:  # it gives out what it was given, which others may read, too
                if outputs[0] is not output:
                    raise ValueError(f"through: {path!r} gives out what it was given; name another module")
                output = output.view_as(output)
                outputs = [output]
            node, number = _edge(outputs[0])
            value = outputs[0].detach().clone() if self._keeps_values else None  # it may be changed in place
            self._cuts[node][number] = Cut(path, mask, value)
            return output

        handles = []
        for path, module in self._modules.items():
            handles += [
                module.register_forward_pre_hook(lambda _, *both, path=path: enter(path, *both), with_kwargs=True),
                module.register_forward_hook(lambda *three, path=path: leave(path, three[2])),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def cut(self, walk: "Walk", node: Any, ds: dict[Any, Tensor]) -> None:
        """Cuts what has come to the outputs of a node."""
        layer = walk.layers.get(node)
        if layer is not None and layer.passes:  # merged with a batch norm above, where it was cut
            return
        rectified = walk.values.get(node) if layer is not None and node in walk.rectified else None
        for number, (_, _, value) in self._cuts[node].items():
            if (d := ds.get((node, number))) is not None:
                if value is not None and rectified is not None:  # where the ReLU above gives 0, ``d`` may be anything
                    value = rectified.reshape(value.shape)
                ds[node, number] = self.kept(walk, node, d, value, number)

    def kept(self, walk: "Walk", node: Any, d: Tensor, value: Tensor | None, number: int = 0) -> Tensor:
        """What is kept of the ``d`` of one output, whose value is asked for where there is an account."""
        path, mask, _ = self._cuts[node][number]
        self._reached.add(path)
        kept = d * mask
        if walk.account is not None and value is not None:
            z = nonzero(value) if walk.zeros else value
            walk.account.cut(node, path, total(z * d), total(z * (d - kept)))
        return kept

    def require_all_reached(self) -> None:
        """Raises a ValueError where no relevance came to one of the modules."""
        if missed := [path for path in self._modules if path not in self._reached]:
            raise ValueError(
                f"through: no relevance came to the output of {missed[0]!r}; the model does not call that module for "
                "this x, or does not use what it gives, or it is below what is explained"
            )


def _edge(tensor: Tensor) -> Any:
    place = get_gradient_edge(tensor)
    return place.node, place.output_nr


def _mask(path: str, channels: Channels, output: Tensor) -> Tensor:
    """The mask of an output, which broadcasts to it."""
    chosen, shape = torch.as_tensor(channels, device=output.device), tuple(output.shape)
    if chosen.dtype == torch.bool and chosen.dim() > 1:
        if chosen.dim() != len(shape) or any(
            its not in (1, size) for its, size in zip(chosen.shape, shape, strict=True)
        ):
            raise ValueError(f"through: {path!r} gives {shape}; a mask of {tuple(chosen.shape)} does not fit that")
        mask = chosen
    else:
        count = shape[1] if len(shape) > 1 else 0
        if chosen.dim() != 1 or (chosen.is_floating_point() and chosen.numel()):
            raise TypeError(
                f"through: for {path!r} it is {described(channels)}; give a list of channels, or a mask of bool"
            )
        if chosen.dtype == torch.bool and len(chosen) != count:
            raise ValueError(f"through: {path!r} gives {shape}, so {count} channels; the mask has {len(chosen)}")
        if chosen.dtype != torch.bool and (wrong := [its for its in chosen.tolist() if not -count <= its < count]):
            raise ValueError(f"through: {path!r} gives {shape}; it has no channel {wrong[0]}, only 0 to {count - 1}")
        mask = torch.zeros(count, dtype=torch.bool, device=output.device)
        mask[chosen if chosen.dtype == torch.bool else chosen.long()] = True
        mask = mask.view(1, -1, *[1] * (len(shape) - 2))
    if not mask.any():
        raise ValueError(f"through: no channel of {path!r} is let through, so that no relevance would be left")
    return mask
