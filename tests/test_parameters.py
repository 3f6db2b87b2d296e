"""Claims about the relevance of weights, against the naive formulas of `oracles` in float64."""

from typing import Any

import oracles
import pytest
import torch
from test_relevance import NETWORKS, RULES, close, every_network, every_rule, images, narrow_mlp
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Gamma, Zero


def naive(
    table: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, relevance: Tensor, rule: oracles.Rule
) -> tuple[Tensor, Tensor]:
    """The relevance of a layer's weight and bias, and of nothing else, by loops over neurons.

    table (outputs, inputs): which weight joins an input to an output, -1 for none. bias: one for each output, or None.
    a (batch, inputs), relevance (batch, outputs). Returns that of the weight, in its shape, and that of each output's
    bias.
    """
    of_weight, of_bias = torch.zeros(weight.numel(), dtype=a.dtype), torch.zeros(len(table), dtype=a.dtype)
    for k, entries in enumerate(table):
        used = (entries >= 0).nonzero().flatten()
        places = entries[used]
        w = weight.detach().flatten()[places].tolist()
        for n in range(len(a)):
            plain = [x * v for x, v in zip(a[n, used].tolist(), w, strict=True)]
            b = 0.0 if bias is None else bias[k].item()
            for factor, contribution, kept in oracles.contributions(plain, w, b, rule):
                z = sum(contribution) + kept
                z += rule.epsilon if z >= 0 else -rule.epsilon
                if relevance[n, k] == 0 or z == 0:
                    continue
                s = factor * relevance[n, k].item() / z
                of_bias[k] += kept * s
                of_weight.index_add_(0, places, torch.tensor(contribution, dtype=a.dtype) * s)
    return of_weight.reshape(weight.shape), of_bias


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each linear layer and convolution is given."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[0].detach()}))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def table_of(module: nn.Module, a: Tensor) -> Tensor:
    """The numbers of the weights between inputs and outputs, by sending each weight's number through the layer."""
    weight = module.get_parameter("weight")
    if isinstance(module, nn.Linear):
        return torch.arange(weight.numel()).reshape(weight.shape)
    numbers = torch.arange(1, weight.numel() + 1, dtype=torch.float64).reshape(weight.shape)
    units = torch.eye(a[0].numel(), dtype=torch.float64).reshape(-1, *a.shape[1:])
    with torch.no_grad():
        outputs = torch.func.functional_call(module, {"weight": numbers, "bias": None}, (units,))
    return outputs.flatten(1).T.round().long() - 1


def expected(model: nn.Module, x: Tensor, layers: dict[str, Tensor], rule: oracles.Rule) -> dict[str, Tensor]:
    """By the naive formula, from the relevance of each layer's output."""
    found = {}
    for path, a in inputs_of(model, x).items():
        module, relevance = model.get_submodule(path), layers[path]
        bias: Any = module.bias
        per_output = None if bias is None else bias.detach().repeat_interleave(relevance[0].numel() // len(bias))
        table = table_of(module, a)
        weight, kept = naive(
            table, module.get_parameter("weight"), per_output, a.flatten(1), relevance.flatten(1), rule
        )
        found[f"{path}.weight"] = weight
        if bias is not None:
            found[f"{path}.bias"] = kept.reshape(len(bias), -1).sum(1)
    return found


def same(actual: dict[str, Tensor], formula: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert set(actual) == set(formula)
    for name, value in formula.items():
        close(actual[name], value, tolerance)


@every_network
@every_rule
def test_relevance_of_weights_and_biases_equals_the_formula(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    model, x = build(), images(2, *shape[1:])
    ours, formula = RULES[rule]
    r = athena.lrp(model, x, rule=ours)
    same(r.parameters, expected(model, x, r.layers, formula))


LAYERS = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "stride, dilation, padding": (lambda: nn.Conv2d(2, 3, 3, stride=2, dilation=2, padding=2), (2, 2, 6, 6)),
    "same padding": (lambda: nn.Conv2d(2, 3, (5, 3), padding="same"), (2, 2, 4, 5)),
    "one dimension": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 6)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), (2, 3, 3, 3)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "without bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 2, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", ["zero", "large epsilon", "gamma", "alpha-beta", "box", "w-square"])
def test_every_kind_of_convolution_has_the_relevance_of_the_formula(kind: str, rule: str) -> None:
    build, shape = LAYERS[kind]
    x = images(*shape)
    layer = build().double()
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3).double())
    ours, formula = RULES[rule]
    r = athena.lrp(model, x, rule=ours)
    same(r.parameters, expected(model, x, r.layers, formula))


@every_rule
def test_weights_bias_and_stabiliser_sum_to_the_relevance_of_their_layer(rule: str) -> None:
    model, x = NETWORKS["cnn"][0](), images(3, 2, 6, 6)
    r = athena.lrp(model, x, rule=RULES[rule][0])
    stabilised = r.conservation().set_index("layer")["stabiliser"]
    for path, relevance in r.layers.items():
        parts = r.parameters[f"{path}.weight"].sum() + r.parameters[f"{path}.bias"].sum() + stabilised[path]
        torch.testing.assert_close(parts, relevance.sum(), rtol=1e-8, atol=1e-9)


def test_a_weight_used_twice_has_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.inner(F.relu(self.inner(x)))))

    model, x = Twice().double(), images(4, 5)
    first, second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    unrolled = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), model.head)
    for place in (0, 2):
        unrolled[place].load_state_dict(model.inner.state_dict())
    r, apart = athena.lrp(model, x), athena.lrp(unrolled, x).parameters
    close(r.parameters["inner.weight"], apart["0.weight"] + apart["2.weight"])
    close(r.parameters["inner.bias"], apart["0.bias"] + apart["2.bias"])


def normalised(**options: Any) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    norm: Any = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("rule", ["large epsilon", "gamma", "alpha-beta"])
def test_a_merged_batch_norm_gives_its_layer_what_the_layer_that_both_are_would_have(rule: str) -> None:
    model, x = normalised(), images(2, 2, 6, 6)
    merged = nn.Sequential(nn.utils.fuse_conv_bn_eval(model[0], model[1]), *model[2:])
    both, one = (athena.lrp(network, x, rule=RULES[rule][0]).parameters for network in (model, merged))
    close(both["0.weight"], one["0.weight"])
    close(both["1.bias"], one["0.bias"])
    assert "0.bias" not in both and "1.weight" not in both


def test_a_batch_norm_of_its_own_has_what_its_weight_scaled_and_its_bias_added() -> None:
    model, x = normalised(), images(2, 2, 6, 6)
    r = athena.lrp(model, x, rule=Zero())
    z = model[:2](x).detach()
    z.requires_grad_()
    (d,) = torch.autograd.grad(model[2:](z).max(1).values.sum(), z)
    scaled = z.detach() - model[1].bias.detach().view(-1, 1, 1)
    close(r.parameters["1.weight"], (scaled * d).sum((0, 2, 3)))
    close(r.parameters["1.bias"], (model[1].bias.detach().view(-1, 1, 1) * d).sum((0, 2, 3)))


class Norms(nn.Module):
    """Positions that are added, norms and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.norm, self.inner, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.inner(self.norm(x)).mean(1))


def test_parameters_that_are_no_weights_of_layers_hold_what_they_keep() -> None:
    model, x = Norms().double(), images(3, 4, 6)
    nn.init.normal_(model.norm.weight), nn.init.normal_(model.norm.bias)
    r = athena.lrp(model, x, target=1, rule=Zero())
    assert set(r.parameters) == {name for name, _ in model.named_parameters()}
    whole = r.input.sum() + sum(r.parameters[name].sum() for name in ("token", "positions", "norm.bias"))
    whole = whole + r.parameters["inner.bias"].sum() + r.parameters["head.bias"].sum()
    torch.testing.assert_close(whole, r.output.sum(), rtol=1e-10, atol=1e-10)
    d = (model.head.weight[1] @ model.inner.weight).detach() / 5
    close(r.parameters["norm.bias"], model.norm.bias.detach() * d * 15)


def test_a_frozen_model_has_the_same_relevance_and_stays_frozen() -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    free = athena.lrp(model, x, rule=Gamma()).parameters
    model.requires_grad_(False)
    same(athena.lrp(model, x, rule=Gamma()).parameters, free, 1e-12)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_computed_weights_give_each_parameter_itself_times_its_gradient() -> None:
    plain = nn.Linear(6, 4).double()
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4).double())
    head, x = nn.Linear(4, 3).double(), images(3, 6)
    r = athena.lrp(nn.Sequential(normed, nn.ReLU(), head), x)
    plain.weight.data, plain.bias.data = normed.weight.detach(), normed.bias.detach()
    of_plain = athena.lrp(nn.Sequential(plain, nn.ReLU(), head), x).parameters
    close(r.parameters["0.parametrizations.weight.original0"], of_plain["0.weight"].sum(1, keepdim=True))
    close(r.parameters["0.bias"], of_plain["0.bias"])


@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.1)])
def test_attention_layers_list_the_weights_of_their_projections(rule: athena.rules.Rule) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model, x = Attending().double(), images(2, 4, 6)
    r = athena.lrp(model, x, rule=rule)
    assert set(r.parameters) == {name for name, _ in model.named_parameters()}
    stabilised = r.conservation().set_index("layer")["stabiliser"]
    path = "attention.out_proj"
    parts = r.parameters[f"{path}.weight"].sum() + r.parameters[f"{path}.bias"].sum() + stabilised[path]
    torch.testing.assert_close(parts, r.layers[path].sum(), rtol=1e-8, atol=1e-9)


def test_asking_after_the_model_has_changed_is_an_error() -> None:
    model, x = narrow_mlp(), images(5, 1, 3, 4)
    r = athena.lrp(model, x)
    with torch.no_grad():
        model.get_parameter("linear1.weight").mul_(2)
    with pytest.raises(RuntimeError, match="layers, parameters or conservation"):
        _ = r.parameters
