"""The examples of CONTRIBUTING.md do what it says."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import athena
from athena import data, experiments, models, rules
from athena.experiments import controls, uses
from athena.experiments.data import originals
from athena.experiments.run import Run
from athena.propagation import layer, passing, products

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf8")


def example(title: str, number: int = 0) -> str:
    """A block of code under a heading, the first unless told."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)[number]


def added_to(module: ModuleType, title: str, number: int = 0) -> dict[str, Any]:
    """What the module would hold with the example in it."""
    names = dict(vars(module))
    exec(example(title, number), names)
    return names


def test_the_rule_shares_out_by_the_strength_of_connections() -> None:
    rule = added_to(rules, "A rule")["Strength"]()
    layer, a = torch.nn.Linear(3, 1, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    contributions = a * layer.weight.abs()
    expected = contributions / (contributions.sum(1, keepdim=True) + layer.bias.abs()) * layer(a)
    assert torch.allclose(athena.lrp(layer, a, rule=rule).input, expected)


def test_the_node_of_an_operation_has_the_name_that_is_told() -> None:
    found = re.search(r"^(torch\.rand.*)  # \"(\w+)\"$", example("An operation"), re.MULTILINE)
    assert found is not None and eval(found[1]) == found[2]


class Of(nn.Module):
    """A function of what a layer of weights makes of an input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 4, dtype=torch.float64), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds to the kinds of graph nodes is gone after it."""
    monkeypatch.setattr(layer, "_LAYERS", dict(layer._LAYERS))
    monkeypatch.setattr(layer, "_BY_NAME", {})


@pytest.mark.usefixtures("kinds")
def test_the_operation_gives_the_same_share_to_each_of_its_factors() -> None:
    model, x = Of(lambda z: z.prod(1, keepdim=True)), torch.rand(2, 3, dtype=torch.float64)
    added_to(products, "An operation", 1)
    explained = athena.lrp(model, x, rule=rules.Zero())
    start = explained.output.expand(2, 4)
    assert torch.allclose(explained.layers["layer"], start / 4)
    expected = start / 4 / model.layer(x) @ model.layer.weight * x
    assert torch.allclose(explained.input, expected)


@pytest.mark.usefixtures("kinds")
def test_a_linear_operation_is_a_name_among_the_kinds_of_a_class() -> None:
    model, x = Of(lambda z: z.cumsum(1)), torch.rand(2, 3, dtype=torch.float64)
    found = re.search(r"`(\w+)` would go into those of `(\w+)`", TEXT)
    assert found is not None
    type("Longer", (getattr(passing, found[2]),), {"kinds": (found[1],)})
    explained = athena.lrp(model, x, target=3, rule=rules.Zero())  # the last total is of all four
    assert torch.allclose(explained.layers["layer"], model.layer(x))


@pytest.mark.usefixtures("no_network", "data_folder")
def test_the_data_set_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    fashion = added_to(originals, "A data set")["DATA_SETS"][-1]
    monkeypatch.setitem(data.DATA_SETS, "fashion", fashion)
    with pytest.raises(data.MissingData, match="fashion is not in"):
        data.load("fashion")
    assert data.at_hand("fashion") == "mnist5k"


def test_the_model_has_a_cost() -> None:
    names = added_to(models, "A model")
    assert names["MODELS"].keys() == names["STEP_COST"].keys() > models.MODELS.keys()
    assert names["MODELS"]["perceptron"](3, 10)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert models.MODELS.keys() == models.STEP_COST.keys()


def test_the_use_gives_the_loss_of_a_batch() -> None:
    loss = added_to(uses, "A use")["LOSSES"]["doubled"]
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    losses = nn.functional.cross_entropy(network(x), y, reduction="none")
    assert losses.mean() <= loss(uses.Use(Run(target="label"), network), x, y) <= 2 * losses.mean()


def test_the_control_gives_one_number_a_neuron() -> None:
    control = added_to(controls, "A control")["CONTROLS"]["constant"]
    assert torch.equal(control(torch.rand(2, 3), None, None, None), torch.ones(2, 3))


def test_the_study_is_one(tmp_path: Path) -> None:
    (tmp_path / "other-seeds.toml").write_text(example("A study"))
    study = experiments.Study.read(tmp_path / "other-seeds.toml")
    assert len(study.runs) == 20 and {run.factor for run in study.runs} == {0.0, 1.0}


def test_every_place_that_is_named_is_there() -> None:
    places = set(re.findall(r"`((?:athena|tests|book|studies)/[\w./-]*)`", TEXT))
    assert len(places) > 10
    assert not [place for place in places if "other-seeds" not in place and not (ROOT / place).exists()]
