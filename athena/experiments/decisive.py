"""The three contrasts of the decisive experiment, ``studies/decisive.toml``, whose plan says what they are and why.

Not here: the verdict on each claim of the thesis (`claims`).
"""

import numpy as np
import pandas as pd

from athena.experiments import statistics

__all__ = ["ARMS", "PROTOCOLS", "WORTHWHILE", "arms", "conclusions", "contrasts", "runs"]

PROTOCOLS = {"thesis's protocol": "constant", "OneCycle": "onecycle"}
"""The two protocols, by the schedule that tells them apart."""
ARMS: dict[str, dict[str, object]] = {
    "plain": {"factor": 0.0, "smoothing": 0.0, "more": False},
    "plain, equal time": {"factor": 0.0, "smoothing": 0.0, "more": True},
    "R of the predicted class": {"factor": -0.5, "target": "predicted", "control": None},
    "R of the true class": {"factor": -0.5, "target": "label", "control": None},
    "R of the true class, shuffled": {"factor": -0.5, "target": "label", "control": "shuffled"},
    "gradient × activation": {"factor": 0.5, "control": "gradient_activation"},
    "smoothing": {"factor": 0.0, "smoothing": 0.1, "more": False},
    "smoothing, equal time": {"factor": 0.0, "smoothing": 0.1, "more": True},
    "smoothing and R of the true class": {"factor": -0.25, "smoothing": 0.1, "control": None},
    "smoothing and gradient × activation": {"factor": 0.25, "smoothing": 0.1},
}
"""The ten arms, in the order of the plan, by what tells them apart; `more` is the time that guidance takes."""
CONTRASTS: dict[str, tuple[str, str, dict[str, object]]] = {
    "A": ("R of the true class", "R of the true class, shuffled", {"control": "shuffled"}),
    "B": ("R of the true class", "gradient × activation", {"control": "gradient_activation"}),
    "C": ("smoothing and R of the true class", "smoothing, equal time", {"factor": 0.0}),
}
"""Which arm is compared with which, and what tells the second, the baseline, from the first."""
WORTHWHILE = 0.003
"""The least gain of contrast C, as a fraction of 1, that the plan calls worth using."""


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of those seeds that every arm and share has, with the columns `arm` and `protocol`.

    Args:
        frame: ``athena.results("decisive")``.
    """
    frame = frame.assign(arm="", protocol=frame["schedule"].map({value: name for name, value in PROTOCOLS.items()}))
    more = frame["epochs"] > 3
    for name, fields in ARMS.items():
        equal = [more == value if field == "more" else _is(frame[field], value) for field, value in fields.items()]
        frame.loc[np.logical_and.reduce(equal), "arm"] = name
    cells = len(ARMS) * len(PROTOCOLS) * frame["fraction"].nunique()
    counts = frame.groupby("seed")["key"].transform("size")
    return frame[counts == cells]


def _is(column: pd.Series, value: object) -> "pd.Series[bool]":
    return column.isna() if value is None else column == value


def contrasts(frame: pd.DataFrame) -> pd.DataFrame:
    """The three contrasts under each protocol, corrected together.

    Args:
        frame: as `runs` gives it.

    Returns:
        Six rows of `statistics.compare`, with the columns `contrast`, `protocol`, `arm` and `baseline` first.
    """
    named, tables = [], []
    for protocol in PROTOCOLS:
        for name, (arm, against, baseline) in CONTRASTS.items():
            part = frame[(frame["protocol"] == protocol) & frame["arm"].isin([arm, against])]
            settings = baseline | ({"epochs": part["epochs"].max()} if "equal time" in against else {})
            part = part.drop(columns=["arm", "protocol"])
            tables.append(statistics.compare(part, settings, over="fraction"))
            named.append({"contrast": name, "protocol": protocol, "arm": arm, "baseline": against})
    table = pd.concat(statistics.family(*tables), ignore_index=True)
    measured = table[["n", *table.columns[list(table.columns).index("baseline_mean") :]]]
    return pd.concat([pd.DataFrame(named), measured.loc[:, ~measured.columns.duplicated()]], axis=1)


def conclusions(table: pd.DataFrame) -> tuple[dict[str, bool], bool]:
    """What the plan concludes ("what counts").

    Args:
        table: as `contrasts` gives it.

    Returns:
        For each protocol, whether relevance is what helps: contrasts A and B are both gains. And whether it is worth
        using: C is a gain of at least `WORTHWHILE` under OneCycle.
    """
    found = {(row["contrast"], row["protocol"]): statistics.verdict(row) == "gain" for _, row in table.iterrows()}
    of_use = table[(table["contrast"] == "C") & (table["protocol"] == "OneCycle")].iloc[0]
    helps = {protocol: found["A", protocol] and found["B", protocol] for protocol in PROTOCOLS}
    return helps, bool(found["C", "OneCycle"] and of_use["difference"] >= WORTHWHILE)


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each arm over shares and seeds, with Student's interval over seeds.

    Args:
        frame: as `runs` gives it.
    """
    by_seed = frame.groupby(["arm", "protocol", "seed"])["accuracy"].mean()
    rows = [
        (arm, protocol, *statistics.summary(by_seed[arm, protocol].to_numpy()))
        for arm in ARMS
        for protocol in PROTOCOLS
    ]
    return pd.DataFrame(rows, columns=["arm", "protocol", "mean", "low", "high"])
