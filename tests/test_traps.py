"""Each line of code of the book's page on traps runs, where the library is installed that it is for."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import athena

PAGE = (Path(__file__).parents[1] / "book" / "traps.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LIBRARIES = ("lightning", "accelerate", "transformers", "skorch")


def library(block: str) -> str:
    return next((name for name in LIBRARIES if re.search(rf"^(from|import) {name}\b", block, re.MULTILINE)), "torch")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "r").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the page takes for granted."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(8)]
    return {
        **{"athena": athena, "torch": torch, "F": F, "model": model, "x": x, "y": y, "images": images},
        "loader": DataLoader(TensorDataset(x, y), 4),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "criterion": nn.CrossEntropyLoss(),
        "folder": str(tmp_path),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_code_on_the_page_runs_and_is_guided(
    block: str, names: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(library(block)) is None:
        pytest.skip(f"{library(block)} is not installed")
    if "torch.distributed" in block or "torch.nn.parallel" in block:
        request.getfixturevalue("process_group")
    made: list[athena.Guidance] = []

    class Watched(athena.Guidance):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(athena, "Guidance", Watched)
    exec(compile(block, "traps.md", "exec"), names)
    assert [guidance.step > 0 for guidance in made] == [True]


def test_the_page_names_every_library_that_is_tested() -> None:
    assert {library(block) for block in BLOCKS} == {"torch", *LIBRARIES}
