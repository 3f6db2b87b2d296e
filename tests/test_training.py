"""Claims about `athena.train`: the same bits each time, pairs that differ in guidance alone, honest early stopping."""

import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import others
from torch import Tensor, nn

import athena
from athena import data, models, training
from athena.training import Result, Run, train

TINY = Run(dataset="mnist5k", fraction=0.02, epochs=2)  # 80 images, two batches an epoch
GUIDED = replace(TINY, factor=1.0, scope="all")


def bits(result: Result) -> str:
    """A hash of every weight of the trained network."""
    weights = result.model.state_dict().values()
    return hashlib.sha256(b"".join(w.contiguous().numpy().tobytes() for w in weights)).hexdigest()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def watched(look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Calls ``look(module, input)`` before every forward pass of a whole network, `train`'s own included."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Sequential):
            look(module, inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def images(x: Tensor) -> set[bytes]:
    return {image.contiguous().numpy().tobytes() for image in x}


# The same bits each time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [TINY, GUIDED, replace(GUIDED, precision="bfloat16")], ids=["plain", "guided", "bf16"])
def test_a_run_repeated_gives_the_same_weights_and_accuracies(run: Run) -> None:
    first = train(run)
    torch.rand(7), random.random()
    with threads(2):
        second = train(run)
    assert second.accuracy == first.accuracy
    assert bits(second) == bits(first)


def test_the_cnn_repeated_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training._Loop, "score", lambda *_: 0.0)  # a thousand images cost more than the training
    run = Run(model="cnn", dataset="mnist5k", fraction=0.004, factor=0.1, scope="all", epochs=1, batch_size=8)
    assert bits(train(run)) == bits(train(run))


def test_a_fresh_process_with_other_threads_gives_the_same_weights() -> None:
    program = (
        "import torch; torch.set_num_threads(2); torch.rand(3)\n"
        "import json, test_training as t\n"
        "r = t.train(t.GUIDED); print(json.dumps([r.accuracy, t.bits(r)]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True).stdout
    here = train(GUIDED)
    assert json.loads(output) == [here.accuracy, bits(here)]


def test_another_seed_gives_other_weights() -> None:
    assert bits(train(TINY)) != bits(train(replace(TINY, seed=1)))


def test_runs_that_share_a_process_as_on_a_dask_worker_do_not_disturb_each_other() -> None:
    runs = [replace(TINY, seed=seed, epochs=1, factor=factor) for seed in range(6) for factor in (0.0, 1.0)]
    alone = [bits(train(run)) for run in runs]
    with ThreadPoolExecutor(4) as pool:
        assert [bits(result) for result in pool.map(train, runs)] == alone


def test_random_states_threads_and_grad_mode_are_left_as_they_were() -> None:
    def state() -> list[Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return [
            torch.get_rng_state().tolist(),
            (kind, keys.tolist(), *rest),
            random.getstate(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    with threads(2):
        before = state()
        train(GUIDED)
        assert state() == before
        with pytest.raises(ValueError, match="no layer with weights"):
            train(replace(GUIDED, scope=("linear9",)))
        assert state() == before


def test_float32_is_float32_whatever_the_program_has_set() -> None:
    before = bits(train(GUIDED))
    own = [getattr(backend, name) for backend, name, _ in training._settings(GUIDED)]
    torch.set_float32_matmul_precision("medium")  # products of float32 in bfloat16, where the processor can
    try:
        assert bits(train(GUIDED)) == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for (backend, name, _), value in zip(training._settings(GUIDED), own, strict=True):
            setattr(backend, name, value)


def test_without_a_gpu_tf32_is_float32_under_another_key() -> None:
    rounded = replace(GUIDED, precision="tf32")
    assert bits(train(rounded, "cpu")) == bits(train(GUIDED, "cpu"))
    assert rounded.key != GUIDED.key


def test_a_run_trains_under_no_grad_too_and_leaves_it_on() -> None:
    with torch.no_grad():
        result = train(TINY)
        assert not torch.is_grad_enabled()
    assert result.accuracy == train(TINY).accuracy


def test_the_code_digest_is_of_every_file_that_a_run_depends_on_and_of_no_other() -> None:
    names = training._modules(training.__name__)
    root = Path(athena.__file__).parent
    rooms = ("propagation", "guidance", "experiments/data")
    files = [file for room in rooms for file in sorted((root / room).rglob("*.py"))]
    files += [root / "rules.py", root / "relevance.py", root / "_imports.py"]
    files += [
        root / "experiments" / name
        for name in ("run.py", "models.py", "controls.py", "marks.py", "uses.py", "places.py")
    ]
    needed = {
        ".".join(("athena", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__") for file in files
    }
    assert set(names) == needed | {training.__name__}


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_plain_and_guided_share_initial_weights_subset_and_order_of_batches() -> None:
    def seen(run: Run) -> tuple[list[Tensor], list[Tensor]]:
        weights: list[Tensor] = []
        batches: list[Tensor] = []

        def look(network: nn.Module, x: Tensor) -> None:
            if network.training:
                batches.append(x.clone())
                weights.extend([w.detach().clone() for w in network.parameters()] if len(batches) == 1 else [])

        with watched(look):
            train(run)
        return weights, batches

    plain, guided, other = seen(TINY), seen(GUIDED), seen(replace(TINY, seed=1))
    assert len(plain[1]) == 4
    for ours, theirs in zip(plain, guided, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(plain[0][0], other[0][0])
    assert images(torch.cat(plain[1])) != images(torch.cat(other[1]))
    assert images(torch.cat(plain[1][:2])) == images(torch.cat(plain[1][2:]))  # each epoch passes over the subset
    assert not torch.equal(plain[1][0], plain[1][2])  # in an order of its own


@pytest.mark.parametrize(
    "guidance",
    [
        {"target": "softmax", "scope": "all", "rule": "Gamma(0.25)"},
        {"target": "label", "normalise": "max"},
        {"target": "logits", "scope": ("linear1",), "granularity": "neuron"},
        {"target": "label", "every": 2},
    ],
)
def test_with_factor_0_nothing_of_guidance_changes_a_bit(guidance: dict[str, Any]) -> None:
    assert bits(train(replace(TINY, factor=0.0, **guidance))) == bits(train(TINY))


def test_a_tiny_factor_is_nearly_plain_and_a_factor_of_1_is_not() -> None:
    def distance(one: Result, other: Result) -> float:
        pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    plain = train(TINY)
    assert distance(plain, train(replace(GUIDED, factor=1e-9))) < 1e-5
    assert distance(plain, train(GUIDED)) > 1e-4


@pytest.mark.parametrize("target", ["predicted", "softmax", "logits", "label"])
def test_a_users_own_loop_with_guidance_is_train_bit_for_bit(target: str) -> None:
    run = replace(GUIDED, target=target, seed=3)
    here = data.load(run.dataset, run.fraction, run.seed)
    torch.manual_seed(run.seed)
    model = models.mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate, fused=True)
    order = torch.Generator().manual_seed(run.seed)
    accuracy = []
    with (
        threads(run.threads),
        athena.Guidance(
            model,
            factor=1.0,
            rule=athena.rules.Epsilon(1e-6),
            scope="all",
            target=None if target == "predicted" else target,
        ) as guidance,
    ):
        for _ in range(run.epochs):
            model.train()
            for index in torch.randperm(len(here.train_labels), generator=order).split(run.batch_size):
                x, y = here.train_images[index], here.train_labels[index]
                optimizer.zero_grad()
                if target == "label":
                    guidance.labels = y
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy.append(float((model(here.test_images).argmax(1) == here.test_labels).double().mean()))
    result = athena.train(run)
    assert accuracy == result.accuracy
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, result.model.state_dict()[name]), name


def test_factors_are_learned_from_a_tenth_of_the_subset_that_is_not_trained_on() -> None:
    run = replace(GUIDED, learn_every=2, normalise="max")
    trained: set[bytes] = set()
    looked_at: set[bytes] = set()
    with watched(lambda network, x: (trained if network.training else looked_at).update(images(x))):
        result = train(run)
    here = data.load(run.dataset, run.fraction, run.seed)
    held_out = looked_at - images(here.test_images)
    assert len(trained) == round(0.9 * len(here.train_labels))
    assert held_out and not held_out & trained and held_out | trained <= images(here.train_images)
    assert bits(result) == bits(train(run)) != bits(train(replace(run, factor=0.001)))


# What a Run is, and its key ------------------------------------------------------------------------------------------


def test_keys_are_those_that_committed_results_rely_on() -> None:
    assert Run().key == "97509c6098a34b3c"
    assert Run(fraction=0.05).key == "8514f055e32f9de9"
    assert replace(Run(), scope=("linear1", "linear2"), factor=10, rule="Gamma(0.25)").key == "8a452a3d7d488b88"


def test_runs_that_differ_in_any_field_differ_in_key() -> None:
    runs = [Run(), *(replace(Run(), **{name: value}) for name, value in others(Run()).items())]
    assert len({run.key for run in runs}) == len(runs) == len(fields(Run)) + 1


def test_a_field_that_came_later_leaves_the_key_of_a_run_without_it() -> None:
    for name, before in training.SINCE.items():
        assert getattr(Run(), name) == before
        assert replace(Run(), **{name: before}).key == Run().key


def test_one_run_written_in_several_ways_has_one_key() -> None:
    run = Run(fraction=1.0, factor=1.0, learning_rate=1.0, rule="Epsilon(1e-06)", scope=("linear1",))
    ways = [
        Run(fraction=1, factor=1, learning_rate=1, rule="Epsilon(1e-6)", scope=["linear1"]),  # type: ignore[arg-type]
        replace(run, rule="Epsilon(0.000001)"),
        replace(run, rule="Epsilon()"),
        replace(run, rule="Epsilon"),
        replace(run, seed=np.int64(0), factor=np.float64(1)),
        Run(**dict(reversed(asdict(run).items()))),
        Run(**json.loads(json.dumps(asdict(run)))),
    ]
    assert {(way, way.key) for way in ways} == {(run, run.key)}


@pytest.mark.parametrize(
    "one, other",
    [
        pytest.param({"rule": rule}, {"rule": other}, id=rule)
        for rule, other in [("Epsilon(1)", "Epsilon(1.0)"), ("Gamma(1)", "Gamma(1.0)"), ("Zero", "Zero()")]
    ]
    + [
        pytest.param({name: 2}, {name: 2.0}, id=name)
        for name, (kind, *_) in training.NUMBERS.items()
        if kind is int or name == "epochs"
    ],
)
def test_whole_numbers_and_floats_are_one_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert Run(**one).key == Run(**other).key


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", "resnet"),
        ("model", ["mlp"]),
        ("dataset", "mnist6k"),
        ("target", "true"),
        ("normalise", "l2"),
        ("granularity", "batch"),
        ("precision", "float16"),
        ("monitor", "train"),
        ("fraction", 0),
        ("fraction", 1.5),
        ("fraction", -0.1),
        ("fraction", float("nan")),
        ("fraction", "all"),
        ("epochs", 0),
        ("epochs", "3"),
        ("epochs", -2.5),
        ("smoothing", 1.0),
        ("smoothing", -0.1),
        ("weight_decay", -0.1),
        ("schedule", "cosine"),
        ("control", "shuffle"),
        ("tested", "never"),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("threads", 0),
        ("every", 0),
        ("every", 1.5),
        ("seed", "zero"),
        ("seed", 0.5),
        ("factor", float("nan")),
        ("factor", float("inf")),
        ("factor", "big"),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("window", -0.1),
        ("patience", -0.1),
        ("rule", "Epsilom(1e-6)"),
        ("rule", "Epsilon(-1)"),
        ("rule", 3),
        ("scope", "linaer"),
        ("scope", 5),
        ("restore_best", "no"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
        ("epochs", True),
        ("epochs", 10**400),
        ("factor", 1e39),
        ("learning_rate", 1e39),
        ("threads", 100_000),
        ("rule", "Epsilon(" + "9" * 400 + ")"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Run(**{name: value})
    assert str(value)[:90] in str(caught.value)


# The schedule, fractional epochs and the loss ------------------------------------------------------------------------


def steps_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each step."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def look(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", look)
        train(run)
    return rates


@pytest.mark.parametrize("epochs, steps", [(0.1, 1), (0.5, 4), (1, 8), (2.5, 20), (2.56, 20), (3, 24)])
def test_fractional_epochs_are_the_first_steps_of_the_next(
    epochs: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(TINY, batch_size=10, epochs=epochs)  # eight batches an epoch
    assert len(steps_of(run, monkeypatch)) == steps
    assert len(train(run).accuracy) == -(-steps // 8)


def test_a_run_of_half_an_epoch_more_begins_as_the_one_without() -> None:
    whole, more = train(replace(GUIDED, batch_size=10)), train(replace(GUIDED, batch_size=10, epochs=2.5))
    assert more.accuracy[:2] == whole.accuracy
    assert bits(more) != bits(whole)


def test_onecycle_rises_to_the_learning_rate_at_30_percent_and_falls_to_nearly_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = replace(TINY, batch_size=10, epochs=2.5, learning_rate=0.01, schedule="onecycle")
    rates = steps_of(run, monkeypatch)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.01 / 25) and rates[-1] < 1e-6
    assert rates[5] == pytest.approx(0.01) == max(rates)
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True)
    assert set(steps_of(replace(run, schedule="constant"), monkeypatch)) == {0.01}


def test_smoothing_and_weight_decay_are_those_of_pytorch_in_a_users_own_loop() -> None:
    run = replace(TINY, smoothing=0.2, weight_decay=0.5, learning_rate=1e-2)
    here = data.load(run.dataset, run.fraction, run.seed)
    torch.manual_seed(run.seed)
    model = models.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5, fused=True)
    order = torch.Generator().manual_seed(run.seed)
    for _ in range(2):
        for index in torch.randperm(80, generator=order).split(64):
            optimizer.zero_grad()
            x, y = here.train_images[index], here.train_labels[index]
            loss = -(model(x).log_softmax(1) * (0.8 * F.one_hot(y, 10) + 0.02)).sum(1).mean()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(train(run).model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert bits(train(run)) != bits(train(TINY))


def test_a_run_tested_at_the_end_alone_has_the_last_accuracy_of_one_tested_each_epoch() -> None:
    for run in (GUIDED, replace(TINY, epochs=2.5, monitor="test", window=0.5)):
        each, last = train(run), train(replace(run, tested="at the end"))
        assert last.accuracy == each.accuracy[-1:] and bits(last) == bits(each)


# What a Result is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [GUIDED, replace(TINY, scope=("linear1",), monitor="test", factor=1e30)])
def test_the_line_of_a_result_is_json_and_complete(run: Run) -> None:
    result = train(run)
    line = result.line()
    assert json.loads(json.dumps(line, allow_nan=False)) == line | {"run": asdict(run) | {"scope": _plain(run.scope)}}
    assert line.keys() == {
        *("key", "run", "accuracy", "seconds", "peak_bytes", "stopped_at", "diverged"),
        *("device", "versions", "code", "fingerprint"),
    }
    assert line["key"] == run.key and Run(**line["run"]) == run
    assert line["fingerprint"] == data.load("mnist5k").fingerprint
    assert line["versions"]["torch"] == torch.__version__ and line["code"].startswith(athena.__version__ + "+")
    assert all(0 <= accuracy <= 1 for accuracy in line["accuracy"])


def _plain(scope: str | tuple[str, ...]) -> str | list[str]:
    return scope if isinstance(scope, str) else list(scope)


def test_accuracy_is_that_of_the_returned_network_on_the_whole_test_set() -> None:
    result = train(GUIDED)
    test = data.load("mnist5k")
    assert not result.model.training
    with torch.no_grad():
        hits = result.model(test.test_images).argmax(1) == test.test_labels
    assert result.accuracy[-1] == int(hits.sum()) / 1000
    assert len(result.accuracy) == GUIDED.epochs


def test_a_trained_network_is_no_longer_guided() -> None:
    model = train(GUIDED).model.train()
    x, y = torch.rand(4, 1, 32, 32), torch.arange(4)

    def gradient() -> Tensor:
        return torch.autograd.grad(F.cross_entropy(model(x), y), model[1].weight)[0]

    with athena.Guidance(model, factor=5.0, scope="all"):
        guided = gradient()
    fresh = models.mlp()
    fresh.load_state_dict(model.state_dict())
    plain = torch.autograd.grad(F.cross_entropy(fresh(x), y), fresh[1].weight)[0]
    assert torch.equal(gradient(), plain) and not torch.equal(guided, plain)


@pytest.mark.parametrize("monitor", [None, "test"])
def test_seconds_count_training_alone(monkeypatch: pytest.MonkeyPatch, monitor: str | None) -> None:
    real, slept = training._Loop.score, []

    def slow(*arguments: Any) -> float:
        slept.append(1)
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(training._Loop, "score", slow)
    begin = time.perf_counter()
    result = train(replace(TINY, epochs=3, monitor=monitor, patience=10))
    whole = time.perf_counter() - begin
    assert 0 < result.seconds < whole - 0.2 * len(slept)
    assert len(slept) == (3 if monitor is None else 9)


@pytest.mark.parametrize("run", [GUIDED, replace(GUIDED, monitor="validation")], ids=["to the end", "early stopping"])
def test_a_run_that_has_ended_holds_no_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[data.Data]] = []
    load = data.load

    def watched_load(*args: Any) -> data.Data:
        images = load(*args)
        loaded.append(weakref.ref(images))
        return images

    monkeypatch.setattr(data, "load", watched_load)
    gc.disable()
    try:
        result = train(run)
    finally:
        gc.enable()
    assert result.accuracy and [images() for images in loaded] == [None]


def test_peak_memory_is_that_of_a_process_that_holds_the_network() -> None:
    assert train(TINY).peak_bytes > 4 * sum(p.numel() for p in models.mlp().parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no /proc")
def test_a_run_goes_on_where_the_system_does_not_let_the_peak_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("clear_refs")

    monkeypatch.setattr(training.Path, "write_text", refuse)
    assert train(replace(TINY, epochs=1)).peak_bytes > 0


def test_bfloat16_trains_and_is_not_float32() -> None:
    result = train(replace(GUIDED, precision="bfloat16", epochs=3))
    assert result.diverged is None and result.accuracy[-1] > 0.2
    assert {weight.dtype for weight in result.model.parameters()} == {torch.float32}
    assert bits(result) != bits(train(replace(GUIDED, epochs=3)))


# Divergence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", [None, "test", "validation"])
def test_a_divergence_is_recorded_and_the_run_still_ends(monitor: str | None) -> None:
    run = replace(GUIDED, factor=1e30, epochs=3, monitor=monitor, patience=10)
    result = train(run)
    assert result.diverged == {"step": 1, "layer": "linear1"}
    assert len(result.accuracy) == 3 and set(result.accuracy) == {0.1}  # of ten classes it says one
    assert train(replace(run, factor=0.0)).diverged is None


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_run_that_ends_with_weights_that_are_not_finite_is_stored_as_diverged(factor: float) -> None:
    run = Run(dataset="mnist5k", fraction=0.02, epochs=3, learning_rate=1e20, factor=factor)
    result = train(run)
    assert not all(weights.isfinite().all() for weights in result.model.parameters())
    assert result.diverged is not None and result.diverged["layer"].startswith("linear")
    assert 1 <= result.diverged["step"] <= 2 and len(result.accuracy) == 3
    assert list(training.watch(run, every=1))[-1].diverged is not None


# Early stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction, stop", [(0.02, 6), (0.04, 12), (0.08, 24)])
def test_window_and_patience_grow_with_the_batches_of_an_epoch(fraction: float, stop: int) -> None:
    """20, 40, 80 batches an epoch: k = 2, 4, 8 and l = 4, 8, 16; without any gain the end is after k + l."""
    run = Run(dataset="mnist5k", fraction=fraction, epochs=2, batch_size=4, learning_rate=0.0)
    result = train(replace(run, monitor="test", window=0.1, patience=0.2))
    assert result.stopped_at == stop
    assert len(result.accuracy) == 1


def test_with_few_batches_window_and_patience_are_one() -> None:
    assert train(replace(TINY, learning_rate=0.0, monitor="test", window=0.0, patience=0.0)).stopped_at == 2


def test_the_last_window_of_an_epoch_ends_with_it() -> None:
    """5 batches an epoch, k = 2: looks after 2, 4, 5, 7, 9, 10; after 9 there are l = 7 batches without gain."""
    run = replace(TINY, batch_size=16, epochs=9, learning_rate=0.0)
    result = train(replace(run, monitor="test", window=0.4, patience=1.4))
    assert result.stopped_at == 9
    assert len(result.accuracy) == 2


def test_without_a_monitor_nothing_stops_a_run() -> None:
    result = train(replace(TINY, learning_rate=0.0, epochs=4))
    assert result.stopped_at is None and len(result.accuracy) == 4


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What early stopping saw, look by look."""
    scores: list[float] = []
    score, look = training._Loop.score, training._EarlyStopping.look

    def watched_look(self: Any, loop: Any) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(training._Loop, "score", lambda *arguments: scores.append(score(*arguments)) or scores[-1])
            return look(self, loop)

    monkeypatch.setattr(training._EarlyStopping, "look", watched_look)
    return scores


NOISY = replace(TINY, fraction=0.05, epochs=6, batch_size=10, learning_rate=1e-2, monitor="test", window=0.1)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_run_stops_at_the_first_look_that_ends_l_batches_without_gain(looks: list[float], factor: float) -> None:
    result = train(replace(NOISY, factor=factor, patience=0.4))  # 20 batches an epoch: k = 2, l = 8, four looks
    best = [max(looks[: i + 1]) for i in range(len(looks))]
    gains = [i for i, (before, after) in enumerate(pairwise([-1.0, *best])) if after > before]
    assert result.stopped_at == 2 * len(looks) and 10 < result.stopped_at < 120
    assert len(looks) - 1 == gains[-1] + 4
    assert all(later - earlier <= 4 for earlier, later in pairwise(gains))


def test_restore_best_puts_back_the_weights_of_the_best_look(looks: list[float]) -> None:
    kept = train(replace(NOISY, patience=0.4))
    seen, looks[:] = list(looks), []
    left = train(replace(NOISY, patience=0.4, restore_best=False))
    assert looks == seen and max(seen) > seen[-1]  # the same run, and one in which it matters
    assert kept.accuracy[-1] == max(seen) and left.accuracy[-1] == seen[-1]
    assert kept.accuracy[:-1] == left.accuracy[:-1]
    test = data.load("mnist5k")
    with torch.no_grad():
        hits = kept.model(test.test_images).argmax(1) == test.test_labels
    assert int(hits.sum()) / 1000 == max(seen)


def test_restore_best_holds_for_a_run_that_is_never_stopped(looks: list[float]) -> None:
    run = replace(NOISY, epochs=3, patience=100)
    kept = train(run)
    assert kept.stopped_at is None and len(kept.accuracy) == 3
    assert kept.accuracy[-1] == max(looks) > train(replace(run, restore_best=False)).accuracy[-1]


def test_the_validation_part_is_the_same_for_every_run_and_never_trained_on() -> None:
    def seen(run: Run) -> tuple[set[bytes], set[bytes]]:
        trained: set[bytes] = set()
        scored: set[bytes] = set()
        with watched(lambda network, x: (trained if network.training else scored).update(images(x))):
            train(run)
        return trained, scored - images(data.load("mnist5k").test_images)

    everything = images(data.load("mnist5k").train_images)
    run = replace(TINY, epochs=1, monitor="validation", window=0.5, patience=10)
    trained, validation = seen(replace(run, fraction=1.0))
    assert len(validation) == 400 and len(trained) == 3600
    assert trained | validation == everything
    for other in [replace(run, seed=1), replace(run, factor=1.0), replace(run, fraction=0.1, seed=2)]:
        trained_on, validated_on = seen(other)
        assert validated_on == validation and not trained_on & validation
    assert seen(replace(run, monitor="test"))[1] == set()


def test_early_stopping_on_validation_keeps_the_weights_that_are_best_there(looks: list[float]) -> None:
    result = train(replace(NOISY, monitor="validation", patience=0.4))
    validation = data.load("mnist5k", held_out=training.HELD_OUT)
    with torch.no_grad():
        hits = result.model(validation.validation_images).argmax(1) == validation.validation_labels
    assert int(hits.sum()) / 400 == max(looks) > looks[-1]
    assert result.stopped_at is not None


# A run under way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_watched_run_ends_with_the_weights_of_an_unwatched_one(every: int) -> None:
    first, second = torch.get_rng_state(), torch.get_num_threads()
    glimpses = [(glimpse.epochs, glimpse.model) for glimpse in training.watch(GUIDED, every)]
    assert [epochs for epochs, _ in glimpses] == ([0, 0.5, 1, 1.5, 2] if every == 1 else [0, 1, 2])
    expected = train(GUIDED).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in glimpses[-1][1].state_dict().items())
    assert torch.equal(torch.get_rng_state(), first)
    assert torch.get_num_threads() == second


def test_two_runs_can_be_watched_in_turn_and_one_left_at_any_time() -> None:
    plain, guided = training.watch(TINY, 1), training.watch(GUIDED, 1)
    pairs = [(a.accuracy, b.accuracy) for a, b in zip(plain, guided, strict=True)]
    assert pairs[0][0] == pairs[0][1]  # the same network before the first step
    assert pairs[-1] == (train(TINY).accuracy[-1], train(GUIDED).accuracy[-1])  # mnist5k has a thousand test images
    left = training.watch(GUIDED, 1)
    network = next(left).model
    assert guided_layers(network)
    left.close()
    assert not guided_layers(network)


def guided_layers(model: nn.Module) -> int:
    return len(model._forward_pre_hooks) + sum(len(module._forward_hooks) for module in model.modules())


def test_a_watched_run_that_diverges_says_so_and_ends() -> None:
    *_, last = training.watch(replace(GUIDED, factor=1e30, target="logits", epochs=5), 1)
    assert last.diverged is not None
    assert last.epochs < 5


@pytest.mark.parametrize(
    "run, settings, said",
    [
        (TINY, {"every": 0}, r"every=0, images=1000"),
        (TINY, {"images": 0}, r"every=10, images=0"),
        (replace(TINY, monitor="validation"), {}, r"monitor='validation' cannot be watched"),
    ],
)
def test_what_cannot_be_watched_is_refused(run: Run, settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        next(training.watch(run, **settings))
