"""One training run of the experiments, from a `Run` to its `Result`, the same to the last bit each time.

Not here: grids of runs and where results are kept (`athena.experiments`). To guide a training loop of your own, use
`athena.Guidance`; nothing in this file is needed for it.
"""

import ast
import hashlib
import inspect
import platform
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena import guidance, rules
from athena.experiments import controls, data, models, uses
from athena.experiments.run import CHOICES, HELD_OUT, NUMBERS, OPTIMIZERS, SINCE, Run

__all__ = ["CHOICES", "MODELS", "NUMBERS", "SINCE", "Glimpse", "Result", "Run", "train", "watch"]

MODELS = models.MODELS
ONE_AT_A_TIME = threading.Lock()
"""Random state and `_settings` belong to the process, so runs in threads of one, as on a Dask worker, take turns."""


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        run: what was run.
        accuracy: on the test set, or on what `run.scored_on` names, 0 to 1, each time that ``run.tested`` asks for it.
            After an early stop the last entry is that of the weights kept; after a divergence the rest is what the
            network scores that this left.
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
        self.images = data.load(run.dataset, run.fraction, run.seed, run.held_out, self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(run.seed)
            model = MODELS[run.model](self.images.channels, self.images.classes).to(self.device)
        self.model = model = model.to(memory_format=torch.channels_last)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[run.optimizer](
            model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay
        )
        count = len(self.images.train_labels)
        self.batches = -(-count // run.batch_size)  # in an epoch
        self.use = None if run.use is None else uses.Use(run, model, self.device, self.images)
        self.moves = torch.Generator(self.device).manual_seed(run.seed)  # of shifted images
        self.pool = torch.arange(count if self.use is None else self.use.first(count))  # what is trained on
        self.weights: Tensor | None = None
        self.drawn = torch.Generator().manual_seed(run.seed)  # of what factors are learned from
        if run.learns:
            self.pool, self.held_out = self.pool.tensor_split([max(1, count - max(1, round(HELD_OUT * count)))])
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        if run.schedule == "onecycle":
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, run.learning_rate, total_steps=self.total_steps
            )
        self.guidance = guidance.Guidance(
            model,
            factor="learn" if run.learns else run.factor,
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
        """The batches of each pass, as indices; of the last those that are left where it is not a whole one.

        A use that chooses samples does so when half of the steps are done.
        """
        order = torch.Generator().manual_seed(self.run.seed)
        halves = [self.total_steps // 2] if self.use is not None and self.use.chooses else []
        done = 0
        for end in (*halves, self.total_steps):
            while done < end:
                shuffled = self.pool[torch.randperm(len(self.pool), generator=order)]
                batches = shuffled.to(self.device).split(
                    self.run.batch_size
                )  # at once: a copy a step waits for the GPU
                yield batches[: end - done]
                done += len(batches[: end - done])
            if self.use is not None and end in halves:
                self.choose(self.use)

    def choose(self, use: uses.Use) -> None:
        """Has the samples chosen that the rest is trained on; what this takes counts as training."""
        begin = _now(self.device)
        pool, self.weights = use.choose(self.images.train_images, self.images.train_labels)
        self.pool = pool.cpu()
        self.seconds += _now(self.device) - begin

    def run_epochs(self) -> None:
        planned = 0
        for batches in self.shuffled():
            planned += len(batches)
            while batches and self.diverged is None and self.stopped_at is None:
                window = len(batches) if self.stopping is None else self.stopping.window
                self.train_on(batches[:window])
                batches = batches[window:]
                if self.stopping is not None and self.stopping.look(self):
                    self.stopped_at = self.steps
            last = self.stopped_at is not None or planned >= self.total_steps
            if last and self.stopping is not None and self.run.restore_best:
                self.stopping.restore(self)
            if last or self.run.tested == "each epoch":
                self.accuracy.append(self.score(*self.scored_on))
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
            if self.run.shifts:
                x = uses.shifted(x, self.run.shifts, self.moves)
            with self._precision():
                if self.use is None:
                    loss = F.cross_entropy(self.model(x), y, label_smoothing=self.run.smoothing)
                else:
                    loss = self.use.loss(x, y, None if self.weights is None else self.weights[index])
            if self.run.learns and self.steps % self.run.learn_every == 0:
                self.guidance.learn(loss, self.held_out_loss, bound=abs(self.run.factor))
            loss.backward()
            if self.use is not None:
                self.use.gradients(x, y)
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

    def held_out_loss(self) -> Tensor:
        """Of a batch of the images that factors are learned from."""
        drawn = torch.randint(len(self.held_out), (self.run.batch_size,), generator=self.drawn)
        index = self.held_out[drawn].to(self.device)
        x = self.images.train_images[index].contiguous(memory_format=torch.channels_last)
        with self._precision():
            return F.cross_entropy(self.model(x), self.images.train_labels[index], label_smoothing=self.run.smoothing)

    @property
    def scored_on(self) -> tuple[Tensor, Tensor]:
        """Images and labels that accuracy is measured on."""
        if self.run.scored_on == "validation":
            return self.images.validation_images, self.images.validation_labels
        return self.images.test_images, self.images.test_labels

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
