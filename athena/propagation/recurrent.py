"""Recurrent layers, `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells, written out in operations that have LRP layers.

Gates by signal-takes-all (Arras et al. 2019, "Explaining and Interpreting LSTMs"): of a product of a gate and a signal
the signal gets all, and no relevance goes into the gate. The rest is sums, activations and layers with
weights, each with its own rule; so relevance is conserved but for what biases keep. A layer is known by its weight,
``lstm.weight_ih_l0``; that on the hidden state is used once in each step.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from athena.propagation.euler import EulerLRP
from athena.propagation.notes import NOTED, Notes, named, tensors_in

if TYPE_CHECKING:
    from athena.propagation.walk import Walk

State = tuple[Tensor, ...]
Gate = Callable[[Tensor], Tensor]


class RecurrentLRP(EulerLRP):
    """What PyTorch's own recurrent layers leave in the graph; it is not there where notes are taken."""

    kinds = ("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn", "ThnnFusedLstmCell", "ThnnFusedGruCell", "UnsafeSplit")

    @classmethod
    def down(cls, walk: "Walk", node: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Has notes taken."""
        walk.require_notes()
        return super().down(walk, node, given)


def lstm(of_x: Tensor, state: State, of_h: Tensor, gate: Gate) -> State:
    """One step of a long short-term memory, from what the weights make of its input and of ``h``, each (batch, 4 H)."""
    inner, forget, cell, outer = (of_x + of_h).chunk(4, -1)
    c = gate(forget) * state[1] + gate(inner) * cell.tanh()
    return gate(outer) * c.tanh(), c


def gru(of_x: Tensor, state: State, of_h: Tensor, gate: Gate) -> State:
    """One step of a gated recurrent unit; likewise, each (batch, 3 H)."""
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    update = gate(update_x + update_h)
    new = (new_x + gate(reset_x + reset_h) * new_h).tanh()
    return ((1 - update) * new + update * state[0],)


def rnn_tanh(of_x: Tensor, state: State, of_h: Tensor, gate: Gate) -> State:
    """One step of an Elman network."""
    return ((of_x + of_h).tanh(),)


def rnn_relu(of_x: Tensor, state: State, of_h: Tensor, gate: Gate) -> State:
    """The same with ReLU."""
    return ((of_x + of_h).relu(),)


CELLS = {cell.__name__: cell for cell in (lstm, gru, rnn_tanh, rnn_relu)}


def _cell(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step: of an input, a state, and the weights and biases on both."""
    if not _is_recorded(args, kwargs):
        return function(*args, **kwargs)
    notes.needed = True
    x, state, w_x, w_h, b_x, b_h = (*args, None, None)[:6]
    step = CELLS[function.__name__.removesuffix("_cell")]
    state = (state,) if isinstance(state, Tensor) else tuple(state)
    with notes:
        state = step(F.linear(x, w_x, b_x), state, F.linear(state[0], w_h, b_h), _gate_of(notes))
    return state if step is lstm else state[0]


def _layers(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All steps of all layers and directions."""
    if not _is_recorded(args, kwargs):
        return function(*args, **kwargs)
    notes.needed = True
    is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    x, sizes, given = args[0], args[1].tolist() if is_packed else None, args[1 + is_packed :]
    start, weights, has_biases, layers, dropout, training, both_ways, *rest = given
    batch_first = bool(rest and rest[0])
    step, ways = CELLS[function.__name__], 2 if both_ways else 1
    starts = (start,) if isinstance(start, Tensor) else tuple(start)
    own = len(weights) // (layers * ways)  # of one layer in one direction; with a projection there is one more
    ends: list[State] = []
    with notes:
        x = x.transpose(0, 1) if batch_first else x
        for layer in range(layers):
            outputs = []
            for way in range(ways):
                number = layer * ways + way
                w_x, w_h, *others = weights[number * own : (number + 1) * own]
                biases, projection = (others[:2], others[2:]) if has_biases else ((None, None), others)
                state = tuple(part[number] for part in starts)
                out, end = _steps(
                    notes, step, F.linear(x, w_x, biases[0]), sizes, state, (w_h, biases[1]), projection, way == 1
                )
                outputs.append(out)
                ends.append(end)
            x = torch.cat(outputs, -1) if both_ways else outputs[0]
            if dropout and training and layer < layers - 1:
                x = F.dropout(x, dropout)
        x = x.transpose(0, 1) if batch_first else x
        return (x, *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _steps(
    notes: Notes,
    step: Callable[..., State],
    of_x: Tensor,
    sizes: list[int] | None,
    state: State,
    of_h: tuple[Tensor, Tensor | None],
    projection: Sequence[Tensor],
    is_reversed: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction.

    Args:
        notes: of the forward pass.
        step: one of `CELLS`.
        of_x: what the weights make of its input, (steps, batch, ...), or packed.
        sizes: how many sequences each step has, where they are packed.
        state: at the start, each part (batch, ...).
        of_h: the weight and the bias on the hidden state.
        projection: the weight that makes a smaller hidden state of an LSTM's, if there is one.
        is_reversed: whether to begin with the last step.

    Returns:
        The hidden states in the form of `of_x`, and the state at the end.
    """
    gate, outputs = _gate_of(notes), []
    parts = list(of_x.unbind(0) if sizes is None else of_x.split(sizes))
    for part in reversed(parts) if is_reversed else parts:
        here = tuple(old[: len(part)] for old in state) if len(part) < len(state[0]) else state
        new = step(part, here, F.linear(here[0], *of_h), gate)
        if projection:
            new = F.linear(new[0], projection[0]), *new[1:]
        outputs.append(new[0])
        if here is not state:  # the other sequences have ended, or have not begun
            new = tuple(torch.cat([of_new, old[len(part) :]]) for of_new, old in zip(new, state, strict=True))
        state = new
    if is_reversed:
        outputs.reverse()
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), state


def _is_recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and not kwargs and any(tensor.requires_grad for tensor in tensors_in(args))


def _gate_of(notes: Notes) -> Gate:
    def gate(x: Tensor) -> Tensor:
        z = x.sigmoid()
        if z.grad_fn is not None:
            notes.gates.add(z.grad_fn)
        return z

    return gate


def _unpacked(notes: Notes, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sequences that were packed are copied into parts of a new tensor."""
    out = function(*args, **kwargs)
    if out[0].grad_fn is not None:
        notes.needed = True
        notes.mark_copies(out[0], above=args[0].grad_fn or notes)
    return out


NOTED.update(dict.fromkeys(named("lstm", "gru", "rnn_tanh", "rnn_relu"), _layers))
NOTED.update(dict.fromkeys(named("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell))
NOTED.update(dict.fromkeys(named("_pad_packed_sequence"), _unpacked))
