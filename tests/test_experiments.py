"""Claims about studies, the store and the sweep: nothing measured is lost or done twice, whatever ends a sweep."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from runs import unlike

from athena import data, experiments, training
from athena.experiments import (
    ARM,
    Store,
    StoreError,
    Study,
    SweepError,
    collect,
    cost,
    grid,
    listed,
    plain,
    results,
    sweep,
)
from athena.experiments.backends import processes
from athena.training import Run

TINY = Run(dataset="mnist5k", fraction=0.02, epochs=1)
SEEDS = grid(TINY, seed=range(4))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results" / "s.jsonl")


@pytest.fixture(scope="module")
def fingerprint() -> str:
    return data.load("mnist5k").fingerprint


def line_of(run: Run, fingerprint: str, accuracy: float = 0.5) -> dict[str, Any]:
    """A line as `Result.line` makes it, without training."""
    run_as_json = json.loads(json.dumps({field.name: getattr(run, field.name) for field in fields(Run)}))
    measured = {"accuracy": [accuracy / 2, accuracy], "seconds": 1.0, "peak_bytes": 1, "stopped_at": None}
    about = {"diverged": None, "device": "cpu", "versions": {"torch": "2"}, "code": "0", "fingerprint": fingerprint}
    return {"key": run.key, "run": run_as_json} | measured | about


@dataclass
class Trainer:
    """Takes the place of `athena.train` in this process, and writes down what it was asked for."""

    fingerprint: str
    asked: list[Run]
    fails_on: Run | None = None

    def __call__(self, run: Run, device: str | None) -> SimpleNamespace:
        if run == self.fails_on:
            raise ValueError("the run went wrong")
        self.asked.append(run)
        return SimpleNamespace(line=lambda: line_of(run, self.fingerprint))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, fingerprint: str) -> Trainer:
    fake = Trainer(fingerprint, [])
    monkeypatch.setattr("athena.experiments.backends.train", fake)
    return fake


def swept(runs: list[Run], store: Store, **options: Any) -> list[dict[str, Any]]:
    return sweep(runs, store, **({"workers": 1, "progress": False} | options))


# Grids and studies ---------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination() -> None:
    runs = grid(TINY, factor=[0.5, 1], seed=[0, 1, 2], target=["softmax", "logits"])
    assert len(runs) == len(set(runs)) == 12
    assert {(run.factor, run.seed, run.target) for run in runs} == {
        (factor, seed, target) for factor in (0.5, 1.0) for seed in (0, 1, 2) for target in ("softmax", "logits")
    }
    assert {replace(run, factor=0.0, seed=0, target="predicted") for run in runs} == {TINY}


def test_plain_arms_of_a_grid_are_run_once() -> None:
    guidance = {"target": ["softmax", "logits"], "rule": ["Zero()", "Gamma(0.25)"], "scope": ["all", "linear"]}
    runs = grid(TINY, factor=[0, 0.1], seed=[0, 1], **guidance)
    assert len(runs) == 2 + 2 * 8
    assert [run for run in runs if run.factor == 0] == [TINY, replace(TINY, seed=1)]


def test_a_plain_run_differs_from_its_guided_partner_in_the_arm_alone() -> None:
    guided = unlike(Run())
    ours, theirs = plain(guided), guided
    assert ours.factor == 0 and plain(ours) == ours
    for field in fields(Run):
        if field.name not in ARM:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
        elif field.name != "factor":
            assert getattr(ours, field.name) == field.default, field.name


STUDY = """
title = "A title"
question = "A question?"
[run]
dataset = "mnist5k"
fraction = 0.02
epochs = 1
[[grid]]
factor = [0, 1]
seed = [0, 1]
[[grid]]
seed = [1, 2]
"""


def test_a_study_is_read_with_its_runs_once_each(tmp_path: Path) -> None:
    (tmp_path / "some-study.toml").write_text(STUDY)
    study = Study.read(tmp_path / "some-study.toml")
    assert (study.name, study.title, study.question) == ("some-study", "A title", "A question?")
    assert study.runs == (*grid(TINY, factor=[0, 1], seed=[0, 1]), replace(TINY, seed=2))
    assert study.store.path == experiments.root() / "results" / "some-study.jsonl"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("[run]", "[run", "line 4"),
        ("[run]", "[runs]", "run"),
        ("[[grid]]", "[[grids]]", "grid"),
        ('title = "A title"', "", "title"),
        ("[run]", 'author = "me"\n[run]', "author"),
        ("epochs = 1", "epoch = 1", "epoch"),
        ("epochs = 1", "epochs = 0", "epochs=0"),
        ('dataset = "mnist5k"', 'dataset = "mnist6k"', "mnist6k"),
        ("seed = [0, 1]", "sed = [0, 1]", "sed"),
        ("seed = [0, 1]", 'target = ["nothing"]', "target='nothing'"),
        ("seed = [0, 1]", 'rule = ["Epsilom(1)"]', "Epsilom"),
        ("seed = [0, 1]", "seed = 1", "seed"),
        ("seed = [0, 1]", 'scope = "all"', "scope"),
        ("seed = [0, 1]", 'scope = ["everything"]', "everything"),
        ("seed = [0, 1]", 'model = "mlp"', "model"),
    ],
)
def test_what_is_no_study_is_refused_by_file_and_entry(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(ValueError, match="is not a study") as caught:
        Study.read(path)
    message = str(caught.value).replace(str(path), "FILE")
    assert message.startswith("FILE is not a study")
    assert named in message


def test_every_study_of_the_project_can_be_read_and_names_a_table_that_there_is() -> None:
    paths = sorted((experiments.root() / "studies").glob("*.toml"))
    tables = set(experiments.published("accuracy")["table"])
    assert paths
    for path in paths:
        study = Study.read(path)
        assert study.runs and study.title and study.question, path
        assert study.thesis_table is None or study.thesis_table in tables, path


def test_committed_results_belong_to_the_runs_and_keys_they_say() -> None:
    for path in sorted((experiments.root() / "results").glob("*.jsonl")):
        lines = Store(path).lines()
        keys = [line["key"] for line in lines]
        assert keys == [Run(**line["run"]).key for line in lines], path
        assert len(set(keys)) == len(keys), path
        assert len({(line["run"]["dataset"], line["fingerprint"]) for line in lines}) == len(
            {line["run"]["dataset"] for line in lines}
        ), path


# The store -----------------------------------------------------------------------------------------------------------


def test_a_line_can_be_read_as_soon_as_append_returns(store: Store, fingerprint: str) -> None:
    assert store.lines() == []
    lines = [line_of(run, fingerprint) for run in SEEDS]
    with store.open() as append:
        for n, line in enumerate(lines, 1):
            append(line)
            assert Store(store.path).lines() == lines[:n]
            assert store.path.read_bytes().endswith(b"\n")
    assert store.runs() == {run.key: line for run, line in zip(SEEDS, lines, strict=True)}


@pytest.mark.parametrize("kept", ["half", "all but the end of the line", "nothing but a bracket"])
def test_a_torn_last_line_does_not_count_and_is_cut_off_by_the_next_writer(
    store: Store, fingerprint: str, kept: str
) -> None:
    one, two, three = (line_of(run, fingerprint) for run in SEEDS[:3])
    with store.open() as append:
        append(one)
    text = json.dumps(two)
    torn = {"half": text[: len(text) // 2], "all but the end of the line": text, "nothing but a bracket": "{"}[kept]
    whole = store.path.read_text()
    store.path.write_text(whole + torn)
    assert store.lines() == [one]
    with store.open():
        assert store.path.read_text() == whole
    with store.open() as append:
        append(three)
    assert store.lines() == [one, three]


def test_a_store_that_is_one_torn_line_is_empty(store: Store) -> None:
    store.path.parent.mkdir()
    store.path.write_text('{"key": "12')
    assert store.lines() == [] and store.frame().empty
    with store.open():
        assert store.path.read_text() == ""


@pytest.mark.parametrize("damage", ['{"key": "1', "", "\0\0\0", "{}", "[1]", '{"run": {"factr": 1}}'])
def test_a_damaged_line_before_the_last_is_named(store: Store, fingerprint: str, damage: str) -> None:
    good = json.dumps(line_of(TINY, fingerprint))
    store.path.parent.mkdir()
    store.path.write_text(f"{good}\n{damage}\n{good}\n")
    for read in (store.runs, store.frame):
        with pytest.raises(StoreError, match=r"s\.jsonl, line 2 "):
            read()


def test_a_line_of_a_newer_version_is_not_called_damaged(store: Store, fingerprint: str) -> None:
    line = line_of(TINY, fingerprint)
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line | {"run": line["run"] | {"momentum": 0.9}}) + "\n")
    with pytest.raises(StoreError, match=r"s\.jsonl, line 1 .*'momentum'.* version that wrote it"):
        store.runs()


def test_two_writers_are_refused_and_the_first_goes_on(store: Store, fingerprint: str) -> None:
    with store.open() as append:
        with pytest.raises(StoreError, match=r"s\.jsonl is being written"), Store(store.path).open():
            pass
        append(line_of(TINY, fingerprint))
    with store.open():
        assert len(store.lines()) == 1


def test_an_error_while_writing_frees_the_store(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.open():
        1 / 0  # noqa: B018
    with store.open():
        pass


def test_results_are_one_row_a_run_with_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fingerprint: str
) -> None:
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    runs = [*SEEDS, replace(TINY, factor=0.1, scope=("linear1",), normalise="max", monitor="test")]
    with Store(tmp_path / "results" / "mine.jsonl").open() as append:
        for n, run in enumerate(runs):
            append(line_of(run, fingerprint, accuracy=n / 10))
    frame = results("mine")
    assert set(frame.columns) == {field.name for field in fields(Run)} | {
        *("key", "accuracy", "accuracies", "seconds", "peak_bytes", "stopped_at", "diverged"),
        *("device", "versions", "code", "fingerprint"),
    }
    assert list(frame["accuracy"]) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert frame["accuracies"][4] == [0.2, 0.4]
    for run, row in zip(runs, frame.to_dict("records"), strict=True):
        values = {field.name: row[field.name] for field in fields(Run)}  # pandas may write None as NaN
        assert Run(**{name: None if value != value else value for name, value in values.items()}) == run
        assert row["key"] == run.key
    with pytest.raises(FileNotFoundError, match=r"'yours'.*\['mine'\]"):
        results("yours")


def test_results_of_a_store_without_lines_have_the_same_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fingerprint: str
) -> None:
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    with Store(tmp_path / "results" / "begun.jsonl").open():
        pass
    frame = results("begun")
    assert len(frame) == 0
    assert list(frame.columns) == list(experiments.frame([line_of(TINY, fingerprint)]).columns)


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
        assert _until(lambda: "Another chapter is training" in capsys.readouterr().out, 30)
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


def test_a_list_may_come_as_text() -> None:
    assert listed("[0, 1.0, 10.0]") == listed([0, 1.0, 10.0]) == listed((0, 1.0, 10.0)) == [0, 1.0, 10.0]
    assert listed("['softmax', 'logits']") == ["softmax", "logits"]
    for wrong in ("[0, 1", "five", "5", 5):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            listed(wrong)  # type: ignore[arg-type]


# The sweep -----------------------------------------------------------------------------------------------------------


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


# Sweeps that are ended from outside ----------------------------------------------------------------------------------


def _children() -> list[psutil.Process]:
    """The live worker processes of this process."""
    found = []
    for child in psutil.Process().children():
        try:
            if "loky.backend.popen_loky" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def _until(true: Callable[[], Any], seconds: float) -> bool:
    """Waits until `true()` holds, at most for so long."""
    end = time.monotonic() + seconds
    while not (held := bool(true())) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def test_a_worker_that_is_killed_ends_the_sweep_and_loses_runs_in_flight_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = grid(replace(TINY, epochs=4), seed=range(400))
    seen: list[int] = []

    def kill() -> None:
        if _until(lambda: len(store.lines()) >= 3, 60):
            seen.append(len(store.lines()))
            os.kill(_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SweepError, match=r"a worker died .*s\.jsonl"):
        swept(runs, store, workers=2)
    killer.join()
    assert _until(lambda: not _children(), 5)
    done = store.runs()
    assert 3 <= seen[0] <= len(done) == len(store.lines()) < 400

    missing = [run for run in runs if run.key not in done]
    fake = Trainer(next(iter(done.values()))["fingerprint"], [])
    monkeypatch.setattr("athena.experiments.backends.train", fake)
    swept(runs, store)
    assert fake.asked == missing and len(store.lines()) == 400


def test_a_sweep_that_ends_early_leaves_other_processes_of_its_caller_alone(store: Store, trainer: Trainer) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        with pytest.raises(ZeroDivisionError), processes(2):
            1 / 0  # noqa: B018
        other.join(1)
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


SWEEP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would pass on that it is ignored
from pathlib import Path
from athena import __main__
from athena.experiments import places
folder, workers = sys.argv[1:]
places.root = lambda: Path(folder)
sys.argv[1:] = ["sweep", f"{folder}/studies/s.toml", "--workers", workers, "--device", "cpu"]
print("begun", flush=True)
__main__.main()
"""


@dataclass
class Live:
    """``athena sweep`` in a process group of its own, as a terminal starts it."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def store(self) -> Store:
        return Store(self.folder / "results" / "s.jsonl")

    def left(self) -> list[psutil.Process]:
        """The live processes of the group: the sweep, its workers, and whatever they started."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return found

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.left() if "loky.backend.popen_loky" in " ".join(process.cmdline())]

    def end(self) -> None:
        for process in self.left():
            process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Live]]:
    """Starts a sweep of ``studies/s.toml`` in a folder of its own with so many workers."""
    (tmp_path / "studies").mkdir()
    started: list[Live] = []

    def begin(workers: int) -> Live:
        command = [sys.executable, "-c", SWEEP, str(tmp_path), str(workers)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(Live(tmp_path, process))
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return started[-1]

    yield begin
    for live in started:
        live.end()


def _write_study(folder: Path, *grids: dict[str, list[Any]]) -> list[Run]:
    text = STUDY.partition("[[grid]]")[0]
    for values in grids:
        text += "[[grid]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    (folder / "studies" / "s.toml").write_text(text)
    return list(Study.read(folder / "studies" / "s.toml").runs)


QUICK = {"seed": [0, 1, 2]}
LONG = {"seed": [0, 1, 2], "fraction": [1.0], "epochs": [1000]}  # minutes each


def test_ctrl_c_ends_a_sweep_its_workers_and_nothing_that_was_measured(
    tmp_path: Path, start: Callable[[int], Live]
) -> None:
    _write_study(tmp_path, QUICK, LONG)
    live = start(2)
    assert _until(lambda: len(live.store.lines()) == 3, 60)
    with pytest.raises(StoreError, match="being written by another sweep"), live.store.open():
        pass
    lines = live.store.lines()
    os.killpg(live.process.pid, signal.SIGINT)  # what a terminal does
    begin = time.monotonic()
    _, errors = live.process.communicate(timeout=30)
    assert time.monotonic() - begin < 8
    assert live.process.returncode != 0
    assert "Traceback" not in errors
    assert _until(lambda: not live.left(), 5)
    with live.store.open():
        assert live.store.lines() == lines and live.store.path.read_bytes().endswith(b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_workers_do_not_outlive_a_sweep_that_is_killed(
    tmp_path: Path, start: Callable[[int], Live], moment: str
) -> None:
    _write_study(tmp_path, QUICK, LONG)
    live = start(2)
    ready = {"starting": lambda: len(live.workers()) == 2, "training": lambda: len(live.store.lines()) == 3}
    assert _until(ready[moment], 60)
    live.process.kill()
    live.process.wait()
    with live.store.open():  # nobody holds the lock any more
        before = live.store.lines()
    assert _until(lambda: not live.left(), 40)  # a worker that starts ends when it has imported PyTorch
    assert live.store.lines() == before


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_ends_with_the_store_of_one_never_killed(
    tmp_path: Path, start: Callable[[int], Live]
) -> None:
    """SIGKILL at random moments: from the first line of `sweep` on, or just after a random number of lines."""
    runs = _write_study(tmp_path, {"factor": [0, 1], "fraction": [0.02, 0.05], "seed": list(range(40))})
    never_killed = Store(tmp_path / "reference" / "s.jsonl")
    swept(runs, never_killed, device="cpu")

    chance = random.Random(0)
    kills = 0
    while kills < 20:
        live = start(workers := 2 if kills % 3 == 2 else 1)
        before = len(live.store.lines())
        if kills % 2:
            moment = chance.uniform(0, 4 * workers)
        else:
            wanted = before + chance.randint(1, 5)
            assert _until(lambda: len(live.store.lines()) >= wanted or live.process.poll() is not None, 60)  # noqa: B023
            moment = chance.uniform(0, 0.3)
        _until(lambda: live.process.poll() is not None, moment)  # noqa: B023
        live.process.kill()
        live.process.wait()
        if live.process.returncode == -signal.SIGKILL and len(live.store.lines()) < len(runs):
            kills += 1
        else:  # it was done before: half of it has to be done again
            lines = live.store.path.read_bytes().splitlines(keepends=True)
            live.store.path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert _until(lambda: not live.left(), 15)

    live = start(2)
    live.process.communicate(timeout=120)
    assert live.process.returncode == 0
    assert live.store.path.read_bytes().endswith(b"\n")
    lines, expected = live.store.lines(), never_killed.runs()
    assert len(lines) == len(runs) and live.store.runs().keys() == expected.keys() == {run.key for run in runs}
    for line in lines:
        reference = expected[line["key"]]
        assert line.keys() == reference.keys()
        for name in line.keys() - {"seconds", "peak_bytes"}:
            assert line[name] == reference[name], name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_workers_of_a_dask_cluster_measure_the_same(store: Store) -> None:
    distributed = pytest.importorskip("distributed")
    runs = grid(TINY, factor=[0, 1], seed=range(6))
    expected = swept(runs, store)
    elsewhere = Store(store.path.with_name("dask.jsonl"))
    options = {"n_workers": 2, "threads_per_worker": 2, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster:
        lines = swept(runs, elsewhere, dask=cluster.scheduler_address)
        wrong = replace(TINY, scope=("linear9",), factor=1.0)
        with pytest.raises(SweepError, match="linear9"):
            swept([*runs, wrong], elsewhere, dask=cluster.scheduler_address)
    assert [line["accuracy"] for line in lines] == [line["accuracy"] for line in expected]
    assert len(elsewhere.lines()) == len(runs)
