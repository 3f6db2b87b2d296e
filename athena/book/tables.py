"""Results as a reader of the book meets them in its tables and sentences: percent, points, intervals in brackets.

Not here: how the numbers come about (`athena.statistics`), and figures (`athena.figures`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from athena import experiments
from athena.experiments import statistics

__all__ = [
    "benchmark",
    "by_share",
    "cells",
    "comparison",
    "conditions",
    "endpoints",
    "in_percent",
    "largest",
    "percent",
    "points",
    "possible",
    "quoted",
    "say",
    "shown",
    "signed",
    "testable",
    "title",
    "verdict",
    "wrapped",
]

NOT_RUN = "not yet run"
SPACE = "\N{NO-BREAK SPACE}"
DIGITS = {"ms": 1, "peak MiB": 1, "MiB in step": 1, "calls": 0}
"""Digits after the point in the tables of benchmarks, where they are not 2."""


def percent(value: float, digits: int = 1) -> str:
    """A share from 0 to 1 as ``"93.7 %"``."""
    return f"{100 * value:.{digits}f}{SPACE}%"


def points(row: Mapping[str, Any] | pd.Series, digits: int = 2) -> str:
    """The difference in a row of `statistics.compare` in points with its interval, ``"+0.12 [−0.30, +0.54]"``.

    One pair alone has no interval, and is said to be one: ``"+0.12 (one pair)"``. Where the cell of a table is narrow,
    its line breaks before the interval and not within it.
    """
    difference, low, high = (signed(100 * row[name], digits) for name in ("difference", "low", "high"))
    return f"{difference} (one pair)" if pd.isna(row["low"]) else f"{difference} [{low},{SPACE}{high}]"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, the minus as long as the plus: ``"−0.30"``."""
    return f"{value:+.{digits}f}".replace("-", "−")


def possible(measured: Any) -> Any:
    """A row or a table of `statistics.compare` of accuracies, its intervals ended where no accuracy could be."""
    found = measured.copy()
    found["low"] = np.maximum(measured["low"], -measured["baseline_mean"])
    found["high"] = np.minimum(measured["high"], 1 - measured["baseline_mean"])
    return found


def testable(row: Mapping[str, Any] | pd.Series) -> bool:
    """Whether the pairs of a row of `statistics.compare` are enough for any p below the level that it is tested at."""
    return bool(row["p_least"] < statistics.LEVEL)


def verdict(row: Mapping[str, Any] | pd.Series) -> str:
    """The verdict on a row of `statistics.compare`, with the number of pairs where these are too few for any."""
    found = statistics.verdict(row)
    if found != "cannot be tested":
        return found
    return f"{row['n']:g} pair{'' if row['n'] == 1 else 's'}: {found}" if row["n"] else NOT_RUN


def benchmark(name: str) -> tuple[str, dict[str, pd.DataFrame]]:
    """What a benchmark measured, as it is stored in ``results/benchmarks/``, such as ``"lrp-avx512"``.

    Returns:
        The conditions in one line, and the tables by their titles: the name of an arm in the column `arm`, and its
        numbers in the others, NaN for what was not measured.
    """
    stored = json.loads((experiments.root() / "results" / "benchmarks" / f"{name}.json").read_text("utf8"))
    return conditions(stored["conditions"]), {title(table): pd.DataFrame(table["rows"]) for table in stored["tables"]}


def title(table: Mapping[str, Any]) -> str:
    """The title of a benchmark's table, with how many rounds it is the median of, where that is known."""
    return f"{table['title']}, {table['rounds']} rounds" if table["rounds"] else str(table["title"])


def conditions(given: Mapping[str, Any]) -> str:
    """The conditions of a benchmark in one line; `given` is what stands under that name in its file."""
    return "PyTorch {PyTorch}, {device}, {threads} thread(s), {seconds} time".format_map(given)


def cells(measured: pd.DataFrame) -> pd.DataFrame:
    """A table of a benchmark as text. The cell of a number that was not measured is empty."""
    text = measured.copy()
    for name in map(str, measured.select_dtypes("number")):
        text[name] = measured[name].map(f"{{:.{DIGITS.get(name, 2)}f}}".format)
    return text.replace("nan", "")


def say(text: str) -> None:
    """Prints a sentence that a cell has put together, as Markdown."""
    from IPython.display import Markdown, display  # of the extra `book`

    display(Markdown(text))


def quoted(text: str) -> str:
    """A plan as a quotation in Markdown. Lines that begin with a number or a blank are kept apart."""
    lines = text.strip().splitlines()
    listed = [line.startswith(" ") or line[:2].isdigit() for line in lines]
    ends = ["  " if of or after else "" for of, after in zip(listed, [*listed[1:], False], strict=True)]  # a line break
    return "\n".join(f"> {line.strip()}{end}" for line, end in zip(lines, ends, strict=True))


def wrapped(table: pd.DataFrame, first: str) -> Any:
    """`table` for a page, with the column `first` as the head of its rows, in cells that break their lines."""
    from IPython.display import HTML  # of the extra `book`

    with pd.option_context("display.max_colwidth", None):
        return HTML(shown(table, first).to_html(classes="wraps"))


def shown(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """`table` with the column `first` as the head of its rows."""
    return table.set_index(first).rename_axis(index=None, columns=first)


def by_share(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """`table`, of ``statistics.compare(frame)``, with the column `fraction` that it lacks where all runs share one."""
    if "fraction" in table:
        return table
    return table.assign(fraction=frame["fraction"].iloc[0])[["fraction", *table]]


def detectable(row: Mapping[str, Any] | pd.Series, digits: int = 2) -> str:
    """The difference in points that the pairs of a row of `statistics.compare` could have shown, ``"±0.13"``.

    ``"none"`` where no difference could have been, since no p gets below the level that it is tested at.
    """
    effect = row["detectable"]
    return "" if pd.isna(effect) else "none" if math.isinf(effect) else f"±{100 * effect:.{digits}f}"


def comparison(
    table: pd.DataFrame, published: pd.DataFrame | None = None, fractions: Sequence[float] = ()
) -> pd.DataFrame:
    """One guided arm against plain training, one row for each share of the data, the largest first.

    *p* is that of the one cell, uncorrected: cells are secondary, and get no verdict. Of cells with so few pairs that
    no p gets below 0.05 it says that they cannot be tested. An interval ends where no accuracy could be.

    Args:
        table: rows of `statistics.compare` for that arm, with the column `fraction`.
        published: rows of the thesis's accuracy table to put beside, one for each percent.
        fractions: shares that belong into the table whether or not they have been measured.
    """
    wanted = sorted({*table["fraction"], *fractions}, reverse=True)
    table = table.set_index("fraction").reindex(wanted).reset_index()
    table = possible(table)
    columns = {
        "data (%)": (100 * table["fraction"]).map("{:g}".format),
        "difference": [points(row) if row["n"] > 0 else NOT_RUN for _, row in table.iterrows()],
    }
    theirs = None if published is None else statistics.beside(table, published)
    if theirs is not None:
        columns["thesis diff."] = (100 * theirs["thesis_difference"]).map(signed)
    columns |= {
        "p": [_p_of_one(row) for _, row in table.iterrows()],
        "pairs": table["n"].fillna(0).astype(int),
        "plain": (100 * table["baseline_mean"]).map("{:.2f}".format),
        "guided": (100 * table["mean"]).map("{:.2f}".format),
    }
    if theirs is not None:
        columns |= {
            "thesis plain": (100 * theirs["thesis_plain"]).map("{:.2f}".format),
            "thesis LRP": (100 * theirs["thesis_lrp"]).map("{:.2f}".format),
        }
    return shown(pd.DataFrame(columns).replace({"nan": "", "+nan": ""}), "data (%)")


def _p_of_one(row: pd.Series) -> str:
    """The p of a cell that stands by itself: no other cell makes it untestable."""
    if not row["n"] > 0:
        return ""
    return f"{row['p']:.3f}" if 2.0 ** (1 - row["n"]) < statistics.LEVEL else f"{row['n']:.0f} pairs: cannot be tested"


def endpoints(table: pd.DataFrame, names: Sequence[str], first: str) -> pd.DataFrame:
    """The one number of each arm with its verdict.

    Args:
        table: of ``statistics.compare(..., over="fraction")``.
        names: what to call each of its rows.
        first: the head of the column of names.
    """
    columns = {
        first: list(names),
        "verdict": [verdict(row) for _, row in table.iterrows()],
        "mean difference (points)": [points(row) if row["n"] else NOT_RUN for _, row in table.iterrows()],
        "p": table["p"].map("{:.3f}".format),
        "p (Holm)": [f"{row['p_holm']:.3f}" if testable(row) else "" for _, row in table.iterrows()],
        "could be shown (points)": [detectable(row) for _, row in table.iterrows()],
        "pairs": table["n"],
    }
    return shown(pd.DataFrame(columns).replace("nan", ""), first)


def in_percent(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `statistics.compare` for reading: accuracies in percent, differences in points, three digits of p."""
    shown = table.copy()
    accuracies = ("baseline_mean", "mean", "difference", "low", "high", "detectable")
    for column in (*accuracies, *shown.filter(like="thesis_")):
        shown[column] = (100 * shown[column]).round(2)
    for column in ("p", "p_holm"):
        shown[column] = shown[column].round(3)
    left_out = [column for column in ("unpaired", "refused") if not shown[column].any()]
    shown = shown.drop(columns=["sd", "p_least", *left_out])
    return shown.rename(columns={"baseline_mean": "plain", "mean": "guided"})


def largest(table: pd.DataFrame) -> str:
    """The largest difference in a table of `statistics.compare` by share of the data, and at which share it is."""
    row = table.dropna(subset="difference").sort_values("difference").iloc[-1]
    return f"{points(row)} at {100 * row['fraction']:g} %"
