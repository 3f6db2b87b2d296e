"""Runs that differ from a run in every field, whatever fields there are."""

from dataclasses import asdict, replace
from typing import Any

from athena import training
from athena.training import Run

TEXT = {"rule": "Zero()", "scope": "convolutional"}


def unlike(run: Run) -> Run:
    """A run with another value than `run` in each of its fields."""

    def other(name: str, value: Any) -> Any:
        if name in training.CHOICES:
            return next(choice for choice in reversed(training.CHOICES[name]) if choice != value)
        if name in training.NUMBERS:
            return value + 1 if training.NUMBERS[name][0] is int else (value or 1.0) / 2
        return TEXT[name]

    return replace(run, **{name: other(name, value) for name, value in asdict(run).items()})
