"""How good the heat maps of a small network for colour images are, by the measures of `athena.evaluation`.

Not here: the measures themselves, and the heat maps of the digits in black and white (`athena.book.heatmaps`).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena.book.tables import percent, shown, signed
from athena.evaluation import Flipping, localisation, pixel_flipping, randomisation
from athena.experiments import models, statistics
from athena.experiments.data import Data
from athena.relevance import lrp

__all__ = [
    "Scores",
    "best_told",
    "intervals",
    "measured",
    "narrowed",
    "network_told",
    "scores_shown",
    "scores_told",
    "trained",
]

PART = 20
"""Images whose maps are looked at with random weights, which takes a map for each layer of each rule."""
Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


def narrowed(width: float, channels: int = 3) -> nn.Sequential:
    """The layers of `athena.models.cnn` with a share of their filters and neurons, weights drawn after He et al.

    Args:
        width: the share; 1 is the network of thesis table 6.1 itself.
        channels: of the images.
    """
    layers, inputs = OrderedDict[str, nn.Module](), channels
    for path, module in models.cnn(channels).named_children():
        if isinstance(module, nn.Conv2d):
            outputs = round(width * module.out_channels)
            module, inputs = nn.Conv2d(inputs, outputs, 3, padding=1), outputs
        elif isinstance(module, nn.Flatten):
            inputs *= 4 * 4
        elif isinstance(module, nn.Linear):
            outputs = module.out_features if path == "linear3" else round(width * module.out_features)
            module, inputs = nn.Linear(inputs, outputs), outputs
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        layers[path] = module
    return nn.Sequential(layers)


def trained(network: nn.Module, images: Data, epochs: int, batch: int = 64) -> nn.Module:
    """The network after training with Adam and one rise and fall of the learning rate; batches are all of one size."""
    optimiser = torch.optim.Adam(network.parameters())
    steps = epochs * (len(images.train_labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images.train_labels)).split(batch)[: steps // epochs]:
            optimiser.zero_grad()
            F.cross_entropy(network(images.train_images[rows]), images.train_labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def network_told(right: Tensor, images: Data, width: float, epochs: int, seconds: float) -> str:
    """What kind of network it is and how many test images it recognises (`right`: (n,) bool)."""
    learned = right.float().mean()
    assert learned > 0.3, (
        "this network learned too little to be worth explaining: raise "
        f"colour_epochs ({epochs}) or colour_width ({width})"
    )
    return (
        f"It has {'all' if width == 1 else percent(width, 0)} of that network's filters and neurons, so that this page "
        f"need not wait for it ({epochs} epochs of {len(images.train_labels):,} images, {seconds:.0f} seconds here), "
        f"and recognises {percent(float(learned))} of {len(right):,} test digits."
    )


@dataclass(frozen=True)
class Scores:
    """What was measured of the maps by each rule, and of maps that know nothing of the network.

    Attributes:
        methods, controls: their names.
        found: for each, the table of `athena.quality.localisation`.
        flipped: for each way to fill in a pixel, what `athena.quality.pixel_flipping` gives.
        likeness: for each rule and the edges, rank correlation with the map once all weights are drawn anew, of the
            relevance (spearman) and of its size (absolute).
        images: how many.
    """

    methods: list[str]
    controls: list[str]
    found: Mapping[str, pd.DataFrame]
    flipped: Mapping[str, Flipping]
    likeness: Mapping[str, pd.Series]
    images: int


def measured(
    network: nn.Module, images: Tensor, masks: Tensor, answers: Tensor, rules: Mapping[str, Any], seed: int
) -> Scores:
    """The three measures for every rule and every control.

    Args:
        images: (n, 3, h, w); masks: (n, h, w), true where the object is; answers: (n,), the class to explain.
        rules: for each title a rule or a preset.
        seed: of noise and of random weights.
    """

    def noise(shape: Any) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    def by(rule: Any) -> Explain:
        return lambda net, x, target: lrp(net, x, target=target, rule=rule).input

    methods = {title: by(rule) for title, rule in rules.items()}
    controls: dict[str, Explain] = {
        "control: noise": lambda net, x, target: noise(x[:, :1].shape),
        "control: edges": lambda net, x, target: _edges(x),
        "control: brightness": lambda net, x, target: x,
    }
    baselines = {"mean colour": images.mean((2, 3), keepdim=True), "noise": noise(images.shape)}
    explained = {title: explain(network, images, answers) for title, explain in (methods | controls).items()}
    flipped = {
        name: pixel_flipping(network, images, answers, explained, steps=10, baseline=fill)
        for name, fill in baselines.items()
    }
    redrawn = {
        title: randomisation(network, explain, images[:PART], answers[:PART], seed=seed)
        for title, explain in (methods | {"control: edges": controls["control: edges"]}).items()
    }
    return Scores(
        list(methods),
        list(controls),
        {title: localisation(maps, masks) for title, maps in explained.items()},
        flipped,
        {title: own[own["layer"] == "conv1"][["spearman", "absolute"]].mean() for title, own in redrawn.items()},
        len(images),
    )


def _edges(images: Tensor) -> Tensor:
    grey = images.mean(1, keepdim=True)
    found = torch.zeros_like(grey)
    found[:, :, :-1] += grey.diff(dim=2).abs()
    found[:, :, :, :-1] += grey.diff(dim=3).abs()
    return found


def intervals(scores: Scores) -> dict[str, dict[str, tuple[float, float, float]]]:
    """For each map the mean over the images of each score, in percent, with its 95 % interval."""
    return {
        title: {what: statistics.summary(values.dropna()) for what, values in row.items()}
        for title, row in _by_image(scores).items()
    }


def _by_image(scores: Scores) -> dict[str, dict[str, pd.Series]]:
    """For each map and each score its value for every image, in percent."""
    return {
        title: {"on the digit (%)": 100 * table["mass"], "best pixels (%)": 100 * table["rank"]}
        | {f"flipping, {fill}": 100 * flip.areas[title] for fill, flip in scores.flipped.items()}
        for title, table in scores.found.items()
    }


def scores_shown(scores: Scores) -> pd.DataFrame:
    """All scores for reading."""
    rows = []
    for title, row in intervals(scores).items():
        written = {what: f"{centre:.0f} [{low:.0f}, {high:.0f}]" for what, (centre, low, high) in row.items()}
        likeness = ", ".join(signed(round(float(value), 2) + 0.0) for value in scores.likeness.get(title, []))
        rows.append({"map": title, **written, "random weights": likeness})
    return shown(pd.DataFrame(rows), "map")


def scores_told(scores: Scores) -> tuple[str, str]:
    """How to read the scores, and what they say: two paragraphs, the second a list."""
    chance = 100 * next(iter(scores.found.values()))["chance"].mean()
    order = [f"{(100 * flip.areas['random']).mean():.0f}" for flip in scores.flipped.values()]
    by_image = _by_image(scores)
    sentences = [best_told(by_image, scores, what) for what in by_image[scores.methods[0]]]
    last, methods = scores.likeness, scores.methods
    assert last["control: edges"]["spearman"] > 0.999
    likest = max(methods, key=lambda title: last[title]["spearman"])
    sizes = [last[title]["absolute"] for title in methods]
    sentences.append(
        f"**Random weights**: signs included, the map of {likest} is the one most like what it was "
        f"({signed(last[likest]['spearman'])}); the sizes alone are alike to {signed(min(sizes))} to "
        f"{signed(max(sizes))}, partly because the image itself is in every map. A map of edges does not change at all."
    )
    areas = {fill: {title: flip.areas[title].mean() for title in methods} for fill, flip in scores.flipped.items()}
    ranks = pd.DataFrame(areas).rank()
    agreement, best = ranks.corr().to_numpy()[0, 1], ranks.idxmin()
    sentences.append(
        f"**The two ways of pixel flipping {'rank the rules alike' if agreement > 0.5 else 'do not agree'}**: their "
        f"rankings of the {len(methods)} rules have a rank correlation of {signed(agreement)}, and the best is "
        f"{best.iloc[0]} with the {best.index[0]} and {best.iloc[1]} with {best.index[1]}. What flipping measures "
        "depends on what takes a pixel's place."
    )
    return (
        f"{scores.images} digits that the network recognises ({min(PART, scores.images)} of them for random weights); "
        "brackets are 95 % intervals of the mean over the images. Two maps are compared image by image, and one is "
        "called better where the 95 % interval of the mean difference lies on the better side of 0, uncorrected for "
        "the number of comparisons. More is better in the first two columns, less in the "
        f"others. Chance is {chance:.0f} in the first two; pixels in random order give {' and '.join(order)} in the "
        "next two.",
        "\n".join(f"- {sentence}" for sentence in sentences),
    )


def best_told(by_image: Mapping[str, Mapping[str, pd.Series]], scores: Scores, what: str) -> str:
    """The best rule and the best control by one score, and what the differences on the same images allow to say.

    Args:
        by_image: for each map and each score its value for every image.
        scores: which maps are of rules and which are controls.
        what: the score.
    """
    sign = 1 if "(%)" in what else -1  # of a probability along the way less is better
    own = {title: sign * row[what] for title, row in by_image.items()}
    mean = {title: values.mean() for title, values in own.items()}
    best, rival = max(scores.methods, key=mean.__getitem__), max(scores.controls, key=mean.__getitem__)

    def better(one: str, other: str) -> bool:
        _, low, _ = statistics.summary((own[one] - own[other]).dropna())
        return low > 0

    beaten = sum(better(best, title) for title in scores.methods if title != best)
    clear = sum(better(title, rival) for title in scores.methods)
    return (
        f"**{what.partition(' (')[0].capitalize()}**: the best mean is that of {best}, which is better than "
        f"{beaten or 'none'} of the other {len(scores.methods) - 1} rules. The best control is "
        f"{rival.removeprefix('control: ')}; {clear or 'none'} of the {len(scores.methods)} rules "
        f"{'is' if clear == 1 else 'are'} better than it."
    )
