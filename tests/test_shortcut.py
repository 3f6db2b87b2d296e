"""What the planted shortcut's study concludes from its runs, on made-up accuracies."""

import numpy as np
import pandas as pd
import pytest

from athena import experiments, statistics
from athena.experiments import frame as as_frame
from athena.experiments import shortcut

STUDY = experiments.Study.read(experiments.root() / "studies" / "shortcut.toml")
TIMED = experiments.Study.read(experiments.root() / "studies" / "shortcut-time.toml")
SEEDS = 8
CLEAN, PLAIN = 0.85, 0.15


def lines(study: experiments.Study, seeds: range) -> pd.DataFrame:
    return as_frame(
        {"key": run.key, "run": dict(vars(run)), "accuracy": [0.9], "seconds": 1.0}
        | {"fingerprint": "x", "device": "cpu", "code": "1"}
        for run in study.runs
        if run.seed in seeds
    )


def measured(won: dict[str, float]) -> pd.DataFrame:
    """The study as if run, by the share of the loss that each arm wins back."""
    rng = np.random.default_rng(0)
    frame = shortcut.runs(lines(STUDY, range(SEEDS)))
    share = frame["arm"].map({shortcut.CEILING: 1.0} | won).fillna(0)
    return frame.assign(accuracy=PLAIN + (CLEAN - PLAIN) * share + 0.002 * rng.normal(size=len(frame)))


def timed(relevance: float) -> pd.DataFrame:
    """The measurement of time as if run, by how many times as long the relevance penalty takes."""
    frame = lines(TIMED, range(1000))
    longer = frame["use"] == "relevance off mark"
    return shortcut.times(frame.assign(seconds=frame["seconds"].where(~longer, relevance)))


def test_every_run_of_the_study_belongs_to_one_arm() -> None:
    frame = measured({})
    assert set(frame["arm"]) == set(shortcut.ARMS)
    assert set(frame.groupby(["arm", "marked"]).size()) == {SEEDS}


def test_a_seed_that_lacks_a_run_does_not_count() -> None:
    frame = measured({}).drop(columns="arm")
    last = frame[frame["seed"] == SEEDS - 1].index[-1]
    assert shortcut.runs(frame.drop(index=last))["seed"].nunique() == SEEDS - 1


def test_the_contrasts_are_those_of_the_plan_corrected_together() -> None:
    table = shortcut.contrasts(measured({"relevance penalty": 0.9, "masking": 0.6, "gradient penalty": 0.2}))
    assert table["contrast"].tolist() == list(shortcut.CONTRASTS)
    assert (100 * table["difference"]).round().tolist() == [28, 21, 21, 63, 49, 63]
    assert table["p_holm"].tolist() == pytest.approx([6 * 2 / 2**SEEDS] * 6)
    assert {statistics.verdict(row) for _, row in table.iterrows()} == {"gain"}


def test_what_is_won_back_is_a_share_of_what_the_shortcut_costs() -> None:
    means = shortcut.arms(measured({"masking": 0.4})).set_index("arm")
    assert means.loc["plain", "won"] == 0 and means.loc[shortcut.CEILING, "won"] == 1
    assert means.loc["masking", "won"].tolist() == pytest.approx([0.4] * 3, abs=0.01)


def test_times_are_those_of_plain_training_with_as_many_steps() -> None:
    table = timed(1.3)
    assert table["ratio"].to_dict() == pytest.approx(
        {"masking": 1, "marked images alone": 1, "gradient penalty": 1, "relevance penalty": 1.3}
    )
    assert (table["n"] == 9).all()


@pytest.mark.parametrize(
    "won, time, expected",
    [
        ({}, 1.2, {"half": False, "in_time": True, "fewer": False, "relevance": False}),
        ({"relevance penalty": 0.8}, 1.2, {"half": True, "in_time": True, "fewer": True, "relevance": True}),
        ({"relevance penalty": 0.8}, 1.6, {"half": True, "in_time": False, "fewer": True, "relevance": True}),
        (
            {"relevance penalty": 0.8, "masking": 0.6},
            1.2,
            {"half": True, "in_time": True, "fewer": False, "relevance": True},
        ),
        (
            {"relevance penalty": 0.8, "relevance penalty, marks shuffled": 0.8},
            1.2,
            {"half": True, "in_time": True, "fewer": True, "relevance": False},
        ),
    ],
)
def test_the_conclusion_is_that_of_the_plan(won: dict[str, float], time: float, expected: dict[str, bool]) -> None:
    assert shortcut.conclusion(measured(won), timed(time)) == expected


def test_nothing_is_concluded_of_a_time_that_was_not_measured() -> None:
    assert shortcut.conclusion(measured({}), None).keys() == {"half", "fewer", "relevance"}


def test_a_remedy_needs_as_many_marks_as_its_whole_interval_asks_for() -> None:
    table = pd.DataFrame({"arm": "masking", "marked": [30, 100, 300], "won_low": [0.3, 0.49, 0.6]})
    assert shortcut.needed(table, "masking") == 300
    assert shortcut.needed(table[:2], "masking") is None
