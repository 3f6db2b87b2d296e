"""What the chapter on the factors tabulates and says: the first experiment, collapses, seconds, and the claims.

Not here: the comparisons themselves (`athena.statistics`), and sentences with their conditions, which stand in the
chapter's cells.
"""

from collections.abc import Mapping

import pandas as pd

from athena.book.tables import detectable, percent, points, possible, shown, signed, verdict
from athena.experiments import statistics

__all__ = ["STARTS", "claims_shown", "collapses_told", "first_shown", "first_told", "seconds_shown"]

STARTS = {"softmax": "probabilities", "logits": "all logits", "predicted": "the predicted logit"}
"""What relevance starts from, in words."""
CLAIMS = (
    ("C5", "largest gain", (1.0, 0.1), (0.0, 1.0)),
    ("C6", "largest gain", (2.0, 0.2), (0.0, 1.0)),
    ("C7", "mean gain", (2.0, 0.2), (0.0, 1.0)),
    ("C8", "largest gain up to 30 %", (10.0, 1.0), (0.0, 0.3)),
    ("C9", "mean gain up to 30 %", (10.0, 1.0), (0.0, 0.3)),
    ("C10", "collapse above 30 %", (10.0, 1.0), (0.3, 1.0)),
)
"""Of section 7.1: name, what is claimed, the factor of the text and a tenth of it, above and up to which share."""


def first_shown(comparison: pd.DataFrame, claims: pd.Series) -> pd.DataFrame:
    """Each reading of the first experiment under the thesis's numbers, for reading.

    Args:
        comparison: of `statistics.compare`, with columns factor and target.
        claims: the number of each claim by its name.
    """
    theirs, plain = claims["C1"], claims["C2"]
    columns = {
        "reading": [
            "thesis",
            *(
                f"factor {row['factor']:g}, from {STARTS.get(row['target'], row['target'])}"
                for _, row in comparison.iterrows()
            ),
        ],
        "verdict": ["", *(verdict(row) for _, row in comparison.iterrows())],
        "difference": [f"{theirs - plain:+.2f}", *(points(row) for _, row in comparison.iterrows())],
        "plain": [f"{plain:.2f}", *(f"{100 * value:.2f}" for value in comparison["baseline_mean"])],
        "guided": [f"{theirs:.2f}", *(f"{100 * value:.2f}" for value in comparison["mean"])],
        "p": ["", *(f"{value:.3f}" for value in comparison["p"])],
        "p (Holm)": ["", *(f"{value:.3f}" for value in comparison["p_holm"])],
        "could be shown": ["", *(detectable(row) for _, row in comparison.iterrows())],
    }
    return shown(pd.DataFrame(columns), "reading")


def first_told(comparison: pd.DataFrame, claims: pd.Series) -> str:
    """What the readings of the first experiment show beside the thesis; arguments as for `first_shown`."""
    verdicts = [statistics.verdict(row) for _, row in comparison.iterrows()]
    gains, losses = verdicts.count("gain"), verdicts.count("loss")
    most = comparison.loc[comparison["difference"].abs().sort_values(kind="stable").index[-1]]
    found = ", ".join(
        f"{count or 'none'} of the four readings {'show' if count > 1 else 'shows'} {what}"
        for count, what in ((gains, "a gain"), (losses, "a loss"))
    )
    return (
        f"The thesis reports {claims['C1'] - claims['C2']:+.2f} points and no interval. Here, "
        f"{found}; the mean difference furthest from zero is {points(most)} points. Plain training reaches "
        f"{percent(comparison['baseline_mean'].iloc[0], 2)} against the thesis's {claims['C2']:.2f} %."
    )


def collapses_told(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Where each start of relevance loses more than 5 points, a list.

    Args:
        table: of `statistics.compare`, with columns target, factor and fraction.
        names: what to call each target.
    """
    collapse = table[table["difference"] < -0.05]
    lines = []
    for target, name in names.items():
        own = collapse[collapse["target"] == target]
        if own.empty:
            lines.append(f"- **{name}**: no cell loses more than 5 points.")
            continue
        cells = ", ".join(
            f"factor {factor:g} at {', '.join(f'{100 * share:g} %' for share in sorted(part['fraction'].unique()))}"
            for factor, part in own.groupby("factor")
        )
        lines.append(
            f"- **{name}**: loses more than 5 points, for some ε, with {cells} of the data; "
            f"at worst {signed(100 * own['difference'].min(), 1)} points."
        )
    return "\n".join(lines)


def seconds_shown(runs: pd.DataFrame, timed: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Seconds of training and their ratio at each share of the data, beside the thesis's, for reading.

    Args:
        runs: as `athena.results` gives them, of one guided factor and of plain training.
        timed: of `statistics.ratio`, of the same.
        published: the thesis's table of training times.
    """
    seconds = runs.assign(guided=runs["factor"] != 0).groupby(["fraction", "guided"])["seconds"].mean().unstack()
    both = seconds.join(timed.set_index("fraction")["ratio"]).reset_index()
    both = both.assign(percent=(100 * both["fraction"]).round().astype(int)).merge(published, on="percent", how="outer")
    both = both.sort_values("percent", ascending=False)
    columns = {
        "data (%)": both["percent"],
        "plain (s)": both[False].map("{:.1f}".format),
        "guided (s)": both[True].map("{:.1f}".format),
        "ratio": both["ratio"].map("{:.2f}".format),
        "thesis plain (s)": both["seconds_standard"].map("{:.2f}".format),
        "thesis LRP (s)": both["seconds_lrp"].map("{:.2f}".format),
        "thesis ratio": (both["seconds_lrp"] / both["seconds_standard"]).map("{:.2f}".format),
    }
    return shown(pd.DataFrame(columns).replace("nan", ""), "data (%)")


def claims_shown(runs: pd.DataFrame, claims: pd.Series) -> pd.DataFrame:
    """Each claim of section 7.1 beside what was measured at its factor and at a tenth of it, for reading.

    Args:
        runs: as `athena.results` gives them, of all factors.
        claims: the number of each claim by its name.
    """
    rows = []
    for name, what, scales, shares in CLAIMS:
        theirs = "yes" if name == "C10" else f"{claims[name]:+.2f}"
        row = {"claim": name, "of": f"factor {scales[0]:g}: {what}", "thesis": theirs}
        for scale, factor in zip(("here", "here, a tenth of the factor"), scales, strict=True):
            found = _measured(runs[runs["factor"].isin([0, factor])], what, *shares)
            row[scale] = f"{points(possible(found))}, {found['n']} pairs"
        rows.append(row)
    return shown(pd.DataFrame(rows), "claim")


def _measured(runs: pd.DataFrame, what: str, above: float, upto: float) -> pd.Series:
    part = runs[runs["fraction"].between(above, upto, inclusive="right")]
    if what.startswith("mean"):
        return statistics.compare(part, over="fraction").iloc[0]
    cells = statistics.compare(part).sort_values("difference", ascending=what.startswith("collapse"), kind="stable")
    return cells.iloc[0]
