"""Studies: grids of runs, each written down in one TOML file.

    study = Study.read("studies/mnist-factors.toml")
    study.runs                              # every run of it
    study.store                             # where its results are kept

Not here: the sweep that trains the runs (`athena.experiments.sweep`).
"""

import ast
import itertools
import math
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from athena.experiments import places
from athena.experiments.run import Run
from athena.experiments.store import Store

ARM: tuple[str, ...] = (
    *("factor", "rule", "target", "scope", "normalise", "granularity", "every", "control"),
    *("use", "strength", "score", "marked", "learn_every"),
)
"""The fields of a `Run` that say what is done with relevance. A run and its plain partner differ in these alone."""
MOST_RUNS = 100_000
"""The most that one grid may ask for: more takes a minute to write down, and far longer to run."""
PARTS: tuple[tuple[str, type, str], ...] = (
    ("title", str, "title, a line of text"),
    ("question", str, "question, a text"),
    ("run", dict, "[run], what all its runs share"),
    ("grid", list, "[[grid]], in double brackets, lists of values"),
)
"""What a study needs: its name, its kind in TOML, and what it is in words."""


def plain(run: Run) -> Run:
    """The plain run that `run` is compared with: factor 0, no use, and nothing else that only these read."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Run) if field.name in ARM}
    return replace(run, **(defaults | {"factor": 0.0}))


def grid(base: Run, **values: Iterable[Any]) -> list[Run]:
    """Every combination of `values` over `base`, each run once; with factor 0 it is the `plain` run.

    Raises:
        TypeError, ValueError: a name is no field of `Run`, or a value none that the field takes; a list of values is
            empty; or there are more than `MOST_RUNS`.
    """
    for name, wanted in values.items():
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise TypeError(f"{name} = {wanted!r}: a grid takes a list of values")
    lists = {name: list(wanted) for name, wanted in values.items()}
    if empty := [name for name, wanted in lists.items() if not wanted]:
        raise ValueError(f"{empty[0]} = []: a grid takes at least one value of each field it names")
    if (count := math.prod(map(len, lists.values()))) > MOST_RUNS:
        raise ValueError(f"a grid of {count} runs: at most {MOST_RUNS} at once; split it into several studies")
    runs = [replace(base, **dict(zip(lists, chosen, strict=True))) for chosen in itertools.product(*lists.values())]
    return list(dict.fromkeys(plain(run) if run.is_plain else run for run in runs))


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
            text = tomllib.loads(path.read_text("utf-8-sig"))
            for name, kind, known in PARTS:
                if name not in text:
                    raise ValueError(f"it has no {known}")
                if not isinstance(text[name], kind):
                    raise ValueError(f"{name} = {text[name]!r}: it must be {known}")
            for name in ("plan", "thesis_table"):
                if not isinstance(text.get(name, ""), str):
                    raise ValueError(f"{name} = {text[name]!r}: it must be text")
            base = Run(**text.pop("run"))
            grids = text.pop("grid")
            if not grids or not all(isinstance(values, dict) and values for values in grids):
                raise ValueError("a grid of it names no field")
            runs = [run for values in grids for run in grid(base, **values)]
            study = cls(path.stem, base=base, runs=tuple(dict.fromkeys(runs)), **text)
            with suppress(FileNotFoundError):  # the thesis's tables come with a checkout
                tables = set(published("accuracy")["table"])
                if study.thesis_table is not None and study.thesis_table not in tables:
                    raise ValueError(
                        f"thesis_table = {study.thesis_table!r}: the thesis has {', '.join(sorted(tables))}"
                    )
            return study
        except (OSError, TypeError, ValueError, RecursionError) as error:
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
