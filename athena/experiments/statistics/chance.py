"""What a method without any effect shows by chance: in a study of the thesis's form, and by the rule of this book."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from athena.experiments.statistics.comparing import compare, summary, verdict
from athena.experiments.statistics.pairing import Floats, cells, order

__all__ = ["chance", "coverage", "false_verdicts", "residuals"]


def chance(
    frame: pd.DataFrame,
    baseline: Mapping[str, object] = {"factor": 0},
    *,
    value: str = "accuracy",
    seeds: int = 4,
    draws: int = 20_000,
    any_code: bool = False,
) -> pd.DataFrame:
    """Simulated studies of a method that does nothing, with the spread of the paired differences in `frame`.

    Each share of the data gets `seeds` differences, drawn from those measured there less their mean, each with a sign
    by chance; shares are drawn apart from each other. They are widened by ``sqrt(n / (n - 1))``, since what is left
    around the mean of n differences is that much narrower than they are.

    Args:
        frame: runs of one guided arm and plain ones, as for `compare`; every share has two pairs at least.
        baseline, value, any_code: as for `compare`.
        seeds: how many pairs a simulated study has at each share.
        draws: how many studies.

    Returns:
        One row a study: `mean` of the differences over the shares and `largest` of them, in the unit of `value`, and
        `positive`, at how many shares the difference is above 0.

    Raises:
        ValueError: as for `compare`, or a share has fewer than two pairs.
    """
    same = ("device",) if any_code else ("device", "code")
    found = {cell.settings["fraction"]: cell.arms() for cell in cells(frame, baseline, value, same=same)}
    rng = np.random.default_rng(0)
    by_share = []
    for share in sorted(found, key=order):
        plain, treated = found[share]
        n = len(plain)
        if n < 2:
            raise ValueError(f"at a share of {share} there are {n} pairs; two at least tell of a spread")
        rest = (treated - plain - (treated - plain).mean()) * (n / (n - 1)) ** 0.5
        drawn = rng.choice(rest, (draws, seeds)) * rng.choice([-1, 1], (draws, seeds))
        by_share.append(drawn.mean(axis=1))
    differences = np.stack(by_share, axis=1)
    return pd.DataFrame(
        {
            "mean": differences.mean(axis=1),
            "largest": differences.max(axis=1),
            "positive": (differences > 0).sum(axis=1),
        }
    )


def residuals(
    frame: pd.DataFrame, baseline: Mapping[str, object] = {"factor": 0}, *, value: str = "accuracy"
) -> Floats:
    """The paired differences of a study without the mean of their cell, all brought to a standard deviation of one.

    So they hold the shape of the distribution, its skewness and its tails. Cells with fewer than four pairs are left
    out, and those whose differences are all alike.

    Args:
        frame, baseline, value: as for `compare`; pairs may be of two versions of the code.
    """
    found = []
    for cell in cells(frame, baseline, value, same=("device",)):
        plain, treated = cell.arms()
        if len(plain) >= 4 and np.ptp(treated - plain) > 0:
            rest = treated - plain - (treated - plain).mean()
            found.append(rest / rest.std() * (len(rest) / (len(rest) - 1)) ** 0.5)
    together: Floats = np.concatenate(found)
    return together


def coverage(rest: Floats, n: int, draws: int = 1500) -> float:
    """How often the interval of `summary` holds the true mean, in samples of n pairs drawn from `rest`.

    Args:
        rest: from `residuals`; its mean is what an interval has to hold.
        n: pairs.
        draws: samples.
    """
    rng, true = np.random.default_rng(0), rest.mean()
    hits = [low <= true <= high for _, low, high in (summary(rng.choice(rest, n)) for _ in range(draws))]
    return float(np.mean(hits))


def false_verdicts(rest: Floats, n: int, shares: int, draws: int = 300) -> float:
    """In how many studies of a method without any effect `verdict` calls at least one cell a gain or a loss.

    Args:
        rest: from `residuals`; each difference is one of these, with a sign by chance.
        n: pairs in each cell.
        shares: cells of a study, which are corrected together.
        draws: studies.
    """
    rng, found = np.random.default_rng(0), 0
    share, seed = np.meshgrid(np.arange(1, shares + 1), np.arange(n), indexing="ij")
    plain = pd.DataFrame({"fraction": share.ravel() / 100, "seed": seed.ravel(), "factor": 0.0, "accuracy": 0.5})
    plain = plain.assign(fingerprint="", device="", code="")
    for _ in range(draws):
        differences = 0.01 * rng.choice(rest, len(plain)) * rng.choice([-1, 1], len(plain))
        guided = plain.assign(factor=1.0, accuracy=plain["accuracy"] + differences)
        table = compare(pd.concat([plain, guided]))
        found += any(verdict(row) in ("gain", "loss") for _, row in table.iterrows())
    return found / draws
