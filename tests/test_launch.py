"""Claims about opening a chapter elsewhere: the buttons, the cell that installs the book, and what Binder installs."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from sphinx.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))
ADDRESS = "https://github.com/somebody/some.book"
LAUNCH = runpy.run_path(str(BOOK / "launch.py"))
CELLS = {address: LAUNCH["install_cell"](address).source for address in ("", ADDRESS)}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_the_install_cell_for_the_address_of_the_book(path: Path) -> None:
    text = path.read_text("utf8")
    assert LAUNCH["with_install_cell"](text, LAUNCH["address"]()) == text, "run `python book/launch.py`"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_install_cell_comes_second_for_any_address_and_once(path: Path) -> None:
    written = LAUNCH["with_install_cell"](path.read_text("utf8"), ADDRESS)
    assert LAUNCH["with_install_cell"](written, ADDRESS) == written
    cells = [cell for cell in nbformat.reads(written, as_version=4).cells if cell.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags
    assert [cell.id for cell in cells].index("install") == 1
    assert ADDRESS in cells[1].source
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("address", CELLS)
def test_the_install_cell_is_linted_as_the_chapters_are(address: str, tmp_path: Path) -> None:
    path = tmp_path / "chapter.ipynb"
    path.write_text(LAUNCH["with_install_cell"](CHAPTERS[0].read_text("utf8"), address), "utf8")
    for command in (["check"], ["format", "--check"]):
        options = ["--config", ROOT / "pyproject.toml", "--no-cache", path]
        subprocess.run([sys.executable, "-m", "ruff", *command, *options], check=True)


@pytest.mark.parametrize("address", CELLS)
def test_the_install_cell_does_nothing_where_the_package_is(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    exec(CELLS[address], {})
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_with_no_address_the_install_cell_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install -c constraints.txt -e ".[book]"')):
        exec(CELLS[""], {})


@pytest.mark.slow
def test_with_an_address_the_install_cell_leaves_a_book_that_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has the dependencies: git is asked for a copy of this checkout, and pip for nothing."""
    real, asked = subprocess.run, []

    def run(command: list[object], check: bool) -> None:
        asked.append(command)
        if command[0] == "git":
            real(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(command[-1])], check=check)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", run)
    exec(CELLS[ADDRESS], {})
    assert ADDRESS in asked[0] and "--editable" in asked[1] and len(asked) == 2
    assert Path.cwd() == tmp_path / "athena-book" / "book"
    monkeypatch.setattr(subprocess, "run", real)
    program = "import athena; from athena import experiments; print(experiments.root())"
    environment = os.environ | {"PYTHONPATH": sys.path[0]}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True).stdout
    assert Path(output.decode().strip()) == tmp_path / "athena-book"


@pytest.mark.parametrize(
    "address", ["https://gitlab.com/a/b", "https://github.com/a", f"{ADDRESS}/", f"{ADDRESS}.git", "git@github.com:a/b"]
)
def test_an_address_that_no_button_can_use_is_refused(address: str) -> None:
    extension = runpy.run_path(str(BOOK / "_ext" / "launch_buttons.py"))
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        extension["draw_buttons"](None, SimpleNamespace(html_theme_options={"repository_url": address}))


def pages(folder: Path, address: str) -> tuple[str, str]:
    """A page and a chapter of a small book with the settings of this one, as HTML."""
    source = folder / "book"
    source.mkdir()
    config = (ROOT / "_config.yml").read_text("utf8")
    (source / "_config.yml").write_text(re.sub(r'(?m)^  url: ".*"$', f'  url: "{address}"', config), "utf8")
    (source / "_toc.yml").write_text("{format: jb-book, root: index, chapters: [file: chapter]}", "utf8")
    (source / "index.md").write_text("# A page\n", "utf8")
    for name in ("_assets", "_ext"):
        shutil.copytree(BOOK / name, source / name, ignore=shutil.ignore_patterns("vendor", "__pycache__"))
    shutil.copy(BOOK / "references.bib", source)
    cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell("1 + 1")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=nbformat.read(CHAPTERS[0], as_version=4).metadata)
    notebook.metadata["mystnb"] = {"execution_mode": "off"}
    nbformat.write(notebook, source / "chapter.ipynb")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([jupyter_book, "build", source, "-W", "-n", "--keep-going"], check=True)
    html = source / "_build" / "html"
    return (html / "index.html").read_text("utf8"), (html / "chapter.html").read_text("utf8")


@pytest.mark.slow
def test_every_button_follows_from_the_address_alone(tmp_path: Path) -> None:
    page, chapter = pages(tmp_path, ADDRESS)
    place = "blob/main/book/chapter.ipynb"
    assert 'href="https://mybinder.org/v2/gh/somebody/some.book/main?urlpath=lab/tree/book/chapter.ipynb"' in chapter
    assert f'href="https://colab.research.google.com/github/somebody/some.book/{place}"' in chapter
    assert 'onclick="initThebeSBT()"' in chapter
    thebe = re.search(r'<script type="text/x-thebe-config">(.*?)</script>', chapter, re.DOTALL)
    assert thebe
    assert chapter.count("const THEBE_JS_URL") == 1  # twice is an error in the browser
    for setting in ('repo: "somebody/some.book"', 'ref: "main"', 'path: "book/.'):
        assert setting in thebe[1]
    for html, name in ((page, "index.md"), (chapter, "chapter.ipynb")):
        assert f'href="{ADDRESS}"' in html
        assert f'href="{ADDRESS}/issues/new' in html
        assert f'href="{ADDRESS}/edit/main/book/{name}"' in html


@pytest.mark.slow
def test_with_no_address_there_is_no_button_that_needs_one_and_no_script_for_it(tmp_path: Path) -> None:
    for html in pages(tmp_path, ""):
        assert not re.search(r"thebe|binder|colab|github\.com/[^\"]*(issues|edit|blob)", html, re.IGNORECASE)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {normal(requirement.name): str(requirement.specifier).removeprefix("==") for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_binder_and_conda_install_this_book_with_the_versions_it_was_last_run_with() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    python = next(word for word in environment["dependencies"] if isinstance(word, str) and word.startswith("python="))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python="))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {"-c constraints.txt", "-e .[book]"} <= set(pip)


def test_the_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    versions = pinned()
    extras = project["optional-dependencies"]
    del extras["frameworks"]  # no result depends on them
    for line in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # an extra that holds another one
            continue
        assert requirement.specifier.contains(versions[normal(requirement.name)]), line
