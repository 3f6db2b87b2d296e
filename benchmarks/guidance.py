"""What one guided training step costs beside a plain one, and beside the method built as the thesis describes it.

    python benchmarks/guidance.py --rounds 40 --threads 1 --device cpu --out results/benchmarks/guidance-mine.json

All arms of a network take their steps in turn in one process, in an order drawn anew for each round, so that whatever
else the machine does hits them alike. It keeps the memory that it frees (`memory.keep_freed`). A step is forward, loss,
backward and fused Adam on random images. Times are CPU seconds of this process, on a GPU those of a clock. The column
`thesis/it`: how many times as long the thesis's manner takes, where a network is a chain of layers. `calls` counts the
calls that Python makes in a forward pass, a guided one where the arm is guided (sys.setprofile; those into C as well).
Nothing here tests the package; the thesis's manner, `Literal`, is checked against the formulas in
tests/test_guidance.py.
"""

import copy
import gc
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import memory
import report
import torch
import torch.nn.functional as F
import torchvision
from networks import OwnMLP, vit
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import athena
from athena.experiments.models import cnn, mlp
from athena.rules import Epsilon, Rule, Zero

WARM_UP = 3

# The thesis's manner (6.1.4, 6.1.5): one autograd function for each layer, which saves input, weight and bias, computes
# its output once more in the backward pass to apply the rule, and hands relevance on through a global cache.
_relevance_cache: list[Tensor] = []


def set_relevance_cache(relevance: Tensor) -> None:
    _relevance_cache[:] = [relevance]


def get_relevance_cache(like: Tensor) -> Tensor:
    if not _relevance_cache:
        raise RuntimeError("no relevance in the cache: the layer above has not run its backward pass")
    return _relevance_cache.pop().view_as(like)


class Setting(NamedTuple):
    """What a literal layer knows: LRP factor, epsilon of its rule (0: LRP-0), padding, whether it makes the output."""

    factor: float
    epsilon: float
    padding: int | tuple[int, ...]
    is_output: bool


def predicted_logit(output: Tensor) -> Tensor:
    best = output.argmax(1, keepdim=True)
    return torch.zeros_like(output).scatter_(1, best, output.gather(1, best))


def quotient(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    if epsilon == 0:
        return torch.where(relevance == 0, torch.zeros_like(z), relevance / z)
    return relevance / torch.where(z >= 0, z + epsilon, z - epsilon)


def use_relevance(gradient: Tensor, z: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """The gradient scaled by relevance, except in the output layer, and the relevance of this layer's output."""
    if setting.is_output:
        return gradient, predicted_logit(z)
    relevance = get_relevance_cache(gradient)
    return gradient * (1 + setting.factor * relevance), relevance


class LinearLiteral(torch.autograd.Function):
    """The thesis's LinearLRP."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, setting: Setting) -> Tensor:
        """The ordinary output; what the backward pass needs is saved."""
        ctx.save_for_backward(x, weight, bias)
        ctx.setting = setting
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled by the relevance from the cache; the cache then holds the relevance of the input."""
        x, weight, bias = ctx.saved_tensors
        z = F.linear(x, weight, bias)
        gradient, relevance = use_relevance(gradient, z, ctx.setting)
        set_relevance_cache(x * (quotient(relevance, z, ctx.setting.epsilon) @ weight))
        below = gradient @ weight if ctx.needs_input_grad[0] else None
        return below, gradient.T @ x, gradient.sum(0), None


class ConvolutionLiteral(torch.autograd.Function):
    """The thesis's ConvolutionalLRP, stride 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, setting: Setting) -> Tensor:
        """The ordinary output; what the backward pass needs is saved."""
        ctx.save_for_backward(x, weight, bias)
        ctx.setting = setting
        return F.conv2d(x, weight, bias, padding=setting.padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled by the relevance from the cache; the cache then holds the relevance of the input."""
        x, weight, bias = ctx.saved_tensors
        padding = ctx.setting.padding
        z = F.conv2d(x, weight, bias, padding=padding)
        gradient, relevance = use_relevance(gradient, z, ctx.setting)
        s = quotient(relevance, z, ctx.setting.epsilon)
        set_relevance_cache(x * F.conv_transpose2d(s, weight, padding=padding))
        below = F.conv_transpose2d(gradient, weight, padding=padding) if ctx.needs_input_grad[0] else None
        of_weight = conv2d_weight(x, weight.shape, gradient, padding=padding)
        return below, of_weight, gradient.sum((0, 2, 3)), None


class MaxPoolingLiteral(torch.autograd.Function):
    """The thesis's MaxPoolingLRP: gradient and relevance both go to the winner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        """The ordinary output; what the backward pass needs is saved."""
        z, winners = F.max_pool2d(x, size, return_indices=True)
        ctx.save_for_backward(winners)
        ctx.size, ctx.shape = size, x.shape
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled by the relevance from the cache; the cache then holds the relevance of the input."""
        (winners,) = ctx.saved_tensors
        relevance = get_relevance_cache(gradient)
        set_relevance_cache(F.max_unpool2d(relevance, winners, ctx.size, output_size=ctx.shape))
        return F.max_unpool2d(gradient, winners, ctx.size, output_size=ctx.shape), None


class Literal(nn.Module):
    """A chain of linear, 3x3-like convolutional, ReLU, max pooling and flatten layers, guided in the thesis's manner.

    Args:
        model: the chain; its parameters are used as they are.
        scope: "all", or "linear" for its linear part alone.
        factor: the LRP factor.
        epsilon: of the rule; 0 is LRP-0.
    """

    def __init__(self, model: nn.Sequential, scope: str, factor: float, epsilon: float) -> None:
        super().__init__()
        self.model = model
        layers = list(model)
        whole = scope == "all"
        self._layers: list[Callable[[Tensor], Tensor]] = []
        for layer in layers:
            if isinstance(layer, nn.Linear):
                setting = Setting(factor, epsilon, 0, layer is layers[-1])
                self._layers.append(self._affine(LinearLiteral, layer, setting))
            elif isinstance(layer, nn.Conv2d) and whole:
                assert not isinstance(layer.padding, str)
                setting = Setting(factor, epsilon, tuple(layer.padding), False)
                self._layers.append(self._affine(ConvolutionLiteral, layer, setting))
            elif isinstance(layer, nn.MaxPool2d) and whole:
                self._layers.append(self._pooling(layer))
            else:
                self._layers.append(layer)

    @staticmethod
    def _affine(function: Any, layer: nn.Module, setting: Setting) -> Callable[[Tensor], Tensor]:
        return lambda x: function.apply(x, layer.weight, layer.bias, setting)

    @staticmethod
    def _pooling(layer: nn.MaxPool2d) -> Callable[[Tensor], Tensor]:
        return lambda x: MaxPoolingLiteral.apply(x, layer.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        for layer in self._layers:
            x = layer(x)
        return x


class Arm:
    """One way to train: its own copy of the network, its own Adam, the seconds of each of its steps.

    Attributes:
        every: of so many steps in a row one is guided, so that times are means over as many.
        rival: the arm that does the same in the thesis's manner, or None.
    """

    def __init__(self, name: str, network: nn.Module, wrap: Callable[[Any], nn.Module], every: int = 1) -> None:
        self.name, self.every, network = name, every, copy.deepcopy(network)
        self.model = wrap(network)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        self.seconds: list[float] = []
        self.bytes = 0
        self.rival: Arm | None = None

    def times(self, every: int) -> list[float]:
        """Seconds a step, by `every` steps in a row."""
        return [statistics.mean(part) for part in zip(*[iter(self.seconds)] * every, strict=False)]

    def beside(self, other: "Arm") -> tuple[list[float], list[float]]:
        """Its times and the other's, over as many steps."""
        every = max(self.every, other.every)
        return self.times(every), other.times(every)

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One timed training step."""
        on_gpu = x.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            standing = torch.cuda.memory_allocated()
        began = report.now(x.device.type)
        F.cross_entropy(self.model(x), labels).backward()
        self.optimizer.step()
        self.seconds.append(report.now(x.device.type) - began)
        if on_gpu:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() - standing)
        self.optimizer.zero_grad()
        _relevance_cache.clear()

    def calls(self, x: Tensor) -> int:
        """The calls that Python makes in `model(x)`, those into C as well: the most of `every` passes in a row."""
        return max(self._calls(x) for _ in range(self.every))

    def _calls(self, x: Tensor) -> int:
        events: list[str] = []
        gc.disable()  # what it frees may call something
        sys.setprofile(lambda _frame, event, _what: events.append(event))
        try:
            output = self.model(x)
        finally:
            sys.setprofile(None)
            gc.enable()
        output.sum().backward()
        self.optimizer.zero_grad()
        _relevance_cache.clear()
        return events.count("call") + events.count("c_call") - 1  # the last is `sys.setprofile` itself


class Case(NamedTuple):
    """One guidance that is measured."""

    scope: str
    rule: Rule
    every: int = 1

    def guided(self, network: nn.Module) -> nn.Module:
        """The network, guided by ATHENA."""
        athena.Guidance(network, factor=0.1, scope=self.scope, rule=self.rule, every=self.every)
        return network

    def literal(self, network: nn.Sequential) -> nn.Module:
        """The network, guided in the thesis's manner, which is in every step."""
        return Literal(network, self.scope, factor=0.1, epsilon=self.rule.stabiliser)

    def __str__(self) -> str:
        """As the table names it."""
        return f"{self.scope}, {self.rule}" + (f", 1 step in {self.every}" if self.every > 1 else "")


WHOLE = Case("all", Zero()), Case("all", Epsilon(1e-6))
LINEAR = Case("linear", Epsilon(1e-6))


class Network(NamedTuple):
    """A network to train.

    Attributes:
        title: what the table calls it.
        build: makes it, with random weights.
        shape: of a batch of its images.
        cases: the guidances of it.
        often: how many steps of it are timed for one of the CNN.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    cases: tuple[Case, ...] = WHOLE
    often: int = 1


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


IMAGES = (64, 3, 32, 32)
NETWORKS = {
    "mlp": Network("MLP", mlp, (64, 1, 32, 32), often=10),
    "mlp-class": Network("MLP, a class of the user's own", OwnMLP, (64, 1, 32, 32), often=10),
    "cnn": Network("CNN", cnn, IMAGES, (*WHOLE, Case("all", Epsilon(1e-6), 2), Case("all", Epsilon(1e-6), 4))),
    "cnn-linear": Network("CNN, linear part", cnn, IMAGES, (LINEAR,)),
    "resnet18": Network("ResNet-18", resnet, IMAGES),
    "vit": Network("ViT of 6 blocks", vit, (4, 3, 32, 32), often=4),
}


def arms_of(name: str, alone: bool, device: str) -> list[Arm]:
    torch.manual_seed(0)
    network = NETWORKS[name].build().to(device)
    arms = [Arm("plain PyTorch", network, lambda plain: plain)]
    rivals: dict[tuple[str, Rule], Arm] = {}
    for case in NETWORKS[name].cases:
        arm = Arm(f"ATHENA, {case}", network, case.guided, case.every)
        arms.append(arm)
        if alone or not isinstance(network, nn.Sequential):
            continue
        what = case.scope, case.rule
        if what not in rivals:
            rivals[what] = Arm(f"thesis's manner, {case}", network, case.literal)
            arms.append(rivals[what])
        arm.rival = rivals[what]
    return arms


def batch(name: str, device: str) -> tuple[Tensor, Tensor]:
    shape = NETWORKS[name].shape
    return torch.randn(*shape, device=device), torch.randint(10, shape[:1], device=device)


def peak_of(name: str, place: int, alone: bool, threads: int) -> int:
    """The bytes that one step adds to the resident size of this process, a fresh one."""
    torch.set_num_threads(threads)
    arm, (x, labels) = arms_of(name, alone, "cpu")[place], batch(name, "cpu")
    for _ in range(arm.every):  # Adam's moments are there from now on, and the next step is a guided one
        arm.step(x[:2], labels[:2])
    return memory.added_by(lambda: arm.step(x, labels))


def measure(name: str, rounds: int, alone: bool, threads: int, device: str) -> Iterator[report.Table]:
    """The table of one network."""
    arms = arms_of(name, alone, device)
    order = random.Random(0)
    most = max(arm.every for arm in arms)
    count = -(-rounds * NETWORKS[name].often // most) * most
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            for arm in arms:
                arm.seconds, arm.bytes = [], 0  # on a GPU the first steps also bring what its libraries work in
        x, labels = batch(name, device)
        for arm in order.sample(arms, len(arms)):
            arm.step(x, labels)
    for place, arm in enumerate(arms):
        if device == "cpu" and memory.told():
            arm.bytes = memory.in_fresh_process(memory.GIVEN_BACK, peak_of, name, place, alone, threads)
    calls = [arm.calls(x) for arm in arms]
    title = f"{NETWORKS[name].title}, {report.shape(NETWORKS[name].shape)}"
    yield report.Table(title, count, rows(arms, calls))


def rows(arms: list[Arm], calls: list[int]) -> list[dict[str, str | float]]:
    """The rows of a table. Times are medians over rounds; a ratio is `report.ratio`."""
    plain = arms[0]
    found: list[dict[str, str | float]] = []
    for arm, count in zip(arms, calls, strict=True):
        row: dict[str, str | float] = {
            "arm": arm.name,
            "ms a step": 1000 * statistics.median(arm.times(arm.every)),
            "of plain": report.ratio(*arm.beside(plain)),
            "spread": report.spread(*arm.beside(plain)),
        }
        if arm.rival:
            row["thesis/it"] = report.ratio(*arm.rival.beside(arm))
        if plain.bytes:
            row |= {"MiB in step": arm.bytes / 2**20, "MiB of plain": arm.bytes / plain.bytes}
        found.append(row | {"calls": count})
    return found


def main() -> None:
    chosen = report.options("The cost of one guided training step.", NETWORKS, rounds=40)
    memory.keep_freed()
    torch.set_num_threads(chosen.threads)
    report.run(chosen, lambda name: measure(name, chosen.rounds, chosen.alone, chosen.threads, chosen.device))


if __name__ == "__main__":
    main()
