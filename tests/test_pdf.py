"""Claims about `make pdf` where it cannot print. What it prints is looked at in test_browser.py."""

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

PDF = Path(__file__).resolve().parent.parent / "book" / "pdf.py"


@pytest.fixture
def script(tmp_path: Path) -> dict[str, Any]:
    """The functions of book/pdf.py, for a book whose output is elsewhere."""
    functions = runpy.run_path(str(PDF))["main"].__globals__
    functions["OUTPUT"] = tmp_path
    return functions


def test_with_no_executed_chapters_it_says_what_to_run_first(script: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="run `make book` first"):
        script["main"]()


def test_with_no_chromium_it_says_how_to_get_one(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "executed").mkdir()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="apt-get install chromium"):
        script["main"]()
