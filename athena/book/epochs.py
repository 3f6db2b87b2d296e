"""Tables and sentences of the chapter on CIFAR-10 without early stopping, where accuracy is read after each epoch.

Not here: how its runs are collected and compared (`athena.book.cifar`).
"""

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from athena.book import figures, tables
from athena.book.cifar import (
    CHANCE,
    NAMES,
    Arm,
    Collected,
    after,
    arm,
    arm_name,
    compared,
    elsewhere,
    open_runs,
    studies,
    thesis,
)
from athena.book.saving import saved
from athena.book.tables import points, shown, signed
from athena.experiments import statistics

__all__ = [
    *(
        "again",
        "again_said",
        "again_table",
        "cells",
        "chance",
        "complete",
        "data_efficiency",
        "dips",
        "fourth_shown",
        "layers_drawn",
        "level",
        "notice",
    ),
    *("null_arm", "precision", "versions"),
]

Again = Mapping[tuple[float, float, int], tuple[pd.Series, pd.Series]]
"""By factor, share of the data and epochs: a row of `athena.statistics.compare` for the first seeds, and for others."""


def layers_drawn() -> Figure:
    """The convolutional network from the image to the logits, its linear part in another colour (thesis figure 7.8)."""
    upper = ["image\n3 × 32 × 32", "conv1\n64 maps", "conv2\n64", "pool1", "conv3\n128", "conv4\n128", "pool2"]
    lower = ["conv5\n256", "pool3", "linear1\n1024", "linear2\n512", "linear3\n10 logits"]
    boxes = {text: (float(i), 0.0) for i, text in enumerate(upper)}
    boxes |= {text: (6.0 - i, 1.0) for i, text in enumerate(lower)}
    arrows = [(start, end, "") for start, end in itertools.pairwise(boxes)]
    return figures.flow(boxes, arrows, (8.4, 2.0), dict.fromkeys(lower[2:4], figures.GUIDED))


def notice(runs: Collected, dataset: str) -> str:
    """What the page of the runs without early stopping rests on."""
    count = len(runs.frame)
    if runs.used != "cifar10":
        return elsewhere(runs, dataset)
    if not runs.as_planned:
        return f"> {count} runs, those that are not in the stored studies trained where this page was made."
    shares = ", ".join(f"{100 * fraction:g}" for fraction in sorted(runs.frame["fraction"].unique()))
    return (
        f"The pictures rest on {count} runs on {runs.machines}, with {shares} % of CIFAR-10's training images, all "
        f"tested on all of its test images. {open_runs(runs)}"
    )


def chance(runs: Collected) -> str:
    """How many runs without early stopping still guess one class after three epochs; nothing where none does."""
    never = runs.frame[runs.frame["accuracies"].map(lambda values: max(values[:3]) < CHANCE)]
    if runs.used != "cifar10" or never.empty:
        return ""
    where = ", ".join(f"{len(own)} at {100 * own['fraction'].iloc[0]:g} %" for _, own in never.groupby("fraction"))
    return (
        f"**Some runs never leave chance.** {len(never)} of {len(runs.frame)} runs still guess one class after three "
        f"epochs ({where} of the data; {int((never['factor'] == 0).sum())} of them plain). With PyTorch's default "
        "initial weights the signal fades on its way through seven layers, and a few dozen steps on little data are "
        "not always enough to find it. They count like all others."
    )


def level(ours: pd.Series) -> pd.DataFrame:
    """The accuracy of plain training after three epochs, here and in both tables of the thesis that have it.

    Args:
        ours: mean accuracy in percent, by share of the data.
    """
    theirs = {number: thesis(number)["accuracy_standard"] for number in ("7.2.1", "7.2.2")}
    shares = [share for share in ours.index if all(round(100 * share) in own.index for own in theirs.values())]
    columns = {
        "data (%)": [f"{100 * share:g}" for share in shares],
        "here": [f"{ours[share]:.1f}" for share in shares],
        **{
            f"thesis, {number}": [f"{own[round(100 * share)]:.1f}" for share in shares]
            for number, own in theirs.items()
        },
    }
    return shown(pd.DataFrame(columns).iloc[::-1], "data (%)")


def dips(ours: pd.Series) -> str:
    """Where more data gave plain training less accuracy; nothing where they never did. `ours` as for `level`."""
    found = [
        f"from {values[0]:.1f} % at {100 * shares[0]:g} % of the data to {values[1]:.1f} % at {100 * shares[1]:g} %"
        for shares, values in zip(itertools.pairwise(ours.index), itertools.pairwise(ours), strict=True)
        if values[1] < values[0]
    ]
    if not found:
        return ""
    return (
        f"Plain training falls {' and '.join(found)}, and guided training with it: both arms share their seeds, and "
        "with few of them a level is this uncertain."
    )


def null_arm(frame: pd.DataFrame, arms: Sequence[Arm], shares: Sequence[float]) -> tuple[pd.DataFrame, str]:
    """How far runs part when nothing but the seed differs, and how far guided runs are from their plain partners.

    Args:
        frame: runs after as many epochs as are to be looked at.
        arms: the guided arms, a column each.
        shares: of the data, a row each.

    Returns:
        The mean distance in points, whatever its sign; and a sentence on the factor 0.001, where it has run.
    """
    found = pd.DataFrame(index=list(shares), dtype=float)
    for share in shares:
        runs = frame[frame["fraction"] == share]
        alone = 100 * runs.loc[runs["factor"] == 0, "accuracy"]
        pairs = [abs(one - other) for one, other in itertools.combinations(alone, 2)]
        found.loc[share, "plain, another seed"] = pd.Series(pairs, dtype=float).mean()
        for scope, factor in arms:
            gains = _gains(arm(runs, scope, factor), factor)
            found.loc[share, f"{NAMES[scope]}, {factor:g}, same seed"] = gains.abs().mean()
    text = {name: values.map("{:.2f}".format) for name, values in found.items()}
    text = {name: values.replace("nan", tables.NOT_RUN if "same" in str(name) else "") for name, values in text.items()}
    table = shown(pd.DataFrame({"data (%)": [f"{100 * share:g}" for share in shares], **text}), "data (%)")
    least = "whole network, 0.001, same seed"
    if least not in found or found[least].isna().all():
        return table, ""
    apart = found[least].tolist()
    most = max(value for value in apart if value == value)
    share = shares[apart.index(most)]
    return table, (
        "**Two runs of the same seed part as soon as anything differs.** Factor 0.001 changes gradients by about a "
        f"thousandth, and still its runs end up to {most:.2f} points from their plain partners, on "
        f"average, at {100 * share:g} % of the data. A difference of one pair below that says nothing."
    )


def _gains(frame: pd.DataFrame, factor: float) -> pd.Series:
    """Guided minus plain of each seed, in points, of the runs of one arm at one share of the data."""
    guided, plain = (100 * frame[frame["factor"] == value].set_index("seed")["accuracy"] for value in (factor, 0))
    return guided.sub(plain).dropna()


def precision(arms: Sequence[Arm], fractions: Sequence[float], on_gpu: str) -> tuple[pd.DataFrame, list[str]]:
    """What the stored studies say of guided minus plain after three epochs, on a processor and on the GPU.

    Args:
        arms: the guided arms.
        fractions: of the data.
        on_gpu: the precision of the GPU's runs.

    Returns:
        A row for each cell that two pairs or more have in common, and sentences on the table and on bfloat16.
    """
    stored = pd.concat([plan.store.frame() for plan in studies().values()]).drop_duplicates("key")
    stored = after(stored, 3)
    rows, off = [], 0
    for (scope, factor), other, share in itertools.product(arms, ("float32", "bfloat16"), fractions):
        at_share = stored[stored["fraction"] == share]
        gpu, cpu = (_gains(arm(at_share[at_share["precision"] == of], scope, factor), factor) for of in (on_gpu, other))
        common = gpu.index.intersection(cpu.index)
        if len(common) < 2 or not cpu.any():  # bfloat16 cannot hold every factor
            continue
        gpu, cpu = gpu[common], cpu[common]
        measured = [
            dict(zip(("difference", "low", "high"), (part / 100 for part in statistics.summary(gains)), strict=True))
            for gains in (cpu - gpu, gpu, cpu)
        ]
        off += not measured[0]["low"] <= 0 <= measured[0]["high"]
        row = {
            "arm": f"{NAMES[scope].split()[0]}, {factor:g}",
            "data": f"{100 * share:g} %",
            "pairs, in": f"{len(common)}, {other}",
        }
        named = zip(("processor − GPU", "GPU, TF32", "processor"), map(points, measured), strict=True)
        rows.append(row | dict(named))
    if not rows:
        return pd.DataFrame(), []
    said = (
        ": with so few pairs no effect of machine or precision is shown."
        if not off
        else f"; at 95 % one in twenty may leave it out by chance, here it is {off}."
    )
    sentences = [f"The first interval holds zero in {len(rows) - off} of {len(rows)} cells{said}"]
    factors = sorted({factor for scope, factor in arms if scope == "all"})
    return shown(pd.DataFrame(rows), "arm"), [*sentences, *_lost_in_bfloat16(stored, factors)]


def _lost_in_bfloat16(stored: pd.DataFrame, factors: Sequence[float]) -> list[str]:
    """A sentence for each factor with which all runs in bfloat16 are those without guidance."""
    rounded = stored[stored["precision"] == "bfloat16"]
    of_plain = rounded[rounded["factor"] == 0].set_index(["fraction", "seed"])["accuracies"]
    sentences = []
    for factor in factors:
        curves = rounded[rounded["factor"] == factor].set_index(["fraction", "seed"])["accuracies"]
        both = curves.to_frame("guided").join(of_plain.rename("plain"), how="inner")
        alike = int((both["guided"] == both["plain"]).sum())
        if len(curves) and alike == len(curves):
            sentences.append(
                f"**Factor {factor:g} does nothing at all in bfloat16.** After every epoch all {alike} runs have the "
                "accuracy of their plain partner to the last digit. The format cannot tell "
                f"1 + {factor:g} R from 1 unless R is above {2**-8 / factor:.1f} or below −{2**-9 / factor:.1f}, so "
                "each scaled gradient is rounded back to what it was. A gain or a loss that a table shows for such a "
                "factor cannot come from guidance that was computed in this precision."
            )
    return sentences


def complete(runs: Collected, pairs: int) -> list[float]:
    """The shares of the data at which every arm has run with so many seeds."""
    counts = {of: arm(runs.frame, *of).groupby(["factor", "fraction"]).size() for of in runs.there}
    return [
        share
        for share in sorted(runs.fractions)
        if all(own.get((value, share), 0) >= pairs for (_, factor), own in counts.items() for value in (0, factor))
    ]


def versions(frame: pd.DataFrame) -> str:
    """How many pairs mix versions of the package."""
    pair = ["fraction", "seed", "device"]
    plain, guided = (frame[(frame["factor"] == 0) == alone].set_index(pair)["code"] for alone in (True, False))
    codes = guided.to_frame("guided").join(plain.rename("plain"), how="inner")
    return (
        f"{(codes['guided'] != codes['plain']).sum()} pairs behind the tables of this page mix two versions of the "
        "package. Wherever both versions trained the same run, they agree to the last digit. No pair mixes machines."
    )


def cells(frame: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """Guided minus plain in every arm at every share of the data.

    Returns:
        Rows of `athena.statistics.compare` with `scope` and `factor`; `alone`, the verdict where p is corrected over
        the arm's own cells, and `verdict`, where it is corrected over all of them.
    """
    by_arm = [compared(arm(frame, *of)).assign(scope=of[0], factor=of[1]) for of in arms]
    by_arm = [table.assign(alone=[statistics.verdict(row) for _, row in table.iterrows()]) for table in by_arm]
    found = pd.concat(statistics.family(*by_arm), ignore_index=True)
    return found.assign(verdict=[statistics.verdict(row) for _, row in found.iterrows()])


def again(frame: pd.DataFrame, repeats: pd.DataFrame, factors: Sequence[float], epochs: Sequence[int]) -> Again:
    """Cells of the whole network that were run again, with their first seeds and with other ones.

    Args:
        frame, repeats: the runs with the first seeds, and with the others.
        factors: the arms.
        epochs: after how many the runs are looked at.
    """
    shares = [share for share in sorted(set(frame["fraction"])) if share in set(repeats["fraction"])]
    found: dict[tuple[float, float, int], tuple[pd.Series, pd.Series]] = {}
    for factor, share, count in itertools.product(factors, shares, epochs):
        sides = (after(runs[runs["fraction"] == share], count) for runs in (frame, repeats))
        once, more = (compared(arm(side, "all", factor)).iloc[0] for side in sides)
        found[factor, share, count] = once, more
    return found


def again_table(found: Again) -> pd.DataFrame:
    """The table of what `again` has found."""
    rows = []
    for (factor, share, epochs), sides in found.items():
        row = {"factor": f"{factor:g}", "data (%)": f"{100 * share:g}", "epochs": epochs}
        for side in sides:
            row |= {f"guided − plain, {side['n']:g} seeds": points(side), f"p, {side['n']:g}": f"{side['p']:.3f}"}
        rows.append(row)
    return shown(pd.DataFrame(rows), "factor")


def again_said(every: pd.DataFrame, found: Again, epochs: int = 3) -> str:
    """Which cells stand out in their own arm, and what became of them with other seeds.

    Args:
        every: from `cells`.
        found: from `again`, after `epochs` among others.
    """
    out = every[every["alone"] == "gain"]
    begin = f"Of {len(every)} cells after three epochs {len(out)} stand out: " + "; ".join(
        f"{arm_name(row['scope'], row['factor'])}, at {100 * row['fraction']:g} %" for _, row in out.iterrows()
    )
    if out.empty:
        return f"None of the {len(every)} cells stands out after three epochs."
    keys = [(row["factor"], row["fraction"], epochs) for _, row in out.iterrows()]
    if (out["scope"] != "all").any() or not set(keys) <= found.keys():
        return f"{begin}. Not all of them have been run again."
    sides = [found[key] for key in keys]
    confirmed = [more for _, more in sides if statistics.verdict(more) == "gain"]
    none = "neither stands out." if len(sides) == 2 else "none stands out."
    highest = max(100 * more["high"] for _, more in sides)
    return (
        f"{begin}. Corrected over all {len(every)}, {(every['verdict'] == 'gain').sum()} pass. With thirty other seeds "
        f"they measure {' and '.join(points(more) for _, more in sides)} points: "
        + (f"{len(confirmed)} of them still stand out." if confirmed else none)
        + (
            f" **What the first seeds showed is ruled out; an effect below {highest:.1f} points is not.**"
            if all(more["high"] < once["difference"] for once, more in sides)
            else ""
        )
    )


def fourth_shown(gained: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """What the fourth epoch adds to plain training, to each arm, and to the arm more than to plain, in points.

    Args:
        gained: runs whose `accuracy` is that after four epochs minus that after three.
        arms: the guided arms.
    """
    rows = [
        {
            "arm": arm_name(*of),
            "data (%)": f"{100 * row['fraction']:g}",
            "guided − plain": points(row),
            "plain gains": signed(100 * row["baseline_mean"]),
            "guided gains": signed(100 * row["mean"]),
            "pairs": row["n"],
        }
        for of in arms
        for _, row in compared(arm(gained, *of)).iterrows()
    ]
    return shown(pd.DataFrame(rows).query("pairs > 0"), "arm")


def data_efficiency(frame: pd.DataFrame, arms: Sequence[Arm], epochs: Sequence[int]) -> tuple[pd.DataFrame, str]:
    """How many times the data plain training needs for the accuracies that an arm reaches as well (thesis figure 6.1).

    Args:
        frame: runs at two shares of the data or more, the same in every arm.
        arms: the guided arms.
        epochs: after how many the runs are looked at.

    Returns:
        A row for each arm and number of epochs; and a sentence on those whose interval lies above 1, if there are any.
    """
    named = {
        f"{arm_name(*of)}, {count} epochs": arm(after(frame, count), *of)
        for of, count in itertools.product(arms, epochs)
    }
    table, above = saved(named)
    said = (
        f"Of {len(named)} intervals {len(above)} {'lies' if len(above) == 1 else 'lie'} above 1: {'; '.join(above)}. "
        "It is no saving of data by the rule of this book: nothing is corrected for the number of intervals, and the "
        "cells that it rests on are among those above that thirty other seeds did not confirm."
    )
    return table, said if above else ""
