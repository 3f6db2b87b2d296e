"""Differences and ratios of paired runs with their intervals and p-values, and the verdict they allow.

Student's interval at every number of pairs: on the residuals of these studies it covers 94 to 97 %, where the BCa
bootstrap covers 85 to 90 % at ten pairs. Not here: which run is compared with which (`pairing`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.power import TTestPower

from athena.experiments.statistics.pairing import Floats, cells

__all__ = ["LEVEL", "POWER", "beside", "compare", "family", "ratio", "student", "summary", "verdict"]

LEVEL = 0.05
"""A corrected p below this is called an effect."""
POWER = 0.8
"""The probability with which the effect in the column `detectable` would have been found."""
FLIPS = 99_999
"""How many random sign flips stand for all of them beyond 16 pairs."""


def compare(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "accuracy",
    over: str | None = None,
    confidence: float = 0.95,
    published: float | None = None,
    any_code: bool = False,
) -> pd.DataFrame:
    """Mean paired difference (treatment minus baseline) for each cell of a study.

    Rows that match every item of `baseline` are the baseline arm, all others are treatments. A treatment is paired
    with the baseline run of the same seed and data fingerprint, trained on the same device by the same code, that
    equals it in every Run field outside `ARM` and `baseline`; None and NaN are equal. A cell is a combination of the
    columns that vary over the frame, seed excepted. A diverged run counts with the value it has.

    Args:
        frame: one row a run, as `athena.results` returns it; the order of rows has no influence.
        baseline: column values that make a row part of the baseline arm.
        value: the column compared. Accuracy is a fraction from 0 to 1, so a difference of 0.01 is one point.
        over: None, or the column averaged out before the statistics: `over="fraction"` gives a study's endpoint, the
            mean difference over fractions for each seed. A seed enters only if both arms have every value of the
            column that any run of the frame has under the same settings, so all arms share one endpoint.
        confidence: coverage of the interval.
        published: a difference, in the unit of `value`, to be tested as well.
        any_code: whether a pair may be of two versions of the code, for studies whose code changed in nothing that
            decides a result.

    Returns:
        One row a cell, sorted by the cell's columns, which come first. Then
        n: pairs, or seeds with `over`.
        baseline_mean, mean, difference: of those pairs, in the unit of `value`.
        low, high: Student's interval of the mean difference.
        sd: standard deviation of a paired difference.
        p: two-sided sign-flip test of "no difference"; every one of the 2^n flips up to n = 16, else 99,999 random
            ones from a fixed seed. It cannot go below 2 / 2^n.
        p_holm, p_least, detectable: of p, sd and n within a family of cells, here those of this table; see `family`.
        published, p_published: only with `published`: that number, and the sign-flip test of it.
        unpaired: treatment runs left out because their baseline run is missing (a sweep still under way).
        refused: treatment runs left out because their baseline run is of another device or of other code.
        dropped: only with `over`: seeds left out because a value of that column is missing in one arm.
        A cell without any pair yet keeps its row, with n = 0 and NaN.

    Raises:
        ValueError: the frame lacks a needed column, `value` has missing or infinite entries, one of the arms is empty,
            no pair exists at all, a run occurs twice, or one data set comes with more than one fingerprint.

    Sources: sign-flip test, Fisher, The Design of Experiments (1935), section 21; Holm, A simple sequentially rejective
    multiple test procedure (1979).
    """
    rows = []
    for cell in cells(frame, baseline, value, over=over, same=("device",) if any_code else ("device", "code")):
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
            "sd": float(np.std(differences, ddof=1)) if len(differences) > 1 else np.nan,
            "p": _sign_flip(differences),
            **dict.fromkeys(("p_holm", "p_least", "detectable"), np.nan),
        }
        if published is not None:
            measured |= {"published": published, "p_published": _sign_flip(_differences(plain + published, treated))}
        measured |= {"unpaired": cell.unpaired, "refused": cell.refused}
        measured |= {} if over is None else {"dropped": cell.dropped}
        rows.append({**cell.settings, **measured})
    return family(pd.DataFrame(rows))[0]


def family(*tables: pd.DataFrame) -> list[pd.DataFrame]:
    """Tables of `compare` whose cells are tested together: one correction over all of them.

    A cell of fewer than six pairs, whose p stays above 0.05 whatever it measures, does not count in the correction,
    since it cannot be a false positive (Tarone, A modified Bonferroni method for discrete data, Biometrics 46, 1990).

    Returns:
        The tables with these columns made anew.
        p_holm: p after Holm (1979) over all cells of the tables that count; of the others p itself.
        p_least: the smallest that `p_holm` could have been at this number of pairs, the other cells being as they are:
            that of differences which all point one way.
        detectable: the difference that would have been found with a probability of 80 %, by a t-test with the sd and
            n of the cell at the level that its p has to be below in this family; infinite where none gets there.
    """
    whole = pd.concat(tables, keys=range(len(tables)), names=["table", None])
    least = (2.0 ** (1 - whole["n"])).clip(lower=1 / (FLIPS + 1), upper=1.0).where(whole["n"] > 0)
    whole["p_holm"], whole["p_least"] = whole["p"], least
    whole["detectable"] = np.where(whole["n"] > 0, np.inf, np.nan)
    counted = whole.index[least < LEVEL]
    p, smallest = whole.loc[counted, "p"].to_numpy(), least[counted].to_numpy()
    if len(counted):
        whole.loc[counted, "p_holm"] = _holm(p)
        of_least = [_holm([*p[:k], smallest[k], *p[k + 1 :]])[k] for k in range(len(p))]
        whole.loc[counted, "p_least"] = of_least
        whole.loc[counted, "detectable"] = [
            sd * _standard_effect(int(n), LEVEL * own / corrected) if corrected < LEVEL else math.inf
            for sd, n, own, corrected in zip(
                whole.loc[counted, "sd"], whole.loc[counted, "n"], smallest, of_least, strict=True
            )
        ]
    return [pd.DataFrame(whole.loc[[place]]).droplevel("table") for place in range(len(tables))]


def _holm(p: ArrayLike) -> Floats:
    """p after Holm's correction, as statsmodels' multipletests gives it, which collects garbage in each call."""
    values = np.asarray(p, dtype=np.float64)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    return corrected


@cache
def _standard_effect(n: int, level: float) -> float:
    """The mean difference, in standard deviations, that a t-test of n pairs finds with `POWER`."""
    return float(TTestPower().solve_power(nobs=n, alpha=level, power=POWER))


def ratio(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "seconds",
    confidence: float = 0.95,
    any_code: bool = False,
) -> pd.DataFrame:
    """Ratio of paired values (treatment over baseline) for each cell, such as what guidance costs in training time.

    Pairs and cells are those of `compare`.

    Returns:
        One row a cell: the cell's columns, `n` pairs, `ratio` (geometric mean of the paired ratios, no unit), `low`
        and `high` (Student's interval of the mean log ratio, taken back), `unpaired` and `refused` as in `compare`.

    Raises:
        ValueError: as for `compare`, or a value is not above 0.
    """
    found = cells(frame, baseline, value, same=("device",) if any_code else ("device", "code"))
    if not (frame[value] > 0).all():
        raise ValueError(f"a ratio needs values above 0, but {value!r} goes down to {frame[value].min()}")
    rows = []
    for cell in found:
        plain, treated = cell.arms()
        logs = np.log(treated / plain)
        centre, low, high = np.exp([_mean(logs), *student(logs, confidence)]).tolist()
        measured = {"n": len(logs), "ratio": centre, "low": low, "high": high}
        rows.append({**cell.settings, **measured, "unpaired": cell.unpaired, "refused": cell.refused})
    return pd.DataFrame(rows)


def beside(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A table of `compare` with the thesis's numbers for the same share of the data in its last columns.

    Args:
        table: with a column `fraction`.
        published: rows of `athena.experiments.published("accuracy")`, one for each percent.

    Returns:
        `table` with `thesis_plain`, `thesis_lrp` and `thesis_difference`, in its own unit (0 to 1); NaN where the
        thesis has no number.

    Raises:
        ValueError: `published` has two rows for one percent, or `table` no fractions.
    """
    if "fraction" not in table or published["percent"].duplicated().any():
        raise ValueError("beside needs a table by fraction, and one published row for each percent: choose one table")
    theirs = published.set_index("percent")[["accuracy_standard", "accuracy_lrp"]] / 100
    plain, lrp = theirs.reindex((100 * table["fraction"]).round().astype(int)).to_numpy().T
    return table.assign(thesis_plain=plain, thesis_lrp=lrp, thesis_difference=lrp - plain)


def summary(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of one arm with Student's interval: (mean, low, high), in the unit of `values`.

    One value has no interval (NaN), equal values have the point itself, no value at all gives three NaN.

    Raises:
        ValueError: a value is not finite or `confidence` does not lie between 0 and 1.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"an interval needs finite values, got {numbers[~np.isfinite(numbers)].tolist()}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1 such as 0.95, got {confidence}")
    return (_mean(numbers), *student(numbers, confidence))


def student(values: Sequence[float] | Floats, confidence: float) -> tuple[float, float]:
    """Student's interval of the mean; NaN for fewer than two values."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return float("nan"), float("nan")
    equal = bool(np.ptp(numbers) <= 1e-12 * np.abs(numbers).max())
    error = float(np.std(numbers, ddof=1)) / len(numbers) ** 0.5
    half = 0.0 if equal else _quantile((1 + confidence) / 2, len(numbers) - 1) * error
    return _mean(numbers) - half, _mean(numbers) + half


@cache
def _quantile(share: float, freedom: int) -> float:
    """Of Student's distribution; kept, since tables ask for the same few thousands of times."""
    return float(stats.t.ppf(share, freedom))


def verdict(row: Mapping[str, Any] | pd.Series) -> str:
    """What one row of `compare` allows to say.

    ``"gain"`` and ``"loss"`` need an interval above or below 0 and a Holm-corrected p below 0.05; the words fit values
    of which more is better. Else, where a published number was tested, ``"published number ruled out"`` if it lies
    outside the interval and the p of its test is below 0.05; else ``"cannot be tested"`` where so few pairs cannot
    bring the corrected p below 0.05 whatever they measure, and ``"no effect shown"``, beside which the column
    `detectable` says what would have been.

    This is the part of the claim rule that one table can know. A claim that relevance helps needs three more
    comparisons, each a gain too: against the arm with shuffled relevance, against gradient times activation, and
    against plain training tuned with the same effort and given the same time.
    """
    if row["p_holm"] < LEVEL and row["low"] > 0:
        return "gain"
    if row["p_holm"] < LEVEL and row["high"] < 0:
        return "loss"
    if "published" in row and row["p_published"] < LEVEL and not row["low"] <= row["published"] <= row["high"]:
        return "published number ruled out"
    return "no effect shown" if row["p_least"] < LEVEL else "cannot be tested"


def _differences(plain: Floats, treated: Floats) -> Floats:
    """Paired differences, rounded to 12 decimal digits of the values so that equal ones are equal bit for bit."""
    size = max([*np.abs(plain), *np.abs(treated)], default=0.0) or 1.0
    return np.round(treated - plain, 12 - math.ceil(math.log10(size)))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


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
        n_resamples=FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
