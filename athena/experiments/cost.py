"""What a run costs, roughly: to order the runs of a sweep, to tell the time that is left, and what all runs cost."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from athena.experiments import data
from athena.experiments.models import STEP_COST
from athena.experiments.training import Run

GUIDED_COST = 0.3
"""What guidance adds to a step."""
FORWARD_COST = 1 / 3
"""Scoring an image, in steps on it."""


def cost(run: Run) -> int:
    """What a run costs, in training steps of the MLP on one image, roughly: to order runs and to tell the time left.

    A whole number, so that the updates of a progress bar sum exactly to its total.
    """
    images, tested = data.DATA_SETS[run.dataset].train, data.DATA_SETS[run.dataset].test
    trained = images * run.fraction * run.epochs * (1 + GUIDED_COST / run.every * bool(run.factor))
    batches = images * run.fraction / run.batch_size
    looks = run.epochs * batches / max(1, run.window * batches) if run.monitor else 0  # each about as dear as a test
    tests = math.ceil(run.epochs) if run.tested == "each epoch" else 1
    return round((trained + FORWARD_COST * tested * (tests + looks)) * STEP_COST[run.model] + 3000)


def core_hours(lines: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """What training takes on a CPU, in hours of one core: what runs took there, and what those on a GPU would have.

    The second is an estimate: their `cost`, at the median of what a unit of it took in runs of the same network on a
    CPU.

    Args:
        lines: of stores; a run that stands in several counts once.
    """
    costs = {"cpu": defaultdict[str, list[int]](list), "cuda": defaultdict[str, list[int]](list)}
    seconds = defaultdict[str, list[float]](list)
    for line in {line["key"]: line for line in lines}.values():
        run = Run(**line["run"])
        device = "cpu" if line["device"].startswith("cpu") else "cuda"
        costs[device][run.model].append(cost(run))
        if device == "cpu":
            seconds[run.model].append(line["seconds"] * run.threads)
    unit = {
        model: statistics.median(took / its for took, its in zip(seconds[model], costs["cpu"][model], strict=True))
        for model in seconds
    }
    estimated = sum(unit[model] * sum(its) for model, its in costs["cuda"].items())
    return sum(map(sum, seconds.values())) / 3600, estimated / 3600
