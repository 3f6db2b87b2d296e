"""One training run of the experiments, from a `Run` to its `Result`, the same to the last bit each time.

Not here: grids of runs and where results are kept (`athena.experiments`). To guide a training loop of your own, use
`athena.Guidance`; nothing in this file is needed for it.
"""

import ast
import hashlib
import inspect
import json
import platform
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena import guidance, rules
from athena.experiments import controls, data, models

__all__ = ["MODELS", "Glimpse", "Result", "Run", "train", "watch"]

MODELS = models.MODELS
HELD_OUT = 0.1
"""The share of the training set that early stopping on ``monitor="validation"`` is decided by."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
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
}
"""The fields that are numbers: of which kind, the least and the most."""
SINCE: dict[str, Any] = {
    "every": 1,
    "control": None,
    "smoothing": 0.0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "tested": "each epoch",
}
"""Fields that came after the first results, with the value that all runs had before."""
ONE_AT_A_TIME = threading.Lock()
"""Random state and `_settings` belong to the process, so runs in threads of one, as on a Dask worker, take turns."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one training run on one kind of machine.

    Attributes:
        model: ``"mlp"`` or ``"cnn"``, thesis table 6.1.
        dataset: a name of `athena.data.NAMES`.
        fraction: the share of the training set, in (0, 1].
        factor: the LRP factor; 0 is plain training.
        seed: of the initial weights, the subset and the order of the batches, all three; from 0 to 2**32 - 1.
        epochs: passes over the subset; 3.6 are three passes and the first 60 % of the batches of a fourth.
        rule: a rule of `athena.rules` as text, ``"Epsilon(1e-06)"``.
        target, scope, normalise, granularity: as for `athena.Guidance`; target ``"predicted"`` is its None.
        batch_size, learning_rate: of Adam. The thesis names neither. With a schedule the rate is its highest.
        precision: ``"float32"``; ``"tf32"``, the same but for convolutions on a GPU, which multiply in TF32, as
            PyTorch lets them unless told otherwise; ``"bfloat16"`` for autocast.
        monitor: what early stopping looks at: None for no early stopping; ``"validation"``, a tenth of the training
            set, held out, the same for every run (fractions are then of the rest); ``"test"``, the test set itself.
        window: batches between two looks (k in thesis 7.2.3), as a share of the batches in an epoch.
        patience: batches without improvement until the run stops (l in thesis 7.2.3), as a share of the same. Both
            grow with the data, as in the thesis, which names no number.
        restore_best: whether the weights of the best look are put back at the end.
        threads: CPU threads; part of a run because the order of summation, hence the last bits, depends on them.
        every: as for `athena.Guidance`: of so many steps one is guided.
        control: what stands in the place of relevance, a name of `athena.experiments.controls.CONTROLS`; None is
            relevance itself. Its random numbers are drawn apart from all others.
        smoothing: label smoothing (Szegedy et al. 2016): the share of the target that all classes have in common.
        schedule: ``"constant"``, or ``"onecycle"``: the learning rate rises over the first 30 % of the steps and falls
            to nearly 0 by the last (Smith and Topin 2018, `torch.optim.lr_scheduler.OneCycleLR` as it comes).
        weight_decay: of AdamW (Loshchilov and Hutter 2019), which without it is Adam.
        tested: when the network is scored on the test set: after ``"each epoch"``, or ``"at the end"`` alone. On little
            data the tests take longer than the training.
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

    @property
    def key(self) -> str:
        """16 hex digits that tell this run from any other, the same on every machine."""
        values = dict(vars(self))
        for name, before in SINCE.items():  # so that what was measured before there was the field keeps its key
            if values[name] == before:
                del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        run: what was run.
        accuracy: on the test set, 0 to 1, each time that ``run.tested`` asks for it. After an early stop the last entry
            is that of the weights kept; after a divergence the rest is what the network scores that this left.
        seconds: training alone, without loading, evaluation and early stopping's looks.
        peak_bytes: device memory at most allocated on a GPU; elsewhere the largest resident size of the process.
        stopped_at: the step after which early stopping ended the run, or None.
        diverged: ``{"step", "layer"}`` of the first gradient in a guided layer that was not finite, or of the first
            layer whose weights were not, after the step at which they are looked at, the last of an epoch or a window;
            or None.
        device, versions, code, fingerprint: on what, with what, by which version of this package, on which data.
        model: the trained network, in eval mode; not stored.
    """

    run: Run
    accuracy: list[float]
    seconds: float
    peak_bytes: int
    stopped_at: int | None
    diverged: dict[str, Any] | None
    device: str
    versions: dict[str, str]
    code: str
    fingerprint: str
    model: nn.Module = field(repr=False, compare=False)

    def line(self) -> dict[str, Any]:
        """The result as one line of a results store: plain numbers and text."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}
        return {"key": self.run.key} | values | {"run": asdict(self.run)}


def train(run: Run, device: torch.device | str | None = None) -> Result:
    """Trains and tests one network. The global random state and the number of threads are left as they were.

    Args:
        run: what to run.
        device: where; by default a GPU if there is one.

    Raises:
        athena.data.DataError: the data set is not here, or damaged.
        ValueError: ``run.scope`` names a layer that the model does not have.
    """
    with _alone(run):
        loop = _Loop(run, device)
        _reset_peak(loop.device)
        loop.run_epochs()
    return Result(
        run=run,
        accuracy=loop.accuracy,
        seconds=loop.seconds,
        peak_bytes=_peak(loop.device),
        stopped_at=loop.stopped_at,
        diverged=loop.diverged,
        device=_name(loop.device),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        code=CODE,
        fingerprint=loop.images.fingerprint,
        model=loop.model.eval(),
    )


@dataclass(frozen=True)
class Glimpse:
    """A run under way.

    Attributes:
        epochs: passes over the training data so far.
        accuracy: of the test images that `watch` looks at, 0 to 1.
        model: the network as it is now, in eval mode. The next glimpse trains it further.
        diverged: as in `Result`.
    """

    epochs: float
    accuracy: float
    model: nn.Module = field(repr=False, compare=False)
    diverged: dict[str, Any] | None = None


def watch(run: Run, every: int = 10, images: int = 1000, device: torch.device | str | None = None) -> Iterator[Glimpse]:
    """Trains as `train` does, to the same weights, and shows the run before the first step and as it goes on.

    Between two glimpses nothing of the process is held, so several runs can be watched in turn. Closing the iterator
    ends the run.

    Args:
        run: what to run, without early stopping.
        every: batches between two glimpses; there is one at the end of each epoch as well.
        images: how many test images, drawn once for all runs, each glimpse is scored on.
        device: where; by default a GPU if there is one.

    Raises:
        ValueError: `every` or `images` is below 1, or the run has a monitor.
        athena.data.DataError: the data set is not here, or damaged.
    """
    if every < 1 or images < 1:
        raise ValueError(f"watch(every={every}, images={images}): both must be at least 1")
    if run.monitor is not None:
        raise ValueError(f"a run with monitor={run.monitor!r} cannot be watched; leave it to train()")
    with _alone(run):
        loop = _Loop(run, device)
        drawn = torch.randperm(len(loop.images.test_labels), generator=torch.Generator().manual_seed(0))[:images]
        sample = loop.images.test_images[drawn], loop.images.test_labels[drawn]
        untrained = loop.score(*sample)
    with loop.guidance:
        yield Glimpse(0.0, untrained, loop.model)
        for epoch, batches in enumerate(loop.shuffled()):
            for first in range(0, len(batches), every):
                with _alone(run):
                    loop.train_on(batches[first : first + every])
                    accuracy = loop.score(*sample)
                done = min(first + every, len(batches)) / loop.batches
                yield Glimpse(epoch + done, accuracy, loop.model, loop.diverged)
                if loop.diverged is not None:
                    return


class _Loop:
    """The state of one run, and its epochs. Made and used within `_alone`."""

    def __init__(self, run: Run, device: torch.device | str | None) -> None:
        self.run = run
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        held_out = HELD_OUT if run.monitor == "validation" else 0.0
        self.images = data.load(run.dataset, run.fraction, run.seed, held_out, self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(run.seed)
            model = MODELS[run.model](self.images.channels, self.images.classes).to(self.device)
        self.model = model = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay, fused=True
        )
        self.batches = -(-len(self.images.train_labels) // run.batch_size)  # in an epoch
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        if run.schedule == "onecycle":
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, run.learning_rate, total_steps=self.total_steps
            )
        self.guidance = guidance.Guidance(
            model,
            factor=run.factor,
            rule=rules.parse(run.rule),
            scope=run.scope,
            target=None if run.target == "predicted" else run.target,
            normalise=run.normalise,
            granularity=run.granularity,
            on_divergence="record",
            every=run.every,
            signal=None if run.control is None else controls.Signal(run.control, run.seed, self.device),
        )
        if not run.factor:
            self.guidance.remove()  # plain training pays for no hook
        self.accuracy: list[float] = []
        self.seconds = 0.0
        self.steps = 0
        self.stopped_at: int | None = None
        self.lost: dict[str, Any] | None = None
        self.stopping = None if run.monitor is None else _EarlyStopping(run, self.images)

    @property
    def diverged(self) -> dict[str, Any] | None:
        error = self.guidance.diverged
        return self.lost if error is None else {"step": error.step, "layer": error.layer}

    @property
    def total_steps(self) -> int:
        """The steps of the whole run, at least one."""
        return max(1, round(self.run.epochs * self.batches))

    def shuffled(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of each epoch, as indices; of the last those that are left where it is not a whole one."""
        order = torch.Generator().manual_seed(self.run.seed)
        for first in range(0, self.total_steps, self.batches):
            shuffled = torch.randperm(len(self.images.train_labels), generator=order)
            batches = shuffled.to(self.device).split(self.run.batch_size)  # at once: a copy a step waits for the GPU
            yield batches[: self.total_steps - first]

    def run_epochs(self) -> None:
        for epoch, batches in enumerate(self.shuffled(), 1):
            while batches and self.diverged is None and self.stopped_at is None:
                window = len(batches) if self.stopping is None else self.stopping.window
                self.train_on(batches[:window])
                batches = batches[window:]
                if self.stopping is not None and self.stopping.look(self):
                    self.stopped_at = self.steps
            last = self.stopped_at is not None or epoch * self.batches >= self.total_steps
            if last and self.stopping is not None and self.run.restore_best:
                self.stopping.restore(self)
            if last or self.run.tested == "each epoch":
                self.accuracy.append(self.score(self.images.test_images, self.images.test_labels))
            if self.stopped_at is not None:
                break
        self.guidance.remove()

    def train_on(self, batches: tuple[Tensor, ...]) -> None:
        self.model.train()
        begin = _now(self.device)
        for index in batches:
            x = self.images.train_images[index].contiguous(memory_format=torch.channels_last)
            y = self.images.train_labels[index]
            self.optimizer.zero_grad()
            if self.run.target == "label":
                self.guidance.labels = y
            with self._precision():
                loss = F.cross_entropy(self.model(x), y, label_smoothing=self.run.smoothing)
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            self.steps += 1
            if self.guidance.diverged is not None:
                break
        self.seconds += _now(self.device) - begin
        for name, weights in self.model.named_parameters():
            if self.lost is None and not weights.isfinite().all():
                self.lost = {"step": self.steps, "layer": name.rpartition(".")[0]}

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> float:
        """Share of `x` classified as `y`."""
        self.model.eval()
        hits = 0
        size = 1000 if self.device.type == "cuda" else 100  # activations that stay in the cache: a quarter faster
        for images, labels in zip(x.split(size), y.split(size), strict=True):
            with self._precision():
                logits = self.model(images.contiguous(memory_format=torch.channels_last))
            hits += int((logits.argmax(1) == labels).sum())
        return hits / len(y)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bfloat16")


class _EarlyStopping:
    """Batch-wise early stopping (thesis 7.2.3): a look after every k batches, the end after l without gain.

    It does not hold its loop, which would then keep its images, a gigabyte on a GPU, until a collection of garbage.
    """

    def __init__(self, run: Run, images: data.Data) -> None:
        batches = -(-len(images.train_labels) // run.batch_size)
        self.window = max(1, round(run.window * batches))
        self.patience = max(1, round(run.patience * batches))
        self.monitored = (
            (images.test_images, images.test_labels)
            if run.monitor == "test"
            else (images.validation_images, images.validation_labels)
        )
        self.best, self.best_at = -1.0, 0
        self.weights: dict[str, Tensor] = {}

    def look(self, loop: _Loop) -> bool:
        """Whether it is time to stop."""
        score = loop.score(*self.monitored)
        if score > self.best:
            self.best, self.best_at = score, loop.steps
            self.weights = {name: value.clone() for name, value in loop.model.state_dict().items()}
        return loop.steps - self.best_at >= self.patience

    def restore(self, loop: _Loop) -> None:
        loop.model.load_state_dict(self.weights)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """While no other run is at work: what decides its last bits, and gradients on, as they were before afterwards."""
    with ONE_AT_A_TIME, torch.enable_grad():
        settings = _settings(run)
        before = [getattr(owner, name) for owner, name, _ in settings]
        threads = torch.get_num_threads()
        torch.set_num_threads(run.threads)
        try:
            for owner, name, value in settings:
                setattr(owner, name, value)
            yield
        finally:
            torch.set_num_threads(threads)
            for (owner, name, _), value in zip(settings, before, strict=True):
                setattr(owner, name, value)


def _settings(run: Run) -> list[tuple[Any, str, Any]]:
    """What PyTorch is told during a run: a GPU gives the same bits each time, and no product is rounded unasked."""
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    rounded = "tf32" if run.precision == "tf32" else "ieee"
    return [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (cudnn.conv, "fp32_precision", rounded),
        *((products, "fp32_precision", "ieee") for products in (cuda.matmul, mkldnn.conv, mkldnn.matmul)),
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # not every container lets one
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak resident size so far


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        if "VmHWM:" in status:
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # an upper bound, in bytes on macOS


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def _code() -> str:
    """The package's version, and 8 hex digits of the sources that a result depends on."""
    from athena import __version__

    digest = hashlib.sha256("".join(inspect.getsource(sys.modules[name]) for name in _modules(__name__)).encode())
    return f"{__version__}+{digest.hexdigest()[:8]}"


def _packages(name: str) -> list[str]:
    """The packages that a module lies in: of ``"a.b.c"`` ``"a.b"`` and ``"a"``."""
    return [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]


def _modules(name: str) -> list[str]:
    """The module `name` and those of its distribution that it imports, and that these import, sorted.

    To import a module is to run the packages it lies in, so they count as well, but for those that `name` lies in.
    """
    package = name.partition(".")[0]
    above = _packages(name)
    found: set[str] = set()
    ahead = [name]
    while ahead:
        module = ahead.pop()
        if module in found or module in above:
            continue
        found.add(module)
        ahead.extend(_packages(module))
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [part if part in sys.modules else str(node.module) for part in imported]
            else:
                continue
            ahead.extend(part for part in imported if part.split(".")[0] == package)
    return sorted(found)


CODE = _code()
"""Read when this file is, so that it names what is running even where the sources change meanwhile."""
