"""Claims about how the book writes its results down."""

import pandas as pd
import pytest

from athena import experiments, statistics, tables


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return experiments.results("mnist-factors").query("factor in (0, 0.2) and fraction < 0.15")


def test_a_difference_stands_in_points_with_its_interval() -> None:
    assert tables.points({"difference": 0.00123, "low": -0.004, "high": 0.01}) == "+0.12 [-0.40, +1.00]"
    assert tables.points({"difference": -0.5, "low": float("nan"), "high": float("nan")}) == "-50.00 (one pair)"
    assert tables.percent(0.93721) == "93.7 %" and tables.percent(0.5, 0) == "50 %"


@pytest.mark.parametrize("benchmark", ["lrp-avx512", "lrp-h100", "guidance-avx512", "guidance-h100", "training-avx512"])
def test_what_a_benchmark_printed_is_read_cell_by_cell(benchmark: str) -> None:
    lines = (experiments.root() / "results" / "benchmarks" / f"{benchmark}.txt").read_text().splitlines()
    conditions, found = tables.printed(benchmark)
    assert conditions == lines[0] and conditions.startswith("PyTorch")
    rows = [" ".join(row).split() for _, table in found for row in table.to_numpy()]
    wordy = [line.split() for line in lines[1:] if "  " in line and not line.startswith(("arm ", "loop "))]
    assert rows == wordy
    assert all(title in lines for title, _ in found)
    assert all((table.iloc[:, 1].str.fullmatch(r"\d+\.\d+")).all() and len(table) > 1 for _, table in found)


def test_a_comparison_lists_what_was_measured_and_what_was_not(frame: pd.DataFrame) -> None:
    table = tables.comparison(statistics.compare(frame), fractions=[0.05, 0.5])
    assert list(table.index) == ["50", "10", "5", "1"]
    assert table.loc["50", "difference"] == tables.NOT_RUN
    assert (table.loc["50", ["plain", "guided", "p"]] == "").all() and table.loc["50", "pairs"] == 0
    plain = frame.query("factor == 0 and fraction == 0.1")["accuracy"].mean()
    assert table.loc["10", "plain"] == f"{100 * plain:.2f}" and table.loc["10", "pairs"] == 4


def test_the_thesis_stands_beside_its_own_shares_alone(frame: pd.DataFrame) -> None:
    published = experiments.published("accuracy").query("table == '7.1.2' and percent != 5")
    table = tables.comparison(statistics.compare(frame), published)
    row = published.set_index("percent").loc[10]
    assert table.loc["10", "thesis LRP"] == f"{row['accuracy_lrp']:.2f}"
    assert table.loc["10", "thesis diff."] == f"{row['accuracy_lrp'] - row['accuracy_standard']:+.2f}"
    assert table.loc["5", "thesis plain"] == table.loc["5", "thesis diff."] == ""


def test_an_endpoint_no_seed_has_reached_is_not_yet_run(frame: pd.DataFrame) -> None:
    partly = frame.drop(frame.query("factor != 0 and fraction == 0.1").index)
    for runs, expected in ((frame, "+"), (partly, tables.NOT_RUN)):
        row = tables.endpoints(statistics.compare(runs, over="fraction"), ["0.2"], "factor").loc["0.2"]
        number = row["mean difference (points)"]
        assert (number == expected) if runs is partly else number.startswith(("+", "-"))
        assert row["verdict"] == "no effect shown"


def test_a_table_of_one_share_says_which(frame: pd.DataFrame) -> None:
    one = frame.query("fraction == 0.1")
    table = tables.by_share(statistics.compare(one), one)
    assert list(table["fraction"]) == [0.1] and table.columns[0] == "fraction"
    both = statistics.compare(frame)
    assert tables.by_share(both, frame) is both
