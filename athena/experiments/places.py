"""Where the project's own files lie."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def root() -> Path:
    """The folder that holds ``studies/`` and ``results/``: the checkout of this package, else the current folder."""
    return CHECKOUT if (CHECKOUT / "studies").is_dir() else Path.cwd()
