"""Guided training: `Guidance`, and from relevance to the factors that gradients are scaled by."""

from athena.guidance.factors import SCOPES
from athena.guidance.guidance import Guidance
from athena.guidance.scaling import GRANULARITY, NORMALISE, DivergedError, Signal

__all__ = ["GRANULARITY", "NORMALISE", "SCOPES", "DivergedError", "Guidance", "Signal"]
