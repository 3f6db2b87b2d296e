"""Claims about `athena.lrp`, checked against the naive formulas of `oracles` in float64."""

import dataclasses
import gc
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import athena
from athena import models
from athena.propagation.target import starts_down
from athena.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, Zero, ZPlus

RULES = {
    "zero": (Zero(), oracles.Rule()),
    "epsilon": (Epsilon(1e-6), oracles.Rule(epsilon=1e-6)),
    "large epsilon": (Epsilon(0.3), oracles.Rule(epsilon=0.3)),
    "gamma": (Gamma(0.25), oracles.Rule(gamma=0.25)),
    "large gamma": (Gamma(2.0), oracles.Rule(gamma=2.0)),
    "alpha-beta": (AlphaBeta(2.0, 1.0), oracles.Rule(kind="alpha-beta", alpha=2.0, beta=1.0)),
    "z-plus": (ZPlus(), oracles.Rule(kind="alpha-beta")),
    "box": (ZBox(-1.5, 2.0), oracles.Rule(kind="box", low=-1.5, high=2.0)),
    "w-square": (WSquare(), oracles.Rule(kind="square")),
    "flat": (Flat(), oracles.Rule(kind="flat")),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert not actual.requires_grad
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def narrow_mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(12, 9, bias=bias),
            relu1=nn.ReLU(),
            linear2=nn.Linear(9, 7, bias=bias),
            relu2=nn.ReLU(),
            linear3=nn.Linear(7, 4, bias=bias),
        )
    ).double()


def narrow_cnn(bias: bool = True, pooling: Callable[[int], nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1, bias=bias),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(4, 6, 3, padding=1, bias=bias),
            relu2=nn.ReLU(),
            pool=pooling(2),
        )
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(54, 8, bias=bias), nn.ReLU(), nn.Linear(8, 4, bias=bias))
    return nn.Sequential(OrderedDict(features=features, head=head)).double()


NETWORKS: dict[str, tuple[Callable[..., nn.Sequential], tuple[int, ...]]] = {
    "mlp": (narrow_mlp, (5, 1, 3, 4)),
    "cnn": (narrow_cnn, (3, 2, 6, 6)),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def explained_or_refused(model: nn.Module, x: Tensor, rule: athena.rules.Rule) -> athena.Relevance:
    """For operations the package need not know, as long as it says so."""
    try:
        return athena.lrp(model, x, rule=rule)
    except athena.UnsupportedLayer as refusal:
        pytest.skip(str(refusal))


def gradient_times_input(model: nn.Module, x: Tensor) -> Tensor:
    """Of the predicted logit."""
    x = x.clone().requires_grad_()
    output = model(x)
    (gradient,) = torch.autograd.grad(output.gather(1, output.argmax(1, keepdim=True)).sum(), x)
    return x.detach() * gradient


# The rules


@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_lrp0_equals_gradient_times_input_on_the_networks_of_table_6_1(architecture: str) -> None:
    model = (models.mlp() if architecture == "mlp" else models.cnn()).double()
    x = images(2, 1 if architecture == "mlp" else 3, 32, 32)
    close(athena.lrp(model, x, rule=Zero()).input, gradient_times_input(model, x))


@every_network
def test_lrp0_equals_gradient_times_input_on_relu_networks(network: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build(), images(*shape)
    close(athena.lrp(model, x, rule=Zero()).input, gradient_times_input(model, x))


def well_conditioned(z: Tensor) -> None:
    """A quotient by almost nothing has no digits to compare."""
    assume(z.abs().min() > 1e-3)


@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
    sign=st.sampled_from(["positive", "negative", "mixed"]),
    rule=st.sampled_from(sorted(RULES)),
)
def test_a_linear_layer_shares_relevance_by_the_formula_of_its_rule(
    seed: int, batch: int, inputs: int, outputs: int, bias: bool, sign: str, rule: str
) -> None:
    torch.manual_seed(seed)
    layer, a = nn.Linear(inputs, outputs, bias=bias).double(), images(batch, inputs)
    a = {"positive": a.abs(), "negative": -a.abs(), "mixed": a}[sign]
    ours, naive = RULES[rule]
    with torch.no_grad():
        well_conditioned(layer(a))
    relevance = images(batch, outputs)
    expected = oracles.linear_relevance(a, layer.weight, layer.bias, relevance, naive)
    close(athena.lrp(nn.Sequential(layer), a, target=lambda _: relevance, rule=ours).input, expected)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups = draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    layer = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    ).double()
    size = [dilation[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 2)) for i in range(2)]
    x = images(draw(st.integers(1, 2)), layer.in_channels, *size)
    return layer, {"positive": x.abs(), "negative": -x.abs(), "mixed": x}[
        draw(st.sampled_from(["positive", "negative", "mixed"]))
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(drawn=convolutions(), rule=st.sampled_from(sorted(RULES)))
def test_a_convolution_shares_relevance_as_the_matrix_it_stands_for(drawn: tuple[nn.Conv2d, Tensor], rule: str) -> None:
    layer, a = drawn
    ours, naive = RULES[rule]
    table, shape = oracles.conv_table(layer, (a.shape[1], a.shape[2], a.shape[3]))
    dense = oracles.Dense(table, shape, layer.weight)
    with torch.no_grad():
        z = layer(a)
        bias = oracles.spread(layer.bias, z)
        torch.testing.assert_close(dense.forward(a, layer.weight) + bias, z)
        touched = z != 0  # a window that lies in the padding sees nothing, and without a bias z is 0
        assume(touched.any())
        well_conditioned(z[touched])
    relevance = images(*z.shape) * touched
    step = oracles.Step("0", layer, a, z, dense)
    with torch.no_grad():
        expected, _ = step.share(relevance, naive)
    model = nn.Sequential(layer, nn.Flatten())
    close(athena.lrp(model, a, target=lambda _: relevance.flatten(1), rule=ours).input, expected)


def test_the_oracle_agrees_with_itself() -> None:
    """The loops of 3.6.2, the matrix and the product with patches are three spellings of one formula."""
    for _, naive in RULES.values():
        linear, a = nn.Linear(5, 4).double(), images(3, 5)
        relevance = images(3, 4)
        with torch.no_grad():
            step = oracles.Step("0", linear, a, linear(a), oracles.Plain(linear.weight))
            expected = oracles.linear_relevance(a, linear.weight, linear.bias, relevance, naive)
            close(step.share(relevance, naive)[0], expected)
        conv, a = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double(), images(2, 2, 7, 6)
        with torch.no_grad():
            z, shape = conv(a), (2, 7, 6)
            table, out_shape = oracles.conv_table(conv, shape)
            maps = [oracles.Dense(table, out_shape, conv.weight), oracles.Patches(conv, shape)]
            relevance = images(*z.shape)
            shares = [oracles.Step("0", conv, a, z, m).share(relevance, naive)[0] for m in maps]
            close(shares[1], shares[0])
            close(maps[1].weight_gradient(a, relevance), maps[0].weight_gradient(a, relevance))


@every_rule
@every_network
def test_a_network_is_explained_layer_by_layer_as_the_naive_formulas_say(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build(), images(*shape)
    ours, naive = RULES[rule]
    explained, expected = athena.lrp(model, x, rule=ours), oracles.lrp(model, x, oracles.predicted, naive)
    close(explained.input, expected.input)
    assert list(explained.layers) == list(expected.layers)
    for path, relevance in expected.layers.items():
        close(explained.layers[path], relevance)


@every_rule
def test_overlapping_strided_pooling_and_grouped_convolutions_compose(rule: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(4, 3, (2, 1), padding="same", dilation=2, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()
    x = images(3, 2, 7, 8)
    ours, naive = RULES[rule]
    explained, expected = athena.lrp(model, x, rule=ours), oracles.lrp(model, x, oracles.predicted, naive)
    close(explained.input, expected.input)
    for path, relevance in expected.layers.items():
        close(explained.layers[path], relevance)


def test_a_rule_can_be_chosen_for_each_layer_by_name_and_module() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    asked: dict[str, nn.Module] = {}

    def rule(name: str, module: nn.Module) -> athena.rules.Rule:
        asked[name] = module
        return Gamma(0.5) if isinstance(module, nn.Conv2d) else Epsilon(0.2) if name == "head.1" else Zero()

    def naive(name: str) -> oracles.Rule:
        if name.startswith("features"):
            return oracles.Rule(gamma=0.5)
        return oracles.Rule(epsilon=0.2) if name == "head.1" else oracles.Rule()

    close(athena.lrp(model, x, rule=rule).input, oracles.lrp(model, x, oracles.predicted, naive).input)
    assert asked == {name: model.get_submodule(name) for name in asked}
    assert set(asked) == {"features.conv1", "features.conv2", "head.1", "head.3"}


def test_the_default_rule_is_epsilon_with_1e_6() -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    assert torch.equal(athena.lrp(model, x).input, athena.lrp(model, x, rule=Epsilon(1e-6)).input)


# Conservation


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-12), Gamma(0.25)], ids=str)
@every_network
def test_without_biases_every_layer_holds_the_relevance_of_the_output(network: str, rule: Any) -> None:
    build, shape = NETWORKS[network]
    explained = athena.lrp(build(bias=False), images(*shape), rule=rule)
    total = explained.output.sum().item()
    assert total != 0
    for relevance in [*explained.layers.values(), explained.input]:
        assert relevance.sum().item() == pytest.approx(total, rel=1e-8)


@every_rule
@every_network
def test_without_biases_the_stabiliser_accounts_for_all_that_is_lost(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    ours, naive = RULES[rule]
    table = athena.lrp(build(bias=False), images(*shape), rule=ours).conservation()
    assert (table["bias"].fillna(0).abs() < 1e-12).all()
    total = table["relevance"].iloc[0]
    lost = table["stabiliser"].fillna(0).sum()
    assert table["relevance"].iloc[-1] == pytest.approx(total - lost, rel=1e-8)
    if naive.epsilon == 0 and naive.kind != "alpha-beta":  # which loses what has no contribution of its sign
        assert lost == pytest.approx(0, abs=1e-12 * abs(total))


@every_rule
@every_network
def test_the_conservation_table_adds_up_row_by_row(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build(), images(*shape)
    ours, naive = RULES[rule]
    table = athena.lrp(model, x, rule=ours).conservation()
    expected = oracles.lrp(model, x, oracles.predicted, naive).rows
    assert list(table["layer"]) == [row.layer for row in expected]
    scale = abs(expected[0].relevance)
    for row, (_, ours_row) in zip(expected, table.fillna(0).iterrows(), strict=True):
        for column in ("relevance", "bias", "stabiliser"):
            assert ours_row[column] == pytest.approx(getattr(row, column), abs=1e-9 * scale), (row.layer, column)
    columns = {name: table[name].fillna(0).to_numpy() for name in ("relevance", "bias", "stabiliser")}
    left = columns["relevance"] - columns["bias"] - columns["stabiliser"]
    np.testing.assert_allclose(left[:-1], columns["relevance"][1:], rtol=0, atol=1e-9 * scale)


class Constants(nn.Module):
    """A residual sum with the input itself, and sums with a parameter and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x + self.body(x)) + self.shift + 0.5)


@every_rule
def test_on_any_graph_what_is_not_absorbed_arrives_at_the_input(rule: str) -> None:
    table = athena.lrp(Constants().double(), images(4, 6), rule=RULES[rule][0]).conservation()
    absorbed = table["bias"].fillna(0).sum() + table["stabiliser"].fillna(0).sum()
    total = table["relevance"].iloc[0]
    assert table["relevance"].iloc[-1] == pytest.approx(total - absorbed, abs=1e-9 * abs(total))


# What relevance starts from


TARGETS: dict[str, tuple[Any, oracles.Start]] = {
    "predicted": (None, oracles.predicted),
    "int": (2, oracles.of_class(2)),
    "tensor": (torch.tensor([0, 3, 1, 2, 2]), oracles.of_class([0, 3, 1, 2, 2])),
    "softmax": ("softmax", oracles.softmax),
    "logits": ("logits", oracles.logits),
    "callable": (lambda output: output.tanh() + 0.5, lambda output: output.tanh() + 0.5),
}


@pytest.mark.parametrize(
    "target",
    [None, 2, torch.tensor([0, 3, 1]), "softmax", "logits", torch.ones_like],
    ids=["predicted", "int", "tensor", "softmax", "logits", "function"],
)
def test_training_starts_with_relevance_over_the_output_and_nothing_at_0(target: Any) -> None:
    output = torch.randn(3, 4)
    output[1] = -output[1].abs()
    output[1, 3] = output[2, 1] = 0.0
    relevance, ((started, d),) = starts_down(output, target)
    expected = torch.where(output == 0, 0, relevance / output)
    assert started is output
    torch.testing.assert_close(d, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_relevance_starts_from_the_target(target: str) -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    ours, start = TARGETS[target]
    explained = athena.lrp(model, x, target=ours)
    with torch.no_grad():
        close(explained.output, start(model(x)))
    expected = oracles.lrp(model, x, start, oracles.Rule(epsilon=1e-6))
    close(explained.input, expected.input)
    for path, relevance in expected.layers.items():
        close(explained.layers[path], relevance)


@every_rule
@pytest.mark.parametrize("target", ["softmax", "logits", None])
def test_a_logit_of_exactly_zero_gives_finite_relevance(target: str | None, rule: str) -> None:
    if rule not in ("epsilon", "large epsilon") and target == "softmax":
        pytest.skip("a probability over a zero logit is infinite without a stabiliser")
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    nn.init.zeros_(model.linear3.weight[1:2])
    nn.init.zeros_(model.linear3.bias[1:2])
    ours, naive = RULES[rule]
    start = {"softmax": oracles.softmax, "logits": oracles.logits, None: oracles.predicted}[target]
    close(athena.lrp(model, x, target=target, rule=ours).input, oracles.lrp(model, x, start, naive).input)


@every_rule
def test_an_input_of_zeros_has_no_relevance(rule: str) -> None:
    model = narrow_cnn(bias=False)
    explained = athena.lrp(model, torch.zeros(2, 2, 6, 6, dtype=torch.float64), rule=RULES[rule][0])
    for relevance in [explained.input, *explained.layers.values()]:
        assert torch.equal(relevance, torch.zeros_like(relevance))


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("probability", "probability"),
        (1.5, "1.5"),
        (4, "4"),
        (torch.tensor([0, 1, 9, 0, 0]), "9"),
        (torch.tensor([0, 1]), "2"),
        (torch.rand(5), "float"),
        (lambda output: output[:, :2], "2"),
    ],
    ids=["unknown word", "float", "class out of range", "label out of range", "too few", "float tensor", "wrong shape"],
)
def test_a_wrong_target_is_refused_with_a_message_that_names_it(target: Any, named: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        athena.lrp(narrow_mlp(), images(5, 1, 3, 4), target=target)
    assert named in str(raised.value)


@pytest.mark.parametrize("rule", ["epsilon", Epsilon, 0.1, lambda name, module: "zero"])
def test_a_wrong_rule_is_refused(rule: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        athena.lrp(narrow_mlp(), images(5, 1, 3, 4), rule=rule)


# The result


def test_layers_are_the_affine_layers_by_module_path_in_forward_order() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    explained = athena.lrp(model, x)
    assert explained.input.shape == x.shape
    assert explained.output.shape == (3, 4)
    shapes = {path: tuple(relevance.shape) for path, relevance in explained.layers.items()}
    assert list(shapes.items()) == [
        ("features.conv1", (3, 4, 6, 6)),
        ("features.conv2", (3, 6, 6, 6)),
        ("head.1", (3, 8)),
        ("head.3", (3, 4)),
    ]
    assert torch.equal(explained.layers["head.3"], explained.output)


def test_no_graph_is_kept() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6).requires_grad_()
    explained = athena.lrp(model, x)
    for tensor in [explained.input, explained.output, *explained.layers.values()]:
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


@every_network
def test_repeated_calls_give_the_same_numbers_bit_for_bit(network: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build().float(), images(*shape).float()
    first = athena.lrp(model, x, rule=Gamma())
    athena.lrp(model, x.flip(0), target="softmax")
    second = athena.lrp(model, x, rule=Gamma())
    assert torch.equal(first.input, second.input)
    assert all(torch.equal(first.layers[path], second.layers[path]) for path in first.layers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_it_works_under_no_grad_and_on_frozen_models(mode: Callable[[], Any]) -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    expected = athena.lrp(model, x).input
    model.requires_grad_(False)
    with mode():
        assert torch.equal(athena.lrp(model, x).input, expected)


def test_the_input_is_left_as_it_was() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double(), images(5, 1, 3, 4).requires_grad_()
    before = x.detach().clone()
    athena.lrp(model, x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert x.requires_grad


# Every operation that relevance passes


def below_an_identity(layer: nn.Module, features: int) -> nn.Sequential:
    """`layer`, and above it an affine layer that hands on what it is given."""
    top = nn.Linear(features, features, bias=False).double()
    nn.init.eye_(top.weight)
    return nn.Sequential(layer, nn.Flatten(), top)


def test_max_pooling_gives_all_to_the_winner() -> None:
    x = torch.tensor([[[[1.0, 4.0, -1.0, -2.0], [3.0, 2.0, -4.0, -3.0]]]], dtype=torch.float64)
    target = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    explained = athena.lrp(below_an_identity(nn.MaxPool2d(2), 2), x, target=lambda output: target, rule=Zero())
    close(explained.input, torch.tensor([[[[0, 2.0, 5.0, 0], [0, 0, 0, 0]]]], dtype=torch.float64))


def test_average_pooling_shares_in_proportion() -> None:
    for pooling in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)):
        x = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]], dtype=torch.float64)
        target = torch.tensor([[20.0]], dtype=torch.float64)
        explained = athena.lrp(below_an_identity(pooling, 1), x, target=lambda output, t=target: t, rule=Zero())
        close(explained.input, 2 * x)
    model, x = narrow_cnn(pooling=nn.AvgPool2d), images(3, 2, 6, 6)
    close(athena.lrp(model, x).input, oracles.lrp(model, x, oracles.predicted, oracles.Rule(1e-6)).input)


def test_dropout_is_off_while_explaining() -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    dropping = nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:], nn.Dropout(0.9)).train()
    assert torch.equal(athena.lrp(dropping, x).input, athena.lrp(model, x).input)
    assert all(module.training for module in dropping.modules())


def test_batch_norm_passes_its_own_affine_map_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = images(4, 2, 6, 6)
    model(x + 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained = explained_or_refused(model, x, Zero())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    close(explained.input, gradient_times_input(model.eval(), x))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ELU(), nn.Tanh(), nn.LeakyReLU(0.2)], ids=str)
def test_other_elementwise_activations_pass_relevance_on_unchanged(activation: nn.Module) -> None:
    """The identity rule: R of the activation's input is R of its output."""
    model, x = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3)).double(), images(4, 6)
    ours, naive = RULES["epsilon"]
    with torch.no_grad():
        hidden = activation(model[0](x))
        start = oracles.predicted(model(x))
        above = oracles.linear_relevance(hidden, model[2].weight, model[2].bias, start, naive)
        expected = oracles.linear_relevance(x, model[0].weight, model[0].bias, above, naive)
    explained = explained_or_refused(model, x, ours)
    close(explained.layers["0"], above, 1e-9)
    close(explained.input, expected, 1e-9)


class Residual(nn.Module):
    """x + f(x) written as a function: ReLU before the sum, or after it as in ResNet, in place or not."""

    def __init__(self, form: str, inplace: bool = False):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.relu, self.form = nn.ReLU(inplace=inplace), form

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.stem(x))
        branch = self.body(h)
        if self.form == "relu before":
            return self.head(h + self.relu(branch))
        if self.form == "relu after":
            return self.head(self.relu(torch.add(branch, h)))
        branch += h
        return self.head(self.relu(branch))


@every_rule
@pytest.mark.parametrize("form", ["relu before", "relu after", "sum in place"])
@pytest.mark.parametrize("inplace", [False, True], ids=["relu", "relu_"])
def test_a_residual_sum_is_shared_in_proportion_to_its_terms(inplace: bool, form: str, rule: str) -> None:
    model, x = Residual(form, inplace).double(), images(4, 6)
    ours, naive = RULES[rule]
    with torch.no_grad():
        h = model.stem(x).relu()
        branch = model.body(h).relu() if form == "relu before" else model.body(h)
        total = h + branch
        top = total.relu()
        relevance = oracles.predicted(model.head(top))
        of_sum = oracles.linear_relevance(top, model.head.weight, model.head.bias, relevance, naive)
        nothing = torch.where((total == 0), of_sum / 2, 0.0)  # of two zeros each gets the same
        of_branch = oracles.quotient(of_sum * branch, total) + nothing
        of_h = oracles.quotient(of_sum * h, total) + nothing
        of_h = of_h + oracles.linear_relevance(h, model.body.weight, model.body.bias, of_branch, naive)
        expected = oracles.linear_relevance(x, model.stem.weight, model.stem.bias, of_h, naive)
    explained = athena.lrp(model, x, rule=ours)
    assert list(explained.layers) == ["stem", "body", "head"]
    close(explained.layers["body"], of_branch)
    close(explained.layers["stem"], of_h)
    close(explained.input, expected)


@every_rule
@every_network
def test_relu_in_place_changes_nothing(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build(), images(*shape)
    expected = athena.lrp(model, x, rule=RULES[rule][0])
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    explained = athena.lrp(model, x, rule=RULES[rule][0])
    assert torch.equal(explained.input, expected.input)
    assert all(torch.equal(explained.layers[path], expected.layers[path]) for path in expected.layers)


class Functional(nn.Module):
    """The narrow CNN with every operation called as a function."""

    def __init__(self, model: nn.Sequential, own_parameters: bool):
        super().__init__()
        self.conv1, self.conv2 = model.features.conv1, model.features.conv2
        self.linear1, self.linear2, self.own = model.head[1], model.head[3], own_parameters

    def forward(self, x: Tensor) -> Tensor:
        if not self.own:
            x = F.max_pool2d(F.relu(self.conv2(self.conv1(x).relu())), 2)
            return self.linear2(torch.relu(self.linear1(torch.flatten(x, 1))))
        x = F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)
        x = F.conv2d(x.relu_(), self.conv2.weight, self.conv2.bias, padding=1)
        x = F.max_pool2d(F.relu(x, inplace=True), kernel_size=2).reshape(len(x), -1)
        x = F.relu(F.linear(x, self.linear1.weight, bias=self.linear1.bias))
        return F.linear(F.dropout(x, 0.5, training=self.training), self.linear2.weight, self.linear2.bias)


@every_rule
@pytest.mark.parametrize("own_parameters", [False, True], ids=["modules", "functions"])
def test_functional_calls_are_explained_like_modules(own_parameters: bool, rule: str) -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    expected = athena.lrp(model, x, rule=RULES[rule][0])
    explained = athena.lrp(Functional(model, own_parameters), x, rule=RULES[rule][0])
    close(explained.input, expected.input)
    assert len(explained.layers) == 4
    for ours, theirs in zip(explained.layers.values(), expected.layers.values(), strict=True):
        close(ours, theirs)


def test_a_layer_used_twice_is_explained_at_both_places() -> None:
    layer, x = nn.Linear(5, 5).double(), images(4, 5)
    twice, unrolled = nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 5).double())
    unrolled[2].load_state_dict(layer.state_dict())
    for rule in (Zero(), Epsilon(0.1), Gamma()):
        close(athena.lrp(twice, x, rule=rule).input, athena.lrp(unrolled, x, rule=rule).input)


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-6), Gamma()], ids=str)
def test_float32_and_channels_last_agree_with_float64(rule: Any) -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    expected = athena.lrp(model, x, target="logits", rule=rule).input
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    last = athena.lrp(model, x, target="logits", rule=rule)
    close(last.input, expected)
    single = athena.lrp(model.float(), x.float(), target="logits", rule=rule).input
    assert single.dtype == torch.float32
    close(single.double(), expected, 1e-3)


# What relevance cannot pass


class Apply(nn.Module):
    """Any function of a tensor, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Squash(torch.autograd.Function):
    """A function PyTorch knows nothing about but its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.cosh() ** 2


UNSUPPORTED: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "sin method": lambda x: x.sin(),
    "rounding": torch.round,
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True) + x,
    "exponential": torch.exp,
    "division by activations": lambda x: 1 / x,
    "power of an activation": lambda x: x.abs() ** x,
    "power of a number": lambda x: torch.pow(2.0, x),
    "angle": lambda x: torch.atan2(x, x),
    "in place": lambda x: x.sin_(),
}
UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "custom autograd function": lambda x: Squash.apply(x),
    "vmap": lambda x: torch.func.vmap(torch.sin)(x),
}


@pytest.mark.parametrize("operation", UNSUPPORTED)
def test_what_lrp_cannot_pass_is_refused_by_module_path(operation: str) -> None:
    body = nn.Sequential(nn.Linear(6, 5), Apply(UNSUPPORTED[operation]))
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(5, 3))).double()
    with pytest.raises(athena.UnsupportedLayer, match=r"body\.1"):
        athena.lrp(model, images(4, 6))


@pytest.mark.parametrize("operation", UNSEEN)
def test_what_is_no_function_of_pytorch_is_refused_by_the_module_that_uses_it(operation: str) -> None:
    body = nn.Sequential(nn.Linear(6, 5), Apply(UNSEEN[operation]))
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(5, 3))).double()
    with pytest.raises(athena.UnsupportedLayer, match=r"'body\.1' uses (a custom autograd function|'Sin')"):
        athena.lrp(model, images(4, 6))
    with pytest.raises(athena.UnsupportedLayer, match=r"'1' uses (a custom autograd function|'Sin')"):
        athena.lrp(body, images(4, 6))


def test_an_output_that_is_written_over_is_explained_even_where_nobody_sees_it() -> None:
    def unseen(h: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return h.relu_()

    model = nn.Sequential(OrderedDict(below=nn.Linear(6, 5), odd=Apply(unseen), head=nn.Linear(5, 3))).double()
    x = images(4, 6)
    explained = athena.lrp(model, x, rule=Epsilon(0.1)).input
    model.odd.function = torch.relu
    close(explained, athena.lrp(model, x, rule=Epsilon(0.1)).input)


# The model comes back as it was


def is_hooks(name: str, value: Any) -> bool:
    return "hooks" in name and isinstance(value, dict)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an explanation must not touch."""
    hooks = [name for name, value in vars(model).items() if is_hooks(name, value)]
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(id(p), p.data_ptr(), p.requires_grad, p._version) for p in model.parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [p.grad if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [dict(getattr(module, name)) for module in model.modules() for name in hooks],
        "parameter hooks": [p._backward_hooks for p in model.parameters()],
        "random": (torch.get_rng_state(), random.getstate()),
        "gradients on": torch.is_grad_enabled(),
        "modes": torch._C._len_torch_function_stack(),
        "global hooks": {name: len(value) for name, value in vars(nn.modules.module).items() if is_hooks(name, value)},
    }


def assert_same(before: Any, after: Any, place: str = "") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), place
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), place
        for key in before:
            assert_same(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), place
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same(one, other, f"{place}/{i}")
    else:
        assert before == after, place


def with_mixed_state(unsupported: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 4, 3, padding=1),
            pool=nn.MaxPool2d(1),
            relu=nn.ReLU(),
            drop=nn.Dropout(0.5),
            flatten=nn.Flatten(),
            linear1=nn.Linear(144, 6),
            odd=Apply(torch.sin if unsupported else torch.relu),
            linear2=nn.Linear(6, 3),
        )
    ).double()
    model.train()
    model.pool.eval()
    model.conv.bias.requires_grad_(False)
    model(images(2, 2, 6, 6)).sum().backward()
    model.linear2.weight.grad = None
    model.linear1.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("rule", ["zero", "epsilon", "gamma"])
@pytest.mark.parametrize("target", [None, "softmax"])
def test_the_model_comes_back_as_it_was(rule: str, target: str | None) -> None:
    model, x = with_mixed_state(), images(2, 2, 6, 6)
    before = state(model)
    athena.lrp(model, x, target=target, rule=RULES[rule][0]).conservation()
    assert_same(before, state(model))


def test_the_model_comes_back_as_it_was_after_an_error_midway() -> None:
    model, x = with_mixed_state(unsupported=True), images(2, 2, 6, 6)
    before = state(model)
    with pytest.raises(athena.UnsupportedLayer):
        athena.lrp(model, x)
    assert_same(before, state(model))

    def broken(output: Tensor) -> Tensor:
        raise RuntimeError("no target")

    model = with_mixed_state()
    before = state(model)
    with pytest.raises(RuntimeError, match="no target"):
        athena.lrp(model, x, target=broken)
    with pytest.raises(RuntimeError):
        athena.lrp(model, torch.ones(2, 5, 6, 6, dtype=torch.float64))
    assert_same(before, state(model))


def test_an_explained_model_trains_on_as_if_nothing_had_been_asked() -> None:
    def trained(explain: bool) -> nn.Sequential:
        torch.manual_seed(1)
        model = narrow_cnn()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            x, labels = images(4, 2, 6, 6), torch.randint(4, (4,))
            if explain:
                athena.lrp(model, x, rule=Gamma())
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        return model

    plain, explained = trained(False), trained(True)
    assert_same(dict(plain.state_dict()), dict(explained.state_dict()))


# The second pass, which tells what the layers held


def held() -> int:
    """The bytes of all tensors that Python knows of, each memory once."""
    gc.collect()
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@every_rule
def test_an_explanation_holds_no_more_than_input_and_output(rule: str) -> None:
    model, x = narrow_cnn(), images(16, 2, 6, 6)
    before = held()
    explained = athena.lrp(model, x, rule=RULES[rule][0])
    state_of_generator = 5056
    light = sum(tensor.nbytes for tensor in (explained.input, explained.output))
    assert held() - before <= light + state_of_generator + 64
    assert sum(layer.nbytes for layer in explained.layers.values()) > 4 * light, "a test of nothing"


class Watched(nn.Module):
    """Two hidden layers, of which it knows the memory of the upper one."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        second = self.above(self.below(x).relu()).relu()
        self.memory = StorageWeakRef(second.untyped_storage())
        return self.head(second)


@every_rule
def test_activations_go_as_relevance_comes_down(rule: str) -> None:
    model, chosen, gone = Watched().double(), RULES[rule][0], []

    class Observed(type(chosen)):  # type: ignore[misc]
        """The rule of the lowest layer; tells whether the memory of the upper one is free when relevance comes."""

        @property
        def stabiliser(self) -> float:
            gone.append(model.memory.expired())
            return chosen.stabiliser  # type: ignore[no-any-return]

        def share(self, *given: Any) -> Any:
            gone.append(model.memory.expired())
            return chosen.share(*given)

    lowest = Observed(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)})
    explained = athena.lrp(model, images(4, 5), rule=lambda path, module: lowest if path == "below" else chosen)
    assert gone[-1]
    assert len(explained.layers) == 3


class Normalised(nn.Module):
    """Batch norm above two convolutions, read twice; it knows the memory of the upper one."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.above(self.below(x).relu())
        self.memory = StorageWeakRef(z.untyped_storage())
        normed = self.norm(z)
        return self.head((normed + normed.relu()).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_a_merged_batch_norm_has_saved_goes_as_relevance_comes_down() -> None:
    model, gone = Normalised(), []

    class Observed(Epsilon):
        @property
        def stabiliser(self) -> float:
            gone.append(model.memory.expired())
            return self.epsilon

    lowest = Observed()
    athena.lrp(model, torch.rand(2, 2, 4, 4), rule=lambda path, module: lowest if path == "below" else Epsilon())
    assert not gone[0] and gone[-1]


class Twice(nn.Module):
    """Returns what a layer gives, and its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.second(self.first(x).relu())
        return z, z.relu()


def test_relevance_of_a_layer_that_is_an_output_adds_up_with_that_of_its_relu() -> None:
    model, x = Twice().double(), images(3, 4)
    chosen = [(0,), (1,), (0, 1)]
    linear, rectified, both = (
        athena.lrp(
            model, x, lambda out, places=places: tuple(out[i] if i in places else None for i in (0, 1)), Epsilon(0.1)
        ).input
        for places in chosen
    )
    torch.testing.assert_close(both, linear + rectified)


def test_layers_are_worked_out_once() -> None:
    model = Watched().double()
    explained = athena.lrp(model, images(4, 5))
    assert explained.layers is explained.layers
    explained.conservation()
    assert model.passes == 2


@pytest.mark.parametrize("changed", ["trained", "other weights", "other input"])
def test_a_model_or_an_input_that_has_changed_is_told_from_the_one_explained(changed: str) -> None:
    model, x = narrow_mlp(), images(4, 1, 3, 4)
    explained = athena.lrp(model, x)
    match changed:
        case "trained":
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            F.cross_entropy(model(x), torch.tensor([0, 1, 2, 1])).backward()
            optimizer.step()
        case "other weights":
            model.load_state_dict(narrow_mlp().state_dict())
        case "other input":
            x[1].neg_()
    with pytest.raises(RuntimeError, match="before it is trained on or changed"):
        explained.conservation()
    with pytest.raises(RuntimeError, match="before it is trained on or changed"):
        _ = explained.layers


def test_what_is_done_with_the_map_does_not_matter_to_the_layers() -> None:
    model, x = narrow_mlp(), images(4, 1, 3, 4)
    expected = athena.lrp(model, x).conservation()
    explained = athena.lrp(model, x)
    explained.input.div_(explained.input.abs().max())
    pd.testing.assert_frame_equal(explained.conservation(), expected)


def test_a_model_that_draws_numbers_draws_the_same_ones_for_its_layers() -> None:
    model = nn.Sequential(
        nn.Linear(6, 40), Apply(lambda z: F.dropout(z, 0.5, training=True)), nn.Linear(40, 3)
    ).double()
    explained = athena.lrp(model, images(4, 6))
    torch.rand(7)
    before = torch.get_rng_state()
    account = explained.conservation()
    assert torch.equal(torch.get_rng_state(), before)
    close(account["relevance"].iloc[-1] * torch.ones(1).double(), explained.input.sum().view(1))


def test_layers_may_be_asked_for_in_another_context() -> None:
    model, x = narrow_mlp().float(), images(4, 1, 3, 4).float()
    expected = athena.lrp(model, x).layers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = athena.lrp(model, x.bfloat16().float())
    with torch.inference_mode():
        found = explained.layers
    assert list(found) == list(expected)
    assert all(layer.dtype == torch.float32 for layer in found.values())


# Threads


@pytest.mark.parametrize("training", [True, False])
def test_threads_that_explain_one_model_get_the_map_that_one_alone_gets(training: bool) -> None:
    """The second is in its forward pass when the first ends, if it is let in before."""
    first_in, second_in, first_done = threading.Event(), threading.Event(), threading.Event()

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread().name == "first":
                first_in.set()
                second_in.wait(0.5)
            elif threading.current_thread().name == "second":
                second_in.set()
                first_done.wait(10)
            return x

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Gate(), nn.Dropout(0.5), nn.Linear(64, 10))
    x, maps = torch.rand(16, 64), []
    expected = athena.lrp(model.eval(), x).input
    model.train(training)

    def first() -> None:
        maps.append(athena.lrp(model, x).input)
        first_done.set()

    def second() -> None:
        first_in.wait(10)
        maps.append(athena.lrp(model, x).input)

    threads = [threading.Thread(target=run, name=run.__name__) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(maps) == 2 and all(torch.equal(found, expected) for found in maps)
    assert all(module.training == training for module in model.modules())
