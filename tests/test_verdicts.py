"""Claims about the sentences and tables of chapters 9 and 10: they follow what was measured."""

import math

import pandas as pd
import pytest
import torch

from athena import statistics
from athena.book import verdicts
from athena.book.scores import scores

NONE = {"claim": "C1", "verdict": "no effect shown", "published": 1.0, "high": 2.0, "p_published": 0.5}


def test_a_claim_without_any_effect_is_no_gain() -> None:
    said = verdicts.claims_said(pd.DataFrame([NONE]), 17)
    assert "Of its 17 claims none is a gain by the rule of this book in any reading. Guidance" in said


def test_gains_losses_and_what_is_ruled_out_are_named() -> None:
    rows = [
        NONE | {"claim": "C2", "verdict": "gain"},
        NONE | {"claim": "C3", "verdict": "loss"},
        NONE | {"claim": "C4", "p_published": 0.01, "high": 0.5},
        NONE | {"claim": "C5", "verdict": "cannot be tested"},
        NONE | {"claim": "C6", "verdict": "cannot be tested"},
        NONE | {"claim": "C6"},
    ]
    said = verdicts.claims_said(pd.DataFrame(rows), 17)
    assert "a gain in some reading: C2; one reading of C3 is a loss. " in said
    assert "The published gain of C4 is ruled out. For C5 the stored pairs are too few" in said


@pytest.mark.parametrize(("low", "words"), [(0.001, "is better than"), (-0.001, "is not shown to differ from")])
def test_a_contrast_is_told_by_its_verdict(low: float, words: str) -> None:
    row = {"contrast": "B", "protocol": "OneCycle", "difference": 0.004, "low": low, "high": 0.009}
    said = verdicts.contrasts_said(pd.DataFrame([row | {"p_holm": 0.01, "p_least": 0.01}]), 30)
    assert said.startswith("**The decisive experiment, 30 seeds:**\n\n- OneCycle: damping by relevance ")
    assert f"{words} damping by gradient times activation, which needs no LRP, +0.40 [" in said


def test_chance_is_counted_where_the_thesis_has_a_number() -> None:
    frame = pd.DataFrame(
        {"factor": factor, "fraction": share, "seed": seed, "accuracy": 0.5 + factor * (seed - 1.5) / 100}
        for factor in (0.0, 0.1)
        for share in (0.1, 1.0)
        for seed in range(4)
    ).assign(fingerprint="0", device="cpu", code="0")
    (row,) = verdicts.chance_table({"one": (frame, {"largest": -100.0})}, 200).to_dict("records")
    assert row["published largest (studies with as much)"] == "-100 (100%)"
    assert row["published mean (studies with as much)"] == row["published shares up (studies with as much)"] == ""
    drawn = statistics.chance(frame, draws=200, any_code=True)
    assert row["largest gain: half of the studies above"] == f"{100 * drawn['largest'].median():+.2f}"


def test_a_network_that_is_right_as_often_as_it_is_sure_is_calibrated() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]]).repeat(4, 1)  # three quarters sure of the first class
    told = scores(logits, torch.tensor([0, 0, 0, 1]))
    assert told["accuracy (%)"] == 0.75 and told["calibration error (%)"] == pytest.approx(0, abs=1e-6)
    assert told["margin of the logits"] == pytest.approx(math.log(3.0))
    assert told["loss"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    always_right = scores(logits, torch.zeros(4, dtype=torch.long))
    assert always_right["calibration error (%)"] == pytest.approx(0.25)
