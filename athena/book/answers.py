"""The answer that each chapter of experiments opens with, put together from the stored runs.

    say(answers.mnist().box())

An `Answer` has the question, the answer with its bounds, how sure it is, and what would change it. Its words follow
from its numbers: where a study grows, or is run again with another result, the sentences change with it. Not here: the
answers on what the thesis did not try (`athena.book.answers_beyond`), and the verdict on each single claim
(`athena.experiments.claims`).
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from athena.book.answer import Answer, bound, more_pairs, tested, whole
from athena.book.answers_beyond import further, is_it_relevance, search, shortcut, uses
from athena.book.tables import SPACE, benchmark, percent, points, signed
from athena.experiments import decisive, published, results, statistics
from athena.experiments import shortcut as planted

__all__ = [
    "EVERY",
    "Answer",
    "bound",
    "cifar",
    "early_stopping_itself",
    "further",
    "guidance",
    "in_short",
    "is_it_relevance",
    "mnist",
    "search",
    "shortcut",
    "stopping_linear",
    "stopping_whole",
    "story",
    "tested",
    "uses",
    "whole",
]

Shares = tuple[float, float]
ALL: Shares = (0.0, 1.0)
FEW: Shares = (0.01, 0.3)
"""Above 1 and up to 30 % of the data, the shares that have run with ten seeds on CIFAR-10."""
BEYOND_THE_RULE: Shares = (0.05, 1.0)
"""At 5 % of the data and less, early stopping ends nearly every run, many of them at chance."""
GPU: dict[str, Any] = {"precision": "tf32"}


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
            f"{more_pairs(pairs)}Another start of relevance: where it starts from the predicted class alone, factor 10 "
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
            f"{more_pairs(int(row['n']))}The thesis's own rule: window, patience, and what it looked at. Another start "
            "of relevance, or another factor: only all logits with factor 0.1 were run."
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
