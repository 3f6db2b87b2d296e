"""Who trains the runs of a sweep: this process, worker processes of its own, or the workers of a Dask scheduler."""

import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import loky
import torch

from athena.experiments.training import Run, train

Outcome = dict[str, Any] | Exception
"""The line of a store that a run has measured, or what went wrong."""


def trained(
    runs: Sequence[Run], workers: int | None = None, device: str | None = None, dask: str | None = None
) -> Generator[tuple[Run, Outcome], None, None]:
    """Trains `runs` and yields each with its outcome as soon as it ends. Closing the generator ends the workers.

    Args:
        runs: what to train, in the order in which runs are begun.
        workers: processes at a time; by default as many as the cores and the threads of a run allow. 1 stays in this
            process.
        device: where each run trains; by default a GPU if there is one.
        dask: the address of a Dask scheduler whose workers train instead.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // max((run.threads for run in runs), default=1))
    if dask is None and min(workers, len(runs)) <= 1:
        for run in runs:
            outcome: Outcome
            try:
                outcome = _train(run, device)
            except Exception as error:
                outcome = error
            yield run, outcome
        return
    with processes(min(workers, len(runs))) if dask is None else cluster(dask) as executor:
        futures = {executor.submit(_train, run, device): run for run in runs}
        for future in as_completed(futures):
            problem = future.exception()
            if isinstance(problem, BrokenProcessPool):
                problem = RuntimeError("a worker died (killed, or out of memory: try fewer --workers)")
            if problem is not None and not isinstance(problem, Exception):
                raise problem
            yield futures[future], problem or future.result()


def _train(run: Run, device: str | None) -> dict[str, Any]:
    line = train(run, device).line()
    torch.cuda.empty_cache()  # memory that a process keeps for its next run, another one on the same GPU may need now
    return line


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Worker processes, killed at once if the body raises."""
    executor = loky.ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        yield executor
    except BaseException:
        executor.shutdown(kill_workers=True)
        raise
    executor.shutdown()


def _begin_worker(parent: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends within a second of its parent's death, in the middle of a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler."""
    from distributed import Client  # of the extra `dask`

    with Client(address) as client:
        yield client.get_executor()
