"""What the chapter on LRP draws and says of the heat maps of its digits: rules, accounts, mistakes, and their time.

Not here: the heat maps themselves (`athena.lrp`, `athena.figures.heat_maps`), how good they are
(`athena.book.map_scores`), and small examples that are followed by hand (`athena.book.worked_example`).
"""

import re
import time
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.book.tables import benchmark, cells, percent, shown, signed
from athena.relevance import lrp

__all__ = [
    "accounts_shown",
    "accounts_told",
    "arrived_told",
    "arriving",
    "benchmarks",
    "black_pixels_told",
    "broken",
    "costs_told",
    "mistakes",
    "mistakes_told",
    "name",
    "named",
    "opposed_told",
    "opposing",
    "timed",
]

REDDEST = 10
"""Pixels that are turned black to test a map of a mistake."""


def name(rule: rules.Rule) -> str:
    """A rule as the page writes it, such as ``"LRP-ε, ε = 0.1"``."""
    match rule:
        case rules.Epsilon():
            return f"LRP-ε, ε = {_written(rule.epsilon)}"
        case rules.Gamma():
            return f"LRP-γ, γ = {rule.gamma:g}"
        case rules.AlphaBeta():
            return f"LRP-α{rule.alpha:g}β{rule.beta:g}"
    return {"Zero": "LRP-0", "ZPlus": "z⁺", "ZBox": "z-box", "WSquare": "w²", "Flat": "flat"}[type(rule).__name__]


def named(rule: rules.Rule) -> str:
    """A rule in a sentence, such as ``"LRP-ε with ε = 0.1"``."""
    return name(rule).replace(", ", " with ")


def _written(value: float) -> str:
    """A number as a page writes it, ``10⁻⁶`` for ``1e-06``."""
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return re.sub(
        r"^(.*)e(.*)$",
        lambda found: ("" if found[1] == "1" else f"{found[1]} · ") + "10" + str(int(found[2])).translate(superscript),
        f"{value:g}",
    )


def broken(title: str) -> str:
    """A title over a map, in two lines where it has a comma."""
    return title.replace(", ", "\n")


def black_pixels_told(images: Tensor, maps: Mapping[str, Tensor], rule: rules.Rule) -> str:
    """How much relevance black pixels hold, by the rule of the first layer.

    Args:
        images: (n, c, h, w).
        maps: of the rule by its name, and of z-box, w² and flat in the first layer.
        rule: the one of the other layers.
    """
    flat = maps["flat"].flatten(1)
    spread = ((flat.max(1).values - flat.min(1).values) / flat.abs().max(1).values).max()
    dark = (images <= 0).flatten(1)
    own, box, square, alike = (
        (found.flatten(1).abs() * dark).sum() / found.abs().sum()
        for found in (maps[title] for title in (name(rule), "z-box, 0 to 1", "w²", "flat"))
    )
    assert spread < 1e-3 < box and (rule.absolute or own < 1e-6)
    return (
        f"Black pixels hold {percent(float(own))} of the relevance (by size, whatever its sign) with {name(rule)}, "
        f"{percent(float(box))} with the z-box, {percent(float(square))} with w² and {percent(float(alike))} with "
        f"flat; they are {percent(float(dark.float().mean()))} of all pixels. The flat map does not vary at all."
    )


def arriving(network: nn.Module, images: Tensor, rule: rules.Rule) -> tuple[Figure, Tensor]:
    """Heat maps with the share of the start that arrives at the pixels, and that share for each image."""
    relevance = lrp(network, images, rule=rule)
    arrives = relevance.input.flatten(1).sum(1) / relevance.output.sum(1)
    return _noted(images, rule, relevance.input, [f"{100 * share:.0f} % arrives" for share in arrives]), arrives


def opposing(network: nn.Module, images: Tensor, rule: rules.Rule) -> tuple[Figure, Tensor]:
    """Heat maps with the share of relevance, by size, that speaks against, and that share for each image."""
    relevance = lrp(network, images, rule=rule).input
    against = relevance.clamp(max=0).flatten(1).sum(1).abs() / relevance.abs().flatten(1).sum(1)
    return _noted(images, rule, relevance, [f"{100 * share:.0f} % against" for share in against]), against


def arrived_told(by_epsilon: Mapping[str, tuple[Figure, Tensor]]) -> str:
    """How much arrives on average; by_epsilon: what `arriving` gives, among others for ε = 0.001, 1 and 10."""
    mean = {stop: arrives.mean().item() for stop, (_, arrives) in by_epsilon.items()}
    assert mean["10"] < mean["1"] < mean["0.001"]
    count = len(by_epsilon["1"][1])
    return (
        f"Averaged over these {count} digits, {percent(mean['0.001'])} of the start arrives with ε = 0.001, "
        f"{percent(mean['1'])} with 1 and {percent(mean['10'])} with 10."
    )


def opposed_told(by_gamma: Mapping[str, tuple[Figure, Tensor]], network: nn.Module, images: Tensor) -> str:
    """How much speaks against on average, and how near the largest γ is to z⁺.

    Args:
        by_gamma: what `opposing` gives for these images, among others for γ = 0, 0.25, 1 and 100.
    """
    mean = {stop: against.mean().item() for stop, (_, against) in by_gamma.items()}
    plus = lrp(network, images, rule=rules.ZPlus()).input
    far = lrp(network, images, rule=rules.Gamma(100.0)).input
    apart = ((far - plus).abs().sum() / plus.abs().sum()).item()
    assert mean["0"] > mean["1"] > mean["100"]
    return (
        f"On average {percent(mean['0'])} of the relevance speaks against with γ = 0, {percent(mean['0.25'])} with "
        f"0.25, {percent(mean['1'])} with 1, {percent(mean['100'])} with 100. The map of γ = 100 differs from that of "
        f"z⁺ by {percent(apart)} of its relevance."
    )


def _noted(images: Tensor, rule: rules.Rule, relevance: Tensor, notes: list[str]) -> Figure:
    return figures.heat_maps(images, {name(rule): relevance}, notes={name(rule): notes}, each=True, across=True)


def accounts_told(accounts: Mapping[str, pd.DataFrame], count: int) -> str:
    """That nothing is lost without a trace, for `count` images together.

    Args:
        accounts: for each rule, what `athena.Relevance.conservation` gives for a chain of layers.
    """
    worst = 0.0
    for account in accounts.values():
        start, arrived = account["relevance"].iloc[0], account["relevance"].iloc[-1]
        step = account["relevance"] - account["bias"] - account["stabiliser"] - account["relevance"].shift(-1)
        assert account["layer"].iloc[-1] == "input"
        whole = abs(start - arrived - account[["bias", "stabiliser"]].sum().sum())
        worst = max(worst, step.iloc[:-1].abs().max() / start, whole / start)
    assert worst < 1e-3
    return (
        f"The same in numbers, for the first {count} test digits together. The three columns add up to the start; so "
        "does each step from one layer to the next. The largest gap in any of these sums is "
        f"{worst:.0e} of the start, which is rounding."
    )


def accounts_shown(accounts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What bias and stabiliser absorb and what arrives, in percent of the start, for reading."""
    rows = []
    for title, account in accounts.items():
        start = account["relevance"].iloc[0]
        absorbed = {
            f"{what} absorbs": percent(round(account[what].sum() / start, 4) + 0.0, 2).replace("-", "−")
            for what in ("bias", "stabiliser")
        }
        rows.append({"rule": title, **absorbed, "arrives": percent(account["relevance"].iloc[-1] / start, 2)})
    return shown(pd.DataFrame(rows), "rule")


def mistakes(images: Tensor, for_said: Tensor, for_truth: Tensor, logits: Tensor, labels: Tensor) -> Figure:
    """The first three mistakes: what spoke for the answer, what for the truth, and the difference.

    Args:
        images: that the network gets wrong, (n, c, h, w); for_said, for_truth: their heat maps.
        logits: (n, classes); labels: (n,).
    """
    first = slice(0, min(3, len(images)))
    said = logits.argmax(1)
    own, true = (logits.gather(1, of[:, None])[:, 0] for of in (said, labels))
    maps = {"for its answer": for_said, "for the truth": for_truth, "answer − truth": for_said - for_truth}
    notes = {
        "for its answer": [f"says {c}, logit {value:.1f}" for c, value in zip(said[first], own, strict=False)],
        "for the truth": [f"true {c}, logit {value:.1f}" for c, value in zip(labels[first], true, strict=False)],
        "answer − truth": [signed(value, 1) for value in (own - true)[first]],
    }
    return figures.heat_maps(images[first], {title: found[first] for title, found in maps.items()}, notes=notes)


def mistakes_told(network: nn.Module, images: Tensor, labels: Tensor, tipped: Tensor, seed: int) -> str:
    """How many mistakes are put right where the `REDDEST` pixels of a map turn black, and beside it others.

    Args:
        images: that the network gets wrong, (n, c, h, w); labels: (n,).
        tipped: heat maps of what spoke for the wrong answer rather than for the true one.
        seed: of the pixels at random.
    """
    x = images.clone().requires_grad_()
    logits = network(x)
    apart = logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]
    (slopes,) = torch.autograd.grad(apart.sum(), x)

    def righted(order: Tensor) -> str:
        out = images.flatten(1).clone()
        out.scatter_(1, order[:, :REDDEST], 0.0)
        with torch.no_grad():
            return percent((network(out.view_as(images)).argmax(1) == labels).float().mean().item(), 0)

    lit = (images > 0).flatten(1)
    random = torch.rand(lit.shape, generator=torch.Generator().manual_seed(seed))
    by_relevance = righted(tipped.flatten(1).argsort(1, descending=True))
    by_chance = righted((random * lit).argsort(1, descending=True))
    by_slope = righted(slopes.flatten(1).masked_fill(~lit, -torch.inf).argsort(1, descending=True))
    by_light = righted(images.flatten(1).argsort(stable=True, dim=1, descending=True))
    return (
        f"A map of what tipped the balance can be put to the test. For each of the {len(images)} mistakes on the test "
        f"set, the {REDDEST} pixels with the highest relevance in the last column were turned black, and the network "
        f"was asked again: it then gives the true answer for **{by_relevance}** of them. The gradient of the same "
        f"difference of logits, by which the {REDDEST} lit pixels with the steepest slope are taken, comes to "
        f"{by_slope}. Both are told the true class, which the other controls are not: {REDDEST} lit pixels at random "
        f"give {by_chance}, the {REDDEST} brightest {by_light}."
    )


def timed(
    network: nn.Module, images: Tensor, labels: Tensor, chosen: Sequence[rules.Rule], repeats: int = 9
) -> pd.DataFrame:
    """How long heat maps by each rule take beside a forward and backward pass as in training, for reading."""

    def step() -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    training = "forward and backward, as in training"
    runs = {training: step} | {
        f"athena.lrp, {name(rule)}": lambda rule=rule: lrp(network, images, rule=rule) for rule in chosen
    }
    times: dict[str, list[float]] = {title: [] for title in runs}
    for _ in range(repeats):  # in turn, so that a busy moment of the machine falls on all alike
        for title, run in runs.items():
            before = time.perf_counter()
            run()
            times[title].append(1000 * (time.perf_counter() - before))
    network.zero_grad()
    measured = pd.DataFrame(times)
    columns = {
        "what": measured.columns,
        "time": measured.median().map("{:.0f} ms".format),
        "over training": measured.div(measured[training], axis=0).median().map("{:.2f}".format),
    }
    return shown(pd.DataFrame(columns), "what")


MACHINES = {"avx512": "a processor", "h100": "a GPU"}
"""Where explanations were timed and stored, by the end of the benchmark's name."""
ARM = re.compile(r"^(athena|zennit|Captum) (.+)$")


def benchmarks() -> list[tuple[str, list[pd.DataFrame]]]:
    """What ``benchmarks/lrp.py`` has measured on each of `MACHINES`: the conditions, and its tables for reading."""
    columns = ["arm", "ms", "of plain", "of athena", "peak MiB"]
    found = []
    for machine in MACHINES:
        said, stored = benchmark(f"lrp-{machine}")
        tables = []
        for title, table in stored.items():
            text = cells(table.filter(columns))
            text["arm"] = text["arm"].map(_arm)
            tables.append(shown(text.rename(columns={"arm": title}), title))
        found.append((said, tables))
    return found


def _arm(title: str) -> str:
    """An arm of a benchmark as the page writes it: ``"ATHENA, LRP-ε, ε = 10⁻⁶"`` for ``"athena Epsilon(1e-06)"``."""
    if not (parts := ARM.match(title)):
        return title
    library, rule = parts.groups()
    others = {"epsilon": "LRP-ε", "gamma": "LRP-γ", "z-plus": "z⁺"}
    return f"ATHENA, {name(rules.parse(rule))}" if library == "athena" else f"{library}, {others[rule]}"


def costs_told() -> str:
    """How many times as long as a gradient ATHENA's maps take in `benchmarks`."""
    said = []
    for machine, where in MACHINES.items():
        _, stored = benchmark(f"lrp-{machine}")
        rows = pd.concat(list(stored.values()))
        ratios = [
            rows.loc[rows["arm"].str.match(rf"athena ({kind})\("), "of plain"]
            for kind in ("Zero|Epsilon", "Gamma|ZPlus")
        ]
        first, second = (f"{ratio.min():.2f} to {ratio.max():.2f}" for ratio in ratios)
        said.append(f"on {where}, {first} times with LRP-0 and LRP-ε, {second} times with LRP-γ and z⁺")
    return f"As long as the gradient of the logit, the map of ATHENA takes: {'; '.join(said)}."
