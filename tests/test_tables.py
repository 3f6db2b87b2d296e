"""Claims about how the book writes its results down."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from athena import experiments, statistics, tables
from athena.book import scale
from athena.book.timing import step_ratios


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return experiments.results("mnist-factors").query("factor in (0, 0.2) and fraction < 0.15 and seed < 4")


def test_a_difference_stands_in_points_with_its_interval() -> None:
    assert (
        tables.points({"difference": 0.00123, "low": -0.004, "high": 0.01}) == "+0.12 [−0.40,\N{NO-BREAK SPACE}+1.00]"
    )
    assert tables.points({"difference": -0.5, "low": float("nan"), "high": float("nan")}) == "−50.00 (one pair)"
    assert tables.percent(0.93721) == "93.7\N{NO-BREAK SPACE}%" and tables.percent(0.5, 0) == "50\N{NO-BREAK SPACE}%"


BENCHMARKS = sorted((experiments.root() / "results" / "benchmarks").iterdir())


@pytest.mark.parametrize("path", [path for path in BENCHMARKS if path.stem != "scale"], ids=lambda p: p.stem)
def test_a_stored_benchmark_compares_every_arm_with_the_first_of_its_table(path: Path) -> None:
    conditions, measured = tables.benchmark(path.stem)
    assert conditions.startswith("PyTorch 2.") and conditions.endswith((" CPU time", " wall-clock time"))
    assert len(measured) == len(json.loads(path.read_text("utf8"))["tables"]) > 1
    for table in measured.values():
        assert table["arm"].is_unique and len(table) > 1
        assert not (table.drop(columns=["arm", "spread"], errors="ignore") <= 0).any(axis=None)
        milliseconds, ratio = table.iloc[:, 1], table.iloc[:, 2]
        assert ratio[0] == 1
        assert ratio.to_numpy() == pytest.approx(milliseconds / milliseconds[0], rel=0.2)


def test_a_sweep_keeps_nine_tenths_of_the_ideal_throughput_of_two_processes_with_runs_of_one_second() -> None:
    table, said = scale.table(), scale.limits()
    (two,) = re.findall(r"Two processes keep (\d+)\s% of the ideal throughput with runs of 1 s", said)
    assert int(two) >= 90
    assert table.loc["2 processes, runs of 1 s", "of the ideal"] == f"{two}\N{NO-BREAK SPACE}%"
    (most,) = re.findall(r"and so ends (\d+) a second at most", said)
    times = table.loc["1000 threads of Dask, runs of 1 s", ["scheduler (ms a run)", "store (ms a run)"]].astype(float)
    assert int(most) == pytest.approx(1000 / times.max(), rel=0.02)


def test_the_table_of_a_benchmark_leaves_empty_what_was_not_measured() -> None:
    measured = pd.DataFrame(
        {"arm": ["plain", "ours"], "ms": [12.34, 15], "of athena": [None, 1.005], "calls": [35, 384]}
    )
    assert tables.cells(measured).to_numpy().tolist() == [["plain", "12.3", "", "35"], ["ours", "15.0", "1.00", "384"]]
    assert tables.title({"title": "CNN, 8 x 3 x 32 x 32", "rounds": 7}) == "CNN, 8 x 3 x 32 x 32, 7 rounds"
    assert tables.title({"title": "CNN", "rounds": None}) == "CNN"


@pytest.mark.slow
@pytest.mark.parametrize("benchmark, network", [("lrp", "mlp-1"), ("guidance", "mlp-class"), ("training", "mlp")])
def test_a_benchmark_stores_what_the_book_reads(benchmark: str, network: str, tmp_path: Path) -> None:
    program, out = (
        experiments.root() / "benchmarks" / f"{benchmark}.py",
        tmp_path / "results" / "benchmarks" / "new.json",
    )
    out.parent.mkdir(parents=True)
    options = ["--only", network, "--rounds", "2", "--alone", "--out", str(out)]
    done = subprocess.run([sys.executable, str(program), *options], capture_output=True, text=True, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "root", lambda: tmp_path)
        conditions, measured = tables.benchmark("new")
    ((title, table),) = measured.items()
    assert done.stdout.splitlines() == [conditions, "", title, *tables.cells(table).to_string(index=False).splitlines()]
    assert list(table["arm"])[1:] and table.iloc[0, 2] == 1


def test_what_could_be_shown_stands_in_points() -> None:
    assert tables.detectable({"detectable": 0.00126}) == "±0.13"
    assert tables.detectable({"detectable": float("inf")}) == "none"
    assert tables.detectable({"detectable": float("nan")}) == ""


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
    assert table.loc["10", "thesis diff."] == tables.signed(row["accuracy_lrp"] - row["accuracy_standard"])
    assert table.loc["5", "thesis plain"] == table.loc["5", "thesis diff."] == ""


def test_an_endpoint_no_seed_has_reached_is_not_yet_run(frame: pd.DataFrame) -> None:
    partly = frame.drop(frame.query("factor != 0 and fraction == 0.1").index)
    for runs, expected in ((frame, "+"), (partly, tables.NOT_RUN)):
        row = tables.endpoints(statistics.compare(runs, over="fraction"), ["0.2"], "factor").loc["0.2"]
        number = row["mean difference (points)"]
        assert (number == expected) if runs is partly else number.startswith(("+", "−"))
        assert row["verdict"] == ("4 pairs: cannot be tested" if runs is frame else tables.NOT_RUN)
        assert row["p (Holm)"] == ""  # no correction is made where nothing could be shown
        assert row["could be shown (points)"] == ("" if runs is partly else "none")


def test_a_table_of_one_share_says_which(frame: pd.DataFrame) -> None:
    one = frame.query("fraction == 0.1")
    table = tables.by_share(statistics.compare(one), one)
    assert list(table["fraction"]) == [0.1] and table.columns[0] == "fraction"
    both = statistics.compare(frame)
    assert tables.by_share(both, frame) is both


def test_the_largest_difference_is_told_with_its_share() -> None:
    table = pd.DataFrame(
        {
            "fraction": [0.1, 0.2, 0.5],
            "difference": [0.01, 0.034, float("nan")],
            "low": [0.0, 0.03, float("nan")],
            "high": [0.02, 0.04, float("nan")],
        }
    )
    assert tables.largest(table) == "+3.40 [+3.00,\N{NO-BREAK SPACE}+4.00] at 20 %"


def test_guided_steps_are_timed_beside_plain_ones_and_leave_the_network_alone() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 20), nn.ReLU(), nn.Linear(20, 10))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ratios = step_ratios(network, torch.rand(4, 1, 32, 32), ["linear", "all"], rounds=3)
    assert list(ratios.columns) == ["linear", "all"] and len(ratios) == 3 and (ratios > 0).all(axis=None)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert list(step_ratios(network, torch.rand(4, 1, 32, 32), ["all"], rounds=0).median().isna()) == [True]
