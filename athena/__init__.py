"""ATHENA: layer-wise relevance propagation for any PyTorch model, and training that is guided by it."""

from importlib import import_module
from typing import Any

from athena import (
    _aliases,  # noqa: F401
    rules,
)
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

# Explaining and guiding need PyTorch alone; modules that need more are imported when they are first asked for.
_MODULES = (
    *("data", "experiments", "figures", "layers", "models", "quality", "statistics", "tables", "training", "widgets"),
)
_NAMES = {"Run": "training", "results": "experiments", "train": "training"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"athena.{name}")
    if name in _NAMES:
        return getattr(import_module(f"athena.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'athena' has no attribute {name!r}")
