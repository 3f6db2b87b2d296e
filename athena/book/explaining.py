"""What the chapter on methods of explanation draws, tabulates and says.

Not here: the methods (`athena.attribution`) and what was measured of them (`athena.experiments.methods`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.segmentation import mark_boundaries
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression
from sklearn.tree import DecisionTreeClassifier, plot_tree
from torch import Tensor, nn

from athena.attribution import METHODS, attribute
from athena.attribution.superpixels import label_maps
from athena.book import figures
from athena.book.figures import GUIDED, PLAIN, THESIS
from athena.book.tables import shown, signed, wrapped
from athena.experiments.methods import BY_CONSTRUCTION, HIGH_EFFORT, contradictions

__all__ = [
    "WORDS",
    "coalitions",
    "conditions_told",
    "contradictions_told",
    "covered",
    "every_map",
    "glass_boxes",
    "lime_steps",
    "measured_shown",
    "one_map",
    "published_shown",
    "quarters_shown",
    "saturating_network",
    "saturation",
]

GLASS = ("decision tree", "linear model")
PLACES = {
    "lime": "agnostic surrogate perturbation",
    "shapley": "agnostic perturbation",
    "kernel_shap": "agnostic surrogate perturbation",
    "deep_shap": "specific propagation perturbation",
    "saliency": "specific propagation",
    "deconvolution": "specific propagation",
    "guided_backpropagation": "specific propagation",
    "smooth_grad": "specific propagation perturbation",
    "gradient_times_input": "specific propagation",
    "integrated_gradients": "specific propagation perturbation",
    "cam": "specific propagation",
    "grad_cam": "specific propagation",
    "deep_lift": "specific propagation",
    "lrp": "specific propagation",
}
"""For each method of thesis chapter 3, the words of section 2.2 that cover it."""
WORDS = {
    "ante hoc": set(GLASS),
    "post hoc": set(METHODS),
    "local": set(METHODS),
    "global": set(GLASS),
    **{
        word: {name for name in METHODS if word in PLACES[name].split()}
        for word in ("agnostic", "specific", "surrogate", "perturbation", "propagation")
    },
}
"""For each word, the models and methods that it covers."""


def covered(word: str) -> Figure:
    """Two models that explain themselves and all methods; filled: those that the word covers."""
    with figures.style():
        figure, axis = figures.canvas(1, 1, (8.4, 2.6))
        for i, name in enumerate([*GLASS, *METHODS]):
            row, column = divmod(i, 4)
            lit = name in WORDS[word]
            axis.text(
                column,
                -row,
                name.replace("_", " "),
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if lit else PLAIN,
                weight="bold" if lit else "normal",
                bbox={"boxstyle": "round,pad=0.4", "facecolor": GUIDED if lit else "white", "edgecolor": "#bbbbbb"},
            )
        axis.set(xlim=(-0.55, 3.55), ylim=(-3.6, 0.6))
        _bare(axis, f"{word}: {len(WORDS[word])} of {len(GLASS) + len(METHODS)}")
    return figure


def _bare(axis: Axes, title: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    axis.grid(visible=False)
    sns.despine(ax=axis, left=True, bottom=True)


def _picture(axis: Axes, image: Tensor, title: str) -> None:
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1))
    _bare(axis, title)


def _heat(axis: Axes, heat_map: Tensor, title: str) -> None:
    limit = figures.relevance_limit(heat_map[None])
    axis.imshow(heat_map.sum(0), cmap=figures.RELEVANCE, vmin=-limit, vmax=limit)
    _bare(axis, title)


def glass_boxes(seed: int) -> tuple[Figure, str]:
    """A decision tree and a linear model of the iris data, and what the two say of flower 101."""
    iris = load_iris()
    names = [name.removesuffix(" (cm)") for name in iris.feature_names]
    tree = DecisionTreeClassifier(max_depth=2, random_state=seed).fit(iris.data, iris.target)
    linear = LinearRegression().fit(iris.data[:, :3], iris.data[:, 3])
    flower = iris.data[100]
    parts = linear.coef_ * (flower[:3] - iris.data[:, :3].mean(0))
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (8.4, 3.1), width_ratios=[1.5, 1])
        figure.set_canvas(FigureCanvasAgg(figure))  # scikit-learn measures its boxes
        plot_tree(tree, feature_names=names, class_names=list(iris.target_names), impurity=False, ax=left, fontsize=7)
        right.barh(names[:3], parts, color=[THESIS if part > 0 else GUIDED for part in parts])
        right.axvline(0, color="black", linewidth=0.8)
        right.set_xlabel("what it adds to the petal's width (cm)")
    mean = iris.data[:, 3].mean()
    whole = mean + parts.sum()
    assert abs(whole - linear.predict(flower[None, :3])[0]) < 1e-9
    questions = len(tree.decision_path(flower[None]).indices) - 1
    return figure, (
        f"Flower 101 passes {questions} questions on its way to "
        f"*{iris.target_names[tree.predict(flower[None])[0]]}*. The linear model starts from the mean, {mean:.2f} cm, "
        f"and adds {' and '.join(signed(part) for part in parts)}: {whole:.2f} cm, measured are {flower[3]:.1f} cm."
    )


def saturating_network() -> nn.Sequential:
    """y = 1 − max(0, 1 − x₁ − x₂), in double precision."""
    network = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.fill_(-1.0 if name.endswith("weight") else 1.0)
    return network


def saturation(network: nn.Module, value: float) -> tuple[Figure, dict[str, float]]:
    """Where `saturating_network` is at x₁ = x₂ = value, and what five methods say of x₁."""
    asked = {
        "saliency": "gradient",
        "gradient_times_input": "gradient × input",
        "integrated_gradients": "integrated gradients",
        "deep_lift": "DeepLIFT",
        "shapley": "Shapley values",
    }
    point = torch.full((1, 2), value, dtype=torch.float64)
    found = {title: attribute(name, network, point, 0)[0, 0].item() for name, title in asked.items()}
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (8.4, 2.7), width_ratios=[1, 1.4])
        line = torch.linspace(0, 1, 101, dtype=torch.float64)
        left.plot(line, network(line[:, None].expand(-1, 2)).detach()[:, 0], color=PLAIN)
        left.plot(value, network(point).item(), "o", color=THESIS)
        left.set(xlabel="x₁ = x₂", ylabel="y")
        right.barh(list(found), list(found.values()), color=GUIDED)
        right.set(xlim=(0, 1.1), xlabel="attribution of x₁ (of x₂ it is the same)")
        right.invert_yaxis()
    return figure, found


def lime_steps(network: nn.Module, image: Tensor, asked: int, samples: int, seed: int) -> Figure:
    """An image (1, 3, h, w), its superpixels, four copies with their logit and weight, and LIME's map of a class."""
    labels = label_maps(image, 12)[0, 0]
    count = int(labels.max()) + 1
    present = torch.rand(4, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    copies = image * present[:, labels][:, None]
    with torch.no_grad():
        said = network(copies)[:, asked]
    distance = (copies - image).flatten(1).norm(dim=1) / image.norm()
    weight = torch.exp(-(distance**2) / (2 * 0.5**2))
    lime = attribute("lime", network, image, asked, segments=labels, samples=samples, seed=seed)
    with figures.style():
        figure, axes = figures.canvas(1, 7, (8.4, 1.75))
        _picture(axes[0], image[0], "image")
        axes[1].imshow(mark_boundaries(image[0].permute(1, 2, 0).numpy(), labels.numpy(), color=(1, 1, 0)))
        _bare(axes[1], f"{count} superpixels")
        for axis, copy, value, w in zip(axes[2:6], copies, said, weight, strict=True):
            _picture(axis, copy, f"logit {signed(value, 1)}\nweight {w:.2f}")
        _heat(axes[6], lime[0], f"LIME\nfor class {asked}")
    return figure


def coalitions(pictures: Iterable[Tensor], earned: Iterable[float]) -> Figure:
    """Sixteen pictures (3, h, w), each of one coalition, with what it earns."""
    with figures.style():
        figure, axes = figures.canvas(2, 8, (8.4, 2.7))
        for axis, picture, value in zip(axes.flat, pictures, earned, strict=True):
            _picture(axis, picture, signed(value))
    return figure


def quarters_shown(v: Mapping[frozenset[int], float], phi: Sequence[float]) -> pd.DataFrame:
    """What each quarter adds when it joins first and last, and its Shapley value, for reading.

    Args:
        v: what each coalition of the quarters 0 to 3 earns.
        phi: the Shapley value of each.
    """
    everyone = frozenset(range(4))
    columns = {
        "quarter": ["upper left", "upper right", "lower left", "lower right"],
        "joins first": [signed(v[frozenset({i})] - v[frozenset()]) for i in range(4)],
        "joins last": [signed(v[everyone] - v[everyone - {i}]) for i in range(4)],
        "Shapley value": [signed(value) for value in phi],
    }
    return shown(pd.DataFrame(columns), "quarter")


def every_map(image: Tensor, says: int, maps: Mapping[str, Tensor]) -> Figure:
    """An image (3, h, w) and its map by each of the fourteen methods, each on a scale of its own."""
    with figures.style():
        figure, axes = figures.canvas(3, 5, (8.4, 5.4))
        _picture(axes[0, 0], image, f"says {says}")
        for axis, (name, found) in zip(axes.flat[1:], maps.items(), strict=True):
            _heat(axis, found, name.replace("_", " "))
    return figure


def one_map(image: Tensor, title: str, heat_map: Tensor, asked: int) -> Figure:
    """An image (3, h, w) under its title, and its heat map for the class asked."""
    with figures.style():
        figure, (left, right) = figures.canvas(1, 2, (4.6, 2.4))
        _picture(left, image, title)
        _heat(right, heat_map, f"for class {asked}")
    return figure


def conditions_told(conditions: Mapping[str, Any]) -> str:
    """Under which conditions table 4.1 was measured, and how its columns are read."""
    return (
        f"{conditions['images']} test images, for each of which the table has the mean; PyTorch "
        f"{conditions['versions']['torch']}, {conditions['device']}, processor time of one thread; LIME and KernelSHAP "
        f"with {conditions['samples']} samples. *Baselines agree*: rank correlation of maps against black and against "
        "white. *Mass*, *rank* and *pointing*: percent found on the digit, chance is "
        f"{100 * conditions['chance']:.0f}, more is better. *Flipping*: mean probability in percent while pixels go, "
        f"at random {100 * conditions['flipping at random']:.0f}, less is better. *Randomised*: rank correlation of "
        f"sizes with the map of the same network with all weights drawn anew ({conditions['randomised']} images), "
        "nearer to 0 is better. With so few images small differences between methods say nothing. LRP walks down the "
        "graph itself, which costs about a backward pass and is not counted as one."
    )


def measured_shown(rows: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table 4.1 as measured, for reading: what each method costs and needs, and how good its maps are.

    Args:
        rows: of `athena.experiments.methods.load`.
    """
    measured = pd.DataFrame([_entry(row) for row in rows]).fillna("")
    quality = ["method", "mass", "rank", "pointing", "flipping", "randomised"]
    return shown(measured.loc[:, :"adds up to"], "method"), shown(measured[quality], "method")


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    method = row["method"].replace("_", " ")
    if "reason" in row:
        return {"method": method, "CPU s": row["reason"]}
    return {
        "method": method,
        "CPU s": f"{row['seconds']:.3f}",
        "forward": row["forwards"],
        "backward": row["backwards"],
        "outputs suffice": "yes" if row["agnostic"] else "no",
        "baselines agree": "none to choose" if row["baseline"] is None else f"{row['baseline']:.2f}".replace("-", "−"),
        "adds up to": row["adds up to"],
        **{name: f"{100 * row[name]:.0f}" for name in ("mass", "rank", "pointing", "flipping")},
        "randomised": f"{row['randomised']:.2f}".replace("-", "−"),
    }


def published_shown(marks: pd.DataFrame) -> Any:
    """The thesis's marks in table 4.1, for reading; marks: of `athena.experiments.methods.published`."""
    named = [
        {
            "method": str(method).replace("_", " "),
            "marks": ", ".join(str(name).replace("_", " ") for name, mark in row.items() if mark),
        }
        for method, row in marks.iterrows()
    ]
    return wrapped(pd.DataFrame(named), "method")


def contradictions_told(rows: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Where measurement contradicts a mark of the thesis, and which marks were not measured: three paragraphs."""
    return (
        "Where measurement contradicts a mark, or a missing one (passes from which on the effort counts as high: "
        f"{HIGH_EFFORT}):",
        "\n".join(f"- {sentence}" for sentence in contradictions(rows)),
        "Not measured:\n\n"
        + "\n".join(f"- *{name.replace('_', ' ')}* {why}." for name, why in BY_CONSTRUCTION.items()),
    )
