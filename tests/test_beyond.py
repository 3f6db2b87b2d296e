"""Claims about the comparison of uses and the search, on studies as if they had been run."""

import pytest
from sweeps import as_if_run

from athena.experiments import beyond, results
from athena.training import Run


def test_every_arm_of_the_comparison_is_in_its_study_and_every_run_in_an_arm() -> None:
    frame = as_if_run("uses", lambda run: 0.0)
    keys = set(frame["key"])
    for use in beyond.COMPARED:
        assert len(beyond.of_arm(frame, use.arm)) == 20, use.name
        keys -= set(beyond.of_arm(frame, use.arm)["key"])
        if use.control:
            assert len(beyond.of_arm(frame, use.control)) == 20, use.name
            keys -= set(beyond.of_arm(frame, use.control)["key"])
    left = frame[frame["key"].isin(keys)]
    assert set(left["use"].dropna()) <= {"features"}  # the predicted class and gradient times activation beside it
    assert set(left.loc[left["use"].isna(), "factor"]) == {0.0}


@pytest.mark.parametrize("study", beyond.FURTHER)
def test_every_further_study_of_uses_holds_each_of_its_arms_and_their_controls(study: str) -> None:
    frame = as_if_run(study)
    table = beyond.compared(frame, as_if_run("uses-time")).set_index("use")
    promising = ["scaling gradients, factor -0.5", "retraining: masked difference", "dropout of what is relevant"]
    every = [use.name for use in beyond.COMPARED]
    assert sorted(table.index) == sorted([*promising, "label smoothing"] if study == "uses-cifar10" else every)
    assert (table["n"] == 10).all()
    assert (table.loc[table["against"] != "", "n_control"] == 10).all()
    assert set(frame["seed"]) == set(range(10, 20))


def test_on_cifar_10_are_the_uses_of_relevance_that_did_best_one_of_each_kind() -> None:
    table = beyond.compared(results("uses"), results("uses-time"))
    table = table[table["relevance"]].sort_values("difference", ascending=False)
    table["kind"] = table["use"].str.split(":").str[0]
    best = table.drop_duplicates("kind")["use"].head(3).tolist()
    assert best == ["scaling gradients, factor -0.5", "retraining: masked difference", "dropout of what is relevant"]


def test_a_use_helps_where_it_beats_equal_time_and_its_control() -> None:
    def gain(run: Run) -> float:
        if run.use == "features":
            return 1.0 if run.control is None else 0.2
        if run.use == "excitation dropout":
            return 1.0
        if run.use == "dropout":
            return 1.0
        return -1.0 if run.use == "weighting" else 0.0

    table = beyond.compared(as_if_run("uses", gain), as_if_run("uses-time")).set_index("use")
    assert table.loc["features × (1 + R)", "helps"]
    assert table.loc["features × (1 + R)", "difference"] == pytest.approx(0.01, abs=5e-4)
    assert table.loc["dropout of what is relevant", "verdict"] == "gain"
    assert table.loc["dropout of what is relevant", "verdict_control"] == "no effect shown"
    assert not table.loc["dropout of what is relevant", "helps"]
    assert table.loc["weighting: loss", "verdict"] == "loss"
    assert (table["n"] == 10).all()


def test_a_use_is_held_against_plain_training_of_at_least_its_time() -> None:
    timed = as_if_run("uses-time", seconds=lambda run: 1.3 if run.use == "features" else 1.0)
    table = beyond.compared(as_if_run("uses"), timed).set_index("use")
    assert table.loc["features × (1 + R)", "time"] == pytest.approx(1.3)
    assert table.loc["features × (1 + R)", "epochs"] == 4.5
    assert table.loc["gradient × |weight|", "epochs"] == 3


def test_the_search_ranks_settings_and_chooses_uses_of_relevance_alone() -> None:
    def gain(run: Run) -> float:
        if run.use == "dropout":
            return 5.0
        if run.use == "hiding" and run.control is None:
            return 1.0 + 10 * run.strength
        return 0.5 if run.use == "features" and run.control is None else 0.0

    table = beyond.found(as_if_run("search", gain))
    assert table["family"].iloc[0] == "dropout" and not table["relevance"].iloc[0]
    assert set(table["n"]) == {4}
    assert not table["setting"].isna().any()
    assert not table.duplicated(["family", "setting"]).any()
    chosen = beyond.chosen(table)
    assert chosen["setting"].tolist() == ["the most relevant, 20 %"]  # the second is of the same family
    assert chosen["difference"].iloc[0] == pytest.approx(0.03, abs=1e-3)


def test_arms_that_are_one_arm_or_several_are_refused() -> None:
    frame = as_if_run("uses", lambda run: 0.0)
    plain = beyond.of_arm(frame, {})
    with pytest.raises(ValueError, match="both arms are the same"):
        beyond.contrast(plain, plain, over="fraction")
    with pytest.raises(ValueError, match="an arm has one"):
        beyond.contrast(frame[frame["use"] == "features"], plain, over="fraction")


def test_of_the_tuning_each_optimiser_has_its_best_rate() -> None:
    def gain(run: Run) -> float:
        return 5.0 if run.learning_rate in (1e-3, 0.3) else 0.0

    table = beyond.optimisers(as_if_run("optimisers-tuning", gain)).set_index("arm")
    assert table["learning_rate"]["Adam"] == 1e-3 and table["learning_rate"]["SGD"] == 0.3
    assert table["difference"]["SGD"] == pytest.approx(0, abs=2e-3)
    assert table["difference"]["AdaGrad"] == pytest.approx(-0.05, abs=2e-3)
    assert len(table) == 8 and "SGD × relevance shuffled" in table.index


def test_the_confirmation_judges_three_contrasts_and_corrects_them_together() -> None:
    def gain(run: Run) -> float:
        return 0.5 if run.factor == -0.25 and run.control is None else 0.2 * (run.epochs > 3)

    frame = as_if_run("confirm", gain)
    assert sum(len(beyond.of_arm(frame, arm)) for arm in beyond.CONFIRMED_ARMS.values()) == len(frame) == 300
    table = beyond.confirmed(frame)
    assert table["verdict"].tolist() == ["gain"] * 3 + [""] * 3
    assert (100 * table["difference"]).round(1).tolist() == [0.3, 0.5, 0.5, 0.5, 0.2, -0.2]
    assert (table["n"] == 30).all()
    assert (table["p_holm"][:3] >= table["p"][:3]).all()


def test_a_proposal_of_the_thesis_helps_if_it_beats_plain_training_and_its_controls() -> None:
    def gain(run: Run) -> float:
        learned = run.learn_every and run.control is None
        return 1.0 if learned else 0.5 * (run.granularity == "filter" and run.factor == 1)

    table = beyond.future(as_if_run("future", gain))
    assert (table["n"] == 10).all() and table["judged"].all()
    assert (100 * table["difference"]).round(1).tolist() == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert beyond.proposals(table) == {
        "learned factors": True,
        "filters, factor 1": False,
        "filters, factor -0.5": False,
    }
