"""Claims about recurrent layers, against formulas of Arras et al. 2019 written out step by step in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_relevance import close, images
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import athena
from athena.rules import Epsilon, Zero

EPSILON = 1e-3


class Steps:
    """One layer in one direction, forwards and back.

    Args:
        kind: "LSTM", "GRU" or "RNN".
        w_x, w_h, b_x, b_h: its parameters.
        epsilon: of the rule of its weights.
    """

    def __init__(self, kind: str, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor, epsilon: float) -> None:
        self.kind, self.epsilon = kind, epsilon
        self.w_x, self.w_h, self.b_x, self.b_h = w_x, w_h, b_x, b_h

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        h = c = xs[0].new_zeros(len(xs[0]), self.w_h.shape[1])
        self.kept: list[tuple[Tensor, ...]] = []
        out = []
        for x in xs:
            of_x, of_h, old, old_c = x @ self.w_x.T + self.b_x, h @ self.w_h.T + self.b_h, h, c
            if self.kind == "LSTM":
                i, f, g, o = (of_x + of_h).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                self.kept.append((x, old, old_c, f.sigmoid(), i.sigmoid() * g.tanh(), c))
            elif self.kind == "GRU":
                (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, 1), of_h.chunk(3, 1)
                r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
                n = (xn + r * hn).tanh()
                h = (1 - z) * n + z * old
                self.kept.append((x, old, r, z, n, h))
            else:
                h = (of_x + of_h).tanh()
                self.kept.append((x, old))
            out.append(h)
        return out

    def relevance(self, given: list[Tensor]) -> list[Tensor]:
        """From the relevance of the output of each step to that of its input."""
        down: list[Tensor] = []
        of_h = of_c = torch.zeros_like(given[0])
        for r_out, kept in zip(given[::-1], self.kept[::-1], strict=True):
            x, old = kept[:2]
            whole = r_out + of_h
            hidden = self.w_h.shape[1]
            if self.kind == "LSTM":  # h = o tanh(c): all to c, which is f c + i g: all to c of before and to g
                old_c, f, ig, c = kept[2:]
                share = (whole + of_c) / c
                of_c, r_signal, rows = share * f * old_c, share * ig, slice(2 * hidden, 3 * hidden)
                gate, r_direct = torch.ones_like(c), 0
            elif self.kind == "GRU":  # h = (1 - z) n + z h, and in n the signal of the reset gate takes all
                gate, z, n, h = kept[2:]
                share = whole / h
                r_signal, r_direct, rows = share * (1 - z) * n, share * z * old, slice(2 * hidden, 3 * hidden)
            else:
                gate, r_signal, r_direct, rows = torch.ones_like(whole), whole, 0, slice(None)
            of_x = x @ self.w_x[rows].T + self.b_x[rows]
            of_old = old @ self.w_h[rows].T + self.b_h[rows]
            share = r_signal / (of_x + gate * of_old)
            down.append(x * (self.stable(of_x, share * of_x) @ self.w_x[rows]))
            of_h = old * (self.stable(of_old, share * gate * of_old) @ self.w_h[rows]) + r_direct
        return down[::-1]

    def stable(self, z: Tensor, relevance: Tensor) -> Tensor:
        return relevance / (z + torch.full_like(z, self.epsilon).copysign(z))


def oracle(module: nn.Module, x: Tensor, given: Callable[[Tensor], Tensor], epsilon: float) -> Tensor:
    """The relevance of x, (steps, batch, features), from that of the output in the same form."""
    kind, ways = type(module).__name__, 2 if module.bidirectional else 1
    levels: list[list[Steps]] = []
    xs = list(x)
    for layer in range(module.num_layers):
        level, outs = [], []
        for way in range(ways):
            names = [f"{name}_l{layer}{'_reverse' * way}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            steps = Steps(kind, *(getattr(module, name).detach() for name in names), epsilon)
            out = steps.forward(xs[::-1] if way else xs)
            outs.append(out[::-1] if way else out)
            level.append(steps)
        levels.append(level)
        xs = [torch.cat(parts, 1) for parts in zip(*outs, strict=True)]
    relevance = list(given(torch.stack(xs)))
    for level in levels[::-1]:
        halves = [part.chunk(ways, 1) for part in relevance]
        found = []
        for way, steps in enumerate(level):
            mine = [half[way] for half in halves]
            down = steps.relevance(mine[::-1] if way else mine)
            found.append(down[::-1] if way else down)
        relevance = [sum(parts) for parts in zip(*found, strict=True)]  # type: ignore[misc]
    return torch.stack(relevance)


class Outputs(nn.Module):
    """The output of every step, in the order it is given in."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


def closes(explained: Any) -> None:
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    assert kept + explained.input.sum().item() == pytest.approx(explained.output.sum().item(), abs=1e-9)


CASES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {}),
    (nn.GRU, {"num_layers": 3}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_in_recurrent_layers_the_signal_takes_all_and_gates_nothing(
    kind: type[nn.Module], options: dict[str, Any], epsilon: float
) -> None:
    torch.manual_seed(0)
    recurrent = kind(4, 5, **options).double()
    x = images(6, 3, 4)
    rule = Epsilon(epsilon) if epsilon else Zero()
    explained = athena.lrp(Outputs(recurrent), x, target=lambda out: out, rule=rule)
    close(explained.input, oracle(recurrent, x, lambda out: out, epsilon))
    closes(explained)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_order_of_dimensions_and_the_precision_make_no_difference(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    recurrent = kind(4, 5, batch_first=True).double()
    x = images(3, 6, 4)
    expected = oracle(recurrent, x.transpose(0, 1), lambda out: out, EPSILON).transpose(0, 1)
    model = Outputs(recurrent)
    close(athena.lrp(model, x, target=lambda out: out, rule=Epsilon(EPSILON)).input, expected)
    close(athena.lrp(model, x[0], target=lambda out: out, rule=Epsilon(EPSILON)).input, expected[0])
    explained = athena.lrp(model.float(), x.float(), target=lambda out: out, rule=Epsilon(EPSILON))
    assert torch.allclose(explained.input.double(), expected, rtol=1e-2, atol=1e-4)  # autograd has it as one node here


class Packed(nn.Module):
    """The outputs of sequences that are packed, and unpacked again."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [6, 4, 1])
        return pad_packed_sequence(self.recurrent(packed)[0])[0]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_each_packed_sequence_is_explained_as_by_itself(kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    recurrent = kind(4, 5, **options).double()
    x = images(6, 3, 4)
    explained = athena.lrp(Packed(recurrent), x, target=lambda out: out, rule=Zero())
    for row, length in enumerate((6, 4, 1)):
        alone = oracle(recurrent, x[:length, row : row + 1], lambda out: out, 0.0)
        close(explained.input[:length, row], alone[:, 0])
        assert not explained.input[length:, row].any()
    closes(explained)


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outs = None, []
        for step in x:
            state = self.cell(step, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cells_are_explained_as_the_layers_that_they_make(kind: str) -> None:
    torch.manual_seed(0)
    recurrent = getattr(nn, kind)(4, 5).double()
    cell = getattr(nn, f"{kind}Cell")(4, 5).double()
    for name, parameter in cell.named_parameters():
        parameter.data = getattr(recurrent, f"{name}_l0").data
    x = images(6, 3, 4)
    expected = oracle(recurrent, x, lambda out: out, EPSILON)
    close(athena.lrp(Cells(cell), x, target=lambda out: out, rule=Epsilon(EPSILON)).input, expected)


class Last(nn.Module):
    """Classes from the last hidden state."""

    def __init__(self, recurrent: nn.Module, features: int = 5) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def test_projected_states_and_layers_without_biases_are_conserved() -> None:
    torch.manual_seed(0)
    for options in ({"proj_size": 3}, {"bias": False}, {"proj_size": 2, "bias": False, "bidirectional": True}):
        recurrent = nn.LSTM(4, 5, batch_first=True, **options)  # type: ignore[arg-type]
        width = (options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        explained = athena.lrp(Last(recurrent, width).double(), images(3, 6, 4), rule=Zero())
        closes(explained)
        if options == {"bias": False}:
            kept = explained.conservation().set_index("layer")["bias"]
            assert explained.input.sum().item() == pytest.approx(explained.output.sum().item() - kept["head"], abs=1e-9)


def test_frozen_recurrent_layers_are_explained_alike() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(4, 5, batch_first=True)).double()
    x = images(3, 6, 4)
    explained = athena.lrp(model, x)
    close(athena.lrp(model.requires_grad_(False), x).input, explained.input)


def test_the_weights_of_a_recurrent_layer_are_layers_and_each_step_a_use() -> None:
    torch.manual_seed(0)
    model = Last(nn.GRU(4, 5, batch_first=True)).double()
    layers = athena.lrp(model, images(3, 3, 4), rule=Zero()).layers
    assert list(layers) == ["recurrent.weight_ih_l0", *(f"recurrent.weight_hh_l0{use}" for use in ("", "#2")), "head"]
    assert layers["recurrent.weight_ih_l0"].shape == (3, 3, 15)
    assert not layers["recurrent.weight_ih_l0"][..., :10].any()  # gates


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_guidance_changes_the_gradients_of_recurrent_weights_and_of_none_above(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Last(kind(4, 5, batch_first=True)).double(), images(3, 2, 4)
    names = ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]

    def gradients(factor: float) -> dict[str, Tensor]:
        model.zero_grad()
        with athena.Guidance(model, factor=dict.fromkeys(names, factor), rule=Zero()):
            out = model(x)
        out.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain, guided = gradients(0.0), gradients(0.7)
    close(guided["head.weight"], plain["head.weight"])
    assert not torch.allclose(guided["recurrent.weight_ih_l0"], plain["recurrent.weight_ih_l0"])


def test_guidance_of_an_elman_network_scales_by_relevance_at_each_use_of_its_weights() -> None:
    torch.manual_seed(0)
    model, x = Last(nn.RNN(4, 5, batch_first=True)).double(), images(3, 2, 4)
    factor, recurrent = 0.7, model.recurrent
    w_x, w_h, b_x, b_h = (parameter.detach() for parameter in recurrent.parameters())
    first = x[:, 0] @ w_x.T + b_x
    h1 = (first + b_h).tanh()
    second, of_h = x[:, 1] @ w_x.T + b_x, h1 @ w_h.T + b_h
    h2 = (second + of_h).tanh()
    out = h2 @ model.head.weight.T + model.head.bias
    chosen = torch.zeros_like(out).scatter_(1, out.argmax(1, keepdim=True), 1.0)
    at_h2 = chosen @ model.head.weight * h2
    share = at_h2 / (second + of_h)
    r_second, r_of_h = share * second, share * of_h
    r_first = h1 * (share @ w_h) * first / (first + b_h)
    gradient = (2 * out @ model.head.weight) * (1 - h2**2)
    g_second, g_of_h = gradient * (1 + factor * r_second), gradient * (1 + factor * r_of_h)
    g_first = g_of_h @ w_h * (1 - h1**2) * (1 + factor * r_first)
    with athena.Guidance(
        model,
        factor=dict.fromkeys(["recurrent.weight_ih_l0"], factor) | {"recurrent.weight_hh_l0": factor},
        rule=Zero(),
    ):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            close(recurrent.weight_ih_l0.grad, g_first.T @ x[:, 0] + g_second.T @ x[:, 1])
