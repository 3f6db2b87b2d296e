"""The answers on what the thesis did not try: controls, other uses of relevance, the search, the planted shortcut.

Not here: the answers on its own experiments (`athena.book.answers`).
"""

from collections.abc import Sequence

import pandas as pd

from athena.book.answer import SPOKEN, Answer, is_open, joined, whole
from athena.book.tables import SPACE, percent, points
from athena.experiments import beyond, decisive, results
from athena.experiments import shortcut as planted

__all__ = ["further", "is_it_relevance", "search", "shortcut", "uses"]


def is_it_relevance() -> Answer:
    """The decisive experiment (Does it hold up?): relevance beside its shuffle, the gradient, and label smoothing."""
    runs = whole("decisive")
    if runs is None:
        return is_open("9", DECISIVE, "decisive")
    table = decisive.contrasts(decisive.runs(runs))
    helps, worth = decisive.conclusions(table)
    told = {(row["contrast"], row["protocol"]): row for _, row in table.iterrows()}
    by_protocol = [
        f"under {'the ' if protocol.startswith('thesis') else ''}{protocol}, relevance minus the same numbers shuffled "
        f"is {points(told['A', protocol])} points, and relevance minus the loss gradient times the activation, which "
        f"needs no LRP, {points(told['B', protocol])}"
        for protocol in decisive.PROTOCOLS
    ]
    tuned = told["C", "OneCycle"]
    return Answer(
        sections="8",
        question=DECISIVE,
        says=(
            f"Gradients are damped where relevance for the true class is high: {'; '.join(by_protocol)}. "
            + (
                f"It is relevance that helps under {' and '.join(name for name, its in helps.items() if its)}"
                if any(helps.values())
                else "It is not shown that relevance is what helps"
            )
            + f". Added to label smoothing, given the same time, it changes accuracy by {points(tuned)} points under "
            + "OneCycle: "
            + ("worth using." if worth else "not shown to be worth using.")
        ),
        sure=(
            f"{int(table['n'].min())} seeds at four shares of MNIST, six contrasts corrected together, by a plan that "
            "was committed before the first run."
        ),
        change=(
            "Another network or other data. What these seeds could have shown stands in "
            "[Does it hold up?](09-does-it-hold-up.ipynb)."
        ),
    )


DECISIVE = "Is it relevance that helps on little data, and is it worth more than label smoothing?"


def uses() -> Answer:
    """Chapters 4 and 5: other ways to train with an explanation."""
    question = "Does any way to train with an explanation help, more than its control and than the same time?"
    runs, timed = whole("uses"), whole("uses-time")
    if runs is None or timed is None:
        return is_open("4 and 5", question, "uses" if runs is None else "uses-time")
    table = beyond.compared(runs, timed)
    own = table[table["relevance"]]
    helps, harms = own[own["helps"]], own[own["verdict"] == "loss"]
    smoothing = table[table["use"] == "label smoothing"].iloc[0]
    return Answer(
        sections="4 and 5",
        question=question,
        says=(
            (f"Of {len(own)} uses of relevance, " + _listed(list(helps["use"]), "helps", "help") + ". ")
            + (f"Harm is done by {len(harms)} of them: {'; '.join(harms['use'])}. " if len(harms) else "")
            + f"Label smoothing, which needs no explanation and no time, gains {points(smoothing)} points."
            + _elsewhere()
        ),
        sure=(
            f"{int(table['n'].min())} seeds at {_shares(runs)} of MNIST, and ten new ones for each other data set; "
            "strengths were not tuned. The plans were committed before the runs."
        ),
        change="Tuned strengths, other networks, and the settings of the papers, which are larger.",
    )


def further() -> dict[str, pd.DataFrame]:
    """The comparison of uses on other data, by what it is of, as `beyond.compared` gives it; complete studies alone."""
    timed = whole("uses-time")
    found = {data: whole(study) for study, data in beyond.FURTHER.items()}
    return {
        data: beyond.compared(runs, timed) for data, runs in found.items() if runs is not None and timed is not None
    }


def _elsewhere() -> str:
    """Which uses of relevance help on other data, a sentence for those that do and one for the rest."""
    helps = {data: list(table.loc[table["relevance"] & table["helps"], "use"]) for data, table in further().items()}
    some = [f" On {data}, {_listed(names, 'helps', 'help')}." for data, names in helps.items() if names]
    none = [data for data, names in helps.items() if not names]
    return "".join(some) + (f" On {joined(none)}, no use of relevance is shown to help." if none else "")


def search() -> Answer:
    """The search for a use of relevance that wins, and its confirmation."""
    question = "Is there a use of relevance in training that beats what a practitioner does without it?"
    tried = beyond.found(results("search"))
    chosen = beyond.chosen(tried)
    names = " and ".join(f"{row['family']}, {row['setting']}".replace("-", "−") for _, row in chosen.iterrows())
    families = tried.loc[tried["family"] != "baselines", "family"].nunique()
    searched = f"Of {len(tried)} settings in {families} families the search chose {names}. "
    runs = whole("confirm")
    if runs is None:
        return is_open("8.3", question, "confirm", searched)
    judged = beyond.confirmed(runs).query("judged")
    worth = beyond.worth(judged)
    told = "; ".join(f"{row['compared']} {points(row)}, {SPOKEN[row['verdict']]}" for _, row in judged.iterrows())
    return Answer(
        sections="8.3",
        question=question,
        says=(
            searched
            + ("It is confirmed. " if worth else "It is not confirmed, so none was found. ")
            + f"On new seeds and the test set, in points: {told}."
            + _proposed()
        ),
        sure=(
            f"{int(judged['n'].min())} seeds, {_shares(runs)} of MNIST. The search is exploratory; the confirmation's "
            "plan was committed before its runs, and is reported as it came out."
        ),
        change="Other data and larger networks, and tasks where one can say what a network must not look at.",
    )


def _proposed() -> str:
    """What the thesis's own proposals come to (8.3.1 and 8.3.2), a sentence."""
    table = beyond.future(results("future"))
    helps = [name for name, does in beyond.proposals(table).items() if does]
    if helps:
        return f" Of the thesis's own proposals, {' and '.join(helps)} help."
    most = 100 * table.loc[table["compared"].str.endswith("minus plain"), "high"].max()
    return (
        " The thesis's own proposals, factors that are learned and relevance of filters, are not shown to help: "
        f"a gain of {most:.2f} points over plain training is the most that an interval leaves room for."
    )


def shortcut() -> Answer:
    """The planted shortcut: what a penalty on relevance off the digit wins back."""
    question = (
        "Where the background tells the class in training and lies in the test, what does a penalty on relevance off "
        "the digit win back?"
    )
    runs = whole("shortcut")
    if runs is None:
        return is_open("8.3", question, "shortcut")
    runs, timed = planted.runs(runs), whole("shortcut-time")
    times = None if timed is None else planted.times(timed)
    met = planted.conclusion(runs, times)
    means = {(row["arm"], row["marked"]): row for _, row in planted.arms(runs).iterrows()}

    def won(arm: str) -> str:
        row = means[arm, planted.MARKED]
        share, low, high = (f"{100 * row[name]:.0f}" for name in ("won", "won_low", "won_high"))
        return f"{share} [{low},{SPACE}{high}] %"

    best = max(("masking", "marked images alone"), key=lambda arm: means[arm, planted.MARKED]["won"])
    in_time = "" if times is None else f", in {times['ratio']['relevance penalty']:.2f} times the time"
    missed = [planted.ASKED[name] for name, its in met.items() if not its]
    return Answer(
        sections="8.3",
        question=question,
        says=(
            f"Plain training falls to {percent(means['plain', 0]['mean'])}; without the shortcut it would reach "
            f"{percent(means[planted.CEILING, 0]['mean'])}. With {planted.MARKED} marked images the relevance "
            f"penalty wins back {won('relevance penalty')} of what was lost{in_time}; the better use of the same marks "
            f"without relevance, {best}, {won(best)}, and the gradient penalty {won('gradient penalty')}."
            + _half_as_often()
        ),
        sure=(
            f"{runs['seed'].nunique()} seeds, and contrasts that were written down before the first run. "
            + (
                f"Of what the plan asks for, not met: {'; '.join(missed)}."
                if missed
                else "All that the plan asks for is met"
                + ("." if times is not None else ", but for the time, which is not measured yet.")
            )
        ),
        change=(
            "A network that is not made of ReLUs, a shortcut on the digit itself, marks that are wrong, or masking and "
            "a penalty together: none of these was tried."
        ),
    )


def _half_as_often() -> str:
    """What the planted shortcut's second study comes to, a sentence."""
    runs, timed = planted.runs(results("shortcut-seldom")), planted.times(results("shortcut-seldom-time"))
    met = planted.conclusion(runs, timed)
    arms = planted.arms(runs)
    row = arms[(arms["arm"] == "relevance penalty") & (arms["marked"] == planted.MARKED)].iloc[0]
    share, low, high = (f"{100 * row[name]:.0f}" for name in ("won", "won_low", "won_high"))
    half = "at least half" if met["half"] else "after correction not shown to be half"
    return (
        f" Taken half as often, it costs {timed['ratio']['relevance penalty']:.2f} times the time and wins back "
        f"{share} [{low},{SPACE}{high}] %, {half}."
    )


def _shares(runs: pd.DataFrame) -> str:
    return " and ".join(f"{100 * share:g}" for share in sorted(runs["fraction"].unique())) + " %"


def _listed(names: Sequence[str], one: str, several: str) -> str:
    if not names:
        return f"none is shown to {several}"
    return f"{'; '.join(names)} {one if len(names) == 1 else several}"
