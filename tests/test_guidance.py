"""Claims about `athena.Guidance`, checked against a transcription of thesis 6.1.5, Algorithm 1, in float64."""

import copy
import gc
import importlib.util
import io
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import athena
from athena import models
from athena.rules import Epsilon, Gamma, Rule, Zero

Gradients = dict[str, Tensor]

STARTS = {None: oracles.predicted, "softmax": oracles.softmax, "logits": oracles.logits}


def narrow_mlp() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(12, 9),
            relu1=nn.ReLU(),
            linear2=nn.Linear(9, 7),
            relu2=nn.ReLU(),
            linear3=nn.Linear(7, 4),
        )
    ).double()


def narrow_cnn() -> nn.Sequential:
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 6, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
        )
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(OrderedDict(features=features, head=head)).double()


def batch(model: nn.Module, size: int = 5) -> tuple[Tensor, Tensor]:
    shape = (1, 3, 4) if isinstance(model[0], nn.Flatten) else (2, 8, 8)
    return torch.randn(size, *shape, dtype=torch.float64), torch.randint(4, (size,))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"mlp": narrow_mlp, "cnn": narrow_cnn}
every_network = pytest.mark.parametrize("network", NETWORKS)


def affine(model: nn.Module, scope: str = "all") -> list[str]:
    kinds = {"all": (nn.Linear, nn.Conv2d), "linear": (nn.Linear,), "convolutional": (nn.Conv2d,)}[scope]
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def gradients(model: nn.Module, x: Tensor, labels: Tensor, **settings: Any) -> Gradients:
    """Of the mean cross-entropy; guided if there are settings."""
    model.zero_grad()
    guidance = athena.Guidance(model, **settings) if settings else None
    F.cross_entropy(model(x), labels).backward()
    if guidance is not None:
        guidance.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(actual: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-6)
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def differ(actual: Gradients, expected: Gradients) -> None:
    assert any(not torch.allclose(actual[name], gradient) for name, gradient in expected.items())


def hooks(model: nn.Module) -> int:
    """How many hooks hang on a model, its modules, its parameters, and on all modules there are."""
    found = sum(len(p._backward_hooks or {}) for p in model.parameters())
    for holder in [nn.modules.module, *model.modules()]:
        found += sum(len(v) for name, v in vars(holder).items() if "hooks" in name and isinstance(v, dict))
    return found


# Algorithm 1


@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_the_networks_of_table_6_1_are_trained_by_algorithm_1(architecture: str) -> None:
    model = (models.mlp() if architecture == "mlp" else models.cnn()).double()
    x = torch.randn(2, 1 if architecture == "mlp" else 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([3, 7])
    expected = oracles.algorithm_1(model, x, labels, dict.fromkeys(affine(model), 0.7), oracles.logits)
    close(gradients(model, x, labels, factor=0.7, scope="all", target="logits"), expected)


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        (Zero(), "logits"),
        (Zero(), None),
        (Epsilon(1e-6), "softmax"),
        (Epsilon(1e-6), "logits"),
        (Epsilon(1e-6), None),
        (Epsilon(1e-2), "softmax"),
        (Epsilon(1e-4), "logits"),
        (Epsilon(1e-2), None),
        (Gamma(0.25), "logits"),
        (Gamma(0.25), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["all", "linear", "convolutional"])
@every_network
def test_gradients_are_those_of_algorithm_1(network: str, scope: str, rule: Any, target: str | None) -> None:
    model = NETWORKS[network]()
    if scope == "convolutional" and network == "mlp":
        pytest.skip("no convolution")
    x, labels = batch(model)
    naive = oracles.Rule(epsilon=getattr(rule, "epsilon", 0), gamma=getattr(rule, "gamma", 0))
    factors = dict.fromkeys(affine(model, scope), 0.7)
    expected = oracles.algorithm_1(model, x, labels, factors, STARTS[target], naive)
    actual = gradients(model, x, labels, factor=0.7, scope=scope, target=target, rule=rule)
    close(actual, expected)
    differ(actual, gradients(model, x, labels))


def test_the_defaults_are_those_of_the_thesis() -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    guidance = athena.Guidance(model)
    F.cross_entropy(model(x), labels).backward()
    guidance.remove()
    actual = {name: p.grad for name, p in model.named_parameters()}
    close(actual, oracles.algorithm_1(model, x, labels, {"head.1": 0.1}, oracles.predicted, oracles.Rule(1e-6)))


@pytest.mark.parametrize("factor", [-1.0, 0.1, 10.0])
def test_any_factor_scales_as_the_formula_says(factor: float) -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    expected = oracles.algorithm_1(model, x, labels, dict.fromkeys(affine(model), factor))
    close(gradients(model, x, labels, factor=factor), expected)


def test_a_weight_of_the_model_itself_is_guided_by_its_own_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4).double())
            self.last = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x, self.weight).relu())  # type: ignore[no-any-return]

    model, x, labels = Own(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    assert list(athena.lrp(model, x).layers) == ["weight", "last"]
    plain = gradients(model, x, labels, factor=0.0)
    assert not torch.allclose(gradients(model, x, labels, factor={"weight": 5.0})["weight"], plain["weight"])


def test_scope_can_list_module_paths() -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    for paths in (["features.conv2"], ["features.conv1", "head.1"]):
        expected = oracles.algorithm_1(model, x, labels, dict.fromkeys(paths, 0.5))
        close(gradients(model, x, labels, factor=0.5, scope=paths), expected)


def test_every_layer_can_have_its_own_factor() -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    factors = {"features.conv1": 0.3, "features.conv2": -0.5, "head.1": 2.0}
    expected = oracles.algorithm_1(model, x, labels, factors)
    close(gradients(model, x, labels, factor=factors, scope="all"), expected)


def test_a_rule_can_be_chosen_for_each_layer() -> None:
    """Above the guided layer only the output layer's rule matters, so this one tells the two apart."""
    model = narrow_mlp()
    x, labels = batch(model)
    settings = {"factor": {"linear2": 0.7}, "target": "logits"}
    by_function = gradients(
        model, x, labels, rule=lambda name, module: Epsilon(0.1) if name == "linear3" else Zero(), **settings
    )
    equal(by_function, gradients(model, x, labels, rule=Epsilon(0.1), **settings))
    differ(by_function, gradients(model, x, labels, rule=Zero(), **settings))


def test_the_output_layer_is_left_alone() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    plain, guided = gradients(model, x, labels), gradients(model, x, labels, factor=3.0, scope="all")
    for name in ("linear3.weight", "linear3.bias"):
        assert torch.equal(plain[name], guided[name])


def test_factors_compound_downwards() -> None:
    """Guiding an upper layer changes the gradients of every layer below it."""
    model = narrow_mlp()
    x, labels = batch(model)
    guided = gradients(model, x, labels, factor={"linear2": 2.0})
    close(guided, oracles.algorithm_1(model, x, labels, {"linear2": 2.0}))
    assert not torch.allclose(guided["linear1.weight"], gradients(model, x, labels)["linear1.weight"])


def test_the_true_class_can_be_the_start() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    guidance = athena.Guidance(model, factor=0.7, target="label")
    guidance.labels = labels
    F.cross_entropy(model(x), labels).backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    factors = dict.fromkeys(affine(model), 0.7)
    close(actual, oracles.algorithm_1(model, x, labels, factors, oracles.of_class(labels.tolist())))


def test_labels_that_were_not_set_are_asked_for() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    guidance = athena.Guidance(model, target="label")
    with pytest.raises((ValueError, RuntimeError), match=r"guidance\.labels"):
        model(x)
    guidance.labels = labels
    model(x)
    with pytest.raises((ValueError, RuntimeError), match=r"guidance\.labels"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)


# Variants of the relevance


def rms(relevance: Tensor) -> Tensor:
    return torch.stack([sample / sample.square().mean().sqrt() for sample in relevance])


def largest(relevance: Tensor) -> Tensor:
    return torch.stack([sample / sample.abs().max() for sample in relevance])


def batch_mean(relevance: Tensor) -> Tensor:
    return torch.stack([relevance.sum(0) / len(relevance)] * len(relevance))


@pytest.mark.parametrize(
    ("settings", "adjusted"),
    [
        ({"normalise": "max"}, largest),
        ({"normalise": "rms"}, rms),
        ({"granularity": "neuron"}, batch_mean),
        ({"normalise": "max", "granularity": "neuron"}, lambda relevance: batch_mean(largest(relevance))),
    ],
    ids=["max", "rms", "neuron", "max and neuron"],
)
@every_network
def test_relevance_is_normalised_and_averaged_as_asked(network: str, settings: dict[str, str], adjusted: Any) -> None:
    model = NETWORKS[network]()
    x, labels = batch(model)
    factors = dict.fromkeys(affine(model), 0.7)
    expected = oracles.algorithm_1(model, x, labels, factors, adjusted=adjusted)
    close(gradients(model, x, labels, factor=0.7, scope="all", **settings), expected)


@pytest.mark.parametrize("normalise", ["max", "rms"])
def test_normalising_a_sample_without_relevance_leaves_its_gradient(normalise: str) -> None:
    model = narrow_mlp()
    nn.init.zeros_(model.linear3.weight)
    nn.init.zeros_(model.linear3.bias)
    x, labels = batch(model)
    equal(gradients(model, x, labels, factor=1.0, target="logits", normalise=normalise), gradients(model, x, labels))


# What must not change


@pytest.mark.parametrize("scope", ["all", "linear", ["linear1"]])
def test_factor_0_is_plain_training_bit_for_bit(scope: Any) -> None:
    model = nn.Sequential(OrderedDict([*narrow_mlp().float().named_children()]))
    model.relu2 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    x, labels = batch(model)
    torch.manual_seed(1)
    plain = gradients(model, x.float(), labels)
    torch.manual_seed(1)
    equal(gradients(model, x.float(), labels, factor=0.0, scope=scope), plain)


def test_factor_0_for_one_layer_leaves_its_gradients_as_they_come() -> None:
    model = narrow_mlp().float()
    x, labels = batch(model)
    plain = gradients(model, x.float(), labels)
    equal(gradients(model, x.float(), labels, factor={"linear1": 0.0, "linear2": 0.0}), plain)
    guided = gradients(model, x.float(), labels, factor={"linear1": 0.5, "linear2": 0.0})
    for name in ("linear2.weight", "linear2.bias", "linear3.weight", "linear3.bias"):
        assert torch.equal(guided[name], plain[name])
    differ(guided, plain)


def test_the_forward_pass_is_the_models_own() -> None:
    """Outputs, random numbers and running statistics are those of plain training."""
    features = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    model = nn.Sequential(*features, nn.Linear(144, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 2, 8, 8)
    outcomes = []
    for guided in (False, True):
        model.load_state_dict(start)
        torch.manual_seed(1)
        if guided:
            athena.Guidance(model, factor=1.0, scope="linear")
        output = model(x)
        F.cross_entropy(output, torch.randint(4, (5,))).backward()
        outcomes.append(
            (output.detach(), model[1].running_mean.clone(), model[1].num_batches_tracked.clone(), torch.rand(3))
        )
    for plain, ours in zip(*outcomes, strict=True):
        assert torch.equal(plain, ours)


def test_nothing_happens_in_eval_mode_or_without_gradients() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    plain_output, plain = model(x).detach(), gradients(model.eval(), x, labels)
    model.train()
    guidance = athena.Guidance(model, factor=1.0)
    with torch.no_grad():
        assert torch.equal(model(x), plain_output)
    with torch.inference_mode():
        assert torch.equal(model(x), plain_output)
    model.eval().zero_grad()
    F.cross_entropy(model(x), labels).backward()
    equal({name: p.grad for name, p in model.named_parameters()}, plain)
    assert guidance.step == 0


def test_a_guided_model_is_explained_like_any_other() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    expected = athena.lrp(model, x).input
    guided = gradients(model, x, labels, factor=1.0)
    athena.Guidance(model, factor=1.0)
    model.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    assert torch.equal(athena.lrp(model, x).input, expected)
    loss.backward()
    equal({name: p.grad for name, p in model.named_parameters()}, guided)


def test_removing_the_guidance_leaves_nothing_behind() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    before, plain = hooks(model), gradients(model, x, labels)
    attributes = [sorted(vars(module)) for module in model.modules()]
    guidance = athena.Guidance(model, factor=1.0)
    F.cross_entropy(model(x), labels).backward()
    guidance.remove()
    guidance.remove()
    assert hooks(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    equal(gradients(model, x, labels), plain)


def test_it_is_a_context_manager_that_ends_with_its_block_even_by_an_error() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    before, plain, guided = hooks(model), gradients(model, x, labels), gradients(model, x, labels, factor=1.0)
    with athena.Guidance(model, factor=1.0) as guidance:
        assert isinstance(guidance, athena.Guidance)
        equal(gradients(model, x, labels), guided)
    with pytest.raises(KeyError), athena.Guidance(model, factor=1.0):
        raise KeyError
    assert hooks(model) == before
    equal(gradients(model, x, labels), plain)


def test_a_forward_pass_that_fails_leaves_the_next_one_in_order() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    guided, before = gradients(model, x, labels, factor=1.0), hooks(model)
    with athena.Guidance(model, factor=1.0):
        with pytest.raises(RuntimeError):
            model(torch.randn(5, 1, 3, 5, dtype=torch.float64))
        assert torch._C._len_torch_function_stack() == 0
        equal(gradients(model, x, labels), guided)
    assert hooks(model) == before


# Inside real training loops


def test_accumulated_gradients_are_the_sum_of_each_batch_guided_alone() -> None:
    model = narrow_cnn()
    (x1, y1), (x2, y2) = batch(model), batch(model, 3)
    settings = {"factor": 0.7, "scope": "all"}
    first, second = gradients(model, x1, y1, **settings), gradients(model, x2, y2, **settings)
    summed = {name: first[name] + second[name] for name in first}
    with athena.Guidance(model, **settings):
        model.zero_grad()
        F.cross_entropy(model(x1), y1).backward()
        F.cross_entropy(model(x2), y2).backward()
        close({name: p.grad for name, p in model.named_parameters()}, summed)
        model.zero_grad()
        (F.cross_entropy(model(x1), y1) + F.cross_entropy(model(x2), y2)).backward()
        close({name: p.grad for name, p in model.named_parameters()}, summed)


def test_a_graph_kept_for_a_second_backward_pass_is_guided_again() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    once = gradients(model, x, labels, factor=0.7)
    with athena.Guidance(model, factor=0.7):
        model.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward(retain_graph=True)
        loss.backward()
    close({name: p.grad for name, p in model.named_parameters()}, {name: 2 * g for name, g in once.items()})


@pytest.mark.parametrize("every", [1, 2, 3])
def test_of_so_many_forward_passes_the_first_is_guided_and_the_rest_are_plain(every: int) -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    guided, plain = gradients(model, x, labels, factor=0.7), gradients(model, x, labels)
    differ(guided, plain)
    with athena.Guidance(model, factor=0.7, every=every) as guidance:
        for step in range(7):
            model.eval()(x)  # does not count
            model.train().zero_grad()
            F.cross_entropy(model(x), labels).backward()
            equal({name: p.grad for name, p in model.named_parameters()}, plain if step % every else guided)
            assert guidance.step == step + 1


def test_labels_of_a_forward_pass_that_is_left_out_do_not_reach_the_next() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    guidance = athena.Guidance(model, target="label", every=2)
    for _ in range(2):
        guidance.labels = labels
        model(x)
    with pytest.raises(RuntimeError, match=r"guidance\.labels"):
        model(x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-9)], ids=str)
def test_a_penalty_on_guided_gradients_can_be_trained_on(rule: Any) -> None:
    """Relevance is a constant to it; that of all logits does not depend on the last bias, so differences tell."""
    model = narrow_mlp()
    x, labels = batch(model)
    bias = model.get_submodule("linear3").bias

    def penalty(create_graph: bool = False) -> Tensor:
        with athena.Guidance(model, factor=0.7, scope="all", target="logits", rule=rule):
            loss = F.cross_entropy(model(x), labels)
            (gradient,) = torch.autograd.grad(loss, model.get_submodule("linear1").weight, create_graph=create_graph)
        return gradient.square().sum()

    (found,) = torch.autograd.grad(penalty(create_graph=True), bias)
    step = 1e-5 * torch.randn_like(bias)
    with torch.no_grad():
        bias += step
    after = penalty()
    with torch.no_grad():
        bias -= 2 * step
    torch.testing.assert_close((found * step).sum() * 2, after - penalty(), rtol=1e-5, atol=0)


def test_autograd_grad_is_guided_like_backward() -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    expected = gradients(model, x, labels, factor=0.7)
    with athena.Guidance(model, factor=0.7):
        found = torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters()))
    close(dict(zip(expected, found, strict=True)), expected)


@pytest.mark.parametrize("frozen", ["features", "features.conv1", "head.1"])
def test_frozen_layers_get_no_gradient_and_change_no_other(frozen: str) -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    expected = gradients(model, x, labels, factor=0.7, scope="all")
    model.get_submodule(frozen).requires_grad_(False)
    actual = gradients(model, x, labels, factor=0.7, scope="all")
    close(actual, {name: gradient for name, gradient in expected.items() if not name.startswith(frozen)})


def test_training_with_adam_is_reproducible_and_differs_from_plain_training() -> None:
    def trained(**settings: Any) -> Gradients:
        torch.manual_seed(3)
        model = narrow_mlp().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        guidance = athena.Guidance(model, **settings) if settings else None
        for _ in range(5):
            x, labels = batch(model)
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()), labels).backward()
            optimizer.step()
        assert guidance is None or guidance.step == 5 or settings["factor"] == 0
        return {name: p.detach() for name, p in model.named_parameters()}

    plain = trained()
    equal(trained(factor=0.0), plain)
    equal(trained(factor=1.0, scope="all"), trained(factor=1.0, scope="all"))
    differ(trained(factor=1.0), plain)


@every_network
@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-6), Gamma()], ids=str)
def test_bfloat16_autocast_gives_finite_gradients_near_those_of_float32(network: str, rule: Any) -> None:
    model = NETWORKS[network]().float()
    x, labels = batch(model, 16)
    x = x.float()
    settings = {"factor": 0.5, "scope": "all", "rule": rule}
    exact = gradients(model, x, labels, **settings)
    model.zero_grad()
    with athena.Guidance(model, **settings):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
        assert F.cosine_similarity(p.grad.flatten(), exact[name].flatten(), dim=0) > 0.98, name


@every_network
def test_bfloat16_autocast_rounds_a_scaling_below_its_precision_away(network: str) -> None:
    model = NETWORKS[network]().float()
    x, labels = batch(model, 16)
    found: list[Gradients] = []
    for factor in (0.0, 1e-4):
        model.zero_grad()
        with athena.Guidance(model, factor=factor, scope="all"), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), labels)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, guided = found
    assert all(torch.equal(guided[name], plain[name]) for name in plain)


def test_in_float16_an_overflow_of_the_loss_scale_is_the_scalers_to_mend() -> None:
    model = narrow_mlp().float()
    x, labels = batch(model, 16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    athena.Guidance(model, factor=0.5, scope="all", rule=Epsilon(0.01))
    skipped = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x.float()), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        skipped.append(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        scaler.update()
    assert skipped[0] and not skipped[-1]
    assert scaler.get_scale() < 2.0**24


def test_in_float16_a_relevance_that_overflows_is_noticed() -> None:
    model = narrow_mlp().float()
    x, labels = batch(model, 16)
    with torch.no_grad():
        model.linear3.weight.mul_(50.0)  # outputs that can bear a relevance near the largest number of float16

    def near_the_largest(output: Tensor) -> Tensor:
        return torch.full_like(output, 6e4) * torch.tensor([1.0, -1.0, 1.0, -1.0])

    athena.Guidance(model, factor=0.5, scope="all", target=near_the_largest, rule=Zero())
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x.float()), labels)
    with pytest.raises(athena.DivergedError, match="not finite"):
        loss.backward()


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-6), Gamma()], ids=str)
def test_channels_last_gives_the_same_gradients(rule: Any) -> None:
    model = narrow_cnn()
    x, labels = batch(model)
    settings = {"factor": 0.7, "scope": "all", "rule": rule}
    expected = gradients(model, x, labels, **settings)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    close(gradients(model, x, labels, **settings), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_gives_the_same_gradients(tmp_path: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = narrow_cnn()
    x, labels = batch(model)
    expected = gradients(model, x, labels, factor=0.7, scope="all")
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        model.zero_grad()
        with athena.Guidance(model, factor=0.7, scope="all"):
            parallel = DistributedDataParallel(model)
            for _ in range(2):
                parallel.zero_grad()
                F.cross_entropy(parallel(x), labels).backward()
                close({name: p.grad for name, p in model.named_parameters()}, expected)
    finally:
        torch.distributed.destroy_process_group()


# Graphs that are no chains


def held_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


LEFT_BEHIND = {
    "chain": (narrow_cnn, Epsilon(1e-6)),
    "rule with sums": (narrow_cnn, Gamma()),
    "forks": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4)).double(),
        Epsilon(1e-6),
    ),
}
left_behind = pytest.mark.parametrize("case", LEFT_BEHIND)


@left_behind
@pytest.mark.parametrize("backward", [True, False])
def test_no_step_leaves_memory_behind(case: str, backward: bool) -> None:
    """Nothing is kept in a reference cycle, which on a GPU would hold memory until the garbage collector comes."""
    build, rule = LEFT_BEHIND[case]
    model = build()
    x, labels = batch(model)

    def step() -> None:
        loss = F.cross_entropy(model(x), labels)
        if backward:
            loss.backward()
            model.zero_grad()

    with athena.Guidance(model, factor=0.7, scope="all", rule=rule):
        step()
        gc.collect()
        gc.disable()
        try:
            before = held_tensors()
            for _ in range(5):
                step()
            assert held_tensors() == before
        finally:
            gc.enable()


@left_behind
def test_a_loss_that_is_still_there_holds_no_more_than_without_guidance(case: str) -> None:
    """In the usual loop it is, until the next forward pass has ended."""
    build, rule = LEFT_BEHIND[case]
    model = build()
    x, labels = batch(model)

    def held() -> int:
        things = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        memory = {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes() for thing in things}
        return sum(memory.values())

    def held_by_loss() -> int:
        gc.collect()  # what earlier tests have left is not to go in between
        before = held()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        model.zero_grad()
        return held() - before

    plainly = held_by_loss()
    with athena.Guidance(model, factor=0.7, scope="all", rule=rule):
        assert held_by_loss() == plainly


@left_behind
@pytest.mark.parametrize("at", ["forward pass", "relevance pass"])
def test_no_step_that_fails_leaves_memory_behind(case: str, at: str) -> None:
    """Cycles that run through the graph are hidden from the garbage collector, and would stay."""
    build, rule = LEFT_BEHIND[case]
    network = build()
    x, _ = batch(network)

    def fail(output: Tensor) -> Tensor:
        if at == "forward pass":
            raise RuntimeError("out of order")
        return output.exp()

    model = nn.Sequential(network, nn.Linear(4, 3).double(), Forward(fail))

    def step() -> None:
        with pytest.raises((RuntimeError, athena.UnsupportedLayer), match=r"out of order|exp"):
            model(x)
        gc.collect()

    with athena.Guidance(model, factor=0.7, scope="all", rule=rule):
        step()
        before = held_tensors()
        for _ in range(3):
            step()
        assert held_tensors() <= before


class Residual(nn.Module):
    """x + f(x) written as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + F.relu(self.body(h))
        return self.head(h)


def test_a_residual_network_is_guided_as_worked_out_by_hand() -> None:
    model, x, labels = Residual().double(), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    rule, factor = oracles.Rule(1e-6), 0.7
    with torch.no_grad():
        h = model.stem(x).relu()
        branch = model.body(h).relu()
        total = h + branch
        output = model.head(total)
        relevance = oracles.predicted(output)
        of_sum = oracles.linear_relevance(total, model.head.weight, model.head.bias, relevance, rule)
        of_body = oracles.quotient(of_sum * branch, total)
        of_stem = oracles.quotient(of_sum * h, total)
        of_stem = of_stem + oracles.linear_relevance(h, model.body.weight, model.body.bias, of_body, rule)

        at_output = (oracles.softmax(output) - F.one_hot(labels, 3)) / len(x)
        at_sum = at_output @ model.head.weight
        at_body = at_sum * (branch > 0) * (1 + factor * of_body)
        at_stem = (at_sum + at_body @ model.body.weight) * (h > 0) * (1 + factor * of_stem)
        expected = {
            "stem.weight": at_stem.T @ x,
            "stem.bias": at_stem.sum(0),
            "body.weight": at_body.T @ h,
            "body.bias": at_body.sum(0),
            "head.weight": at_output.T @ total,
            "head.bias": at_output.sum(0),
        }
    close(gradients(model, x, labels, factor=factor), expected)


class SeveralMakers(nn.Module):
    """The output is a sum of two linear layers and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head1, self.head2 = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        return self.head1(h) + self.head2(h) + self.shift


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-6), Gamma()], ids=str)
def test_all_layers_that_make_the_output_are_left_alone(rule: Any) -> None:
    model, x, labels = SeveralMakers().double(), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    plain, guided = gradients(model, x, labels), gradients(model, x, labels, factor=0.7, target="logits", rule=rule)
    for name in plain:
        assert torch.equal(guided[name], plain[name]) != name.startswith("body"), name


class Heads(NamedTuple):
    main: Tensor
    side: Tensor


class TwoHeads(nn.Module):
    """Two outputs, as of a network with an auxiliary classifier."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.body, self.main, self.side = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.named = named

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.body(x))
        heads = Heads(self.main(h), self.side(h))
        return heads if self.named else heads._asdict()


@pytest.mark.parametrize("named", [True, False], ids=["named tuple", "dict"])
@pytest.mark.parametrize("both", [True, False])
def test_relevance_starts_from_the_outputs_that_the_target_says(both: bool, named: bool) -> None:
    model, x, labels = TwoHeads(named).double(), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def target(output: Any) -> Any:
        if not named:
            return {"main": output["main"], "side": output["side"] if both else None}
        return output if both else output._replace(side=None)

    with torch.no_grad():
        h = model.body(x).relu()
        starts = [(model.main, model.main(h)), (model.side, model.side(h))]
        relevance = sum(
            oracles.linear_relevance(h, head.weight, head.bias, output, oracles.Rule(1e-6))
            for head, output in starts[: 1 + both]
        )
    with athena.Guidance(model, factor=0.7, target=target):
        output = model(x)
        main, side = output if named else output.values()
        z = torch.stack([main, side])
        z.retain_grad()
        sum(F.cross_entropy(part, labels) for part in z).backward()
    assert z.grad is not None
    at_h = z.grad[0] @ model.main.weight + z.grad[1] @ model.side.weight
    at_body = at_h * (h > 0) * (1 + 0.7 * relevance)
    expected = {"body.weight": at_body.T @ x, "main.weight": z.grad[0].T @ h, "side.weight": z.grad[1].T @ h}
    close({name: model.get_parameter(name).grad for name in expected}, expected)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (None, ["a Heads of a torch.float32 tensor of shape (4, 3), a torch", "target as a function"]),
        ("logits", ["a Heads of", "target as a function"]),
        (lambda output: output.main, ["shape (4, 3)", "structure"]),
        (lambda output: Heads(None, None), ["None for all", "nowhere to start"]),
    ],
    ids=["predicted", "logits", "one tensor", "none"],
)
def test_a_target_that_does_not_fit_several_outputs_is_refused(target: Any, named: list[str]) -> None:
    model = TwoHeads(True)
    with athena.Guidance(model, target=target), pytest.raises((TypeError, ValueError)) as raised:
        model(torch.randn(4, 6))
    assert all(word in str(raised.value) for word in named), raised.value


def test_a_layer_used_twice_is_guided_at_both_places() -> None:
    layer = nn.Linear(6, 6)
    twice = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3)).double()
    unrolled = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    for index in (0, 2):
        unrolled[index].load_state_dict(layer.state_dict())
    unrolled[4].load_state_dict(twice[4].state_dict())
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    apart = gradients(unrolled, x, labels, factor=0.7)
    expected = {
        f"{place}.{kind}": apart[f"{place}.{kind}"] + (apart[f"2.{kind}"] if place == 0 else 0)
        for place in (0, 4)
        for kind in ("weight", "bias")
    }
    close(gradients(twice, x, labels, factor=0.7), expected)


def chain_of(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    """Two linear layers, 6 to 5 to 4, with something between, in float64."""
    return nn.Sequential(nn.Linear(6, 5, bias), *between, nn.Linear(5, 4, bias)).double()


@pytest.mark.parametrize("scope", ["convolutional", ["2"]], ids=str)
def test_a_scope_that_guides_no_layer_of_a_chain_is_refused(scope: Any) -> None:
    model = chain_of(nn.ReLU())
    x = torch.randn(7, 6, dtype=torch.float64)
    with athena.Guidance(model, 0.7, scope=scope), pytest.raises(athena.UnsupportedLayer, match="guides no layer"):
        model(x)


def test_a_forward_pass_by_the_graph_that_fails_leaves_the_next_one_in_order() -> None:
    model = chain_of(nn.ReLU())
    x, labels = torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,))
    expected = gradients(model, x, labels, factor=0.7)
    with athena.Guidance(model, 0.7) as guidance:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x[:, :5])
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
    assert guidance.step == 1
    equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


class Forward(nn.Module):
    """A model from a function and the layers it calls."""

    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def with_sine() -> nn.Sequential:
    features = nn.Sequential(nn.Conv2d(2, 3, 3), Sine(), nn.Flatten())
    head = nn.Sequential(nn.Linear(108, 6), nn.ReLU(), nn.Linear(6, 4))
    return nn.Sequential(OrderedDict(features=features, head=head)).double()


@pytest.mark.parametrize("scope", ["linear", ["head.0"]])
def test_what_lrp_cannot_pass_does_not_matter_below_the_lowest_guided_layer(scope: Any) -> None:
    model = with_sine()
    x, labels = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1])
    actual = gradients(model, x, labels, factor=0.7, scope=scope)
    expected = oracles.algorithm_1(model.head, model.features(x).detach(), labels, {"0": 0.7})
    close({name: actual[f"head.{name}"] for name in expected}, expected)


@pytest.mark.parametrize("scope", ["all", "convolutional", ["features.0"]])
def test_what_lrp_cannot_pass_above_a_guided_layer_is_refused_by_module_path(scope: Any) -> None:
    model = with_sine()
    x, labels = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1])
    before = hooks(model)
    with athena.Guidance(model, factor=0.7, scope=scope):
        with pytest.raises(athena.UnsupportedLayer, match=r"features\.1"):
            F.cross_entropy(model(x), labels).backward()
        assert torch._C._len_torch_function_stack() == 0
    assert hooks(model) == before


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    with pytest.warns(UserWarning, match="not pickled with its model"):
        torch.save(model, file)
    file.seek(0)
    restored: nn.Module = torch.load(file, weights_only=False)
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_guided_model_trains_plainly_and_can_be_guided(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = narrow_mlp()
    x, labels = batch(model)
    plain = gradients(model, x, labels)
    with athena.Guidance(model, factor=0.7, scope="all"):
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        guided = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        again = copied(model)
        equal(gradients(again, x, labels), plain)
        equal(gradients(again, x, labels, factor=0.7, scope="all"), guided)


# Errors


@pytest.mark.parametrize("path", ["", "head"])
def test_a_model_that_is_guided_already_is_refused_until_that_is_removed(path: str) -> None:
    """As where a notebook's cell is run again."""
    model = narrow_cnn()
    first = athena.Guidance(model.get_submodule(path))
    before = hooks(model)
    with pytest.raises(RuntimeError, match=f"{path}.*guided already.*remove"):
        athena.Guidance(model)
    assert hooks(model) == before
    first.remove()
    athena.Guidance(model).remove()


def test_replicas_of_data_parallel_are_refused() -> None:
    model = narrow_mlp()
    athena.Guidance(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(athena.UnsupportedLayer, match=r"nn\.DataParallel.*DistributedDataParallel"):
        replica(batch(model)[0])


@pytest.mark.parametrize("scope", ["linear", ["linear1"]])
@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["weight norm", "its older form", "pruning"],
)
def test_a_layer_whose_weight_is_computed_is_guided_as_one_that_has_it(
    computed: Callable[[nn.Module], nn.Module], scope: str | list[str]
) -> None:
    model = narrow_mlp()
    computed(model.linear1)
    x, labels = batch(model)
    found = gradients(model, x, labels, scope=scope, factor=3.0)
    plain = narrow_mlp()
    with torch.no_grad():
        for name in ("linear1", "linear2", "linear3"):
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
            plain.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
    expected = gradients(plain, x, labels, scope=scope, factor=3.0)
    model.linear1(x.flatten(1))  # computes the weight once more
    sources = {name: p for name, p in model.named_parameters() if name.startswith("linear1.") and "bias" not in name}
    below = torch.autograd.grad(model.linear1.weight, list(sources.values()), expected.pop("linear1.weight"))
    torch.testing.assert_close(found, expected | dict(zip(sources, below, strict=True)), rtol=1e-10, atol=1e-14)


class Checkpointed(nn.Module):
    """A network that runs its middle part under `torch.utils.checkpoint`."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.middle = nn.Sequential(nn.GELU(), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        keeps = self.reentrant is None
        z = self.middle(z) if keeps else checkpoint(self.middle, z, use_reentrant=self.reentrant)
        return self.head(z)


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-3), Gamma(0.25)])
def test_what_is_computed_again_for_the_backward_pass_is_guided_and_explained_alike(rule: Rule) -> None:
    model = Checkpointed(None).double()
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    kept = gradients(model, x, labels, scope="all", rule=rule), athena.lrp(model, x, rule=rule).input
    model.reentrant = False
    again = gradients(model, x, labels, scope="all", rule=rule), athena.lrp(model, x, rule=rule).input
    torch.testing.assert_close(again, kept, rtol=1e-12, atol=0)


def test_a_layer_that_would_run_unguided_under_a_reentrant_checkpoint_is_refused_by_its_path() -> None:
    model = Checkpointed(True).double()
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    with pytest.raises(athena.UnsupportedLayer, match=r"'middle\.1'.*use_reentrant=True.*use_reentrant=False"):
        gradients(model, x, labels, scope="all")


def test_layers_under_no_grad_are_not_trained_and_so_not_guided() -> None:
    backbone, head = nn.Linear(6, 5).double(), nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)).double()

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = self.backbone(x)
            return self.head(z)

    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    found = gradients(Frozen(), x, labels, scope="all")
    expected = gradients(head, backbone(x).detach(), labels, scope="all")
    torch.testing.assert_close(found, {f"head.{name}": gradient for name, gradient in expected.items()})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scope": "lines"}, ["lines", "linear", "convolutional", "all"]),
        ({"scope": ["linear1", "linear9"]}, ["linear9", "linear2"]),
        ({"factor": {"linear9": 1.0}}, ["linear9", "linear2"]),
        ({"factor": "big"}, ["big", "'learn'"]),
        ({"factor": {"linear1": "big"}}, ["big"]),
        ({"factor": float("nan")}, ["nan"]),
        ({"normalise": "l2"}, ["l2", "max", "rms"]),
        ({"granularity": "pixel"}, ["pixel", "sample", "neuron", "filter"]),
        ({"on_divergence": "ignore"}, ["ignore", "raise", "record"]),
        ({"every": 0}, ["every=0", "at least 1"]),
        ({"every": 1.5}, ["every=1.5", "whole"]),
        ({"rule": "epsilon"}, ["epsilon"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_refused_with_its_value_and_what_there_is(settings: Any, named: list[str]) -> None:
    model = narrow_mlp()
    before = hooks(model)
    with pytest.raises((ValueError, TypeError)) as raised:
        athena.Guidance(model, **settings)
    assert all(word in str(raised.value) for word in named), raised.value
    assert hooks(model) == before


def test_an_unknown_target_is_refused_before_the_first_step_is_over() -> None:
    model = narrow_mlp()
    with pytest.raises(ValueError, match="probability"):
        gradients(model, *batch(model), factor=0.1, target="probability")


# Divergence


def loss_of(model: nn.Module, scale: float = 1.0) -> Tensor:
    x, labels = batch(model)
    return scale * F.cross_entropy(model(x.float()), labels)


@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_divergence_is_raised_with_its_step_and_layer(layer: str) -> None:
    model = narrow_mlp().float()
    factors = {"linear1": 0.1, "linear2": 0.1} | {layer: 1e30}
    with athena.Guidance(model, factor=factors, target="logits"):
        loss_of(model).backward()
        loss_of(model).backward()
        loss = loss_of(model, 1e30)
        with pytest.raises(athena.DivergedError, match=layer) as raised:
            loss.backward()
        assert (raised.value.step, raised.value.layer) == (3, layer)
        loss_of(model).backward()


def test_divergence_can_be_recorded_and_the_first_one_stays() -> None:
    model = narrow_mlp().float()
    factors = {"linear1": 0.1, "linear2": 1e30}
    with athena.Guidance(model, factor=factors, target="logits", on_divergence="record") as guidance:
        loss_of(model).backward()
        assert guidance.diverged is None
        loss_of(model, 1e30).backward()
        loss_of(model, 1e30).backward()
    assert guidance.diverged is not None
    assert (guidance.diverged.step, guidance.diverged.layer) == (2, "linear2")


class WithUnusedBranch(nn.Module):
    """A layer whose output goes nowhere, as when an auxiliary head is not asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        self.unused(h)
        return self.head(h)


def test_divergence_is_seen_although_another_layer_goes_unused() -> None:
    model, x, labels = WithUnusedBranch(), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    athena.Guidance(model, factor=1e30, target="logits")
    with pytest.raises(athena.DivergedError, match="body"):
        (1e30 * F.cross_entropy(model(x), labels)).backward()


# The benchmark's rival
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_guidance", BENCHMARKS / "guidance.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["benchmark_guidance"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("scope", ["all", "linear"])
@every_network
def test_the_benchmarks_literal_implementation_follows_algorithm_1(network: str, scope: str, epsilon: float) -> None:
    nested = NETWORKS[network]()
    model = nn.Sequential(OrderedDict((path.replace(".", "_"), layer) for path, layer in oracles.chain(nested)))
    x, labels = batch(nested)
    literal = benchmark().Literal(model, scope, factor=0.7, epsilon=epsilon)
    F.cross_entropy(literal(x), labels).backward()
    factors = dict.fromkeys(affine(model, scope), 0.7)
    expected = oracles.algorithm_1(model, x, labels, factors, oracles.predicted, oracles.Rule(epsilon))
    close({name: p.grad for name, p in model.named_parameters()}, expected)
