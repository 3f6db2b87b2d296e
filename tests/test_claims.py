"""Claims about the verdicts on the thesis's claims and about the contrasts of the decisive experiment."""

import itertools

import numpy as np
import pandas as pd
import pytest

from athena import experiments
from athena.experiments import claims, decisive, statistics
from athena.experiments.store import frame as as_frame


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return claims.claims()


def test_every_claim_of_the_thesis_has_a_verdict(table: pd.DataFrame) -> None:
    answered = {name for names in table["claim"] for name in names.split(", ")}
    assert answered == set(experiments.published("claims")["id"])
    assert (table["verdict"] != "").all() and (table["n"] > 0).all()
    assert set(table["study"]) <= {path.stem for path in (experiments.root() / "studies").glob("*.toml")}


def test_a_claim_is_measured_on_the_pairs_that_its_reading_names(table: pd.DataFrame) -> None:
    frame = experiments.results("mnist-factors").query("factor in (0, 0.2)").set_index(["fraction", "seed", "factor"])
    differences = frame["accuracy"].unstack("factor").diff(axis=1)[0.2].unstack("seed")
    by_seed = differences.dropna(axis=1).mean()  # a study may be under way: seeds that have every share
    row = table[(table["claim"] == "C7") & table["reading"].str.startswith("factor 0.2")].iloc[0]
    assert row["measured"] == pytest.approx(100 * by_seed.mean()) and row["n"] == len(by_seed) >= 4
    assert row["published"] == 0.15
    with_ten = table[(table["claim"] == "C14") & (table["n"] == 10)].iloc[0]
    part = experiments.results("cifar-linear").query("precision == 'tf32' and 0.01 < fraction <= 0.3")
    part = part.assign(accuracy=part["accuracies"].str[2]).groupby(["seed", "factor"])["accuracy"].mean().unstack()
    assert with_ten["measured"] == pytest.approx(100 * (part[0.1] - part[0.0]).mean())


def test_the_verdicts_are_one_family(table: pd.DataFrame) -> None:
    tested = table[table["p"].notna() & (table["n"] >= 6)]
    assert tested.loc[tested["p"].idxmin(), "p_holm"] == pytest.approx(len(tested) * tested["p"].min())
    assert (tested["p_holm"] >= tested["p"]).all()
    few = table[(table["n"] == 4) & table["p"].notna()]
    assert (few["verdict"] == "cannot be tested").all()  # 2 in 16 is the least p of four pairs


def test_a_published_number_far_outside_is_ruled_out(table: pd.DataFrame) -> None:
    first = table[table["claim"] == "C1, C2"]
    assert (first["p_published"] < 0.001).all() and (first["high"] < first["published"]).all()
    assert set(first["verdict"]) <= {"published number ruled out", "loss"}


@pytest.mark.slow
def test_the_p_of_a_largest_is_the_share_of_seed_flips_with_as_large_a_largest() -> None:
    reading = next(reading for reading in claims.readings() if reading.claim == "C5")
    frame = experiments.results("mnist-factors").query("factor in (0, 1)")
    wide = frame.pivot_table(index="seed", columns=["factor", "fraction"], values="accuracy")
    differences = (wide[1.0] - wide[0.0]).dropna().to_numpy()
    seeds, largest = len(differences), []
    for signs in itertools.product((1, -1), repeat=seeds):
        means = [sum(s * d for s, d in zip(signs, column, strict=True)) / seeds for column in differences.T]
        largest.append(max(means))
    expected = np.mean([value >= max(differences.mean(axis=0)) - 1e-12 for value in largest])
    row = claims.claims().query("claim == 'C5'").iloc[0]
    assert reading.of == "largest" and row["p"] == expected
    assert row["measured"] == pytest.approx(100 * differences.mean(axis=0).max())


# The decisive experiment ---------------------------------------------------------------------------------------------


def measured(gains: dict[str, float], seeds: int = 10) -> pd.DataFrame:
    """The decisive study as if run: accuracy by seed and share, and what each arm gains in points."""
    study = experiments.Study.read(experiments.root() / "studies" / "decisive.toml")
    rng = np.random.default_rng(0)
    lines = [
        {"key": run.key, "run": dict(vars(run)), "accuracy": [0.9], "fingerprint": "x", "device": "cpu", "code": "1"}
        for run in study.runs
        if run.seed < 1000 + seeds
    ]
    frame = decisive.runs(as_frame(lines))
    noise = 0.0005 * rng.normal(size=len(frame))
    return frame.assign(accuracy=0.9 + frame["arm"].map(gains).fillna(0) / 100 + frame["seed"] % 7 / 100 + noise)


def test_every_run_of_the_study_belongs_to_one_of_ten_arms_under_each_protocol() -> None:
    frame = measured({}, seeds=20)
    assert len(frame) == 1600
    counts = frame.groupby(["arm", "protocol"]).size()
    assert len(counts) == 20 and set(counts) == {80}
    assert set(frame["arm"]) == set(decisive.ARMS)


def test_a_seed_that_is_not_complete_does_not_count() -> None:
    frame = measured({}).drop(columns=["arm", "protocol"])
    assert decisive.runs(frame.iloc[:-1])["seed"].nunique() == 9


def test_the_contrasts_are_those_of_the_plan_corrected_together() -> None:
    gains = {"R of the true class": 1.0, "smoothing and R of the true class": 0.2, "smoothing, equal time": 0.5}
    table = decisive.contrasts(measured(gains))
    assert table["contrast"].tolist() == ["A", "B", "C"] * 2
    assert (100 * table["difference"]).round(1).tolist() == [1.0, 1.0, -0.3] * 2
    assert (table["n"] == 10).all() and table["p_holm"].tolist() == pytest.approx([6 * 2 / 1024] * 6)
    assert [statistics.verdict(row) for _, row in table.iterrows()] == ["gain", "gain", "loss"] * 2


def test_the_means_of_the_arms_are_over_shares_and_seeds() -> None:
    frame = measured({"smoothing": 2.0})
    means = decisive.arms(frame).set_index(["arm", "protocol"])
    own = frame.query("arm == 'smoothing' and protocol == 'OneCycle'")
    assert len(means) == 20
    assert means.loc[("smoothing", "OneCycle"), "mean"] == pytest.approx(own["accuracy"].mean())


@pytest.mark.parametrize(
    "true_class, with_smoothing, helps, worth_using",
    [(1.0, 0.2, True, False), (1.0, 0.4, True, True), (0.0, 0.4, False, True), (-1.0, -1.0, False, False)],
)
def test_the_conclusions_are_those_of_the_plan(
    true_class: float, with_smoothing: float, helps: bool, worth_using: bool
) -> None:
    table = decisive.contrasts(
        measured({"R of the true class": true_class, "smoothing and R of the true class": with_smoothing})
    )
    assert decisive.conclusions(table) == (dict.fromkeys(decisive.PROTOCOLS, helps), worth_using)


def test_a_gain_over_the_shuffle_alone_concludes_nothing() -> None:
    table = decisive.contrasts(measured({"R of the true class": 1.0, "gradient × activation": 1.0}))
    assert not any(decisive.conclusions(table)[0].values())
