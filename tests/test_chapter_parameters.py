"""Claims about the parameters of chapters: whatever runs a chapter, a name or a value of no use is refused."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from athena.book import parameters
from athena.book.parameters import ParameterError, check, rule_of
from athena.rules import Epsilon, Gamma

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
DEFAULTS: dict[str, dict[str, Any]] = {}
CHECKS: dict[str, str] = {}
for path in CHAPTERS:
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    DEFAULTS[path.stem] = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(code[0].source).body}  # type: ignore[attr-defined]
    CHECKS[path.stem] = code[2].source


@pytest.mark.parametrize("chapter", DEFAULTS)
def test_a_chapter_checks_all_its_parameters_before_anything_else(chapter: str) -> None:
    call = ast.parse(CHECKS[chapter]).body[-1].value  # type: ignore[attr-defined]
    assert ast.unparse(call.func) == "parameters.check"
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} == {
        name: name for name in DEFAULTS[chapter]
    }


@pytest.mark.parametrize("chapter", DEFAULTS)
def test_a_chapter_s_own_parameters_and_the_quick_ones_are_accepted(chapter: str) -> None:
    quick = yaml.safe_load((ROOT / "book" / "quick.yml").read_text("utf8"))
    for given in ({}, quick.get(chapter, {})):
        exec(CHECKS[chapter], DEFAULTS[chapter] | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "seeds = 0: it must be a whole number, 1 or more"),
        ({"seeds": "4"}, "seeds = '4': it must be a whole number"),
        ({"seeds": 1.5}, "seeds = 1.5: it must be a whole number"),
        ({"epochs": True}, "epochs = True: it must be a whole number"),
        ({"fractions": []}, r"fractions = \[\]: it must have at least one value"),
        ({"fractions": "[]"}, r"fractions = '\[\]': it must have at least one value"),
        ({"fractions": [0.1, 2]}, r"fractions = \[0.1, 2\]: .*fraction=2.*from 0.0 to 1.0"),
        ({"fractions": 0.1}, "fractions = 0.1: .*no list; write one such as"),
        ({"factors": ["x"]}, r"factors = \['x'\]: .*it must be a number"),
        ({"factor": float("nan")}, "factor = nan: .*it must be a number"),
        ({"whole": [], "linear": []}, "one of them must have at least one factor"),
        ({"digit": "7"}, "digit = '7': it must be a whole number, 0 to 9"),
        ({"digits": [11]}, r"digits = \[11\]: it must be a whole number, 0 to 9"),
        ({"digits": []}, r"digits = \[\]: it must have at least one digit"),
        ({"digit_index": -1}, "digit_index = -1: it must be a whole number, 0 or more"),
        ({"rule": -1}, "rule = -1: .*epsilon must be at least 0"),
        ({"rule": [5]}, r"rule = \[5\]: it must be a rule such as"),
        ({"rule": "Epsilom(1)"}, "rule = 'Epsilom.*is not a rule"),
        ({"batch": 0}, "batch = 0: it must be a whole number, 1 or more"),
        ({"dataset": "mnits"}, "dataset = 'mnits': .*it must be one of 'mnist'"),
        ({"seed": 2**40}, "seed = 1099511627776: .*from 0 to 4294967295"),
        ({"colour_width": 0}, "colour_width = 0: .*above 0"),
        ({"study": "mnist"}, "study = 'mnist': it must be one of the studies .*mnist-factors"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        check(**given)
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_one_of_the_two_arms_may_be_left_out() -> None:
    check(whole=[], linear=[0.1])
    check(whole="[0.1]", linear="[]", peeked=[])


def test_a_rule_is_a_name_or_an_epsilon() -> None:
    assert rule_of("Gamma(0.25)") == Gamma(0.25)
    assert rule_of(0.1) == Epsilon(0.1)
    assert rule_of(1) == Epsilon(1.0)


@pytest.mark.parametrize("misspelt, near", [("digt", "did you mean digit"), ("sed", "did you mean seed"), ("x", "")])
def test_a_name_that_papermill_sets_and_the_chapter_does_not_have_is_refused(
    misspelt: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = load_notebook_node(str(ROOT / "book" / "01-fundamentals.ipynb"))
    notebook = parameterize_notebook(notebook, {"seed": 1, misspelt: 3}, kernel_name="python3", language="python")
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    shell = SimpleNamespace(user_ns={"In": ["", *cells[:4]]})
    monkeypatch.setattr(parameters, "get_ipython", lambda: shell)
    with pytest.raises(ParameterError, match=f"has no parameter {misspelt}: {near}.*It has dataset, digit"):
        check(**DEFAULTS["01-fundamentals"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (("digt", "3"), "ParameterError: this chapter has no parameter digt: did you mean digit?"),
        (("digit", "17"), "ParameterError: digit = 17: it must be a whole number, 0 to 9"),
    ],
)
def test_papermill_itself_ends_in_the_sentence(parameter: tuple[str, str], message: str, tmp_path: Path) -> None:
    command = ["papermill", "book/01-fundamentals.ipynb", str(tmp_path / "out.ipynb"), "--kernel", "python3"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--cwd", "book", "-p", *parameter],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(message)
