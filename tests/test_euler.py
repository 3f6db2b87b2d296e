"""Claims about operations without an LRP layer of their own, against formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operations import Between, shared
from test_relevance import close, images
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Zero, ZPlus

Function = Callable[[Tensor], Tensor]
TO = torch.tensor([0, 1, 1])
ROWS = TO[:, None].expand(3, 4)


def fixed(*shape: int) -> Tensor:
    """The same numbers every time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def assigned(x: Tensor) -> Tensor:
    z = zeros(4, 5)
    z[1:, 1:] = x
    z[0, 0] = x[0, 0]
    z[torch.tensor([0, 1])] = z[2:].clone()
    return z


def changed_in_part(x: Tensor) -> Tensor:
    z = zeros(4, 5)
    z[1:, 1:].copy_(x)
    z[0].mul_(3.0)
    z[1].cumsum_(0)
    return z


DEGREES: dict[str, tuple[int, Function]] = {
    "cumsum": (1, lambda x: x.cumsum(1)),
    "cummax": (1, lambda x: x.cummax(1).values),
    "sort": (1, lambda x: x.sort().values),
    "topk": (1, lambda x: x.topk(2).values),
    "median": (1, lambda x: x.median(1, keepdim=True).values),
    "index_add": (1, lambda x: zeros(5, 4).index_add(0, TO, x)),
    "scatter_add": (1, lambda x: zeros(5, 4).scatter_add_(0, ROWS, x)),
    "scatter": (1, lambda x: zeros(5, 4).scatter(0, torch.arange(3)[:, None].expand(3, 4), x)),
    "scatter to a mean": (1, lambda x: zeros(5, 4).scatter_reduce_(0, ROWS, x, "mean")),
    "scatter to a maximum": (1, lambda x: zeros(5, 4).scatter_reduce_(0, ROWS, x, "amax", include_self=False)),
    "sparse product": (1, lambda x: torch.sparse.mm(fixed(6, 3).relu().to_sparse(), x)),
    "sparse matmul": (1, lambda x: fixed(6, 3).relu().to_sparse() @ x),
    "tensordot": (1, lambda x: torch.tensordot(x, fixed(4, 2), 1)),
    "lerp": (1, lambda x: torch.lerp(x, x.flip(0), 0.3)),
    "grid_sample": (
        1,
        lambda x: F.grid_sample(x.view(1, 1, 3, 4), fixed(1, 3, 4, 2).tanh(), align_corners=False).view(3, 4),
    ),
    "cdist": (1, lambda x: torch.cdist(x, x.flip(0) * 2)),
    "norm": (1, lambda x: torch.linalg.norm(x, dim=1, keepdim=True)),
    "norm of order one": (1, lambda x: torch.linalg.norm(x, 1, dim=1, keepdim=True)),
    "hypot": (1, lambda x: torch.hypot(x, x.flip(0))),
    "real part of an FFT": (1, lambda x: torch.fft.fft(x).real),
    "filter between FFTs": (1, lambda x: torch.fft.irfft(torch.fft.rfft(x) * fixed(3).to(torch.complex128), n=4)),
    "magnitude of an FFT": (1, lambda x: torch.fft.rfft2(x).abs()),
    "deviation": (1, lambda x: x.std(1, keepdim=True)),
    "assignment by index": (1, assigned),
    "change of a part in place": (1, changed_in_part),
    "singular values": (1, lambda x: torch.linalg.svdvals(x)[:, None]),
    "variance": (2, lambda x: x.var(1, keepdim=True)),
    "bilinear": (2, lambda x: F.bilinear(x, x.flip(0), fixed(2, 4, 4))),
    "product of all elements": (4, lambda x: x.prod(1, keepdim=True)),
    "kronecker": (2, lambda x: torch.kron(x, x)),
}


@pytest.mark.parametrize("name", DEGREES)
def test_what_is_homogeneous_of_degree_k_passes_the_gradient_over_k(name: str) -> None:
    k, function = DEGREES[name]
    x = images(3, 4)
    relevance, (down,) = shared(function, x)
    leaf = x.clone().requires_grad_()
    z = function(leaf.clone())
    d = torch.where(z == 0, 0, relevance / z).detach()
    close(down, x * torch.autograd.grad(z, leaf, d)[0] / k)


def test_a_cumulative_sum_shares_each_of_its_sums_among_the_summands() -> None:
    x = images(3, 4)
    relevance, (down,) = shared(lambda x: x.cumsum(1), x)
    share = relevance / x.cumsum(1)
    close(down, torch.stack([x[:, i] * share[:, i:].sum(1) for i in range(4)], 1))


def test_messages_that_are_added_up_get_back_their_shares() -> None:
    x = images(3, 4)
    relevance, (down,) = shared(lambda x: zeros(2, 4).index_add_(0, TO, x), x)
    share = relevance / torch.stack([x[0], x[1] + x[2]])
    close(down, x * share[TO])


def test_a_sum_with_a_product_halves_what_the_product_gets() -> None:
    a, b, c = images(3, 4), images(3, 4), images(3, 4)
    relevance, downs = shared(lambda *x: torch.addcmul(*x, value=2), a, b, c)
    share = relevance / (a + 2 * b * c)
    for down, expected in zip(downs, (a * share, b * c * share, b * c * share), strict=True):
        close(down, expected)
    relevance, downs = shared(lambda x, y: torch.addcmul(x, y, fixed(3, 4)), a, b)
    close(downs[1], b * fixed(3, 4) * relevance / (a + b * fixed(3, 4)))


def test_a_sum_with_a_quotient_gives_nothing_to_the_divisor() -> None:
    a, b, c = images(3, 4), images(3, 4), images(3, 4)
    relevance, downs = shared(lambda *x: torch.addcdiv(*x, value=2), a, b, c)
    share = relevance / (a + 2 * b / c)
    for down, expected in zip(downs, (a * share, 2 * b / c * share, 0 * c), strict=True):
        close(down, expected)


CONSTANTS: dict[str, Function] = {
    "index_add": lambda x: fixed(5, 4).index_add_(0, TO, x),
    "scatter_add": lambda x: fixed(5, 4).scatter_add(0, ROWS, x),
    "index_put": lambda x: fixed(5, 4).index_put((TO,), x, accumulate=True),
    "lerp": lambda x: torch.lerp(x, fixed(3, 4), 0.3),
    "a part in place": lambda x: torch.cat([fixed(2, 4), fixed(3, 4)])[2:].add_(x),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_operand_keeps_its_share_and_the_account_says_so(name: str) -> None:
    function, x = CONSTANTS[name], images(3, 4)
    z, at_zero = function(x), function(torch.zeros_like(x))
    explained = athena.lrp(Between(function), x, target=lambda out: out, rule=Zero())
    assert explained.input.sum().item() == pytest.approx((z - at_zero).sum().item(), abs=1e-9)
    assert explained.conservation()["bias"].sum() == pytest.approx(at_zero.sum().item(), abs=1e-9)


REFUSED: dict[str, Function] = {
    "exp": torch.exp,
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cdist": lambda x: torch.cdist(x, torch.ones_like(x)),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "round": torch.round,
    "linalg_inv": lambda x: torch.linalg.inv(x @ x.T),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_homogeneous_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(athena.UnsupportedLayer, match=f"uses '{name}'"):
        athena.lrp(Between(REFUSED[name]), images(3, 4), target=lambda out: out)


def test_whole_numbers_do_not_make_rounding_homogeneous() -> None:
    with pytest.raises(athena.UnsupportedLayer, match="floor"):
        athena.lrp(Between(torch.floor), torch.full((2, 3), 4.0, dtype=torch.float64), target=lambda out: out)


def test_one_everywhere_does_not_make_the_exponential_homogeneous() -> None:
    """There its gradient is its value."""
    with pytest.raises(athena.UnsupportedLayer, match="exp"):
        athena.lrp(Between(torch.exp), torch.ones(2, 3, dtype=torch.float64), target=lambda out: out)


@pytest.mark.parametrize("name", ["exp", "logsumexp", "cdist", "logcumsumexp"])
def test_the_unknown_can_be_passed_as_the_gradient_and_what_is_lost_is_booked(name: str) -> None:
    function, x = REFUSED[name], images(3, 4)
    explained = athena.lrp(Between(function), x, target=lambda out: out, rule=Zero(), unknown="gradient")
    leaf = x.clone().requires_grad_()
    close(explained.input, x * torch.autograd.grad(function(leaf).sum(), leaf)[0])
    table = explained.conservation()
    lost = table[table["layer"].str.contains(name)]
    assert lost["bias"].sum() == pytest.approx((function(x).sum() - explained.input.sum()).item(), abs=1e-9)


def test_what_to_do_with_the_unknown_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match="unknown='pass': it must be 'refuse' or 'gradient'"):
        athena.lrp(nn.Linear(3, 2), torch.ones(1, 3), unknown="pass")


class Straight(torch.autograd.Function):
    """Rounds, and says that its gradient is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("unknown", ["refuse", "gradient"])
def test_a_custom_function_is_refused_though_what_it_calls_is_homogeneous(unknown: str) -> None:
    with pytest.raises(athena.UnsupportedLayer, match="custom autograd function"):
        athena.lrp(Between(Straight.apply), images(3, 4), target=lambda out: out, unknown=unknown)


def test_relevance_of_zeros_passes_too() -> None:
    x = images(3, 4).relu()
    explained = athena.lrp(Between(lambda x: x.cumsum(1)), x, target=lambda out: out, rule=ZPlus())
    table = explained.conservation()
    kept = table[["bias", "stabiliser"]].to_numpy().sum()
    assert kept + explained.input.sum().item() == pytest.approx(explained.output.sum().item(), abs=1e-9)


def test_a_network_with_a_homogeneous_operation_is_guided_as_by_its_formula() -> None:
    """The gradient at the guided layer is scaled by 1 + factor R, with R = z d."""
    model = nn.Sequential(nn.Linear(3, 4), Summed(), nn.Linear(4, 2)).double()
    x = images(5, 3)
    below, _, above = model
    z = below(x)
    out = above(z.cumsum(1))
    chosen = torch.zeros_like(out).scatter_(1, out.argmax(1, keepdim=True), 1.0)
    relevance = z * (chosen @ above.weight).flip(1).cumsum(1).flip(1)
    expected = ((torch.ones_like(out) @ above.weight).flip(1).cumsum(1).flip(1) * (1 + 0.5 * relevance)).T @ x
    with athena.Guidance(model, factor=0.5, rule=Zero()):
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
            close(below.weight.grad, expected)


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)
