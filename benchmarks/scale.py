"""How many runs an hour a sweep hands out and stores: with runs that only sleep, on up to a thousand workers.

    python benchmarks/scale.py --out results/benchmarks/scale.json

Each run sleeps in the place of training, so that two cores can hold a thousand of them. Two at a time are processes of
the sweep, as `athena sweep` has them; more are threads of workers of a Dask scheduler, ten each. The sweep, the
scheduler and all workers together are one process each, on one machine; on a cluster each worker has a machine of its
own, so the throughput here is lower than there.

    of ideal       the throughput, over that in which each begins its next run as the last one ends. The clock
                   runs from when each may have ended one: how long they take to start is another matter
    sweep ms       CPU time of the sweep's own process for each run: to hand it out, and to take and store its line
    scheduler ms   the same of the scheduler's process
    workers ms     the same of all workers' process, which on a cluster is shared out among the machines
    store ms       seconds on a clock until a line is on the disk, the median; they are written one after the other
    load           processes that wanted a core before, of this machine's other work too

A process does 1000 / ms runs a second at most, and so does the store. Unlike the throughput, CPU time depends little on
what else the machine does.
"""

import argparse
import asyncio
import functools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import torch

from athena.experiments import Store, backends, data, grid, sweep
from athena.experiments.training import CODE, Run

BASE = Run(dataset="mnist5k", fraction=0.02, epochs=1)
UNWATCHED = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.tick.interval": "1s",
}
"""A worker looks at itself a hundred times a second. A hundred in one process would do little else."""
THREADS = 10
"""Of each worker of Dask. A thousand workers of one thread take too long to start on one machine."""
Cluster = tuple[str, dict[str, psutil.Process]]
"""The address of a scheduler, and its process and that of its workers."""


@dataclass(frozen=True)
class Timed(Store):
    """A store that remembers when some of its lines were on the disk, and the CPU time of processes then.

    Attributes:
        looks: the numbers of these lines.
        processes: those to look at, by name.
        marks: at each of the lines, the time and then the CPU seconds of each process.
        seconds: that each line took to write.
    """

    looks: tuple[int, int]
    processes: dict[str, psutil.Process]
    marks: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """See `Store.open`."""
        with super().open() as append:

            def timed(line: dict[str, Any]) -> None:
                begin = time.monotonic()
                append(line)
                self.seconds.append(time.monotonic() - begin)
                if len(self.seconds) in self.looks:
                    taken = [sum(process.cpu_times()[:2]) for process in self.processes.values()]
                    self.marks.append([time.monotonic(), *taken])

            yield timed


def slept(fingerprint: str, run: Run, device: str | None) -> dict[str, Any]:
    """Takes the place of training: sleeps for the run's epochs in seconds, and returns a line as a run would."""
    time.sleep(run.epochs)
    measured = {"accuracy": [0.5], "seconds": run.epochs, "peak_bytes": 1, "stopped_at": None, "diverged": None}
    about = {"device": "none", "versions": {}, "code": CODE, "fingerprint": fingerprint}
    return {"key": run.key, "run": json.loads(json.dumps(vars(run)))} | measured | about


def serve(address: str | None, workers: int, addresses: Any) -> None:
    """Until this process is killed, a scheduler in it, or workers of the one at `address` with so many threads."""

    async def until_killed() -> None:
        if address is None:
            async with distributed.Scheduler(port=0, dashboard=False) as scheduler:
                addresses.put(scheduler.address)
                await asyncio.Event().wait()
        for _ in range(workers // THREADS):
            await distributed.Worker(address, nthreads=THREADS, memory_limit=0, dashboard=False)
        addresses.put(address)
        await asyncio.Event().wait()

    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set(UNWATCHED):
        asyncio.run(until_killed())


@contextmanager
def cluster(workers: int) -> Iterator[Cluster]:
    """A scheduler whose workers have so many threads; none for two, which are processes of the sweep itself."""
    if workers <= 2:
        yield "", {}
        return
    spawn = multiprocessing.get_context("spawn")
    addresses, address, processes = spawn.Queue(), None, {}
    try:
        for name, count in (("scheduler", 0), ("workers", workers)):
            processes[name] = spawn.Process(target=serve, args=(address, count, addresses))
            processes[name].start()
            address = addresses.get(timeout=600)
        yield str(address), {name: psutil.Process(process.pid) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


def swept(workers: int, seconds: float, rounds: int, folder: Path, of: Cluster) -> dict[str, Any]:
    """One sweep of sleeping runs."""
    address, processes = of
    runs = grid(replace(BASE, epochs=seconds), seed=range(workers * rounds))
    watched = {"sweep": psutil.Process(), **processes}
    store = Timed(folder / f"{workers}-{seconds}.jsonl", (workers, len(runs)), watched)
    backends._train = functools.partial(slept, data.load(BASE.dataset, fraction=1e-6).fingerprint)
    load = os.getloadavg()[0]
    sweep(runs, store, workers=workers, dask=address or None, progress=False)
    took, *cpu = (last - first for first, last in zip(*store.marks, strict=True))
    count = len(runs) - workers
    return {
        "arm": f"{workers} {'threads of Dask' if address else 'processes'}, runs of {seconds:g} s",
        "workers": workers,
        "seconds": seconds,
        "runs": count,
        "runs/h": 3600 * count / took,
        "of ideal": count * seconds / workers / took,
        **{f"{name} ms": 1000 * its / count for name, its in zip(watched, cpu, strict=True)},
        "store ms": 1000 * statistics.median(store.seconds),
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 10, 100, 300, 1000])
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[1, 10], help="what a run takes; below 100 workers the first"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="runs for each process or thread; five times more for two"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers, such as results/benchmarks/scale.json")
    chosen = parser.parse_args()
    conditions = {
        "PyTorch": torch.__version__,
        "Dask": distributed.__version__,
        "device": "cpu",
        "cores": os.cpu_count(),
    }
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        for workers in chosen.workers:
            with cluster(workers) as of:
                for seconds in chosen.seconds if workers >= 100 else chosen.seconds[:1]:
                    rounds = chosen.rounds if workers > 2 else 5 * chosen.rounds
                    rows.append(swept(workers, seconds, rounds, Path(name), of))
                    print(json.dumps(rows[-1]), flush=True)
                    if chosen.out:
                        stored = {"title": "Runs that only sleep", "rounds": chosen.rounds, "rows": rows}
                        text = json.dumps({"conditions": conditions, "tables": [stored]}, indent=1)
                        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    import scale  # by this name, and not as the program, its function is sent to workers as quickly as one of athena is

    scale.main()
