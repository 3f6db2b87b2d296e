"""Another value for every field of a run, whatever fields there are."""

from dataclasses import asdict
from typing import Any

from athena import training
from athena.training import Run

TEXT = {"rule": "Zero()", "scope": "convolutional"}


def others(run: Run) -> dict[str, Any]:
    """For each field of `run` a value that it does not have."""

    def other(name: str, value: Any) -> Any:
        if name in training.CHOICES:
            return next(choice for choice in reversed(training.CHOICES[name]) if choice != value)
        if name in training.NUMBERS:
            return value + 1 if training.NUMBERS[name][0] is int else (value or 1.0) / 2
        return TEXT[name]

    return {name: other(name, value) for name, value in asdict(run).items()}
