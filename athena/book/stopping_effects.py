"""What early stopping does on CIFAR-10, by itself and with a look at the test set, and what guidance does under it.

Not here: the runs themselves (`athena.book.stopping`).
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from athena.book import tables
from athena.book.answers import early_stopping_itself
from athena.book.cifar import FILES, NAMES, Collected, after, arm_name, compared, studies, thesis
from athena.book.saving import saved
from athena.book.stopping import EPOCHS, WITH, WITHOUT, ends, every_arm, named, of_scope, pick
from athena.book.tables import points, shown, signed
from athena.experiments import statistics

__all__ = [
    *("common", "complete", "data_efficiency", "endpoints", "itself", "itself_said"),
    *("patiences", "patiences_said", "patiences_shown", "test_set", "test_set_gains"),
]

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


def patiences() -> pd.DataFrame:
    """What rules of early stopping do to plain training, in the stored runs, beside what the thesis's rule did.

    The rule of the studies was measured. The runs without early stopping hold the test accuracy after each epoch, so
    what a window of one epoch and any patience would have kept of them, looking at the test set, is known as well. The
    looks within an epoch are not stored.

    Returns:
        A row for each rule: `most`, the epochs a run may have; `window` and `patience` in epochs; `looks at`; the
        columns of `athena.statistics.compare`, against three whole epochs, over the shares that the thesis has;
        `least`, the smallest of these, and `at_least`, the difference there; `thesis`, `thesis_at_least`, its own.
    """
    free = pd.concat([study.store.frame() for study in studies().values()]).drop_duplicates("key")
    free = free.query("factor == 0 and precision == 'tf32'").assign(epochs=EPOCHS["all"])
    without = after(free, EPOCHS["all"]).assign(monitor="none")
    rows = []
    for scope in ("all", "linear"):
        theirs = (thesis(WITH[scope])["accuracy_standard"] - thesis(WITHOUT[scope])["accuracy_standard"]).dropna() / 100
        study = studies("-early-stopping")[scope]
        measured = study.store.frame().query("factor == 0 and precision == 'tf32' and monitor == 'validation'")
        rules: list[tuple[float, float, str, pd.DataFrame]]
        rules = [(study.base.window, study.base.patience, "held-out tenth", measured.assign(epochs=EPOCHS["all"]))]
        for epochs in range(1, EPOCHS[scope]):
            kept = [_kept(curve[: EPOCHS[scope]], epochs) for curve in free["accuracies"]]
            rules.append((1, epochs, "test set", free.assign(accuracy=kept)))
        if EPOCHS[scope] > EPOCHS["all"]:  # what more epochs do by themselves
            rules.append((math.nan, math.nan, "nothing", after(free, EPOCHS[scope])))
        for window, patience, looks_at, stopped in rules:
            both = pd.concat([without, stopped.assign(monitor=looks_at)])
            both = both[(100 * both["fraction"]).round().isin(theirs.index)]
            by_share = compared(both, ("monitor", "none")).sort_values("fraction").iloc[0]
            rows.append(
                {"most": EPOCHS[scope], "window": window, "patience": patience, "looks at": looks_at}
                | compared(both, ("monitor", "none"), over="fraction").iloc[0].to_dict()
                | {"least": by_share["fraction"], "at_least": by_share["difference"]}
                | {"thesis": theirs.mean(), "thesis_at_least": theirs[round(100 * by_share["fraction"])]}
            )
    return pd.DataFrame(rows)


def _kept(curve: Sequence[float], patience: int) -> float:
    """The accuracy after the epoch that early stopping keeps, if it looks at that very accuracy."""
    scores = pd.Series(curve, index=range(1, len(curve) + 1))
    return float(scores[ends(scores, patience)[1]])


def patiences_shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `patiences` for reading."""
    rows = [
        {
            "at most": f"{row['most']} epochs",
            "window, patience": "none" if pd.isna(row["window"]) else f"{row['window']:g}, {row['patience']:g}",
            "plain training gains": points(row),
            "in the thesis": signed(100 * row["thesis"]),
            "at the smallest share": f"{signed(100 * row['at_least'])} at {100 * row['least']:g} %",
            "there in the thesis": signed(100 * row["thesis_at_least"]),
            "looks at": row["looks at"],
            "pairs": row["n"],
        }
        for _, row in table.iterrows()
    ]
    return shown(pd.DataFrame(rows), "at most")


def patiences_said(table: pd.DataFrame) -> list[str]:
    """What comes nearest to the thesis's gain among the rules of `patiences` with a window of one epoch."""
    said = []
    for most, rules in table.groupby("most"):
        looked, alone = (rules[rules["looks at"] == at] for at in ("test set", "nothing"))
        gap = (looked["difference"] - looked["thesis"]).abs()
        near = looked[gap <= gap.min() + 1e-12].sort_values("patience").iloc[0]
        found = (
            "no patience changes anything, since each keeps the last of these epochs"
            if not looked["difference"].round(4).any()
            else f"every patience gains {points(near)} points"
            if looked["difference"].round(4).nunique() == 1
            else f"nearest to the thesis is a patience of {near['patience']:g}, which gains {points(near)} points"
        )
        where = "is above the whole interval" if near["thesis"] > near["high"] else "lies in the interval"
        where = "is below the whole interval" if near["thesis"] < near["low"] else where
        said.append(
            f"**With at most {most} epochs**, looked at once an epoch, {found}. The thesis's own gain, "
            f"{signed(100 * near['thesis'])}, {where}."
            + "".join(
                f" As many whole epochs without early stopping gain {points(row)}: it is the longer training that "
                "gains, and not the rule."
                for _, row in alone.iterrows()
                if row["difference"] > near["difference"] / 2
            )
        )
    return said


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
    above = [_without_rule_alone(runs, of) for of in ((first,) if first == second else (first, second))]
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


def data_efficiency(runs: Collected) -> tuple[pd.DataFrame | None, list[str]]:
    """How many times the data guidance saves under early stopping, at the complete shares (thesis figures 7.12, 7.13).

    Returns:
        As `athena.book.saving.saved`; the table is None where no scope has two such shares.
    """
    shares = _without_rule_alone(runs, complete(runs))
    named = {}
    for scope, factors in of_scope(runs).items():
        if len(shares[scope]) > 1:
            for factor in factors:
                own = pick(runs, scope, [0, factor])
                named[arm_name(scope, factor)] = own[own["fraction"].isin(shares[scope])]
    return saved(named) if named else (None, [])


def _without_rule_alone(runs: Collected, shares: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The shares of each scope at which more than the rule is measured."""
    return {scope: [share for share in of if share > RULE_ALONE or not runs.as_planned] for scope, of in shares.items()}


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
