"""Claims about the store of results."""

import errno
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import SEEDS, TINY, line_of

from athena import experiments, training
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


@pytest.mark.parametrize("kept", ["half", "all but the last bracket", "nothing but a bracket"])
def test_a_torn_last_line_does_not_count_and_is_set_aside_by_the_next_writer(
    store: Store, fingerprint: str, kept: str
) -> None:
    one, two, three = (line_of(run, fingerprint) for run in SEEDS[:3])
    with store.open() as append:
        append(one)
    text = json.dumps(two)
    torn = {"half": text[: len(text) // 2], "all but the last bracket": text[:-1], "nothing but a bracket": "{"}[kept]
    whole = store.path.read_text()
    store.path.write_text(whole + torn)
    assert store.lines() == [one]
    with pytest.warns(UserWarning, match=r"the last line of .*s\.jsonl is not whole.* in .*s\.torn"), store.open():
        assert store.path.read_text() == whole
    assert store.path.with_suffix(".torn").read_text() == torn + "\n"
    with store.open() as append:
        append(three)
    assert store.lines() == [one, three]


@pytest.mark.parametrize("ending", ["", "\r", "\r\n", "\n"])
def test_a_whole_last_line_counts_whatever_ends_it_and_the_next_comes_after_it(
    store: Store, fingerprint: str, ending: str
) -> None:
    one, two, three = (line_of(run, fingerprint) for run in SEEDS[:3])
    store.path.parent.mkdir()
    text = f"{json.dumps(one)}{ending or chr(10)}{json.dumps(two)}{ending}"
    store.path.write_bytes(text.encode())
    assert store.lines() == [one, two]
    with store.open() as append:
        append(three)
    assert store.lines() == [one, two, three]
    assert store.path.read_bytes().startswith(text.encode())


@pytest.mark.parametrize("content", ['{"key": "12', "my notes"])
def test_a_store_that_is_one_torn_line_is_empty_and_nothing_of_it_is_lost(store: Store, content: str) -> None:
    store.path.parent.mkdir()
    store.path.write_text(content)
    assert store.lines() == [] and store.frame().empty
    for _ in range(2):
        with pytest.warns(UserWarning, match="not whole"), store.open():
            assert store.path.read_text() == ""
        store.path.write_text(content)
    assert store.path.with_suffix(".torn").read_text() == f"{content}\n{content}\n"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an accuracy above 1": ({"accuracy": [7.3]}, r"accuracy\.0 = 7\.3"),
    "an accuracy below 0": ({"accuracy": [0.5, -1]}, r"accuracy\.1 = -1"),
    "an accuracy as text": ({"accuracy": ["0.5"]}, r"accuracy\.0 = '0\.5'"),
    "a truth value as accuracy": ({"accuracy": [True]}, r"accuracy\.0 = True"),
    "text for accuracies": ({"accuracy": "0.5"}, "accuracy = '0.5'"),
    "no accuracy": ({"accuracy": []}, r"accuracy = \[\]"),
    "an accuracy that is no number": ({"accuracy": [float("nan")]}, r"accuracy\.0 = nan"),
    "seconds below 0": ({"seconds": -1.0}, r"seconds = -1\.0"),
    "infinite seconds": ({"seconds": float("inf")}, "seconds = inf"),
    "seconds beyond every float": ({"seconds": 10**400}, "seconds = 1000"),
    "no seconds": ({"seconds": None}, "seconds = None"),
    "a step that is no number": ({"stopped_at": "7"}, "stopped_at = '7'"),
    "a divergence without its layer": ({"diverged": {"step": 1}}, r"diverged\.layer"),
    "the key of another run": ({"key": SEEDS[1].key}, f"its key is '{SEEDS[1].key}', that of its run '{TINY.key}'"),
    "a version that is no text": ({"versions": {"torch": 2}}, r"versions\.torch = 2"),
    "a checksum of something else": ({"checksum": "0123abcd"}, "its checksum is '0123abcd', of what it holds"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_that_says_what_no_run_can_have_measured_is_refused(store: Store, fingerprint: str, wrong: str) -> None:
    values, message = WRONG[wrong]
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line_of(TINY, fingerprint) | values))
    with pytest.raises(StoreError, match=r"s\.jsonl, line 1 is damaged .*" + message):
        store.lines()


@pytest.mark.parametrize("name", ["accuracy", "seconds", "fingerprint", "key", "run", "versions", "code", "diverged"])
def test_a_line_that_lacks_a_field_is_refused(store: Store, fingerprint: str, name: str) -> None:
    line = line_of(TINY, fingerprint)
    del line[name]
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line))
    with pytest.raises(StoreError, match=rf"line 1 is damaged \({name} = .*Field required"):
        store.lines()


@pytest.mark.parametrize("values", [{"seed": 1}, {"factor": 0}, {"seed": True}, {"rule": "Epsilon(1e-6)"}, {}])
@pytest.mark.parametrize("gone", [(), ("dataset",), ("factor",)])
def test_a_run_is_read_as_a_sweep_writes_it_or_not_at_all(
    store: Store, fingerprint: str, values: dict[str, Any], gone: tuple[str, ...]
) -> None:
    line = line_of(TINY, fingerprint)
    line["run"] = {name: value for name, value in (line["run"] | values).items() if name not in gone}
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line))
    if values or gone:
        with pytest.raises(StoreError, match="line 1 is damaged"):
            store.lines()
    else:
        assert store.lines() == [line]


def test_a_run_without_a_field_that_came_later_is_read(store: Store, fingerprint: str) -> None:
    line = line_of(TINY, fingerprint)
    for name in training.SINCE:
        del line["run"][name]
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line))
    assert store.lines() == [line]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000 + "]" * 100_000, "line 1 is damaged"),
        ('{"run": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        ('{"key": "1", "key": "2"}', "a name stands twice"),
    ],
)
def test_what_no_sweep_writes_is_refused_with_its_line(store: Store, text: str, message: str) -> None:
    store.path.parent.mkdir()
    store.path.write_text(text + "\n")
    with pytest.raises(StoreError, match=message):
        store.lines()


@pytest.mark.parametrize("name", ["seed", "factor", "epochs", "threads"])
def test_a_number_of_a_run_beyond_every_float_is_refused(store: Store, fingerprint: str, name: str) -> None:
    line = line_of(TINY, fingerprint)
    line["run"][name] = 10**400
    store.path.parent.mkdir()
    store.path.write_text(json.dumps(line))
    with pytest.raises(StoreError, match=rf"line 1 is damaged \(Run\({name}=1000"):
        store.lines()


def test_a_run_that_stands_twice_is_told_by_both_lines(store: Store, fingerprint: str) -> None:
    lines = [line_of(run, fingerprint) for run in (*SEEDS[:2], SEEDS[0])]
    store.path.parent.mkdir()
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StoreError, match="line 3 is of the same run as line 1"):
        store.lines()


def test_one_changed_character_of_a_line_is_noticed(store: Store, fingerprint: str) -> None:
    with store.open() as append:
        append(line_of(replace(TINY, factor=0.1), fingerprint, accuracy=0.8437))
    (line,), text = store.lines(), store.path.read_bytes()
    for place in range(len(text) - 1):
        for character in b"7x":
            store.path.write_bytes(text[:place] + bytes([character]) + text[place + 1 :])
            try:
                read = store.lines()
            except StoreError:
                continue
            assert read == [line], text[place - 10 : place + 10]


def test_what_the_system_refuses_is_said_in_a_sentence(
    store: Store, fingerprint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.open() as append:
        append(line_of(SEEDS[0], fingerprint))
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(StoreError, match=r"s\.jsonl cannot be written: No space left.*goes on from there"):
            append(line_of(SEEDS[1], fingerprint))
    inside = Store(store.path / "below a file.jsonl")
    with pytest.raises(StoreError, match="cannot be written"), inside.open():
        pass
    with pytest.raises(StoreError, match="cannot be read: Not a directory"):
        inside.lines()
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        Store(store.path.parent).lines()


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
    for newer in (line | {"run": line["run"] | {"momentum": 0.9}}, line | {"momentum": 0.9}):
        store.path.write_text(json.dumps(newer) + "\n")
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
