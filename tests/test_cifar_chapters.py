"""Claims about what the chapters on CIFAR-10 call: the runs they collect, their tables, and the rule of stopping."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from athena import experiments, figures, statistics, tables, training
from athena.book import answers, cifar, epochs, saving, stopping, stopping_effects, two_networks
from athena.book.cifar import Collected
from athena.experiments import data
from athena.experiments.data.originals import CIFAR10_CLASSES
from athena.training import Run

SHARES, SEEDS = (0.05, 0.3), 4


def no_training(*_: object) -> pd.DataFrame:
    raise AssertionError("what the studies plan is read from their stores")


@pytest.fixture(scope="module")
def stopped() -> Collected:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "collect", no_training)
        return stopping.collect([("linear", 0.1), ("all", 0.1)], SHARES, SHARES[:1], SEEDS, "cifar10")


@pytest.fixture
def frame() -> pd.DataFrame:
    """Four seeds, plain and guided in the whole network, at two shares of the data, after each of four epochs."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "fraction": share,
            "factor": factor,
            "scope": "all",
            "seed": seed,
            "accuracies": list(rng.uniform(0.4, 0.6, 4)),
        }
        for share, factor, seed in itertools.product(SHARES, (0.0, 0.1), range(SEEDS))
    ]
    table = pd.DataFrame(rows).assign(fingerprint="0", device="cpu", code="0", key=[str(i) for i in range(len(rows))])
    return table.assign(accuracy=table["accuracies"].str[-1])


def test_a_run_is_stopped_where_training_stops_it() -> None:
    run = Run(dataset="mnist5k", model="small", fraction=0.16, epochs=2, learning_rate=0.02, patience=0.1)
    looks, in_epoch, held_out = stopping.looks(run)
    assert (in_epoch, held_out) == (10, 400)
    end, _ = stopping.ends(looks["test"], round(run.patience * in_epoch))
    assert end is not None and training.train(replace(run, monitor="test")).stopped_at == end


def test_the_rule_keeps_the_best_look_and_ends_after_its_patience() -> None:
    scores = pd.Series([0.50, 0.55, 0.54, 0.53, 0.57], index=[10, 20, 30, 40, 50])
    assert stopping.ends(scores, 20) == (40, 20)
    assert stopping.ends(scores, 30) == (None, 50)
    assert stopping.ends(pd.Series([0.5, 0.5], index=[1, 2]), 1) == (2, 1)  # as good is no gain


def test_planned_runs_are_read_with_and_without_early_stopping(stopped: Collected) -> None:
    assert stopped.as_planned and stopped.used == "cifar10" and not stopped.waiting
    assert set(stopped.frame["precision"]) == {"tf32"}
    sizes = stopped.frame.groupby(["epochs", "monitor", "factor"]).size().to_dict()
    of_both = {"validation": 2 * SEEDS, "none": 2 * SEEDS, "test": SEEDS}
    assert sizes == {(most, by, f): n for most in (3.0, 4.0) for by, n in of_both.items() for f in (0.0, 0.1)}
    free = stopped.frame.query("monitor == 'none' and epochs == 3")
    assert [values[2] for values in free["accuracies"]] == list(free["accuracy"])


def test_what_no_study_plans_is_trained_in_float32_on_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = cifar.studies()
    asked = {"all": experiments.grid(plans["all"].base, factor=[0, 0.5], fraction=[0.05], seed=[0])}
    monkeypatch.setattr(data, "at_hand", lambda name: "mnistm5k")
    as_planned, wanted = cifar.as_asked(asked, plans, "cifar10")
    assert not as_planned
    assert [(run.dataset, run.precision, run.factor) for run in wanted["all"]] == [
        ("mnistm5k", "float32", 0),
        ("mnistm5k", "float32", 0.5),
    ]


def test_plain_runs_of_both_studies_are_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    columns = ["key", "dataset", "fraction", "seed"]

    def trained(study: object, runs: list[Run]) -> pd.DataFrame:
        asked.append([run.factor for run in runs])
        return pd.DataFrame([(run.key, run.dataset, run.fraction, run.seed) for run in runs], columns=columns)

    monkeypatch.setattr(experiments, "collect", trained)
    for arms, expected in (
        ([("all", 0.5), ("linear", 0.5)], [[0, 0.5], [0.5]]),
        ([("all", 0.5)], [[0, 0.5]]),
    ):
        asked.clear()
        runs = cifar.collect(arms, [0.1], 1, "mnistm5k")
        assert asked == expected and not runs.waiting


def test_arms_without_a_pair_have_no_row(frame: pd.DataFrame) -> None:
    assert list(cifar.compared(frame)["fraction"]) == list(SHARES)
    alone = frame[(frame["factor"] == 0) == (frame["seed"] < 2)]
    for over in (None, "fraction"):
        assert cifar.compared(alone, over=over).empty
    one = cifar.compared(frame[frame["fraction"] == 0.3])
    assert list(one["fraction"]) == [0.3] and one["n"].iloc[0] == SEEDS


def test_early_stopping_itself_is_that_of_the_answers(stopped: Collected) -> None:
    table = stopping_effects.itself(stopped)
    whole = answers.early_stopping_itself("whole").set_index("fraction", drop=False)
    assert list(table.index) == ["30", "5"] and list(table)[2:] == ["plain, 3 epochs", "whole network, 0.1, 3 epochs"]
    for share in SHARES:  # the answers have ten seeds there, this table four
        own = stopped.frame.query("factor == 0 and fraction == @share and epochs == 3")
        means = own.groupby("monitor")["accuracy"].mean()
        said = table.loc[f"{100 * share:g}", "plain, 3 epochs"]
        assert said.startswith(tables.signed(100 * (means["validation"] - means["none"])))
        assert whole.loc[share, "n"] == 10


def test_a_patience_keeps_the_accuracy_of_the_epoch_it_stops_for() -> None:
    table = stopping_effects.patiences()
    of_test = table[table["looks at"] == "test set"].set_index(["most", "patience"])["difference"]
    runs = experiments.results("cifar-linear").query("factor == 0 and precision == 'tf32' and seed < 4")
    curves = runs[runs["fraction"] > 0.02].set_index(["fraction", "seed"])["accuracies"]
    for most, shares in ((3, 10), (4, 11)):  # the table of 7.2.4 has no 5 %
        own = curves[-4 * shares :] if most == 4 else curves[curves.index.get_level_values(0) > 0.06]
        assert len(own) == 4 * shares
        best = own.map(lambda values, most=most: max(values[:most]) - values[2])
        assert of_test[most, most - 1] == pytest.approx(best.mean())
    assert of_test[4, 1] <= of_test[4, 3]
    theirs = {of: cifar.thesis(of)["accuracy_standard"] for of in ("7.2.1", "7.2.4")}
    assert 100 * table["thesis"].iloc[0] == pytest.approx((theirs["7.2.4"] - theirs["7.2.1"]).mean())


def test_the_sentences_on_patience_follow_the_table() -> None:
    row = {
        "most": 4,
        "looks at": "test set",
        "patience": 1,
        "difference": 0.03,
        "low": 0.02,
        "high": 0.04,
        "thesis": 0.025,
    }
    other = row | {"patience": 2, "difference": 0.06, "low": 0.05, "high": 0.07}
    alone = other | {"looks at": "nothing", "patience": float("nan")}
    (said,) = stopping_effects.patiences_said(pd.DataFrame([row, other, alone]))
    assert "nearest to the thesis is a patience of 1, which gains +3.00" in said
    assert "+2.50, lies in the interval. As many whole epochs without early stopping gain +6.00" in said
    (said,) = stopping_effects.patiences_said(pd.DataFrame([row | {"thesis": 0.05}]))
    assert "every patience gains +3.00" in said and said.endswith("+5.00, is above the whole interval.")


def test_the_number_of_an_arm_leaves_out_the_shares_that_measure_the_rule(stopped: Collected) -> None:
    ((table, said),) = stopping_effects.endpoints(stopped, SEEDS)
    assert table is not None and sorted(table.index) == ["linear part, factor 0.1", "whole network, factor 0.1"]
    assert said == ["Linear part: over 30 % of the data.", "Whole network: over 30 % of the data."]
    own = statistics.compare(stopping.pick(stopped, "all", [0, 0.1]).query("fraction == 0.3"), any_code=True).iloc[0]
    assert table.loc["whole network, factor 0.1", "mean difference (points)"] == tables.points(own)


def test_a_run_that_was_not_stopped_trained_all_its_epochs(stopped: Collected) -> None:
    trained = stopping.epochs_trained(stopped)
    most = trained["scope"].map(stopping.EPOCHS)
    assert (trained.loc[~trained["stopped"], "epochs"] == most[~trained["stopped"]]).all()
    assert (trained.loc[trained["stopped"], "epochs"] <= most[trained["stopped"]]).all()
    assert len(trained) == 2 * 2 * 2 * SEEDS and trained["stopped"].any()


def test_every_comparison_is_drawn_within_its_limits(stopped: Collected) -> None:
    stops = stopping.comparisons(stopped)
    limits = stopping.limits(stopped, stops)
    assert list(stops)[:3] == ["linear 0.1, with", "linear 0.1, without", "effect on plain, 4 ep."]
    for stop in ("linear 0.1, with", "effect on plain, 3 ep."):
        left, right = figures.two_arms(**stops[stop], limits=limits).axes
        dots = right.lines[0].get_ydata()
        assert len(dots) == len(SHARES) * SEEDS
        assert limits["difference"][0] < min(dots) and max(dots) < limits["difference"][1]
        assert {line.get_color() for line in left.lines} >= {figures.PLAIN, figures.GUIDED}


def test_curves_of_runs_that_are_still_open_are_the_thesis_s_alone(frame: pd.DataFrame) -> None:
    theirs = cifar.thesis("7.2.3")
    axis = figures.accuracy(frame.iloc[:0], 0.1, theirs).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines if len(line.get_ydata())}
    assert drawn == {
        "thesis, standard": list(theirs.sort_values("percent")["accuracy_standard"]),
        "thesis, LRP": list(theirs.sort_values("percent")["accuracy_lrp"]),
    }
    assert figures.accuracy(frame.iloc[:0], 0.1).axes[0].get_ylim() == (0, 100)


def test_the_null_arm_is_the_mean_distance_of_plain_runs(frame: pd.DataFrame) -> None:
    frame = cifar.after(frame, 3).assign(scope="all")
    frame.loc[frame["factor"] != 0, "factor"] = 0.001
    table, said = epochs.null_arm(frame, [("all", 0.001)], SHARES)
    for share in SHARES:
        own = frame[frame["fraction"] == share]
        plain, guided = (100 * own[own["factor"] == value].set_index("seed")["accuracy"] for value in (0, 0.001))
        apart = [abs(plain[i] - plain[j]) for i, j in itertools.combinations(range(SEEDS), 2)]
        row = table.loc[f"{100 * share:g}"]
        assert row["plain, another seed"] == f"{np.mean(apart):.2f}"
        assert row["whole network, 0.001, same seed"] == f"{(guided - plain).abs().mean():.2f}"
    most = max(table["whole network, 0.001, same seed"], key=float)
    assert f"up to {most} points" in said
    assert epochs.null_arm(frame, [("linear", 0.1)], SHARES)[0].iloc[0, 1] == tables.NOT_RUN


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"difference": 0.001, "low": -0.002, "high": 0.004, "p_holm": 0.5}, "none stands out. **What the first seeds"),
        ({"difference": 0.020, "low": 0.010, "high": 0.030, "p_holm": 0.01}, "1 of them still stand out."),
    ],
)
def test_a_cell_that_was_run_again_is_told_by_its_new_seeds(more: dict[str, float], expected: str) -> None:
    once = pd.Series({"difference": 0.02, "low": 0.01, "high": 0.03, "p_holm": 0.01, "n": 10, "p_least": 0.002})
    cell = pd.DataFrame([{"scope": "all", "factor": 0.1, "fraction": 0.2, "alone": "gain", "verdict": "gain"}])
    again = pd.Series(more | {"n": 30, "p_least": 0.002})
    said = epochs.again_said(cell, {(0.1, 0.2, 3): (once, again)})
    assert said.startswith("Of 1 cells after three epochs 1 stand out: whole network, factor 0.1, at 20 %.")
    assert expected in said
    assert "Not all of them have been run again." in epochs.again_said(cell, {})
    assert epochs.again_said(cell.assign(alone="no effect shown"), {}).startswith("None of the 1 cells")


def test_shares_are_complete_where_every_arm_has_all_seeds(frame: pd.DataFrame) -> None:
    partly = frame.drop(frame.query("fraction == 0.3 and factor == 0.1 and seed == 3").index)
    runs = Collected(partly, (("all", 0.1),), SHARES, "cifar10", True, {})
    assert epochs.complete(runs, SEEDS) == [0.05] and epochs.complete(runs, SEEDS - 1) == list(SHARES)
    assert runs.there == [("all", 0.1)]


def test_cells_get_a_verdict_of_their_arm_and_one_of_all() -> None:
    def arm(scope: str, gain: float) -> list[dict[str, object]]:
        common = {"fraction": 0.1, "fingerprint": "0", "device": "cpu", "code": "0", "scope": scope}
        rng = np.random.default_rng(1)
        noise = rng.normal(0, 0.001, 7)
        return [common | {"factor": 0.1, "seed": seed, "accuracy": 0.5 + gain + noise[seed]} for seed in range(7)]

    plain = [row | {"factor": 0.0, "scope": "all", "accuracy": 0.5} for row in arm("all", 0.0)]
    frame = pd.DataFrame([*plain, *arm("linear", 0.02)])
    table = epochs.cells(frame, [("linear", 0.1)] * 5)
    assert set(table["alone"]) == {"gain"}  # p = 2 / 2^7
    assert set(table["verdict"]) == {"cannot be tested"}  # five times that is above 0.05


def test_the_sentence_on_the_rule_follows_the_verdicts() -> None:
    assert cifar.tested(["gain", "loss", "no effect shown"]).endswith(
        "1 pass the first half as a gain and 1 as a loss."
    )
    assert cifar.tested(["no effect shown"] * 2).endswith(
        "Of 2 cells, corrected over all of them, none shows an effect."
    )
    assert cifar.tested(["cannot be tested"] * 3).endswith("None of 3 cells has pairs enough to be tested.")
    few = cifar.tested(["cannot be tested", "no effect shown", "no effect shown"])
    assert few.endswith(
        "1 have too few pairs to be tested. Of the others, corrected over all of them, none shows an effect."
    )
    assert cifar.tested([]).endswith("nothing can be said yet.")


def test_the_thesis_has_no_numbers_for_other_data() -> None:
    assert cifar.thesis("7.2.3", "mnistm5k").empty and len(cifar.thesis("7.2.3")) == 11


def test_half_the_data_for_the_same_accuracy_is_a_saving_and_the_same_curve_is_none() -> None:
    def runs(times: float) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = [
            {"fraction": share, "factor": factor, "seed": seed, "accuracy": 0.8 + 0.05 * np.log(share * more) + noise}
            for seed, noise in enumerate(rng.uniform(0, 1e-4, 10))
            for factor, more in ((0.0, 1.0), (0.1, times * (1 + noise)))
            for share in (0.05, 0.1, 0.2, 0.5, 1.0)
        ]
        return pd.DataFrame(rows).assign(fingerprint="0", device="cpu", code="0")

    table, above = saving.saved({"twice": runs(2.0), "as much": runs(1.0)})
    assert above == ["twice, 10 seeds"]
    assert [row.split()[0] for row in table["times the data"]] == ["2.000", "1.000"]


def test_data_saved_under_early_stopping_is_of_the_shares_of_the_endpoint(stopped: Collected) -> None:
    assert stopping_effects.data_efficiency(stopped) == (None, [])  # 30 % alone is above those that measure the rule


def test_the_maps_of_the_two_networks_are_those_stored() -> None:
    stored = two_networks.load()
    assert list(stored["networks"]) == ["plain", "guided", "plain, another seed"]
    assert stored["labels"] == list(range(10)), "the first test image of each class"
    figure = two_networks.drawn(stored)
    titles = [axis.get_title() for axis in figure.axes[:10]]
    assert titles == list(CIFAR10_CLASSES)
    drawn = np.asarray(figure.axes[10].images[0].get_array())
    assert drawn.shape == (32, 32) and 0.99 < abs(drawn).max() <= 1.5
    assert "cosine similarity" in two_networks.said(stored)
