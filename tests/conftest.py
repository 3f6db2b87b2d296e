"""What every test shares: one thread, reproducible examples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from sweeps import Trainer

from athena import data
from athena.experiments import Store
from athena.experiments.data.loading import DATA_SETS

torch.set_num_threads(1)

settings.register_profile("athena", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("athena")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing reaches the network; returns the addresses that are asked."""
    asked: list[str] = []

    def refuse(request: object, **_: object) -> None:
        asked.append(getattr(request, "full_url", str(request)))
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of an MNIST of 40 and 10 images, no two alike, which takes the place of the real one."""
    shapes = {
        "train-images-idx3-ubyte": (40, 28, 28),
        "train-labels-idx1-ubyte": (40,),
        "t10k-images-idx3-ubyte": (10, 28, 28),
        "t10k-labels-idx1-ubyte": (10,),
    }
    random = np.random.RandomState(0)
    files = {}
    for name, shape in shapes.items():
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        files[name] = header + random.randint(0, 256 if len(shape) == 3 else 10, shape).astype(np.uint8).tobytes()
    tiny = replace(DATA_SETS["mnist"], train=40, test=10, fingerprint="87d91691246b099c")
    monkeypatch.setitem(DATA_SETS, "mnist", tiny)
    return files


@pytest.fixture
def mnist(data_folder: Path, tiny_mnist: dict[str, bytes]) -> Path:
    """A data folder with a tiny MNIST; returns the folder of its files."""
    raw = data_folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in tiny_mnist.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results" / "s.jsonl")


@pytest.fixture(scope="module")
def fingerprint() -> str:
    return data.load("mnist5k").fingerprint


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, fingerprint: str) -> Trainer:
    fake = Trainer(fingerprint, [])
    monkeypatch.setattr("athena.experiments.backends.train", fake)
    return fake
