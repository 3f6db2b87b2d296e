"""What the planted shortcut's study concludes, ``studies/shortcut.toml``, whose plan says what is compared and why.

Times are those of ``studies/shortcut-time.toml``, measured while nothing else ran.

    runs = shortcut.runs(athena.results("shortcut"))
    shortcut.contrasts(runs)

Not here: the uses of marked images themselves (`marks`), and the data (`data.planted`).
"""

from typing import Any

import numpy as np
import pandas as pd

from athena.experiments import statistics

__all__ = [
    *("ARMS", "ASKED", "BY_MARKS", "CEILING", "CONTRASTS", "HALF", "LEAST_SEEDS", "MARKED"),
    *("arms", "conclusion", "contrasts", "needed", "runs", "times"),
]

MARKED = 30
"""How many marked images the contrasts are about."""
MORE_MARKED = 100
"""How many marked images masking is given in the contrast that asks what it needs."""
CEILING = "no shortcut"
HALF = "half of the loss"
"""Not an arm: for each seed the accuracy half way from plain training to training without a shortcut."""
ARMS: dict[str, dict[str, object]] = {
    "plain": {"use": None, "factor": 0.0, "smoothing": 0.0, "more": False, "fraction": 0.05},
    "label smoothing": {"use": None, "factor": 0.0, "smoothing": 0.1},
    "plain, more time": {"use": None, "factor": 0.0, "smoothing": 0.0, "more": True, "fraction": 0.05},
    "plain, twice the data": {"use": None, "factor": 0.0, "fraction": 0.1},
    "gradients scaled by relevance": {"use": None, "guided": True},
    "masking": {"use": "masking"},
    "marked images alone": {"use": "marked alone", "all": False},
    "gradient penalty": {"use": "gradient off mark"},
    "relevance penalty": {"use": "relevance off mark", "control": None},
    "relevance penalty, marks shuffled": {"use": "relevance off mark", "control": "shuffled"},
    CEILING: {"use": "marked alone", "all": True},
}
"""The arms, by what tells them apart; `more`, `guided` and `all` are more epochs, a factor, and all images marked."""
CONTRASTS: dict[str, tuple[str, int, str, int]] = {
    "A": ("relevance penalty", MARKED, HALF, 0),
    "B": ("relevance penalty", MARKED, "masking", MARKED),
    "C": ("relevance penalty", MARKED, "masking", MORE_MARKED),
    "D": ("relevance penalty", MARKED, "marked images alone", MARKED),
    "E": ("relevance penalty", MARKED, "gradient penalty", MARKED),
    "F": ("relevance penalty", MARKED, "relevance penalty, marks shuffled", MARKED),
}
"""Which arm, with how many marked images, is compared with which."""
NUMBERS = (10, MARKED, MORE_MARKED)
BY_MARKS = ("masking", "marked images alone", "relevance penalty")
"""The arms that were run with all `NUMBERS` of marked images."""
MOST_TIME = 1.5
"""How many times as long as plain training a remedy may take."""
LEAST_SEEDS = 8
"""With fewer seeds no p of six contrasts gets below 0.05."""
ASKED = {
    "half": f"with {MARKED} marked images the relevance penalty wins back at least half of the accuracy lost",
    "in_time": f"in at most {MOST_TIME:g} times the time of plain training",
    "fewer": "with fewer marked images than masking, or training on the marked images alone, needs for it",
    "relevance": "and more than a penalty on the gradient, or on relevance off another image's digit",
}
"""What the plan asks for, by the names that `conclusion` has."""


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of those seeds that every arm has, with the column `arm`; `marked` is 0 where the ceiling is.

    Args:
        frame: ``athena.results("shortcut")``.
    """
    told = frame.assign(
        more=frame["epochs"] > frame["epochs"].min(),
        guided=frame["factor"] != 0,
        all=frame["marked"] > MORE_MARKED,
    )
    frame = frame.assign(arm="")
    for name, fields in ARMS.items():
        equal = [told[field].isna() if value is None else told[field] == value for field, value in fields.items()]
        frame.loc[np.logical_and.reduce(equal), "arm"] = name
    frame["marked"] = frame["marked"].where(frame["arm"] != CEILING, 0)
    counts = frame.groupby("seed")["key"].transform("size")
    return frame[counts == len(ARMS) + (len(NUMBERS) - 1) * len(BY_MARKS)]


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with one row a seed and one column for each (arm, marked), `HALF` among them."""
    table = frame.pivot(index="seed", columns=["arm", "marked"], values="accuracy")
    table[HALF, 0] = (table["plain", 0] + table[CEILING, 0]) / 2
    return table


def contrasts(frame: pd.DataFrame) -> pd.DataFrame:
    """The contrasts of the plan, corrected together.

    Args:
        frame: as `runs` gives it.

    Returns:
        One row of `statistics.compare` for each of `CONTRASTS`, with `contrast`, `arm`, `baseline` in words first.
    """
    accuracy = by_seed(frame)
    (fingerprint,), (device,) = frame["fingerprint"].unique(), frame["device"].unique()
    named, tables = [], []
    for name, (arm, marked, against, of_those) in CONTRASTS.items():
        both = {"treated": accuracy[arm, marked], "baseline": accuracy[against, of_those]}
        long = pd.concat([values.rename("accuracy").reset_index().assign(of=of) for of, values in both.items()])
        long = long[["seed", "accuracy", "of"]].assign(fingerprint=fingerprint, device=device)
        tables.append(statistics.compare(long, {"of": "baseline"}))
        named.append({"contrast": name, "arm": in_words(arm, marked), "baseline": in_words(against, of_those)})
    table = pd.concat(statistics.family(*tables), ignore_index=True)
    return pd.concat([pd.DataFrame(named), table.loc[:, "n":]], axis=1)


def in_words(arm: str, marked: int) -> str:
    """An arm with its number of marked images, ``"masking, 30 marked"``."""
    return f"{arm}, {marked} marked" if marked else arm


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and what is won back of every arm, with Student's intervals over the seeds.

    Args:
        frame: as `runs` gives it.

    Returns:
        One row for each arm and number of marked images, in the order of `ARMS`: `arm`, `marked`; `mean`, `low`,
        `high` accuracy; `won`, `won_low`, `won_high`, the share won back of what the shortcut costs (1: all of it).
    """
    accuracy = by_seed(frame)
    plain = accuracy["plain", 0]
    lost = accuracy[CEILING, 0] - plain
    rows: list[dict[str, Any]] = []
    for name in ARMS:
        for marked in sorted(column[1] for column in accuracy.columns if column[0] == name):
            values = accuracy[name, marked]
            won = (values - plain) / lost
            row: dict[str, Any] = {"arm": name, "marked": marked}
            row |= dict(zip(("mean", "low", "high"), statistics.summary(values.to_numpy()), strict=True))
            row |= dict(zip(("won", "won_low", "won_high"), statistics.summary(won.to_numpy()), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Training time of the remedies over that of plain training with as many steps.

    Args:
        frame: ``athena.results("shortcut-time")``.

    Returns:
        The rows of `statistics.ratio`, with the arm as the index.
    """
    table = statistics.ratio(frame, {"use": None})
    names = {fields["use"]: name for name, fields in ARMS.items() if fields.get("control") is None and fields["use"]}
    names["marked alone"] = "marked images alone"
    return table.set_index(table["use"].map(names).rename("arm"))


def needed(table: pd.DataFrame, arm: str) -> int | None:
    """The least number of marked images with which an arm wins back half, by its whole interval; None if with none.

    Args:
        table: as `arms` gives it.
    """
    enough = table[(table["arm"] == arm) & (table["won_low"] >= 0.5)]
    return None if enough.empty else int(enough["marked"].min())


def conclusion(frame: pd.DataFrame, timed: pd.DataFrame | None) -> dict[str, bool]:
    """What the plan concludes ("what counts").

    Args:
        frame: as `runs` gives it.
        timed: as `times` gives it; None where time is not measured yet, and nothing is said of it.

    Returns:
        `half`: contrast A is a gain; `in_time`: the whole interval of the time lies at or below `MOST_TIME`; `fewer`: B
        and D are gains, and masking and the marked images alone need more marked images; `relevance`: E and F are gains
        as well, so that it is relevance that does it, and not any penalty, or any mask.
    """
    table, means = contrasts(frame), arms(frame)
    gains = {row["contrast"] for _, row in table.iterrows() if statistics.verdict(row) == "gain"}
    ours = needed(means, "relevance penalty")
    theirs = [needed(means, arm) for arm in ("masking", "marked images alone")]
    in_time = {} if timed is None else {"in_time": bool(timed["high"]["relevance penalty"] <= MOST_TIME)}
    return {
        "half": "A" in gains,
        **in_time,
        "fewer": {"B", "D"} <= gains and ours is not None and all(other is None or ours < other for other in theirs),
        "relevance": {"E", "F"} <= gains,
    }
