"""Claims about the controls and `Guidance(signal=)`: each control against loops in float64, through public names."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import athena
from athena.experiments import controls
from athena.training import Run, train

TINY = Run(dataset="mnist5k", fraction=0.02, epochs=2, factor=0.5, normalise="max")  # 80 images, two batches an epoch
BATCH, NEURONS = 7, 12


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(5, 1, 2, 3, dtype=torch.float64), torch.arange(5) % 4


def gradients(model: nn.Module, x: Tensor, y: Tensor, **guidance: Any) -> list[Tensor]:
    """The weight gradients of one guided step."""
    with athena.Guidance(model, **guidance) as guided:
        if guidance.get("target") == "label":
            guided.labels = y
        F.cross_entropy(model(x), y).backward()
    found = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return found


def example(shape: tuple[int, ...] = (BATCH, NEURONS)) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance, gradient and output of a layer with a ReLU above: where the output is below 0 the others are 0."""
    output, gradient, d = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    active = output > 0
    return output * d * active, gradient * active, output


def of(control: str, seed: int = 0, shape: tuple[int, ...] = (BATCH, NEURONS)) -> tuple[Tensor, tuple[Tensor, ...]]:
    tensors = example(shape)
    signal = controls.Signal(control, seed)
    relevance = tensors[0] if signal.needs_relevance else None
    return signal(relevance, *tensors[1:]), tensors


# Each control against a loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(BATCH, NEURONS), (3, 4, 2, 2)])
def test_shuffled_deals_the_numbers_of_a_sample_anew_to_its_active_neurons(shape: tuple[int, ...]) -> None:
    found, (relevance, *_) = of("shuffled", seed=3, shape=shape)
    keys = torch.rand(
        int(relevance.count_nonzero()), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).tolist()
    expected = torch.zeros_like(relevance).flatten(1)
    for row, sample in zip(expected, relevance.flatten(1), strict=True):
        active = [place for place, number in enumerate(sample.tolist()) if number]
        own, keys = keys[: len(active)], keys[len(active) :]
        order = sorted(range(len(active)), key=lambda place, own=own: own[place])
        for place, taken in zip(active, order, strict=True):
            row[place] = sample[active[taken]]
    assert torch.equal(found.flatten(1), expected)
    assert not torch.equal(found, relevance)


def test_shuffled_puts_every_number_everywhere_equally_often() -> None:
    relevance = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0]]).double()
    signal, counts = controls.Signal("shuffled", 0), torch.zeros(5, 4)
    for _ in range(3000):
        for place, number in enumerate(signal(relevance, relevance, relevance)[0].int().tolist()):
            counts[place, number] += 1
    active = counts[[1, 3, 4]][:, 1:]
    assert counts[[0, 2]][:, 0].tolist() == [3000, 3000]
    assert (active - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


def test_another_sample_gives_each_sample_the_relevance_of_one_that_is_not_itself() -> None:
    found, (relevance, *_) = of("another sample")
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0)).tolist()
    for place, sample in enumerate(order):
        assert torch.equal(found[sample], relevance[order[place - 1]])
    givers = [next(k for k in range(BATCH) if torch.equal(relevance[k], row)) for row in found]
    assert sorted(givers) == list(range(BATCH)) and all(giver != taker for taker, giver in enumerate(givers))


@pytest.mark.parametrize("shape", [(BATCH, NEURONS), (3, 4, 2, 2)])
def test_mean_is_that_of_the_active_neurons_of_a_sample_on_these(shape: tuple[int, ...]) -> None:
    found, (relevance, *_) = of("mean", shape=shape)
    for row, sample in zip(found.flatten(1), relevance.flatten(1), strict=True):
        active = [number for number in sample.tolist() if number]
        expected = [sum(active) / len(active) if number else 0.0 for number in sample.tolist()]
        assert row.tolist() == pytest.approx(expected, rel=1e-12)


def test_mean_of_no_relevance_is_0() -> None:
    nothing = torch.zeros(2, 3)
    assert torch.equal(controls.Signal("mean", 0)(nothing, nothing, nothing), nothing)


def test_noise_is_of_mean_one_whatever_the_layer_holds() -> None:
    found, _ = of("noise", shape=(100, 1000))
    expected = 2 * torch.rand(100, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(found, expected)
    assert abs(float(found.mean()) - 1) < 5 * 3**-0.5 / 100_000**0.5 and found.min() >= 0 and found.max() <= 2


def test_activation_and_gradient_times_activation_are_their_products() -> None:
    activation, (_, gradient, output) = of("activation")
    signed, absolute = (controls.Signal(f"{bar}gradient_activation{bar}", 0) for bar in ("", "|"))
    for n in range(BATCH):
        for k in range(NEURONS):
            z, g = float(output[n, k]), float(gradient[n, k])
            a = max(z, 0.0)
            assert activation[n, k] == a
            assert signed(None, gradient, output)[n, k] == g * a
            assert absolute(None, gradient, output)[n, k] == abs(g * a)


def test_every_control_gives_a_number_for_each_neuron_and_leaves_what_it_reads() -> None:
    for control in controls.CONTROLS:
        tensors = example((3, 4, 2, 2))
        before = [tensor.clone() for tensor in tensors]
        signal = controls.Signal(control, 0)
        found = signal(tensors[0] if signal.needs_relevance else None, *tensors[1:])
        assert found.shape == tensors[2].shape and found.dtype == torch.float64 and found.isfinite().all(), control
        assert all(map(torch.equal, tensors, before)), control


# The seam with Guidance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [None, "max", "rms"])
@pytest.mark.parametrize("granularity", ["sample", "neuron", "filter"])
@pytest.mark.parametrize("rule", [athena.rules.Epsilon(0.1), athena.rules.Gamma(0.25)], ids=["epsilon", "gamma"])
@pytest.mark.parametrize("target", [None, "label"])
def test_relevance_itself_as_the_signal_changes_nothing(
    normalise: str | None, granularity: str, rule: athena.rules.Rule, target: str | None
) -> None:
    (x, y), model = batch(), network()
    guidance = {"factor": 0.7, "normalise": normalise, "granularity": granularity, "rule": rule, "target": target}
    expected = gradients(model, x, y, **guidance)
    found = gradients(model, x, y, **guidance, signal=lambda relevance, gradient, output: relevance)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(expected[0], gradients(model, x, y, factor=0.0)[0])


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, factor: float, control: str, normalise: str | None) -> Any:
    """Weight and bias gradients of the network above, from the top down, one sample and neuron at a time."""
    outputs, a = [], x.flatten(1)
    for layer in (model[1], model[3], model[5]):
        z = a @ layer.weight.T + layer.bias
        outputs.append((a, z))
        a = z.relu()
    gradient = (outputs[-1][1].softmax(1) - F.one_hot(y, 4)) / len(y)
    found = []
    for place, layer in ((2, model[5]), (1, model[3]), (0, model[1])):
        a, z = outputs[place]
        if place < 2:
            gradient = gradient * (z > 0)
            for n in range(len(y)):
                products = [float(gradient[n, k] * z[n, k].relu()) for k in range(z.shape[1])]
                numbers = {
                    "activation": [float(z[n, k].relu()) for k in range(z.shape[1])],
                    "gradient_activation": products,
                    "|gradient_activation|": [abs(product) for product in products],
                }[control]
                size = max(abs(number) for number in numbers) if normalise == "max" else 1.0
                for k, number in enumerate(numbers):
                    gradient[n, k] *= 1 + factor * number / size
        found = [gradient.T @ a, gradient.sum(0), *found]
        gradient = gradient @ layer.weight
    return found


@pytest.mark.parametrize("control", ["activation", "gradient_activation", "|gradient_activation|"])
@pytest.mark.parametrize("normalise", [None, "max"])
@pytest.mark.parametrize("rule", [athena.rules.Epsilon(), athena.rules.Gamma(0.25)], ids=["epsilon", "gamma"])
def test_a_guided_step_with_a_control_is_the_one_computed_by_hand(
    control: str, normalise: str | None, rule: athena.rules.Rule
) -> None:
    (x, y), model = batch(), network()
    signal = controls.Signal(control, 0)
    found = gradients(model, x, y, factor=-0.5, normalise=normalise, signal=signal, rule=rule)
    with torch.no_grad():
        expected = by_hand(model, x, y, -0.5, control, normalise)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_a_signal_sees_relevance_gradient_and_output_of_each_guided_layer_from_the_top_down() -> None:
    (x, y), model, seen = batch(), network(), []

    def look(relevance: Tensor, gradient: Tensor, output: Tensor) -> Tensor:
        seen.append((relevance, gradient, output))
        return torch.zeros_like(output)

    gradients(model, x, y, factor=1.0, signal=look)
    assert [output.shape[1] for *_, output in seen] == [8, 9]
    explained = athena.lrp(model.eval(), x)
    for (relevance, _, output), path, layer in zip(seen, ("3", "1"), (4, 2), strict=True):
        torch.testing.assert_close(relevance, explained.layers[path])
        torch.testing.assert_close(output.relu(), model[: layer + 1](x).detach())
        assert not output.requires_grad


def test_a_signal_that_needs_no_relevance_gets_none_and_no_relevance_pass_is_made() -> None:
    (x, y), model, seen = batch(), network(), []

    class Silent:
        needs_relevance = False

        def __call__(self, relevance: None, gradient: Tensor, output: Tensor) -> Tensor:
            seen.append(relevance)
            return torch.zeros_like(output)

    def never(output: Tensor) -> Tensor:
        raise AssertionError("relevance was started")

    for rule in (athena.rules.Epsilon(), athena.rules.Gamma(0.25)):
        gradients(model, x, y, factor=1.0, signal=Silent(), target=never, rule=rule)
        with pytest.raises(AssertionError, match="relevance was started"):
            gradients(model, x, y, factor=1.0, target=never, rule=rule)
    assert seen == [None] * 4


def test_factor_0_never_asks_the_signal() -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("the signal was asked")

    (x, y), model = batch(), network()
    guided = gradients(model, x, y, factor=0.0, signal=never)
    F.cross_entropy(model(x), y).backward()
    for gradient, weight in zip(guided, model.parameters(), strict=True):
        assert weight.grad is not None and torch.equal(gradient, weight.grad)


def test_a_signal_of_another_shape_is_refused_by_layer_and_shape() -> None:
    (x, y), model = batch(), network()
    with pytest.raises(ValueError, match=r"signal gives \(5,\) for '3', whose output is \(5, 8\)"):
        gradients(model, x, y, factor=1.0, signal=lambda relevance, gradient, output: relevance.sum(1))


def test_a_signal_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="signal='shuffled'"):
        athena.Guidance(network(), signal="shuffled")  # type: ignore[arg-type]


def test_a_signal_is_asked_in_every_backward_pass_of_a_graph_that_is_kept() -> None:
    (x, y), model = batch(), network()
    with athena.Guidance(model, factor=0.5, signal=controls.Signal("gradient_activation", 0)):
        loss = F.cross_entropy(model(x), y)
        once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, once, again))


# Arms of a study -----------------------------------------------------------------------------------------------------


def weights(run: Run) -> list[Tensor]:
    return [weight.detach() for weight in train(run).model.parameters()]


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_a_run_with_a_control_is_repeatable_and_not_that_of_relevance(control: str) -> None:
    run = replace(TINY, control=control)
    ours = weights(run)
    assert all(map(torch.equal, ours, weights(run)))
    assert not all(map(torch.equal, ours, weights(TINY)))
    assert not all(map(torch.equal, ours, weights(replace(TINY, factor=0.0))))


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_a_control_shares_initial_weights_subset_and_order_of_batches_with_its_plain_pair(control: str) -> None:
    """As the loss gradient of the first step shows, with a learning rate of 0; factor 1e-30 then is the plain run."""
    plain = weights(replace(TINY, factor=0.0))
    assert all(map(torch.equal, plain, weights(replace(TINY, factor=1e-30, control=control))))


@pytest.mark.slow
def test_a_control_works_in_bfloat16_and_in_the_convolutional_network() -> None:
    run = replace(TINY, model="cnn", fraction=0.004, epochs=1, batch_size=8, scope="all", precision="bfloat16")
    for control in ("shuffled", "gradient_activation"):
        assert train(replace(run, control=control)).diverged is None
