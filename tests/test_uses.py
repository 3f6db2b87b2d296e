"""Uses of an explanation in training, each against a formula written out (thesis chapters 4 and 5)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena import data
from athena.experiments import uses
from athena.experiments.run import Run
from athena.experiments.study import grid, plain
from athena.experiments.training import train
from athena.experiments.uses import Use

BASE = Run(dataset="mnist5k", fraction=0.1, epochs=2, tested="at the end")
EVERY_USE = [
    *({"use": name, "strength": 0.2} for name in (*uses.LOSSES, *uses.GRADIENTS)),
    *({"use": "retraining", "strength": 0.5, "score": score} for score in uses.SCORES),
    *({"use": name, "strength": 0.5, "score": "loss"} for name in ("sampling", "weighting")),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x * (x > 0.3), torch.arange(count) % 10


def use(**fields: object) -> Use:
    return Use(Run(rule="Zero()", **fields), network())  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", EVERY_USE, ids=lambda fields: " ".join(map(str, fields.values())))
def test_every_use_trains(fields: dict[str, object]) -> None:
    result = train(replace(BASE, **fields), "cpu")  # type: ignore[arg-type]
    assert result.diverged is None
    assert result.accuracy[-1] > 0.2  # ten classes


@pytest.mark.parametrize("fields", [{"use": "excitation dropout"}, {"use": "sampling", "score": "random"}], ids=str)
def test_a_use_draws_the_same_random_numbers_again(fields: dict[str, object]) -> None:
    run = replace(BASE, strength=0.5, **fields)  # type: ignore[arg-type]
    once, again = train(run, "cpu").model, train(run, "cpu").model
    assert all(map(torch.equal, once.state_dict().values(), again.state_dict().values()))


def test_a_use_that_chooses_samples_takes_as_many_steps_as_plain_training(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1))
    counts = []
    for fields in (
        {},
        {"use": "sampling", "score": "random", "strength": 0.1},
        {"use": "retraining", "score": "equal"},
    ):
        steps.clear()
        train(replace(BASE, **fields), "cpu")  # type: ignore[arg-type]
        counts.append(len(steps))
    assert counts == [counts[0]] * 3


def test_the_second_loss_is_of_features_times_one_plus_relevance_over_its_maximum() -> None:
    here, (x, y) = use(use="features", strength=0.7, target="label"), batch()
    hidden, last = here.model[:3](x), here.model[3]
    relevance = torch.stack([last.weight[label] * row for label, row in zip(y, hidden, strict=True)])
    weights = torch.stack([1 + row / row.abs().max() for row in relevance])
    expected = F.cross_entropy(last(hidden), y) + 0.7 * F.cross_entropy(last(hidden * weights), y)
    torch.testing.assert_close(here.loss(x, y, None), expected, rtol=1e-12, atol=0)


def test_features_are_weighted_by_the_loss_gradient_times_activation_where_that_is_the_control() -> None:
    here, (x, y) = use(use="features", control="gradient_activation"), batch()
    hidden, last = here.model[:3](x).detach().requires_grad_(), here.model[3]
    (gradient,) = torch.autograd.grad(F.cross_entropy(last(hidden), y), hidden)
    found = (gradient * hidden).detach()
    weights = 1 + found / found.abs().amax(1, keepdim=True)
    expected = F.cross_entropy(last(hidden), y) + F.cross_entropy(last(hidden * weights), y)
    torch.testing.assert_close(here.loss(x, y, None), expected, rtol=1e-12, atol=0)


def test_ordinary_dropout_drops_the_share_it_is_told_and_keeps_the_mean() -> None:
    here, (x, y) = use(use="dropout", strength=0.25), batch(10)
    hidden = here.model[:3](x)
    kept = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)) >= 0.25
    expected = F.cross_entropy(here.model[3](hidden * kept / 0.75), y)
    torch.testing.assert_close(here.loss(x, y, None), expected, rtol=1e-12, atol=0)


def test_excitation_dropout_drops_by_the_share_of_positive_relevance() -> None:
    here, (x, y) = use(use="excitation dropout", strength=0.5, target="label"), batch()
    hidden, last = here.model[:3](x), here.model[3]
    drops = torch.zeros_like(hidden)
    for sample, label in enumerate(y):
        positive = (last.weight[label] * hidden[sample]).clamp_min(0)
        for neuron, p in enumerate(positive / positive.sum()):
            drops[sample, neuron] = 0.5 * 19 * p / ((0.5 * 20 - 1) * p + 0.5)
    kept = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)) >= drops
    torch.testing.assert_close(here.loss(x, y, None), F.cross_entropy(last(hidden * kept / 0.5), y), rtol=1e-12, atol=0)
    even = torch.tensor(1 / 20)
    assert 0.5 * 19 * even / ((0.5 * 20 - 1) * even + 0.5) == pytest.approx(0.5)  # all alike: ordinary dropout


def test_hiding_takes_the_most_relevant_of_the_pixels_that_are_not_0() -> None:
    here, (x, y) = use(use="hiding", strength=0.2, target="label"), batch()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(here.model(leaf)[range(len(y)), y].sum(), leaf)
    hidden = x.clone().flatten(1)
    for row, relevance in zip(hidden, (gradient * x).flatten(1), strict=True):  # LRP-0 on a ReLU network, but biases
        active = row.nonzero().flatten()
        row[active[relevance[active].argsort(descending=True)[: round(0.2 * len(active))]]] = 0
    expected = F.cross_entropy(here.model(hidden.view_as(x)), y)
    torch.testing.assert_close(here.loss(x, y, None), expected, rtol=1e-12, atol=0)


def test_maps_that_agree_cost_nothing_and_the_penalty_trains_the_network() -> None:
    here, (x, y) = use(use="agreement", strength=3.0), batch()
    F.cross_entropy(here.model(x), y).backward()
    before = here.model[1].weight.grad.clone()
    here.model.zero_grad()
    here.loss(x, y, None).backward()
    assert not torch.allclose(here.model[1].weight.grad, before)
    here.generator.manual_seed(0)
    flat = torch.ones_like(x)  # moved around the edge it is itself
    with torch.no_grad():
        here.model[1].weight.fill_(0.01)
        here.model[1].bias.zero_()
    torch.testing.assert_close(here.loss(flat, y, None), F.cross_entropy(here.model(flat), y), rtol=1e-12, atol=0)


def test_the_gradient_of_a_neurons_weights_is_multiplied_by_its_relevance() -> None:
    here, (x, y) = use(use="gradient times relevance", target="label"), batch()
    here.loss(x, y, None).backward()
    before = {name: parameter.grad.clone() for name, parameter in here.model.named_parameters()}
    here.gradients(x, y)
    hidden, last = here.model[:3](x).detach(), here.model[3]
    of_hidden = torch.stack([last.weight[label] * row for label, row in zip(y, hidden, strict=True)]).mean(0).abs()
    of_output = (here.model(x) * F.one_hot(y, 10)).mean(0).abs()
    for name, size in {"1": of_hidden.detach(), "3": of_output.detach()}.items():
        for part in ("weight", "bias"):
            gradient = before[f"{name}.{part}"]
            expected = gradient * (size / size.mean()).view(-1, *[1] * (gradient.dim() - 1))
            found = here.model.get_parameter(f"{name}.{part}").grad
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_feedback_propagation_is_the_gradient_times_the_magnitude_of_the_weight() -> None:
    here, (x, y) = use(use="gradient times |weight|"), batch()
    here.loss(x, y, None).backward()
    before = here.model[1].weight.grad.clone()
    here.gradients(x, y)
    torch.testing.assert_close(here.model[1].weight.grad, before * here.model[1].weight.detach().abs())


@pytest.mark.parametrize("score", uses.SCORES)
def test_sampling_keeps_the_highest_scores(score: str) -> None:
    here, (x, y) = use(use="sampling", score=score, strength=0.5), batch(10)
    found = uses.SCORES[score](here, x, y)
    here.generator.manual_seed(0)
    kept, weights = here.choose(x, y)
    assert len(kept) == 5
    assert found[kept].min() >= found[[i for i in range(10) if i not in kept]].max()
    assert weights.eq(1).all()


def test_total_relevance_of_a_network_without_biases_is_its_logit() -> None:
    here, (x, y) = use(use="sampling", score="total relevance"), batch()
    with torch.no_grad():
        here.model[1].bias.zero_()
        here.model[3].bias.zero_()
    torch.testing.assert_close(uses.total_relevance(here, x, y), here.model(x).detach().amax(1), rtol=1e-10, atol=0)


def test_the_differences_of_two_maps_are_those_of_the_thesis() -> None:
    here, (x, y) = use(use="weighting", score="masked difference"), batch(10)

    def of(labels: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(here.model(leaf)[range(10), labels].sum(), leaf)
        return (gradient * x).flatten(1)

    predicted = here.model(x).argmax(1)
    assert (predicted == y).any() or (predicted != y).any()
    first, second = of(predicted), of(y)
    masked = torch.stack([((a - b)[a > 0]).sum().clamp_min(0) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(uses.masked_difference(here, x, y), masked, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(uses.local_difference(here, x, y), (first - second).abs().sum(1), rtol=1e-9, atol=1e-12)


def test_weights_are_one_on_average_and_shuffled_they_are_the_same_numbers() -> None:
    (x, y), fields = batch(10), {"use": "weighting", "score": "loss", "strength": 0.5}
    _, weights = use(**fields).choose(x, y)
    _, dealt = use(**fields, control="shuffled").choose(x, y)
    losses = F.cross_entropy(network()(x), y, reduction="none").detach()
    above = losses - losses.min()
    torch.testing.assert_close(weights, 1 + 0.5 * (above / above.mean() - 1))
    assert weights.mean().item() == pytest.approx(1)
    assert not torch.equal(weights, dealt)
    torch.testing.assert_close(weights.sort().values, dealt.sort().values)


def test_retraining_adds_the_held_out_samples_that_are_misclassified_and_no_others() -> None:
    here, (x, y) = use(use="retraining", score="equal"), batch(10)
    assert here.first(10) == 8
    chosen, weights = here.choose(x, y)
    wrong = [i for i in (8, 9) if here.model(x).argmax(1)[i] != y[i]]
    assert chosen.tolist() == [*range(8), *wrong]
    assert weights.eq(1).all()


def test_weights_of_samples_weigh_their_losses() -> None:
    here, (x, y) = use(use="weighting", score="loss"), batch(4)
    weights = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(here.model(x)[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(here.loss(x, y, weights), (losses * weights).mean())


def test_shifted_moves_each_image_by_itself_and_brings_in_zeros() -> None:
    x = torch.rand(20, 2, 5, 6)
    moved = uses.shifted(x, 2, torch.Generator().manual_seed(0))
    padded = F.pad(x, [2] * 4)
    seen = set()
    for image, big in zip(moved, padded, strict=True):
        places = [(a, b) for a in range(5) for b in range(5) if torch.equal(image, big[:, a : a + 5, b : b + 6])]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 5


def test_a_run_with_a_use_is_not_plain_and_its_plain_partner_has_none() -> None:
    runs = grid(BASE, use=[None, "features"], strength=[1.0])
    assert [run.is_plain for run in runs] == [True, False]
    assert plain(runs[1]) == runs[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use": "feature"}, "must be one of"),
        ({"use": "features", "factor": 0.1}, "the factor must be 0"),
        ({"use": "sampling"}, "needs a score"),
        ({"optimizer": "lion"}, "must be one of"),
    ],
)
def test_a_use_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **fields)  # type: ignore[arg-type]


def test_settings_are_chosen_by_images_that_are_neither_trained_nor_tested_on() -> None:
    result = train(replace(BASE, scored_on="validation"), "cpu")
    images = data.load(BASE.dataset, BASE.fraction, BASE.seed, 0.1)
    hits = (result.model(images.validation_images).argmax(1) == images.validation_labels).double().mean().item()
    assert result.accuracy == [pytest.approx(hits)]
