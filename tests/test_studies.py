"""Claims about studies: grids of runs, and the files that hold them."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from runs import others
from sweeps import STUDY, TINY

from athena import experiments
from athena.experiments import (
    ARM,
    Store,
    Study,
    grid,
    listed,
    plain,
)
from athena.training import Run


def test_a_grid_is_every_combination() -> None:
    runs = grid(TINY, factor=[0.5, 1], seed=[0, 1, 2], target=["softmax", "logits"])
    assert len(runs) == len(set(runs)) == 12
    assert {(run.factor, run.seed, run.target) for run in runs} == {
        (factor, seed, target) for factor in (0.5, 1.0) for seed in (0, 1, 2) for target in ("softmax", "logits")
    }
    assert {replace(run, factor=0.0, seed=0, target="predicted") for run in runs} == {TINY}


def test_plain_arms_of_a_grid_are_run_once() -> None:
    guidance = {"target": ["softmax", "logits"], "rule": ["Zero()", "Gamma(0.25)"], "scope": ["all", "linear"]}
    runs = grid(TINY, factor=[0, 0.1], seed=[0, 1], **guidance)
    assert len(runs) == 2 + 2 * 8
    assert [run for run in runs if run.factor == 0] == [TINY, replace(TINY, seed=1)]


def test_a_plain_run_differs_from_its_guided_partner_in_the_arm_alone() -> None:
    guided = replace(Run(), **(others(Run()) | {"factor": 0.0}))  # with a use the factor must be 0
    ours, theirs = plain(guided), guided
    assert ours.factor == 0 and plain(ours) == ours
    for field in fields(Run):
        if field.name not in ARM:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
        elif field.name != "factor":
            assert getattr(ours, field.name) == field.default, field.name


def test_a_study_is_read_with_its_runs_once_each(tmp_path: Path) -> None:
    (tmp_path / "some-study.toml").write_text(STUDY)
    study = Study.read(tmp_path / "some-study.toml")
    assert (study.name, study.title, study.question) == ("some-study", "A title", "A question?")
    assert study.runs == (*grid(TINY, factor=[0, 1], seed=[0, 1]), replace(TINY, seed=2))
    assert study.store.path == experiments.root() / "results" / "some-study.jsonl"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("[run]", "[run", "line 4"),
        ("[run]", "[runs]", "run"),
        ("[[grid]]", "[[grids]]", "grid"),
        ('title = "A title"', "", "title"),
        ("[run]", 'author = "me"\n[run]', "author"),
        ("epochs = 1", "epoch = 1", "epoch"),
        ("epochs = 1", "epochs = 0", "epochs=0"),
        ('dataset = "mnist5k"', 'dataset = "mnist6k"', "mnist6k"),
        ("seed = [0, 1]", "sed = [0, 1]", "sed"),
        ("seed = [0, 1]", 'target = ["nothing"]', "target='nothing'"),
        ("seed = [0, 1]", 'rule = ["Epsilom(1)"]', "Epsilom"),
        ("seed = [0, 1]", "seed = 1", "seed"),
        ("seed = [0, 1]", 'scope = "all"', "scope"),
        ("seed = [0, 1]", 'scope = ["everything"]', "everything"),
        ("seed = [0, 1]", 'model = "mlp"', "model"),
        ("[run]\n", "", "it has no [run]"),
        ("[[grid]]", "[grid]", ""),
        ('question = "A question?"', "question = 5", "question = 5: it must be"),
        ('question = "A question?"', 'question = ""\nplan = 5', "plan = 5: it must be text"),
        ('question = "A question?"', 'question = ""\nthesis_table = "9.9"', "thesis_table = '9.9': the thesis has 7.1"),
        ("seed = [0, 1]", "seed = []", "seed = []"),
        ("seed = [0, 1]\n", "seed = [0, 1]\n[[grid]]\n", "names no field"),
        ("epochs = 1", "epochs = true", "epochs=True"),
        ("epochs = 1", f"epochs = 1{'0' * 400}", "epochs=1000"),
        ("seed = [0, 1]", f'rule = ["Epsilon({"-" * 50_000}1)"]', "is not a rule"),
        ("seed = [0, 1]", "scope = [[1979-05-27]]", "datetime.date(1979, 5, 27)"),
        ("seed = [0, 1]", "seed = " + "[" * 5000 + "]" * 5000, ""),
        (
            "seed = [0, 1]",
            f"seed = {list(range(1000))}\nevery = {list(range(1, 102))}",
            "a grid of 202000 runs: at most",
        ),
    ],
)
def test_what_is_no_study_is_refused_by_file_and_entry(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(ValueError, match="is not a study") as caught:
        Study.read(path)
    message = str(caught.value).replace(str(path), "FILE")
    assert message.startswith("FILE is not a study")
    assert named in message


def test_a_study_may_begin_with_a_byte_order_mark_and_is_read_as_utf8(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(STUDY.replace("A title", "ε").encode("utf-8-sig"))
    assert Study.read(tmp_path / "s.toml").title == "ε"


def test_every_study_of_the_project_can_be_read_and_names_a_table_that_there_is() -> None:
    paths = sorted((experiments.root() / "studies").glob("*.toml"))
    tables = set(experiments.published("accuracy")["table"])
    assert paths
    for path in paths:
        study = Study.read(path)
        assert study.runs and study.title and study.question, path
        assert study.thesis_table is None or study.thesis_table in tables, path


def test_committed_results_belong_to_the_runs_and_keys_they_say() -> None:
    for path in sorted((experiments.root() / "results").glob("*.jsonl")):
        lines = Store(path).lines()
        keys = [line["key"] for line in lines]
        assert keys == [Run(**line["run"]).key for line in lines], path
        assert len(set(keys)) == len(keys), path
        assert len({(line["run"]["dataset"], line["fingerprint"]) for line in lines}) == len(
            {line["run"]["dataset"] for line in lines}
        ), path


def test_a_list_may_come_as_text() -> None:
    assert listed("[0, 1.0, 10.0]") == listed([0, 1.0, 10.0]) == listed((0, 1.0, 10.0)) == [0, 1.0, 10.0]
    assert listed("['softmax', 'logits']") == ["softmax", "logits"]
    for wrong in ("[0, 1", "five", "5", 5):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            listed(wrong)  # type: ignore[arg-type]
