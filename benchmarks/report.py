"""What the benchmarks share: their options, the clock, ratios between arms, and where the numbers go."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Table(NamedTuple):
    """What was measured of one network.

    Attributes:
        title: the network.
        rounds: how often each arm was timed; null in a file says that this is not known.
        rows: one for each arm: its name, and its numbers by the name of the column.
    """

    title: str
    rounds: int
    rows: list[dict[str, str | float]]


def shape(given: Sequence[int]) -> str:
    """The shape of a batch as a title has it, such as ``"64 x 3 x 32 x 32"``."""
    return " x ".join(map(str, given))


def options(description: str, names: Iterable[str], rounds: int) -> argparse.Namespace:
    """The options that a benchmark was started with; `names` are those of its networks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=list(names), action="append", help="one of the networks; all by default")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds; small networks take more of them")
    parser.add_argument("--alone", action="store_true", help="leave out every other implementation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the numbers, such as results/benchmarks/lrp-mine.json"
    )
    chosen = parser.parse_args()
    chosen.only = chosen.only or list(names)
    return chosen


def now(device: str) -> float:
    """The CPU seconds of this process, of all its threads together; on a GPU the seconds of a clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of the ratio within one round."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def spread(own: Sequence[float], other: Sequence[float]) -> float:
    """The distance between the quartiles of what `ratio` is the median of."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    if len(ratios) < 2:
        return 0.0
    low, _, high = statistics.quantiles(ratios)
    return high - low


def run(chosen: argparse.Namespace, measure: Callable[[str], Iterable[Table]]) -> None:
    """Measures each network, prints its tables as soon as they are there, and stores all where `--out` says."""
    import pandas as pd  # the processes that measure memory do without

    from athena.book import tables

    conditions: Mapping[str, Any] = {
        "PyTorch": torch.__version__,
        "device": chosen.device,
        "threads": chosen.threads,
        "seconds": "CPU" if chosen.device == "cpu" else "wall-clock",
    }
    print(tables.conditions(conditions))
    measured: list[dict[str, Any]] = []
    for name in chosen.only:
        for table in measure(name):
            measured.append(table._asdict())
            if chosen.out:
                chosen.out.write_text(json.dumps({"conditions": conditions, "tables": measured}, indent=1) + "\n")
            text = tables.cells(pd.DataFrame(table.rows)).to_string(index=False)
            print("", tables.title(measured[-1]), text, sep="\n", flush=True)
