"""Claims about sweeps that are ended from outside: workers killed, Ctrl-C, the process killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sweeps import STUDY, TINY, Trainer, swept, until

from athena.experiments import (
    Store,
    StoreError,
    Study,
    SweepError,
    grid,
)
from athena.experiments.backends import processes
from athena.training import Run


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


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_sweep_and_loses_runs_in_flight_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = grid(replace(TINY, epochs=4), seed=range(400))
    seen: list[int] = []

    def kill() -> None:
        if until(lambda: len(store.lines()) >= 3, 60):
            seen.append(len(store.lines()))
            os.kill(_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SweepError, match=r"a worker died .*s\.jsonl"):
        swept(runs, store, workers=2)
    killer.join()
    assert until(lambda: not _children(), 5)
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


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_its_workers_and_nothing_that_was_measured(
    tmp_path: Path, start: Callable[[int], Live]
) -> None:
    _write_study(tmp_path, QUICK, LONG)
    live = start(2)
    assert until(lambda: len(live.store.lines()) == 3, 60)
    with pytest.raises(StoreError, match="being written by another sweep"), live.store.open():
        pass
    lines = live.store.lines()
    os.killpg(live.process.pid, signal.SIGINT)  # what a terminal does
    begin = time.monotonic()
    _, errors = live.process.communicate(timeout=30)
    assert time.monotonic() - begin < 8
    assert live.process.returncode != 0
    assert "Traceback" not in errors
    assert until(lambda: not live.left(), 5)
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
    assert until(ready[moment], 60)
    live.process.kill()
    live.process.wait()
    with live.store.open():  # nobody holds the lock any more
        before = live.store.lines()
    assert until(lambda: not live.left(), 40)  # a worker that starts ends when it has imported PyTorch
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
            assert until(lambda: len(live.store.lines()) >= wanted or live.process.poll() is not None, 60)  # noqa: B023
            moment = chance.uniform(0, 0.3)
        until(lambda: live.process.poll() is not None, moment)  # noqa: B023
        live.process.kill()
        live.process.wait()
        if live.process.returncode == -signal.SIGKILL and len(live.store.lines()) < len(runs):
            kills += 1
        else:  # it was done before: half of it has to be done again
            lines = live.store.path.read_bytes().splitlines(keepends=True)
            live.store.path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert until(lambda: not live.left(), 15)

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
