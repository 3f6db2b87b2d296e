"""The runs of the two chapters on CIFAR-10: collecting them, comparing them, and saying which they are.

Not here: the tables and sentences of the one without early stopping (`athena.book.epochs`) and of the one with it
(`athena.book.stopping`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from athena import experiments
from athena.book import tables
from athena.experiments import Study, data, statistics
from athena.experiments.run import Run

__all__ = [
    *("CHANCE", "FILES", "NAMES", "Arm", "Collected", "after", "arm", "arm_name", "as_asked", "collect", "compared"),
    *("elsewhere", "gathered", "open_runs", "studies", "tested", "thesis"),
]

Arm = tuple[str, float]
"""A guided arm: the layers that are guided, as the scope of a `Run`, and the factor."""
NAMES = {"all": "whole network", "linear": "linear part"}
FILES = {"all": "whole", "linear": "linear"}
"""By scope, what tables call it, and what it is called in the names of studies."""
CHANCE = 0.105
"""A network that scores less on the ten classes of CIFAR-10 guesses one class."""


@dataclass(frozen=True)
class Collected:
    """The runs of a chapter.

    Attributes:
        frame: what has run, as `athena.results` gives it. With early stopping, `monitor` is what a run was stopped by,
            or "none".
        arms: the guided arms that were asked for.
        fractions: the shares of the data that were asked for.
        used: the data set; the stand-in where the one asked for is not here.
        as_planned: whether the studies plan all that was asked for. Then nothing is trained here.
        wanted: by scope, the runs that belong to the chapter; a planned run may still be open.
    """

    frame: pd.DataFrame
    arms: tuple[Arm, ...]
    fractions: tuple[float, ...]
    used: str
    as_planned: bool
    wanted: Mapping[str, Sequence[Run]]

    @property
    def waiting(self) -> set[str]:
        """The keys of the runs that are still open."""
        return {run.key for runs in self.wanted.values() for run in runs} - set(self.frame["key"])

    @property
    def there(self) -> list[Arm]:
        """The guided arms of which something has run."""
        found = set(zip(self.frame["scope"], self.frame["factor"], strict=True))
        return [arm for arm in self.arms if arm in found]

    @property
    def machines(self) -> str:
        """What the runs were trained on."""
        return ", ".join(sorted(self.frame["device"].unique()))


def studies(ending: str = "") -> dict[str, Study]:
    """By scope the two studies of CIFAR-10 whose files end so: ``""`` or ``"-early-stopping"``."""
    return {
        scope: Study.read(experiments.root() / "studies" / f"cifar-{name}{ending}.toml")
        for scope, name in FILES.items()
    }


def as_asked(
    asked: Mapping[str, Sequence[Run]], plans: Mapping[str, Study], dataset: str
) -> tuple[bool, dict[str, list[Run]]]:
    """Whether the studies plan all that is asked for, and the runs that this makes, by scope.

    A study plans a run where it has one of the same data set, factor, share of the data and monitor, whatever the seed
    and the precision. If it plans all of them, its own runs are wanted. If not, all are trained where the page is made:
    in float32, since bfloat16 may be slow there, and on the stand-in where the data set is not at hand.
    """
    known = {scope: set(plan.runs) for scope, plan in plans.items()}
    planned = {scope: {_cell(run) for run in own} for scope, own in known.items()}
    if all(_cell(run) in planned[scope] for scope, runs in asked.items() for run in runs):
        return True, {scope: [run for run in runs if run in known[scope]] for scope, runs in asked.items()}
    used = data.at_hand(dataset)
    return False, {
        scope: [replace(run, dataset=used, precision="float32") for run in runs] for scope, runs in asked.items()
    }


def gathered(study: Study, runs: Sequence[Run], as_planned: bool) -> pd.DataFrame:
    """Runs that a study plans are read from its store, as far as it holds them; others are trained now."""
    if not as_planned:
        return experiments.collect(study, runs)
    held = study.store.runs()
    return experiments.frame([held[run.key] for run in runs if run.key in held])


def collect(arms: Sequence[Arm], fractions: Sequence[float], seeds: int, dataset: str) -> Collected:
    """The runs without early stopping, with their plain partners: what the studies plan, or else trained now.

    Args:
        arms: the guided arms.
        fractions: of the training data.
        seeds: how many, from 0 on.
        dataset: what to train on.
    """
    plans, asked = studies(), {}
    for scope in dict.fromkeys(scope for scope, _ in arms):
        factors = [0, *(factor for own, factor in arms if own == scope)]
        base = replace(plans[scope].base, dataset=dataset)
        asked[scope] = experiments.grid(base, factor=factors, fraction=fractions, seed=range(seeds))
    as_planned, wanted = as_asked(asked, plans, dataset)
    parts, known = [], set[str]()
    for scope, runs in wanted.items():  # both studies have the plain runs
        new = [run for run in runs if run.key not in known]
        parts.append(gathered(plans[scope], new, as_planned))
        known.update(parts[-1]["key"])
    whole = pd.concat([part for part in parts if len(part)] or parts[:1]).reset_index(drop=True)
    used = dataset if whole.empty else whole["dataset"].iloc[0]
    return Collected(whole, tuple(arms), tuple(fractions), used, as_planned, wanted)


def _cell(run: Run) -> tuple[str, float, float, str | None]:
    return run.dataset, run.factor, run.fraction, run.monitor


def thesis(number: str, used: str = "cifar10") -> pd.DataFrame:
    """A table of accuracies of the thesis, by percent of the data; empty where other data than its own were used."""
    table = experiments.published("accuracy").query("dataset == 'cifar10'")
    table = table[(table["table"] == number) & (used == "cifar10")]
    return table.set_index("percent", drop=False).rename_axis(None)


def elsewhere(runs: Collected, dataset: str, which: str = "") -> str:
    """The notice of a page whose runs are of other data than the chapter's own; `which` says more of the runs."""
    return (
        "> **These are not the chapter's own numbers.** "
        + ("CIFAR-10 is not on this machine. " if dataset == "cifar10" else "")
        + f"All {len(runs.frame)} runs{which} were trained on `{runs.used}` instead, digits in front of photographs, "
        "the small set of colour images that needs no download. The thesis's numbers are left out where they would "
        "stand beside them."
    )


def open_runs(runs: Collected) -> str:
    """How many runs are still open; nothing where none is."""
    if not runs.waiting:
        return ""
    return (
        f"**{len(runs.waiting)} runs of the two studies are still open**, further seeds and cells that say "
        f"*{tables.NOT_RUN}*; nothing is put in their place."
    )


def after(frame: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """The runs as if each had ended after so many epochs, which is what it then was."""
    return frame.assign(accuracy=frame["accuracies"].str[epochs - 1])


def arm(frame: pd.DataFrame, scope: str, factor: float) -> pd.DataFrame:
    """The runs of one guided arm and their plain partners."""
    own = (frame["factor"] == 0) | ((frame["scope"] == scope) & (frame["factor"] == factor))
    return statistics.paired(frame[own])


def arm_name(scope: str, factor: float) -> str:
    """What tables call a guided arm."""
    return f"{NAMES[scope]}, factor {factor:g}"


def compared(
    frame: pd.DataFrame, baseline: tuple[str, object] = ("factor", 0), over: str | None = None
) -> pd.DataFrame:
    """`athena.statistics.compare` at each share of the data, or `over` them; no row where there is no pair at all.

    Pairs may be of two versions of the package: where both trained the same run, they agree to the last digit.
    """
    name, value = baseline
    one, other = (
        set(zip(side["fraction"], side["seed"], strict=True))
        for side in (frame[frame[name] == value], frame[frame[name] != value])
    )
    if not one & other:
        return pd.DataFrame(columns=["fraction", *NOTHING], dtype=float)
    table = statistics.compare(frame, {name: value}, over=over, any_code=True)
    return table if over else tables.by_share(table, frame)


NOTHING = ("n", "baseline_mean", "mean", "difference", "low", "high", "sd", "p", "p_holm", "p_least", "detectable")


def tested(verdicts: Sequence[str]) -> str:
    """What the rule of the book says of cells that are corrected together."""
    rule = (
        "By the rule of this book a gain needs an interval above zero and a corrected p below 0.05, and has to beat "
        "shuffled relevance, gradient times activation and a plain run of equal cost as well. "
    )
    if not verdicts:
        return f"{rule}No cell has been measured so far, so nothing can be said yet."
    gains, losses, few = (verdicts.count(found) for found in ("gain", "loss", "cannot be tested"))
    if few == len(verdicts):
        return f"{rule}None of {len(verdicts)} cells has pairs enough to be tested."
    tested = f"Of {len(verdicts)} cells" + (f" {few} have too few pairs to be tested. Of the others" if few else "")
    found = f"{gains or 'none'} pass the first half as a gain and {losses or 'none'} as a loss"
    return f"{rule}{tested}, corrected over all of them, {found if gains or losses else 'none shows an effect'}."
