"""Claims about sweeps whose runs the workers of a Dask cluster train."""

import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sweeps import SEEDS, TINY, Trainer, swept, until

from athena import data
from athena.experiments import Store, SweepError, grid

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
Cluster = Callable[..., Any]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Starts a cluster of worker processes on this machine, each with one thread."""
    started: list[Any] = []

    def start(workers: int, **environment: str) -> Any:
        options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "silence_logs": 50}
        started.append(distributed.LocalCluster(n_workers=workers, env=environment, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def written(store: Store) -> int:
    """How many lines a store has; to read them all again and again would keep the sweep waiting."""
    return store.path.read_bytes().count(b"\n") if store.path.exists() else 0


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_where_no_scheduler_answers_is_told_within_15_seconds(
    store: Store, trainer: Trainer, listens: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        begin = time.monotonic()
        with pytest.raises(SweepError, match=f"no Dask scheduler answers at {address} .*see that it runs there"):
            swept(SEEDS, store, dask=address)
        assert time.monotonic() - begin < 15
    assert store.lines() == []


def test_without_dask_the_extra_that_brings_it_is_named(
    store: Store, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SweepError, match=r"pip install -e '\.\[dask\]'"):
        swept(SEEDS, store, dask="tcp://127.0.0.1:8786")


@pytest.mark.slow
def test_a_sweep_whose_workers_are_killed_ends_with_the_store_of_a_serial_one(store: Store, cluster: Cluster) -> None:
    """One of three workers, at random, five times; Dask starts another in its place."""
    runs = grid(replace(TINY, epochs=10, tested="at the end"), factor=[0, 1], seed=range(40))
    serial = Store(store.path.with_name("serial.jsonl"))
    expected = swept(runs, serial, device="cpu")
    three = cluster(3)
    chance = random.Random(0)
    kills: list[int] = []

    def kill() -> None:
        for wanted in (2, 10, 20, 30, 40):
            assert until(lambda: written(store) >= wanted, 300)  # noqa: B023
            children = psutil.Process().children()
            worker = chance.choice([child for child in children if "spawn_main" in " ".join(child.cmdline())])
            worker.kill()
            kills.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    lines = swept(runs, store, dask=three.scheduler_address, device="cpu")
    killer.join()
    assert len(set(kills)) == 5
    assert len(store.lines()) == len(runs) and store.runs().keys() == serial.runs().keys()
    for line, reference in zip(lines, expected, strict=True):
        for name in reference.keys() - {"seconds", "peak_bytes"}:
            assert line[name] == reference[name], name
    wrong = replace(TINY, scope=("linear9",), factor=1.0)
    with pytest.raises(SweepError, match=r"1 of 1 runs failed.*linear9"):
        swept([*runs, wrong], store, dask=three.scheduler_address)


@pytest.mark.slow
def test_a_worker_without_the_data_says_which_data_set(
    store: Store, cluster: Cluster, mnist: Path, tmp_path: Path
) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    one = cluster(1, ATHENA_DATA=str(tmp_path / "empty"), **nowhere)
    assert data.load("mnist")
    with pytest.raises(SweepError, match=r"MissingData: mnist is not in .*empty"):
        swept([replace(TINY, dataset="mnist")], store, dask=one.scheduler_address)
    assert store.lines() == []


@pytest.mark.slow
def test_a_scheduler_that_is_lost_ends_the_sweep_with_what_was_measured(store: Store, cluster: Cluster) -> None:
    runs = grid(replace(TINY, epochs=4), seed=range(400))
    one = cluster(1)

    def lose() -> None:
        assert until(lambda: written(store) >= 3, 300)
        one.close()

    loser = threading.Thread(target=lose)
    loser.start()
    with pytest.raises(SweepError, match=r"the Dask scheduler at tcp://\S+ was lost|runs failed"):
        swept(runs, store, dask=one.scheduler_address)
    loser.join()
    assert 3 <= len(store.lines()) < 400
