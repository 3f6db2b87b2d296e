"""Claims about what the first six chapters call: tables and sentences that follow from the numbers they are given."""

import pandas as pd
import pytest
import torch
from torch import nn

import athena
from athena import rules
from athena.book import (
    cost,
    descent,
    explaining,
    gradients,
    heatmaps,
    libraries,
    map_scores,
    mnist,
    neurons,
    one_batch,
    own_model,
)
from athena.book import worked_example as example


def test_a_finding_must_hold_with_the_chapters_own_parameters_alone() -> None:
    assert gradients.holds(1 > 0, own=True) is True
    assert gradients.holds(0 > 1, own=False) is False
    with pytest.raises(AssertionError, match="no longer shows what the text says"):
        gradients.holds(0 > 1, own=True)


def test_guidance_in_the_small_network_is_the_chain_rule_with_scales() -> None:
    network = one_batch.network()
    x, y = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 1.0]]).double(), torch.tensor([0, 1])
    plain, guided = (gradients.gradients(network, x, y, factor, rules.Epsilon(1e-6)) for factor in (0.0, 1.0))
    assert torch.equal(plain["linear3.weight"], guided["linear3.weight"])
    assert not torch.allclose(plain["linear1.weight"], guided["linear1.weight"])


def test_the_least_factor_that_turns_a_gradient_round_is_that_of_the_most_negative_relevance() -> None:
    assert one_batch.turned_round(torch.tensor([[1.0, -0.5], [-2.0, 0.0]])) == (0.5, 2, 1)
    assert one_batch.turned_round(torch.tensor([[1.0, 0.0]])) is None
    assert "neuron 1 of hidden layer 2" in one_batch.scales_told({2: torch.tensor([[-1.0, 1.0]])})
    assert "turns the gradient round" not in one_batch.scales_told({2: torch.tensor([[0.5, 1.0]])})


def test_relevance_is_counted_down_to_the_output_of_the_lowest_guided_layer() -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    counted = cost.count({"small": cost.Case(network, torch.rand(1, 8), "all", "0", "7.1")}).loc["small"]
    assert dict(counted) == {"forward": 40, "backward": 48, "relevance": 8, "floor": 1 + 8 / 88}


def test_one_neuron_is_named_by_its_answers() -> None:
    assert [neurons.logic(1.0, 1.0, b) for b in (0.3, -0.4, -1.2, -2.2)] == ["always", "OR", "AND", "never"]
    assert list(neurons.xor_table(neurons.xor_network())["XOR"]) == [0, 1, 1, 0]


def test_gradient_descent_on_a_line_leaves_above_its_limit_and_comes_down_below() -> None:
    line = descent.line(seed=1)
    for rate, closer in ((0.9 * line.limit, True), (1.1 * line.limit, False)):
        path = line.descend(rate, len(line.y))
        assert bool(line.loss(path[-1]) < line.loss(path[0])) is closer


def test_formulae_without_weights_agree_with_lrp_where_all_weights_are_alike_alone() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]]).double()
    alike, differing = example.network([[0.5] * 3, [1.0] * 3], [1, 1]), example.network([[1, -1, 0.5]] * 2, [2, 1])
    assert example.by_thesis(alike, z) == pytest.approx(example.by_lrp(alike, z))
    assert example.by_thesis(differing, z) != pytest.approx(example.by_lrp(differing, z))


def test_rules_are_written_as_the_text_has_them() -> None:
    assert heatmaps.name(rules.Epsilon(0.1)) == "LRP-ε, ε = 0.1"
    assert heatmaps.name(rules.AlphaBeta(2.0, 1.0)) == "LRP-α2β1"
    assert heatmaps.name(rules.ZPlus()) == "z⁺"
    assert heatmaps.named(rules.Epsilon(1e-6)) == "LRP-ε with ε = 10⁻⁶"


def test_no_table_of_a_benchmark_has_the_name_of_a_rule_in_code() -> None:
    arms = [arm for _, tables in heatmaps.benchmarks() for table in tables for arm in table.index]
    assert {"ATHENA, LRP-ε, ε = 10⁻⁶", "zennit, z⁺", "plain gradient"} <= set(arms)
    assert not [arm for arm in arms if "(" in arm]


def test_two_rules_are_compared_on_the_same_images() -> None:
    images = pd.Series([0.1, 0.5, 0.9])  # far apart: the intervals of both means overlap
    on_the_digit = {"one": images + 0.02, "two": images + pd.Series([0.001, 0.0, 0.0]), "control: noise": 0 * images}
    found = {
        title: pd.DataFrame({"mass": mass, "rank": [0.5, 0.6, 0.7], "chance": 0.1})
        for title, mass in on_the_digit.items()
    }
    scores = map_scores.Scores(["one", "two"], ["control: noise"], found, {}, {}, 3)
    values = {title: {"on the digit (%)": 100 * table["mass"]} for title, table in found.items()}
    assert "the best mean is that of one, which is better than 1 of the other 1 rules" in map_scores.best_told(
        values, scores, "on the digit (%)"
    )
    assert "none of the 2 rules are better than it" in map_scores.best_told(values, scores, "on the digit (%)")


def test_no_interval_of_accuracies_reaches_below_zero_or_above_all() -> None:
    rows = [
        {
            "factor": 10.0,
            "fraction": 1.0,
            "every": n,
            "baseline_mean": 0.97,
            "difference": -0.6,
            "low": -1.1,
            "high": 0.2,
        }
        for n in cost.EVERY
    ]
    assert cost.every_shown(pd.DataFrame(rows)).loc["10", "every step"].replace("\N{NO-BREAK SPACE}", " ") == (
        "−60.00 [−97.00, +3.00]"
    )


def test_the_thesis_s_marks_are_shown_whole() -> None:
    marks = pd.DataFrame(
        [dict.fromkeys(("a_long_name_of_a_mark", "another_long_name_of_a_mark", "a_third_mark"), 1)], ["x"]
    )
    assert "a long name of a mark, another long name of a mark, a third mark" in explaining.published_shown(marks).data


def test_every_word_covers_methods_or_glass_boxes() -> None:
    assert explaining.WORDS["agnostic"] == {"lime", "shapley", "kernel_shap"}
    assert explaining.WORDS["agnostic"] | explaining.WORDS["specific"] == set(athena.attribution.METHODS)


def test_a_library_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    sums = libraries.residual_sum()
    assert [sentence.split()[0] for sentence in sums.missing] == ["Captum", "zennit"]
    assert not sums.told and list(sums.shown().index) == ["athena"]


def test_a_network_that_is_refused_has_no_numbers() -> None:
    rows = [
        {"network": "one", "parameters": 1000, "reaches": 0.5, "account": 1e-7, "size": 2.0},
        {"network": "two", "parameters": 5, "refused": "no rule"},
    ]
    assert own_model.networks_shown(rows).loc["two"].tolist() == ["5", "refused", "", ""]
    assert own_model.refused_told(rows) == ["two is refused: no rule."]


def test_a_start_of_relevance_is_said_to_collapse_where_it_loses_more_than_5_points() -> None:
    table = pd.DataFrame(
        {"target": ["a", "a", "b"], "factor": [10.0, 1.0, 10.0], "fraction": 0.5, "difference": [-0.2, -0.01, -0.04]}
    )
    lines = mnist.collapses_told(table, {"a": "all logits", "b": "probabilities"}).splitlines()
    assert "factor 10 at 50 % of the data; at worst −20.0 points" in lines[0]
    assert lines[1] == "- **probabilities**: no cell loses more than 5 points."
