"""A verdict for each claim of the thesis's chapter 7, drawn from the stored runs.

    claims()        # one row for each reading of each claim

Where the thesis leaves open what a number belongs to, a claim has several readings. All readings that are a difference
are one family, with one correction of p over all of them. Not here: the numbers of the thesis (`published`), and how an
interval, a p or a verdict comes about (`athena.statistics`).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from athena.experiments import statistics
from athena.experiments.statistics.pairing import Floats, cells
from athena.experiments.store import results
from athena.experiments.study import published

__all__ = ["Reading", "claims", "readings"]

FIRST = "mnist-first"
FACTORS = "mnist-factors"
TF32: dict[str, Any] = {"precision": "tf32"}
STOPPED: dict[str, Any] = {"precision": "tf32", "monitor": "validation"}
BEYOND_THE_RULE = (0.05, 1.0)
"""Shares of the data at which early stopping does more than stop nearly every run, many of them at chance."""


@dataclass(frozen=True)
class Reading:
    """One way to read a claim.

    Attributes:
        claim: its number, or two that are one comparison.
        of: what is measured: ``"mean"`` of the differences over the shares of the data, ``"largest"`` of them,
            ``"ratio"`` of the training times, ``"data"``, how many times as much plain training needs.
        study: whose runs.
        guided: fields of the guided runs.
        says: the published difference in points or the published ratio; None where the claim has no number.
        both: fields of all runs that are compared.
        shares: above the first and up to the second.
        epochs: after which the accuracy is taken; two numbers, the gain from the first to the second; None, the last.
        note: what to know of this reading.
    """

    claim: str
    of: str
    study: str
    guided: Mapping[str, Any]
    says: float | None = None
    both: Mapping[str, Any] = field(default_factory=dict)
    shares: tuple[float, float] = (0.0, 1.0)
    epochs: int | tuple[int, int] | None = None
    note: str = ""

    @property
    def words(self) -> str:
        """What is measured, for a reader."""
        guided = ", ".join(
            f"{value:g}" if name == "factor" else f"{value} start" for name, value in self.guided.items()
        )
        above, upto = (f"{100 * share:g}" for share in self.shares)
        shares = "" if self.shares == (0.0, 1.0) else f", above {above} and up to {upto} % of the data"
        what = {"mean": "mean difference", "largest": "largest difference", "ratio": "time", "data": "times the data"}
        return f"factor {guided}: {what[self.of]}{shares}" + (f" ({self.note})" if self.note else "")


def readings() -> list[Reading]:
    """Every reading of every claim, in the order of the claims."""
    says = published("claims").set_index("id")["number"]
    first = [
        Reading("C1, C2", "mean", FIRST, {"factor": factor, "target": target}, says["C1"] - says["C2"])
        for factor in (0.1, 1.0)
        for target in ("softmax", "logits")
    ]
    time = Reading("C3, C4", "ratio", "mnist-time", {"factor": 0.1}, says["C3"] / says["C4"], shares=(0.01, 0.05))
    factors = [
        Reading(claim, of, FACTORS, {"factor": scale * factor}, says.get(claim) if number else None, shares=shares)
        for claim, factor, of, shares, number in (
            ("C5", 1.0, "largest", (0.0, 1.0), True),
            ("C6", 2.0, "largest", (0.0, 1.0), True),
            ("C7", 2.0, "mean", (0.0, 1.0), True),
            ("C8", 10.0, "largest", (0.0, 0.3), True),
            ("C9", 10.0, "mean", (0.0, 0.3), True),
            ("C10", 10.0, "mean", (0.3, 1.0), False),
        )
        for scale in (1.0, 0.1)
    ]
    few = (0.01, 0.3)
    cifar = [
        Reading("C11", "mean", "cifar-whole", {"factor": 0.1}, None, TF32, epochs=(3, 4), note="the fourth epoch"),
        Reading("C11", "mean", "cifar-whole", {"factor": 0.1}, None, TF32, few, (3, 4), "the fourth epoch"),
        Reading("C12", "mean", "cifar-whole", {"factor": 0.001}, says["C12"], TF32, epochs=3),
        Reading("C13", "largest", "cifar-linear", {"factor": 0.1}, says["C13"], TF32, epochs=3),
        Reading("C13", "mean", "cifar-linear", {"factor": 0.1}, says["C13"], TF32, (0.4, 0.5), 3, "at 50 %"),
        Reading("C14", "mean", "cifar-linear", {"factor": 0.1}, says["C14"], TF32, epochs=3),
        Reading("C14", "mean", "cifar-linear", {"factor": 0.1}, says["C14"], TF32, few, 3),
    ]
    early = "cifar-linear-early-stopping"
    stopped = [
        Reading("C15", "mean", early, {"factor": 0.1}, says["C15"], STOPPED, (0.01, 1.0)),
        Reading("C15", "mean", early, {"factor": 0.1}, says["C15"], STOPPED, BEYOND_THE_RULE),
        Reading("C16", "largest", early, {"factor": 0.1}, says["C16"], STOPPED, BEYOND_THE_RULE),
        Reading("C17", "mean", "cifar-whole-early-stopping", {"factor": 0.1}, None, STOPPED, BEYOND_THE_RULE),
    ]
    costs = [
        Reading("C18", "ratio", "mnist-time", {"factor": 0.1}, says["C18"], shares=(0.5, 1.0)),
        Reading(
            *("C19", "ratio", "cifar-whole", {"factor": 0.1}, says["C19"], TF32, (0.9, 1.0)),
            note="many runs at a time on one GPU",
        ),
        Reading("C20", "data", early, {"factor": 0.1}, says["C20"], STOPPED, BEYOND_THE_RULE),
    ]
    return [*first, time, *factors, *cifar, *stopped, *costs]


def claims() -> pd.DataFrame:
    """One row for each reading of each claim of the thesis's chapter 7.

    Pairs may be of two versions of the package, whose numbers agree to the last digit wherever both have run.

    Returns:
        Columns
        claim, section: as in ``published("claims")``.
        reading: what was measured to answer it.
        published: in points, or a ratio; NaN where the claim has no number.
        measured, low, high: the same of the stored runs, with Student's interval. That of a largest is the interval of
            its share of the data, chosen because it is the largest, and so on the high side.
        n: pairs.
        p: sign-flip test of no effect; for a largest, how often a flip of the signs of seeds makes as large a largest.
        p_holm: p corrected over all rows that are a mean or a largest.
        p_published: sign-flip test of the published number; of a mean alone.
        detectable: the mean that would have been shown with a probability of 80 %, in points.
        controls: what was run beside it, or why that would decide nothing.
        verdict: as `athena.statistics.verdict`; of times and data, in words.
        study: whose runs; ``athena sweep studies/NAME.toml`` runs them again.
    """
    sections = published("claims").set_index("id")["section"]
    chosen = readings()
    tables = [_table(reading) for reading in chosen]
    tested = [table for reading, table in zip(chosen, tables, strict=True) if reading.of in ("mean", "largest")]
    corrected = iter(statistics.family(*tested))
    rows = []
    for reading, table in zip(chosen, tables, strict=True):
        row = (next(corrected) if reading.of in ("mean", "largest") else table).iloc[0]
        words = reading.words + (f", at {100 * row['share']:g} %" if reading.of == "largest" else "")
        about = {"claim": reading.claim, "section": sections[reading.claim.split(",")[0]], "reading": words}
        rows.append(about | _measured(reading, row) | {"study": reading.study})
    return pd.DataFrame(rows)


def _runs(reading: Reading) -> pd.DataFrame:
    """The runs that a reading compares: its guided ones and plain ones."""
    frame = results(reading.study)
    for name, value in reading.both.items():
        frame = frame[frame[name] == value]
    guided = np.logical_and.reduce([frame[name] == value for name, value in reading.guided.items()])
    frame = frame[(frame["factor"] == 0) | guided]
    above, upto = reading.shares
    frame = frame[frame["fraction"].between(above, upto, inclusive="right")]
    if isinstance(reading.epochs, tuple):
        before, after = (frame["accuracies"].str[epoch - 1] for epoch in reading.epochs)
        return frame.assign(accuracy=after - before)
    return frame if reading.epochs is None else frame.assign(accuracy=frame["accuracies"].str[reading.epochs - 1])


def _table(reading: Reading) -> pd.DataFrame:
    """What the statistics say of one reading, in one row."""
    frame = _runs(reading)
    over = "fraction" if frame["fraction"].nunique() > 1 else None
    if reading.of == "ratio":
        return statistics.ratio(frame, any_code=True)
    if reading.of == "data":
        return statistics.data_efficiency(frame, any_code=True)
    table = statistics.compare(
        frame, over=over, any_code=True, published=None if reading.says is None else reading.says / 100
    )
    if reading.of == "largest":
        (cell,) = cells(frame, {"factor": 0}, "accuracy", over=over, same=("device",))
        plain, guided = np.moveaxis(cell.by_level(), 2, 0)
        place, p = _largest(guided - plain)
        difference, low, high = statistics.summary((guided - plain)[:, place])
        table = table.assign(
            difference=difference, low=low, high=high, p=p, share=float(str(cell.levels[place])), p_published=np.nan
        )
    return table


def _measured(reading: Reading, row: pd.Series) -> dict[str, Any]:
    """The columns of `claims` that one row of statistics gives."""
    if reading.of in ("ratio", "data"):
        kept = {
            "published": reading.says,
            "measured": row["ratio"],
            "low": row["low"],
            "high": row["high"],
            "n": row["n"],
        }
        said = {
            "ratio": "another machine and implementation; lower here"
            if row["high"] < (reading.says or 0)
            else "as much",
            "data": "less data" if row["low"] > 1 else "no saving of data shown",
        }
        return kept | {"controls": "", "verdict": said[reading.of]}
    verdict = statistics.verdict(row)
    return {
        "published": np.nan if reading.says is None else reading.says,
        **{"measured": 100 * row["difference"], "low": 100 * row["low"], "high": 100 * row["high"], "n": row["n"]},
        **{"p": row["p"], "p_holm": row["p_holm"]},
        "p_published": row.get("p_published", np.nan),
        "detectable": np.nan if reading.of == "largest" else 100 * row["detectable"],
        "controls": "open" if verdict == "gain" else "decide nothing: no gain over plain training",
        "verdict": verdict,
    }


def _largest(differences: Floats) -> tuple[int, float]:
    """The place of the largest mean, and how often a flip of the signs of seeds gives as large a one.

    Args:
        differences: (seeds, shares).
    """
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    largest = (signs @ differences / len(differences)).max(axis=1)
    means = differences.mean(axis=0)
    return int(means.argmax()), float((largest >= means.max() - 1e-12).mean())
