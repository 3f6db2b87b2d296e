"""What early stopping does on CIFAR-10, by itself and with a look at the test set, and what guidance does under it.

Not here: the runs themselves (`athena.book.stopping`).
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from athena.book import tables
from athena.book.answers import early_stopping_itself
from athena.book.cifar import FILES, NAMES, Collected, arm_name, compared, thesis
from athena.book.stopping import EPOCHS, WITH, every_arm, named, of_scope, pick
from athena.book.tables import points, shown
from athena.experiments import statistics

__all__ = ["common", "complete", "endpoints", "itself", "itself_said", "test_set", "test_set_gains"]

RULE_ALONE = 0.05
"""Up to this share of the data nearly all runs are stopped, many at chance."""


def itself(runs: Collected) -> pd.DataFrame:
    """What early stopping does to each arm, in points, by share of the data: with it minus without it."""
    shares = sorted(runs.fractions, reverse=True)
    columns = {"data (%)": [f"{100 * share:g}" for share in shares]}
    for scope, factor in every_arm(runs):
        table = compared(pick(runs, scope, [factor], ["none", "validation"]), ("monitor", "none"))
        columns[f"{named(scope, factor)}, {EPOCHS[scope]} epochs"] = [_at(table, share) for share in shares]
    return shown(pd.DataFrame(columns), "data (%)")


def _at(table: pd.DataFrame, share: float) -> str:
    """The difference at one share of the data with its interval, in points."""
    row = table[table["fraction"] == share]
    return points(row.iloc[0]) if len(row) and row["n"].iloc[0] else tables.NOT_RUN


def itself_said(runs: Collected) -> str:
    """What the stored studies say of early stopping in plain training."""
    said = []
    for scope in of_scope(runs):
        own = early_stopping_itself(FILES[scope])
        down, up = own[own["high"] < 0], own[own["low"] > 0]
        worst = own.sort_values("difference").iloc[0]
        said.append(
            f"With at most {EPOCHS[scope]} epochs the rule lowers plain training, with an interval below zero, at "
            f"{len(down)} of {len(own)} shares, and raises it at {len(up)}; the most it costs is {points(worst)} "
            f"points, at {100 * worst['fraction']:g} % of the data."
        )
    told = " ".join(said)
    return f"**By itself the rule of this book is no help.** {told} Another patience would be another experiment."


def test_set(runs: Collected, peeked: Sequence[float]) -> tuple[pd.DataFrame, str]:
    """What a look at the test set adds to each arm, and in how many cells that is shown.

    Args:
        runs: of the chapter.
        peeked: the shares of the data at which the test set is looked at; one or more.
    """
    rows, clear = [], 0
    for scope, factor in every_arm(runs):
        by_tenth, by_none = (
            compared(pick(runs, scope, [factor], [monitor, "test"]), ("monitor", monitor))
            for monitor in ("validation", "none")
        )
        for share in sorted(peeked):
            clear += int((100 * by_none.loc[by_none["fraction"] == share, "low"]).round(2).gt(0).sum())
            rows.append(
                {
                    "arm": named(scope, factor, f"plain, {EPOCHS[scope]} epochs"),
                    "data (%)": f"{100 * share:g}",
                    "test − held-out tenth": _at(by_tenth, share),
                    "test − no stopping": _at(by_none, share),
                }
            )
    return shown(pd.DataFrame(rows), "arm"), (
        f"In {clear} of {len(rows)} cells the interval against no stopping lies above zero: "
        + (
            "there a look at the test set is worth accuracy by itself."
            if clear
            else "no gain from looking at the test set is shown."
        )
    )


def test_set_gains(runs: Collected, peeked: Sequence[float]) -> pd.DataFrame:
    """Guided minus plain by what ends the runs, at the shares of the data at which the test set is looked at."""
    rows = []
    for scope, factor in runs.arms:
        gains = {by: compared(pick(runs, scope, [0, factor], [by])) for by in ("none", "validation", "test")}
        named_by = {"none": "no stopping", "validation": "by the held-out tenth", "test": "by the test set"}
        for share in sorted(peeked):
            row = {"guided": named(scope, factor), "data (%)": f"{100 * share:g}"}
            rows.append(row | {named_by[by]: _at(table, share) for by, table in gains.items()})
    return shown(pd.DataFrame(rows), "guided")


def complete(runs: Collected, seeds: int | None = None) -> dict[str, list[float]]:
    """By scope, the shares of the data at which all runs with early stopping are there.

    Args:
        runs: of the chapter.
        seeds: only those at which so many are planned.
    """
    keys, found = set(runs.frame["key"]), {}
    for scope, wanted in runs.wanted.items():
        own = [run for run in wanted if run.monitor == "validation"]
        found[scope] = [
            share
            for share in runs.fractions
            if all(run.key in keys for run in own if run.fraction == share)
            and seeds in (None, sum(run.fraction == share and not run.factor for run in own))
        ]
    return found


def common(runs: Collected) -> dict[str, list[float]]:
    """By scope, those of the complete shares that the thesis has as well; all of them where the data are others."""
    return {
        scope: [
            share
            for share in shares
            if runs.used != "cifar10" or round(100 * share) in thesis(WITH[scope], runs.used).index
        ]
        for scope, shares in complete(runs).items()
    }


def endpoints(runs: Collected, seeds: int) -> list[tuple[pd.DataFrame | None, list[str]]]:
    """The one number of each arm, over all complete shares and, where they differ, over those with all seeds.

    At the smallest shares the rule is measured and not relevance; in the stored studies they are left out.

    Returns:
        Tables whose p are corrected together, None where no share is complete, with what they are averaged over.
    """
    first, second = complete(runs), complete(runs, seeds)
    above = [
        {
            scope: [share for share in shares if share > RULE_ALONE or not runs.as_planned]
            for scope, shares in of.items()
        }
        for of in ((first,) if first == second else (first, second))
    ]
    measured = [_endpoint(runs, shares) for shares in above if any(shares.values())]
    corrected = iter(statistics.family(*measured) if measured else [])
    found: list[tuple[pd.DataFrame | None, list[str]]] = []
    for shares in above:
        there = [scope for scope in of_scope(runs) if shares[scope]]
        table = None
        if there:
            rows = next(corrected)
            names = [_row_name(runs, row, there) for _, row in rows.iterrows()]
            table = tables.endpoints(rows, names, "with early stopping")
        said = []
        for scope in of_scope(runs):
            listed = ", ".join(f"{100 * share:g}" for share in shares[scope])
            if listed:
                said.append(f"{NAMES[scope].capitalize()}: over {listed} % of the data.")
            elif shares is above[0]:
                said.append(f"{NAMES[scope].capitalize()}: no share is complete, {tables.NOT_RUN}.")
        found.append((table, said))
    return found


def _endpoint(runs: Collected, shares: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Guided minus plain over `shares` of each scope, all arms in one table."""
    parts = [pick(runs, scope, [0, *factors]) for scope, factors in of_scope(runs).items()]
    return compared(
        pd.concat([own[own["fraction"].isin(shares[scope])] for scope, own in zip(of_scope(runs), parts, strict=True)]),
        over="fraction",
    )


def _row_name(runs: Collected, row: pd.Series, there: Sequence[str]) -> str:
    """A table of both scopes tells them by the most epochs; one of a single scope has no such column."""
    scope = next(scope for scope in there if len(there) == 1 or EPOCHS[scope] == row["epochs"])
    return arm_name(scope, row.get("factor", of_scope(runs)[scope][0]))
