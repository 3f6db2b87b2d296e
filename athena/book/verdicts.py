"""What chapter 9 says of the thesis's claims, of the decisive experiment, and of what chance alone would have shown."""

from collections.abc import Mapping

import pandas as pd

from athena.book.tables import points, shown
from athena.experiments import decisive, published, results, statistics
from athena.experiments.statistics.pairing import Floats

__all__ = [
    *("chance_studies", "chance_table", "claims_said", "concluded", "contrasts_said"),
    *("covered_said", "covered_shown"),
]

WORDS = {"gain": "is better than", "loss": "is worse than", "no effect shown": "is not shown to differ from"}
ASKED = {
    "A": ("damping by relevance", "damping by the same numbers shuffled"),
    "B": ("damping by relevance", "damping by gradient times activation, which needs no LRP"),
    "C": ("label smoothing with damping", "label smoothing alone, given the same time"),
}
SHAPES = {
    "MNIST, first experiment": "mnist-first",
    "MNIST, the factors": "mnist-factors",
    "CIFAR-10, cells run again": "cifar-again",
}
"""The studies whose residuals stand for the distribution of paired differences."""
PAIRS = (4, 10, 15, 30)
Study = tuple[pd.DataFrame, Mapping[str, float]]
"""Runs, and the numbers that the thesis has of them: "mean" and "largest" in points, "shares up" a count."""


def claims_said(table: pd.DataFrame, count: int) -> str:
    """What became of the thesis's claims.

    Args:
        table: from `athena.experiments.claims.claims`.
        count: how many claims the thesis makes.
    """
    gains, losses = (_in_order(table.loc[table["verdict"] == found, "claim"]) for found in ("gain", "loss"))
    below = (table["p_published"] < statistics.LEVEL) & (table["high"] < table["published"])
    ruled_out = _in_order(table.loc[below | (table["verdict"] == "published number ruled out"), "claim"])
    untested = [name for name, of in table.groupby("claim", sort=False) if (of["verdict"] == "cannot be tested").all()]
    return (
        "**Training with relevance as the thesis does it is not shown to help.** The claims have the names of the "
        "table below. "
        + (
            f"By the first half of this book's rule these claims are a gain in some reading: {', '.join(gains)}"
            if gains
            else f"Of its {count} claims none is a gain by the rule of this book in any reading"
        )
        + (f"; one reading of {', '.join(losses)} is a loss" if losses else "")
        + ". "
        + (f"The published gain of {', '.join(ruled_out)} is ruled out. " if ruled_out else "")
        + (f"For {', '.join(map(str, untested))} the stored pairs are too few for any verdict. " if untested else "")
        + "Guidance costs less time here than in the thesis, but it costs time in every reading, and no saving of data "
        "is shown."
    )


def _in_order(claims: pd.Series) -> list[str]:
    """Each claim once, C9 before C10."""
    return sorted(set(claims), key=lambda name: int(name.removeprefix("C")) if name[1:].isdigit() else 0)


def contrasts_said(contrasts: pd.DataFrame, seeds: int) -> str:
    """What each contrast of the decisive experiment says; `contrasts` as `athena.experiments.decisive` gives them."""
    lines = []
    for _, row in contrasts.iterrows():
        one, other = ASKED[row["contrast"]]
        differs = WORDS.get(statistics.verdict(row), "cannot be told yet from")
        lines.append(f"- {row['protocol']}: {one} {differs} {other}, {points(row)} points.")
    return "\n".join([f"**The decisive experiment, {seeds} seeds:**\n", *lines])


def concluded(contrasts: pd.DataFrame) -> str:
    """What the plan of the decisive experiment concludes from its contrasts."""
    helps, worth = decisive.conclusions(contrasts)
    by_protocol = "; ".join(
        f"under {'the ' if protocol.startswith('thesis') else ''}{protocol} relevance is "
        f"{'' if its else 'not shown to be '}what helps"
        for protocol, its in helps.items()
    )
    return (
        f"What its plan concludes: {by_protocol}; relevance is {'' if worth else 'not shown to be '}worth using beside "
        "label smoothing, given the same time "
        f"(a gain of at least {100 * decisive.WORTHWHILE:.1f} points was asked for)."
    )


def chance_studies() -> dict[str, Study]:
    """By name, the stored studies of the thesis's form whose chance is simulated."""
    claimed = published("claims").set_index("id")["number"]
    on_gpu = "precision == 'tf32'"
    stopped = f"{on_gpu} and monitor == 'validation' and fraction >= 0.1"
    mnist = results("mnist-factors").query("factor in (0, 0.2)")
    linear = results("cifar-linear").query(f"{on_gpu} and factor in (0, 0.1) and fraction >= 0.05")
    linear = linear.assign(accuracy=linear["accuracies"].str[2])
    early, whole = (
        results(f"cifar-{name}-early-stopping").query(f"{stopped} and factor in (0, 0.1)")
        for name in ("linear", "whole")
    )
    return {
        "MNIST, factor 0.2": (mnist, {"mean": claimed["C7"], "largest": claimed["C6"]}),
        "CIFAR-10, linear part": (linear, {"mean": claimed["C14"], "largest": claimed["C13"]}),
        "the same, early stopping": (early, {"mean": claimed["C15"], "largest": claimed["C16"]}),
        "CIFAR-10, early stopping, whole network": (whole, {"shares up": claimed["C17"]}),
    }


def chance_table(studies: Mapping[str, Study], draws: int) -> pd.DataFrame:
    """What a method without any effect would have shown in studies of the thesis's form.

    Args:
        studies: as `chance_studies` gives them.
        draws: how many studies are simulated for each.

    Returns:
        A row for each study, with each published number and in how many simulated studies there is as much.
    """
    return pd.DataFrame([_of_chance(name, *study, draws) for name, study in studies.items()])


def _of_chance(name: str, frame: pd.DataFrame, said: Mapping[str, float], draws: int) -> dict[str, object]:
    drawn = statistics.chance(frame, draws=draws, any_code=True)
    row: dict[str, object] = {
        "study": name,
        "shares": frame["fraction"].nunique(),
        "mean gain: 95 % of studies below": f"{100 * drawn['mean'].quantile(0.95):+.2f}",
        "largest gain: half of the studies above": f"{100 * drawn['largest'].median():+.2f}",
    }
    measured = {"mean": 100 * drawn["mean"], "largest": 100 * drawn["largest"], "shares up": drawn["positive"]}
    for what, values in measured.items():
        as_much = (values >= said[what] - 1e-9).mean() if what in said else None
        row[f"published {what} (studies with as much)"] = "" if as_much is None else f"{said[what]:g} ({as_much:.0%})"
    return row


def covered_shown() -> pd.DataFrame:
    """How often a 95 % interval of n pairs holds the true mean, on the residuals of three studies, for reading."""
    rows = []
    for name, study in SHAPES.items():
        rest = _residuals(study)
        rows.append({"residuals of": name} | {f"{n} pairs": f"{statistics.coverage(rest, n):.1%}" for n in PAIRS})
    return shown(pd.DataFrame(rows), "residuals of")


def covered_said(studies: int) -> str:
    """How often the whole procedure finds an effect where there is none.

    Args:
        studies: how many are simulated.
    """
    found = statistics.false_verdicts(_residuals("cifar-again"), 10, 1, studies)
    return (
        f"The whole procedure, interval, sign-flip test and verdict, was given {studies} studies of ten pairs in which "
        f"there is nothing to find: in {found:.1%} of them it says gain or loss. At most {statistics.LEVEL:.0%} are "
        "allowed; with twelve cells that are corrected together it is no more (`tests/test_statistics.py`)."
    )


def _residuals(study: str) -> Floats:
    return statistics.residuals(results(study).query("precision != 'bfloat16'"))
