"""Who trains the runs of a sweep: this process, worker processes of its own, or the workers of a Dask scheduler."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import loky
import torch

from athena.experiments.training import Run, train

ANSWER_SECONDS = 8
"""How long a Dask scheduler may take to answer."""
Outcome = dict[str, Any] | Exception
"""The line of a store that a run has measured, or what went wrong."""


class SweepError(Exception):
    """A sweep had to stop; all that was measured is in the store, and the same sweep goes on from there."""


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

    Raises:
        SweepError: Dask is not installed, or its scheduler does not answer, or was lost.
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
            try:
                problem = future.exception()
            except CancelledError as error:  # Dask gives up all that it was asked for
                raise SweepError(
                    f"the Dask scheduler at {dask} was lost. What was finished is stored; the same sweep goes on from "
                    "there"
                ) from error
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
    """The workers of a Dask scheduler.

    Raises:
        SweepError: Dask is not installed, or the scheduler does not answer.
    """
    try:
        from distributed import Client, rpc  # of the extra `dask`
    except ImportError as error:
        raise SweepError(f"--dask needs the package distributed: pip install -e '.[dask]' ({error})") from error

    async def workers() -> int:
        async with rpc(address) as scheduler:
            return len((await scheduler.identity())["workers"])

    try:  # a `Client` waits for ever on something that takes the connection and says nothing
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop in this one
            there = thread.submit(lambda: asyncio.run(asyncio.wait_for(workers(), ANSWER_SECONDS))).result()
    except Exception as error:  # whatever answers there may answer anything
        raise SweepError(
            f"no Dask scheduler answers at {address} within {ANSWER_SECONDS} s: see that it runs there, and that this "
            "machine reaches it"
        ) from error
    if not there:
        print(f"The Dask scheduler at {address} has no workers yet; runs begin when it has.", file=sys.stderr)
    with Client(address) as client:
        yield client.get_executor()
