"""ATHENA: layer-wise relevance propagation for any PyTorch model, and training that is guided by it."""

from importlib import import_module
from typing import Any

from athena import rules
from athena.guidance import DivergedError, Guidance
from athena.interception import UnsupportedLayer
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

# Explaining and guiding need PyTorch alone; the rooms that need more are imported when they are first asked for.
_ROOMS = (
    *("data", "experiments", "figures", "layers", "models", "quality", "statistics", "tables", "training", "widgets"),
)
_HOMES = {"Run": "training", "results": "experiments", "train": "training"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"athena.{name}")
    if name in _HOMES:
        return getattr(import_module(f"athena.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'athena' has no attribute {name!r}")
