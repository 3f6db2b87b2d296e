"""Relevance adds up on networks of every kind, as the stored table says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED: dict[str, dict[str, Any]] = {
    row["network"]: row for row in json.loads((ROOT / "results" / "architectures.json").read_text("utf8"))["rows"]
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        specification.loader.exec_module(module)
    return module


def test_the_table_has_every_network_and_its_relevance_adds_up_or_it_is_refused(benchmark: ModuleType) -> None:
    assert list(STORED) == list(benchmark.NETWORKS)
    for row in STORED.values():
        assert "refused" in row or (row["finite"] and row["account"] < 1e-6), row
    assert [name for name, row in STORED.items() if "refused" in row] == ["Mamba"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STORED)
def test_relevance_adds_up_on_a_network_as_it_is_stored(name: str, benchmark: ModuleType) -> None:
    try:
        found = benchmark.accounted(name)
    except ImportError:
        pytest.skip("transformers is not installed")
    assert found.get("refused") == STORED[name].get("refused")
    if "refused" not in found:
        assert found["finite"] and found["account"] < 1e-6
        assert found["parameters"] == STORED[name]["parameters"]
