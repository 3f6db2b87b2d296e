"""The answer that each chapter of experiments opens with, put together from the stored runs.

    say(answers.mnist().box())

An `Answer` has the question, the answer with its bounds, how sure it is, and what would change it. Its words follow
from its numbers: where a study grows, or is run again with another result, the sentences change with it. Not here: the
verdict on each single claim (`athena.experiments.claims`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from athena.book.tables import SPACE, benchmark, percent, points, signed
from athena.experiments import Study, beyond, decisive, frame, published, results, root, statistics
from athena.experiments import shortcut as planted

__all__ = [
    *("EVERY", "Answer", "cifar", "further", "guidance", "is_it_relevance", "mnist", "search", "shortcut"),
    *("stopping_linear", "stopping_whole", "story", "tested", "uses", "whole"),
]

Shares = tuple[float, float]
ALL: Shares = (0.0, 1.0)
FEW: Shares = (0.01, 0.3)
"""Above 1 and up to 30 % of the data, the shares that have run with ten seeds on CIFAR-10."""
BEYOND_THE_RULE: Shares = (0.05, 1.0)
"""At 5 % of the data and less, early stopping ends nearly every run, many of them at chance."""
GPU: dict[str, Any] = {"precision": "tf32"}
SPOKEN = {"gain": "a gain", "loss": "a loss", "no effect shown": "no effect is shown"}
FOUND = {
    "gain": "a gain with",
    "loss": "a loss with",
    "no effect shown": "no effect is shown with",
    "cannot be tested": "too few pairs to test",
}


@dataclass(frozen=True)
class Answer:
    """What a reader of one chapter should know before reading it.

    Attributes:
        sections: of the thesis.
        question: what is asked.
        says: the answer, one to three sentences.
        sure: how sure it is, and why.
        change: what would change it.
    """

    sections: str
    question: str
    says: str
    sure: str
    change: str

    def box(self) -> str:
        """The four parts as Markdown, each on lines of its own."""
        parts = (self.question, self.says, self.sure, self.change)
        heads = ("The question.", "The answer.", "How sure.", "What would change it.")
        return "\n\n".join(f"**{head}** {part}" for head, part in zip(heads, parts, strict=True))


def mnist() -> Answer:
    """Sections 7 and 7.1: the fully connected network on MNIST, and what the factor does to it."""
    whole = statistics.compare(results("mnist-factors"), over="fraction").set_index("factor", drop=False)
    small, large = whole[whole["factor"] <= 1], whole[whole["factor"] > 1]
    first = statistics.compare(results("mnist-first"))
    says = published("claims").set_index("id")["number"]
    claimed = says["C1"] - says["C2"]
    missed = first[100 * first["high"] < claimed]
    lost = first[first.apply(statistics.verdict, axis=1) == "loss"]
    pairs = int(whole["n"].max())
    starts = statistics.compare(results("mnist-start"))
    predicted = starts[(starts["target"] == "predicted") & (starts["factor"] == 10)]
    return Answer(
        sections="7 and 7.1",
        question="Does relevance make a fully connected network better on MNIST, and does a factor of 10 break it?",
        says=(
            f"Factors from {small['factor'].min():g} to {small['factor'].max():g} change the mean accuracy over all "
            f"shares of the data by less than {bound(small)} points. Guided minus plain is "
            + " and ".join(f"{points(row)} points with factor {row['factor']:g}" for _, row in large.iterrows())
            + f". The gain of the thesis's first experiment, {claimed:.2f} points at 5 % of the data, is above the "
            f"whole interval in {len(missed)} of {len(first)} readings of it."
        ),
        sure=(
            f"The first experiment has {int(first['n'].min())} pairs of runs for each reading, so such a gain would "
            "have been seen"
            + (f"; {len(lost)} of the {len(first)} readings shows a loss. " if len(lost) else ". ")
            + tested(whole)
        ),
        change=(
            f"{_more(pairs)}Another start of relevance: where it starts from the predicted class alone, factor 10 "
            f"loses {-100 * predicted['difference'].min():.1f} points at most."
        ),
    )


def cifar() -> Answer:
    """Sections 7.2.1 and 7.2.2: the convolutional network on CIFAR-10, whole and linear part, after three epochs."""
    linear, few = (_endpoint("cifar-linear", 0.1, shares, 3, GPU) for shares in (ALL, FEW))
    whole, tiny = (_endpoint("cifar-whole", factor, ALL, 3, GPU) for factor in (0.1, 0.001))
    says = published("claims").set_index("id")["number"]
    inside = [row for row in (linear, few) if 100 * row["low"] <= says["C14"] <= 100 * row["high"]]
    settled = (
        "neither confirmed nor ruled out" if inside else "ruled out" if 100 * linear["high"] < says["C14"] else "seen"
    )
    return Answer(
        sections="7.2.1 and 7.2.2",
        question="Does relevance help a convolutional network on CIFAR-10, in every layer or in its linear part?",
        says=(
            f"No help is shown. In the linear part, guided minus plain is {points(linear)} points over all shares of "
            f"the data and {points(few)} from 5 to {percent(FEW[1], 0)} of the data; the thesis's gain of "
            f"{says['C14']:.2f} points is {settled}. In the whole network it is {points(whole)} points with factor 0.1 "
            f"and {points(tiny)} with 0.001, and the thesis has no gain there either."
        ),
        sure=(
            f"{tested(pd.DataFrame([linear]))} From 5 to {percent(FEW[1], 0)} of the data there are {few['n']} pairs, "
            f"which would have shown {100 * few['detectable']:.1f} points with a probability of 80 %."
        ),
        change=(
            "Ten seeds at every share of the data. One reading of the method was run here: relevance from all logits, "
            "with the factors that the thesis names."
        ),
    )


def stopping_linear() -> Answer:
    """Section 7.2.3: the linear part guided, with batch-wise early stopping."""
    return _stopping("linear", "7.2.3", "the linear part", "C15")


def stopping_whole() -> Answer:
    """Section 7.2.4: the whole network guided, with batch-wise early stopping."""
    return _stopping("whole", "7.2.4", "the whole network", None)


def guidance() -> Answer:
    """Section 6.1: what guidance does to a training step, and what it costs."""
    time = statistics.ratio(results("mnist-time"))
    times = published("training_time").query("table == '7.1'")
    theirs = times["seconds_lrp"] / times["seconds_standard"]
    _, measured = benchmark("guidance-h100")
    ratios = pd.concat(
        [table[table["arm"].str.contains(r"ATHENA.*Epsilon.*\)$")]["of plain"] for table in measured.values()]
    )
    return Answer(
        sections="6.1",
        question="What does guidance do to a gradient, and what does it cost?",
        says=(
            "It multiplies the gradient at each guided neuron by 1 + λR, and the product is what goes on to the layers "
            "below. On a processor, training the fully connected network then takes "
            f"{time['ratio'].min():.2f} to {time['ratio'].max():.2f} times as long; in the thesis, on a GPU, "
            f"{theirs.min():.2f} to {theirs.max():.2f} times."
        ),
        sure=(
            "What it does is computed by hand below and agrees with the package to rounding. The times are of one "
            "machine: on a GPU, where a step waits for Python, guided steps take "
            f"{ratios.min():.2f} to {ratios.max():.2f} times as long as plain ones."
        ),
        change=(
            "A larger network or batch, where the time of a step is that of its arithmetic. Guiding only some of the "
            "steps costs less."
        ),
    )


def whole(study: str) -> pd.DataFrame | None:
    """The runs of a study, or None while some are missing: a study with a plan is looked at when it is complete."""
    planned = Study.read(root() / "studies" / f"{study}.toml")
    lines = planned.store.lines()
    return frame(lines) if {line["key"] for line in lines} >= {run.key for run in planned.runs} else None


def is_it_relevance() -> Answer:
    """The decisive experiment (Does it hold up?): relevance beside its shuffle, the gradient, and label smoothing."""
    runs = whole("decisive")
    if runs is None:
        return _open("9", DECISIVE, "decisive")
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
        return _open("4 and 5", question, "uses" if runs is None else "uses-time")
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
    return "".join(some) + (f" On {_and(none)}, no use of relevance is shown to help." if none else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def search() -> Answer:
    """The search of the chapter on the search and its confirmation."""
    question = "Is there a use of relevance in training that beats what a practitioner does without it?"
    tried = beyond.found(results("search"))
    chosen = beyond.chosen(tried)
    names = " and ".join(f"{row['family']}, {row['setting']}".replace("-", "−") for _, row in chosen.iterrows())
    families = tried.loc[tried["family"] != "baselines", "family"].nunique()
    searched = f"Of {len(tried)} settings in {families} families the search chose {names}. "
    runs = whole("confirm")
    if runs is None:
        return _open("8.3", question, "confirm", searched)
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
    """The planted shortcut : what a penalty on relevance off the digit wins back."""
    question = (
        "Where the background tells the class in training and lies in the test, what does a penalty on relevance off "
        "the digit win back?"
    )
    runs = whole("shortcut")
    if runs is None:
        return _open("8.3", question, "shortcut")
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


def _open(sections: str, question: str, study: str, before: str = "") -> Answer:
    return Answer(
        sections=sections,
        question=question,
        says=f"{before}This is open: not all runs of its study are there, and by its plan none is looked at before.",
        sure="Nothing is said yet.",
        change=f"`athena sweep studies/{study}.toml` runs what is missing.",
    )


EVERY = (mnist, cifar, stopping_linear, stopping_whole, is_it_relevance, uses, search, shortcut)
"""The answers in the order of the thesis."""


def in_short() -> str:
    """The whole book in two or three sentences."""
    said = ["**In short.** Training with relevance as the thesis does it is not shown to help."]
    if (runs := whole("decisive")) is not None:
        helps, worth = decisive.conclusions(decisive.contrasts(decisive.runs(runs)))
        said.append(
            "Turned around, to damp what is relevant, it gains accuracy on little data, "
            + ("and more" if any(helps.values()) else "but no more")
            + " than the loss gradient times the activation, for which nothing has to be explained; beside label "
            + f"smoothing it is {'' if worth else 'not shown to be '}worth its time."
        )
    if (runs := whole("shortcut")) is not None:
        timed = whole("shortcut-time")
        met = planted.conclusion(planted.runs(runs), None if timed is None else planted.times(timed))
        if met["half"] and met["relevance"]:
            said.append(
                "Relevance does help where one can say what a network must not look at: a penalty on it wins back most "
                "of what a planted shortcut costs."
            )
    return " ".join(said)


def story() -> str:
    """All answers on one page: in short, then each with its sections and how sure it is."""
    found = [make() for make in EVERY]
    return "\n\n".join(
        [
            in_short(),
            *(
                f"**{answer.question}** {answer.says} *How sure?* {answer.sure} *What would change it?* "
                f"{answer.change} (Thesis {'sections' if ' and ' in answer.sections else 'section'} {answer.sections}.)"
                for answer in found
            ),
        ]
    )


def _stopping(scope: str, section: str, where: str, claim: str | None) -> Answer:
    study = f"cifar-{scope}-early-stopping"
    stopped = {"monitor": "validation", **GPU}
    row = _endpoint(study, 0.1, BEYOND_THE_RULE, None, stopped)
    frame = _runs(study, 0.1, BEYOND_THE_RULE, None, stopped)
    data = statistics.data_efficiency(frame, any_code=True).iloc[0]
    cost = early_stopping_itself(scope)
    worst = cost.sort_values("difference").iloc[0]
    share = round(100 * worst["fraction"])
    plain = published("accuracy").pivot(index="percent", columns="table", values="accuracy_standard")
    by_theirs = (plain[section] - plain[{"7.2.3": "7.2.2", "7.2.4": "7.2.1"}[section]]).get(share, float("nan"))
    if claim:
        said = published("claims").set_index("id")["number"][claim]
        outside = "outside" if not 100 * row["low"] <= said <= 100 * row["high"] else "inside"
        theirs = f"The thesis's {said:.2f} points lie {outside} that interval."
    else:
        said, gains = None, published("claims").set_index("id")["number"]["C17"]
        theirs = f"The thesis has a gain at {gains:.0f} of 10 shares of the data."
    saved = "it does save data" if data["low"] > 1 else "no saving of data is shown"
    return Answer(
        sections=section,
        question=f"With early stopping, does relevance in {where} gain accuracy, or save data?",
        says=(
            f"It is not shown to. Guided minus plain is {points(row)} points above {percent(BEYOND_THE_RULE[0], 0)} of "
            f"the data. {theirs} For the same accuracy plain training needs {data['ratio']:.2f} "
            f"[{data['low']:.2f},{SPACE}{data['high']:.2f}] times the data: {saved}."
        ),
        sure=(
            f"{tested(pd.DataFrame([row]))} And it is another experiment than the thesis's, which does not give its "
            f"stopping rule: the rule of this book changes plain training by {points(worst)} points at {share:g} % of "
            "the data" + (_by_theirs(by_theirs, said) if pd.notna(by_theirs) else ".")
        ),
        change=(
            f"{_more(int(row['n']))}The thesis's own rule: window, patience, and what it looked at. Another start of "
            "relevance, or another factor: only all logits with factor 0.1 were run."
        ),
    )


def _by_theirs(change: float, gain: float | None) -> str:
    """What the thesis's rule does to plain training, kept apart from its gain where both are the same number."""
    same = gain is not None and signed(change) == signed(gain)
    return f", that of the thesis by {signed(change)}" + (", by coincidence the number of its gain." if same else ".")


def early_stopping_itself(scope: str) -> pd.DataFrame:
    """What early stopping does to plain training on CIFAR-10, at each share of the data.

    Args:
        scope: ``"linear"`` (at most four epochs) or ``"whole"`` (three).

    Returns:
        Rows of `athena.statistics.compare` by `fraction`: with early stopping minus without, after as many epochs.
    """
    with_rule = results(f"cifar-{scope}-early-stopping").query(
        "factor == 0 and monitor == 'validation' and precision == 'tf32'"
    )
    epochs = int(with_rule["epochs"].max())
    without = results(f"cifar-{scope}").query("factor == 0 and precision == 'tf32'")
    without = without.assign(accuracy=without["accuracies"].str[epochs - 1], epochs=float(epochs), monitor="none")
    both = pd.concat([with_rule.assign(epochs=float(epochs)), without[without["fraction"].isin(with_rule["fraction"])]])
    return statistics.compare(both, {"monitor": "none"}, any_code=True)


def bound(table: pd.DataFrame) -> str:
    """In points, the least tenth that no interval of a table of `statistics.compare` reaches, ``"0.2"``."""
    largest = 100 * float(table[["low", "high"]].abs().to_numpy().max())
    return f"{(math.floor(10 * largest) + 1) / 10:.1f}"


def _runs(study: str, factor: float, shares: Shares, epochs: int | None, both: Mapping[str, Any]) -> pd.DataFrame:
    frame = results(study)
    for name, value in both.items():
        frame = frame[frame[name] == value]
    above, upto = shares
    frame = frame[frame["factor"].isin([0, factor]) & frame["fraction"].between(above, upto, inclusive="right")]
    return frame if epochs is None else frame.assign(accuracy=frame["accuracies"].str[epochs - 1])


def _endpoint(study: str, factor: float, shares: Shares, epochs: int | None, both: Mapping[str, Any]) -> pd.Series:
    """The one number of a guided arm: guided minus plain, over the shares and then over the seeds."""
    return statistics.compare(_runs(study, factor, shares, epochs, both), over="fraction", any_code=True).iloc[0]


def tested(table: pd.DataFrame) -> str:
    """Whether the rows of a table of `statistics.compare` can be tested, and what the test says."""
    pairs = sorted({int(n) for n in table["n"]})
    verdicts = [statistics.verdict(row) for _, row in table.iterrows()]
    if set(verdicts) == {"cannot be tested"}:
        alike = [
            f"{row['factor']:g}" for _, row in table.iterrows() if row["p"] <= 2.0 ** (1 - row["n"]) and len(table) > 1
        ]
        same = f" With factor {' and '.join(alike)} all pairs point the same way." if alike else ""
        least = 2.0 ** (1 - pairs[-1])
        return f"{pairs[-1]} pairs of seeds cannot be tested: their *p* cannot go below {least:g}.{same}"
    if len(table) == 1:
        return f"By the rule of this book, with {_range(pairs)} pairs: {SPOKEN.get(verdicts[0], verdicts[0])}."
    told = []
    for found in dict.fromkeys(verdicts):
        names = [f"{name:g}" for name, its in zip(table.index, verdicts, strict=True) if its == found]
        told.append(f"{FOUND.get(found, found)} {'factor' if len(names) == 1 else 'factors'} {_and(names)}")
    return f"By the rule of this book, with {_range(pairs)} pairs: {'; '.join(told)}."


def _more(pairs: int) -> str:
    """How many more pairs a test needs; nothing where there are enough."""
    least = 1 + math.ceil(-math.log2(statistics.LEVEL))
    return f"More seeds: a test needs {least} pairs at least, and there are {pairs}. " if pairs < least else ""


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
