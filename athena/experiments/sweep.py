"""The resumable sweep: trains the runs that a store does not hold, and appends each result as it comes.

    study = Study.read("studies/mnist-factors.toml")
    sweep(study.runs, study.store)          # runs what is missing, cheapest first

Not here: one run (`athena.training`), and who trains it (`athena.experiments.backends`).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from athena.experiments import data
from athena.experiments.backends import SweepError, trained
from athena.experiments.cost import cost
from athena.experiments.data import DataError
from athena.experiments.store import Store, frame
from athena.experiments.study import Study
from athena.experiments.training import CODE, Run


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

    However a sweep is stopped, it loses at most the runs that are being trained; the same call goes on with the rest.

    Args:
        runs: what is wanted.
        store: where to append.
        workers: processes at a time; by default as many as the cores and the threads of a run allow. 1 stays in this
            process.
        device: where each run trains; by default a GPU if there is one.
        dask: the address of a Dask scheduler whose workers train instead.
        also: stores whose lines are taken over for runs that `store` lacks.
        progress: whether to say what is taken over and to draw a progress bar; the time left is estimated from `cost`.

    Returns:
        One line of the store for each of `runs`, in their order.

    Raises:
        athena.data.DataError: a data set is not here, before anything is run.
        StoreError: see `Store`.
        SweepError: the data differ from those of the store; the Dask scheduler cannot be reached, or was lost; or a
            run failed, raised after all others have ended.
        ValueError: `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: it must be at least 1")
    with store.open() as append:
        done = store.runs()
        missing = sorted({run.key: run for run in runs if run.key not in done}.values(), key=cost)
        fingerprints = _fingerprints(missing, done.values())
        wanted = {run.key: run for run in missing}
        for other in also if wanted else ():
            taken = []
            for key, line in other.runs().items():
                if key in wanted and line["fingerprint"] == fingerprints[wanted[key].dataset]:
                    append(line)
                    done[key] = line
                    del wanted[key]
                    taken.append(line)
            if taken and progress:
                print(_taken_over(taken, other), file=sys.stderr)
        missing = list(wanted.values())
        failed: list[tuple[Run, Exception]] = []
        # closing: if anything is raised here, the workers are killed at once and not waited for
        with _bar(missing, len(runs), progress) as advance, closing(trained(missing, workers, device, dask)) as ended:
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
    """A lock on `folder`, taken once no other process holds it; prints if it has to wait. A dead process holds none."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "turn.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print("Another chapter is training; this one goes on as soon as it has ended ...", flush=True)
        return lock.acquire()


def _fingerprints(missing: Iterable[Run], lines: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The fingerprint of each data set that `missing` needs, after a check that the store's lines have the same one."""
    here = {name: data.load(name, fraction=1e-6).fingerprint for name in sorted({run.dataset for run in missing})}
    for line in lines:
        name = line["run"]["dataset"]
        if here.get(name, line["fingerprint"]) != line["fingerprint"]:
            raise SweepError(
                f"the store was measured on {name} with fingerprint {line['fingerprint']}, the data here have "
                f"{here[name]}: results on different data are not mixed. Use the same data, or another store"
            )
    return here


def _taken_over(lines: Sequence[dict[str, Any]], store: Store) -> str:
    """In words: what is not measured anew, and by which code it was."""
    codes = sorted({line["code"] for line in lines})
    by = "this code" if codes == [CODE] else f"code {', '.join(codes)}; this is {CODE}"
    return f"{len(lines)} runs are taken over from {store.path.name}, measured by {by}"


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
