"""Studies: grids of runs, each written down in one TOML file.

    study = Study.read("studies/mnist-factors.toml")
    study.runs                              # every run of it
    study.store                             # where its results are kept

Not here: the sweep that trains the runs (`athena.experiments.sweep`).
"""

import ast
import itertools
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from athena.experiments import places
from athena.experiments.store import Store
from athena.experiments.training import Run

ARM: tuple[str, ...] = ("factor", "rule", "target", "scope", "normalise", "granularity", "every", "control")
"""The fields of a `Run` that say how it is guided. A guided run and its plain partner differ in these alone."""


def plain(run: Run) -> Run:
    """The plain run that `run` is compared with: factor 0, and nothing else that only guidance reads."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Run) if field.name in ARM}
    return replace(run, **(defaults | {"factor": 0.0}))


def grid(base: Run, **values: Iterable[Any]) -> list[Run]:
    """Every combination of `values` over `base`, each run once; with factor 0 it is the `plain` run.

    Raises:
        TypeError, ValueError: a name is no field of `Run`, or a value none that the field takes.
    """
    for name, wanted in values.items():
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise TypeError(f"{name} = {wanted!r}: a grid takes a list of values")
    runs = [replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
    return list(dict.fromkeys(run if run.factor else plain(run) for run in runs))


@dataclass(frozen=True)
class Study:
    """One experiment: its runs, in words and as a grid.

    Attributes:
        name: the file's name without ``.toml``; the store has the same.
        title, question: for readers.
        plan: what was decided before the first run: contrasts, endpoint, test, what counts as success; or None.
        base: what all its runs share, as one `Run`.
        runs: every run, once.
        thesis_table: the thesis table it repeats, a value of the column `table` in the published numbers, or None.
    """

    name: str
    title: str
    question: str
    base: Run
    runs: tuple[Run, ...]
    thesis_table: str | None = None
    plan: str | None = None

    @classmethod
    def read(cls, path: Path | str) -> "Study":
        """Reads a study: ``title``, ``question``, ``[run]`` with what all runs share, and one or more ``[[grid]]``.

        Raises:
            ValueError: the file is not of that form; the message names the file and the entry.
        """
        path = Path(path)
        try:
            text = tomllib.loads(path.read_text())
            base = Run(**text.pop("run"))
            runs = [run for values in text.pop("grid") for run in grid(base, **values)]
            return cls(path.stem, base=base, runs=tuple(dict.fromkeys(runs)), **text)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a study: {error}") from error

    @property
    def store(self) -> Store:
        """Where its results are kept."""
        return Store(places.root() / "results" / f"{self.name}.jsonl")


def listed(value: str | Sequence[Any]) -> list[Any]:
    """A list that may have come as text, as papermill's ``-p factors '[0, 1.0]'`` passes it.

    Raises:
        ValueError: the text is no list of numbers or words.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        return list(found)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"{value!r} is no list; write one such as '[0, 1.0, 10.0]'") from None


def published(name: str) -> pd.DataFrame:
    """The thesis's own numbers: ``"accuracy"`` (percent), ``"training_time"`` (seconds) or ``"claims"``.

    Raises:
        FileNotFoundError: this is no checkout of the project; the numbers come with the book.
    """
    return pd.read_csv(places.root() / "book" / "thesis" / f"{name}.csv", dtype={"table": str, "section": str})
