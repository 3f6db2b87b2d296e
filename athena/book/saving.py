"""How many times the data guidance saves, in the chapters that measure it (thesis figures 6.1, 7.12 and 7.13).

Not here: the measurement itself (`athena.statistics.data_efficiency`).
"""

from collections.abc import Mapping

import pandas as pd

from athena.book.tables import percent, shown
from athena.experiments import statistics

__all__ = ["saved"]


def saved(arms: Mapping[str, pd.DataFrame], named: str = "arm") -> tuple[pd.DataFrame, list[str]]:
    """How many times the data plain training needs for the accuracies that an arm reaches as well.

    Args:
        arms: for each row's name the runs of one guided arm and of plain training, at two shares of the data or more.
        named: the head of the column of names.

    Returns:
        A row for each arm; and the names of those whose interval lies above 1, with their number of seeds.
    """
    rows, above = [], []
    for name, frame in arms.items():
        (found,) = statistics.data_efficiency(frame, any_code=True).to_dict("records")
        overlap = not pd.isna(found["ratio"])
        reached = f"{percent(found['reached_from'])} to {percent(found['reached_to'])}"
        rows.append(
            {
                named: name,
                "times the data": f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if overlap else "",
                "seeds": found["n"],
                "read at accuracies": reached if overlap else "none that both reach",
            }
        )
        if overlap and round(found["low"], 3) > 1:
            above.append(f"{name}, {found['n']:g} seeds")
    return shown(pd.DataFrame(rows), named), above
