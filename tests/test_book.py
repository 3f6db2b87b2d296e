"""Claims about what is committed: complete results, clean notebooks, and a chapter that trains what it is asked for."""

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import nbformat
import pytest
import yaml
from filelock import FileLock

from athena import experiments
from athena.training import SINCE, Result, Run

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_is_stored_once_and_in_full(path: Path) -> None:
    study = experiments.Study.read(path)
    lines = study.store.lines()
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    planned = {run.key for run in study.runs}
    assert set(keys) == planned or (study.plan and set(keys) < planned)  # its chapter says how many runs are open
    expected = {field.name for field in fields(Result)} - {"model"} | {"key"}
    for line in lines:
        run = Run(**line["run"])
        assert line.keys() == expected
        values = json.loads(json.dumps(asdict(run)))
        assert line["run"] == {name: values[name] for name in line["run"]}
        assert values.keys() - line["run"].keys() <= SINCE.keys()
        assert line["key"] == run.key
        tests = math.ceil(run.epochs) if run.tested == "each epoch" else 1
        assert len(line["accuracy"]) == tests or (line["stopped_at"] and len(line["accuracy"]) < tests)
        assert all(0 <= value <= 1 for value in line["accuracy"])
        assert line["seconds"] > 0


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_was_measured_on_one_data_set(path: Path) -> None:
    fingerprints = {line["fingerprint"] for line in experiments.Study.read(path).store.lines()}
    assert len(fingerprints) <= 1


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_committed_without_outputs_and_with_its_parameters_first(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_names_the_thesis_section_it_covers(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0].source
    assert "section" in first.lower()


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.stem != "play"], ids=lambda path: path.stem)
def test_a_chapter_says_what_it_teaches_and_asks_three_questions_whose_answers_are_hidden(path: Path) -> None:
    cells = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}
    assert len(re.findall(r"^- ", cells["learn"].source, re.MULTILINE)) >= 3
    assert re.search(r"About \d+ minutes", cells["learn"].source)
    for n in (1, 2, 3):
        assert f"**{n}.**" in cells[f"exercise-{n}"].source
        assert cells[f"solution-{n}"].metadata.tags == ["hide-cell"]
        assert "say(" in cells[f"solution-{n}"].source
    assert cells["summary"].source.startswith("## In short")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_can_be_read_as_code_too(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lines = {cell.id: sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells}
    assert max(lines.values()) <= 40, lines
    assert sum(lines.values()) <= 250


def test_every_page_of_the_contents_exists_and_every_chapter_is_in_them() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]
    for page in pages:
        assert any((ROOT / "book" / f"{page}{ending}").exists() for ending in (".md", ".ipynb")), page
    assert {path.stem for path in CHAPTERS} <= set(pages)


def test_the_published_numbers_are_those_of_the_thesis_tables() -> None:
    accuracy = experiments.published("accuracy").query("dataset == 'mnist'").set_index("percent")
    assert len(accuracy) == 12
    assert accuracy.loc[100, "accuracy_lrp"] == 97.14
    assert accuracy.loc[1, "accuracy_standard"] == 81.35


LINES = [
    shlex.split(line)
    for path in CHAPTERS
    for cell in nbformat.read(path, as_version=4).cells
    if cell.cell_type == "markdown"
    for line in re.findall(r"^papermill .+$", cell.source, re.MULTILINE)
]
"""The commands by which the chapters tell how to run them with parameters of one's own."""


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=lambda line: Path(line[1]).stem)
def test_the_papermill_line_of_a_chapter_works_where_no_data_can_be_had(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    program, chapter, out, *flags = line
    subprocess.run(
        [sys.executable, "-m", program, chapter, str(tmp_path / out), *flags, "--kernel", "python3"],
        cwd=ROOT,
        check=True,
    )
    text = (tmp_path / out).read_text()
    if "fractions" in flags:  # it trains
        assert "not the chapter's own numbers" in text
        assert "mnist5k" in text or "mnistm5k" in text


# Numbers in prose ----------------------------------------------------------------------------------------------------

PROSE = [*CHAPTERS, ROOT / "book" / "index.md", ROOT / "README.md"]
NUMBER = r"\d+(?:\.\d+)*"
REFERENCE = re.compile(
    rf"(?:section|figure|table|chapter|Python)s?\s+{NUMBER}(?:(?:,|\s+and|\s+to)\s+{NUMBER})*|\d+\.\d+\.\d+",
    re.IGNORECASE,
)
MEASURED = re.compile(r"\d+\.\d+|\d+(?= (?:%|points?\b|seconds?\b|times\b))")
CONVENTIONS = {0.05, 95.0, 0.125, 0.002}
"""The level of the tests, that of the intervals, and the least p of four and of ten pairs."""


def prose(path: Path) -> str:
    """What a page says in words: no code, no formulae, no references to sections, figures and tables."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text("utf8")
    for other in (r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$]*\$"):
        text = re.sub(other, " ", text, flags=re.DOTALL)
    return REFERENCE.sub(" ", text)


def known_numbers() -> set[float]:
    """What prose may state: the thesis's numbers, as it says them or rounded to one digit, and what studies set."""
    theirs = [experiments.published(name) for name in ("accuracy", "claims", "training_time")]
    published = {abs(value) for table in theirs for value in table.select_dtypes("number").to_numpy().ravel()}
    runs = [run for path in STUDIES for run in experiments.Study.read(path).runs]
    chosen = {value for run in runs for value in (run.factor, run.learning_rate, 100 * run.fraction)}
    every = published | {round(value, 1) for value in published} | chosen | CONVENTIONS
    return {round(value, 6) for value in every}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_prose_states_no_result_that_code_has_not_written(path: Path) -> None:
    typed = {float(number) for number in MEASURED.findall(prose(path))}
    assert typed <= known_numbers()


def test_a_typed_result_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Section 7.1 gains 0.37 points, in 83 % of the runs and `0.5` in code.")
    assert {float(number) for number in MEASURED.findall(prose(page))} == {0.37, 83.0}
    assert not {0.37, 83.0} & known_numbers()


def test_a_second_make_book_leaves_what_the_first_is_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("book_build", experiments.root() / "book" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for name, place in (("BOOK", "book"), ("OUTPUT", "book/_build"), ("COPY", "book/_build/executed")):
        monkeypatch.setattr(build, name, tmp_path / place)
    monkeypatch.setattr("sys.argv", ["build.py"])
    (tmp_path / "book" / "_build").mkdir(parents=True)
    with FileLock(tmp_path / ".book.lock"), pytest.raises(SystemExit, match="is being built by another make book"):
        build.main()
    assert (tmp_path / "book" / "_build").is_dir() and not (tmp_path / "book" / "_build" / "executed").exists()
