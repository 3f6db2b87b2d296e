"""The chapter on CIFAR-10 with early stopping: the rule, its runs, which they are, and where they stopped.

Not here: what stopping and guidance do to accuracy (`athena.book.stopping_effects`), and the training that stops by the
rule (`athena.training`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from athena import experiments
from athena.book import tables
from athena.book.cifar import (
    CHANCE,
    NAMES,
    Arm,
    Collected,
    as_asked,
    compared,
    elsewhere,
    gathered,
    open_runs,
    studies,
    thesis,
)
from athena.book.tables import shown
from athena.experiments import data, training
from athena.experiments.run import HELD_OUT, Run

__all__ = [
    *("EPOCHS", "WITH", "WITHOUT", "chance", "collect", "comparison", "comparisons", "ends", "ends_table"),
    *("epochs_trained", "every_arm", "level", "limits", "looks", "named", "notice", "of_scope", "pick", "rule_table"),
]

WITH, WITHOUT = {"linear": "7.2.3", "all": "7.2.4"}, {"linear": "7.2.2", "all": "7.2.1"}
"""By scope, the thesis's table with early stopping, and without it."""
EPOCHS = {"linear": 4, "all": 3}
"""By scope, how many epochs a run may have at most."""


def ends(scores: pd.Series, patience: int) -> tuple[int | None, int]:
    """When early stopping ends a run (thesis 7.2.3).

    Args:
        scores: what each look at the network saw, by the batches that it had been trained on.
        patience: after so many batches without a better look the run ends.

    Returns:
        After which batch the run ends, None if it does not; and the batch whose weights are kept.
    """
    best, kept = -1.0, 0
    for batch, score in zip(scores.index.tolist(), scores, strict=True):
        if score > best:
            best, kept = score, batch
        if batch - kept >= patience:
            return batch, kept
    return None, kept


def looks(run: Run) -> tuple[pd.DataFrame, int, int]:
    """Trains a network without early stopping, and looks at it as early stopping would.

    The images that are looked at are the training images next to the share of `run`, which it is not trained on.

    Returns:
        By batch, the accuracy (0 to 1) on the images held out and on test images; the batches in an epoch; and how
        many images are held out.
    """
    every = data.load(run.dataset, 1.0, run.seed)  # a smaller share is the beginning of it
    count = round(run.fraction * len(every.train_labels))
    unseen = slice(count, count + round(HELD_OUT * len(every.train_labels)))
    in_epoch = -(-count // run.batch_size)
    found = []
    for glimpse in training.watch(run, every=max(1, round(run.window * in_epoch))):
        with torch.no_grad():
            right = glimpse.model(every.train_images[unseen]).argmax(1) == every.train_labels[unseen]
        found.append((round(glimpse.epochs * in_epoch), float(right.float().mean()), glimpse.accuracy))
    table = pd.DataFrame(found[1:], columns=["batch", "held out", "test"]).set_index("batch")
    return table, in_epoch, unseen.stop - unseen.start


def collect(
    arms: Sequence[Arm], fractions: Sequence[float], peeked: Sequence[float], seeds: int, dataset: str
) -> Collected:
    """The runs with early stopping, and the same ones without: what the studies plan, or else trained now.

    Args:
        arms: the guided arms.
        fractions: of the training data.
        peeked: those of them at which the test set is looked at as well.
        seeds: how many, from 0 on.
        dataset: what to train on.
    """
    plans, never_stopped, asked = studies("-early-stopping"), studies(), {}
    for scope in dict.fromkeys(scope for scope, _ in arms):
        values = {"factor": [0, *(factor for own, factor in arms if own == scope)], "seed": range(seeds)}
        base = replace(plans[scope].base, dataset=dataset)
        by_test = experiments.grid(replace(base, monitor="test"), fraction=peeked, **values) if peeked else []
        asked[scope] = experiments.grid(base, fraction=fractions, **values) + by_test
    as_planned, wanted = as_asked(asked, plans, dataset)
    parts = []
    for scope, runs in wanted.items():
        epochs, longest = plans[scope].base.epochs, never_stopped[scope].base.epochs
        by_rule = [run for run in runs if run.monitor == "validation"]
        to_the_end = [replace(run, monitor=None, epochs=longest) for run in by_rule]
        free = gathered(never_stopped[scope], to_the_end, as_planned)
        free = free.assign(accuracy=free["accuracies"].str[int(epochs) - 1], epochs=epochs, monitor="none")
        parts += [gathered(plans[scope], runs, as_planned), free]
    rows = [row for part in parts for row in part.to_dict("records")]  # concat warns of a part that is empty
    frame = pd.DataFrame(rows, columns=parts[0].columns)
    frame = frame.astype(dict.fromkeys(("fraction", "factor", "accuracy", "epochs", "stopped_at"), float))
    used = next((run.dataset for runs in wanted.values() for run in runs), dataset)
    return Collected(frame, tuple(arms), tuple(sorted(fractions)), used, as_planned, wanted)


def pick(
    runs: Collected, scope: str, factors: Sequence[float], monitors: Sequence[str] = ("validation",)
) -> pd.DataFrame:
    """The runs of one scope with these factors, 0 for plain ones, stopped by one of these monitors."""
    own = runs.frame[runs.frame["epochs"] == EPOCHS[scope]]
    return own[own["factor"].isin(factors) & own["monitor"].isin(monitors)]


def of_scope(runs: Collected) -> dict[str, list[float]]:
    """By scope, the factors of its guided arms."""
    return {scope: [factor for own, factor in runs.arms if own == scope] for scope, _ in runs.arms}


def every_arm(runs: Collected) -> list[Arm]:
    """Plain training and the guided arms of each scope in turn."""
    return [(scope, factor) for scope, factors in of_scope(runs).items() for factor in (0, *factors)]


def named(scope: str, factor: float, plain: str = "plain") -> str:
    """What a column or row calls an arm."""
    return f"{NAMES[scope]}, {factor:g}" if factor else plain


def notice(runs: Collected, dataset: str) -> str:
    """What the page of the runs with early stopping rests on."""
    finished = len({run.key for own in runs.wanted.values() for run in own}) - len(runs.waiting)
    if runs.used != "cifar10":
        return elsewhere(runs, dataset, ", with early stopping and without,")
    if not runs.as_planned:
        return (
            f"> {finished} runs with early stopping, those that are not in the stored studies trained where this page "
            "was made."
        )
    if not finished:
        return (
            f"**None of the {len(runs.waiting)} runs of the two studies has been run yet.** Their cells say "
            f"*{tables.NOT_RUN}*, their pictures hold the thesis's curves alone, and nothing is put in their place. "
            "What can be seen already: the rule at work, training without early stopping, and what the thesis's own "
            "tables say about each other."
        )
    begin = f"This page rests on {finished} runs with early stopping on CIFAR-10, on {runs.machines}."
    return f"{begin} {open_runs(runs)}".strip()


def chance(runs: Collected) -> str:
    """How many runs guess one class where the rule has ended them; nothing where none does."""
    own = runs.frame[(runs.frame["monitor"] == "validation") & (runs.used == "cifar10")]
    never = own[own["accuracy"] < CHANCE]
    if not never["stopped_at"].notna().any():
        return ""
    where = ", ".join(f"{len(part)} at {100 * part['fraction'].iloc[0]:g} %" for _, part in never.groupby("fraction"))
    return (
        f"**Some runs are stopped before they have begun.** {len(never)} of {len(own)} runs guess one class at the end "
        f"({where} of the data; {int((never['factor'] == 0).sum())} of them plain), and "
        f"{int(never['stopped_at'].notna().sum())} of these were ended by the rule. On little data this network spends "
        "dozens of batches at chance before it learns anything, and to the rule that looks like no gain. They count "
        "like all others."
    )


def level(runs: Collected) -> str:
    """The accuracy of plain training with early stopping, here and in the thesis; nothing where the data are others."""
    said = []
    for scope in of_scope(runs):
        ours = 100 * pick(runs, scope, [0]).groupby("fraction")["accuracy"].mean()
        theirs = thesis(WITH[scope], runs.used)["accuracy_standard"]
        shares = [share for share in ours.index if round(100 * share) in {5, 10, 30, 100} & set(theirs.index)]
        found = [
            f"{100 * share:g} %: {ours[share]:.1f} here, {theirs[round(100 * share)]:.1f} there" for share in shares
        ]
        if found:
            said.append(f"at most {EPOCHS[scope]} epochs, {', '.join(found)}")
    if not said:
        return ""
    return (
        "**The level is not the thesis's.** Accuracy of plain training with early stopping, in percent, here and in "
        f"the thesis: {'; '.join(said)}. Optimiser, learning rate, batch size and the rule itself are guesses; the "
        "thesis names none of them."
    )


def batches(runs: Collected, monitor: str, share: float) -> int:
    """In an epoch, where a tenth of the images is held out if that is the monitor."""
    total = data.DATA_SETS[runs.used].train
    rest = total - round(HELD_OUT * total) if monitor == "validation" else total
    return -(-max(1, round(share * rest)) // next(iter(runs.wanted.values()))[0].batch_size)


def rule_table(runs: Collected) -> pd.DataFrame:
    """The rule of the chapter's studies in batches, for an epoch of some shares of the data."""
    run = next(iter(runs.wanted.values()))[0]
    held_out = round(HELD_OUT * data.DATA_SETS[runs.used].train)
    rest, rows = data.DATA_SETS[runs.used].train - held_out, []
    least, most = runs.fractions[0], runs.fractions[-1]
    for share in dict.fromkeys([least, *(s for s in (0.1, 0.3) if least < s < most), most]):
        n = batches(runs, "validation", share)
        window = max(1, round(run.window * n))
        looks = -(-n // window)
        rows.append(
            {
                "data (%)": f"{100 * share:g}",
                "images": round(share * rest),
                "batches": n,
                "k": window,
                "patience": max(1, round(run.patience * n)),
                "looks": looks,
                "looked at / trained on": f"{looks * held_out / round(share * rest):.1f}",
            }
        )
    return shown(pd.DataFrame(rows), "data (%)")


def comparison(runs: Collected, scope: str, factor: float) -> pd.DataFrame:
    """The table of one guided arm against plain training, both with early stopping, beside the thesis's."""
    theirs = thesis(WITH[scope], runs.used).reset_index(drop=True)
    table = compared(pick(runs, scope, [0, factor]))
    return tables.comparison(table, theirs if factor == 0.1 and len(theirs) else None, runs.fractions)


def comparisons(runs: Collected) -> dict[str, dict[str, Any]]:
    """What can be compared with what: each guided arm with plain training, and each arm with and without stopping.

    Returns:
        By a short name, the arguments of `athena.figures.two_arms`.
    """
    found = {}
    for scope, factors in of_scope(runs).items():
        name, most = NAMES[scope], f"{EPOCHS[scope]} epochs"
        with_, without = thesis(WITH[scope], runs.used), thesis(WITHOUT[scope], runs.used)
        for factor in factors:
            short, title = f"{name.split()[0]} {factor:g}", f"Guided, {name} {factor:g}"
            both = ["accuracy_standard", "accuracy_lrp"]
            ours, free = (pick(runs, scope, [0, factor], [monitor]) for monitor in ("validation", "none"))
            arms: dict[str, Any] = {"baseline": ("factor", 0), "labels": ("plain", "guided")}
            known = factor == 0.1
            found[f"{short}, with"] = arms | {
                "frame": ours,
                "title": f"{title}: early stopping, at most {most}",
                "published": with_[both] if known else None,
            }
            found[f"{short}, without"] = arms | {
                "frame": free,
                "title": f"{title}: {most}, no early stopping",
                # the thesis has no four epochs without early stopping
                "published": without[both] if known and scope == "all" else None,
            }
        for factor in (0, *factors):
            column = "accuracy_lrp" if factor else "accuracy_standard"
            theirs = pd.concat([without[column], with_[column]], axis=1)
            arm = f"{name.split()[0]} {factor:g}" if factor else f"plain, {EPOCHS[scope]} ep."
            found[f"effect on {arm}"] = {
                "baseline": ("monitor", "none"),
                "labels": ("without", "with early stopping"),
                "frame": pick(runs, scope, [factor], ["none", "validation"]),
                "title": f"Early stopping itself, {f'{name} {factor:g}' if factor else 'plain'}: {most}",
                "published": theirs if scope == "all" and factor in (0, 0.1) else None,
            }
    for arguments in found.values():
        arguments["table"] = compared(arguments["frame"], arguments["baseline"])
        if arguments["published"] is not None:
            arguments["published"] = arguments["published"].dropna()
        if arguments["published"] is not None and arguments["published"].empty:
            arguments["published"] = None
    return found


def limits(runs: Collected, stops: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Limits of the axes that hold all of `comparisons`, as `athena.figures.two_arms` takes them."""
    numbers = [*WITH.values(), *WITHOUT.values()]
    levels = pd.concat([100 * runs.frame["accuracy"], *(thesis(of, runs.used)["accuracy_lrp"] for of in numbers)])
    gaps = [1.0]
    for own in stops.values():
        name, value = own["baseline"]
        keyed = own["frame"].set_index(["fraction", "seed"])
        sides = (100 * keyed.loc[keyed[name].ne(value) == other, "accuracy"] for other in (True, False))
        gaps.append(next(sides).sub(next(sides)).abs().max())
        if own["published"] is not None:
            gaps.append((own["published"].iloc[:, 1] - own["published"].iloc[:, 0]).abs().max())
    most = max(gap for gap in gaps if gap == gap) + 0.5
    return {
        "share": (0, 104 * max(runs.fractions)),
        "accuracy": (levels.min() - 2, levels.max() + 3),
        "difference": (-most, most),
    }


def epochs_trained(runs: Collected) -> pd.DataFrame:
    """How long the runs were trained that stop by the held-out tenth.

    Returns:
        A row a run: `scope`, `factor`, `fraction`; `epochs`, batches trained over batches in an epoch, all epochs where
        the rule never ended it; and `stopped`, whether it did.
    """
    parts = []
    for scope, factor in every_arm(runs):
        own = pick(runs, scope, [factor])
        in_epoch = [batches(runs, "validation", share) for share in own["fraction"]]
        epochs = (own["stopped_at"] / pd.Series(in_epoch, own.index, dtype=float)).fillna(own["epochs"])
        stopped = own["stopped_at"].notna()
        parts.append(own[["factor", "fraction"]].assign(scope=scope, epochs=epochs.astype(float), stopped=stopped))
    return pd.concat(parts, ignore_index=True)


def ends_table(runs: Collected) -> pd.DataFrame:
    """How many runs were stopped, and the mean number of epochs they trained, by arm and share of the data."""
    trained, shares = epochs_trained(runs), sorted(runs.fractions, reverse=True)

    def told(own: pd.DataFrame) -> str:
        return f"{int(own['stopped'].sum())} of {len(own)}; {own['epochs'].mean():.2f}" if len(own) else tables.NOT_RUN

    columns = {"data (%)": [*(f"{100 * share:g}" for share in shares), "all"]}
    for scope, factor in every_arm(runs):
        own = trained[(trained["scope"] == scope) & (trained["factor"] == factor)]
        rows = [told(own[own["fraction"] == share]) for share in shares]
        columns[f"{named(scope, factor)}, at most {EPOCHS[scope]}"] = [*rows, told(own)]
    return shown(pd.DataFrame(columns), "data (%)")
