"""The paper's experiments: runs and training, data and models, studies and their results, statistics."""

from athena.experiments.study import (
    ARM,
    Store,
    StoreError,
    Study,
    SweepError,
    collect,
    cost,
    frame,
    grid,
    listed,
    plain,
    published,
    results,
    root,
    sweep,
)

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
