"""The parameters of a chapter, checked before anything is computed with them.

papermill takes whatever value it is given, and goes on with the default of a parameter whose name is misspelt.
"""

import ast
import difflib
from typing import Any

from IPython import get_ipython

from athena import rules
from athena.experiments import listed, root
from athena.experiments.training import Run

__all__ = ["ParameterError", "check", "rule_of"]

FIELDS = {"dataset": "dataset", "seed": "seed", "factor": "factor", "fraction": "fraction", "colour_width": "fraction"}
"""Parameters that are what a field of a `Run` is, with the field."""
LISTS = {"factors": "factor", "whole": "factor", "linear": "factor", "fractions": "fraction", "peeked": "fraction"}
"""Parameters that are lists of such values."""
MAY_BE_EMPTY = ("whole", "linear", "peeked")
COUNTS = (
    "batch",
    "collapse_steps",
    "colour_epochs",
    "draws",
    "epochs",
    "images",
    "marked",
    "samples",
    "scored",
    "seeds",
    "steps",
    "timed_steps",
)


class ParameterError(ValueError):
    """A chapter was given a parameter that it does not have, or a value that makes no sense."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: one sentence."""
        return [f"{type(self).__name__}: {self}"]


def check(**given: Any) -> None:
    """Refuses parameters that a chapter does not have, and values that make no sense.

    Args:
        given: all parameters of the chapter by their names, with their values.

    Raises:
        ParameterError: papermill was given another name; or a value is of no use. The message says which, and what to
            give.
    """
    for name in _injected():
        if name not in given:
            near = difflib.get_close_matches(name, given, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ParameterError(f"this chapter has no parameter {name}: {hint}It has {', '.join(given)}")
    for name, value in given.items():
        try:
            _check_one(name, value)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"{name} = {value!r}: {error}") from None
    if {"whole", "linear"} <= given.keys() and not listed(given["whole"]) and not listed(given["linear"]):
        raise ParameterError("whole = [], linear = []: one of them must have at least one factor")


def rule_of(value: str | float) -> rules.Rule:
    """A rule by its name, such as ``"Gamma(0.25)"``, or the epsilon of LRP-epsilon.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(value, str):
        return rules.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("it must be a rule such as 'Gamma(0.25)', or the epsilon of LRP-epsilon")
    return rules.Epsilon(float(value))


def _injected() -> list[str]:
    """The names that papermill has set, in the cell that it has put after the parameters."""
    shell = get_ipython()
    cells = [] if shell is None else [cell for cell in shell.user_ns.get("In", ()) if cell.startswith("# Parameters\n")]
    lines = [line for cell in cells for line in ast.parse(cell).body if isinstance(line, ast.Assign)]
    return [target.id for line in lines for target in line.targets if isinstance(target, ast.Name)]


def _check_one(name: str, value: Any) -> None:
    if name in FIELDS:
        Run(**{FIELDS[name]: value})
    elif name in LISTS:
        values = listed(value)
        if not values and name not in MAY_BE_EMPTY:
            raise ValueError("it must have at least one value")
        for each in values:
            Run(**{LISTS[name]: each})
    elif name in COUNTS:
        _whole(value, 1)
    elif name == "digit_index":
        _whole(value, 0)
    elif name == "digit":
        _whole(value, 0, 9)
    elif name == "digits":
        if not (digits := listed(value)):
            raise ValueError("it must have at least one digit")
        for digit in digits:
            _whole(digit, 0, 9)
    elif name == "rule":
        rule_of(value)
    elif name == "study":
        known = sorted(path.stem for path in (root() / "studies").glob("*.toml"))
        if value not in known:
            raise ValueError(f"it must be one of the studies {', '.join(known)}")
    else:
        raise AssertionError(f"athena.book.parameters does not know what values {name} may have")


def _whole(value: Any, least: int, most: int | None = None) -> None:
    """Raises unless the value is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ValueError(f"it must be a whole number, {f'{least} or more' if most is None else f'{least} to {most}'}")
