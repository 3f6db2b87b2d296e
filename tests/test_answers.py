"""Claims about the answers that chapters open with: each number in them is one that the stored runs give."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sweeps import as_if_run

import athena
from athena.book import answers, answers_beyond
from athena.experiments import beyond, published, results, statistics
from athena.training import Run

TRIPLE = re.compile(r"([+−]\d+\.\d+) \[([+−]\d+\.\d+),\s([+−]\d+\.\d+)\]")


def said(text: str) -> list[tuple[float, ...]]:
    """The differences with their intervals that a text states, in points."""
    return [tuple(float(number.replace("−", "-")) for number in found) for found in TRIPLE.findall(text)]


def by_hand(frame: pd.DataFrame, factor: float, above: float = 0, upto: float = 1) -> tuple[float, ...]:
    """Guided minus plain in points: the mean over the shares of each complete seed, with Student's interval."""
    frame = frame[frame["fraction"].between(above, upto, inclusive="right")].copy()
    frame["where"] = frame["fraction"].astype(str) + frame["device"]
    sides = [frame[frame["factor"] == value].set_index(["seed", "where"])["accuracy"] for value in (factor, 0)]
    by_seed = 100 * (sides[0] - sides[1]).dropna()
    whole = by_seed.groupby("seed").size() == frame["fraction"].nunique()
    means = by_seed.groupby("seed").mean()[whole]
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return means.mean(), means.mean() - half, means.mean() + half


def gpu(study: str, epochs: int | None = None) -> pd.DataFrame:
    frame = results(study).query("precision == 'tf32'")
    return frame if epochs is None else frame.assign(accuracy=frame["accuracies"].str[epochs - 1])


def test_the_mnist_answer_says_what_the_runs_say() -> None:
    frame, answer = results("mnist-factors"), answers.mnist()
    assert said(answer.says) == [pytest.approx(by_hand(frame, factor), abs=0.0051) for factor in (2, 10)]
    (below,) = re.findall(r"by less than (\d\.\d) points", answer.says)
    reached = max(abs(end) for factor in (0.1, 0.2, 1) for end in by_hand(frame, factor)[1:])
    assert reached < float(below) <= reached + 0.1
    assert "4 pairs of seeds cannot be tested" in answer.sure or frame["seed"].nunique() > 4
    gain = published("claims").set_index("id")["number"]
    assert f"{gain['C1'] - gain['C2']:.2f} points at 5 %" in answer.says


def test_the_cifar_answer_says_what_the_runs_say() -> None:
    linear, whole = gpu("cifar-linear", 3), gpu("cifar-whole", 3)
    expected = [by_hand(linear, 0.1), by_hand(linear, 0.1, 0.01, 0.3), by_hand(whole, 0.1), by_hand(whole, 0.001)]
    assert said(answers.cifar().says) == [pytest.approx(numbers, abs=0.0051) for numbers in expected]


@pytest.mark.parametrize("scope, epochs", [("linear", 4), ("whole", 3)])
def test_the_early_stopping_answers_say_what_the_runs_say(scope: str, epochs: int) -> None:
    answer = answers.stopping_linear() if scope == "linear" else answers.stopping_whole()
    stopped, free = gpu(f"cifar-{scope}-early-stopping").query("monitor == 'validation'"), gpu(f"cifar-{scope}", epochs)
    assert said(answer.says) == [pytest.approx(by_hand(stopped, 0.1, 0.05), abs=0.0051)]
    with_rule, without = (
        runs.query("factor == 0").set_index(["fraction", "seed"])["accuracy"] for runs in (stopped, free)
    )
    itself = 100 * (with_rule - without).dropna().groupby("fraction").mean()
    ((worst, _, _),) = said(answer.sure)
    assert worst == pytest.approx(itself.min(), abs=0.0051)
    assert f"at {100 * itself.idxmin():g} % of the data" in answer.sure


def test_the_words_of_an_answer_follow_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided runs that are two points better, and ten seeds: the answer no longer says that no help is shown."""
    frame = results("mnist-factors").query("seed < 4")
    more = [frame.assign(seed=frame["seed"] + 4 * k, accuracy=frame["accuracy"] - 1e-4 * k) for k in range(3)]
    better = pd.concat(more, ignore_index=True)
    better["accuracy"] = np.where(better["factor"] > 0, better["accuracy"] + 0.2, better["accuracy"])
    monkeypatch.setattr(answers, "results", lambda study: better if study == "mnist-factors" else athena.results(study))
    sure = answers.mnist().sure
    assert "cannot be tested" not in sure and "with 12 pairs" in sure and "a gain" in sure
    assert not answers.mnist().change.startswith("More seeds")


def test_a_bound_is_the_tenth_above_every_interval() -> None:
    assert answers.bound(pd.DataFrame({"low": [-0.0014, -0.0002], "high": [0.0009, 0.00181]})) == "0.2"
    assert answers.bound(pd.DataFrame({"low": [-0.002], "high": [0.001]})) == "0.3"


@pytest.mark.slow
def test_the_story_holds_every_answer() -> None:
    story = answers.story()
    for make in answers.EVERY:
        assert make().says in story and make().sections in story


def test_an_interval_ends_where_no_accuracy_could_be() -> None:
    from athena import tables

    whole = statistics.compare(results("mnist-factors").query("factor in (0, 10) and fraction == 1 and seed < 4"))
    assert whole["low"].iloc[0] < -whole["baseline_mean"].iloc[0]
    assert tables.possible(whole)["low"].iloc[0] == -whole["baseline_mean"].iloc[0]


@pytest.mark.parametrize(
    ("answer", "study"),
    [(answers.is_it_relevance, "decisive"), (answers.uses, "uses"), (answers.search, "confirm")],
    ids=["decisive", "uses", "confirm"],
)
def test_a_study_under_way_is_not_looked_at(answer, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_beyond, "results", as_if_run)
    monkeypatch.setattr(beyond, "FURTHER", {})
    monkeypatch.setattr(answers_beyond, "whole", lambda name: None)
    found = answer()
    assert "This is open" in found.says and not said(found.says)
    assert f"athena sweep studies/{study}.toml" in found.change
    monkeypatch.setattr(answers_beyond, "whole", as_if_run)
    assert "open" not in answer().says


@pytest.mark.slow
def test_the_answer_of_the_search_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(run: Run) -> bool:
        return run.factor == -0.25 and run.control is None

    monkeypatch.setattr(answers_beyond, "results", as_if_run)
    monkeypatch.setattr(answers_beyond, "whole", lambda name: as_if_run(name, lambda run: 0.5 * use(run)))
    assert "It is confirmed." in answers.search().says
    monkeypatch.setattr(answers_beyond, "whole", lambda name: as_if_run(name, lambda run: 0.2 * use(run)))
    assert "It is not confirmed, so none was found." in answers.search().says  # a gain, below what the plan asks for
    assert said(answers.search().says)[0] == pytest.approx((0.2, 0.2, 0.2), abs=0.05)


def test_the_answer_on_uses_names_what_helps_and_what_harms(monkeypatch: pytest.MonkeyPatch) -> None:
    def gain(run: Run) -> float:
        if run.use == "features":
            return 1.0 * (run.control is None)
        return -1.0 if run.use == "gradient times relevance" and run.control is None else 0.0

    monkeypatch.setattr(answers_beyond, "whole", lambda name: as_if_run(name, gain))
    monkeypatch.setattr(beyond, "FURTHER", {"uses-mnist-10": "10 % of MNIST", "uses-cifar10": "5 % of CIFAR-10"})
    text = answers.uses().says
    assert "On 10 % of MNIST, features × (1 + R) helps." in text
    assert "On 5 % of CIFAR-10, no use of relevance is shown to help." in text
    assert "features × (1 + R) helps" in text
    assert "Harm is done by 1 of them: gradient × relevance." in text


def test_the_book_in_short_follows_the_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "whole", lambda name: None)
    assert answers.in_short().endswith("is not shown to help.")  # what is not measured is not said
    monkeypatch.setattr(answers, "whole", as_if_run)
    assert "no more than the loss gradient" in answers.in_short() and "does help" not in answers.in_short()
