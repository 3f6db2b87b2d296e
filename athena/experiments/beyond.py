"""What is asked of the uses of an explanation: the search, the confirmation, and the comparison of chapters 4 and 5.

The plans are in ``studies/search.toml``, ``confirm.toml``, ``future.toml`` and the files that begin with ``uses``. Not
here: the uses themselves (`uses`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from athena.experiments import statistics
from athena.experiments.decisive import WORTHWHILE
from athena.experiments.run import Run
from athena.experiments.study import plain

__all__ = [
    *(
        "COMPARED",
        "CONFIRMED",
        "FAMILIES",
        "FURTHER",
        "FUTURE",
        "Compared",
        "chosen",
        "compared",
        "confirmed",
        "contrast",
    ),
    *("found", "future", "named", "of_arm", "optimisers", "proposals", "worth"),
]

FAMILIES: dict[str, str] = {
    "features": "features weighted",
    "dropout": "dropout",
    "excitation dropout": "dropout",
    "hiding": "hiding pixels",
    "agreement": "maps that agree",
    "gradient times relevance": "gradients of weights",
    "gradient times |weight|": "gradients of weights",
    "sampling": "choosing samples",
    "weighting": "weighting samples",
    "retraining": "retraining on mistakes",
}
"""The family of each use; a run that scales gradients is of "scaling gradients", a plain one of "baselines"."""
WITHOUT_RELEVANCE = ("dropout", "gradient times |weight|")
"""Uses that need no explanation."""
SCORES_WITHOUT_RELEVANCE = ("low confidence", "EL2N", "loss", "random", "equal")


def of_arm(frame: pd.DataFrame, arm: Mapping[str, Any]) -> pd.DataFrame:
    """The runs of `frame` whose fields are those of `arm`; fields of the arm's use or guidance not named are default.

    Args:
        frame: as `athena.results` returns it.
        arm: values of fields of `Run`.
    """
    base = plain(Run())
    names = "factor", "use", "control", "score", "granularity", "learn_every", "smoothing", "epochs"
    wanted = {name: getattr(base, name) for name in names}
    chosen = np.ones(len(frame), dtype=bool)
    for name, value in (wanted | dict(arm)).items():
        chosen &= (frame[name].isna() if value is None else frame[name] == value).to_numpy(dtype=bool)
    return frame[chosen]


def contrast(treated: pd.DataFrame, baseline: pd.DataFrame, over: str | None = None) -> pd.DataFrame:
    """One row of `statistics.compare`: runs of one arm minus those of another, paired by seed.

    Args:
        treated, baseline: runs of one arm each, which may differ in any field of `Run`.
        over: the column averaged out, as for `statistics.compare`.

    Raises:
        ValueError: the arms do not differ, or hold runs of several settings.
    """
    fields = [name for name in statistics.run_fields(baseline) if name not in ("seed", over, "accuracy")]
    values = {name: (_only(treated, name), _only(baseline, name)) for name in fields}
    differing = {name: ours for name, (theirs, ours) in values.items() if theirs != ours}
    if not differing:
        raise ValueError(f"both arms are the same: {values}")
    table = statistics.compare(pd.concat([treated, baseline]), differing, over=over)
    return table[["n", *table.columns[list(table.columns).index("baseline_mean") :]]]


def _only(frame: pd.DataFrame, name: str) -> Any:
    values = {None if isinstance(value, float) and np.isnan(value) else value for value in frame[name]}
    if len(values) != 1:
        raise ValueError(f"an arm has one {name}, here are {sorted(map(str, values))}")
    return values.pop()


def named(run: Mapping[str, Any] | pd.Series) -> str:
    """What a run does with an explanation, in a few words."""
    use, control, score = (None if pd.isna(run[name]) else run[name] for name in ("use", "control", "score"))
    start = "R of the true class" if run["target"] == "label" else "R of the predicted class"
    signal = {None: start, "shuffled": f"{start}, shuffled", "gradient_activation": "gradient × activation"}.get(
        control, str(control)
    )
    if use is None and not run["factor"]:
        smoothing = f"smoothing {run['smoothing']:g}" if run["smoothing"] else "no smoothing"
        moved = f"moved by {run['shifts']} pixel" if run["shifts"] else ""
        rate = f"rate {run['learning_rate']:g}" if run["learning_rate"] not in (1e-3, 2e-3) else ""
        epochs = f"{run['epochs']:g} epochs" if run["epochs"] != 3 else ""
        parts = filter(None, (smoothing, moved, rate, epochs))
        return ", ".join(parts)
    if use is None:
        by = ", by neuron" if run["granularity"] == "neuron" else ""
        return f"{signal}, factor {run['factor']:g}{by}"
    if score is not None:
        return f"{score}{', shuffled' * (control == 'shuffled')}, {run['strength']:g}"
    if use == "hiding":
        return f"{'any pixels' if control == 'noise' else 'the most relevant'}, {100 * run['strength']:g} %"
    if use == "gradient times relevance":
        return f"times relevance{', shuffled' * (control == 'shuffled')}"
    if use in ("gradient times |weight|", "dropout"):
        return {"dropout": f"ordinary, {run['strength']:g}"}.get(use, "times the weight's magnitude")
    if use == "agreement":
        return f"penalty {run['strength']:g}"
    return f"{signal}, {run['strength']:g}"


def family_of(run: Mapping[str, Any] | pd.Series) -> str:
    """The family of the search that a run belongs to."""
    if pd.isna(run["use"]):
        return "scaling gradients" if run["factor"] else "baselines"
    return FAMILIES[run["use"]]


def needs_relevance(run: Mapping[str, Any] | pd.Series) -> bool:
    """Whether a run is a use of relevance, and neither a control nor a baseline."""
    if not pd.isna(run["control"]) or (pd.isna(run["use"]) and not run["factor"]):
        return False
    return run["use"] not in WITHOUT_RELEVANCE and run["score"] not in SCORES_WITHOUT_RELEVANCE


def found(frame: pd.DataFrame) -> pd.DataFrame:
    """What the search found, one row a setting, the best first.

    Args:
        frame: ``athena.results("search")``.

    Returns:
        `family`, `setting`, `relevance` (whether it is a use of relevance), `n` and `mean` (held-out accuracy);
        `difference`, `low` and `high` to the baseline of the same smoothing, steps and
        rate, paired by seed, with Student's interval. Exploratory: nothing is corrected.
    """
    fields = [name for name in statistics.run_fields(frame) if name not in ("seed", "accuracy")]
    base = of_arm(frame, {"smoothing": 0.1})
    base = base[(base["shifts"] == 0) & (base["learning_rate"] == 2e-3)]
    rows = []
    settings = pd.Series([str(values) for values in frame[fields].itertuples(index=False)], frame.index)
    for _, runs in frame.groupby(settings, sort=False):
        first = runs.iloc[0]
        row: dict[str, Any] = {
            **{"family": family_of(first), "setting": named(first), "relevance": needs_relevance(first)},
            **{"n": len(runs), "mean": runs["accuracy"].mean()},
        }
        if set(runs["key"]) != set(base["key"]):
            measured = contrast(runs, base).iloc[0]
            row |= {name: measured[name] for name in ("difference", "low", "high")}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("mean", ascending=False, ignore_index=True)


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """What the plan of the search chooses: the best use of relevance, and the second if it is of another family.

    Args:
        table: as `found` gives it.
    """
    uses = table[table["relevance"]]
    return uses.head(2).drop_duplicates("family")


SMOOTHED = {"smoothing": 0.1}
CONFIRMED_ARMS: dict[str, Mapping[str, Any]] = {
    "a": SMOOTHED,
    "b": SMOOTHED | {"epochs": 3.5},
    "c": SMOOTHED | {"factor": -0.25},
    "d": SMOOTHED | {"factor": -0.25, "control": "shuffled"},
    "e": SMOOTHED | {"factor": 0.25, "control": "gradient_activation"},
}
"""The arms of ``studies/confirm.toml``, by the letters of its plan."""
CONFIRMED: dict[str, tuple[str, str, bool]] = {
    "damping by relevance minus the baseline of the same time": ("c", "b", True),
    "damping by relevance minus its shuffle": ("c", "d", True),
    "damping by relevance minus gradient × activation": ("c", "e", True),
    "damping by relevance minus the baseline of the same steps": ("c", "a", False),
    "the baseline of the same time minus that of the same steps": ("b", "a", False),
    "gradient × activation minus the baseline of the same time": ("e", "b", False),
}
"""Its contrasts: two arms, and whether the plan judges them."""


def confirmed(frame: pd.DataFrame) -> pd.DataFrame:
    """The contrasts of the confirmation, those that are judged corrected together.

    Args:
        frame: ``athena.results("confirm")``.

    Returns:
        One row a contrast: `compared`, `judged`, the columns of `statistics.compare`, and `verdict`, empty where the
        plan asks for none.
    """
    return _contrasts(frame, CONFIRMED_ARMS, CONFIRMED)


def _contrasts(
    frame: pd.DataFrame, fields: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, tuple[str, str, bool]]
) -> pd.DataFrame:
    """The contrasts of a plan, each seed's mean over the shares of the data; those that are judged are one family."""
    arms = {name: of_arm(frame, values) for name, values in fields.items()}
    found = {name: contrast(arms[ours], arms[theirs], over="fraction") for name, (ours, theirs, _) in wanted.items()}
    judged = [name for name, (_, _, is_judged) in wanted.items() if is_judged]
    found |= dict(zip(judged, statistics.family(*(found[name] for name in judged)), strict=True))
    table = pd.concat(found.values(), ignore_index=True)
    table.insert(0, "compared", list(found))
    table.insert(1, "judged", [name in judged for name in found])
    verdicts = [statistics.verdict(row) if row["judged"] else "" for _, row in table.iterrows()]
    return table.assign(verdict=verdicts)


LEARNED = {"factor": 1.0, "learn_every": 5}
FILTERS = {"granularity": "filter"}
FUTURE_ARMS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "learned": LEARNED,
    "learned, shuffled": LEARNED | {"control": "shuffled"},
    "learned, gradient": LEARNED | {"control": "gradient_activation"},
    "filters, 1": FILTERS | {"factor": 1.0},
    "filters, 1, shuffled": FILTERS | {"factor": 1.0, "control": "shuffled"},
    "filters, -0.5": FILTERS | {"factor": -0.5},
    "filters, -0.5, shuffled": FILTERS | {"factor": -0.5, "control": "shuffled"},
}
"""The arms of ``studies/future.toml``."""
FUTURE: dict[str, tuple[str, str, bool]] = {
    "learned factors minus plain": ("learned", "plain", True),
    "learned factors minus the same, R shuffled": ("learned", "learned, shuffled", True),
    "learned factors minus the same, gradient × activation": ("learned", "learned, gradient", True),
    "filters, factor 1 minus plain": ("filters, 1", "plain", True),
    "filters, factor 1 minus the same, R shuffled": ("filters, 1", "filters, 1, shuffled", True),
    "filters, factor -0.5 minus plain": ("filters, -0.5", "plain", True),
    "filters, factor -0.5 minus the same, R shuffled": ("filters, -0.5", "filters, -0.5, shuffled", True),
}
"""Its contrasts, all judged: those of each proposal begin with the same words."""
PROPOSALS = ("learned factors", "filters, factor 1", "filters, factor -0.5")


def future(frame: pd.DataFrame) -> pd.DataFrame:
    """The contrasts of the thesis's own proposals (8.3.1 and 8.3.2), corrected together.

    Args:
        frame: ``athena.results("future")``.

    Returns:
        As `confirmed`.
    """
    return _contrasts(frame, FUTURE_ARMS, FUTURE)


def proposals(table: pd.DataFrame) -> dict[str, bool]:
    """Whether each proposal helps, by the rule of the plan: all of its contrasts are gains.

    Args:
        table: as `future` gives it.
    """
    own = {
        name: table[table["compared"].str.startswith(f"{name} ") | table["compared"].str.startswith(f"{name},")]
        for name in PROPOSALS
    }
    return {name: bool((rows["verdict"] == "gain").all()) for name, rows in own.items()}


def worth(table: pd.DataFrame) -> bool:
    """Whether the plan calls the use worth it: all judged contrasts are gains, the first of at least `WORTHWHILE`.

    Args:
        table: as `confirmed` gives it.
    """
    judged = table[table["judged"]]
    return bool((judged["verdict"] == "gain").all() and judged["difference"].iloc[0] >= WORTHWHILE)


@dataclass(frozen=True)
class Compared:
    """One use in the comparison of chapter 4.

    Attributes:
        name: in a table.
        section: of the thesis, or the paper.
        arm, control: fields of its runs and of those of its control; without one it stands in for nothing.
        against: the control in words.
    """

    name: str
    section: str
    arm: Mapping[str, Any]
    against: str = ""
    control: Mapping[str, Any] = field(default_factory=dict)


def _half(use: str, score: str, **more: Any) -> dict[str, Any]:
    return {"use": use, "score": score, "strength": 0.5, **more}


SCALED = {"factor": -0.5, "target": "label"}
FEATURES = {"use": "features", "target": "label"}
DROPPED = {"use": "excitation dropout", "strength": 0.5}
ORDINARY = {"use": "dropout", "strength": 0.5}
HIDDEN = {"use": "hiding", "strength": 0.1}
OPTIMISER = {"use": "gradient times relevance"}
CHANCE = ("samples by chance", _half("sampling", "random"))
COMPARED: tuple[Compared, ...] = (
    Compared("sampling: largest relevance", "4.1", _half("sampling", "largest relevance"), *CHANCE),
    Compared("sampling: total relevance", "4.1", _half("sampling", "total relevance"), *CHANCE),
    Compared("sampling: low confidence", "", _half("sampling", "low confidence"), *CHANCE),
    Compared("sampling: EL2N", "", _half("sampling", "EL2N"), *CHANCE),
    Compared(
        "weighting: masked difference",
        "5.1",
        _half("weighting", "masked difference"),
        "its weights shuffled",
        _half("weighting", "masked difference", control="shuffled"),
    ),
    Compared(
        "weighting: local difference",
        "5.1",
        _half("weighting", "local difference"),
        "its weights shuffled",
        _half("weighting", "local difference", control="shuffled"),
    ),
    Compared("weighting: loss", "", _half("weighting", "loss")),
    Compared(
        "retraining: masked difference",
        "5.1",
        _half("retraining", "masked difference"),
        "equal weights",
        _half("retraining", "equal"),
    ),
    Compared(
        "retraining: local difference",
        "5.1",
        _half("retraining", "local difference"),
        "equal weights",
        _half("retraining", "equal"),
    ),
    Compared("features × (1 + R)", "", FEATURES, "R shuffled", FEATURES | {"control": "shuffled"}),
    Compared("dropout of what is relevant", "", DROPPED | {"target": "predicted"}, "ordinary dropout", ORDINARY),
    Compared(
        "dropout of what is relevant, true class", "", DROPPED | {"target": "label"}, "ordinary dropout", ORDINARY
    ),
    Compared("hiding what is relevant", "", HIDDEN, "hiding any pixels", HIDDEN | {"control": "noise"}),
    Compared("gradient × relevance", "5.2", OPTIMISER, "R shuffled", OPTIMISER | {"control": "shuffled"}),
    Compared("gradient × |weight|", "5.2", {"use": "gradient times |weight|"}),
    Compared(
        "scaling gradients, factor -0.5",
        "6.1",
        SCALED,
        "gradient × activation",
        {"factor": 0.5, "control": "gradient_activation"},
    ),
    Compared("scaling gradients, factor 1", "6.1", SCALED | {"factor": 1.0}),
    Compared("label smoothing", "", {"smoothing": 0.1}),
)
"""The uses compared in ``studies/uses.toml``, each with its control."""
FURTHER: dict[str, str] = {
    "uses-mnist-10": "10 % of MNIST",
    "uses-mnistm5k": "digits on photographs",
    "uses-cifar10": "5 % of CIFAR-10",
}
"""The studies that ask the same of other data, and what it is."""


def compared(frame: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """The comparison of uses by the plan of ``studies/uses.toml``.

    Args:
        frame: ``athena.results("uses")``, or that of one of `FURTHER`.
        timed: ``athena.results("uses-time")``.

    Returns:
        One row for each of `COMPARED` that `frame` holds: `use`, `section` and `relevance` (whether it is a use of it);
        `time`, median training seconds over those of plain training; `epochs` of the plain training of at least the
        same time; `difference`, `low`, `high`, `p_holm`, `p_least`, `verdict` against that; the same with the ending
        ``_control`` against the control `against`; and `helps`, by the rule of the plan.
    """
    shares = frame["fraction"].nunique()
    longer = {epochs: of_arm(frame, {"epochs": epochs}) for epochs in (3.0, 3.75, 4.5, 6.0)}
    plain_seconds = _seconds(timed, {})
    times = {epochs: _seconds(timed, {"epochs": epochs}) / plain_seconds for epochs in longer}
    rows, first, second = [], [], []
    uses = [use for use in COMPARED if len(of_arm(frame, use.arm))]
    for use in uses:
        runs = of_arm(frame, use.arm)
        time = _seconds(timed, use.arm) / plain_seconds
        epochs = next((epochs for epochs in longer if times[epochs] >= time), 6.0)
        first.append(contrast(runs, longer[epochs], over="fraction" if shares > 1 else None))
        if use.control:
            second.append(contrast(runs, of_arm(frame, use.control), over="fraction" if shares > 1 else None))
        rows.append(
            {"use": use.name, "section": use.section, "relevance": needs_relevance(runs.iloc[0])}
            | {"time": time, "epochs": epochs, "against": use.against}
        )
    own, controls = iter(statistics.family(*first)), iter(statistics.family(*second))
    for row, use in zip(rows, uses, strict=True):
        row |= _measured(next(own))
        if use.control:
            row |= {f"{name}_control": value for name, value in _measured(next(controls)).items()}
        row["helps"] = row["verdict"] == "gain" and row.get("verdict_control", "gain") == "gain"
    return pd.DataFrame(rows)


def optimisers(frame: pd.DataFrame) -> pd.DataFrame:
    """Optimisers, and relevance in them (thesis 5.2), one row an arm.

    Args:
        frame: ``athena.results("optimisers")``, or that of their tuning, of which each arm's best rate is taken.

    Returns:
        `arm`, `learning_rate`; `mean`, `low` and `high` of its accuracy, with Student's interval over the seeds;
        and `difference`, `from` and `to`, minus Adam, paired by
        seed, with Student's interval, and `p_holm` of it over the arms.
    """
    arms: dict[str, pd.DataFrame] = {}
    for (optimizer, use, control), runs in frame.fillna({"use": "", "control": ""}).groupby(
        ["optimizer", "use", "control"], sort=False
    ):
        best = runs.groupby("learning_rate")["accuracy"].mean().idxmax()
        name = " ".join(part for part in (OPTIMISERS[str(optimizer)], USED[str(use)], str(control)) if part)
        arms[name] = frame.loc[runs.index[runs["learning_rate"] == best]]
    adam = arms["Adam"]
    rows, tables = [], []
    for name, runs in arms.items():
        mean, low, high = statistics.summary(runs["accuracy"].to_numpy())
        rows.append(
            {"arm": name, "learning_rate": runs["learning_rate"].iloc[0], "mean": mean, "low": low, "high": high}
            | {"difference": 0.0, "from": 0.0, "to": 0.0, "p_holm": 1.0}
        )
        if name != "Adam":
            tables.append(contrast(runs, adam))
    others = [row for row in rows if row["arm"] != "Adam"]
    for row, table in zip(others, statistics.family(*tables), strict=True):
        found = table.iloc[0]
        row |= {"difference": found["difference"], "from": found["low"], "to": found["high"], "p_holm": found["p_holm"]}
    return pd.DataFrame(rows)


OPTIMISERS = {"adam": "Adam", "sgd": "SGD", "adagrad": "AdaGrad", "adadelta": "Adadelta"}
USED = {"": "", "gradient times relevance": "× relevance", "gradient times |weight|": "× |weight|"}


def _seconds(timed: pd.DataFrame, arm: Mapping[str, Any]) -> float:
    return float(of_arm(timed, arm)["seconds"].median())


def _measured(table: pd.DataFrame) -> dict[str, Any]:
    row = table.iloc[0]
    wanted = {name: row[name] for name in ("n", "difference", "low", "high", "p_holm", "p_least", "detectable")}
    return wanted | {"verdict": statistics.verdict(row)}
