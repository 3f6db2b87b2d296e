"""Attributes that are checked whenever they are set, and the checks."""

import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Setting", "count", "one_of"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute that is checked whenever it is set.

    Args:
        check: a function of the attribute's name, a value and `arguments`, which gives the value back as it is kept,
            or raises.
    """

    def __init__(self, check: Callable[..., T], *arguments: Any) -> None:
        self._check, self._arguments = check, arguments

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        return self if instance is None else vars(instance)[self._name]  # type: ignore[return-value]

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = self._check(self._name, value, *self._arguments)


def one_of(name: str, value: Any, allowed: tuple[Any, ...], otherwise: str = "") -> Any:
    """`value`, if it is one of those allowed; else raises a ValueError that names the argument and its value."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))} {otherwise}".rstrip())
    return value


def count(name: str, value: Any, of: str) -> int:
    """`value` as a whole number of at least 1; else raises a ValueError that names the argument and its value."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of {of}, at least 1")
    return number
