"""Builds the book as it is published: papermill runs every chapter into a copy, and the copy becomes the pages.

Two chapters run at a time, where there are two cores. A chapter that fails stops the build, and so does any warning.
`jupyter-book build book/` makes the same pages with no copy; this script adds parameters, the gate, and chapters that
are executed once and not at every build.

    python book/build.py [--quick]
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout

BOOK = Path(__file__).resolve().parent
OUTPUT = BOOK / "_build"
COPY = OUTPUT / "executed"
AT_A_TIME = 2  # more kernels, each with PyTorch in it, would take more memory than a laptop may have


def quick_parameters() -> dict[str, dict[str, Any]]:
    """The parameters of book/quick.yml: for each chapter, what makes it small enough to try."""
    chapters = yaml.safe_load((BOOK / "quick.yml").read_text("utf8")) or {}
    for name, parameters in chapters.items():
        notebook = BOOK / f"{name}.ipynb"
        known = papermill.inspect_notebook(str(notebook)) if notebook.exists() else {}
        if unknown := set(parameters or {}) - set(known):
            sys.exit(f"book/quick.yml: {name} has no parameter named {', '.join(sorted(unknown))}")
    return chapters


def execute(given: tuple[Path, dict[str, Any]]) -> str:
    """Run a chapter with parameters into the copy, from the folder it is written for; an error in a cell is raised.

    Returns:
        What to say of it when it is done.
    """
    chapter, parameters = given
    start = time.perf_counter()
    executed = COPY / chapter.name
    options = {"cwd": str(BOOK), "kernel_name": "python3", "progress_bar": False}
    try:
        papermill.execute_notebook(str(chapter), str(executed), parameters, **options)
    except papermill.PapermillExecutionError as error:
        error.add_note(f"That was {chapter.name}.")
        raise
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["mystnb"] = {"execution_mode": "off"}
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")
            cell.metadata["mystnb"] = {
                "code_prompt_show": "The parameters this page was built with",
                "code_prompt_hide": "Hide them",
            }
    nbformat.write(notebook, executed)
    return f"{chapter.name}: {time.perf_counter() - start:.0f} s"


def execute_all(parameters: dict[str, dict[str, Any]]) -> None:
    """Run all chapters; the first that fails stops the others."""
    cores = os.cpu_count() or 1
    workers = min(AT_A_TIME, cores)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // workers))
    chapters = [(chapter, parameters.get(chapter.stem) or {}) for chapter in sorted(BOOK.glob("*.ipynb"))]
    print(f"{len(chapters)} chapters, {workers} at a time ...", flush=True)
    with multiprocessing.Pool(workers) as pool:
        try:
            for said in pool.imap_unordered(execute, chapters):
                print(said, flush=True)
        except papermill.PapermillExecutionError as error:
            if error.ename != "ParameterError":
                raise
            sys.exit(" ".join(["book/quick.yml:", f"{error.evalue}.", *error.__notes__]))


def main() -> None:
    """Copy, execute, build, and say where the first page is."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="use the parameters of book/quick.yml")
    parameters = quick_parameters() if arguments.parse_args().quick else {}

    lock = FileLock(BOOK.parent / ".book.lock")  # outside of what is deleted and copied
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit("The book is being built by another make book: wait for it, or stop it first.")

    shutil.rmtree(OUTPUT, ignore_errors=True)
    shutil.copytree(BOOK, COPY, ignore=shutil.ignore_patterns("_build", "__pycache__", ".ipynb_checkpoints"))
    execute_all(parameters)

    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    strict = ["-W", "-n", "--keep-going"]
    command = [str(jupyter_book), "build", str(COPY), "--path-output", str(BOOK), *strict]
    if subprocess.run(command, check=False).returncode:
        sys.exit("The book has warnings or errors, listed above.")
    print(f"\nThe book: {(OUTPUT / 'html' / 'index.html').as_uri()}")


if __name__ == "__main__":
    main()
