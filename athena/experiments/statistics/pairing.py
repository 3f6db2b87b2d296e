"""Which run is compared with which: the pairs of a table of finished runs, cell by cell.

Two runs with the same seed share initial weights, data subset and order of batches, so they are compared pair by
pair. Not here: what is computed from the pairs (`compare`, `efficiency`).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from athena.experiments.study import ARM

__all__ = ["BOOKKEEPING", "PAIRING", "Cell", "Floats", "cells", "paired", "run_fields"]

PAIRING = "seed"
BOOKKEEPING = (
    *("key", "accuracy", "accuracies", "seconds", "peak_bytes", "stopped_at", "device", "versions", "fingerprint"),
    *("code", "diverged"),
)
"""What a finished run carries beside the fields of its `Run`."""

Floats = NDArray[np.float64]
Row = dict[str, Hashable]


@dataclass(frozen=True)
class Cell:
    """The pairs of one cell of a study.

    Attributes:
        settings: the columns that tell it from other cells, with their values.
        levels: the values of the averaged column that a complete seed has; one None without such a column.
        pairs: one row a pair: ``seed``, ``level``, ``plain`` and ``treated``, the two values.
        unpaired: treatment runs that have no baseline run.
        refused: treatment runs whose baseline run is of another device or of other code.
    """

    settings: Row
    levels: tuple[Hashable, ...]
    pairs: pd.DataFrame
    unpaired: int
    refused: int

    @property
    def dropped(self) -> int:
        """Seeds with a pair, but not at every level."""
        return self.pairs["seed"].nunique() - len(self.by_level())

    def by_level(self) -> Floats:
        """(seeds, levels, 2): baseline and treatment values of each complete seed, in the order of seeds and levels."""
        by_seed: dict[Hashable, dict[Hashable, tuple[float, float]]] = {}
        for seed, level, *values in self.pairs.itertuples(index=False, name=None):
            by_seed.setdefault(seed, {})[level] = tuple(values)
        complete = sorted((seed for seed, found in by_seed.items() if found.keys() == set(self.levels)), key=order)
        values = [[by_seed[seed][level] for level in self.levels] for seed in complete]
        return np.array(values, dtype=np.float64).reshape(-1, len(self.levels), 2)

    def arms(self) -> tuple[Floats, Floats]:
        """Baseline and treatment values of each complete seed, averaged over the levels."""
        plain, treated = self.by_level().mean(axis=1).T
        return plain, treated


def cells(
    frame: pd.DataFrame,
    baseline: Mapping[str, object],
    value: str,
    *,
    over: str | None = None,
    same: Sequence[str] = ("device", "code"),
) -> list[Cell]:
    """Every cell of the frame with its pairs, as `compare` documents them.

    Args:
        frame, baseline, value, over: as for `compare`.
        same: columns beyond the fields of a `Run` that both runs of a pair share, where the frame has them.

    Raises:
        ValueError: as for `compare`.
    """
    fields = [column for column in run_fields(frame) if column != value]
    _check_columns(frame, fields, baseline, value, over)
    same = [column for column in same if column in frame]
    # of dtype object: a column of texts, some of which are None, would hold NaN for these
    columns = {
        name: pd.Series([*map(_hashable, frame[name])], dtype=object) for name in [*fields, "fingerprint", *same]
    }
    table = pd.DataFrame(columns)
    table[VALUE] = frame[value].to_numpy(dtype=float)
    _check_fingerprints(table)

    varying = {column for column in table if table[column].nunique(dropna=False) > 1} | {PAIRING}
    shared = [column for column in [*fields, "fingerprint"] if column not in ARM and column not in baseline]
    everything = [*shared, *same]
    # a column with one value everywhere tells no pair from another, and costs time
    shared, same = ([column for column in columns if column in varying] for columns in (shared, same))
    shown = [column for column in fields if column in varying - {PAIRING, over}]
    context = [column for column in shared if column not in (PAIRING, over)]
    levels = _levels(table, context, over)

    wanted = {name: _hashable(item) for name, item in baseline.items()}
    of_baseline = np.ones(len(table), dtype=bool)
    for name, item in wanted.items():
        of_baseline &= np.array([own == item for own in table[name]], dtype=bool)
    plain, treated = table[of_baseline], table[~of_baseline]
    if plain.empty:
        raise ValueError(f"no run matches the baseline {dict(baseline)}; the frame holds {_values(table, baseline)}")
    if treated.empty:
        raise ValueError(
            f"all {len(table)} runs match the baseline {dict(baseline)}: there is nothing to compare it to"
        )
    _check_twins("baseline", plain, [*shared, *same])
    _check_twins("treatment", treated, [column for column in fields if column in varying])

    partners = plain[[*shared, *same, VALUE]].rename(columns={VALUE: "plain"})
    known = set(_keys(plain, shared))
    found: list[Cell] = []
    own_cell = _keys(treated, shown)
    for key in sorted(set(own_cell), key=lambda key: [order(item) for item in key]):
        runs = treated[[own == key for own in own_cell]].rename(columns={VALUE: "treated"})
        pairs = runs.merge(partners, on=[*shared, *same], validate="one_to_one")
        pairs = pairs.assign(level=None if over is None else pairs[over])
        alone = sum(own not in known for own in _keys(runs, shared))
        found.append(
            Cell(
                settings=dict(zip(shown, key, strict=True)),
                levels=levels[_keys(runs, context)[0]],
                pairs=pairs[[PAIRING, "level", "plain", "treated"]],
                unpaired=alone,
                refused=len(runs) - len(pairs) - alone,
            )
        )
    if all(cell.pairs.empty for cell in found):
        raise ValueError(_no_pair(plain, treated, everything))
    return found


VALUE = "value compared"


def run_fields(frame: pd.DataFrame) -> list[str]:
    """The columns that say what was run: all but the bookkeeping of a finished run."""
    return [column for column in frame.columns if column not in BOOKKEEPING]


def paired(frame: pd.DataFrame, by: str = "factor") -> pd.DataFrame:
    """Those runs of `frame` that have a partner: the same share of the data and seed, another value of `by`.

    The means of two arms, as curves show them, are then means over the same seeds.

    Args:
        frame: runs of two arms, as `athena.results` gives them.
        by: the field in which the arms differ.
    """
    return frame[frame.groupby(["fraction", PAIRING])[by].transform("nunique") > 1]


def order(item: Hashable) -> tuple[int, float, str]:
    """Sort key for columns that mix numbers, words and nothing."""
    if item is None:
        return (0, 0.0, "")
    return (1, float(item), "") if isinstance(item, int | float) else (2, 0.0, str(item))


def _levels(
    table: pd.DataFrame, context: Sequence[str], over: str | None
) -> dict[tuple[Hashable, ...], tuple[Hashable, ...]]:
    """By what is the same in all runs of a comparison, the values of the averaged column that any of them has."""
    found: dict[tuple[Hashable, ...], set[Hashable]] = {}
    values = [None] * len(table) if over is None else table[over].tolist()
    for key, level in zip(_keys(table, context), values, strict=True):
        found.setdefault(key, set()).add(level)
    return {key: tuple(sorted(values, key=order)) for key, values in found.items()}


def _keys(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[Hashable, ...]]:
    return list(table[list(columns)].itertuples(index=False, name=None)) if columns else [()] * len(table)


def _hashable(item: Any) -> Hashable:
    """A value as one that can be a key and equals its like: NaN becomes None, lists and dicts become tuples."""
    if isinstance(item, Mapping):
        return tuple(sorted(((str(name), _hashable(part)) for name, part in item.items()), key=order))
    if isinstance(item, list | tuple | np.ndarray):
        return tuple(_hashable(part) for part in item)
    if isinstance(item, np.generic):
        item = item.item()
    return None if pd.isna(item) else item


def _rows(table: pd.DataFrame) -> list[Row]:
    return [{str(name): item for name, item in row.items()} for row in table.to_dict("records")]


def _check_columns(
    frame: pd.DataFrame, fields: Sequence[str], baseline: Mapping[str, object], value: str, over: str | None
) -> None:
    if missing := [name for name in (PAIRING, "fingerprint", value, *baseline) if name not in frame]:
        raise ValueError(f"the frame has no column {missing}; pass it as athena.results returns it")
    if odd := [name for name in baseline if name == PAIRING or name not in fields]:
        raise ValueError(f"baseline names {odd}, which cannot tell the arms apart; use fields of the Run beside seed")
    averaged = [name for name in fields if name not in (PAIRING, *ARM, *baseline)]
    if over is not None and over not in averaged:
        raise ValueError(f"over={over!r} is not a column that both arms share; choose one of {averaged}")
    if unusable := int((~np.isfinite(frame[value].astype(float))).sum()):
        raise ValueError(f"{unusable} of {len(frame)} runs have no finite {value!r}; give it a value or take them out")


def _check_fingerprints(table: pd.DataFrame) -> None:
    datasets = table["dataset"] if "dataset" in table else pd.Series(None, table.index, dtype=object)
    for dataset, prints in table["fingerprint"].groupby(datasets, dropna=False):
        if prints.nunique(dropna=False) > 1:
            raise ValueError(
                f"data set {dataset!r} comes with {prints.nunique(dropna=False)} fingerprints "
                f"{sorted(prints.unique(), key=order)}: these runs saw different data and are never pooled; keep the "
                "rows of one fingerprint"
            )


def _check_twins(arm: str, runs: pd.DataFrame, columns: Sequence[str]) -> None:
    seen: dict[tuple[Hashable, ...], int] = {}
    for place, key in enumerate(_keys(runs, columns)):
        first = seen.setdefault(key, place)
        if first == place:
            continue
        twin, row = _rows(runs.drop(columns=VALUE).iloc[[first, place]])
        differing = {column: (twin[column], row[column]) for column in ARM if twin.get(column) != row.get(column)}
        if differing:
            raise ValueError(
                f"two {arm} runs fit the same pair: {twin} and another that differs in {differing}; "
                "name these columns in baseline, or take one of the two out"
            )
        raise ValueError(f"the same {arm} run occurs twice: {twin}; keep one of the two")


def _values(table: pd.DataFrame, columns: Mapping[str, object]) -> dict[str, list[Hashable]]:
    return {column: sorted(set(table[column]), key=order) for column in columns}


def _no_pair(plain: pd.DataFrame, treated: pd.DataFrame, columns: Sequence[str]) -> str:
    apart = {}
    for column in columns:
        ours, theirs = set(plain[column]), set(treated[column])
        if not ours & theirs:
            apart[column] = (sorted(ours, key=order), sorted(theirs, key=order))
    reason = f"the arms share no value of {apart} (baseline, treatment)" if apart else "no combination occurs in both"
    way_out = "pass any_code=True to pair them, " if list(apart) == ["code"] else ""
    return (
        f"none of the {len(treated)} treatment runs has a baseline run with the same {', '.join(columns)}: {reason}; "
        f"the first is {_rows(treated.drop(columns=VALUE))[0]}. Run the missing baseline, "
        f"{way_out}or name in baseline what may differ"
    )
