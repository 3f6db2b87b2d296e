"""The propagation rules of LRP: how an affine layer shares out relevance among its inputs.

For an affine layer ``z_k = sum_j a_j w_jk + b_k`` whose output carries the relevance ``R_k = z_k d_k``, a rule
names the weights ``w'`` and the stabiliser ``epsilon`` in

    R_j = a_j sum_k w'_jk R_k / (z'_k + epsilon sign z'_k),    z'_k = sum_j a_j w'_jk + b'_k

with sign 0 = 1. The bias takes part in ``z'`` and keeps its share. A rule only declares; `athena.layers` acts.
"""

import ast
from dataclasses import astuple, dataclass

from torch import Tensor

__all__ = ["Epsilon", "Gamma", "Rule", "Zero", "parse"]


@dataclass(frozen=True)
class Rule:
    """What every rule declares: no stabiliser and the layer's own weights, unless it says otherwise."""

    @property
    def stabiliser(self) -> float:
        """``epsilon`` above, in the unit of ``z``, at least 0."""
        return 0.0

    def weights(self, weight: Tensor) -> Tensor | None:
        """``w'`` for a weight or a bias of any shape, without graph, or None where it is the layer's own."""
        return None

    def __str__(self) -> str:
        """The rule as it is written in a study, ``Epsilon(1e-06)``; `parse` reads it back."""
        return f"{type(self).__name__}({', '.join(map(repr, astuple(self)))})"


@dataclass(frozen=True)
class Zero(Rule):
    """LRP-0, the basic rule (thesis 3.6.2 a): shares in proportion to ``a_j w_jk``.

    On a network of affine layers, ReLU and pooling it equals gradient times input.
    """


@dataclass(frozen=True)
class Epsilon(Rule):
    """LRP-epsilon (thesis 3.6.2 b): the stabiliser takes the share ``epsilon / (|z| + epsilon)`` of weak outputs.

    Args:
        epsilon: in the unit of the layer's output, at least 0.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _at_least_zero("Epsilon", "epsilon", self.epsilon)

    @property
    def stabiliser(self) -> float:
        """`epsilon`."""
        return self.epsilon


@dataclass(frozen=True)
class Gamma(Rule):
    """LRP-gamma (thesis 3.6.2 c): ``w' = w + gamma max(w, 0)``, the bias alike, favours what speaks for an output.

    Args:
        gamma: without unit, at least 0; 0 is LRP-0.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        _at_least_zero("Gamma", "gamma", self.gamma)

    def weights(self, weight: Tensor) -> Tensor:
        """``w + gamma max(w, 0)``."""
        weight = weight.detach()
        return weight.clamp(min=0).mul_(self.gamma).add_(weight)


def parse(text: str) -> Rule:
    """Reads a rule as it is written in a study: ``"Zero()"``, ``"Epsilon(1e-6)"``, ``"Gamma(0.25)"``.

    Raises:
        ValueError: the text is not a rule of this module followed by its numbers.
    """
    rules = {rule.__name__: rule for rule in Rule.__subclasses__()}
    name, _, numbers = text.strip().partition("(")
    try:
        arguments = ast.literal_eval(f"({numbers.removesuffix(')')},)") if numbers.strip(" )") else ()
        return rules[name](*map(float, arguments))
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        known = ", ".join(f"{name}(...)" for name in sorted(rules))
        raise ValueError(
            f"{text!r} is not a rule ({error}); write one of {known} with its numbers, such as 'Epsilon(1e-6)'"
        ) from None


def _at_least_zero(rule: str, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{rule}({name}={value}): {name} must be at least 0")
