"""What the chapter on the reader's own model draws and tabulates.

Not here: its models and their training, which stand in the chapter's cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from athena.book import figures
from athena.book.tables import shown, signed
from athena.relevance import Relevance

__all__ = ["account", "channels", "networks_shown", "refused_told"]


def account(title: str, explained: Relevance) -> dict[str, str]:
    """What was shared out, what reaches the input, and what was kept on the way; the two add up to the first."""
    table = explained.conservation()
    start, kept = explained.output.sum().item(), explained.input.sum().item()
    lost = table[["bias", "stabiliser"]].to_numpy().sum()
    assert abs(start - kept - lost) < 1e-3 * max(abs(start), abs(lost))
    return {
        "model": title,
        "output explained": _minus(f"{start:.2f}"),
        "reaches the input": _minus(f"{kept:.2f}"),
        "kept on the way": _minus(f"{lost:.2f}"),
    }


def channels(picture: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """A picture (1, 1, h, w) and seven heat maps of its shape with their sums, each on a scale of its own."""
    with figures.style():
        figure, axes = figures.canvas(1, 8, (8.4, 1.6))
        axes[0].imshow(picture[0, 0], cmap="Greys")
        axes[0].set_title("the picture", fontsize=8)
        for axis, (title, part) in zip(axes[1:], maps.items(), strict=True):
            limit = part.abs().max().item() or 1
            axis.imshow(part[0, 0], cmap=figures.RELEVANCE, vmin=-limit, vmax=limit)
            axis.set_title(f"{title}\n{signed(part.sum().item())}", fontsize=8)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
    return figure


def networks_shown(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What reaches the input of each network, for reading; rows: of ``results/architectures.json``."""
    columns = {
        "network": [row["network"] for row in rows],
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "reaches the input": ["refused" if "refused" in row else _minus(f"{row['reaches']:.2g}") for row in rows],
        "missing": ["" if "refused" in row else _minus(f"{row['account']:.0e}") for row in rows],
        "size": ["" if "refused" in row else _minus(f"{row['size']:.2g}") for row in rows],
    }
    return shown(pd.DataFrame(columns), "network")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def refused_told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each network that is refused; rows as for `networks_shown`."""
    return [f"{row['network']} is refused: {row['refused']}." for row in rows if "refused" in row]
