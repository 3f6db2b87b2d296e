"""How far sweeps scale, and what the whole paper costs: what the page on running it again says of both.

Not here: the measurement itself (`benchmarks/scale.py`).
"""

import json
from typing import Any

import pandas as pd

from athena.book.tables import percent, shown
from athena.experiments import Study, root
from athena.experiments.cost import core_hours

__all__ = ["costs", "limits", "table"]


def _measured() -> tuple[dict[str, Any], pd.DataFrame]:
    """The conditions, and one row for each sweep of sleeping runs."""
    stored = json.loads((root() / "results" / "benchmarks" / "scale.json").read_text("utf8"))
    (sweeps,) = stored["tables"]
    return stored["conditions"], pd.DataFrame(sweeps["rows"])


def table() -> pd.DataFrame:
    """Runs an hour against how many are run at once."""
    _, rows = _measured()
    columns = {
        "at once": rows["arm"],
        "runs an hour": rows["runs/h"].map("{:,.0f}".format),
        "of the ideal": rows["of ideal"].map(lambda share: percent(share, 0)),
    }
    for part in ("sweep", "scheduler", "workers", "store"):
        columns[f"{part} (ms a run)"] = rows[f"{part} ms"].map("{:.1f}".format).replace("nan", "")
    return shown(pd.DataFrame(columns), "at once")


def limits() -> str:
    """What two processes keep of the ideal, and what saturates first where more run at once; sentences."""
    conditions, rows = _measured()
    two, rows = rows[rows["workers"] == 2].iloc[0], rows.sort_values(["seconds", "workers"])
    short = rows[rows["seconds"] == rows["seconds"].min()].iloc[-1]
    long = rows.iloc[-1]
    names = {"the scheduler": "scheduler ms", "the sweep itself": "sweep ms", "the store": "store ms"}
    parts = {part: short[name] for part, name in names.items()}
    narrow = max(parts, key=lambda part: parts[part])
    return (
        f"Two processes keep {percent(two['of ideal'], 0)} of the ideal throughput with runs of {two['seconds']:g} s. "
        f"{long['workers']} at once keep {percent(long['of ideal'], 0)} with runs of {long['seconds']:g} s, and "
        f"{short['workers']} {percent(short['of ideal'], 0)} with runs of {short['seconds']:g} s. A cluster differs: "
        f"all workers share one process here, which takes {short['workers ms']:.0f} ms for each run, and the "
        f"{conditions['cores']} cores had other work meanwhile ({two['load']:.0f} processes wanted one before the "
        f"first sweep). Where each worker has a machine of its own, what saturates first is {narrow}: by these numbers "
        f"it takes {parts[narrow]:.1f} ms for each run, and so ends {1000 / parts[narrow]:,.0f} a second at most, "
        f"{3.6e6 / parts[narrow]:,.0f} an hour."
    )


def costs() -> str:
    """What the whole paper costs, a sentence or two."""
    lines = [line for path in sorted((root() / "studies").glob("*.toml")) for line in Study.read(path).store.lines()]
    measured, estimated = core_hours(lines)
    return (
        f"The {len({line['key'] for line in lines}):,} runs of the paper have trained for {measured:.0f} core-hours on "
        f"CPUs. Those that were run on a GPU would take about {estimated:.0f} more there, by what runs of the same "
        f"network took: {measured + estimated:.0f} core-hours in all, without loading and tests."
    )
