"""Paired comparison of runs: differences and ratios with their intervals and p-values, and the verdict they allow.

It computes numbers from a table of finished runs; it trains nothing, reads no files and draws nothing.
"""

from athena.experiments.statistics.chance import chance, coverage, false_verdicts, residuals
from athena.experiments.statistics.comparing import LEVEL, beside, compare, family, ratio, summary, verdict
from athena.experiments.statistics.efficiency import data_efficiency
from athena.experiments.statistics.pairing import paired, run_fields

__all__ = [
    "LEVEL",
    "beside",
    "chance",
    "compare",
    "coverage",
    "data_efficiency",
    "false_verdicts",
    "family",
    "paired",
    "ratio",
    "residuals",
    "run_fields",
    "summary",
    "verdict",
]
