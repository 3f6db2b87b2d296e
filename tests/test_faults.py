"""Claims about networks in which relevance could take a wrong way in silence, in float64 against formulas and twins.

A twin is the same function written in another way: both have to be explained alike. See also `test_faults_in_training`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from test_relevance import RULES, Apply, close, every_rule, gradient_times_input, images
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Flat, WSquare, Zero


def unaccounted(explained: athena.Relevance) -> float:
    """The part of the start that is neither in the input nor in the table, by size."""
    absorbed, start = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum(), explained.output.sum().item()
    return abs(start - explained.input.sum().item() - absorbed) / abs(start)


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, its batch norms with statistics that make a difference."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.double().eval()


# What does not depend on the input


class Prompted(nn.Module):
    """An image encoder whose classes are texts: logits are products with what an encoder makes of a constant."""

    shape = (3, 6)

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.context = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("words", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.words + self.context).T


class Placed(nn.Module):
    """Tokens plus a layer's output for a learned embedding of places."""

    shape = (3, 7, 16)

    def __init__(self) -> None:
        super().__init__()
        self.places, self.mix, self.head = nn.Parameter(torch.randn(7, 16)), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x + self.mix(self.places)).mean(1))


class Gated(nn.Module):
    """A layer times a function of a parameter."""

    shape = (3, 6)

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.p, self.gate = nn.Linear(6, 3), nn.Linear(3, 4), nn.Parameter(torch.randn(3)), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x) * self.gate(self.p)))


CONSTANTS: dict[str, Callable[[], Any]] = {
    "texts": Prompted,
    "places": Placed,
    "sigmoid": lambda: Gated(torch.sigmoid),
    "softplus": lambda: Gated(F.softplus),
    "square": lambda: Gated(torch.square),
    "softmax": lambda: Gated(lambda p: p.softmax(0)),
    "sum": lambda: Gated(lambda p: 1 + p),
    "norm": lambda: Gated(lambda p: F.layer_norm(p, (3,))),
    "cat": lambda: Gated(lambda p: torch.cat([p[:2], p.new_ones(1)])),
    "where": lambda: Gated(lambda p: torch.where(p > 0, p, 0.1)),
    "temperature": lambda: Gated(lambda p: p.clamp(max=math.log(100)).exp()),
    "bounded temperature": lambda: Gated(lambda p: torch.clamp(torch.exp(p), max=100.0)),
    "unknown to LRP": lambda: Gated(torch.sin),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_depends_on_parameters_alone_is_a_constant_whether_or_not_they_are_trained(name: str) -> None:
    model = CONSTANTS[name]().double()
    x, maps = images(*model.shape), []
    for trained in (True, False):
        explained = athena.lrp(model.requires_grad_(trained), x, rule=Zero())
        assert unaccounted(explained) < 1e-9
        maps.append(explained.input)
    close(maps[0], gradient_times_input(model, x))
    close(maps[1], maps[0])


def half_each(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product whose gradient is what its rule makes of it: half for each factor."""
    return 0.5 * (product(a.detach(), b) + product(a, b.detach()))


def test_a_learned_query_bears_no_relevance() -> None:
    """Values and weights of attention get half each; of the scores, all goes to the keys."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])

        def by_rules(self, x: Tensor) -> Tensor:
            parts = (self.query.expand(len(x), -1, -1), x, x)
            layers = zip(
                parts, self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3), strict=True
            )
            q, k, v = (F.linear(*layer).unflatten(2, (2, 4)).transpose(1, 2) for layer in layers)
            mixed = half_each(torch.matmul, (q @ k.mT / 2).softmax(-1), v)
            return self.head(self.attention.out_proj(mixed.transpose(1, 2).flatten(2))[:, 0])

    model, x = Pooled().double(), images(3, 5, 8)
    assert unaccounted(athena.lrp(model, x, rule=Zero())) < 1e-9
    nn.init.normal_(model.attention.in_proj_bias)
    torch.testing.assert_close(model.by_rules(x), model(x))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.by_rules(leaf).max(1).values.sum(), leaf)
    for trained in (True, False):
        explained = athena.lrp(model.requires_grad_(trained), x, rule=Zero())
        close(explained.input, x * gradient)


# Gates


class Squeezed(nn.Module):
    """A convolution gated by what squeeze-and-excitation makes of it."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.down, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.gate = gate

    def scores(self, y: Tensor) -> Tensor:
        return self.up(F.relu(self.down(y.mean((2, 3), keepdim=True))))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.body(x))
        return y * self.gate(self.scores(y))


GATES = {"sigmoid": torch.sigmoid, "hard sigmoid": F.hardsigmoid}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_passes_on_what_it_differs_by_from_its_value_at_zero(name: str) -> None:
    class ByRules(Squeezed):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.body(x))
            scores = self.scores(y)
            slope = (self.gate(scores) - 0.5) / scores
            return half_each(torch.mul, y, scores * slope.detach() + (self.gate(scores) - scores * slope).detach())

    model = nn.Sequential(Squeezed(GATES[name]), Squeezed(GATES[name]), nn.Flatten(), nn.Linear(200, 3)).double()
    by_rules = copy.deepcopy(model)
    by_rules[0].__class__ = by_rules[1].__class__ = ByRules
    x = images(2, 8, 5, 5)
    torch.testing.assert_close(by_rules(x), model(x))
    explained = athena.lrp(model, x, rule=Zero())
    close(explained.input, gradient_times_input(by_rules, x))
    assert unaccounted(explained) < 1e-9


@pytest.mark.parametrize("name", GATES)
def test_relevance_does_not_grow_from_gate_to_gate(name: str) -> None:
    gates = [Squeezed(GATES[name]) for _ in range(8)]
    model = nn.Sequential(*gates, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    x = images(4, 8, 8, 8)
    relevance, usual = athena.lrp(model, x).input, gradient_times_input(model, x)
    assert relevance.abs().sum() < 3 * usual.abs().sum()


def test_the_map_of_a_mobilenet_is_of_the_size_of_gradient_times_input() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model(torch.rand(8, 3, 64, 64, dtype=torch.float64))  # statistics for the norms
    model.eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    relevance, usual = athena.lrp(model, x, rule=Zero()).input, gradient_times_input(model, x)
    assert relevance.abs().sum() < 3 * usual.abs().sum()


# Batch norm


@every_rule
def test_a_convolution_that_a_norm_and_another_read_is_as_one_computed_for_each(rule: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.head((F.relu(self.norm(z)) + z).mean((2, 3)))

    class Twice(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.head((F.relu(self.norm(self.conv(x))) + self.conv(x)).mean((2, 3)))

    model, x = settled(Shared()), images(2, 3, 6, 6)
    twin = copy.deepcopy(model)
    twin.__class__ = Twice
    shared, twice = (athena.lrp(net, x, rule=RULES[rule][0]) for net in (model, twin))
    close(shared.input, twice.input)
    assert max(map(unaccounted, (shared, twice))) < 1e-9


@every_rule
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_is_one_layer_with_a_transposed_convolution_of_any_groups(groups: int, rule: str) -> None:
    model = settled(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.Flatten()))
    conv, norm, _ = model
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    one = copy.deepcopy(conv)
    with torch.no_grad():
        one.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
        for channel in range(6):  # of group channel // (6 / groups), which reads as many channels of the input
            group, inside = divmod(channel, 6 // groups)
            one.weight[group * 4 // groups : (group + 1) * 4 // groups, inside] *= scale[channel]
    x, twin = images(2, 4, 4, 4), nn.Sequential(one, nn.Flatten())
    torch.testing.assert_close(twin(x), model(x))
    found, expected = (athena.lrp(net, x, target="logits", rule=RULES[rule][0]).input for net in (model, twin))
    close(found, expected)


# The same function in other words

SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))),
    "tanh gelu": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0)))),
    ),
    "hardswish": (F.hardswish, lambda z: z * F.relu6(z + 3) / 6),
    "silu": (F.silu, lambda z: z * torch.sigmoid(z)),
    "silu as a quotient": (F.silu, lambda z: z / (1 + torch.exp(-z))),
    "sigmoid": (torch.sigmoid, lambda z: 0.5 + 0.5 * torch.tanh(z / 2)),
    "tanh": (torch.tanh, lambda z: 2 * torch.sigmoid(2 * z) - 1),
}


@pytest.mark.parametrize("rule", ["zero", "epsilon", "large epsilon", "gamma"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_an_activation_written_out_is_explained_as_the_one_that_it_is(name: str, rule: str) -> None:
    fused, written = SPELLINGS[name]
    model = nn.Sequential(nn.Linear(6, 9), Apply(fused), nn.Linear(9, 7), Apply(fused), nn.Linear(7, 3)).double()
    x = images(4, 6)
    expected = athena.lrp(model, x, rule=RULES[rule][0])
    model[1].function = model[3].function = written
    found = athena.lrp(model, x, rule=RULES[rule][0])
    close(found.input, expected.input)
    assert max(map(unaccounted, (found, expected))) < 1e-9
    totals = [explained.conservation()[["bias", "stabiliser"]].sum() for explained in (found, expected)]
    np.testing.assert_allclose(*totals, atol=1e-9)


# What there is besides layers with weights

WEIGHTLESS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda x: x.relu()),
    "residual sum": (lambda x: x * 2 + x, lambda x: 3 * x),
    "mean": (lambda x: x.unflatten(1, (2, 3)).mean(1), lambda x: x / 2),
    "max pooling": (lambda x: F.max_pool1d(x, 2), lambda x: x * (x == F.max_pool1d(x, 2).repeat_interleave(2, 1))),
    "average pooling": (lambda x: F.avg_pool1d(x, 2), lambda x: x / 2),
}


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_a_model_without_weights_is_explained(name: str) -> None:
    function, expected = WEIGHTLESS[name]
    x = images(4, 6)
    close(athena.lrp(Apply(function), x, target="logits", rule=Zero()).input, expected(x))


def test_softmax_alone_is_explained_by_its_first_order() -> None:
    x = images(4, 6)
    p = x.softmax(1)[:, :1]
    expected = -x * x.softmax(1) * p
    expected[:, :1] += x[:, :1] * p
    close(athena.lrp(nn.Softmax(1), x, target=0, rule=Zero()).input, expected)


@pytest.mark.parametrize("name", ["index_add", "topk"])
def test_a_choice_among_experts_passes_the_gradient(name: str) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if name == "topk":
                return sum(expert(x) for expert in self.experts).topk(2, dim=-1).values
            out = x.new_zeros(len(x), 3)
            for number, expert in enumerate(self.experts):
                (rows,) = torch.where((x[:, 0].detach() > 0) == bool(number))
                out.index_add_(0, rows, expert(x[rows]))
            return out

    model, x = Chosen().double(), images(5, 4)
    explained = athena.lrp(model, x, rule=Zero())
    close(explained.input, gradient_times_input(model, x))
    assert unaccounted(explained) < 1e-9


def test_a_swin_transformer_accounts_for_all_relevance() -> None:
    """With its learned temperature and its layer for relative positions, which do not depend on the image."""
    swin = torchvision.models.swin_transformer
    model = swin.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3,
        block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2,
    ).double()  # fmt: skip
    assert unaccounted(athena.lrp(model, images(2, 3, 32, 32), rule=Epsilon(0.1))) < 1e-9


# Zeros


def test_what_is_to_start_at_an_output_of_zero_is_lost_there_and_booked() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU()).double(), images(3, 4)
    dead = int((model(x) == 0).sum())
    assert dead
    explained = athena.lrp(model, x, target=torch.ones_like, rule=Zero())
    table = explained.conservation().set_index("layer")
    assert explained.input.sum().item() == pytest.approx(18 - dead)
    assert (table.loc["output", "relevance"], table.loc["output", "bias"]) == pytest.approx((18, dead))
    assert unaccounted(explained) < 1e-9


@pytest.mark.parametrize("rule", [Flat(), WSquare()])
def test_rules_that_do_not_look_at_activations_give_to_zeros(rule: Any) -> None:
    """A dead ReLU and inputs of 0 get the share that the weights alone say."""
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU()).double(), images(3, 4)
    x[0] = 0
    x[1, 2] = 0
    weights = torch.ones(6, 4).double() if isinstance(rule, Flat) else model[0].weight.detach().square()
    explained = athena.lrp(model, x, target=torch.ones_like, rule=rule)
    close(explained.input, (weights / weights.sum(1, keepdim=True)).sum(0).expand(3, 4))
    assert unaccounted(explained) < 1e-9


@pytest.mark.parametrize("classes", [np.array([2, 0, 1]), np.int64(1), np.array(1)])
def test_classes_may_be_numbers_of_numpy(classes: Any) -> None:
    model, x = nn.Linear(4, 3).double(), images(3, 4)
    expected = torch.as_tensor(classes) if np.ndim(classes) else int(classes)
    close(athena.lrp(model, x, target=classes).input, athena.lrp(model, x, target=expected).input)
