"""Claims about sweeps: what is run, in which order, and what is taken over."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweeps import SEEDS, TINY, Trainer, line_of, swept, until

from athena import data, training
from athena.experiments import (
    Store,
    Study,
    SweepError,
    collect,
    cost,
    grid,
)
from athena.experiments.cost import core_hours
from athena.training import Run


def test_core_hours_are_those_on_cpus_and_of_runs_on_a_gpu_what_they_would_take_there() -> None:
    lines = [line_of(run, "0") | {"seconds": 900.0} for run in grid(replace(TINY, threads=2), seed=range(3))]
    gpu = [line_of(run, "0") | {"device": "cuda (a GPU)"} for run in grid(TINY, seed=range(5, 9))]
    measured, estimated = core_hours([*lines, lines[0], *gpu])
    assert (measured, estimated) == (pytest.approx(3 * 0.5), pytest.approx(4 * 0.5))


def test_what_a_chapter_collects_is_trained_once_and_only_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    monkeypatch.setattr("athena.experiments.backends.processes", ThreadPoolExecutor)
    study = Study("mine", "title", "question", base=TINY, runs=tuple(SEEDS))
    with study.store.open() as append:
        append(line_of(SEEDS[1], trainer.fingerprint, accuracy=0.9))
    committed = study.store.path.read_bytes()
    assert list(collect(study, SEEDS[1:2])["accuracy"]) == [0.9] and not trainer.asked
    for _ in range(2):
        frame = collect(study, SEEDS)
        assert list(frame["seed"]) == [0, 1, 2, 3] and list(frame["accuracy"]) == [0.5, 0.9, 0.5, 0.5]
        assert sorted(run.seed for run in trainer.asked) == [0, 2, 3]
    assert study.store.path.read_bytes() == committed


def test_chapters_that_train_at_the_same_time_take_turns_and_train_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    monkeypatch.setattr("athena.experiments.backends.processes", ThreadPoolExecutor)
    under_way, go_on = threading.Event(), threading.Event()

    def slowly(run: Run, device: str | None) -> SimpleNamespace:
        under_way.set()
        assert go_on.wait(30)
        return trainer(run, device)

    monkeypatch.setattr("athena.experiments.backends.train", slowly)
    study = Study("mine", "title", "question", base=TINY, runs=tuple(SEEDS))
    with ThreadPoolExecutor(2) as chapters:
        one = chapters.submit(collect, study, SEEDS[:3])
        assert under_way.wait(30)
        other = chapters.submit(collect, study, SEEDS[1:])
        assert until(lambda: "Another chapter is training" in capsys.readouterr().out, 30)
        assert not one.done() and not other.done()
        go_on.set()
        assert list(one.result()["seed"]) == [0, 1, 2] and list(other.result()["seed"]) == [1, 2, 3]
    assert sorted(run.seed for run in trainer.asked) == [0, 1, 2, 3]


def test_a_chapter_falls_back_to_the_stand_in_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    monkeypatch.setattr("athena.experiments.backends.processes", ThreadPoolExecutor)
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "nowhere"))
    runs = [replace(run, dataset="mnist") for run in SEEDS]
    study = Study("mine", "title", "question", base=TINY, runs=tuple(runs))
    with study.store.open() as append:
        append(line_of(runs[1], "of mnist"))
    assert list(collect(study, runs[1:2])["dataset"]) == ["mnist"]
    assert list(collect(study, runs)["dataset"]) == ["mnist5k"] * 4
    assert sorted(run.seed for run in trainer.asked) == [0, 1, 2, 3]


def test_a_sweep_runs_what_is_missing_and_a_second_one_nothing(store: Store, trainer: Trainer) -> None:
    first = swept(SEEDS[:2], store)
    assert trainer.asked == SEEDS[:2]
    lines = swept([*reversed(SEEDS), SEEDS[0]], store)
    assert sorted(run.seed for run in trainer.asked) == [0, 1, 2, 3]
    assert [line["run"]["seed"] for line in lines] == [3, 2, 1, 0, 0]
    assert lines[-1] == first[0]
    before = store.path.read_bytes()
    trainer.asked.clear()
    assert swept([*reversed(SEEDS), SEEDS[0]], store) == lines
    assert trainer.asked == [] and store.path.read_bytes() == before


def test_a_sweep_trains_in_the_same_way_as_train(store: Store) -> None:
    (line,) = swept([replace(TINY, factor=1.0, scope="all")], store)
    result = training.train(replace(TINY, factor=1.0, scope="all")).line()
    times = {"seconds", "peak_bytes"}
    assert {k: v for k, v in line.items() if k not in times} == {k: v for k, v in result.items() if k not in times}
    assert store.runs()[line["key"]] == line


def test_the_cheapest_runs_come_first(store: Store, trainer: Trainer) -> None:
    ascending = [
        TINY,
        replace(TINY, factor=1.0),
        replace(TINY, epochs=5),
        replace(TINY, fraction=1.0),
        replace(TINY, fraction=1.0, factor=1.0),
        replace(TINY, model="cnn", fraction=1.0),
    ]
    mixed = list(ascending)
    random.Random(1).shuffle(mixed)
    lines = swept(mixed, store)
    assert trainer.asked == ascending == sorted(mixed, key=cost)
    assert [line["key"] for line in lines] == [run.key for run in mixed]


def test_lines_of_other_stores_are_taken_over(store: Store, trainer: Trainer, fingerprint: str) -> None:
    other = Store(store.path.with_name("other.jsonl"))
    theirs = [line_of(run, fingerprint, accuracy=0.9) for run in (SEEDS[1], replace(TINY, seed=99))]
    with other.open() as append:
        for line in theirs:
            append(line)
    untouched = other.path.read_bytes()
    lines = swept(SEEDS, store, also=[other, Store(store.path.with_name("none.jsonl"))])
    assert [run.seed for run in trainer.asked] == [0, 2, 3]
    assert lines[1] == theirs[0] and theirs[1] not in store.lines()
    assert len(store.lines()) == 4 and other.path.read_bytes() == untouched


def test_what_is_taken_over_is_said_with_the_code_that_measured_it(
    store: Store, trainer: Trainer, fingerprint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Store(store.path.with_name("other.jsonl"))
    with other.open() as append:
        append(line_of(SEEDS[1], fingerprint))
        append(line_of(SEEDS[2], fingerprint) | {"code": training.CODE})
    swept(SEEDS[:2], store, also=[other], progress=True)
    assert f"1 runs are taken over from other.jsonl, measured by code 0; this is {training.CODE}" in (
        capsys.readouterr().err
    )
    swept(SEEDS[:3], store, also=[other], progress=True)
    assert "1 runs are taken over from other.jsonl, measured by this code" in capsys.readouterr().err
    swept(SEEDS[:3], store, also=[other], progress=True)
    assert "taken over" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, -1])
def test_a_sweep_needs_at_least_one_worker(store: Store, trainer: Trainer, workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers={workers}: it must be at least 1"):
        swept(SEEDS, store, workers=workers)
    assert not store.path.exists()


def test_a_line_that_several_stores_hold_is_taken_over_once(store: Store, trainer: Trainer, fingerprint: str) -> None:
    others = [Store(store.path.with_name(name)) for name in ("one.jsonl", "two.jsonl")]
    for other in others:
        with other.open() as append:
            append(line_of(SEEDS[1], fingerprint))
    swept(SEEDS, store, also=others)
    assert sorted(line["run"]["seed"] for line in store.lines()) == [0, 1, 2, 3]


def test_lines_on_other_data_are_not_taken_over(store: Store, trainer: Trainer) -> None:
    other = Store(store.path.with_name("other.jsonl"))
    with other.open() as append:
        append(line_of(SEEDS[1], "other data"))
    swept(SEEDS, store, also=[other])
    assert trainer.asked == SEEDS
    assert {line["fingerprint"] for line in store.lines()} == {trainer.fingerprint}


def test_looking_for_lines_to_take_over_grows_with_their_number_and_not_its_square(
    store: Store, trainer: Trainer, fingerprint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store(store.path.with_name("other.jsonl"))
    other.path.parent.mkdir()
    lines = [line_of(run, fingerprint) for run in grid(TINY, seed=range(100, 200))]
    other.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    key, asked = Run.key.fget, []  # type: ignore[attr-defined]
    monkeypatch.setattr(Run, "key", property(lambda run: asked.append(run) or key(run)))
    swept(grid(TINY, seed=range(100)), store, also=[other])
    assert len(asked) < 20 * 100


def test_a_store_measured_on_other_data_is_refused_before_anything_is_written(store: Store, trainer: Trainer) -> None:
    with store.open() as append:
        append(line_of(SEEDS[0], "other data"))
    before = store.path.read_bytes()
    with pytest.raises(SweepError, match="mnist5k with fingerprint other data"):
        swept(SEEDS, store)
    assert trainer.asked == [] and store.path.read_bytes() == before


def test_a_worker_that_trained_on_other_data_is_refused(store: Store, trainer: Trainer) -> None:
    trainer.fingerprint = "other data"  # as on a machine of a Dask cluster that has other files
    with pytest.raises(SweepError, match="other data"):
        swept(SEEDS, store)
    assert store.lines() == []


def test_a_missing_data_set_is_told_before_anything_is_run(
    store: Store, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError):
        swept([*SEEDS, Run(dataset="mnist")], store)
    assert trainer.asked == [] and store.lines() == []


def test_workers_go_on_with_the_next_runs_while_a_result_is_being_stored(
    store: Store, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("athena.experiments.backends.processes", ThreadPoolExecutor)
    waited = []
    opened = Store.open

    @contextmanager
    def slowly(self: Store) -> Iterator[Callable[[dict[str, Any]], None]]:
        with opened(self) as append:

            def append_slowly(line: dict[str, Any]) -> None:
                waited.append(until(lambda: len(trainer.asked) == len(SEEDS), 30))
                append(line)

            yield append_slowly

    monkeypatch.setattr(Store, "open", slowly)
    swept(SEEDS, store, workers=2)
    assert waited == [True] * len(SEEDS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_leaves_what_was_finished_in_the_store(
    store: Store, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("athena.experiments.backends.processes", ThreadPoolExecutor)  # which can share the trainer
    trainer.fails_on = replace(TINY, epochs=3)  # the dearest, so the last
    with pytest.raises(SweepError, match=r"1 of 5 runs failed.*epochs=3.*the run went wrong") as caught:
        swept([trainer.fails_on, *SEEDS], store, workers=workers)
    assert str(store.path) in str(caught.value)
    assert len(store.lines()) == 4
    trainer.asked.clear()
    lines = swept(SEEDS, store)
    assert [line["key"] for line in lines] == [run.key for run in SEEDS] and trainer.asked == []


def test_a_progress_bar_counts_the_runs(store: Store, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    swept(SEEDS[:1], store)
    assert capsys.readouterr().err == ""
    swept(SEEDS, store, progress=True)
    shown = capsys.readouterr().err
    assert "1 of 4 runs" in shown and "4 of 4 runs" in shown and "100%" in shown
