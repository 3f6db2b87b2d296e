"""ATHENA: layer-wise relevance propagation for any PyTorch model, and training that is guided by it."""

from typing import Any

from athena import rules
from athena._imports import SHORT_NAMES, room
from athena.guidance import DivergedError, Guidance
from athena.propagation.layer import UnsupportedLayer
from athena.relevance import Relevance, lrp

__version__ = "0.1.0"
__all__ = [
    "DivergedError",
    "Guidance",
    "Relevance",
    "Run",
    "UnsupportedLayer",
    "lrp",
    "results",
    "rules",
    "train",
]

# Explaining and guiding need PyTorch alone; modules that need more are imported when they are first asked for.
_MODULES = {"attribution", "book", "evaluation", "experiments", *(name.partition(".")[2] for name in SHORT_NAMES)}
_NAMES = {"Run": "training", "results": "experiments", "train": "training"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return room(f"athena.{name}")
    if name in _NAMES:
        return getattr(room(f"athena.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'athena' has no attribute {name!r}")
