"""The propagation rules of LRP: how an affine layer shares out relevance among its inputs.

For an affine layer ``z_k = sum_j a_j w_jk + b_k`` whose output carries the relevance ``R_k``, every rule here is

    R_j = sum_k c_jk s_k        with contributions c_jk and s_k = R_k / (sum_j c_jk + what the bias contributes)

and says what the contributions are: ``a_j w_jk`` itself (`Zero`, `Epsilon`), that with its positive and negative parts
weighed differently (`Gamma`, `AlphaBeta`, `ZPlus`), or something that does not vanish with ``a_j`` (`ZBox`, `WSquare`,
`Flat`). The bias takes part in the sum and keeps its share. Which rule suits which layer: Montavon et al. 2019,
"Layer-Wise Relevance Propagation: An Overview"; its advice is what the presets at the end give.

A rule declares and divides; `athena.propagation.affine` runs the sums over the network's own operations.
"""

import ast
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "AlphaBeta",
    "Epsilon",
    "EpsilonAlpha2Beta1",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "Flat",
    "Gamma",
    "Preset",
    "Rule",
    "RuleChoice",
    "RuleFor",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "parse",
]


class Sums(NamedTuple):
    """The sums ``sum_j c_jk + bias_k`` a rule asks for beside ``z``: of which inputs, by which weights, which biases.

    Attributes:
        inputs: one or two tensors, each in the shape of ``a``.
        weights: for each sum, one weight for each of `inputs`.
        biases: for each sum, its bias, or None.
    """

    inputs: Sequence[Tensor]
    weights: Sequence[Sequence[Tensor]]
    biases: Sequence[Tensor | None]


class Shares(NamedTuple):
    """The ``s_k`` by which contributions are multiplied: those to ``z`` itself, None for 0, and those to each sum."""

    own: Tensor | None
    others: Sequence[Tensor]


@dataclass(frozen=True)
class Rule:
    """What every rule declares: no stabiliser, and contributions ``a_j w_jk``, unless it says otherwise."""

    absolute: ClassVar[bool] = False
    """Whether inputs that are 0 may be given relevance."""
    asks_for_sums: ClassVar[bool] = False
    """Whether contributions are others than ``a_j w_jk``, so that `sums` and `share` have to be called."""

    def __init_subclass__(cls) -> None:
        cls.asks_for_sums = cls.sums is not Rule.sums

    @property
    def stabiliser(self) -> float:
        """``epsilon`` in ``s = R / (z + epsilon sign z)``, in the unit of ``z``, at least 0."""
        return 0.0

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums | None:
        """The sums that `share` needs beside ``z``. None: contributions are ``a_j w_jk``."""
        return None

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """Divides `relevance`, that of ``z``, by the sums that were asked for; all in the shape of ``z``.

        `relevance` is the rule's own, to be written over.
        """
        raise NotImplementedError(f"{self} asks for no sums")

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
    """LRP-gamma (thesis 3.6.2 c): contributions that speak for the output count ``1 + gamma`` times.

    For outputs above 0 these are the positive ones, which with inputs of at least 0 is ``w' = w + gamma max(w, 0)``,
    the formula of the thesis. So that inputs and outputs may have any sign, the negative contributions are the ones
    favoured where the output is below 0 (Andéol et al. 2021).

    Args:
        gamma: without unit, at least 0; 0 is LRP-0.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        _at_least_zero("Gamma", "gamma", self.gamma)

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """``zg = z + gamma z+``, of which ``z+`` are the positive contributions."""

        def favouring(part: Tensor) -> Tensor:
            return part.mul_(self.gamma).add_(weight)

        weights = [favouring(weight.clamp(min=0))]
        inputs = _by_sign(a)
        if len(inputs) == 2:
            weights.append(favouring(weight.clamp(max=0)))
        return Sums(inputs, [weights], [None if bias is None else bias + self.gamma * bias.clamp(min=0)])

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``s = R / zg`` for ``z >= 0``, else ``R / (z + gamma z-)``, where ``z + gamma z- = (2 + gamma) z - zg``."""
        (favoured,) = sums
        if not (_any_below_zero(z) and bool((relevance.ne(0) & z.lt(0)).any())):  # as below a ReLU
            return Shares(None, [_quotient(relevance, favoured)])
        below = z < 0
        s = _quotient(relevance, torch.where(below, (2 + self.gamma) * z - favoured, favoured))
        return Shares(torch.where(below, (2 + self.gamma) * s, 0), [torch.where(below, -s, s)])


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """LRP-alpha-beta (Bach et al. 2015): alpha parts for the positive contributions, less beta for the negative ones.

    Args:
        alpha, beta: without unit, at least 0, ``alpha - beta = 1``.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        _at_least_zero("AlphaBeta", "alpha", self.alpha)
        _at_least_zero("AlphaBeta", "beta", self.beta)
        if not math.isclose(self.alpha - self.beta, 1.0):
            raise ValueError(f"AlphaBeta(alpha={self.alpha}, beta={self.beta}): alpha - beta must be 1")

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """That of the positive and, for beta above 0, that of the negative contributions."""
        return _contributions(a, weight, bias, negative=self.beta > 0)

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``alpha R / z+`` and ``- beta R / z-``."""
        factors = (self.alpha, -self.beta)
        parts = [relevance.clone() for _ in sums]
        return Shares(None, [_quotient(*of).mul_(factor) for *of, factor in zip(parts, sums, factors, strict=False)])


@dataclass(frozen=True)
class ZPlus(Rule):
    """The z-plus rule (Montavon et al. 2017): positive contributions alone; alpha-beta with 1 and 0."""

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """That of the positive contributions."""
        return _contributions(a, weight, bias, negative=False)

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``R / z+``."""
        return Shares(None, [_quotient(relevance, sums[0])])


@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """The z-box rule (Montavon et al. 2017), for inputs that lie in a box, as pixels do: a first layer's rule.

    Contributions ``a_j w_jk - low_j max(w_jk, 0) - high_j min(w_jk, 0)``; the bias cancels.

    Args:
        low, high: the least and the largest value an input can have, in its unit. Numbers, or tensors that broadcast
            to a sample, such as (channels, 1, 1).
    """

    low: float | Tensor
    high: float | Tensor

    absolute: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not bool(torch.all(torch.as_tensor(self.low) < torch.as_tensor(self.high))):
            raise ValueError(f"ZBox(low={self.low}, high={self.high}): low must be below high")

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """``sum_j low_j w+_jk + high_j w-_jk``, with the bias."""
        try:
            ends = [torch.as_tensor(end).to(a).expand_as(a) for end in (self.low, self.high)]
        except RuntimeError as error:
            raise ValueError(f"{self} does not fit inputs of shape {tuple(a.shape)}: {error}") from None
        return Sums(ends, [[weight.clamp(min=0), weight.clamp(max=0)]], [bias])

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``s = R / (z - sum)``, by contributions to ``z``, and ``-s`` by those to the sum."""
        s = _quotient(relevance, z - sums[0])
        return Shares(s, [-s])


@dataclass(frozen=True)
class WSquare(Rule):
    """The w-square rule (Montavon et al. 2017): contributions ``w_jk ** 2``, for first layers with unbounded inputs."""

    absolute: ClassVar[bool] = True

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """``sum_j w_jk ** 2 + b_k ** 2``."""
        return Sums([torch.ones_like(a)], [[weight.square()]], [None if bias is None else bias.square()])

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``R / sum``."""
        return Shares(None, [_quotient(relevance, sums[0])])


@dataclass(frozen=True)
class Flat(Rule):
    """The flat rule (Lapuschkin et al. 2019): every input of a neuron gets the same; shows where, not what."""

    absolute: ClassVar[bool] = True

    def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
        """How many inputs there are."""
        return Sums([torch.ones_like(a)], [[torch.ones_like(weight)]], [None])

    def share(self, relevance: Tensor, z: Tensor, sums: Sequence[Tensor]) -> Shares:
        """``R / sum``."""
        return Shares(None, [_quotient(relevance, sums[0])])


@dataclass(frozen=True)
class Preset:
    """A rule for each kind of layer.

    Attributes:
        linear, convolutional: the rules of these layers.
        first: that of layers that stand before all others, by whatever kind they are; None for no exception.
    """

    linear: Rule = field(init=False)
    convolutional: Rule = field(init=False)
    first: Rule | None = field(init=False, default=None)

    def _give(self, **rules: Rule) -> None:
        for name, rule in rules.items():
            object.__setattr__(self, name, rule)


@dataclass(frozen=True)
class EpsilonPlus(Preset):
    """`Epsilon` for linear layers, `ZPlus` for convolutions."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        self._give(linear=Epsilon(self.epsilon), convolutional=ZPlus())


@dataclass(frozen=True)
class EpsilonAlpha2Beta1(Preset):
    """`Epsilon` for linear layers, `AlphaBeta` with 2 and 1 for convolutions."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        self._give(linear=Epsilon(self.epsilon), convolutional=AlphaBeta(2.0, 1.0))


@dataclass(frozen=True, eq=False)
class EpsilonGammaBox(Preset):
    """`Epsilon` for linear layers, `Gamma` for convolutions, `ZBox` for the first layer.

    Args:
        low, high: as for `ZBox`.
        epsilon, gamma: as for `Epsilon` and `Gamma`.
    """

    low: float | Tensor
    high: float | Tensor
    epsilon: float = 1e-6
    gamma: float = 0.25

    def __post_init__(self) -> None:
        self._give(linear=Epsilon(self.epsilon), convolutional=Gamma(self.gamma), first=ZBox(self.low, self.high))


RuleFor = Rule | Preset | Callable[[str, nn.Module], Rule]
"""What can say which rule a layer gets."""


@dataclass(frozen=True)
class RuleChoice:
    """Which rule each affine layer gets: one for all, one by kind of layer, or one by path and module.

    Raises:
        TypeError: `rule` is none of these.
    """

    rule: RuleFor

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule | Preset) and (not callable(self.rule) or isinstance(self.rule, type)):
            raise TypeError(
                f"rule is {self.rule!r}; give a rule such as athena.rules.Epsilon(1e-6), a preset, or a function "
                "(path, module)"
            )

    @functools.cached_property
    def absolute(self) -> bool | None:
        """Whether layers that stand on others have a rule that gives relevance to neurons that are 0; None: unknown."""
        if isinstance(self.rule, Preset):
            return self.rule.linear.absolute or self.rule.convolutional.absolute
        return self.rule.absolute if isinstance(self.rule, Rule) else None

    @property
    def looks_at_layers(self) -> bool:
        """Whether a rule may look at the inputs and outputs of layers."""
        return not isinstance(self.rule, Rule) or self.rule.stabiliser > 0 or self.rule.asks_for_sums

    @property
    def asks_for_paths(self) -> bool:
        """Whether it is a function of a layer's path and module."""
        return not isinstance(self.rule, Rule | Preset)

    def of(self, path: str, module: nn.Module | None, convolutional: bool, first: bool) -> Rule:
        """The rule of a layer.

        Args:
            path, module: of the layer, where the choice `asks_for_paths`.
            convolutional: whether it is a convolution.
            first: whether it stands on no other layer.

        Raises:
            TypeError: what was given chose something else than a rule.
        """
        if isinstance(self.rule, Rule):
            return self.rule
        if isinstance(self.rule, Preset):
            if self.rule.first is not None and first:
                return self.rule.first
            return self.rule.convolutional if convolutional else self.rule.linear
        chosen = self.rule(path, module)  # type: ignore[arg-type]
        if not isinstance(chosen, Rule):
            raise TypeError(f"rule({path!r}, ...) gave {chosen!r}, which is not a rule of athena.rules")
        return chosen


def parse(text: str) -> Rule:
    """Reads a rule as it is written in a study: ``"Zero()"``, ``"Epsilon(1e-6)"``, ``"ZBox(0, 1)"``.

    Raises:
        ValueError: the text is not a rule of this module followed by its numbers.
    """
    rules = {rule.__name__: rule for rule in Rule.__subclasses__()}
    name, _, numbers = text.strip().partition("(")
    try:
        arguments = ast.literal_eval(f"({numbers.removesuffix(')')},)") if numbers.strip(" )") else ()
        return rules[name](*map(float, arguments))
    except (KeyError, MemoryError, OverflowError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        known = ", ".join(f"{name}(...)" for name in sorted(rules))
        raise ValueError(
            f"{text[:100]!r} is not a rule ({error}); write one of {known} with its numbers, such as 'Epsilon(1e-6)'"
        ) from None


def _at_least_zero(rule: str, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{rule}({name}={value}): {name} must be at least 0")


def _by_sign(a: Tensor) -> list[Tensor]:
    """``a`` alone where all of it is at least 0, else its positive part and its negative part."""
    if _any_below_zero(a):
        return [a.clamp(min=0), a.clamp(max=0)]
    return [a]


def _contributions(a: Tensor, weight: Tensor, bias: Tensor | None, negative: bool) -> Sums:
    """The sum of the positive contributions and, where asked for, that of the negative ones."""
    inputs = _by_sign(a)
    up = weight.clamp(min=0)
    down = weight.clamp(max=0) if negative or len(inputs) == 2 else up
    rows = [[up, down], [down, up]]
    biases = [None, None] if bias is None else [bias.clamp(min=0), bias.clamp(max=0)]
    sums = 2 if negative else 1
    return Sums(inputs, [row[: len(inputs)] for row in rows[:sums]], biases[:sums])


def _any_below_zero(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool(tensor.min() < 0)


def _quotient(relevance: Tensor, total: Tensor) -> Tensor:
    """``relevance / total`` in the memory of `relevance`, and 0 where the total has no contributions to share it."""
    if torch.is_grad_enabled():  # with a gradient that is finite
        return (relevance / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)
    return relevance.div_(total).nan_to_num_(0.0, 0.0, 0.0)
