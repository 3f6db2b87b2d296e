"""Writes into every chapter the cell that installs the book where a notebook is opened alone, as Colab does.

The cell comes second, after the parameters, and holds the repository's address from `_config.yml`: run this when the
address changes, and for a new chapter.

    python book/launch.py
"""

from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent

# Not the `book` extra and not constraints.txt: their IPython and ipykernel would replace Colab's own, whose kernel
# does not start with them. Colab has all the rest in the versions that pyproject.toml asks for.
INSTALL = """\
# Where a notebook is opened alone, as on Colab, the rest of the book is fetched and installed once.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

address = "{address}"
clone = Path("athena-book").resolve()
if importlib.util.find_spec("athena") is None:
    if not clone.is_dir():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, clone], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    packages = ["anywidget>=0.9", "ipywidgets>=8.1", "matplotlib>=3.8", "seaborn>=0.13"]
    subprocess.run([*pip, "--editable", f"{clone}[attribution,experiments]", *packages], check=True)
    sys.path.insert(0, str(clone))  # the running Python looks for new packages at its next start only
if clone.is_dir():
    os.chdir(clone / "book")"""

NO_ADDRESS = """\
import importlib.util

if importlib.util.find_spec("athena") is None:
    raise ModuleNotFoundError(
        "The package athena is not installed here. Get a copy of the book's repository, and in its folder run: "
        'pip install -c constraints.txt -e ".[book]"'
    )"""


def address() -> str:
    """The repository's address in `_config.yml`, empty while there is none."""
    return yaml.safe_load((BOOK / "_config.yml").read_text("utf8"))["repository"]["url"]


def with_install_cell(text: str, address: str) -> str:
    """A notebook's text with its install cell as it should be for this address: put in, or replaced."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id != "install"]
    first = next(place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first + 1, install_cell(address))
    return nbformat.writes(notebook) + "\n"


def install_cell(address: str) -> NotebookNode:
    """The cell itself; no page shows it, and where the package is installed it does nothing."""
    source = INSTALL.replace("{address}", address) if address else NO_ADDRESS
    return nbformat.v4.new_code_cell(source, id="install", metadata={"tags": ["remove-cell"]})


def main() -> None:
    """Write the cell into every notebook of the book that lacks it or has another, and say which those are."""
    for chapter in sorted(BOOK.glob("*.ipynb")):
        old = chapter.read_text("utf8")
        new = with_install_cell(old, address())
        if new != old:
            chapter.write_text(new, "utf8")
            print(f"book/{chapter.name}: the install cell is new")


if __name__ == "__main__":
    main()
