"""What one explanation costs beside a plain gradient, and beside zennit and Captum.

    python benchmarks/lrp.py --rounds 20 --threads 1 --device cpu --out results/benchmarks/lrp-mine.json

All arms of a network take turns in one process, in an order drawn anew for each round, so that whatever else the
machine does hits them alike. It keeps the memory that it frees (`memory.keep_freed`). On a CPU the first arms are then
timed in a process as it comes as well, where memory is given back between calls and costs a page fault for every 4 KiB
to get again: that is the price for someone who sets nothing.

Times are CPU seconds of this process, on a GPU those of a clock. Small networks are timed more often.

An explanation is that of the predicted class of each of a batch of random images, down to the input, by a float32
network in eval mode with random weights. The arms:

    plain     `torch.autograd.grad` of the predicted logits to the input; parameters are as a model has them, requiring
              gradients, though none is computed for them
    athena    `athena.lrp` as a user calls it
    zennit    forward and `torch.autograd.grad` under a composite whose hooks are on the model before the clock starts,
              as for someone who explains many batches
    Captum    `LRP(model).attribute`, with the classes known and the rules on the layers before the clock starts (they
              have to be put there for each call). It knows no `nn.Flatten`, which gets its epsilon rule here

The peers are measured on the CNN and on VGG-16; what they cannot express is left out. That all arms of a rule give the
same relevance is shown in tests/test_peers.py, for Captum on networks without bias (its gamma and z-plus treat the bias
in their own way).

Peak memory is what one explanation adds to the model and the images. On a GPU PyTorch counts it. On the CPU each arm
runs once in a fresh process, and the highest resident size during the call less that before it is read from
/proc/self (Linux alone). Tensors live in mappings of their own there (MALLOC_MMAP_THRESHOLD_), so that what is freed is
gone at once and no earlier peak hides a later one; one call on a single image and a plain one on the whole batch come
before, for what PyTorch itself sets up. torch.profiler's account of allocations says the same to 1 MiB.
"""

import copy
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import memory
import report
import torch
import torchvision
import zennit.rules
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, PropagationRule
from networks import vit
from torch import Tensor, nn
from zennit.core import Composite, Hook
from zennit.types import Activation, AvgPool, Linear

import athena
from athena.experiments.models import cnn, mlp
from athena.rules import Epsilon, EpsilonPlus, Gamma, Preset, Rule, Zero, ZPlus

WARM_UP = 1
LEAST = 2**18
"""Bytes of a plain gradient below which memory is not compared: it comes in pages."""
SIMPLE: tuple[Rule | Preset, ...] = (Zero(), Epsilon(1e-6))


class Network(NamedTuple):
    """A network to explain.

    Attributes:
        title: what the table calls it.
        build: makes it, with random weights.
        shape: of a batch of its images.
        rules: those to explain it by.
        peers: whether zennit and Captum explain it too, and ATHENA by more rules.
        often: how many rounds of it there are for one of the CNN.
        calls: explanations in a row that a round times.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    rules: tuple[Rule | Preset, ...] = SIMPLE
    peers: bool = False
    often: int = 1
    calls: int = 1

    def __str__(self) -> str:
        """The title and the shape."""
        return f"{self.title}, {report.shape(self.shape)}"


zoo = torchvision.models
NETWORKS = {
    "mlp": Network("MLP of thesis table 6.1", mlp, (64, 1, 32, 32), often=10),
    "mlp-1": Network("MLP of thesis table 6.1", mlp, (1, 1, 32, 32), often=10, calls=10),
    "cnn": Network("CNN of thesis table 6.1", cnn, (64, 3, 32, 32), peers=True),
    "cnn-8": Network("CNN of thesis table 6.1", cnn, (8, 3, 32, 32), often=4),
    "vgg16": Network("VGG-16", zoo.vgg16, (16, 3, 64, 64), peers=True),
    "resnet18": Network("ResNet-18", zoo.resnet18, (4, 3, 64, 64), often=4),
    "vit": Network("ViT of 6 blocks", vit, (4, 3, 32, 32), often=10),
    "mobilenet_v2": Network("MobileNetV2", zoo.mobilenet_v2, (4, 3, 160, 160)),
    "efficientnet_b0": Network("EfficientNet-B0", zoo.efficientnet_b0, (4, 3, 160, 160)),
    "resnet50": Network("ResNet-50", zoo.resnet50, (8, 3, 128, 128), rules=(EpsilonPlus(),)),
}


def predicted_logit(output: Tensor) -> Tensor:
    output = output.detach()
    best = output.argmax(1, keepdim=True)
    return torch.zeros_like(output).scatter_(1, best, output.gather(1, best))


class Arm:
    """One way to explain a network.

    Args:
        name: what the table calls it.
        model: the network; Captum gets a copy, for it leaves things on it.
        images: one batch.
    """

    def __init__(self, name: str, model: nn.Module, images: Tensor) -> None:
        self.name, self.model, self.images = name, model, images

    def ready(self) -> AbstractContextManager[Any]:
        """What stands around an explanation and is no part of it."""
        return nullcontext()

    def explain(self, images: Tensor) -> Tensor:
        """The relevance of `images`."""
        raise NotImplementedError


class Plain(Arm):
    """The gradient of the predicted logit."""

    def explain(self, images: Tensor) -> Tensor:
        """The gradient."""
        images = images.detach().requires_grad_()
        output = self.model(images)
        return torch.autograd.grad(output, images, (predicted_logit(output) != 0).to(output))[0]


class Athena(Arm):
    """This package."""

    def __init__(self, rule: Rule | Preset, *given: Any) -> None:
        super().__init__(f"athena {type(rule).__name__ if isinstance(rule, Preset) else rule}", *given)
        self.rule = rule

    def explain(self, images: Tensor) -> Tensor:
        """By `athena.lrp`."""
        relevance: Tensor = athena.lrp(self.model, images, rule=self.rule).input
        return relevance


class Zennit(Arm):
    """zennit, with hooks as its own composites have them."""

    def __init__(self, rule: Hook, name: str, *given: Any) -> None:
        super().__init__(f"zennit {name}", *given)
        layers = [(Activation, zennit.rules.Pass()), (AvgPool, zennit.rules.Norm()), (Linear, rule)]
        self.composite = Composite(
            lambda _context, _path, module: next((hook for kind, hook in layers if isinstance(module, kind)), None)
        )

    def ready(self) -> AbstractContextManager[Any]:
        """The composite's hooks are on the model."""
        context: AbstractContextManager[Any] = self.composite.context(self.model)
        return context

    def explain(self, images: Tensor) -> Tensor:
        """By one forward and one backward pass through the hooks."""
        images = images.detach().requires_grad_()
        output = self.model(images)
        return torch.autograd.grad(output, images, predicted_logit(output))[0]


class Captum(Arm):
    """Captum's LRP."""

    def __init__(self, rule: Callable[[], PropagationRule], name: str, *given: Any) -> None:
        super().__init__(f"Captum {name}", *given)
        self.rule = rule
        with torch.no_grad():
            self.target = self.model(self.images).argmax(1)

    def ready(self) -> AbstractContextManager[Any]:
        """Each layer has its rule; `attribute` takes it away again."""
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.rule = self.rule()
            elif isinstance(layer, nn.Flatten):
                layer.rule = EpsilonRule()
        return nullcontext()

    def explain(self, images: Tensor) -> Tensor:
        """By `LRP.attribute`."""
        images = images.detach().requires_grad_()
        relevance: Tensor = LRP(self.model).attribute(images, target=self.target[: len(images)])
        return relevance.detach()


def arms_of(name: str, alone: bool, device: str) -> list[Arm]:
    """Every arm, in the table's order; the same weights and images each time it is called."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, images = network.build().to(device).eval(), torch.rand(*network.shape, device=device)
    arms = [Plain("plain gradient", model, images), *(Athena(rule, model, images) for rule in network.rules)]
    if alone or not network.peers:
        return arms
    of_captum = copy.deepcopy(model)
    return [
        *arms,
        Zennit(zennit.rules.Epsilon(1e-6), "epsilon", model, images),
        Captum(lambda: EpsilonRule(1e-6), "epsilon", of_captum, images),
        Athena(Gamma(0.25), model, images),
        Zennit(zennit.rules.Gamma(0.25), "gamma", model, images),
        Captum(lambda: GammaRule(0.25), "gamma", of_captum, images),
        Athena(ZPlus(), model, images),
        Zennit(zennit.rules.ZPlus(), "z-plus", model, images),
        Captum(Alpha1_Beta0_Rule, "z-plus", of_captum, images),
    ]


def timed(arm: Arm, calls: int, device: str) -> tuple[float, int]:
    """The seconds of one explanation and, on a GPU, the bytes it needed."""
    on_gpu = device != "cpu"
    with arm.ready():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            standing = torch.cuda.memory_allocated()
        began = report.now(device)
        for _ in range(calls):
            relevance = arm.explain(arm.images)
        seconds = (report.now(device) - began) / calls
    assert relevance.isfinite().all(), arm.name
    return seconds, torch.cuda.max_memory_allocated() - standing if on_gpu else 0


def peak_of(name: str, place: int, alone: bool, threads: int) -> int:
    """The bytes that one explanation adds to the resident size of this process, a fresh one."""
    torch.set_num_threads(threads)
    arms = arms_of(name, alone, "cpu")
    plain, arm = arms[0], arms[place]
    del arms
    plain.explain(plain.images)
    with arm.ready():
        arm.explain(arm.images[:1])
    gc.collect()
    with arm.ready():
        return memory.added_by(lambda: arm.explain(arm.images))


def rounds(arms: list[Arm], count: int, calls: int, device: str) -> tuple[list[list[float]], list[int]]:
    """The seconds of each arm in each of `count` rounds, and the bytes it needed at most."""
    seconds: list[list[float]] = [[] for _ in arms]
    peak = [0] * len(arms)
    order = random.Random(0)
    for number in range(WARM_UP + count):
        for place in order.sample(range(len(arms)), len(arms)):
            taken, needed = timed(arms[place], calls, device)
            peak[place] = max(peak[place], needed)
            if number >= WARM_UP:
                seconds[place].append(taken)
    return seconds, peak


def as_it_comes(name: str, count: int, threads: int) -> list[list[float]]:
    """The seconds of the plain gradient and of ATHENA by rules that ask for no sums."""
    torch.set_num_threads(threads)
    return rounds(arms_of(name, True, "cpu"), count, NETWORKS[name].calls, "cpu")[0]


def measure(name: str, count: int, alone: bool, threads: int, device: str) -> Iterator[report.Table]:
    """The tables of one network."""
    network = NETWORKS[name]
    count *= network.often
    arms = arms_of(name, alone, device)
    names = [arm.name for arm in arms]
    seconds, peak = rounds(arms, count, network.calls, device)
    del arms
    if device == "cpu" and memory.told():
        fresh = memory.GIVEN_BACK, peak_of, name
        peak = [memory.in_fresh_process(*fresh, place, alone, threads) for place in range(len(names))]
    yield report.Table(str(network), count, rows(names, seconds, peak))
    if device == "cpu" and network.peers:
        simple = memory.in_fresh_process(memory.AS_IT_COMES, as_it_comes, name, count, threads)
        names = names[: len(simple)]
        yield report.Table(f"{network}, in a process as it comes", count, rows(names, simple, [0] * len(names)))


def rows(names: list[str], seconds: list[list[float]], peak: list[int]) -> list[dict[str, str | float]]:
    """The rows of a table. Times are medians over rounds; a ratio is `report.ratio`."""
    found: list[dict[str, str | float]] = []
    ours = 0
    for place, name in enumerate(names):
        ours = place if name.startswith("athena") else ours
        row = {
            "arm": name,
            "ms": 1000 * statistics.median(seconds[place]),
            "of plain": report.ratio(seconds[place], seconds[0]),
            "spread": report.spread(seconds[place], seconds[0]),
        }
        if place > ours > 0:
            row["of athena"] = report.ratio(seconds[place], seconds[ours])
        if peak[0] > LEAST:
            row |= {"peak MiB": peak[place] / 2**20, "MiB of plain": peak[place] / peak[0]}
        found.append(row)
    return found


def main() -> None:
    chosen = report.options("The cost of one explanation.", NETWORKS, rounds=20)
    memory.keep_freed()
    torch.set_num_threads(chosen.threads)
    report.run(chosen, lambda name: measure(name, chosen.rounds, chosen.alone, chosen.threads, chosen.device))


if __name__ == "__main__":
    main()
