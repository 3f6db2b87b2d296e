"""How many times the data plain training needs for the accuracy of guided training."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import optimize

from athena.experiments.statistics.comparing import student
from athena.experiments.statistics.pairing import Floats, cells, order

__all__ = ["data_efficiency"]


def data_efficiency(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "accuracy",
    over: str = "fraction",
    confidence: float = 0.95,
    any_code: bool = False,
) -> pd.DataFrame:
    """How many times the data the baseline needs for the accuracy of each treatment (thesis figure 6.1, read across).

    For each seed, a curve that never falls is fitted to the accuracy of either arm over the logarithm of the share of
    the data (isotonic regression, straight lines between). At every accuracy that both curves reach, the ratio is the
    share at which the baseline reaches it over that of the treatment; nothing is extrapolated. The seeds are then
    averaged, as in `compare`.

    Pairs are those of `compare` with the same `over`, so a seed enters with all of its shares or not at all.

    Returns:
        One row a cell: its columns; `n` seeds; `ratio`, the geometric mean over those accuracies and over seeds, above
        1 where the treatment needs fewer data; `low` and `high`, Student's interval of the mean log ratio of a seed,
        taken back; `reached_from` and `reached_to`, the accuracies, means over seeds, in the unit of `value`;
        `unreached`, seeds left out because no accuracy is reached by both of their curves; `dropped` and `refused` as
        in `compare`. NaN where there is no such seed, and for the interval of one.

    Raises:
        ValueError: as for `compare`, or a share is not above 0.
    """
    rows = []
    for cell in cells(frame, baseline, value, over=over, same=("device",) if any_code else ("device", "code")):
        shares = np.array(sorted(cell.levels, key=order), dtype=np.float64)
        if not (shares > 0).all():
            raise ValueError(f"a share of the data is above 0, but {over!r} goes down to {shares.min()}")
        found = [_horizontal(np.log(shares), curves) for curves in cell.by_level()]
        reached = np.array([seed for seed in found if seed is not None]).reshape(-1, 3)
        means = reached.mean(axis=0) if len(reached) else np.full(3, np.nan)
        ratio, low, high = np.exp([means[0], *student(reached[:, 0], confidence)]).tolist()
        rows.append(
            {**cell.settings, "n": len(reached), "ratio": ratio, "low": low, "high": high}
            | {"reached_from": means[1], "reached_to": means[2], "unreached": len(found) - len(reached)}
            | {"dropped": cell.dropped, "refused": cell.refused}
        )
    return pd.DataFrame(rows)


def _horizontal(x: Floats, values: Floats) -> tuple[float, float, float] | None:
    """How much further right the first of two curves is, averaged over the heights both reach, and from where to where.

    None where there is no such height. `values` is (len(x), 2); a curve is the rising fit to its column.
    """
    curves = [optimize.isotonic_regression(curve).x for curve in values.T]
    low, high = max(curve[0] for curve in curves), min(curve[-1] for curve in curves)
    if not low < high:
        return None
    heights = low + (np.arange(400) + 0.5) / 400 * (high - low)
    first, second = (np.interp(heights, curve, x) for curve in curves)
    return float((first - second).mean()), float(low), float(high)
