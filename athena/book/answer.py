"""What every answer of the book is made of: an `Answer`, and sentences on whether something can be tested.

Not here: the answers themselves (`athena.book.answers`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from athena.experiments import Study, frame, root, statistics

__all__ = ["SPOKEN", "Answer", "bound", "is_open", "joined", "more_pairs", "tested", "whole"]

SPOKEN = {"gain": "a gain", "loss": "a loss", "no effect shown": "no effect is shown"}
FOUND = {
    "gain": "a gain with",
    "loss": "a loss with",
    "no effect shown": "no effect is shown with",
    "cannot be tested": "too few pairs to test",
}


@dataclass(frozen=True)
class Answer:
    """What a reader of one chapter should know before reading it.

    Attributes:
        sections: of the thesis.
        question: what is asked.
        says: the answer, one to three sentences.
        sure: how sure it is, and why.
        change: what would change it.
    """

    sections: str
    question: str
    says: str
    sure: str
    change: str

    def box(self) -> str:
        """The four parts as Markdown, each on lines of its own."""
        parts = (self.question, self.says, self.sure, self.change)
        heads = ("The question.", "The answer.", "How sure.", "What would change it.")
        return "\n\n".join(f"**{head}** {part}" for head, part in zip(heads, parts, strict=True))


def is_open(sections: str, question: str, study: str, before: str = "") -> Answer:
    """The answer while runs of `study` are missing; `before` is what can be said already."""
    return Answer(
        sections=sections,
        question=question,
        says=f"{before}This is open: not all runs of its study are there, and by its plan none is looked at before.",
        sure="Nothing is said yet.",
        change=f"`athena sweep studies/{study}.toml` runs what is missing.",
    )


def whole(study: str) -> pd.DataFrame | None:
    """The runs of a study, or None while some are missing: a study with a plan is looked at when it is complete."""
    planned = Study.read(root() / "studies" / f"{study}.toml")
    lines = planned.store.lines()
    return frame(lines) if {line["key"] for line in lines} >= {run.key for run in planned.runs} else None


def bound(table: pd.DataFrame) -> str:
    """In points, the least tenth that no interval of a table of `statistics.compare` reaches, ``"0.2"``."""
    largest = 100 * float(table[["low", "high"]].abs().to_numpy().max())
    return f"{(math.floor(10 * largest) + 1) / 10:.1f}"


def tested(table: pd.DataFrame) -> str:
    """Whether the rows of a table of `statistics.compare` can be tested, and what the test says."""
    pairs = sorted({int(n) for n in table["n"]})
    verdicts = [statistics.verdict(row) for _, row in table.iterrows()]
    if set(verdicts) == {"cannot be tested"}:
        alike = [
            f"{row['factor']:g}" for _, row in table.iterrows() if row["p"] <= 2.0 ** (1 - row["n"]) and len(table) > 1
        ]
        same = f" With factor {' and '.join(alike)} all pairs point the same way." if alike else ""
        least = 2.0 ** (1 - pairs[-1])
        return f"{pairs[-1]} pairs of seeds cannot be tested: their *p* cannot go below {least:g}.{same}"
    if len(table) == 1:
        return f"By the rule of this book, with {_spanned(pairs)} pairs: {SPOKEN.get(verdicts[0], verdicts[0])}."
    told = []
    for found in dict.fromkeys(verdicts):
        names = [f"{name:g}" for name, its in zip(table.index, verdicts, strict=True) if its == found]
        told.append(f"{FOUND.get(found, found)} {'factor' if len(names) == 1 else 'factors'} {joined(names)}")
    return f"By the rule of this book, with {_spanned(pairs)} pairs: {'; '.join(told)}."


def joined(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def more_pairs(pairs: int) -> str:
    """How many more pairs a test needs; nothing where there are enough."""
    least = 1 + math.ceil(-math.log2(statistics.LEVEL))
    return f"More seeds: a test needs {least} pairs at least, and there are {pairs}. " if pairs < least else ""


def _spanned(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
