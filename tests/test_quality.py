"""Claims about the measures of heat maps: by cases worked out by hand, by what must not change them, by errors."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena import quality
from athena.evaluation.randomisation import _likeness

MAPS = (3, 2, 4, 5)
WHAT = ["mass", "rank", "pointing"]


def maps(seed: int = 0, shape: tuple[int, ...] = MAPS) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(seed: int = 0, share: float = 0.4) -> Tensor:
    drawn = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed)) < share
    drawn[:, 1, 1] = True
    return drawn


def one(rows: list[list[float]]) -> Tensor:
    """One map of one channel."""
    return torch.tensor(rows)[None, None]


def scores(relevance: Tensor, mask: list[list[int]]) -> dict[str, float]:
    return quality.localisation(relevance, torch.tensor(mask, dtype=torch.bool)[None]).iloc[0].to_dict()


# Localisation


def test_localisation_by_hand() -> None:
    relevance = one([[5.0, 1.0, 0.0], [2.0, -9.0, 2.0]])
    mask = [[0, 1, 0], [1, 1, 0]]
    # the three most relevant pixels are 5 and both twos, of which one lies on the object
    expected = {"mass": 3 / 10, "rank": 1 / 3, "pointing": 0.0, "chance": 3 / 6}
    assert scores(relevance, mask) == pytest.approx(expected)


def test_channels_are_summed_before_the_negative_part_is_left_out() -> None:
    relevance = torch.tensor([[[[3.0, 2.0]], [[-4.0, 1.0]]]])
    assert scores(relevance, [[1, 0]])["mass"] == 0
    assert scores(relevance, [[0, 1]]) == pytest.approx({"mass": 1, "rank": 1, "pointing": 1, "chance": 0.5})


def test_a_map_on_the_object_alone_scores_one_and_one_beside_it_scores_none() -> None:
    mask = masks()
    on, beside = mask[:, None].double(), (~mask)[:, None].double()
    assert (quality.localisation(on, mask)[WHAT] == 1).all(axis=None)
    beside_it = quality.localisation(beside, mask)
    assert (beside_it[["mass", "pointing"]] == 0).all(axis=None)


def test_a_map_without_differences_gets_the_chance_level() -> None:
    table = quality.localisation(torch.full(MAPS, 0.3), masks())
    for column in WHAT:
        np.testing.assert_allclose(table[column], table["chance"])


def test_ties_count_as_the_mean_over_all_orders() -> None:
    relevance, mask = one([[2.0, 1.0, 1.0, 1.0, 0.0, 0.0]]), [[1, 1, 1, 0, 0, 0]]
    # 2 is in; of the three ones two more are taken, and two of the three lie on the object
    assert scores(relevance, mask)["rank"] == pytest.approx((1 + 2 * 2 / 3) / 3)
    assert scores(one([[4.0, 4.0, 4.0, 0.0]]), [[1, 0, 0, 0]])["pointing"] == pytest.approx(1 / 3)


def test_a_map_without_positive_relevance_has_no_mass_to_share() -> None:
    found = scores(one([[-1.0, -2.0, 0.0]]), [[1, 0, 0]])
    assert np.isnan(found["mass"])
    assert found["rank"] == found["pointing"] == found["chance"]


def test_random_maps_score_the_chance_level() -> None:
    noise = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(400, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 1:7] = True
    means = quality.localisation(noise, mask).mean()
    assert means["chance"] == pytest.approx(18 / 64)
    for column, tolerance in (("mass", 0.01), ("rank", 0.02), ("pointing", 0.08)):
        assert means[column] == pytest.approx(18 / 64, abs=tolerance)


@given(seed=st.integers(0, 2**32), factor=st.floats(1e-3, 1e3))
def test_localisation_stays_in_its_range_whatever_the_scale_and_the_order_of_the_batch(
    seed: int, factor: float
) -> None:
    relevance, mask = maps(seed), masks(seed)
    table = quality.localisation(relevance, mask)
    assert table.min(axis=None) >= 0
    assert table.max(axis=None) <= 1 + 1e-12
    np.testing.assert_allclose(quality.localisation(factor * relevance, mask), table)
    np.testing.assert_allclose(quality.localisation(relevance.flip(0), mask.flip(0)), table[::-1])
    turned = quality.localisation(relevance.transpose(2, 3), mask.transpose(1, 2))
    np.testing.assert_allclose(turned, table)


@given(seed=st.integers(0, 2**32))
def test_rank_and_pointing_depend_on_the_order_of_pixels_alone(seed: int) -> None:
    relevance, mask = maps(seed, (3, 1, 4, 5)).abs(), masks(seed)
    columns = ["rank", "pointing"]
    cubed = quality.localisation(relevance**3, mask)[columns]
    np.testing.assert_allclose(cubed, quality.localisation(relevance, mask)[columns])


def test_the_digits_of_mnistm5k_are_masks_that_localisation_takes() -> None:
    data = athena.data.load("mnistm5k")
    assert data.test_masks is not None
    table = quality.localisation(data.test_masks[:, None].float(), data.test_masks)
    assert len(table) == 1000
    assert (table[WHAT] == 1).all(axis=None)


@pytest.mark.parametrize(
    "relevance, mask, error, message",
    [
        (maps()[0], masks(), TypeError, r"relevance is .* \(2, 4, 5\)"),
        (maps().long(), masks(), TypeError, "torch.int64"),
        (maps(), masks()[:, None], ValueError, r"mask is .* \(3, 1, 4, 5\); .* \(3, 4, 5\)"),
        (maps(), masks().float(), ValueError, "torch.float32"),
        (maps(), masks() & (torch.arange(3) != 1)[:, None, None], ValueError, "mask 1 of the batch is empty"),
        (maps().index_fill(0, torch.tensor(2), torch.nan), masks(), ValueError, "not finite for image 2"),
    ],
)
def test_localisation_says_what_it_cannot_score(relevance: Any, mask: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quality.localisation(relevance, mask)


# Pixel flipping


class Weighted(nn.Module):
    """Two classes: the logit of the first is a weighted sum of the pixels, that of the second is 0."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        logit = (x * self.weights).flatten(1).sum(1)
        return torch.stack([logit, torch.zeros_like(logit)], 1)


def sigmoid(value: float) -> float:
    return 1 / (1 + np.exp(-value))


def test_pixel_flipping_by_hand() -> None:
    model = Weighted(torch.tensor([[4.0, 1.0], [2.0, -3.0]]))
    x = torch.ones(1, 1, 2, 2)
    flipped = quality.pixel_flipping(model, x, 0, {"weights": model.weights.detach()[None, None]}, steps=4)
    assert flipped.curves.index.tolist() == [0, 0.25, 0.5, 0.75, 1]
    expected = [sigmoid(logit) for logit in (4, 0, -2, -3, 0)]
    np.testing.assert_allclose(flipped.curves["weights"], expected, rtol=1e-6)
    area = 0.25 * (sum(expected) - (expected[0] + expected[-1]) / 2)
    np.testing.assert_allclose(flipped.areas["weights"], [area], rtol=1e-6)


def test_a_pixel_goes_with_all_its_channels() -> None:
    model = Weighted(torch.tensor([[[1.0, 0.0]], [[2.0, 5.0]]]))  # channel by channel: 1 0 | 2 5
    x = torch.ones(1, 2, 1, 2)
    relevance = torch.tensor([[[[9.0, 0.0]], [[-1.0, 0.0]]]])  # 8 for the left pixel
    curve = quality.pixel_flipping(model, x, 0, {"left": relevance}, steps=2).curves["left"]
    np.testing.assert_allclose(curve, [sigmoid(8), sigmoid(5), sigmoid(0)], rtol=1e-6)


def test_the_baseline_takes_the_place_of_pixels() -> None:
    model = Weighted(torch.tensor([[1.0, 2.0]]))
    x = torch.tensor([[[[0.25, 0.75]]]])
    relevance = {"map": one([[1.0, 0.0]])}

    def last(baseline: float | Tensor) -> float:
        return quality.pixel_flipping(model, x, 0, relevance, steps=2, baseline=baseline).curves["map"].iloc[-1]

    assert last(0.0) == pytest.approx(sigmoid(0))
    assert last(1 - x) == pytest.approx(sigmoid(0.75 + 2 * 0.25))
    assert last(x.mean((2, 3), keepdim=True)) == pytest.approx(sigmoid(3 * 0.5))
    assert quality.pixel_flipping(model, x, 0, relevance, steps=2, baseline=x).curves["map"].nunique() == 1


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = {
        "conv1": nn.Conv2d(2, 6, 3, padding=1),
        "norm": nn.BatchNorm2d(6),
        "relu1": nn.ReLU(),
        "flatten": nn.Flatten(),
        "drop": nn.Dropout(0.5),
        "linear1": nn.Linear(6 * 8 * 8, 16),
        "relu2": nn.ReLU(),
        "linear2": nn.Linear(16, 3),
    }
    return nn.Sequential(OrderedDict(layers))


def pictures() -> Tensor:
    return torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]


def relevance(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return athena.lrp(model, x, target).input


def test_flipping_is_the_models_own_probability_at_both_ends() -> None:
    model, x = small().eval(), pictures()
    chosen = model(x).argmax(1)
    flipped = quality.pixel_flipping(model, x, None, {"lrp": relevance(model, x, chosen)}, steps=7)
    for place, images in ((0, x), (-1, torch.zeros_like(x))):
        probability = model(images).softmax(1).gather(1, chosen[:, None]).mean().item()
        np.testing.assert_allclose(flipped.curves.iloc[place], probability, rtol=1e-6)
    assert flipped.curves.columns.tolist() == flipped.areas.columns.tolist() == ["lrp", "random"]
    assert flipped.areas.index.tolist() == [0, 1, 2, 3]


def test_areas_average_to_the_area_under_the_mean_curve() -> None:
    model, x = small(), pictures()
    flipped = quality.pixel_flipping(model, x, 1, {"map": torch.randn_like(x)}, steps=5)
    under = np.trapezoid(flipped.curves["map"], flipped.curves.index)
    assert flipped.areas["map"].mean() == pytest.approx(under)


def test_a_map_without_differences_is_the_random_order() -> None:
    flipped = quality.pixel_flipping(small(), pictures(), 1, {"flat": torch.zeros(4, 1, 8, 8)}, steps=8)
    np.testing.assert_array_equal(flipped.curves["flat"], flipped.curves["random"])


@given(seed=st.integers(0, 2**32))
def test_on_a_weighted_sum_no_order_has_less_area_than_the_true_one(seed: int) -> None:
    model = Weighted(maps(seed, (3, 4)))
    x = torch.ones(2, 1, 3, 4, dtype=torch.float64)
    true = model.weights.detach().expand_as(x)
    areas = quality.pixel_flipping(model, x, 0, {"true": true, "false": -true, "triple": 3 * true}, steps=12).areas
    assert (areas["true"] <= areas["random"] + 1e-12).all()
    assert (areas["random"] <= areas["false"] + 1e-12).all()
    assert (areas["true"] == areas["triple"]).all()


def test_flipping_twice_gives_the_same_numbers_and_another_seed_another_control() -> None:
    model, x = small(), pictures()
    given = {"map": torch.randn_like(x)}
    first, again = (quality.pixel_flipping(model, x, 1, given, steps=8).curves for _ in range(2))
    other = quality.pixel_flipping(model, x, 1, given, steps=8, seed=1).curves
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first["map"], other["map"])
    assert (first["random"] != other["random"]).any()


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"steps": 0}, ValueError, "steps is 0; .* 1 to 64"),
        ({"steps": 65}, ValueError, "steps is 65; .* 8 by 8"),
        ({"target": 3}, ValueError, "classes 3 to 3; the model has 0 to 2"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, "classes -1 to 2"),
        ({"target": torch.tensor([0, 1])}, TypeError, r"target .* \(2,\); .* \(4,\)"),
        ({"target": torch.tensor(1.0)}, TypeError, "target is a torch.float32"),
        ({"x": torch.rand(4, 2, 8)}, TypeError, r"x is .* \(4, 2, 8\)"),
        ({"model": nn.Conv2d(2, 3, 1)}, TypeError, r"the model gave .* \(4, 3, 8, 8\)"),
        ({"maps": {"random": torch.rand(4, 1, 8, 8)}}, ValueError, '"random"'),
        ({"maps": {"cut": torch.rand(4, 1, 8, 7)}}, ValueError, r"maps\['cut'\] .* \(4, 1, 8, 7\).* \(4, 2, 8, 8\)"),
        ({"maps": {"bad": torch.full((4, 1, 8, 8), torch.inf)}}, ValueError, r"maps\['bad'\] is not finite .* 0"),
        ({"baseline": torch.rand(5)}, ValueError, "baseline does not broadcast"),
    ],
)
def test_pixel_flipping_says_what_it_cannot_take(changed: dict[str, Any], error: type, message: str) -> None:
    arguments = {"model": small(), "x": pictures(), "target": 1, "maps": {"map": torch.rand(4, 1, 8, 8)}}
    with pytest.raises(error, match=message):
        quality.pixel_flipping(**{**arguments, **changed})


# Randomisation


def test_layers_are_drawn_from_the_output_down() -> None:
    table = quality.randomisation(small(), relevance, pictures(), seed=0)
    assert table["layer"].drop_duplicates().tolist() == ["none", "linear2", "linear1", "norm", "conv1"]
    assert table.columns.tolist() == ["layer", "sample", "spearman", "absolute", "ssim"]
    assert table.groupby("layer", sort=False)["sample"].apply(list).tolist() == [[0, 1, 2, 3]] * 5
    np.testing.assert_allclose(table.loc[table["layer"] == "none", ["spearman", "absolute", "ssim"]], 1)
    assert table.loc[table["layer"] == "conv1", "spearman"].abs().max() < 0.9


def test_each_stage_keeps_what_was_drawn_before_and_leaves_what_is_below() -> None:
    model, seen = small(), []

    def explain(given: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        assert not any(module._forward_pre_hooks for module in given.modules())
        seen.append({name: value.clone() for name, value in given.state_dict().items()})
        return relevance(given, x, target)

    quality.randomisation(model, explain, pictures())
    layers, trained = ["linear2", "linear1", "norm", "conv1"], model.state_dict()
    final = seen[-1]
    assert len(seen) == 2 + len(layers)  # once as it is, once more to see chance, once for each layer
    for stage, state in enumerate(seen[1:]):
        for depth, layer in enumerate(layers):
            expected = final if depth < stage else trained
            assert torch.equal(state[f"{layer}.weight"], expected[f"{layer}.weight"])
    for layer in ("linear2", "linear1", "conv1"):  # new numbers, not the old ones in another order
        assert torch.isin(final[f"{layer}.weight"], trained[f"{layer}.weight"]).double().mean() < 0.1


class Backwards(nn.Module):
    """Registers its layers the other way round, uses one twice, and holds a parameter that no layer draws."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8))
        self.middle = nn.Linear(8, 8)
        self.first = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x.mean(1).flatten(1)) + self.shift)
        return self.last(self.middle(F.relu(self.middle(hidden))))


def test_the_order_is_that_of_the_forward_pass_and_loose_parameters_are_shuffled() -> None:
    model, states = Backwards(), []

    def explain(given: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        states.append(given.get_parameter("shift").detach().clone())
        return gradient(given, x, target)

    table = quality.randomisation(model, explain, pictures())
    assert table["layer"].drop_duplicates().tolist() == ["none", "last", "middle", "first", ""]
    assert torch.equal(states[-2], model.shift)
    assert not torch.equal(states[-1], model.shift)
    assert torch.equal(states[-1].sort().values, model.shift)


def test_layers_that_a_parent_calls_by_function_go_with_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.sum(1)
            return self.head(self.mix(rows, rows, rows, need_weights=False)[0].mean(1))

    table = quality.randomisation(Attention(), gradient, pictures())
    assert table["layer"].drop_duplicates().tolist() == ["none", "head", "mix.out_proj", "mix"]


def test_what_shows_the_image_alone_stays_as_it_was_and_what_shows_the_network_does_not() -> None:
    model, x = small(), pictures()
    edges = quality.randomisation(model, lambda model, x, target: x - x.roll(1, 3), x)
    np.testing.assert_allclose(edges[["spearman", "absolute", "ssim"]], 1)
    network = quality.randomisation(model, gradient, x).groupby("layer", sort=False).mean()
    assert network.loc["conv1", "spearman"] < 0.5


def test_the_stage_none_shows_the_chance_in_a_method() -> None:
    table = quality.randomisation(small(), lambda model, x, target: torch.randn_like(x), pictures())
    assert table.loc[table["layer"] == "none", "spearman"].abs().max() < 0.5


def test_likenesses_are_the_usual_ones() -> None:
    first, second = maps(0, (2, 9, 9)).numpy(), maps(1, (2, 9, 9)).numpy()
    found = _likeness(first, second)
    for i in range(2):
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(first[i].ravel(), second[i].ravel()).statistic)
    mirrored = _likeness(first, -first)
    np.testing.assert_allclose(mirrored, [[-1, 1, 1]] * 2)
    assert _likeness(first, np.zeros_like(first)).isna().all(axis=None)
    shrunk = _likeness(first, 1e-3 * first)
    np.testing.assert_allclose(shrunk, 1)


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_model_and_random_state_as_they_were(training: bool) -> None:
    model, x = small().train(training), pictures()
    parameters, state = list(model.parameters()), {n: v.clone() for n, v in model.state_dict().items()}
    before = torch.get_rng_state()
    quality.pixel_flipping(model, x, None, {"map": x}, steps=4)
    quality.randomisation(model, relevance, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_randomisation_repeats_with_its_seed() -> None:
    model, x = small(), pictures()
    first, again, other = (quality.randomisation(model, relevance, x, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_that_made_a_model_does_not_give_its_parameters_back(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    table = quality.randomisation(model, gradient, pictures(), target=1, seed=seed)
    assert table.loc[table["layer"] == "1", "spearman"].abs().max() < 0.5


def test_a_model_that_guidance_watches_can_be_measured() -> None:
    model, x = small(), pictures()
    with athena.Guidance(model, factor=0.1):
        guided = quality.randomisation(model, gradient, x)
    assert guided.equals(quality.randomisation(model, gradient, x))


@pytest.mark.parametrize(
    "model, explain, message",
    [
        (nn.Flatten(), gradient, "Flatten has no parameters"),
        (small(), lambda model, x, target: x[:, :, :4], r"what explain gave .* \(4, 2, 4, 8\)"),
        (small(), lambda model, x, target: x / 0, "what explain gave is not finite for image 0"),
    ],
)
def test_randomisation_says_what_it_cannot_take(model: nn.Module, explain: quality.Explain, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality.randomisation(model, explain, pictures())
