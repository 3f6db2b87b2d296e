"""What one training run is: everything that decides its outcome. Not here: the training itself (`training`)."""

import functools
import hashlib
import json
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from athena import guidance, rules
from athena.experiments import controls, data, marks, models, uses

__all__ = ["CHOICES", "HELD_OUT", "NUMBERS", "OPTIMIZERS", "SINCE", "Run"]

HELD_OUT = 0.1
"""The share of what is trained on that early stopping, a choice of settings, or learned factors are decided by."""
OPTIMIZERS: dict[str, Any] = {
    "adam": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
"""What makes an optimiser of parameters, ``lr`` and ``weight_decay``. AdamW without weight decay is Adam."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "model": tuple(models.MODELS),
    "dataset": data.NAMES,
    "target": ("predicted", "softmax", "logits", "label"),
    "normalise": guidance.NORMALISE,
    "granularity": guidance.GRANULARITY,
    "control": (None, *controls.CONTROLS),
    "schedule": ("constant", "onecycle"),
    "tested": ("each epoch", "at the end"),
    "precision": ("float32", "tf32", "bfloat16"),
    "monitor": (None, "validation", "test"),
    "restore_best": (True, False),
    "optimizer": tuple(OPTIMIZERS),
    "scored_on": ("test", "validation"),
    "use": (None, *marks.LOSSES, *uses.CHOICES, *uses.GRADIENTS, *uses.LOSSES),
    "score": (None, *uses.SCORES),
}
FLOAT32_MAX = torch.finfo(torch.float32).max
NUMBERS: dict[str, tuple[type, float, float]] = {
    "fraction": (float, 0.0, 1.0),
    "factor": (float, -FLOAT32_MAX, FLOAT32_MAX),
    "seed": (int, 0, 2**32 - 1),  # PyTorch's generator takes no more than 32 bits of it
    "epochs": (float, 0.0, 1e6),
    "batch_size": (int, 1, 2**31 - 1),
    "learning_rate": (float, 0.0, FLOAT32_MAX),
    "window": (float, 0.0, 1e6),
    "patience": (float, 0.0, 1e6),
    "threads": (int, 1, 1024),
    "every": (int, 1, 2**31 - 1),
    "smoothing": (float, 0.0, 1.0),
    "weight_decay": (float, 0.0, FLOAT32_MAX),
    "strength": (float, 0.0, FLOAT32_MAX),
    "shifts": (int, 0, 32),
    "marked": (int, 0, 2**31 - 1),
    "learn_every": (int, 0, 2**31 - 1),
}
"""The fields that are numbers: of which kind, the least and the most."""
SINCE: dict[str, Any] = {
    "every": 1,
    "control": None,
    "smoothing": 0.0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "tested": "each epoch",
    "use": None,
    "strength": 1.0,
    "score": None,
    "optimizer": "adam",
    "shifts": 0,
    "scored_on": "test",
    "marked": 0,
    "learn_every": 0,
}
"""Fields that came after the first results, with the value that all runs had before."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one training run on one kind of machine.

    Attributes:
        model: ``"mlp"`` or ``"cnn"``, thesis table 6.1, or ``"small"``.
        dataset: a name of `athena.data.NAMES`.
        fraction: the share of the training set, in (0, 1].
        factor: the LRP factor; 0 is plain training.
        seed: of the initial weights, the subset and the order of the batches, all three; from 0 to 2**32 - 1.
        epochs: passes over the subset; 3.6 are three passes and the first 60 % of the batches of a fourth.
        rule: a rule of `athena.rules` as text, ``"Epsilon(1e-06)"``.
        target, scope, normalise, granularity: as for `athena.Guidance`; target ``"predicted"`` is its None.
        batch_size, learning_rate: of the optimiser. The thesis names neither. With a schedule the rate is its highest.
        precision: ``"float32"``; ``"tf32"``, the same but for convolutions on a GPU, which multiply in TF32, as
            PyTorch lets them unless told otherwise; ``"bfloat16"`` for autocast.
        monitor: what early stopping looks at: None for no early stopping; ``"validation"``, a tenth of the training
            set, held out, the same for every run (fractions are then of the rest); ``"test"``, the test set itself.
        window: batches between two looks (k in thesis 7.2.3), as a share of the batches in an epoch.
        patience: batches without improvement until the run stops (l in thesis 7.2.3), as a share of the same. Both
            grow with the data, as in the thesis, which names no number.
        restore_best: whether the weights of the best look are put back at the end.
        threads: CPU threads; part of a run because the order of summation, hence the last bits, depends on them.
        every: as for `athena.Guidance`: of so many steps one is guided, or looks at marked images.
        control: what stands in the place of relevance, a name of `athena.experiments.controls.CONTROLS`; None is
            relevance itself. Its random numbers are drawn apart from all others.
        smoothing: label smoothing (Szegedy et al. 2016): the share of the target that all classes have in common.
        schedule: ``"constant"``, or ``"onecycle"``: the learning rate rises over the first 30 % of the steps and falls
            to nearly 0 by the last (Smith and Topin 2018, `torch.optim.lr_scheduler.OneCycleLR` as it comes).
        weight_decay: of AdamW (Loshchilov and Hutter 2019), which without it is Adam.
        tested: when the network is scored on the test set: after ``"each epoch"``, or ``"at the end"`` alone. On little
            data the tests take longer than the training.
        use: what an explanation is used for in the place of scaling gradients, a name of a table of
            `athena.experiments.uses`, with factor 0; None for nothing else.
        strength: how much of the use there is, as its function says.
        score: what the use ranks or weights samples by, a name of `athena.experiments.uses.SCORES`, where it does.
        optimizer: ``"adam"``; ``"sgd"``, ``"adagrad"`` or ``"adadelta"``, as `torch.optim` has them.
        shifts: by how many pixels at most each training image is moved each time it is seen.
        scored_on: ``"test"``, or ``"validation"`` for the held-out tenth of the training set, by which settings are
            chosen; the test set is then not looked at.
        marked: on how many training images, the first of the subset, the digit's own pixels are known, for the uses of
            `athena.experiments.marks`; 0 where the use needs none.
        learn_every: 0, or learn the factors, one for each layer, in one step of so many, by the loss on a tenth of the
            subset that is then not trained on. None grows beyond `factor`. See `athena.Guidance.learn`.
    """

    model: str = "mlp"
    dataset: str = "mnist"
    fraction: float = 1.0
    factor: float = 0.0
    seed: int = 0
    epochs: float = 3
    rule: str = "Epsilon(1e-06)"
    target: str = "predicted"
    scope: str | tuple[str, ...] = "linear"
    normalise: str | None = None
    granularity: str = "sample"
    batch_size: int = 64
    learning_rate: float = 1e-3
    precision: str = "float32"
    monitor: str | None = None
    window: float = 0.25
    patience: float = 0.5
    restore_best: bool = True
    threads: int = 1
    every: int = 1
    control: str | None = None
    smoothing: float = 0.0
    schedule: str = "constant"
    weight_decay: float = 0.0
    tested: str = "each epoch"
    use: str | None = None
    strength: float = 1.0
    score: str | None = None
    optimizer: str = "adam"
    shifts: int = 0
    scored_on: str = "test"
    marked: int = 0
    learn_every: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"Run({name}={value!r}): it must be one of {', '.join(map(repr, allowed))}")
        for name, (kind, least, most) in NUMBERS.items():
            value = getattr(self, name)
            a_number = isinstance(value, Real) and not isinstance(value, bool)
            if not a_number or not least <= value <= most:
                raise ValueError(f"Run({name}={value!r}): it must be a number from {least} to {most}")
            if kind(value) != value:
                raise ValueError(f"Run({name}={value!r}): it must be a whole number")
            object.__setattr__(self, name, kind(value))
        if self.fraction == 0:
            raise ValueError(f"Run(fraction={self.fraction}): it must be above 0")
        if self.epochs == 0:
            raise ValueError("Run(epochs=0): it must be above 0")
        if self.epochs == int(self.epochs):  # written as the whole number that keys have been made of
            object.__setattr__(self, "epochs", int(self.epochs))
        if self.smoothing == 1:
            raise ValueError(f"Run(smoothing={self.smoothing}): it must be below 1")
        self._check_use()
        object.__setattr__(self, "rule", str(rules.parse(str(self.rule))))
        object.__setattr__(self, "restore_best", bool(self.restore_best))
        if isinstance(self.scope, str) and self.scope not in guidance.SCOPES:
            known = ", ".join(map(repr, guidance.SCOPES))
            raise ValueError(f"Run(scope={self.scope!r}): it must be one of {known}, or a list of module paths")
        if not isinstance(self.scope, str):
            if not isinstance(self.scope, list | tuple):
                raise ValueError(f"Run(scope={self.scope!r}): it must be text or a list of module paths")
            if not all(isinstance(name, str) for name in self.scope):
                raise ValueError(f"Run(scope={self.scope!r}): it must be text or a list of module paths")
            object.__setattr__(self, "scope", tuple(self.scope))

    def _check_use(self) -> None:
        if self.use is not None and self.factor:
            raise ValueError(f"Run(use={self.use!r}, factor={self.factor}): with a use the factor must be 0")
        if self.use in uses.CHOICES and self.score is None:
            known = ", ".join(map(repr, uses.SCORES))
            raise ValueError(f"Run(use={self.use!r}, score=None): it needs a score, one of {known}")
        if self.use in marks.LOSSES and not self.marked:
            raise ValueError(f"Run(use={self.use!r}, marked=0): it needs marked images, such as marked=30")

    @property
    def is_plain(self) -> bool:
        """Whether nothing is explained: no gradients are scaled, and there is no use."""
        return not self.factor and self.use is None

    @property
    def learns(self) -> bool:
        """Whether the factors are learned."""
        return bool(self.factor and self.learn_every)

    @property
    def held_out(self) -> float:
        """The share of the training set that is set aside before the fraction is taken."""
        return HELD_OUT if "validation" in (self.monitor, self.scored_on) else 0.0

    @property
    def key(self) -> str:
        """16 hex digits that tell this run from any other, the same on every machine."""
        values = dict(vars(self))
        for name, before in SINCE.items():  # so that what was measured before there was the field keeps its key
            if values[name] == before:
                del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
