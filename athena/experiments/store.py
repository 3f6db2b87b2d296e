"""Where results are kept: one file of JSON lines for each study.

    results("mnist-factors")                # what has been measured, as a tidy table

Not here: what the numbers mean (`athena.statistics`).
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from athena.experiments import places
from athena.experiments.run import SINCE, Run

COLUMNS = [field.name for field in fields(Run)] + [
    *("key", "accuracy", "seconds", "peak_bytes", "stopped_at", "diverged", "device", "versions", "code"),
    *("fingerprint", "accuracies"),
]
"""The columns of `results`."""


class StoreError(Exception):
    """A results store cannot be read or written; the message names the file, the line and what to do."""


class Divergence(BaseModel):
    """Where a run diverged, as `athena.training.Result` says it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    step: Annotated[int, Field(ge=0)]
    layer: str


class Line(BaseModel):
    """What a line of a store holds: a `Result` but for its network, the key of the run, and a checksum.

    Lines that were written before there was a checksum have none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    key: str
    run: dict[str, Any]
    accuracy: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    seconds: Annotated[float, Field(gt=0)]
    peak_bytes: Annotated[int, Field(ge=0)]
    stopped_at: Annotated[int, Field(ge=1)] | None
    diverged: Divergence | None
    device: str
    versions: dict[str, str]
    code: str
    fingerprint: str
    checksum: str | None = None


def read(text: bytes) -> dict[str, Any]:
    """One line of a store, checked whole, without its checksum.

    Raises:
        ValueError: it is not what a sweep writes; the message says what is wrong with which value.
    """
    try:
        line = json.loads(text, object_pairs_hook=_each_name_once)
        checked = Line.model_validate(line)
        checksum = line.pop("checksum", None)
        if checksum not in (None, _checksum(line)):
            raise ValueError(f"its checksum is {checksum!r}, of what it holds {_checksum(line)!r}")
        run = Run(**checked.run)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the line"
        raise ValueError(f"{place} = {_short(first['input'])}: {first['msg']}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except TypeError as error:  # of Run: a name that is no field of it
        raise ValueError(str(error)) from None
    written = {name: value for name, value in vars(run).items() if name in checked.run or name not in SINCE}
    if json.dumps(written, sort_keys=True) != json.dumps(checked.run, sort_keys=True):
        raise ValueError(f"its run is {_short(checked.run)}, and should be {_short(written)}")
    if checked.key != run.key:
        raise ValueError(f"its key is {checked.key!r}, that of its run {run.key!r}")
    return line


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a name stands twice in {_short(pairs)}")
    return values


def _checksum(line: dict[str, Any]) -> str:
    """8 hex digits of the sha256 of a line, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:8]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


@dataclass(frozen=True)
class Store:
    """A results store: one JSON line for each finished run, written by one process, flushed line by line."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """What has been measured. A last line that was torn by a crash does not count.

        Raises:
            StoreError: the file or a line of it cannot be read, is of a newer version of this package, or is of the
                same run as another.
        """
        whole, _ = self._parts()
        lines: list[dict[str, Any]] = []
        first: dict[str, int] = {}
        for number, text in enumerate(whole, 1):
            try:
                line = read(text)
            except ValueError as error:
                if newer := _newer(text):
                    raise StoreError(
                        f"{self.path}, line {number} has the field {newer!r}, which this version of athena does not "
                        "know: read the store with the version that wrote it"
                    ) from error
                raise StoreError(
                    f"{self.path}, line {number} is damaged ({error}): take it out, and its run is done again"
                ) from error
            if (before := first.setdefault(line["key"], number)) != number:
                raise StoreError(
                    f"{self.path}, line {number} is of the same run as line {before}: take out the one you trust less"
                )
            lines.append(line)
        return lines

    def runs(self) -> dict[str, dict[str, Any]]:
        """The lines, by the key of their run."""
        return {line["key"]: line for line in self.lines()}

    def _parts(self) -> tuple[list[bytes], bytes]:
        """Its lines, and what a crash has left of the last one. A last line that is whole may lack its newline."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return [], b""
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}") from error
        torn = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) and not _is_json(lines[-1]) else b""
        return lines, torn

    @contextmanager
    def open(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends one line and has it on the disk when it returns. One process at a time.

        What a crash has left of a last line is moved into a file beside the store, with a warning.

        Raises:
            StoreError: another process has the store open, or it cannot be written, here or when a line is appended.
        """
        lock = FileLock(self.path.with_suffix(".lock"))
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(
                    f"{self.path} is being written by another sweep: wait for it, or stop it first"
                ) from None
        try:
            with self._writing():
                self._mend()
                file = self.path.open("ab")

            def append(line: dict[str, Any]) -> None:
                with self._writing():
                    file.write(json.dumps(line | {"checksum": _checksum(line)}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())

            try:
                yield append
            finally:
                with suppress(OSError):  # what could not be written has been told by `append`
                    file.close()
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}. What was finished before is in it; the "
                "same sweep goes on from there"
            ) from error

    def _mend(self) -> None:
        """Ends the last line, and moves what cannot be read after it into a file beside this one."""
        lines, torn = self._parts()
        if torn:
            aside = self.path.with_suffix(".torn")
            with aside.open("ab") as file:
                file.write(torn + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.truncate(self.path, sum(map(len, lines)))
            warnings.warn(
                f"the last line of {self.path} is not whole, as after a crash; it is in {aside} now", stacklevel=4
            )
        elif lines and not lines[-1].endswith((b"\n", b"\r")):
            with self.path.open("ab") as file:
                file.write(b"\n")

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
        run = Run(**line["run"])
        row = {field.name: getattr(run, field.name) for field in fields(Run)}
        row |= {name: value for name, value in line.items() if name != "run"}
        rows.append(row | {"accuracies": line["accuracy"], "accuracy": line["accuracy"][-1]})
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def _is_json(text: bytes) -> bool:
    """Whether it is a whole object. A line that was torn never is: its last character closes it."""
    try:
        return isinstance(json.loads(text), dict)
    except RecursionError:
        return True  # whatever it is, it is no line that a crash has torn
    except ValueError:
        return False


def _newer(text: bytes) -> str | None:
    """A field that only a later version of this package can have written, or None."""
    try:
        line = json.loads(text)
        known = {"line": set(Line.model_fields), "run": {field.name for field in fields(Run)}}
        return next(iter(sorted(set(line) - known["line"]) or sorted(set(line["run"]) - known["run"])), None)
    except (RecursionError, KeyError, TypeError, ValueError):
        return None
