"""Claims about what a reader moves: sliders that need no kernel, and explorers that train and explain in one."""

import base64
import html
import io
import re
import time
from typing import Any

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from athena import data, figures, widgets
from athena.book.widgets.relevance import Pad
from athena.book.widgets.slider import png
from athena.widgets import FactorExplorer, RelevanceExplorer, choices, frames

SMALL: dict[str, Any] = {"fraction": 0.01, "epochs": 1}  # 40 images of mnist5k, one batch


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load("mnist5k").test_images[:5]


def control(panel: ipywidgets.Widget, description: str) -> Any:
    """The control of that name, wherever it is in the panel."""
    found = [each for each in parts(panel) if getattr(each, "description", None) == description]
    assert len(found) == 1
    return found[0]


def parts(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    return [widget, *(part for child in getattr(widget, "children", ()) for part in parts(child))]


def message(panel: ipywidgets.Widget) -> str:
    return next(part.value for part in parts(panel) if isinstance(part, ipywidgets.HTML))


def shown(panel: ipywidgets.Widget) -> bytes:
    return next(part.value for part in parts(panel) if isinstance(part, ipywidgets.Image))


def wait(panel: ipywidgets.Widget) -> None:
    """Until training has ended."""
    train = control(panel, "Train")
    for _ in range(600):
        if not train.disabled:
            return
        time.sleep(0.1)
    raise AssertionError(f"still training after a minute: {message(panel)}")


def built(explorer: widgets.Explorer, monkeypatch: pytest.MonkeyPatch) -> tuple[Figure, dict[str, bool]]:
    """The figure that a built page shows, and the stops of the slider below it."""
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    displayed: list[Any] = []
    monkeypatch.setattr("athena.book.widgets.explorer.display", displayed.append)
    figure = explorer.figure()
    assert figure is not None
    explorer._ipython_display_()
    (slider,) = displayed
    return figure, stops(slider)


# A slider over pictures drawn beforehand -----------------------------------------------------------------------------


def stops(slider: Any) -> dict[str, bool]:
    """The stops of a slider on a page, and whether each is the one that is shown; each has a picture of its own."""
    images = re.findall(
        r'<img src="data:image/png;base64,(\S+)" loading="lazy" data-stop="([^"]*)"([^>]*)>', slider.data
    )
    assert all(base64.b64decode(content).startswith(b"\x89PNG") for content, _, _ in images)
    return {html.unescape(stop): not rest.endswith(" hidden") for _, stop, rest in images}


def test_a_slider_begins_where_it_is_told_and_holds_every_picture() -> None:
    slider = frames({"1": Figure(), "2": Figure(), "10": Figure()}, "factor", "2")
    assert stops(slider) == {"1": False, "2": True, "10": False}
    assert '<label>factor <input type="range" min="0" max="2" value="1" aria-valuetext="2"' in slider.data


def test_stops_that_have_no_order_are_buttons() -> None:
    page = frames({"linear": Figure(), "whole": Figure()}, "layers", "whole").data
    assert "<legend>layers</legend>" in page and 'type="range"' not in page
    assert re.findall(r'value="(\d)"( checked)?', page) == [("0", ""), ("1", " checked")]
    quantities = ["0.1", "1e-6", "−4", "20 %", "0.25 epochs", "1,000"]
    assert 'type="range"' in frames(dict.fromkeys(quantities, Figure()), "x").data


def test_buttons_and_a_slider_choose_one_of_all_pictures() -> None:
    page = choices({name: {"1": Figure(), "2": Figure()} for name in ("a", "b")}, "letter", "number").data
    assert re.findall(r'value="(\d)".*?data-step="(\d)"', page) == [("0", "2"), ("1", "2"), ("0", "1")]
    alternatives = re.findall(r'data-stop="(\d)" alt="([^"]*):[^"]*"( hidden)?>', page)
    assert [(stop, alt, bool(hidden)) for stop, alt, hidden in alternatives] == [
        ("1", "letter a, number 1", False),
        ("2", "letter a, number 2", True),
        ("1", "letter b, number 1", True),
        ("2", "letter b, number 2", True),
    ]
    with pytest.raises(ValueError, match="same stops"):
        choices({"a": {"1": Figure()}, "b": {"2": Figure()}}, "letter", "number")


def test_sliders_over_charts_follow_the_page_into_the_dark_and_over_images_do_not() -> None:
    chart, image = Figure(), Figure()
    chart.subplots().plot([0, 1])
    image.subplots().imshow([[0, 1]])
    assert 'class="athena-frames chart"' in frames({"0": chart, "1": chart}, "x").data
    assert 'class="athena-frames"' in frames({"0": chart, "1": image}, "x").data


def test_a_picture_notes_the_gaps_between_its_panels_and_one_panel_has_none() -> None:
    def noted(columns: int, title: str = "") -> list[float]:
        with figures.style():
            figure, axes = figures.canvas(1, columns, (8.4, 3), squeeze=False)
        for axis in axes.flat:
            axis.set(xlabel="step", ylabel="loss", title="a panel")
        figure.suptitle(title)
        return [float(edge) for edge in Image.open(io.BytesIO(png(figure))).info.get("panels", "").split()]

    assert noted(1) == []
    assert noted(2) == [0.0, pytest.approx(0.5, abs=0.02), 1.0]
    assert noted(3) == [0.0, pytest.approx(1 / 3, abs=0.02), pytest.approx(2 / 3, abs=0.02), 1.0]
    assert noted(2, "A title as long as the two panels of this picture are wide, and so one that must not be cut") == []


def test_every_picture_of_a_slider_says_in_words_what_it_shows() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.set(title="a < b", xlabel="step", ylabel="loss")
    assert re.findall(r'alt="([^"]*)"', frames({"0.1": figure}, "rate").data) == [
        "rate 0.1: a &lt; b; loss against step"
    ]


@pytest.mark.parametrize("value, pictures", [(None, {}), ("d", {"a": Figure()})])
def test_a_slider_without_a_picture_to_begin_with_is_refused(value: str | None, pictures: dict[str, Figure]) -> None:
    with pytest.raises(ValueError, match="cannot begin at"):
        frames(pictures, "letter", value)


# Training side by side -----------------------------------------------------------------------------------------------


def test_both_arms_begin_alike_and_part_as_they_train() -> None:
    *_, pair = FactorExplorer(**SMALL, factor=10, seeds=2).train()
    for plain, guided in zip(pair.curves["plain"], pair.curves["guided"], strict=True):
        assert plain[0] == guided[0]
        assert plain[0][0] == 0
        assert plain[-1][0] == guided[-1][0] == 1
    plain, guided = (pair.networks[arm].state_dict()["linear1.weight"] for arm in ("plain", "guided"))
    assert not torch.equal(plain, guided)


def test_a_built_page_moves_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, shown = built(FactorExplorer(**SMALL, factor=20, factors=(0.5, 20)), monkeypatch)
    assert figure.axes
    assert shown == {"0.5": True, "20": False}  # another picture than the figure above it


def test_a_choice_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"no choice called colour, but factor, scope"):
        FactorExplorer(**SMALL).picture(colour=1)


def test_live_it_trains_with_what_the_controls_say() -> None:
    explorer = FactorExplorer(**SMALL)
    panel = explorer.live()
    control(panel, "LRP factor").value = 10.0
    control(panel, "pairs of runs").value = 2
    control(panel, "Train").click()
    assert control(panel, "Train").disabled
    wait(panel)
    assert message(panel).startswith("Done. Run 2, epoch 1.00 of 1: plain ")
    before = shown(panel)
    control(panel, "test image").value = 7
    assert shown(panel) != before


def test_live_there_is_no_picture_before_the_first_and_the_bar_fills_as_it_trains() -> None:
    panel = FactorExplorer(**SMALL, seeds=2).live()
    (image,) = (part for part in parts(panel) if isinstance(part, ipywidgets.Image))
    (bar,) = (part for part in parts(panel) if isinstance(part, ipywidgets.FloatProgress))
    assert (image.layout.display, bar.value) == ("none", 0)
    seen: list[float] = []
    bar.observe(lambda change: seen.append(change["new"]), "value")
    control(panel, "Train").click()
    wait(panel)
    assert image.layout.display is None
    assert seen == [0.5, 1.0]  # a batch of each of two pairs


@pytest.mark.parametrize("preset, factor, target", [("damping", -0.5, "label"), ("collapse", 1000.0, "logits")])
def test_live_a_preset_sets_the_controls_and_what_is_trained(preset: str, factor: float, target: str) -> None:
    explorer = FactorExplorer(**SMALL)
    panel = explorer.live()
    control(panel, "damping").click()
    control(panel, preset).click()
    assert (control(panel, "LRP factor").value, control(panel, "relevance of").value) == (factor, target)
    assert (explorer.values["factor"], explorer.values["target"]) == (factor, target)
    assert control(panel, "guided layers").value == ("all" if preset == "collapse" else "linear")


def test_live_every_control_says_what_it_is_for(trained: nn.Module, images: Tensor) -> None:
    for panel in (FactorExplorer(**SMALL).live(), RelevanceExplorer(trained, images).live()):
        controls = [part for part in parts(panel) if getattr(part, "description", None)]
        assert controls and all(part.tooltip for part in controls)


def test_the_axis_of_accuracy_is_the_same_in_every_picture_of_a_run() -> None:
    first, *_, last = (pair.figure().axes for pair in FactorExplorer(**SMALL).train())
    (before,), (after,) = ([axis for axis in axes if axis.get_xlabel() == "epochs"] for axes in (first, last))
    assert before.get_ylim() == after.get_ylim() == (0, 101)
    assert before.get_xlim() == after.get_xlim()


def test_the_mean_difference_has_an_interval_once_six_pairs_have_ended() -> None:
    *_, pair = FactorExplorer(**SMALL).train()
    gains = (0.01, 0.02, 0.03, 0.01, 0.02, 0.03)
    for n, ended in ((1, 1.0), (5, 1.0), (6, 0.5)):  # of the sixth pair half an epoch is open
        pair.curves = {
            "plain": [[(0.0, 0.1), (1.0, 0.9)]] * (n - 1) + [[(0.0, 0.1), (ended, 0.9)]],
            "guided": [[(0.0, 0.1), (1.0, 0.9 + gain)] for gain in gains[: n - 1]] + [[(0.0, 0.1), (ended, 0.93)]],
        }
        assert pair.said().endswith("6 pairs are the fewest that can show a difference.")
        assert pair.share(6) == pytest.approx((n - 1 + ended) / 6)
    pair.curves["plain"][-1][-1], pair.curves["guided"][-1][-1] = (1.0, 0.9), (1.0, 0.93)
    assert "Mean of 6 pairs with its 95 % interval: +2.00 [+1.06,\N{NO-BREAK SPACE}+2.94] points." in pair.said()


def test_live_it_stops_when_told_and_trains_again() -> None:
    explorer = FactorExplorer(fraction=1.0, epochs=10)
    panel = explorer.live()
    control(panel, "Train").click()
    while not shown(panel):
        time.sleep(0.05)
    control(panel, "Stop").click()
    wait(panel)
    assert message(panel).startswith("Stopped. Run 1, epoch ")
    assert explorer._pair is not None
    assert explorer._pair.curves["plain"][0][-1][0] < 10
    control(panel, "training data").value = 0.01
    control(panel, "epochs").value = 1
    control(panel, "Train").click()
    wait(panel)
    assert message(panel).startswith("Done.")


def test_live_an_error_is_shown_in_the_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    explorer = FactorExplorer(**SMALL)
    panel = explorer.live()
    monkeypatch.setattr(data, "load", lambda *_, **__: (_ for _ in ()).throw(data.MissingData("<not> here\nget it")))
    control(panel, "Train").click()
    wait(panel)
    assert 'role="alert"' in message(panel)
    assert "MissingData: &lt;not&gt; here<br>get it" in message(panel)


def test_a_run_that_diverges_is_named_and_still_drawn() -> None:
    *_, pair = FactorExplorer(fraction=0.05, epochs=3, factor=1e30).train()
    assert "Seed 0, guided: gradients not finite at step" in pair.said()
    assert pair.figure().axes


# Explaining ----------------------------------------------------------------------------------------------------------


def test_class_rule_and_image_change_the_picture(trained: nn.Module, images: Tensor) -> None:
    explorer = RelevanceExplorer(trained, images)
    panel = explorer.live()
    pictures = [shown(panel)]
    answer = int(trained(images[3:4]).argmax())
    for description, value in (("image", 3), ("class", (answer + 1) % 10), ("rule", "ZPlus()")):
        control(panel, description).value = value
        pictures.append(shown(panel))
    assert len(set(pictures)) == len(pictures)


def test_a_drawing_takes_the_place_of_the_image_until_another_is_chosen(trained: nn.Module, images: Tensor) -> None:
    explorer = RelevanceExplorer(trained, images)
    panel = explorer.live()
    (pad,) = (part for part in parts(panel) if isinstance(part, Pad))
    chosen = shown(panel)
    pad.strokes = [float(i % 28 < 3) for i in range(784)]
    assert shown(panel) != chosen
    drawn = explorer._drawn()
    assert drawn.shape == images[0].shape
    columns = drawn[0].sum(0).nonzero().flatten()
    assert columns.tolist() in ([14, 15, 16], [15, 16, 17])  # moved into the middle
    control(panel, "image").value = 1
    assert pad.strokes == explorer.strokes == []


def test_an_explanation_that_fails_is_shown_in_the_panel(images: Tensor) -> None:
    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(1 + x.flatten(1)[:, :10])

    panel = RelevanceExplorer(Outer(), images).live()
    assert "UnsupportedLayer" in message(panel)


def test_a_built_page_moves_the_class(trained: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown = built(RelevanceExplorer(trained, images), monkeypatch)
    assert list(shown) == list("0123456789")


def test_it_is_live_where_a_notebook_server_runs_it(
    trained: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "chapter.ipynb")
    displayed: list[ipywidgets.Widget] = []
    monkeypatch.setattr("athena.book.widgets.explorer.display", displayed.append)
    explorer = RelevanceExplorer(trained, images)
    assert explorer.figure() is None
    explorer._ipython_display_()
    (panel,) = displayed
    assert control(panel, "class").label == "the network's answer"
