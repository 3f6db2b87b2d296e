"""Where results are kept: one file of JSON lines for each study.

    results("mnist-factors")                # what has been measured, as a tidy table

Not here: what the numbers mean (`athena.statistics`).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from athena.experiments import places
from athena.experiments.training import Run

COLUMNS = [field.name for field in fields(Run)] + [
    *("key", "accuracy", "seconds", "peak_bytes", "stopped_at", "diverged", "device", "versions", "code"),
    *("fingerprint", "accuracies"),
]
"""The columns of `results`."""


class StoreError(Exception):
    """A results store cannot be read or written; the message names the file, the line and what to do."""


@dataclass(frozen=True)
class Store:
    """A results store: one JSON line for each finished run, written by one process, flushed line by line."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """What has been measured. A last line that was torn by a crash does not count.

        Raises:
            StoreError: a line before the last cannot be read, or is of a newer version of this package.
        """
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        lines = []
        for number, text in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                line = json.loads(text)
                newer = sorted(set(line["run"]) - {field.name for field in fields(Run)})
                if newer:
                    raise StoreError(
                        f"{self.path}, line {number} is of a run with the field {newer[0]!r}, which this version of "
                        "athena does not know: read the store with the version that wrote it"
                    )
                _run(line), line["accuracy"][-1], line["fingerprint"]
                lines.append(line)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"{self.path}, line {number} is damaged ({error}): take it out, and its run is done again"
                ) from error
        return lines

    def runs(self) -> dict[str, dict[str, Any]]:
        """The lines, by the key of their run."""
        return {_run(line).key: line for line in self.lines()}

    @contextmanager
    def open(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends one line and has it on the disk when it returns. One process at a time.

        Raises:
            StoreError: another process has the store open.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"{self.path} is being written by another sweep: wait for it, or stop it first") from None
        try:
            with self.path.open("ab") as file:
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)

                def append(line: dict[str, Any]) -> None:
                    file.write(json.dumps(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())

                yield append
        finally:
            lock.release()

    def frame(self) -> pd.DataFrame:
        """What has been measured as a tidy table; columns as for `results`."""
        return frame(self.lines())


def results(study: str) -> pd.DataFrame:
    """What has been measured of a study, one row for each run.

    Columns: every field of the `Run`; ``accuracy``, on the test set at the end, 0 to 1; ``accuracies``, after each
    epoch; ``seconds``, ``peak_bytes``, ``stopped_at``, ``diverged``, ``device``, ``versions``, ``code``,
    ``fingerprint``, ``key`` as in `athena.training.Result`.

    Raises:
        FileNotFoundError: there is no such store; the message lists those there are.
    """
    store = Store(places.root() / "results" / f"{study}.jsonl")
    if not store.path.exists():
        there = sorted(path.stem for path in store.path.parent.glob("*.jsonl"))
        raise FileNotFoundError(f"nothing has been measured of {study!r} in {store.path.parent}; there is {there}")
    return store.frame()


def frame(lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Lines of a store as a tidy table; columns as for `results`."""
    rows = []
    for line in lines:
        run = _run(line)
        row = {field.name: getattr(run, field.name) for field in fields(Run)}
        row |= {name: value for name, value in line.items() if name != "run"}
        rows.append(row | {"key": run.key, "accuracies": line["accuracy"], "accuracy": line["accuracy"][-1]})
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def _run(line: dict[str, Any]) -> Run:
    return Run(**line["run"])
