"""What a method without any effect shows by chance, in a study of the thesis's form."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from athena.experiments.statistics.pairing import cells, order

__all__ = ["chance"]


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
