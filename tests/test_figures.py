"""Claims about the figures and the sliders made of them: they draw what they are given, and nothing stays behind."""

import itertools
import re
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from athena import experiments, figures, statistics, widgets

FRACTIONS, FACTORS, SEEDS = (0.05, 0.2, 1.0), (0.0, 1.0, 10.0), (0, 1, 2)


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "fraction": fraction,
            "factor": factor,
            "precision": "float32",
            "seed": seed,
            "accuracy": 0.9 + 0.05 * fraction + 0.001 * factor + 0.002 * rng.standard_normal(),
            "seconds": (1 + bool(factor)) * fraction,
            "fingerprint": "0",
        }
        for fraction, factor, seed in itertools.product(FRACTIONS, FACTORS, SEEDS)
    ]
    return pd.DataFrame(rows)


def lines(figure: Figure, axis: int) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[axis].lines}


def test_the_curves_are_the_means_in_percent(frame: pd.DataFrame) -> None:
    drawn = lines(figures.accuracy(frame, 10.0), 0)
    for label, factor in (("plain, factor 0 (n = 3)", 0.0), ("guided, factor 10 (n = 3)", 10.0)):
        means = 100 * frame[frame["factor"] == factor].groupby("fraction")["accuracy"].mean()
        np.testing.assert_allclose(drawn[label], means)


def test_the_legend_tells_where_seeds_are_missing(frame: pd.DataFrame) -> None:
    missing = (frame["factor"] == 10) & (frame["fraction"] == 0.2) & (frame["seed"] > 0)
    drawn = lines(figures.accuracy(frame[~missing], 10.0), 0)
    assert list(drawn) == ["plain, factor 0 (n = 3)", "guided, factor 10 (n = 1 to 3)"]


def test_pairs_are_of_one_precision(frame: pd.DataFrame) -> None:
    one_share = frame[frame["fraction"] == 0.05]
    others = one_share[one_share["factor"] == 0].assign(precision="bfloat16", accuracy=0.1)
    arms = [("factor 1", {"factor": 1.0})]
    dots = [
        figures.paired(runs, arms).axes[0].lines[0].get_xdata() for runs in (one_share, pd.concat([one_share, others]))
    ]
    np.testing.assert_array_equal(*dots)


def test_the_second_plot_ends_at_30_percent(frame: pd.DataFrame) -> None:
    (line, *_) = figures.accuracy(frame, 1.0).axes[1].lines
    assert list(line.get_xdata()) == [5, 20]


def test_the_thesis_is_drawn_as_published(frame: pd.DataFrame) -> None:
    published = experiments.published("accuracy").query("dataset == 'mnist'")
    drawn = lines(figures.accuracy(frame, 1.0, published), 0)
    assert drawn["thesis, LRP"].tolist() == published.sort_values("percent")["accuracy_lrp"].tolist()


def test_differences_are_drawn_in_points_one_panel_a_factor(frame: pd.DataFrame) -> None:
    table = statistics.compare(frame)
    figure = figures.differences(table)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["factor 1", "factor 10"]
    drawn = panels[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, 100 * table[table["factor"] == 1]["difference"])


def test_time_is_drawn_as_a_ratio(frame: pd.DataFrame) -> None:
    table = statistics.ratio(frame[frame["factor"].isin([0.0, 1.0])])
    np.testing.assert_allclose(figures.ratios(table).axes[0].lines[0].get_ydata(), 2.0)


def images_in(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def test_a_text_has_each_tokens_relevance_as_its_background_and_in_words() -> None:
    relevance = torch.tensor([[0.5, 0.25], [-1.5, 0.0], [0.0, 0.0]], requires_grad=True)
    page = figures.text(["a < b", "no", "end"], relevance).data
    titles, alphas = re.findall(r'title="(.*?)"', page), re.findall(r"rgba\((\d+),\d+,(\d+),(.*?)\)", page)
    assert titles == ["+0.75", "−1.5", "+0"]
    for number in titles:
        assert f"> {number} </span>" in page  # heard, not seen
    (red, blue, some), (its_red, its_blue, full), (*_, none) = [tuple(map(float, found)) for found in alphas]
    assert red > blue and its_blue > its_red
    assert (some, full, none) == (pytest.approx(full / 2, abs=0.01), 0.6, 0)
    assert "a &lt; b" in page and "−1.5 (blue) to +1.5 (red)" in page
    with pytest.raises(ValueError, match=r"2 tokens and relevance of shape \(3, 2\)"):
        figures.text(["a", "b"], relevance)


@pytest.mark.parametrize("page, writing", [((255, 255, 255), (50, 50, 50)), ((18, 18, 18), (206, 214, 221))])
def test_a_text_can_be_read_on_a_light_and_a_dark_page(page: tuple[int, ...], writing: tuple[int, ...]) -> None:
    """A contrast of 4.5 at least, as WCAG asks for."""

    def luminance(colour: Iterable[float]) -> float:
        parts = [(c / 255 / 12.92 if c < 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
        return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))

    for found in re.findall(r"rgba\((.*?)\)", figures.text(["for", "against"], [1.0, -1.0]).data):
        *colour, alpha = map(float, found.split(","))
        behind = [alpha * over + (1 - alpha) * under for over, under in zip(colour, page, strict=True)]
        dark, light = sorted([luminance(behind), luminance(writing)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_heat_maps_sum_relevance_over_channels_and_share_one_scale() -> None:
    relevance = np.zeros((2, 3, 4, 4))
    relevance[0, :, 1, 2], relevance[1, 0, 0, 0] = 1.0, -6.0
    pictures = np.full((2, 3, 4, 4), 0.5)
    drawn = images_in(figures.heat_maps(pictures, {"rule": relevance}, limit=6.0))
    assert drawn[1][1, 2] == pytest.approx(3 / 6)
    assert drawn[3][0, 0] == pytest.approx(-6 / 6)
    apart = images_in(figures.heat_maps(pictures, {"rule": relevance}, each=True))
    assert abs(apart[3][0, 0]) > abs(drawn[1][1, 2])


def test_heat_maps_lie_in_rows_or_columns_with_their_titles_and_notes() -> None:
    relevance, pictures = np.ones((3, 1, 4, 4)), np.zeros((3, 1, 4, 4))
    rows = figures.heat_maps(pictures, {"a": relevance, "b": relevance}, list("xyz"), {"b": ["1", "2", "3"]})
    assert [axis.get_title() for axis in rows.axes[:3]] == ["image", "a", "b"]
    assert [axis.get_ylabel() for axis in rows.axes[:9:3]] == ["x", "y", "z"]
    assert [axis.get_xlabel() for axis in rows.axes[2:9:3]] == ["1", "2", "3"]
    columns = figures.heat_maps(
        pictures, {"a": relevance}, list("xyz"), outlines=np.eye(4)[None].repeat(3, 0), across=True
    )
    assert [axis.get_title() for axis in columns.axes[:3]] == ["x", "y", "z"]
    assert [axis.get_ylabel() for axis in columns.axes[:6:3]] == ["image", "a"]


def test_the_scale_of_relevance_is_above_all_but_a_few_pixels_and_never_zero() -> None:
    relevance = np.arange(1000.0).reshape(1, 1, 25, 40)
    assert 990 < figures.relevance_limit(relevance, -relevance) < 999
    lonely = np.zeros((1, 1, 40, 40))
    lonely[0, 0, 0, 0] = -5.0
    assert figures.relevance_limit(lonely) == 5.0
    assert figures.relevance_limit(np.zeros((1, 1, 4, 4))) == 1.0


def test_conservation_is_drawn_in_percent_of_the_start_and_adds_up() -> None:
    table = pd.DataFrame(
        {
            "layer": ["top", "bottom", "input"],
            "relevance": [8.0, 7.0, 4.0],
            "bias": [-1.0, 2.0, 0.0],
            "stabiliser": [2.0, 1.0, 0.0],
        }
    )
    (axis,) = figures.conservation({"rule": table}).axes
    relevance, bias, stabiliser = axis.containers
    np.testing.assert_allclose([bar.get_height() for bar in relevance], [100, 87.5, 50])
    for i in range(2):
        for part in (bias, stabiliser):
            assert len(part) == 2
        left = relevance[i].get_height() + bias[i].get_height() + stabiliser[i].get_height()
        assert left == pytest.approx(relevance[i + 1].get_height())
        assert bias[i].get_y() == pytest.approx(relevance[i].get_height())


def test_flipping_curves_are_drawn_in_percent_with_controls_in_grey() -> None:
    curves = pd.DataFrame({"a": [1.0, 0.5], "control: edges": [1.0, 0.8], "random": [1.0, 0.9]}, index=[0.0, 1.0])
    figure = figures.flipping(curves)
    drawn = lines(figure, 0)
    assert {name: values.tolist() for name, values in drawn.items()} == {
        "a": [100, 50],
        "control: edges": [100, 80],
        "random": [100, 90],
    }
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert colours["control: edges"] == colours["random"] != colours["a"]


def test_arrays_are_written_as_their_numbers_without_minus_zero() -> None:
    figure = figures.arrays({"in": np.array([[1.0, -2.5]]), "out": np.array([[-0.0], [-1e-9]])}, relevance=["out"])
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [["1", "−2.5"], ["0", "0"]]


def test_a_network_is_drawn_with_its_numbers_and_arrows_that_turn_round() -> None:
    ends = []
    for backwards in (False, True):
        _, axis = figures.canvas(1, 1, (4, 2))
        figures.network(axis, [["1", "2"], ["3"]], {(0, 0, 0): "5", (0, 1, 0): "6"}, backwards=backwards)
        assert [text.get_text() for text in axis.texts if text.get_text()] == ["5", "6", "1", "2", "3"]
        ends.append([arrow.xy[0] for arrow in axis.texts if isinstance(arrow, Annotation)])
    assert ends == [[1.6, 1.6], [0.0, 0.0]]


def test_a_procedure_is_drawn_as_its_boxes_and_what_stands_at_its_arrows() -> None:
    figure = figures.flow({"one": (0, 0), "two": (1, 0)}, [("one", "two", "then")], (4, 2))
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["one", "two", "then"]
    assert len(figure.axes[0].patches) == 2


def test_no_figure_stays_behind_in_pyplot_or_changes_its_look(frame: pd.DataFrame) -> None:
    before = dict(plt.rcParams)
    figures.accuracy(frame, 1.0)
    figures.paired(frame[frame["fraction"] == 0.05], [("factor 1", {"factor": 1.0})])
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_a_slider_that_cannot_begin_says_so(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"\['1'\].*'2'"):
        widgets.frames({"1": figures.accuracy(frame, 1.0)}, label="LRP factor", value="2")
    with pytest.raises(ValueError, match="cannot begin"):
        widgets.frames({}, label="LRP factor")
