"""Claims about ``athena data | train | sweep | report``: what they print, and that a mistake gives no traceback."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from athena import __main__, data, experiments
from athena.experiments import Store
from athena.training import Run, train

STUDY = """
title = "A tiny study"
question = "Does anything happen?"
[run]
dataset = "mnist5k"
fraction = 0.02
epochs = 1
[[grid]]
factor = [0, 1]
seed = [0, 1, 2]
"""


@pytest.fixture(autouse=True)
def nothing_is_downloaded(no_network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "data"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the checkout, with a study in it."""
    monkeypatch.setattr("athena.experiments.places.root", lambda: tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "studies" / "tiny.toml").write_text(STUDY)
    return tmp_path


def athena(*arguments: str | Path) -> Result:
    return CliRunner().invoke(__main__.app, [str(argument) for argument in arguments], catch_exceptions=False)


Main = Callable[..., tuple[int, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`athena.__main__.main` with these arguments: its exit status and what it wrote to standard error."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["athena", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return run


def test_without_arguments_it_shows_what_there_is() -> None:
    shown = subprocess.run([sys.executable, "-m", "athena"], capture_output=True, text=True, env=dict(os.environ))
    assert "Usage:" in shown.stdout + shown.stderr
    for command in ("data", "train", "sweep", "report", "claims"):
        assert re.search(rf"^\W*{command}\b", shown.stdout + shown.stderr, re.MULTILINE), command
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("command", ["data", "train", "sweep", "report", "claims"])
def test_every_command_has_help(command: str) -> None:
    result = athena(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout


@pytest.mark.slow
def test_claims_lists_every_claim_with_its_verdict() -> None:
    shown = athena("claims").stdout
    for number in range(1, 21):
        assert re.search(rf"\bC{number}\b", shown), number
    assert "published number ruled out" in shown


def test_data_lists_the_data_sets_and_which_are_here(tmp_path: Path) -> None:
    result = athena("data")
    assert result.exit_code == 0 and str(tmp_path / "data") in result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.split()[0] in data.NAMES}
    assert tuple(rows) == data.NAMES
    assert [name for name, row in rows.items() if row.split()[1] == "True"] == ["mnist5k", "mnistm5k", "shortcut5k"]
    assert data.load("mnist5k").fingerprint in rows["mnist5k"]


def test_train_prints_the_accuracy_after_each_epoch() -> None:
    result = athena("train", "--dataset", "mnist5k", "--fraction", "0.02", "--epochs", "2", "--seed", "3")
    expected = train(Run(dataset="mnist5k", fraction=0.02, epochs=2, seed=3)).accuracy
    assert result.exit_code == 0
    assert re.findall(r"epoch (\d): (\S+)%", result.stdout) == [
        (str(epoch), f"{100 * accuracy:.2f}") for epoch, accuracy in enumerate(expected, 1)
    ]
    assert re.search(r"\d s of training on (cpu|cuda)", result.stdout)
    assert "diverged" not in result.stdout


def test_train_takes_every_option_and_says_where_it_diverged() -> None:
    result = athena(
        *("train", "--model", "mlp", "--dataset", "mnist5k", "--fraction", "0.02", "--factor", "1e30"),
        *("--target", "logits", "--scope", "all", "--rule", "Zero()", "--epochs", "1", "--device", "cpu"),
    )
    assert result.exit_code == 0
    assert "diverged in step 1, at linear" in result.stdout


def test_sweep_runs_a_study_and_report_shows_it(folder: Path) -> None:
    study = folder / "studies" / "tiny.toml"
    done = athena("sweep", study, "--workers", "1")
    store = Store(folder / "results" / "tiny.jsonl")
    assert done.exit_code == 0 and f"{store.path}: 6 runs" in done.stdout
    assert len(store.lines()) == 6
    before = store.path.read_bytes()
    assert athena("sweep", study, "--workers", "1").exit_code == 0
    assert store.path.read_bytes() == before

    shown = athena("report", study)
    assert shown.exit_code == 0
    assert "A tiny study" in shown.stdout and "Does anything happen?" in shown.stdout
    assert "6 of 6 runs" in shown.stdout
    header, row = shown.stdout.rstrip().splitlines()[-2:]
    names = header.split()
    table = dict(zip(names, row.split(maxsplit=len(names) - 1), strict=True))
    final = {(line["run"]["factor"], line["run"]["seed"]): line["accuracy"][-1] for line in store.lines()}
    plain, guided = ([final[factor, seed] for seed in range(3)] for factor in (0.0, 1.0))
    assert float(table["factor"]) == 1 and table["n"] == "3"
    assert float(table["plain"]) == pytest.approx(100 * sum(plain) / 3, abs=0.006)
    assert float(table["guided"]) == pytest.approx(100 * sum(guided) / 3, abs=0.006)
    assert float(table["difference"]) == pytest.approx(100 * (sum(guided) - sum(plain)) / 3, abs=0.006)


def test_a_sweep_takes_over_what_another_study_has_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "studies" / "part.toml").write_text(STUDY.replace("[0, 1, 2]", "[1]"))
    assert athena("sweep", folder / "studies" / "part.toml", "--workers", "1").exit_code == 0
    trained: list[Run] = []

    def remembered(run: Run, device: str | None) -> object:
        trained.append(run)
        return train(run, device)

    monkeypatch.setattr("athena.experiments.backends.train", remembered)
    assert athena("sweep", folder / "studies" / "tiny.toml", "--workers", "1").exit_code == 0
    assert sorted({run.seed for run in trained}) == [0, 2] and len(trained) == 4
    trained.clear()
    (folder / "results" / "tiny.jsonl").rename(folder / "results" / "elsewhere.jsonl")
    done = athena("sweep", folder / "studies" / "tiny.toml", "--workers", "1")
    assert not trained and "6 runs are taken over from elsewhere.jsonl, measured by this code" in done.stderr
    (folder / "results" / "tiny.jsonl").unlink()
    done = athena("sweep", folder / "studies" / "tiny.toml", "--workers", "1", "--fresh")
    assert len(trained) == 6 and "taken over" not in done.stderr


def test_a_report_on_a_sweep_under_way_counts_what_is_there(folder: Path) -> None:
    (folder / "studies" / "part.toml").write_text(STUDY.replace("[0, 1, 2]", "[0, 1]"))
    athena("sweep", folder / "studies" / "part.toml", "--workers", "1")
    (folder / "results" / "part.jsonl").rename(folder / "results" / "tiny.jsonl")
    with (folder / "results" / "tiny.jsonl").open("a") as file:
        file.write('{"key": "torn')
    shown = athena("report", folder / "studies" / "tiny.toml")
    assert shown.exit_code == 0 and "4 of 6 runs" in shown.stdout


def test_a_report_beside_the_thesis_shows_its_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = experiments.published
    (folder / "book").symlink_to(Path(experiments.__file__).parents[2] / "book")
    table = published("accuracy").query("model == 'mlp' and percent == 5")
    assert len(table) > 0
    name = table["table"].iloc[0]
    text = STUDY.replace("[run]", f'thesis_table = "{name}"\n[run]').replace("fraction = 0.02", "")
    (folder / "studies" / "tiny.toml").write_text(text + "fraction = [0.05]\n")
    assert athena("sweep", folder / "studies" / "tiny.toml", "--workers", "1").exit_code == 0
    shown = athena("report", folder / "studies" / "tiny.toml")
    assert shown.exit_code == 0
    for column in ("accuracy_lrp", "accuracy_standard"):
        assert f"{table[column].iloc[0]:.2f}".rstrip("0") in shown.stdout


# What a user can mend is said in one message, with exit status 1 ------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("epochs = 1", "epoch = 1", "epoch"),
        ("[run]", "[run", "line 4"),
        ('"mnist5k"', '"mnist6k"', "mnist6k"),
        ("seed = [0, 1, 2]", 'target = ["nothing"]', "nothing"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "report"])
def test_a_mistake_in_a_study_is_told_by_file_and_entry(
    folder: Path, main: Main, command: str, old: str, new: str, named: str
) -> None:
    study = folder / "studies" / "tiny.toml"
    study.write_text(STUDY.replace(old, new))
    status, message = main(command, study)
    assert status == 1
    assert message.startswith(f"athena: {study} is not a study: ") and named in message
    assert message.count("\n") == 1


def test_a_missing_data_set_is_told_with_what_to_do(main: Main, tmp_path: Path) -> None:
    status, message = main("train", "--dataset", "mnist")
    assert status == 1
    assert message.startswith(f"athena: mnist is not in {tmp_path / 'data'}")
    assert "ATHENA_DATA" in message and "mnist5k" in message
    assert "Traceback" not in message


def test_a_sweep_on_a_missing_data_set_measures_nothing(main: Main, folder: Path) -> None:
    (folder / "studies" / "tiny.toml").write_text(STUDY.replace("mnist5k", "cifar10"))
    status, message = main("sweep", folder / "studies" / "tiny.toml")
    assert status == 1 and message.startswith("athena: cifar10 is not in")
    assert Store(folder / "results" / "tiny.jsonl").lines() == []


@pytest.mark.parametrize(
    "option, value",
    [
        ("--model", "resnet"),
        ("--fraction", "2"),
        ("--epochs", "0"),
        ("--target", "nothing"),
        ("--rule", "Epsilom(1)"),
        ("--scope", "everything"),
        ("--factor", "nan"),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--device", "hpu"),
        ("--factor", "1e+39"),
        ("--seed", str(2**64)),
        ("--seed", "-1"),
    ],
)
def test_an_option_that_no_run_can_have_is_told_by_its_value(main: Main, option: str, value: str) -> None:
    status, message = main(*("train", "--dataset", "mnist5k", "--fraction", "0.02", "--factor", "1"), option, value)
    assert status == 1
    assert message.startswith("athena: ") and value in message
    assert "Traceback" not in message


@pytest.mark.parametrize("option, value", [("--device", "meta"), ("--device", "hpu"), ("--workers", "0")])
def test_an_option_that_no_sweep_can_have_is_told_before_anything_is_run(
    main: Main, folder: Path, option: str, value: str
) -> None:
    status, message = main("sweep", folder / "studies" / "tiny.toml", option, value)
    assert status == 1 and message.startswith("athena: ") and value in message and message.count("\n") == 1
    assert not (folder / "results" / "tiny.jsonl").exists()


def test_a_download_that_fails_fails_the_command(main: Main) -> None:
    status, message = main("data", "--download")
    assert status == 1
    assert message.startswith("athena: these could not be had: mnist, cifar10")


def test_results_that_cannot_be_written_are_told(main: Main, folder: Path) -> None:
    (folder / "results").rmdir()
    (folder / "results").write_text("a file")
    status, message = main("sweep", folder / "studies" / "tiny.toml", "--workers", "1")
    assert status == 1 and message.startswith("athena: ") and "cannot be written" in message
    assert message.count("\n") == 1


def test_a_scope_that_guides_nothing_is_told(main: Main) -> None:
    options = ("--dataset", "mnist5k", "--fraction", "0.02", "--factor", "1", "--scope", "convolutional")
    status, message = main("train", *options)
    assert status == 1
    assert message.startswith("athena: ") and "convolutional" in message


def test_a_folder_in_the_place_of_a_study_is_told(main: Main, folder: Path) -> None:
    status, message = main("sweep", folder / "studies")
    assert status in (1, 2)
    assert "directory" in message


def test_a_report_without_results_says_so(main: Main, folder: Path) -> None:
    status, message = main("report", folder / "studies" / "tiny.toml")
    assert status == 1
    assert message.startswith("athena: nothing has been measured of 'tiny'") and message.count("\n") == 1


def test_a_report_on_a_sweep_that_has_finished_no_run_says_so(main: Main, folder: Path) -> None:
    with Store(folder / "results" / "tiny.jsonl").open():
        pass
    status, message = main("report", folder / "studies" / "tiny.toml")
    assert status == 1
    assert message.startswith("athena: ") and message.count("\n") == 1


def test_a_store_that_is_being_written_is_told(main: Main, folder: Path) -> None:
    with Store(folder / "results" / "tiny.jsonl").open():
        status, message = main("sweep", folder / "studies" / "tiny.toml")
    assert status == 1
    assert message.startswith("athena: ") and "tiny.jsonl is being written" in message


def test_a_damaged_line_of_the_store_is_told(main: Main, folder: Path) -> None:
    (folder / "results" / "tiny.jsonl").write_text("{]\n{}\n")
    status, message = main("report", folder / "studies" / "tiny.toml")
    assert status == 1
    assert "tiny.jsonl, line 1 is damaged" in message and message.count("\n") == 1


def test_results_on_other_data_are_told(main: Main, folder: Path) -> None:
    store = Store(folder / "results" / "tiny.jsonl")
    line = train(Run(dataset="mnist5k", fraction=0.02, epochs=1)).line()
    with store.open() as append:
        append(line | {"fingerprint": "0123456789abcdef"})
    status, message = main("sweep", folder / "studies" / "tiny.toml", "--workers", "1")
    assert status == 1
    assert message.startswith("athena: ") and "0123456789abcdef" in message and "Traceback" not in message
