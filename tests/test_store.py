"""Claims about the store of results."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from sweeps import SEEDS, TINY, line_of

from athena import experiments
from athena.experiments import (
    Store,
    StoreError,
    results,
)
from athena.training import Run


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
