"""Runs that cost nothing, and what takes the place of training them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from athena.experiments import Store, Study, frame, grid, root, sweep
from athena.training import Run

TINY = Run(dataset="mnist5k", fraction=0.02, epochs=1)
SEEDS = grid(TINY, seed=range(4))

STUDY = """
title = "A title"
question = "A question?"
[run]
dataset = "mnist5k"
fraction = 0.02
epochs = 1
[[grid]]
factor = [0, 1]
seed = [0, 1]
[[grid]]
seed = [1, 2]
"""


def line_of(run: Run, fingerprint: str, accuracy: float = 0.5) -> dict[str, Any]:
    """A line as `Result.line` makes it, without training."""
    run_as_json = json.loads(json.dumps({field.name: getattr(run, field.name) for field in fields(Run)}))
    measured = {"accuracy": [accuracy / 2, accuracy], "seconds": 1.0, "peak_bytes": 1, "stopped_at": None}
    about = {"diverged": None, "device": "cpu", "versions": {"torch": "2"}, "code": "0", "fingerprint": fingerprint}
    return {"key": run.key, "run": run_as_json} | measured | about


def as_if_run(
    name: str, gain: Callable[[Run], float] = lambda run: 0.0, seconds: Callable[[Run], float] = lambda run: 1.0
) -> pd.DataFrame:
    """A study as if run: accuracy by seed and share, and what each run gains, in points."""
    runs = Study.read(root() / "studies" / f"{name}.toml").runs
    rng = np.random.default_rng(0)
    of_seed = {seed: rng.normal(0.8, 0.02) for seed in sorted({run.seed for run in runs})}
    lines = []
    for run in runs:
        accuracy = of_seed[run.seed] + run.fraction + gain(run) / 100 + rng.normal(0, 0.0005)
        lines.append(line_of(run, "0" * 16, accuracy) | {"seconds": run.epochs * seconds(run)})
    return frame(lines)


@dataclass
class Trainer:
    """Takes the place of `athena.train` in this process, and writes down what it was asked for."""

    fingerprint: str
    asked: list[Run]
    fails_on: Run | None = None

    def __call__(self, run: Run, device: str | None) -> SimpleNamespace:
        if run == self.fails_on:
            raise ValueError("the run went wrong")
        self.asked.append(run)
        return SimpleNamespace(line=lambda: line_of(run, self.fingerprint))


def swept(runs: list[Run], store: Store, **options: Any) -> list[dict[str, Any]]:
    return sweep(runs, store, **({"workers": 1, "progress": False} | options))


def until(true: Callable[[], Any], seconds: float) -> bool:
    """Waits until `true()` holds, at most for so long."""
    end = time.monotonic() + seconds
    while not (held := bool(true())) and time.monotonic() < end:
        time.sleep(0.02)
    return held
