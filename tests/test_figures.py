"""Claims about the figures and the sliders made of them: they draw what they are given, and nothing stays behind."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from athena import experiments, figures, statistics, widgets

FRACTIONS, FACTORS, SEEDS = (0.05, 0.2, 1.0), (0.0, 1.0, 10.0), (0, 1, 2)


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "fraction": fraction,
            "factor": factor,
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


def test_no_figure_stays_behind_in_pyplot_or_changes_its_look(frame: pd.DataFrame) -> None:
    before = dict(plt.rcParams)
    figures.accuracy(frame, 1.0)
    figures.paired(frame[frame["fraction"] == 0.05], [("factor 1", {"factor": 1.0})])
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_a_slider_has_one_picture_for_each_stop_and_a_link_the_browser_can_follow(frame: pd.DataFrame) -> None:
    slider, stack = widgets.frames(
        {f"{factor:g}": figures.accuracy(frame, factor) for factor in FACTORS}, label="LRP factor", value="1"
    ).children
    assert list(slider.options) == ["0", "1", "10"]
    assert (slider.index, stack.selected_index) == (1, 1)
    assert len({bytes(image.value) for image in stack.children}) == 3
    assert all(bytes(image.value).startswith(b"\x89PNG") for image in stack.children)


def test_a_slider_that_cannot_begin_says_so(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"\['1'\].*'2'"):
        widgets.frames({"1": figures.accuracy(frame, 1.0)}, label="LRP factor", value="2")
    with pytest.raises(ValueError, match="cannot begin"):
        widgets.frames({}, label="LRP factor")
