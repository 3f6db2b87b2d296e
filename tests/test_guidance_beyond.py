"""Claims about what thesis 8.3 proposes: learned factors (8.3.1) and filters' own relevance (8.3.2), in float64."""

import functools
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import athena

Gradients = dict[str, Tensor]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)
    ).double()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1, groups=2),
            nn.ReLU(),
        ),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)),
    ).double()


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"mlp": mlp, "cnn": cnn}
every_network = pytest.mark.parametrize("network", NETWORKS)
every_size = pytest.mark.parametrize("normalise", [None, "max", "rms"])


def batch(model: nn.Sequential, size: int = 5) -> tuple[Tensor, Tensor]:
    shape = (1, 3, 4) if isinstance(model[0], nn.Flatten) else (2, 8, 8)
    return torch.randn(size, *shape, dtype=torch.float64), torch.randint(4, (size,))


def guidable(model: nn.Sequential) -> list[str]:
    return [path for path, layer in model.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][:-1]


def gradients(model: nn.Module, x: Tensor, labels: Tensor, **settings: Any) -> Gradients:
    model.zero_grad()
    with athena.Guidance(model, **settings):
        F.cross_entropy(model(x), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sizes(relevance: Tensor, normalise: str | None) -> list[float]:
    """What the relevance of each sample is divided by."""
    if normalise is None:
        return [1.0] * len(relevance)
    if normalise == "max":
        return [float(sample.abs().max()) for sample in relevance]
    return [float(sample.square().mean().sqrt()) for sample in relevance]


def normalised(relevance: Tensor, normalise: str | None) -> Tensor:
    return torch.stack([r / size for r, size in zip(relevance, sizes(relevance, normalise), strict=True)])


def by_filter(
    model: nn.Sequential, x: Tensor, labels: Tensor, factors: dict[str, float], normalise: str | None = None
) -> Gradients:
    """Plain gradients, of which those of each filter's weights are multiplied by 1 + factor * its relevance."""
    found = oracles.algorithm_1(model, x, labels, {})
    relevance = oracles.lrp(model, x, oracles.predicted, oracles.DEFAULT).layers
    for path, factor in factors.items():
        each = torch.stack([torch.stack([channel.sum() for channel in sample]) for sample in relevance[path]])
        for k, of_filter in enumerate(normalised(each, normalise).mean(0)):
            found[f"{path}.weight"][k] *= 1 + factor * of_filter
    return found


# Filters


@every_size
@every_network
def test_the_gradient_of_a_filter_is_scaled_by_its_own_relevance_and_no_other_gradient(
    network: str, normalise: str | None
) -> None:
    model = NETWORKS[network]()
    x, labels = batch(model)
    factors = dict.fromkeys(guidable(model), 0.7)
    expected = by_filter(model, x, labels, factors, normalise)
    found = gradients(model, x, labels, factor=0.7, scope="all", granularity="filter", normalise=normalise)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    plain = gradients(model, x, labels, factor=0.0)
    for name, gradient in plain.items():
        scaled = name.removesuffix(".weight") in factors
        assert torch.allclose(found[name], gradient) != scaled, name


def test_the_relevance_of_filters_is_that_of_their_weights_where_bias_and_stabiliser_keep_none() -> None:
    model = cnn()
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.zeros_(layer.bias)
    x, labels = batch(model)
    relevance = athena.lrp(model, x, rule=athena.rules.Zero()).parameters["0.weight"]
    scale = 1 + 0.7 * relevance.flatten(1).sum(1) / len(x)
    plain = gradients(model, x, labels, factor=0.0)["0.weight"]
    found = gradients(model, x, labels, factor=0.7, scope=["0"], granularity="filter", rule=athena.rules.Zero())[
        "0.weight"
    ]
    torch.testing.assert_close(found, plain * scale.view(-1, 1, 1, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_filters_of_a_transposed_convolution_are_told_apart(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    x, labels = torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    of_filters = athena.lrp(model, x).layers["0"].sum((0, 2, 3)) / 3
    plain = gradients(model, x, labels, factor=0.0)["0.weight"]
    found = gradients(model, x, labels, factor=0.7, scope=["0"], granularity="filter")["0.weight"]
    for group in range(groups):
        inputs, outputs = 4 // groups, 6 // groups
        for j in range(outputs):
            rows = slice(group * inputs, (group + 1) * inputs)
            scale = 1 + 0.7 * of_filters[group * outputs + j]
            torch.testing.assert_close(found[rows, j], plain[rows, j] * scale, rtol=1e-9, atol=1e-12)


def test_the_neurons_of_a_layer_on_tokens_have_one_relevance_over_all_tokens() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4)).double()
    x, labels = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 2])
    of_neurons = athena.lrp(model, x).layers["0"].sum((0, 1)) / 4
    plain = gradients(model, x, labels, factor=0.0)["0.weight"]
    found = gradients(model, x, labels, factor=0.7, granularity="filter")["0.weight"]
    torch.testing.assert_close(found, plain * (1 + 0.7 * of_neurons).unsqueeze(1), rtol=1e-9, atol=1e-12)


def test_a_signal_can_stand_in_the_place_of_the_relevance_of_filters() -> None:
    model = cnn()
    x, labels = batch(model)
    settings = {"factor": 0.7, "scope": "all", "granularity": "filter", "normalise": "max"}
    expected = gradients(model, x, labels, **settings)
    found = gradients(model, x, labels, **settings, signal=lambda relevance, gradient, output: relevance)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_filters_change_no_other_gradient() -> None:
    model = mlp()
    x, labels = batch(model)
    expected = by_filter(model, x, labels, {"3": 0.7})
    model[1].requires_grad_(False)
    found = gradients(model, x, labels, factor=0.7, granularity="filter")
    torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=1e-9, atol=1e-12)


def test_a_filters_gradient_that_is_no_longer_finite_is_noticed() -> None:
    model = mlp().float()
    x, labels = batch(model)
    with (
        athena.Guidance(model, factor={"1": 0.1, "3": 1e30}, granularity="filter", target="logits"),
        pytest.raises(athena.DivergedError, match="'3'"),
    ):
        (1e30 * F.cross_entropy(model(x.float()), labels)).backward()


def test_filter_gradients_are_accumulated_and_leave_nothing_behind() -> None:
    model = cnn()
    (x1, y1), (x2, y2) = batch(model), batch(model, 3)
    settings = {"factor": 0.7, "scope": "all", "granularity": "filter"}
    first, second = gradients(model, x1, y1, **settings), gradients(model, x2, y2, **settings)
    model.zero_grad()
    with athena.Guidance(model, **settings):
        (F.cross_entropy(model(x1), y1) + F.cross_entropy(model(x2), y2)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name], rtol=1e-9, atol=1e-12)


class WeightFirst(nn.Module):
    """Multiplies with its weight from the left, so that samples stand in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.weight @ x.T).relu().T)  # type: ignore[no-any-return]


def test_a_weight_without_filters_to_tell_apart_is_refused_by_its_path() -> None:
    with (
        athena.Guidance(WeightFirst(), granularity="filter") as guidance,
        pytest.raises(athena.UnsupportedLayer, match=r"'weight'.*granularity='sample'"),
    ):
        guidance.model(torch.randn(4, 6))


# Learned factors


def held_out_loss(model: nn.Module, weights: Gradients, x: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(torch.func.functional_call(model, weights, (x,)), labels))


def slopes(
    model: nn.Sequential, train: Any, held_out: Any, factors: dict[str, float], guided: Callable[..., Gradients]
) -> Tensor:
    """How fast held-out loss falls with each factor, in a step of SGD of a fixed length; by central differences."""
    length, h = 1e-4, 1e-2
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def slope(changed: dict[str, float]) -> float:
        step = guided(model, *train, changed)
        size = sum(float(part.square().sum()) for part in step.values()) ** 0.5
        there, back = (
            held_out_loss(model, {name: weights[name] - way * step[name] / size for name in weights}, *held_out)
            for way in (length, -length)
        )
        return (back - there) / (2 * length)

    five_points = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    return torch.tensor(
        [
            sum(weight * slope(factors | {path: f + place * h}) for place, weight in five_points.items()) / h
            for path, f in factors.items()
        ],
        dtype=torch.float64,
    )


VARIANTS: dict[str, tuple[dict[str, Any], Callable[..., Gradients]]] = {
    "sample": ({}, oracles.algorithm_1),
    "sample, max": (
        {"normalise": "max"},
        functools.partial(oracles.algorithm_1, adjusted=lambda r: normalised(r, "max")),
    ),
    "filter": ({"granularity": "filter"}, by_filter),
}


@pytest.mark.parametrize(
    ("network", "variant"), [*(("mlp", variant) for variant in VARIANTS), ("cnn", "sample"), ("cnn", "filter")]
)
def test_factors_move_to_where_a_step_of_sgd_lowers_held_out_loss_most(network: str, variant: str) -> None:
    settings, naive = VARIANTS[variant]
    model = NETWORKS[network]()
    with athena.Guidance(model, factor="learn", scope="all", **settings) as guidance:
        for bound in (0.15, 0.4):  # from 0, and from where that has led
            train, held_out = batch(model, 3), batch(model, 4)
            loss = F.cross_entropy(model(train[0]), train[1])
            before = dict.fromkeys(reversed(guidable(model)), 0.0) | guidance.learned
            guidance.learn(loss, lambda held_out=held_out: F.cross_entropy(model(held_out[0]), held_out[1]), 0.2, bound)
            u = slopes(model, train, held_out, before, naive)
            moved = torch.tensor(list(before.values()), dtype=torch.float64) + 0.2 * u / u.norm()
            expected = dict(zip(before, moved.clamp(-bound, bound).tolist(), strict=True))
            assert guidance.learned == pytest.approx(expected, abs=1e-5)
            assert any(guidance.learned.values())
            model.zero_grad()
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters()}
            torch.testing.assert_close(found, naive(model, *train, guidance.learned), rtol=1e-9, atol=1e-12)


def test_factors_to_be_learned_start_with_plain_training() -> None:
    model = cnn()
    x, labels = batch(model)
    plain = gradients(model, x, labels, factor=0.0)
    with pytest.warns(UserWarning, match=r"all factors are still 0.*guidance\.learn"):
        found = gradients(model, x, labels, factor="learn", scope="all")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


class Mixed(nn.Module):
    """A network with dropout and a norm of which one part stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(9), nn.BatchNorm1d(9).eval()
        self.below, self.middle, self.head = nn.Linear(12, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.norm.training, self.frozen.training))
        z = F.dropout(F.gelu(self.norm(self.below(x))), 0.5, self.training)
        return self.head(F.gelu(self.frozen(self.middle(z))))  # type: ignore[no-any-return]


def test_held_out_data_are_looked_at_in_eval_mode_and_change_nothing_but_the_factors() -> None:
    model, x, labels = Mixed(), torch.randn(6, 12), torch.randint(4, (6,))
    with athena.Guidance(model, factor="learn") as guidance:
        loss = F.cross_entropy(model(x), labels)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        drawn = torch.get_rng_state()
        guidance.learn(loss, lambda: F.cross_entropy(model(x), labels))
        assert model.modes == [(True, False), (False, False)]
        assert model.training and model.norm.training and not model.frozen.training
        assert guidance.step == 1
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert guidance.learned.keys() == {"below", "middle"}
        assert sum(factor**2 for factor in guidance.learned.values()) == pytest.approx(0.01**2)


def test_where_only_some_steps_are_guided_factors_are_learned_in_these() -> None:
    model = mlp()
    x, labels = batch(model)
    with athena.Guidance(model, factor="learn", every=2) as guidance:
        seen = []
        for _ in range(4):
            loss = F.cross_entropy(model(x), labels)
            guidance.learn(loss, lambda: F.cross_entropy(model(x), labels))
            seen.append(tuple(guidance.learned.values()))
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_learned_factors_can_be_kept_as_they_are() -> None:
    model = cnn()
    x, labels = batch(model)
    with athena.Guidance(model, factor="learn", scope="all") as guidance:
        loss = F.cross_entropy(model(x), labels)
        guidance.learn(loss, lambda: F.cross_entropy(model(x.flip(0)), labels))
        learned = guidance.learned
        guidance.factor = learned
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, oracles.algorithm_1(model, x, labels, learned), rtol=1e-9, atol=1e-12)


def test_what_cannot_be_learned_from_is_refused() -> None:
    model = mlp()
    x, labels = batch(model)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), labels)

    with athena.Guidance(model, factor=0.5) as guidance, pytest.raises(ValueError, match=r"factor=0\.5.*'learn'"):
        guidance.learn(loss(), loss)
    guidance = athena.Guidance(model, factor="learn")
    with pytest.raises(ValueError, match="last forward pass in training mode"):
        guidance.learn(F.cross_entropy(model.eval()(x), labels), loss)


# Parts that are computed again for the backward pass


class Selective(nn.Module):
    """A network that keeps only some of the results of its middle part for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5), nn.GELU())
        self.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        def policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            keeps = operation == torch.ops.aten.addmm.default
            return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        z = checkpoint(self.middle, self.stem(x).relu(), use_reentrant=False, context_fn=contexts)
        return self.head(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scope", ["linear", ["stem"]])
def test_a_layer_at_or_above_which_a_selective_checkpoint_lies_is_refused_by_a_path(scope: Any) -> None:
    model, x, labels = Selective(), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    with (
        athena.Guidance(model, factor=1.0, scope=scope),
        pytest.raises(athena.UnsupportedLayer, match=r"'middle\.0'.*selective checkpoint.*context_fn"),
    ):
        F.cross_entropy(model(x), labels).backward()


def test_layers_above_a_selective_checkpoint_are_guided_as_without_it() -> None:
    model, x, labels = Selective(), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    found = gradients(model, x, labels, factor=1.0, scope=["head.0"])
    whole = nn.Sequential(model.stem, nn.ReLU(), model.middle, model.head)
    expected = gradients(whole, x, labels, factor=1.0, scope=["3.0"])
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
