"""What a run costs, roughly: to order the runs of a sweep, and to tell the time that is left."""

import math

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
