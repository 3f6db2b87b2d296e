"""What one explanation costs beside a plain gradient, and beside zennit and Captum.

    python benchmarks/lrp.py --steps 10 --threads 1 --device cpu

All arms of a network take turns in one process, in an order drawn anew for each round, so that whatever else the
machine does hits them alike. It keeps the memory that it frees (`memory.keep_freed`). On a CPU the first arms are then
timed in a process as it comes as well, where memory is given back between calls and costs a page fault for every 4 KiB
to get again: that is the price for someone who sets nothing.

An explanation is that of the predicted class of each of a batch of random images, down to the input, by a float32
network in eval mode with random weights. The arms:

    plain     `torch.autograd.grad` of the predicted logits to the input; parameters are as a model has them, requiring
              gradients, though none is computed for them
    athena    `athena.lrp` as a user calls it
    zennit    forward and `torch.autograd.grad` under a composite whose hooks are on the model before the clock starts,
              as for someone who explains many batches
    Captum    `LRP(model).attribute`, with the classes known and the rules on the layers before the clock starts (they
              have to be put there for each call). It knows no `nn.Flatten`, which gets its epsilon rule here

What the peers cannot express is not measured. That all arms of a rule give the same relevance is shown in
tests/test_peers.py, for Captum on networks without bias (its gamma and z-plus treat the bias in their own way).

Peak memory is what one explanation adds to the model and the images. On a GPU PyTorch counts it. On the CPU each arm
runs once in a fresh process, and the highest resident size during the call less that before it is read from
/proc/self (Linux alone). Tensors live in mappings of their own there (MALLOC_MMAP_THRESHOLD_), so that what is freed is
gone at once and no earlier peak hides a later one; one call on a single image and a plain one on the whole batch come
before, for what PyTorch itself sets up. torch.profiler's account of allocations says the same to 1 MiB.
"""

import argparse
import copy
import gc
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import memory
import torch
import torchvision
import zennit.rules
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, PropagationRule
from torch import Tensor, nn
from zennit.core import Composite, Hook
from zennit.types import Activation, AvgPool, Linear

import athena
from athena.models import cnn
from athena.rules import Epsilon, Gamma, Rule, Zero, ZPlus

WARM_UP = 1
SIMPLE = 3  # plain, ATHENA by LRP-0 and epsilon


class Network(NamedTuple):
    """A network to explain, and the shape of a batch of its images."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]


NETWORKS = {
    "cnn": Network("CNN of thesis table 6.1", cnn, (64, 3, 32, 32)),
    "vgg16": Network("VGG-16", torchvision.models.vgg16, (16, 3, 64, 64)),
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

    def __init__(self, rule: Rule, *given: Any) -> None:
        super().__init__(f"athena {rule}", *given)
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


def arms_of(network: str, device: str) -> list[Arm]:
    """Every arm, in the table's order; the same weights and images each time it is called."""
    torch.manual_seed(0)
    _, build, shape = NETWORKS[network]
    model, images = build().to(device).eval(), torch.rand(*shape, device=device)
    of_captum = copy.deepcopy(model)
    return [
        Plain("plain gradient", model, images),
        Athena(Zero(), model, images),
        Athena(Epsilon(1e-6), model, images),
        Zennit(zennit.rules.Epsilon(1e-6), "epsilon", model, images),
        Captum(lambda: EpsilonRule(1e-6), "epsilon", of_captum, images),
        Athena(Gamma(0.25), model, images),
        Zennit(zennit.rules.Gamma(0.25), "gamma", model, images),
        Captum(lambda: GammaRule(0.25), "gamma", of_captum, images),
        Athena(ZPlus(), model, images),
        Zennit(zennit.rules.ZPlus(), "z-plus", model, images),
        Captum(Alpha1_Beta0_Rule, "z-plus", of_captum, images),
    ]


def timed(arm: Arm, device: str) -> tuple[float, int]:
    """The seconds of one explanation and, on a GPU, the bytes it needed."""
    on_gpu = device != "cpu"
    with arm.ready():
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            standing = torch.cuda.memory_allocated()
        began = time.perf_counter()
        relevance = arm.explain(arm.images)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    assert relevance.isfinite().all(), arm.name
    return seconds, torch.cuda.max_memory_allocated() - standing if on_gpu else 0


def peak_of(network: str, place: int, threads: int) -> int:
    """The bytes that one explanation adds to the resident size of this process, a fresh one."""
    torch.set_num_threads(threads)
    arms = arms_of(network, "cpu")
    plain, arm = arms[0], arms[place]
    del arms
    plain.explain(plain.images)
    with arm.ready():
        arm.explain(arm.images[:1])
    gc.collect()
    with arm.ready():
        return memory.added_by(lambda: arm.explain(arm.images))


def rounds(arms: list[Arm], steps: int, device: str) -> tuple[list[list[float]], list[int]]:
    """The seconds of each arm in each round, and the bytes it needed at most."""
    seconds: list[list[float]] = [[] for _ in arms]
    peak = [0] * len(arms)
    order = random.Random(0)
    for step in range(WARM_UP + steps):
        for place in order.sample(range(len(arms)), len(arms)):
            taken, needed = timed(arms[place], device)
            peak[place] = max(peak[place], needed)
            if step >= WARM_UP:
                seconds[place].append(taken)
    return seconds, peak


def as_it_comes(network: str, steps: int, threads: int) -> list[list[float]]:
    """The seconds of the plain gradient and of ATHENA by rules that ask for no sums."""
    torch.set_num_threads(threads)
    return rounds(arms_of(network, "cpu")[:SIMPLE], steps, "cpu")[0]


def measure(network: str, steps: int, threads: int, device: str) -> str:
    """The tables of one network."""
    arms = arms_of(network, device)
    names = [arm.name for arm in arms]
    seconds, peak = rounds(arms, steps, device)
    del arms
    title, _, shape = NETWORKS[network]
    title = f"{title}, {' x '.join(map(str, shape))}"
    if device != "cpu":
        return table(title, names, seconds, peak)
    if memory.told():
        fresh = memory.GIVEN_BACK, peak_of, network
        peak = [memory.in_fresh_process(*fresh, place, threads) for place in range(len(names))]
    simple = memory.in_fresh_process(memory.AS_IT_COMES, as_it_comes, network, steps, threads)
    return "\n".join(
        [
            table(title, names, seconds, peak),
            table("The same in a process as it comes", names[:SIMPLE], simple, [0] * SIMPLE),
        ]
    )


def table(title: str, names: list[str], seconds: list[list[float]], peak: list[int]) -> str:
    """Times are medians over rounds; ratios are medians over rounds of the ratio within one round."""

    def ratio(own: int, other: int) -> float:
        return statistics.median(a / b for a, b in zip(seconds[own], seconds[other], strict=True))

    lines = [title, f"{'arm':<24}{'ms':>9}{'of plain':>10}{'of athena':>11}{'peak MiB':>10}"]
    ours = 0
    for place, name in enumerate(names):
        ours = place if name.startswith("athena") else ours
        line = f"{name:<24}{1000 * statistics.median(seconds[place]):>9.1f}{ratio(place, 0):>10.2f}"
        line += f"{ratio(place, ours):>11.2f}" if place > ours > 0 else " " * 11
        lines.append(line + (f"{peak[place] / 2**20:>10.1f}" if peak[place] else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of one explanation.")
    parser.add_argument("--steps", type=int, default=10, help="timed explanations of each arm")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="one of the networks; all by default")
    options = parser.parse_args()
    memory.keep_freed()
    torch.set_num_threads(options.threads)
    print(
        f"PyTorch {torch.__version__}, {options.device}, {options.threads} thread(s), {options.steps} rounds; "
        "'of athena': how many times the time of ATHENA by the same rule"
    )
    for network in options.network or NETWORKS:
        print("", measure(network, options.steps, options.threads, options.device), sep="\n", flush=True)


if __name__ == "__main__":
    main()
