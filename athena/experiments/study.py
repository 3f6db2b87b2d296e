"""Studies: grids of runs written down as TOML, the resumable sweep that runs them, and the store that keeps them.

    study = Study.read("studies/mnist-factors.toml")
    sweep(study.runs, study.store)          # runs what is missing, cheapest first
    results("mnist-factors")                # what has been measured, as a tidy table

Not here: one run (`athena.training`), what the numbers mean (`athena.statistics`).
"""

import ast
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import tomllib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from athena.experiments import data
from athena.experiments.data import DataError
from athena.experiments.training import Run, train

__all__ = [
    "ARM",
    "Store",
    "StoreError",
    "Study",
    "SweepError",
    "collect",
    "frame",
    "grid",
    "listed",
    "plain",
    "published",
    "results",
    "root",
    "sweep",
]

ARM: tuple[str, ...] = ("factor", "rule", "target", "scope", "normalise", "granularity", "every", "control")
"""The fields of a `Run` that say how it is guided: all that a guided run and its plain partner differ in."""

COLUMNS = [field.name for field in fields(Run)] + [
    *("key", "accuracy", "seconds", "peak_bytes", "stopped_at", "diverged", "device", "versions", "code"),
    *("fingerprint", "accuracies"),
]
"""The columns of `results`."""
IMAGES = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "mnist5k": (4_000, 1_000), "mnistm5k": (4_000, 1_000)}
"""How many there are to train on, and to test on."""
STEP_COST = {"mlp": 1.0, "cnn": 45.0}
GUIDED_COST = 0.3
"""What guidance adds to a step."""
FORWARD_COST = 1 / 3
"""Scoring an image, in steps on it."""


class StoreError(Exception):
    """A results store cannot be read or written; the message names the file, the line and what to do."""


class SweepError(Exception):
    """A sweep had to stop; all that was measured is in the store, and the same sweep goes on from there."""


def root() -> Path:
    """The folder that holds ``studies/`` and ``results/``: the checkout of this package, else the current folder."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "studies").is_dir() else Path.cwd()


def plain(run: Run) -> Run:
    """The plain run that `run` is compared with: factor 0, and nothing else that only guidance reads."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Run) if field.name in ARM}
    return replace(run, **(defaults | {"factor": 0.0}))


def grid(base: Run, **values: Iterable[Any]) -> list[Run]:
    """Every combination of `values` over `base`, each run once; with factor 0 it is the `plain` run.

    Raises:
        TypeError, ValueError: a name is no field of `Run`, or a value none that the field takes.
    """
    for name, wanted in values.items():
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise TypeError(f"{name} = {wanted!r}: a grid takes a list of values")
    runs = [replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
    return list(dict.fromkeys(run if run.factor else plain(run) for run in runs))


@dataclass(frozen=True)
class Study:
    """One experiment: its runs, in words and as a grid.

    Attributes:
        name: the file's name without ``.toml``; the store has the same.
        title, question: for readers.
        plan: what was decided before the first run: contrasts, endpoint, test, what counts as success; or None.
        base: what all its runs share, as one `Run`.
        runs: every run, once.
        thesis_table: the thesis table it repeats, a value of the column `table` in the published numbers, or None.
    """

    name: str
    title: str
    question: str
    base: Run
    runs: tuple[Run, ...]
    thesis_table: str | None = None
    plan: str | None = None

    @classmethod
    def read(cls, path: Path | str) -> "Study":
        """Reads a study: ``title``, ``question``, ``[run]`` with what all runs share, and one or more ``[[grid]]``.

        Raises:
            ValueError: the file is not of that form; the message names the file and the entry.
        """
        path = Path(path)
        try:
            text = tomllib.loads(path.read_text())
            base = Run(**text.pop("run"))
            runs = [run for values in text.pop("grid") for run in grid(base, **values)]
            return cls(path.stem, base=base, runs=tuple(dict.fromkeys(runs)), **text)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a study: {error}") from error

    @property
    def store(self) -> "Store":
        """Where its results are kept."""
        return Store(root() / "results" / f"{self.name}.jsonl")


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
    store = Store(root() / "results" / f"{study}.jsonl")
    if not store.path.exists():
        there = sorted(path.stem for path in store.path.parent.glob("*.jsonl"))
        raise FileNotFoundError(f"nothing has been measured of {study!r} in {store.path.parent}; there is {there}")
    return store.frame()


def collect(study: Study, runs: Sequence[Run]) -> pd.DataFrame:
    """The results of `runs`, as `results` gives them: what the study's store holds, and the rest trained now.

    What is trained goes into a store of its own, ``results/local/``, so that it is trained once. Where a run is
    missing and its data set cannot be had, all of `runs` are done on the stand-in (`athena.data.stand_in`); the
    column `dataset` tells. Chapters that train at the same time take turns: each would take all the cores, and two
    may want the same runs.
    """
    held = study.store.runs()
    if all(run.key in held for run in runs):
        return frame(held[run.key] for run in runs)
    at_hand = {name: data.at_hand(name) for name in {run.dataset for run in runs}}
    local = Store(study.store.path.parent / "local" / f"{study.name}.jsonl")
    with _turn(local.path.parent):
        return frame(sweep([replace(run, dataset=at_hand[run.dataset]) for run in runs], local, also=[study.store]))


def _turn(folder: Path) -> AbstractContextManager[Any]:
    """Waits, and says so, until no other process holds the turn of `folder`; a process that dies gives it up."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "turn.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print("Another chapter is training; this one goes on as soon as it has ended ...", flush=True)
        return lock.acquire()


def listed(value: str | Sequence[Any]) -> list[Any]:
    """A list that may have come as text, as papermill's ``-p factors '[0, 1.0]'`` passes it.

    Raises:
        ValueError: the text is no list of numbers or words.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        return list(found)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"{value!r} is no list; write one such as '[0, 1.0, 10.0]'") from None


def published(name: str) -> pd.DataFrame:
    """The thesis's own numbers: ``"accuracy"`` (percent), ``"training_time"`` (seconds) or ``"claims"``.

    Raises:
        FileNotFoundError: this is no checkout of the project; the numbers come with the book.
    """
    return pd.read_csv(root() / "book" / "thesis" / f"{name}.csv", dtype={"table": str, "section": str})


def frame(lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Lines of a store as a tidy table; columns as for `results`."""
    rows = []
    for line in lines:
        run = _run(line)
        row = {field.name: getattr(run, field.name) for field in fields(Run)}
        row |= {name: value for name, value in line.items() if name != "run"}
        rows.append(row | {"key": run.key, "accuracies": line["accuracy"], "accuracy": line["accuracy"][-1]})
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def sweep(
    runs: Sequence[Run],
    store: Store,
    *,
    workers: int | None = None,
    device: str | None = None,
    dask: str | None = None,
    also: Iterable[Store] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains those of `runs` that the store does not hold, cheapest first, and appends each as it ends.

    A sweep that is stopped in any way loses the runs in flight alone; the same call goes on with the rest.

    Args:
        runs: what is wanted.
        store: where to append.
        workers: processes at a time; by default as many as the cores and the threads of a run allow. 1 stays in this
            process.
        device: where each run trains; by default a GPU if there is one.
        dask: the address of a Dask scheduler whose workers train instead.
        also: stores whose lines are taken over for runs that `store` lacks.
        progress: whether to draw a bar, with the time left by the cost of what is left.

    Returns:
        One line of the store for each of `runs`, in their order.

    Raises:
        athena.data.DataError: a data set is not here, before anything is run.
        StoreError: see `Store`.
        SweepError: the data are others than those of the store; or, once all the others have ended, a run failed.
    """
    with store.open() as append:
        done = store.runs()
        missing = sorted({run.key: run for run in runs if run.key not in done}.values(), key=cost)
        fingerprints = _fingerprints(missing, done.values())
        wanted = {run.key: run for run in missing}
        for other in also:
            for key, line in other.runs().items():
                if key in wanted and line["fingerprint"] == fingerprints[wanted[key].dataset]:
                    append(line)
                    done[key] = line
                    del wanted[key]
        missing = list(wanted.values())
        failed: list[tuple[Run, Exception]] = []
        # closed at once when anything is raised here, or workers in flight would be waited for
        with _bar(missing, len(runs), progress) as advance, closing(_trained(missing, workers, device, dask)) as ended:
            for run, outcome in ended:
                expected = fingerprints[run.dataset]
                if isinstance(outcome, Exception):
                    failed.append((run, outcome))
                elif outcome["fingerprint"] != expected:
                    there = (
                        f"the worker has {run.dataset} with fingerprint {outcome['fingerprint']}, here it is {expected}"
                    )
                    failed.append((run, DataError(f"{there}; results on different data are not mixed")))
                else:
                    append(outcome)
                    done[run.key] = outcome
                advance(run)
    if failed:
        run, error = failed[0]
        raise SweepError(
            f"{len(failed)} of {len(missing)} runs failed, the first, {run}, with {type(error).__name__}: {error}. "
            f"What was finished is in {store.path}; the same sweep goes on from there."
        ) from error
    return [done[run.key] for run in runs]


def cost(run: Run) -> int:
    """What a run costs, in training steps of the MLP on one image, roughly: to order runs and to tell the time left.

    A whole number, so that the parts of a progress bar add up to its end.
    """
    images, tested = IMAGES[run.dataset]
    trained = images * run.fraction * run.epochs * (1 + GUIDED_COST / run.every * bool(run.factor))
    batches = images * run.fraction / run.batch_size
    looks = run.epochs * batches / max(1, run.window * batches) if run.monitor else 0  # each about as dear as a test
    tests = math.ceil(run.epochs) if run.tested == "each epoch" else 1
    return round((trained + FORWARD_COST * tested * (tests + looks)) * STEP_COST[run.model] + 3000)


def _run(line: dict[str, Any]) -> Run:
    return Run(**line["run"])


def _train(run: Run, device: str | None) -> dict[str, Any]:
    line = train(run, device).line()
    torch.cuda.empty_cache()  # what a process keeps for its next run, another one on the same GPU may need now
    return line


def _trained(
    runs: Sequence[Run], workers: int | None, device: str | None, dask: str | None
) -> Generator[tuple[Run, dict[str, Any] | Exception], None, None]:
    """Trains `runs` and yields each as it ends, with its line or what went wrong."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // max((run.threads for run in runs), default=1))
    if dask is None and min(workers, len(runs)) <= 1:
        for run in runs:
            outcome: dict[str, Any] | Exception
            try:
                outcome = _train(run, device)
            except Exception as error:
                outcome = error
            yield run, outcome
        return
    with _processes(min(workers, len(runs))) if dask is None else _cluster(dask) as executor:
        futures = {executor.submit(_train, run, device): run for run in runs}
        for future in as_completed(futures):
            problem = future.exception()
            if isinstance(problem, BrokenProcessPool):
                problem = RuntimeError("a worker died (killed, or out of memory: try fewer --workers)")
            if problem is not None and not isinstance(problem, Exception):
                raise problem
            yield futures[future], problem or future.result()


def _fingerprints(missing: Iterable[Run], lines: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The fingerprint of each data set that is missing runs, the same as in the store's lines."""
    here = {name: data.load(name, fraction=1e-6).fingerprint for name in sorted({run.dataset for run in missing})}
    for line in lines:
        name = line["run"]["dataset"]
        if here.get(name, line["fingerprint"]) != line["fingerprint"]:
            raise SweepError(
                f"the store was measured on {name} with fingerprint {line['fingerprint']}, the data here have "
                f"{here[name]}: results on different data are not mixed. Use the same data, or another store"
            )
    return here


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Worker processes, which are ended at once if the sweep is."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    executor.shutdown()


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler."""
    from distributed import Client  # of the extra `dask`

    with Client(address) as client:
        yield client.get_executor()


def _begin_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _bar(missing: Sequence[Run], wanted: int, progress: bool) -> Iterator[Callable[[Run], None]]:
    shape = "{percentage:3.0f}% |{bar}| {desc} [{elapsed}, {remaining} left]"
    with tqdm(total=sum(map(cost, missing)), bar_format=shape, smoothing=0, disable=not (progress and missing)) as bar:
        done = wanted - len(missing)

        def advance(run: Run) -> None:
            nonlocal done
            done += 1
            bar.set_description_str(f"{done} of {wanted} runs", refresh=False)
            bar.update(cost(run))

        bar.set_description_str(f"{done} of {wanted} runs")
        yield advance
