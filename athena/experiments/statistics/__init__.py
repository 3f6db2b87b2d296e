"""Paired comparison of runs: differences and ratios with their intervals and p-values, and the verdict they allow.

Two runs with the same seed share initial weights, data subset and order of batches, so they are compared pair by
pair. This file computes numbers from a table of finished runs; it trains nothing, reads no files and draws nothing.
"""

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests

from athena.experiments.study import ARM

PAIRING = "seed"

# What a finished run carries beside the fields of its Run.
BOOKKEEPING = (
    "key",
    "accuracy",
    "accuracies",
    "seconds",
    "peak_bytes",
    "stopped_at",
    "device",
    "versions",
    "fingerprint",
    "code",
    "diverged",
)

Floats = NDArray[np.float64]
Row = dict[str, Hashable]


def compare(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "accuracy",
    over: str | None = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Mean paired difference (treatment minus baseline) for each cell of a study.

    Rows that match every item of `baseline` are the baseline arm, all others are treatments. A treatment is paired
    with the baseline run of the same seed and data fingerprint that equals it in every Run field outside `ARM` and
    `baseline`; None and NaN are equal. A cell is a combination of the columns that vary over the frame, seed excepted.
    A diverged run counts with the value it has.

    Args:
        frame: one row a run, as `athena.results` returns it; the order of rows has no influence.
        baseline: column values that make a row part of the baseline arm.
        value: the column compared. Accuracy is a fraction from 0 to 1, so a difference of 0.01 is one point.
        over: None, or the column averaged out before the statistics: `over="fraction"` gives a study's endpoint, the
            mean difference over fractions for each seed. A seed enters only if both arms have every value of the
            column that any run of the frame has under the same settings, so all arms share one endpoint.
        confidence: coverage of the interval.

    Returns:
        One row a cell, sorted by the cell's columns, which come first. Then
        n: pairs, or seeds with `over`.
        baseline_mean, mean, difference: of those pairs, in the unit of `value`.
        low, high: interval of the mean difference, see `summary`.
        p: two-sided sign-flip test of "no difference"; every one of the 2^n flips up to n = 16, else 99,999 random
            ones from a fixed seed. It cannot go below 2 / 2^n.
        p_holm: p after Holm (1979), the family being all cells of this table that have a pair. With m cells it cannot
            go below m * 2 / 2^n: at 10 pairs a table of more than 25 cells can show nothing.
        unpaired: treatment runs left out because their baseline run is missing (a sweep still under way).
        dropped: only with `over`: seeds left out because a value of that column is missing in one arm.
        A cell without any pair yet keeps its row, with n = 0 and NaN.

    Raises:
        ValueError: the frame lacks a needed column, `value` has missing or infinite entries, one of the arms is empty,
            no pair exists at all, a run occurs twice, or one data set comes with more than one fingerprint.

    Sources: sign-flip test, Fisher, The Design of Experiments (1935), section 21; interval, Efron, Better bootstrap
    confidence intervals, JASA 82 (1987); Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    rows = []
    for cell in _cells(frame, baseline, value, over=over):
        plain, treated = cell.arms()
        differences = _differences(plain, treated)
        difference, low, high = summary(differences, confidence)
        measured = {
            "n": len(differences),
            "baseline_mean": _mean(plain),
            "mean": _mean(treated),
            "difference": difference,
            "low": low,
            "high": high,
            "p": _sign_flip(differences),
            "p_holm": np.nan,
            "unpaired": cell.unpaired,
        }
        dropped = {} if over is None else {"dropped": cell.dropped}
        rows.append({**cell.settings, **measured, **dropped})
    table = pd.DataFrame(rows)
    tested = table["n"] > 0
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table


def ratio(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "seconds",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Ratio of paired values (treatment over baseline) for each cell, such as what guidance costs in training time.

    Pairs and cells are those of `compare`, and both runs of a pair must also come from the same device if the frame
    has that column, since seconds on two machines have no common scale.

    Returns:
        One row a cell: the cell's columns, `n` pairs, `ratio` (geometric mean of the paired ratios, no unit), `low`
        and `high` (Student's interval of the mean log ratio, taken back), `unpaired` as in `compare`.

    Raises:
        ValueError: as for `compare`, or a value is not above 0.
    """
    cells = _cells(frame, baseline, value, same=("device",) if "device" in frame else ())
    if not (frame[value] > 0).all():
        raise ValueError(f"a ratio needs values above 0, but {value!r} goes down to {frame[value].min()}")
    rows = []
    for cell in cells:
        plain, treated = cell.arms()
        logs = np.log(treated / plain)
        centre, low, high = np.exp([_mean(logs), *_student(logs, confidence)]).tolist()
        rows.append(
            {**cell.settings, "n": len(logs), "ratio": centre, "low": low, "high": high, "unpaired": cell.unpaired}
        )
    return pd.DataFrame(rows)


def data_efficiency(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "accuracy",
    over: str = "fraction",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """How many times the data the baseline needs for the accuracy of each treatment (thesis figure 6.1, read across).

    Accuracy is averaged over seeds at each share of the data, and a curve that never falls is fitted to it over the
    logarithm of the share (isotonic regression, straight lines between). At every accuracy that both curves reach, the
    ratio is the share at which the baseline reaches it over that of the treatment; nothing is extrapolated.

    Pairs are those of `compare` with the same `over`, so a seed enters with all of its shares or not at all.

    Returns:
        One row a cell: its columns; `n` seeds; `ratio`, the geometric mean over those accuracies, above 1 where the
        treatment needs fewer data; `low` and `high`, percentiles of 2,000 bootstrap samples of whole seeds, narrow
        where seeds are few; `reached_from` and `reached_to`, the accuracies, in the unit of `value`; `dropped` as in
        `compare`. NaN where no accuracy is reached by both, and for an interval where it is so in one of the samples.

    Raises:
        ValueError: as for `compare`, or a share is not above 0.
    """
    rows = []
    for cell in _cells(frame, baseline, value, over=over):
        shares = np.array(sorted(cell.levels, key=_order), dtype=np.float64)
        if not (shares > 0).all():
            raise ValueError(f"a share of the data is above 0, but {over!r} goes down to {shares.min()}")
        seeds = cell.complete()
        values = np.array([[cell.pairs[seed][share] for share in shares] for seed in seeds]).reshape(-1, len(shares), 2)
        horizontal = functools.partial(_horizontal, np.log(shares))
        distance, *reached = horizontal(values)
        bounds = _bootstrapped(horizontal, values, confidence)
        ratio, low, high = np.exp([distance, *bounds]).tolist()
        rows.append(
            {**cell.settings, "n": len(seeds), "ratio": ratio, "low": low, "high": high}
            | {"reached_from": reached[0], "reached_to": reached[1], "dropped": cell.dropped}
        )
    return pd.DataFrame(rows)


def _horizontal(x: Floats, values: Floats) -> tuple[float, float, float]:
    """How much further right the first of two curves is, averaged over the heights both reach, and from where to where.

    `values` is (seeds, len(x), 2); a curve is the rising fit to the mean over the seeds.
    """
    nowhere = (float("nan"),) * 3
    if not len(values):
        return nowhere
    curves = [optimize.isotonic_regression(curve).x for curve in values.mean(axis=0).T]
    low, high = max(curve[0] for curve in curves), min(curve[-1] for curve in curves)
    if not low < high:
        return nowhere
    heights = low + (np.arange(400) + 0.5) / 400 * (high - low)
    first, second = (np.interp(heights, curve, x) for curve in curves)
    return float((first - second).mean()), float(low), float(high)


def _bootstrapped(of: Callable[[Floats], Sequence[float]], values: Floats, confidence: float) -> tuple[float, float]:
    """Percentiles of ``of(values)[0]`` over 2,000 samples with replacement of the rows; NaN if one of them is."""
    if len(values) < 2:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # says that it is NaN
        bounds = stats.bootstrap(
            (np.arange(len(values)),),
            lambda rows: of(values[rows])[0],
            method="percentile",
            n_resamples=2000,
            vectorized=False,
            confidence_level=confidence,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(bounds.low), float(bounds.high)


def beside(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A table of `compare` with the thesis's numbers for the same share of the data in its last columns.

    Arguments
        table: with a column `fraction`.
        published: rows of `athena.experiments.published("accuracy")`, one for each percent.

    Returns `table` with `thesis_plain`, `thesis_lrp` and `thesis_difference`, in its own unit (0 to 1); NaN where the
    thesis has no number.

    Raises ValueError if `published` has two rows for one percent, or `table` no fractions.
    """
    if "fraction" not in table or published["percent"].duplicated().any():
        raise ValueError("beside needs a table by fraction, and one published row for each percent: choose one table")
    theirs = published.set_index("percent")[["accuracy_standard", "accuracy_lrp"]] / 100
    plain, lrp = theirs.reindex((100 * table["fraction"]).round().astype(int)).to_numpy().T
    return table.assign(thesis_plain=plain, thesis_lrp=lrp, thesis_difference=lrp - plain)


def summary(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of one arm with its interval: (mean, low, high), in the unit of `values`.

    Student's interval below 10 values, from 10 on the BCa bootstrap (Efron 1987, 9,999 resamples from a fixed seed).
    One value has no interval (NaN), equal values have the point itself, no value at all gives three NaN.

    Raises:
        ValueError: a value is not finite or `confidence` does not lie between 0 and 1.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"an interval needs finite values, got {numbers[~np.isfinite(numbers)].tolist()}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1 such as 0.95, got {confidence}")
    if len(numbers) < 10 or _all_equal(numbers):
        return (_mean(numbers), *_student(numbers, confidence))
    rng = np.random.default_rng(0)
    bounds = stats.bootstrap((numbers,), np.mean, confidence_level=confidence, method="BCa", rng=rng)
    return _mean(numbers), float(bounds.confidence_interval.low), float(bounds.confidence_interval.high)


def paired(frame: pd.DataFrame, by: str = "factor") -> pd.DataFrame:
    """Those runs of `frame` that have a partner: the same share of the data and seed, another value of `by`.

    The means of two arms, as curves show them, are then means over the same seeds.

    Args:
        frame: runs of two arms, as `athena.results` gives them.
        by: the field in which the arms differ.
    """
    return frame[frame.groupby(["fraction", PAIRING])[by].transform("nunique") > 1]


def verdict(row: Mapping[str, Any] | pd.Series) -> str:
    """What one row of `compare` allows to say: "gain", "loss" or "no effect shown".

    A gain needs an interval above 0 and a Holm-corrected p below 0.05, a loss an interval below 0 and the same p;
    the words fit values of which more is better. This is the part of the claim rule that one table can know. A claim
    that relevance helps needs two more comparisons, each a gain too: against the arm with shuffled relevance, and
    against plain training tuned with the same effort and given the same time.
    """
    if row["p_holm"] < 0.05 and row["low"] > 0:
        return "gain"
    if row["p_holm"] < 0.05 and row["high"] < 0:
        return "loss"
    return "no effect shown"


def run_fields(frame: pd.DataFrame) -> list[str]:
    """The columns that say what was run: all but the bookkeeping of a finished run."""
    return [column for column in frame.columns if column not in BOOKKEEPING]


@dataclass
class _Cell:
    """The pairs of one cell: {seed: {value of the `over` column, else None: (baseline value, treatment value)}}."""

    settings: Row
    levels: set[Hashable]
    pairs: dict[Hashable, dict[Hashable, tuple[float, float]]] = field(default_factory=dict)
    unpaired: int = 0

    def complete(self) -> list[Hashable]:
        """Seeds with a pair at every level, in an order that does not depend on the order of rows."""
        return sorted((seed for seed, pairs in self.pairs.items() if pairs.keys() == self.levels), key=_order)

    @property
    def dropped(self) -> int:
        return len(self.pairs) - len(self.complete())

    def arms(self) -> tuple[Floats, Floats]:
        """Baseline and treatment values for each complete seed, averaged over the levels."""
        levels = sorted(self.levels, key=_order)
        values = [[self.pairs[seed][level] for level in levels] for seed in self.complete()]
        plain, treated = np.asarray(values, dtype=np.float64).reshape(-1, len(levels), 2).mean(axis=1).T
        return plain, treated


def _cells(
    frame: pd.DataFrame,
    baseline: Mapping[str, object],
    value: str,
    *,
    over: str | None = None,
    same: Sequence[str] = (),
) -> list[_Cell]:
    """Every cell of the frame with its pairs; `same` names columns beyond the Run fields that a pair must share."""
    fields = [column for column in run_fields(frame) if column != value]
    _check_columns(frame, fields, baseline, value, over)
    columns = [*fields, "fingerprint", *same]
    rows: list[Row] = [
        dict(zip(columns, map(_hashable, numbers), strict=True))
        for numbers in frame[columns].itertuples(index=False, name=None)
    ]
    _check_fingerprints(rows)

    paired = [column for column in columns if column not in ARM and column not in baseline]
    varying = [c for c in fields if c != PAIRING and len({row[c] for row in rows}) > 1]
    shown = [column for column in varying if column != over]
    context = [column for column in paired if column not in (PAIRING, over)]

    def level(row: Row) -> Hashable:
        return None if over is None else row[over]

    wanted = {column: _hashable(item) for column, item in baseline.items()}
    controls: list[tuple[Row, float]] = []
    treatments: list[tuple[Row, float]] = []
    levels: dict[tuple[Hashable, ...], set[Hashable]] = {}
    for row, number in zip(rows, frame[value].astype(float).tolist(), strict=True):
        levels.setdefault(_key(row, context), set()).add(level(row))
        arm = controls if all(row[column] == item for column, item in wanted.items()) else treatments
        arm.append((row, number))
    if not controls:
        raise ValueError(f"no run matches the baseline {dict(baseline)}; the frame holds {_values(rows, baseline)}")
    if not treatments:
        raise ValueError(f"all {len(rows)} runs match the baseline {dict(baseline)}: there is nothing to compare it to")

    plain: dict[tuple[Hashable, ...], tuple[Row, float]] = {}
    for row, number in controls:
        if (twin := plain.setdefault(_key(row, paired), (row, number))[0]) is not row:
            raise ValueError(_twins("baseline", twin, row))
    cells: dict[tuple[Hashable, ...], _Cell] = {}
    seen: dict[tuple[Hashable, ...], Row] = {}
    for row, number in treatments:
        if (twin := seen.setdefault(_key(row, fields), row)) is not row:
            raise ValueError(_twins("treatment", twin, row))
        settings = {column: row[column] for column in shown}
        cell = cells.setdefault(_key(row, shown), _Cell(settings, levels[_key(row, context)]))
        pairs = cell.pairs.setdefault(row[PAIRING], {})
        if (partner := plain.get(_key(row, paired))) is None:
            cell.unpaired += 1
        else:
            pairs[level(row)] = (partner[1], number)
    if not any(pairs for cell in cells.values() for pairs in cell.pairs.values()):
        raise ValueError(_no_pair([row for row, _ in controls], [row for row, _ in treatments], paired))
    return [cells[key] for key in sorted(cells, key=lambda key: [_order(item) for item in key])]


def _key(row: Row, columns: Sequence[str]) -> tuple[Hashable, ...]:
    return tuple(row[column] for column in columns)


def _hashable(item: Any) -> Hashable:
    """A value as one that can be a key and equals its like: NaN becomes None, lists and dicts become tuples."""
    if isinstance(item, Mapping):
        return tuple(sorted(((str(name), _hashable(part)) for name, part in item.items()), key=_order))
    if isinstance(item, list | tuple | np.ndarray):
        return tuple(_hashable(part) for part in item)
    if isinstance(item, np.generic):
        item = item.item()
    return None if pd.isna(item) else item


def _order(item: Hashable) -> tuple[int, float, str]:
    """Sort key for columns that mix numbers, words and nothing."""
    if item is None:
        return (0, 0.0, "")
    return (1, float(item), "") if isinstance(item, int | float) else (2, 0.0, str(item))


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


def _check_fingerprints(rows: Sequence[Row]) -> None:
    found: dict[Hashable, set[Hashable]] = {}
    for row in rows:
        found.setdefault(row.get("dataset"), set()).add(row["fingerprint"])
    for dataset, prints in found.items():
        if len(prints) > 1:
            raise ValueError(
                f"data set {dataset!r} comes with {len(prints)} fingerprints {sorted(prints, key=_order)}: these runs "
                "saw different data and are never pooled; keep the rows of one fingerprint"
            )


def _values(rows: Sequence[Row], columns: Mapping[str, object]) -> dict[str, list[Hashable]]:
    return {column: sorted({row[column] for row in rows}, key=_order) for column in columns}


def _twins(arm: str, one: Row, other: Row) -> str:
    differing = {column: (one[column], other[column]) for column in ARM if one.get(column) != other.get(column)}
    if differing:
        return (
            f"two {arm} runs fit the same pair: {one} and another that differs in {differing}; "
            "name these columns in baseline, or take one of the two out"
        )
    return f"the same {arm} run occurs twice: {one}; keep one of the two"


def _no_pair(plain: Sequence[Row], treated: Sequence[Row], paired: Sequence[str]) -> str:
    apart = {}
    for column in paired:
        ours, theirs = {row[column] for row in plain}, {row[column] for row in treated}
        if not ours & theirs:
            apart[column] = (sorted(ours, key=_order), sorted(theirs, key=_order))
    reason = f"the arms share no value of {apart} (baseline, treatment)" if apart else "no combination occurs in both"
    return (
        f"none of the {len(treated)} treatment runs has a baseline run with the same {', '.join(paired)}: {reason}; "
        f"the first is {treated[0]}. Run the missing baseline, or name in baseline what may differ"
    )


def _differences(plain: Floats, treated: Floats) -> Floats:
    """Paired differences, rounded to 12 decimal digits of the values so that equal ones are equal bit for bit."""
    size = max([*np.abs(plain), *np.abs(treated)], default=0.0) or 1.0
    return np.round(treated - plain, 12 - math.ceil(math.log10(size)))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _all_equal(values: Floats) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _student(values: Floats, confidence: float) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    half = 0.0 if _all_equal(values) else float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return _mean(values) - half, _mean(values) + half


def _sign_flip(differences: Floats) -> float:
    if len(differences) == 0:
        return float("nan")
    if len(differences) == 1 or not differences.any():
        return 1.0
    size = np.abs(differences).sum()

    def total(flipped: Floats, axis: int = -1) -> Floats:
        # Rounded, or flips of equal sum count as unequal: 0.1 + 0.2 - 0.3 is not 0 in floating point.
        sums: Floats = np.round(flipped.sum(axis=axis) / size, 12)
        return sums

    # scipy goes through all 2^n flips where they are no more than n_resamples, which is up to n = 16.
    test = stats.permutation_test(
        (differences,),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=99_999,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
