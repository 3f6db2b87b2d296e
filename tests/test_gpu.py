"""Claims about a GPU: the same explanations, gradients and runs as on a CPU, to the last bit the same each time.

pytest -m gpu tests/test_gpu.py
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena import models, rules
from athena.experiments import Store, sweep
from athena.rules import Rule
from athena.training import Result, Run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # where the first product is a backward pass
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here"),
]

GPU = torch.device("cuda")
NETWORKS = {"mlp": (models.mlp, 1), "cnn": (models.cnn, 3)}
GUIDED = Run(model="cnn", dataset="mnistm5k", fraction=0.2, epochs=1, factor=0.1, scope="all", target="logits")


def batch(channels: int, n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, 32, 32, dtype=torch.float64), torch.randint(10, (n,))


def weights(result: Result) -> list[Tensor]:
    return [value.cpu() for value in result.model.state_dict().values()]


def alike(one: Result, other: Result) -> bool:
    return one.accuracy == other.accuracy and all(map(torch.equal, weights(one), weights(other)))


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """What a program may have set for all of its products."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@pytest.mark.parametrize("rule", ["Zero()", "Epsilon(1e-06)", "Gamma(0.25)", "AlphaBeta(2.0, 1.0)", "ZPlus()"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_explanation_is_that_of_the_cpu(name: str, rule: str) -> None:
    build, channels = NETWORKS[name]
    network, (x, _) = build(channels).double(), batch(channels)
    chosen: Rule = rules.parse(rule)
    here = athena.lrp(network, x, rule=chosen)
    there = athena.lrp(copy.deepcopy(network).to(GPU), x.to(GPU), rule=chosen)
    assert there.input.is_cuda
    assert torch.allclose(there.input.cpu(), here.input, rtol=1e-9, atol=1e-12)
    assert all(
        torch.allclose(there.layers[path].cpu(), own, rtol=1e-9, atol=1e-12) for path, own in here.layers.items()
    )


@pytest.mark.parametrize("scope", ["all", "linear", "convolutional"])
@pytest.mark.parametrize("target", [None, "softmax", "logits"])
def test_guided_gradients_are_those_of_the_cpu(scope: str, target: str | None) -> None:
    x, labels = batch(3)
    origin = models.cnn().double()
    gradients = []
    for device in (torch.device("cpu"), GPU):
        network = copy.deepcopy(origin).to(device)
        with athena.Guidance(network, factor=0.5, scope=scope, target=target):
            F.cross_entropy(network(x.to(device)), labels.to(device)).backward()
        gradients.append([parameter.grad.cpu() for parameter in network.parameters() if parameter.grad is not None])
    for here, there in zip(*gradients, strict=True):
        assert torch.allclose(there, here, rtol=1e-9, atol=1e-12)


def test_under_autocast_the_map_is_nearly_that_of_float32() -> None:
    network = models.cnn().to(GPU)
    x = torch.rand(8, 3, 32, 32, device=GPU)
    exact = athena.lrp(network, x, rule=rules.Epsilon(1e-2)).input
    with torch.autocast("cuda", torch.bfloat16):
        rounded = athena.lrp(network, x, rule=rules.Epsilon(1e-2), target=network(x).argmax(1)).input
    assert torch.corrcoef(torch.stack([exact.flatten(), rounded.float().flatten()]))[0, 1] > 0.99


def test_a_map_is_as_exact_as_the_program_has_convolutions_be() -> None:
    network, x = models.cnn().to(GPU), torch.rand(16, 3, 32, 32, device=GPU)
    with torch.no_grad():
        classes = network.double()(x.double()).argmax(1)
    exact = athena.lrp(network, x.double(), target=classes).input
    network.float()
    errors = {}
    for precision in ("tf32", "ieee"):
        with products_in(precision):
            errors[precision] = float((athena.lrp(network, x, target=classes).input - exact).norm() / exact.norm())
    assert errors["ieee"] < 0.01 and errors["ieee"] < errors["tf32"] / 4 < 0.1


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_run_repeated_gives_the_same_weights_and_accuracies(precision: str, factor: float) -> None:
    run = replace(GUIDED, precision=precision, factor=factor)
    one = train(run)
    assert one.device.startswith("cuda") and one.peak_bytes > 0
    assert alike(one, train(run))


def test_float32_is_rounded_to_tf32_where_a_run_says_so_and_nowhere_else() -> None:
    exact, rounded = train(GUIDED), train(replace(GUIDED, precision="tf32"))
    assert not alike(exact, rounded)
    with products_in("tf32"):
        assert alike(train(GUIDED), exact)
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"
    with products_in("ieee"):
        assert alike(train(rounded.run), rounded)


def test_the_first_steps_are_those_of_the_cpu() -> None:
    run = replace(GUIDED, fraction=0.05)  # 200 images, four steps
    on_cpu, on_gpu = train(run, "cpu"), train(run, "cuda")
    assert on_cpu.fingerprint == on_gpu.fingerprint and on_cpu.run.key == on_gpu.run.key
    torch.manual_seed(run.seed)
    began = models.cnn().state_dict().values()
    for first, here, there in zip(began, weights(on_cpu), weights(on_gpu), strict=True):
        # the first steps of Adam go by the sign of a gradient, also of one that is rounding alone
        assert (there - here).norm() < 0.25 * (here - first).norm()


def test_early_stopping_on_the_gpu_keeps_its_best_look() -> None:
    result = train(replace(GUIDED, monitor="validation", epochs=4, window=0.5, patience=0.5))
    assert result.accuracy
    assert alike(result, train(result.run))


def test_a_divergence_on_the_gpu_is_recorded() -> None:
    result = train(replace(GUIDED, factor=1e30, rule="Zero()"))
    assert result.diverged is not None


def test_several_runs_at_once_give_the_lines_of_one_after_the_other(tmp_path: Path) -> None:
    runs = [replace(GUIDED, fraction=0.05, seed=seed) for seed in range(3)]
    at_once = sweep(runs, Store(tmp_path / "store.jsonl"), workers=3, device="cuda", progress=False)
    assert [line["accuracy"] for line in at_once] == [train(run, "cuda").accuracy for run in runs]
    assert all(line["device"].startswith("cuda") for line in at_once)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_guidance_waits_for_the_gpu_once_in_a_step() -> None:
    network: nn.Module = models.cnn().to(GPU)
    x, labels = torch.rand(8, 3, 32, 32, device=GPU), torch.randint(10, (8,), device=GPU)
    athena.Guidance(network, scope="all")
    F.cross_entropy(network(x), labels).backward()  # the first step loads what it needs
    loss = F.cross_entropy(network(x), labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            loss.backward()  # the look at its end
        with torch.no_grad():
            F.cross_entropy(network.eval()(x), labels)
        network.train()
        F.cross_entropy(network(x), labels)  # the forward pass, and the relevance pass with it
    finally:
        torch.cuda.set_sync_debug_mode("default")
