"""Claims about what relevance does at each operation, against formulas written out for it, in float64."""

import functools
import gc
import math
import operator
from collections.abc import Callable
from typing import Any

import oracles
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_relevance import RULES, close, every_rule, images
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import (
    AlphaBeta,
    Epsilon,
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlus,
    Flat,
    Gamma,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)


class Between(nn.Module):
    """A function between two identity layers, so that the relevance of its input and output can be read off."""

    def __init__(self, function: Callable[..., Tensor], operands: int = 1) -> None:
        super().__init__()
        self.below = nn.ModuleList(Ones() for _ in range(operands))
        self.above = Ones()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        operands = [layer(part) for layer, part in zip(self.below, x, strict=True)]
        return self.above(self.function(*operands)).flatten(1)


class Ones(nn.Module):
    """The identity as a layer of weights, in the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.eye(x.shape[-1], dtype=x.dtype))


def shared(function: Callable[..., Tensor], *x: Tensor, start: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The relevance of the output of `function` (random unless given) and of each of its operands."""
    out = function(*(part.clone() for part in x))
    relevance = images(*out.shape) * (out != 0) if start is None else start
    explained = athena.lrp(Between(function, len(x)), x, target=lambda _: relevance.flatten(1), rule=Zero())
    assert sum(explained.conservation()[["bias", "stabiliser"]].to_numpy().sum(1)) + sum(
        part.sum().item() for part in explained.input
    ) == pytest.approx(relevance.sum().item(), abs=1e-9)
    return relevance, list(explained.input)


# Element by element

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu by name": lambda x: F.gelu(input=x, approximate="none"),
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "sigmoid method": Tensor.sigmoid,
    "hard sigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: torch.clamp_min(x, -0.3),
    "clamp above 0": lambda x: x.clamp(min=0.2),
    "abs": torch.abs,
    "square": lambda x: x**2,
    "power": lambda x: x.abs().pow(1.5).sqrt(),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
}
IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda x: F.relu(x, inplace=True)),
    "relu_": (F.relu, torch.relu_),
    "leaky relu": (F.leaky_relu, lambda x: F.leaky_relu(x, inplace=True)),
    "hardswish": (F.hardswish, lambda x: F.hardswish(x, inplace=True)),
    "hard sigmoid": (F.hardsigmoid, lambda x: F.hardsigmoid(x, True)),
    "silu": (F.silu, lambda x: F.silu(x, inplace=True)),
    "elu": (F.elu, lambda x: F.elu(x, 1.0, True)),
    "relu6": (F.relu6, nn.ReLU6(inplace=True)),
    "sigmoid_": (torch.sigmoid, Tensor.sigmoid_),
    "tanh_": (torch.tanh, Tensor.tanh_),
    "clamp_": (torch.relu, lambda x: x.clamp_(min=0)),
    "abs_": (torch.abs, Tensor.abs_),
    "**=": (torch.square, lambda x: operator.ipow(x, 2)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_passes_relevance_on_unchanged(name: str) -> None:
    x = images(3, 7)
    relevance, (down,) = shared(ACTIVATIONS[name], x)
    z, at_zero = ACTIVATIONS[name](x), ACTIVATIONS[name](torch.zeros_like(x))
    close(down, torch.where(z == 0, 0, relevance * (z - at_zero) / z))


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "hard sigmoid", "clamp above 0"])
def test_what_an_activation_is_at_zero_is_a_constant_summand_that_keeps_its_share(name: str) -> None:
    """As of any sum; f(z) / z has no bound at z = 0, and gates of networks explode by it."""
    f = ACTIVATIONS[name]
    x = images(2, 4)
    x[0, 1] = 0
    relevance, (down,) = shared(f, x)
    assert down[0, 1] == 0
    at_zero = f(x.new_zeros(()))
    close(down, (f(x) - at_zero) / f(x) * relevance)
    near = torch.full_like(x, 1e-9)
    assert athena.lrp(Between(f), near, target=lambda out: out, rule=Zero()).input.abs().max() < 1e-8


@every_rule
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_activations_are_explained_as_those_that_are_not(name: str, rule: str) -> None:
    class Net(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor], returned: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.below, self.above = nn.Linear(6, 5), nn.Linear(5, 3)
            self.function, self.returned = function, returned

        def forward(self, x: Tensor) -> Tensor:
            h = self.below(x)
            out = self.function(h)
            return self.above(out if self.returned else h)

    x = images(4, 6)
    plain, writing = IN_PLACE[name]
    expected = athena.lrp(Net(plain, True).double(), x, rule=RULES[rule][0])
    for returned in (True, False):
        model = Net(writing, returned).double()
        explained = athena.lrp(model, x, rule=RULES[rule][0])
        close(explained.input, expected.input)
        close(explained.layers["below"], expected.layers["below"])
        model(x).sum().backward()  # and what was explained can still be trained


# Sums and products


def test_a_product_shares_equally_among_its_factors() -> None:
    a, b = images(3, 4), images(3, 4)
    for product in (torch.mul, lambda x, y: x * y, lambda x, y: x.mul(y), lambda x, y: x.clone().mul_(y)):
        relevance, parts = shared(product, a, b)
        for part in parts:
            close(part, relevance / 2)
    relevance, (down,) = shared(lambda x: x * x, a)
    close(down, relevance)


def test_a_constant_factor_gets_nothing() -> None:
    constant, x = images(4), images(3, 4)
    for product in (lambda x: x * constant, lambda x: 2.0 * x, lambda x: x / constant, lambda x: -x, lambda x: x / 3):
        relevance, (down,) = shared(product, x)
        close(down, relevance)
    scale = nn.Parameter(constant)
    model = Between(lambda x: scale * x)
    model.scale = scale  # type: ignore[assignment]
    relevance = images(3, 4)
    close(athena.lrp(model, x, target=lambda _: relevance, rule=Zero()).input, relevance)


@every_rule
def test_a_layer_written_as_a_product_of_elements_and_a_sum_is_explained_by_lrp0_and_not_guided(rule: str) -> None:
    """Whatever the rule: its factors of parameters are constants, and relevance is shared by ``x_i w_ij``."""

    class WrittenOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(images(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :, None] * self.weight).sum(1)

    x, layer = images(3, 5), WrittenOut()
    relevance = images(3, 4)
    explained = athena.lrp(layer, x, target=lambda _: relevance, rule=RULES[rule][0])
    z = x @ layer.weight.detach()
    close(explained.input, x * (relevance / z @ layer.weight.detach().T))
    assert explained.layers == {}
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2).double())
    with (
        athena.Guidance(model, factor=0.1, scope="all"),
        pytest.raises(athena.UnsupportedLayer, match="guides no layer"),
    ):
        model(x)


BY_COLUMNS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "a @ W": lambda a, weight, bias: a @ weight,
    "matmul": lambda a, weight, bias: torch.matmul(a, other=weight),
    "mm": lambda a, weight, bias: a.mm(weight),
    "addmm": lambda a, weight, bias: torch.addmm(bias, a, weight),
    "addmm by name": lambda a, weight, bias: torch.addmm(mat2=weight, mat1=a, input=bias),
}


@every_rule
@pytest.mark.parametrize("form", BY_COLUMNS)
def test_a_matrix_product_with_a_parameter_is_the_linear_layer_that_it_is(form: str, rule: str) -> None:
    """As the layers of GPT-2 are written."""

    class ByColumns(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(layer.weight.detach().T.clone()), layer.bias

        def forward(self, a: Tensor) -> Tensor:
            return BY_COLUMNS[form](a, self.weight, self.bias)

    torch.manual_seed(0)
    layers = [nn.Linear(6, 5, "addmm" in form).double(), nn.Linear(5, 4, "addmm" in form).double()]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    written = nn.Sequential(ByColumns(layers[0]), nn.ReLU(), ByColumns(layers[1]))
    x, labels = images(4, 6), torch.randint(4, (4,))
    expected, found = (athena.lrp(net, x, rule=RULES[rule][0]) for net in (model, written))
    close(found.input, expected.input)
    torch.testing.assert_close(found.layers, expected.layers)
    pd.testing.assert_frame_equal(found.conservation(), expected.conservation())
    gradients = []
    for net in (model, written):
        with athena.Guidance(net, factor=2.0, scope=["0"], rule=RULES[rule][0]):
            F.cross_entropy(net(x), labels).backward()
        gradients.append(net[0].weight.grad)
    close(gradients[1].T, gradients[0])


def test_a_product_of_matrices_with_anything_added_is_explained_term_by_term() -> None:
    a, b, c, start = images(3, 4), images(4, 5), images(3, 5), images(3, 5)
    _, expected = shared(lambda a, b, c: 2 * c + 3 * (a @ b), a, b, c, start=start)
    _, found = shared(lambda a, b, c: torch.addmm(c, a, b, beta=2, alpha=3), a, b, c, start=start)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    a, b, c, start = images(2, 3, 4), images(2, 4, 5), images(2, 3, 5), images(2, 3, 5)
    _, expected = shared(lambda a, b, c: c + a @ b, a, b, c, start=start)
    _, found = shared(lambda a, b, c: torch.baddbmm(c, batch2=b, batch1=a), a, b, c, start=start)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_a_divisor_gets_nothing() -> None:
    a, b = images(3, 4), images(3, 4)
    relevance, (of_a, of_b) = shared(lambda x, y: x / y, a, b)
    close(of_a, relevance)
    assert not of_b.any()
    relevance, (down,) = shared(lambda x: x / x.norm(dim=1, keepdim=True), a)
    close(down, relevance)


def test_a_matrix_product_shares_equally_and_then_by_contribution() -> None:
    a, b = images(2, 3, 4), images(2, 4, 5)
    products: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.matmul,
        torch.bmm,
        lambda x, y: x @ y,
        lambda x, y: torch.einsum("bij,bjk->bik", x, y),
    ]
    for product in products:
        relevance, parts = shared(product, a, b)
        contributions = a[..., None] * b[:, None] / (a @ b)[:, :, None] * relevance[:, :, None] / 2
        close(parts[0], contributions.sum(3))
        close(parts[1], contributions.sum(1))


def test_a_difference_shares_in_proportion() -> None:
    a, b = images(3, 4), images(3, 4)
    relevance, parts = shared(lambda x, y: x - y, a, b)
    close(parts[0], a / (a - b) * relevance)
    close(parts[1], -b / (a - b) * relevance)
    relevance, (down,) = shared(lambda x: 1.0 - x, a)  # of which the 1 keeps its part
    close(down, -a / (1 - a) * relevance)
    relevance, (down,) = shared(lambda x: torch.sub(x, 2.0, alpha=3), a)
    close(down, a / (a - 6) * relevance)


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(2),
    "mean": lambda x: x.mean((2, 3)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "index": lambda x: x[:, :, 1:, ::2],
    "pick": lambda x: x[:, [0, 1, 0]],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: torch.split(x, 1, 1)[0],
    "unbind": lambda x: x.unbind(1)[1],
    "concatenation": lambda x: torch.cat([x, 2 * x], 1),
    "stack": lambda x: torch.stack([x, x.flip(3)], 1),
    "padding": lambda x: F.pad(x, (1, 2, 0, 1)),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "nearest up-sampling": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear up-sampling": lambda x: F.interpolate(x, size=(7, 9), mode="bilinear"),
    "up-sampling module": nn.Upsample(scale_factor=3, mode="nearest"),
    "adaptive average pooling": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "roll": lambda x: x.roll(1, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1, -1),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "lower triangle": torch.tril,
    "type": lambda x: x.type(torch.float64),
    "columns": lambda x: torch.column_stack([x, x]),
    "view": lambda x: x.view(len(x), -1).unflatten(1, (4, -1)),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_without_weights_conserve_relevance(name: str) -> None:
    x = images(2, 4, 4, 5)
    relevance, (down,) = shared(LINEAR[name], x)
    leaf = x.clone().requires_grad_()
    out = LINEAR[name](leaf)
    (gradient,) = torch.autograd.grad(out, leaf, torch.where(out == 0, 0, relevance / out.detach()))
    close(down, x * gradient)


@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2), nn.MaxPool2d(3, 2, 1)], ids=str)
def test_all_max_pooling_gives_to_the_winner(pooling: nn.Module) -> None:
    relevance, (down,) = shared(pooling, images(2, 3, 6, 8))
    assert down.sum().item() == pytest.approx(relevance.sum().item())
    assert (down != 0).sum() <= relevance.numel()


def test_constants_in_a_concatenation_keep_their_part() -> None:
    x, constant = images(2, 3), images(2, 2)
    relevance, (down,) = shared(lambda x: torch.cat([x, constant], 1), x)
    close(down, relevance[:, :3])
    relevance, (down,) = shared(lambda x: F.pad(x, (0, 2), value=3.0), x)
    close(down, relevance[:, :3])
    mask = torch.tensor([True, False, False])
    relevance, (down,) = shared(lambda x: x.masked_fill(mask, 5.0), x)
    close(down, relevance * ~mask)
    relevance, (down,) = shared(lambda x: torch.where(mask, x, 1.0), x)
    close(down, relevance * mask)


DIVISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "one over": lambda x: 1 / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * x,
    "reciprocal": lambda x: x.mul((x.square().mean(-1, keepdim=True) + 1e-5).sqrt().reciprocal()),
    "power": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5,
    "divisor twice over": lambda x: x / (1 / (1 / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())),
    "in place": lambda x: x.clone().mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
}


@pytest.mark.parametrize("form", DIVISIONS)
def test_division_by_what_comes_from_the_input_keeps_relevance(form: str) -> None:
    """As in the norms of LLaMA and T5."""
    relevance, (down,) = shared(DIVISIONS[form], images(3, 5))
    close(down, relevance)


@every_rule
def test_a_norm_written_out_is_explained_under_every_rule(rule: str) -> None:
    class RMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), RMSNorm(), nn.Linear(5, 3)).double()
    x = images(4, 6)
    found = athena.lrp(model, x, rule=RULES[rule][0])
    model[1] = nn.RMSNorm(5, eps=1e-5, elementwise_affine=False)
    close(found.input, athena.lrp(model, x, rule=RULES[rule][0]).input)


@pytest.mark.parametrize("use", [lambda r, x: r + x, lambda r, x: r.sum(-1, keepdim=True) * r, lambda r, x: r])
def test_relevance_that_comes_to_a_divisor_is_refused(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(athena.UnsupportedLayer, match="rsqrt"):
        shared(lambda x: use(torch.rsqrt(x.square() + 1), x), images(3, 5))


def test_what_is_brought_to_unit_length_keeps_its_relevance() -> None:
    """As queries and keys in cosine attention."""
    x = torch.cat([images(3, 4), torch.zeros(1, 4, dtype=torch.float64)])
    for how in ({}, {"p": 1.0, "dim": 0}, {"dim": -1, "eps": 2.0}):
        relevance, (down,) = shared(functools.partial(F.normalize, **how), x)
        close(down, relevance * (x != 0))


def test_a_cosine_is_shared_by_its_summands_and_halved_where_both_sides_depend_on_the_input() -> None:
    """``cos(a, b) = sum_i a_i b_i / (|a| |b|)``: the lengths are divisors and get nothing."""
    a, b = images(3, 4, 5), images(3, 4, 5)

    def by_summands(relevance: Tensor, dim: int) -> Tensor:
        products = a * b
        return products / products.sum(dim, keepdim=True) * relevance.unsqueeze(dim)

    for dim in (1, 2):
        cosine = functools.partial(F.cosine_similarity, dim=dim)
        relevance, (down,) = shared(lambda x, f=cosine: f(x, b), a)
        close(down, by_summands(relevance, dim))
        relevance, parts = shared(cosine, a, b)
        for part in parts:
            close(part, by_summands(relevance, dim) / 2)


@pytest.mark.parametrize("dim", [-1, 1])
def test_a_gated_unit_gives_half_to_what_passes_and_half_to_the_gate(dim: int) -> None:
    x = images(3, 4, 6)
    relevance, (down,) = shared(functools.partial(F.glu, dim=dim), x)
    opened = x.chunk(2, dim)[1].sigmoid()  # of which sigmoid(0) keeps its share
    close(down, torch.cat([relevance / 2, relevance / 2 * (opened - 0.5) / opened], dim))

    def written_out(x: Tensor) -> Tensor:
        passing, gate = x.chunk(2, dim)
        return passing * gate.sigmoid()

    _, (same,) = shared(written_out, x, start=relevance)
    close(same, down)


# Norms


def normed(x: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """What is divided by the deviation, and one over the deviation."""
    mean = x.mean(dims, keepdim=True) if centred else 0.0
    return x - mean, 1 / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...] | None]] = {
    "layer": (lambda: nn.LayerNorm([3, 4, 5]), (1, 2, 3), None),
    "last of layer": (lambda: nn.LayerNorm(5), (3,), None),
    "no weights": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3,), None),
    "instance": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3), None),
    "group": (lambda: nn.GroupNorm(3, 6), (2, 3, 4), (2, 3, 2, 4, 5)),
    "rms": (lambda: nn.RMSNorm(5), (3,), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_explained_as_if_the_deviation_were_a_constant(name: str) -> None:
    build, dims, shape = NORMS[name]
    norm = build().double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = images(2, 6 if name == "group" else 3, 4, 5)
    relevance, (down,) = shared(norm, x)
    leaf = x.clone().requires_grad_()
    folded = leaf if shape is None else leaf.reshape(shape)
    eps = getattr(norm, "eps", None) or torch.finfo(x.dtype).eps
    centred, scale = normed(folded, dims, eps, centred=name != "rms")
    z = (centred * scale.detach()).reshape(x.shape)
    if getattr(norm, "weight", None) is not None:
        weights = [getattr(norm, part, None) for part in ("weight", "bias")]
        per_channel = name in ("group", "instance")
        weight, bias = (w if w is None or not per_channel else w.view(-1, 1, 1) for w in weights)
        z = z * weight + (0 if bias is None else bias)
    torch.testing.assert_close(z, norm(x))
    (gradient,) = torch.autograd.grad(z, leaf, relevance / z.detach())
    close(down, x * gradient)


def settled(norm: nn.Module) -> nn.Module:
    """Batch norm with statistics and weights that are none of 0 and 1."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.double().eval()


def test_batch_norm_alone_is_an_affine_map() -> None:
    norm, x = settled(nn.BatchNorm2d(3)), images(2, 3, 4, 5)
    relevance, (down,) = shared(norm, x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    close(down, (x * scale.detach().view(-1, 1, 1) * relevance / norm(x)).detach())


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(4), (2, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), lambda: nn.BatchNorm2d(4), (2, 3, 4, 4)),
}


@every_rule
@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_after_a_layer_is_explained_as_one_layer_with_it(name: str, rule: str) -> None:
    build, build_norm, shape = LAYERS[name]
    torch.manual_seed(3)
    layer, norm, x = build().double(), settled(build_norm()), images(*shape)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    fused = build().double()
    outputs = 1 if name == "transposed" else 0
    fused.bias = nn.Parameter(torch.zeros_like(scale))
    fused.load_state_dict(
        {
            "weight": layer.weight * scale.view([-1 if dim == outputs else 1 for dim in range(layer.weight.dim())]),
            "bias": (0 if layer.bias is None else layer.bias) * scale + norm.bias - norm.running_mean * scale,
        }
    )
    expected = athena.lrp(nn.Sequential(fused, nn.ReLU(), nn.Flatten()), x, target="logits", rule=RULES[rule][0])
    model = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten())
    torch.testing.assert_close(model(x), nn.Sequential(fused, nn.ReLU(), nn.Flatten())(x))
    explained = athena.lrp(model, x, target="logits", rule=RULES[rule][0])
    close(explained.input, expected.input)
    assert list(explained.layers) == ["0"]
    table = explained.conservation()
    absorbed = table[["bias", "stabiliser"]].to_numpy().sum()
    assert absorbed + explained.input.sum().item() == pytest.approx(explained.output.sum().item())


def test_batch_norm_before_a_layer_conserves() -> None:
    model = nn.Sequential(settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    explained = athena.lrp(model.double(), images(2, 3, 5, 5), rule=EpsilonPlus())
    table = explained.conservation()
    assert list(table["layer"]) == ["4", "1", "0", "input"]
    assert table[["bias", "stabiliser"]].to_numpy().sum() + explained.input.sum().item() == pytest.approx(
        explained.output.sum().item()
    )


# Attention


def test_softmax_is_explained_by_its_first_order() -> None:
    """AttnLRP, proposition 3.1: R_i = x_i (R_i - s_i sum R)."""
    x = images(3, 5)
    for softmax in (F.softmax, torch.softmax):
        relevance, (down,) = shared(lambda x, f=softmax: f(x, 1), x)
        close(down, x * (relevance - x.softmax(1) * relevance.sum(1, keepdim=True)))


def by_hand(q: Tensor, k: Tensor, v: Tensor, relevance: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """AttnLRP of softmax(q k / sqrt width) v, product by product."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    out = weights @ v
    s = relevance / out / 2
    of_v = v * (weights.transpose(-2, -1) @ s)
    of_weights = weights * (s @ v.transpose(-2, -1))
    of_scores = scores * (of_weights - weights * of_weights.sum(-1, keepdim=True))
    s = torch.where(scores == 0, 0, of_scores / scores / 2) / math.sqrt(q.shape[-1])
    return [q * (s @ k), k * (s.transpose(-2, -1) @ q), of_v]


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_explained_as_its_products_and_softmax(masked: bool) -> None:
    q, k, v = images(2, 3, 5, 4), images(2, 3, 6, 4), images(2, 3, 6, 4)
    mask = torch.rand(5, 6) > 0.3 if masked else None
    if mask is not None:
        mask[:, 0] = True
    relevance, parts = shared(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)
    for part, expected in zip(parts, by_hand(q, k, v, relevance, mask), strict=True):
        close(part, expected)
    if mask is None:

        def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1) @ v

        _, same = shared(written_out, q, k, v, start=relevance)
        for part, expected in zip(same, parts, strict=True):
            close(part, expected)


class Attends(nn.Module):
    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head, self.cross = nn.Linear(8, 3), cross
        self.needs = True

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1)[:, 1:] if self.cross else x
        out, weights = self.attention(x, other, other, need_weights=self.needs)
        assert (weights is not None) == self.needs
        return self.head(out.mean(1))


@pytest.mark.parametrize("options", [{}, {"cross": True}, {"kdim": 8, "vdim": 8}, {"bias": False}], ids=str)
def test_multi_head_attention_conserves_and_computes_what_it_computed(options: dict[str, Any]) -> None:
    model, x = Attends(**options).double().eval(), images(3, 5, 8)
    relevances = []
    for needs in (True, False):
        model.needs = needs
        explained = athena.lrp(model, x, target="logits")
        close(explained.output, model(x).detach())
        table = explained.conservation()
        assert table[["bias", "stabiliser"]].to_numpy().sum() + explained.input.sum().item() == pytest.approx(
            explained.output.sum().item()
        )
        relevances.append(explained.input)
    close(*relevances)
    assert "attention.out_proj" in explained.layers


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("computed", [False, True])
def test_a_learned_bias_of_attention_keeps_its_share_and_the_account_says_so(
    heads: tuple[int, ...], computed: bool
) -> None:
    """As that of T5, for the distances between tokens."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.bias = nn.Parameter(torch.randn(1, *heads, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (layer(x) for layer in self.layers)
            bias = self.bias.exp() if computed else self.bias
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            return mixed.flatten(1, -2).mean(1)

    explained = athena.lrp(Biased().double(), images(3, *heads, 5, 4))
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    whole = explained.output.sum().item()
    assert kept + explained.input.sum().item() == pytest.approx(whole, abs=1e-9 * abs(whole))


def test_attention_masks_mean_what_they_mean_to_pytorch() -> None:
    model = nn.MultiheadAttention(8, 2).double().eval()
    x = images(5, 3, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)
            return out.transpose(0, 1).flatten(1)

    with torch.no_grad():
        expected = Masked()(x)
    close(athena.lrp(Masked(), x, target="logits").output, expected)


def test_a_transformer_block_conserves() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", norm_first=True)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(40, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    explained = athena.lrp(model, images(3, 5, 8))
    table = explained.conservation()
    assert table[["bias", "stabiliser"]].to_numpy().sum() + explained.input.sum().item() == pytest.approx(
        explained.output.sum().item()
    )


# Affine layers of every kind, against the matrix they are


@st.composite
def affine_layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    transposed = draw(st.booleans())
    kind = [[nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]]
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer = kind[transposed][dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)) if kernel > 1 else 0,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    ).double()
    size = dilation * (kernel - 1) + 1 + draw(st.integers(0, 1))
    x = images(2, layer.in_channels, *[size] * dims)
    return layer, x.abs() if draw(st.booleans()) else x


def as_matrix(layer: Any, a: Tensor) -> tuple[Tensor, Tensor]:
    """The weight that joins each input to each output, and whether there is one."""
    plain, ones = (type(layer)(**shape_of(layer)).double() for _ in range(2))
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        ones.weight.fill_(1.0)
    matrices = []
    for same in (plain, ones):
        columns = torch.eye(a[0].numel(), dtype=a.dtype).reshape(-1, *a.shape[1:])
        with torch.no_grad():
            matrices.append(same(columns).flatten(1).T)
    return matrices[0], matrices[1] != 0


def shape_of(layer: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in names} | {"bias": False}


@settings(max_examples=60)
@given(drawn=affine_layers(), rule=st.sampled_from(sorted(RULES)), last=st.booleans())
def test_convolutions_in_all_dimensions_and_transposed_share_as_their_matrix(
    drawn: tuple[Any, Tensor], rule: str, last: bool
) -> None:
    layer, a = drawn
    ours, naive = RULES[rule]
    z = layer(a).detach()
    assume(z.numel() > 0)
    touched = z != 0
    assume(touched.any() and z[touched].abs().min() > 1e-3)
    relevance = images(*z.shape) * touched
    matrix, joined = as_matrix(layer, a)
    expected = torch.zeros_like(a).flatten(1)
    bias = None if layer.bias is None else oracles.spread(layer.bias, z)
    for k in range(z[0].numel()):  # each output is a neuron with only those inputs that it is joined to
        inputs = joined[k].nonzero().flatten()
        for n in range(len(a)) if len(inputs) else ():
            expected[n, inputs] += oracles.linear_relevance(
                a.flatten(1)[n : n + 1, inputs],
                matrix[k : k + 1, inputs],
                None if bias is None else bias[n].flatten()[k : k + 1],
                relevance[n].flatten()[k].view(1, 1),
                naive,
            )[0]
    if last and a.dim() == 4:
        layer, a = layer.to(memory_format=torch.channels_last), a.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(layer, nn.Flatten())
    explained = athena.lrp(model, a, target=lambda _: relevance.flatten(1), rule=ours)
    close(explained.input, expected.view(a.shape).detach())


# Rules


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gamma(-1), r"Gamma\(gamma=-1\)"),
        (lambda: AlphaBeta(2, 0), "alpha - beta must be 1"),
        (lambda: AlphaBeta(0.5, -0.5), r"beta=-0.5"),
        (lambda: ZBox(1, 0), "low must be below high"),
        (lambda: ZBox(torch.zeros(3, 1, 1), torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)), "low must be below high"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_box_that_does_not_fit_the_input_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()).double()
    with pytest.raises(ValueError, match="does not fit inputs of shape"):
        athena.lrp(model, images(2, 3, 5, 5), rule=ZBox(torch.zeros(4, 1, 1), torch.ones(4, 1, 1)))


def test_a_box_may_differ_from_channel_to_channel() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)).double()
    x, low, high = images(2, 2, 5, 5), torch.tensor([-5.0, -4.0]), torch.tensor([4.0, 6.0])
    together = athena.lrp(model, x, rule=EpsilonGammaBox(low.view(2, 1, 1), high.view(2, 1, 1))).input
    once = athena.lrp(model, x, rule=EpsilonGammaBox(low.view(1, 2, 1, 1), high.view(1, 2, 1, 1))).input
    close(together, once)
    assert not torch.allclose(together, athena.lrp(model, x, rule=EpsilonGammaBox(-5.0, 6.0)).input)


@pytest.mark.parametrize(
    ("preset", "linear", "convolutional", "first"),
    [
        (EpsilonPlus(0.1), Epsilon(0.1), ZPlus(), ZPlus()),
        (EpsilonAlpha2Beta1(), Epsilon(1e-6), AlphaBeta(2, 1), AlphaBeta(2, 1)),
        (EpsilonGammaBox(-3.0, 3.0, gamma=0.5), Epsilon(1e-6), Gamma(0.5), ZBox(-3.0, 3.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_preset_gives_each_kind_of_layer_its_rule(preset: Any, linear: Any, convolutional: Any, first: Any) -> None:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    model, x = nn.Sequential(*layers).double(), images(3, 2, 5, 5)
    rules = {"0": first, "2": convolutional, "5": linear}
    expected = athena.lrp(model, x, rule=lambda path, module: rules[path])
    close(athena.lrp(model, x, rule=preset).input, expected.input)


def test_every_layer_that_stands_on_the_input_is_a_first_one() -> None:
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
            self.head = nn.Linear(27, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head((self.one(x) + self.two(y)).relu().flatten(1))

    model, x, y = TwoStems().double(), images(2, 2, 5, 5), images(2, 2, 5, 5)
    box = ZBox(-4.0, 4.0)
    explained = athena.lrp(model, (x, y), rule=EpsilonGammaBox(-4.0, 4.0))
    expected = athena.lrp(model, (x, y), rule=lambda path, module: Epsilon() if path == "head" else box)
    for part, same in zip(explained.input, expected.input, strict=True):
        close(part, same)


def test_flat_and_w_square_do_not_look_at_the_input() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x = images(2, 3, 4)
    for rule in (Flat(), WSquare()):
        start = images(2, 3)
        down = [
            athena.lrp(model, a, target=lambda _, r=start: r, rule=rule).input for a in (x, -x, torch.zeros_like(x))
        ]
        close(down[1], down[0])
        close(down[2], down[0])


# Inputs and outputs


class Several(nn.Module):
    """Two inputs, and outputs in a tuple or a dict."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.left, self.right, self.named = nn.Linear(4, 3), nn.Linear(5, 3), named

    def forward(self, a: Tensor, b: Tensor) -> Any:
        one, other = self.left(a), self.right(b)
        return {"sum": one + other, "left": one} if self.named else (one + other, one)


@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_and_outputs_are_explained_together(named: bool) -> None:
    model, a, b = Several(named).double(), images(2, 4), images(2, 5)
    first = "sum" if named else 0

    def alone(output: Any) -> Any:
        return {"sum": output["sum"], "left": None} if named else (output[0], None)

    explained = athena.lrp(model, (a, b), target=alone)
    assert explained.output[first].shape == (2, 3)
    assert [part.shape for part in explained.input] == [a.shape, b.shape]
    table = explained.conservation()
    absorbed = table[["bias", "stabiliser"]].to_numpy().sum()
    assert absorbed + table["relevance"].iloc[-1] == pytest.approx(explained.output[first].sum().item())
    both = athena.lrp(model, (a, b), target=lambda output: output)
    close(both.input[1], explained.input[1])
    assert not torch.allclose(both.input[0], explained.input[0])
    with pytest.raises(TypeError, match="give target as a function"):
        athena.lrp(model, (a, b))
    with pytest.raises(ValueError, match="structure"):
        athena.lrp(model, (a, b), target=lambda output: output[first])


def test_an_input_that_takes_no_part_has_no_relevance() -> None:
    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a)

    explained = athena.lrp(Ignores().double(), (images(2, 4), images(2, 5)))
    assert explained.input[0].any()
    assert not explained.input[1].any()


# In the long run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_map_is_that_of_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(4, 3, 6, 6).to(dtype)
    for rule in (Zero(), Epsilon(1e-6), Gamma(), EpsilonPlus(), EpsilonGammaBox(0.0, 1.0)):
        expected = athena.lrp(model, x.float(), target=1, rule=rule).input
        with torch.autocast("cpu", torch.bfloat16):
            half = athena.lrp(model, x, target=1, rule=rule).input
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(half.float(), expected)


def test_a_hundred_explanations_leave_no_tensor_behind() -> None:
    """Not even until the garbage collector comes, for which a GPU's memory would have to wait."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.rand(2, 3, 5, 5)

    def living() -> int:
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    rules = EpsilonPlus(), Flat(), EpsilonGammaBox(0.0, 1.0)
    for rule in rules:
        athena.lrp(model, x, rule=rule).conservation()
    gc.collect()
    gc.disable()
    try:
        before = living()
        for turn in range(100):
            athena.lrp(model, x, rule=rules[turn % len(rules)]).conservation()
        assert living() <= before
    finally:
        gc.enable()
