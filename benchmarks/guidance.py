"""What one guided training step costs beside a plain one, and beside the method built as the thesis describes it.

    python benchmarks/guidance.py --steps 40 --threads 1 --device cpu

All arms of a network take their steps in turn in one process, in an order drawn anew for each round, so that whatever
else the machine does hits them alike. It keeps the memory that it frees (`memory.keep_freed`). A step is forward, loss,
backward and fused Adam on 64 random images. The column `thesis/it`: how many times as long the thesis's manner takes.
Nothing here tests the package; the thesis's manner, `Literal`, is checked against the formulas in
tests/test_guidance.py.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import memory
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import athena
from athena.models import cnn, mlp
from athena.rules import Epsilon, Rule, Zero

BATCH = 64
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

    def __init__(
        self, name: str, network: nn.Sequential, wrap: Callable[[nn.Sequential], nn.Module], every: int = 1
    ) -> None:
        self.name, self.every, network = name, every, copy.deepcopy(network)
        self.model = wrap(network)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        self.seconds: list[float] = []
        self.bytes = 0
        self.rival: Arm | None = None

    def times(self, every: int) -> list[float]:
        """Seconds a step, by `every` steps in a row."""
        return [statistics.mean(part) for part in zip(*[iter(self.seconds)] * every, strict=False)]

    def ratio(self, other: "Arm") -> float:
        """How many times as long as the other's its steps take: the median over rounds of the same."""
        every = max(self.every, other.every)
        return statistics.median(a / b for a, b in zip(self.times(every), other.times(every), strict=True))

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One timed training step."""
        on_gpu = x.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            standing = torch.cuda.memory_allocated()
        began = time.perf_counter()
        F.cross_entropy(self.model(x), labels).backward()
        self.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        if on_gpu:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() - standing)
        self.optimizer.zero_grad()
        _relevance_cache.clear()


class Case(NamedTuple):
    """One guidance that is measured."""

    scope: str
    rule: Rule
    every: int = 1

    def guided(self, network: nn.Sequential) -> nn.Module:
        """The network, guided by ATHENA."""
        athena.Guidance(network, factor=0.1, scope=self.scope, rule=self.rule, every=self.every)
        return network

    def literal(self, network: nn.Sequential) -> nn.Module:
        """The network, guided in the thesis's manner, which is in every step."""
        return Literal(network, self.scope, factor=0.1, epsilon=self.rule.stabiliser)

    def __str__(self) -> str:
        """As the table names it."""
        return f"{self.scope}, {self.rule}" + (f", 1 step in {self.every}" if self.every > 1 else "")


class Network(NamedTuple):
    """A network to measure: how it is built, its input's channels, its cases, and how many steps stand for one."""

    build: Callable[[], nn.Sequential]
    channels: int
    cases: tuple[Case, ...]
    steps: int


NETWORKS = {
    "MLP": Network(mlp, 1, (Case("all", Zero()), Case("all", Epsilon(1e-6))), 10),
    "CNN": Network(
        cnn,
        3,
        (
            *(Case("linear", Epsilon(1e-6)), Case("all", Zero()), Case("all", Epsilon(1e-6))),
            *(Case("all", Epsilon(1e-6), 2), Case("all", Epsilon(1e-6), 4)),
        ),
        1,
    ),
}


def arms_of(title: str, device: str) -> list[Arm]:
    torch.manual_seed(0)
    build, _, cases, _ = NETWORKS[title]
    network = build().to(device)
    arms = [Arm("plain PyTorch", network, lambda plain: plain)]
    rivals: dict[tuple[str, Rule], Arm] = {}
    for case in cases:
        arm = Arm(f"ATHENA, {case}", network, case.guided, case.every)
        what = case.scope, case.rule
        arms.append(arm)
        if what not in rivals:
            rivals[what] = Arm(f"thesis's manner, {case}", network, case.literal)
            arms.append(rivals[what])
        arm.rival = rivals[what]
    return arms


def batch(title: str, device: str) -> tuple[Tensor, Tensor]:
    channels = NETWORKS[title].channels
    return torch.randn(BATCH, channels, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)


def peak_of(title: str, place: int, threads: int) -> int:
    """The bytes that one step adds to the resident size of this process, a fresh one."""
    torch.set_num_threads(threads)
    arm, (x, labels) = arms_of(title, "cpu")[place], batch(title, "cpu")
    for _ in range(arm.every):  # Adam's moments are there from now on, and the next step is a guided one
        arm.step(x[:1], labels[:1])
    return memory.added_by(lambda: arm.step(x, labels))


def measure(title: str, steps: int, threads: int, device: str) -> list[Arm]:
    arms = arms_of(title, device)
    order = random.Random(0)
    most = max(arm.every for arm in arms)
    for number in range(WARM_UP + -(-steps * NETWORKS[title].steps // most) * most):
        if number == WARM_UP:
            for arm in arms:
                arm.seconds, arm.bytes = [], 0  # on a GPU the first steps also bring what its libraries work in
        x, labels = batch(title, device)
        for arm in order.sample(arms, len(arms)):
            arm.step(x, labels)
    for place, arm in enumerate(arms):
        if device == "cpu" and memory.told():
            arm.bytes = memory.in_fresh_process(memory.GIVEN_BACK, peak_of, title, place, threads)
    return arms


def table(title: str, arms: list[Arm]) -> str:
    plain = arms[0]
    columns = f"{'MiB in step':>13}{'of plain':>10}" if plain.bytes else ""
    lines = [title, f"{'arm':<44}{'ms a step':>11}{'of plain':>10}{'thesis/it':>11}" + columns]
    for arm in arms:
        line = f"{arm.name:<44}{1000 * statistics.median(arm.times(arm.every)):>11.2f}{arm.ratio(plain):>10.2f}"
        line += f"{arm.rival.ratio(arm):>11.2f}" if arm.rival else f"{'':>11}"
        lines.append(line + (f"{arm.bytes / 2**20:>13.1f}{arm.bytes / plain.bytes:>10.2f}" if plain.bytes else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of one guided training step.")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of an arm of the CNN; of the MLP ten times")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    memory.keep_freed()
    torch.set_num_threads(options.threads)
    print(
        f"PyTorch {torch.__version__}, {options.device}, {options.threads} thread(s), batch {BATCH}, "
        f"{options.steps} steps, of the MLP {NETWORKS['MLP'].steps} times as many; medians of times and ratios"
    )
    for title in NETWORKS:
        arms = measure(title, options.steps, options.threads, options.device)
        print("", table(title, arms), sep="\n", flush=True)


if __name__ == "__main__":
    main()
