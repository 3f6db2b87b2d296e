"""Claims about thesis table 4.1, measured."""

from typing import Any

import pytest

from athena.attribution import METHODS
from athena.experiments import methods


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    fast = ("saliency", "shapley", "cam", "deep_lift", "lrp")
    return methods.measure(images=2, epochs=1, randomised=1, methods=fast)


def rows(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in measured["rows"]}


def test_passes_are_counted_for_one_image(measured: dict[str, Any]) -> None:
    assert (rows(measured)["saliency"]["forwards"], rows(measured)["saliency"]["backwards"]) == (1, 1)
    assert (rows(measured)["deep_lift"]["forwards"], rows(measured)["deep_lift"]["backwards"]) == (2, 2)
    assert rows(measured)["cam"]["backwards"] == 0


def test_what_theory_says_is_measured(measured: dict[str, Any]) -> None:
    found = rows(measured)
    assert {name: row["agnostic"] for name, row in found.items()} == {
        **{"saliency": False, "shapley": True, "cam": False, "deep_lift": False, "lrp": False}
    }
    assert {name for name, row in found.items() if row["baseline"] is None} == {"saliency", "cam", "lrp"}
    assert {name for name, row in found.items() if row["adds up to"] == "difference"} == {"shapley", "deep_lift"}


def test_every_mark_that_differs_gets_a_sentence() -> None:
    row = {"method": "saliency", "forwards": 1, "backwards": 1, "agnostic": False, "baseline": None, "sum": 0.0}
    assert methods.contradictions([row | {"adds up to": "neither"}]) == [
        "Saliency Maps (saliency): the table does not mark that it needs no baseline, but there is none to choose."
    ]
    lrp = row | {"method": "lrp", "adds up to": "output"}
    assert methods.contradictions([lrp]) == []
    assert len(methods.contradictions([lrp | {"forwards": 50, "adds up to": "neither", "agnostic": True}])) == 3


def test_what_is_stored_has_an_entry_or_a_reason_for_each_method_and_each_column_of_the_table() -> None:
    stored = methods.load()
    assert tuple(row["method"] for row in stored["rows"]) == METHODS
    measured = {"seconds", "agnostic", "baseline", "adds up to", "mass", "rank", "pointing", "flipping", "randomised"}
    assert all("reason" in row or measured <= set(row) for row in stored["rows"])
    columns = {"model_agnostic", "model_specific", "high_computational_effort", "no_baseline"}
    columns |= {"conservation_of_relevance", *methods.BY_CONSTRUCTION}
    assert columns == set(methods.published().columns)
    assert len(methods.contradictions(stored["rows"])) > 0
