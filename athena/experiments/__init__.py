"""The paper's experiments: runs and training, data and models, studies and their results, statistics."""

from athena.experiments.cost import cost
from athena.experiments.places import root
from athena.experiments.store import Store, StoreError, frame, results
from athena.experiments.study import ARM, Study, grid, listed, plain, published
from athena.experiments.sweep import SweepError, collect, sweep

__all__ = [
    "ARM",
    "Store",
    "StoreError",
    "Study",
    "SweepError",
    "collect",
    "cost",
    "frame",
    "grid",
    "listed",
    "plain",
    "published",
    "results",
    "root",
    "sweep",
]
