"""The thesis's formulas written out naively: sections 3.6.2 (LRP rules) and 6.1.5 (Algorithm 1).

Slow on purpose and independent of the package: nothing here uses autograd on a network or imports `athena`. An affine
layer is a matrix (a convolution too: its matrix is filled in by loops over positions), and only chains, nested
`nn.Sequential` or not, are understood. All tensors are float64.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Rule(NamedTuple):
    """R_j = sum_k c_jk / (sum_j c_jk + b_k + epsilon sign) R_k, with contributions c of one of these kinds.

    "gamma": a_j w_jk, those of z_k's own sign 1 + gamma times; LRP-0 and LRP-epsilon have gamma = 0. "alpha-beta":
    alpha times the positive ones over their sum, less beta times the negative ones over theirs. "box": a_j w_jk -
    low w+_jk - high w-_jk. "square": w_jk ** 2. "flat": 1.
    """

    epsilon: float = 0.0
    gamma: float = 0.0
    kind: str = "gamma"
    alpha: float = 1.0
    beta: float = 0.0
    low: float = 0.0
    high: float = 1.0


DEFAULT = Rule(epsilon=1e-6)


class Row(NamedTuple):
    """One line of the conservation table."""

    layer: str
    relevance: float
    bias: float
    stabiliser: float


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    return torch.where(z >= 0, z + epsilon, z - epsilon)


def quotient(relevance: Tensor, z: Tensor) -> Tensor:
    """relevance / z, where no relevance over no contribution is none."""
    return torch.where(relevance == 0, torch.zeros_like(z), relevance / z)


def linear_relevance(a: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor, rule: Rule) -> Tensor:
    """The sums of 3.6.2 by loops. a (batch, J), weight (K, J), bias (K,), relevance (batch, K) -> (batch, J)."""
    outputs, inputs = weight.shape
    result = torch.zeros_like(a)
    for n in range(len(a)):
        for k in range(outputs):
            w = weight[k].tolist()
            b = bias[k].item() if bias is not None else 0.0
            plain = [a[n, j].item() * w[j] for j in range(inputs)]
            for factor, contribution, of_bias in contributions(plain, w, b, rule):
                z = sum(contribution) + of_bias
                z += rule.epsilon if z >= 0 else -rule.epsilon
                for j in range(inputs):
                    if relevance[n, k] != 0 and contribution[j] != 0:
                        result[n, j] += factor * contribution[j] / z * relevance[n, k].item()
    return result


def contributions(plain: list[float], w: list[float], b: float, rule: Rule) -> list[tuple[float, list[float], float]]:
    """The factor, the contribution of each input and that of the bias, for each part of a rule, for one neuron."""
    if rule.kind == "gamma":
        sign = 1.0 if sum(plain) + b > 0 else -1.0
        return [(1.0, [favoured(c, sign, rule.gamma) for c in plain], favoured(b, sign, rule.gamma))]
    if rule.kind == "alpha-beta":
        positive = rule.alpha, [max(c, 0.0) for c in plain], max(b, 0.0)
        return [positive, (-rule.beta, [min(c, 0.0) for c in plain], min(b, 0.0))]
    if rule.kind == "box":
        pairs = zip(plain, w, strict=True)
        return [(1.0, [c - rule.low * max(v, 0.0) - rule.high * min(v, 0.0) for c, v in pairs], 0.0)]
    if rule.kind == "square":
        return [(1.0, [v * v for v in w], b * b)]
    assert rule.kind == "flat", rule.kind
    return [(1.0, [1.0 for _ in w], 0.0)]


def favoured(contribution: float, sign: float, gamma: float) -> float:
    return contribution * (1 + gamma) if contribution * sign > 0 else contribution


# One layer, neuron by neuron


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after one axis for `padding="same"`: an odd one goes behind."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def paddings(conv: nn.Conv2d) -> list[tuple[int, int]]:
    if conv.padding == "same":
        return [same_padding(k, d) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    return [(int(p), int(p)) for p in conv.padding]


def conv_table(conv: nn.Conv2d, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """The convolution as a matrix: entry (k, j) says which weight joins input j to output k, -1 for none.

    shape: (channels, height, width) of the input. Returns the table (outputs, inputs) and the output's shape.
    """
    channels, height, width = shape
    (top, below), (left, right) = paddings(conv)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = (height + top + below - dh * (kh - 1) - 1) // sh + 1
    columns = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    per_group, filters_per_group = channels // conv.groups, conv.out_channels // conv.groups
    weights = np.arange(conv.weight.numel()).reshape(conv.weight.shape)
    table = np.full((conv.out_channels, rows, columns, channels, height, width), -1)
    for o, r, c in product(range(conv.out_channels), range(rows), range(columns)):
        first = o // filters_per_group * per_group
        for i, u, v in product(range(per_group), range(kh), range(kw)):
            y, x = r * sh + u * dh - top, c * sw + v * dw - left
            if 0 <= y < height and 0 <= x < width:
                table[o, r, c, first + i, y, x] = weights[o, i, u, v]
    return torch.from_numpy(table.reshape(-1, channels * height * width)), (conv.out_channels, rows, columns)


# Affine maps: z = W a + b with W as a matrix


class Dense:
    """An affine layer whose matrix is written out in full."""

    def __init__(self, table: Tensor, out_shape: tuple[int, ...], weight: Tensor):
        self.table, self.out_shape, self.weight_shape = table, out_shape, weight.shape

    def matrix(self, weight: Tensor) -> Tensor:
        return torch.where(self.table >= 0, weight.flatten()[self.table.clamp(min=0)], 0.0)

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        z = torch.einsum("kj,nj->nk", self.matrix(weight), a.flatten(1))
        return z.reshape(len(a), *self.out_shape)

    def transposed(self, s: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        return torch.einsum("kj,nk->nj", self.matrix(weight), s.flatten(1)).reshape(like.shape)

    def weight_gradient(self, a: Tensor, gradient: Tensor) -> Tensor:
        matrix = torch.einsum("nk,nj->kj", gradient.flatten(1), a.flatten(1))
        used = self.table >= 0
        sums = torch.zeros(self.weight_shape.numel(), dtype=a.dtype)
        return sums.index_add(0, self.table[used], matrix[used]).reshape(self.weight_shape)


class Plain(Dense):
    """A linear layer on (batch, features): its matrix is its weight."""

    def __init__(self, weight: Tensor):
        super().__init__(torch.empty(0), (weight.shape[0],), weight)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def weight_gradient(self, a: Tensor, gradient: Tensor) -> Tensor:
        return torch.einsum("nk,nj->kj", gradient, a)


class Patches:
    """A convolution without groups as a product with its input's patches, where the full matrix would not fit."""

    def __init__(self, conv: nn.Conv2d, shape: tuple[int, int, int]):
        assert conv.groups == 1
        channels, height, width = shape
        (top, below), (left, right) = paddings(conv)
        self.padding, self.padded = (left, right, top, below), (channels, height + top + below, width + left + right)
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        place = np.arange(np.prod(self.padded)).reshape(self.padded)
        rows = (self.padded[1] - dh * (kh - 1) - 1) // sh + 1
        columns = (self.padded[2] - dw * (kw - 1) - 1) // sw + 1
        taps = [
            place[i, u * dh : u * dh + sh * (rows - 1) + 1 : sh, v * dw : v * dw + sw * (columns - 1) + 1 : sw].ravel()
            for i, u, v in product(range(channels), range(kh), range(kw))
        ]
        self.taps = torch.from_numpy(np.stack(taps))
        self.out_shape, self.weight_shape = (conv.out_channels, rows, columns), conv.weight.shape

    def patches(self, a: Tensor) -> Tensor:
        return nn.functional.pad(a, self.padding).flatten(1)[:, self.taps]

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("kt,ntl->nkl", weight.flatten(1), self.patches(a)).reshape(len(a), *self.out_shape)

    def transposed(self, s: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        patches = torch.einsum("kt,nkl->ntl", weight.flatten(1), s.flatten(2))
        sums = torch.zeros(len(s), int(np.prod(self.padded)), dtype=s.dtype)
        sums.index_add_(1, self.taps.flatten(), patches.flatten(1))
        left, right, top, below = self.padding
        _, height, width = self.padded
        return sums.reshape(len(s), *self.padded)[:, :, top : height - below, left : width - right].reshape(like.shape)

    def weight_gradient(self, a: Tensor, gradient: Tensor) -> Tensor:
        return torch.einsum("nkl,ntl->kt", gradient.flatten(2), self.patches(a)).reshape(self.weight_shape)


LARGEST_MATRIX = 2_000_000


def affine_map(module: nn.Linear | nn.Conv2d, a: Tensor) -> Dense | Patches:
    if isinstance(module, nn.Linear):
        return Plain(module.weight)
    channels, height, width = a.shape[1:]
    entries = a[0].numel() * module.out_channels * height * width
    if entries > LARGEST_MATRIX:
        return Patches(module, (channels, height, width))
    return Dense(*conv_table(module, (channels, height, width)), module.weight)


def spread(bias: Tensor | None, z: Tensor) -> Tensor:
    """The bias of every output neuron, zeros without one."""
    if bias is None:
        return torch.zeros_like(z)
    return bias.reshape(-1, *[1] * (z.dim() - 2)).expand_as(z)


# Chains of layers


@dataclass
class Step:
    """One layer of a chain on one batch: what came in, what went out."""

    path: str
    module: nn.Module
    a: Tensor
    z: Tensor
    map: Dense | Patches | None = None

    @property
    def affine(self) -> bool:
        return self.map is not None

    def share(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, Row]:
        """The relevance of this layer's input, and where the relevance of its output went."""
        module, total = self.module, relevance.sum().item()
        if self.map is not None:
            down, absorbed = self._by_rule(self.map, relevance, rule)
            return down, Row(self.path, total, *absorbed)
        if isinstance(module, nn.AvgPool2d):
            size = pooling_window(module)[0] ** 2
            nothing = self.z == 0  # a window of zeros, of which each gets the same
            d = torch.where(nothing, 0.0, quotient(relevance, self.z) / size)
            equal = unpool(module, torch.where(nothing, relevance, 0.0) / size, self.a)
            return self.a * unpool(module, d, self.a) + equal, Row(self.path, total, 0, 0)
        return self.gradient(relevance, passes_negative=True), Row(self.path, total, 0, 0)

    def _by_rule(self, map: Dense | Patches, relevance: Tensor, rule: Rule) -> tuple[Tensor, tuple[float, float]]:
        """The relevance of the input of an affine layer, and what bias and stabiliser kept, term by term."""
        w, b, one = self.module.weight, spread(self.module.bias, self.z), torch.ones_like(self.a)
        up, down = (self.a.clamp(min=0), self.a.clamp(max=0)), (w.clamp(min=0), w.clamp(max=0))
        for_it, against = ([(up[0], down[0]), (up[1], down[1])], [(up[0], down[1]), (up[1], down[0])])
        no_bias = torch.zeros_like(b)
        parts: list[tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]]  # share of R, (input, weight) pairs, bias
        if rule.kind == "gamma" and rule.gamma == 0:
            parts = [(relevance, [(self.a, w)], b)]
        elif rule.kind == "gamma":
            plain = [(self.a, w)]
            positive = [*plain, *((rule.gamma * x, v) for x, v in for_it)]
            negative = [*plain, *((rule.gamma * x, v) for x, v in against)]
            above = self.z > 0
            parts = [
                (relevance * above, positive, b + rule.gamma * b.clamp(min=0)),
                (relevance * ~above, negative, b + rule.gamma * b.clamp(max=0)),
            ]
        elif rule.kind == "alpha-beta":
            parts = [
                (rule.alpha * relevance, for_it, b.clamp(min=0)),
                (-rule.beta * relevance, against, b.clamp(max=0)),
            ]
        elif rule.kind == "box":
            parts = [(relevance, [(self.a, w), (-rule.low * one, down[0]), (-rule.high * one, down[1])], no_bias)]
        elif rule.kind == "square":
            parts = [(relevance, [(one, w * w)], b * b)]
        else:
            parts = [(relevance, [(one, torch.ones_like(w))], no_bias)]
        result, of_bias, passed = torch.zeros_like(self.a), 0.0, 0.0
        for part, pairs, bias in parts:
            z = sum((map.forward(x, v) for x, v in pairs), bias)
            s = torch.where(z == 0, 0.0, quotient(part, stabilised(z, rule.epsilon)))
            for x, v in pairs:
                result = result + x * map.transposed(s, v, self.a)
            of_bias += (bias * s).sum().item()
            passed += (z * s).sum().item()
        return result, (of_bias, relevance.sum().item() - passed)

    def gradient(self, gradient: Tensor, passes_negative: bool = False) -> Tensor:
        """The gradient of the loss at this layer's input, from the one at its output."""
        module = self.module
        if self.map is not None:
            return self.map.transposed(gradient, module.weight, self.a)
        if isinstance(module, nn.ReLU):
            return gradient if passes_negative else gradient * (self.a > 0)
        if isinstance(module, nn.MaxPool2d):
            return to_winners(module, gradient, self.a)
        if isinstance(module, nn.AvgPool2d):
            return unpool(module, gradient / pooling_window(module)[0] ** 2, self.a)
        assert isinstance(module, nn.Flatten | nn.Dropout | nn.Identity), module
        return gradient.reshape(self.a.shape)


def pooling_window(module: nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int]:
    kernel, stride = module.kernel_size, module.stride
    assert isinstance(kernel, int)
    assert isinstance(stride, int)
    assert module.padding == 0
    return kernel, stride


def windows(module: nn.MaxPool2d | nn.AvgPool2d, a: Tensor) -> Tensor:
    """Flat positions in one channel of each window's members: (positions, members)."""
    kernel, stride = pooling_window(module)
    height, width = a.shape[-2:]
    starts = product(range(0, height - kernel + 1, stride), range(0, width - kernel + 1, stride))
    members = list(product(range(kernel), range(kernel)))
    return torch.tensor([[(y + u) * width + x + v for u, v in members] for y, x in starts])


def to_winners(module: nn.MaxPool2d, values: Tensor, a: Tensor) -> Tensor:
    table, flat = windows(module, a), a.flatten(2)
    first_largest = torch.from_numpy(flat[:, :, table].numpy().argmax(-1))
    winner = table[torch.arange(len(table)), first_largest]
    return torch.zeros_like(flat).scatter_add(2, winner, values.flatten(2)).reshape(a.shape)


def unpool(module: nn.AvgPool2d, values: Tensor, a: Tensor) -> Tensor:
    table = windows(module, a)
    each = values.flatten(2).unsqueeze(-1).expand(*a.shape[:2], *table.shape)
    sums = torch.zeros_like(a.flatten(2))
    return sums.index_add(2, table.flatten(), each.flatten(2)).reshape(a.shape)


def chain(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a nested `nn.Sequential`, with their module paths."""
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential):
            yield from chain(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def forward(model: nn.Sequential, x: Tensor) -> list[Step]:
    steps: list[Step] = []
    for path, module in chain(model):
        a = steps[-1].z if steps else x
        if isinstance(module, nn.Linear | nn.Conv2d):
            affine = affine_map(module, a)
            z = affine.forward(a, module.weight)
            steps.append(Step(path, module, a, z + spread(module.bias, z), affine))
        elif isinstance(module, nn.ReLU):
            steps.append(Step(path, module, a, a.clamp(min=0)))
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            members = a.flatten(2)[:, :, windows(module, a)]
            z = members.amax(-1) if isinstance(module, nn.MaxPool2d) else members.mean(-1)
            kernel, stride = pooling_window(module)
            steps.append(Step(path, module, a, z.reshape(*a.shape[:2], (a.shape[2] - kernel) // stride + 1, -1)))
        elif isinstance(module, nn.Flatten):
            steps.append(Step(path, module, a, a.flatten(1)))
        else:
            steps.append(Step(path, module, a, a))
    return steps


# Where relevance starts

Start = Callable[[Tensor], Tensor]


def predicted(output: Tensor) -> Tensor:
    """The predicted class, its logit as the relevance to share out."""
    relevance = torch.zeros_like(output)
    for n, row in enumerate(output):
        relevance[n, row.argmax()] = row.max()
    return relevance


def of_class(classes: int | Iterable[int]) -> Start:
    def start(output: Tensor) -> Tensor:
        relevance = torch.zeros_like(output)
        for n, c in enumerate([classes] * len(output) if isinstance(classes, int) else classes):
            relevance[n, c] = output[n, c]
        return relevance

    return start


def logits(output: Tensor) -> Tensor:
    return output.clone()


def softmax(output: Tensor) -> Tensor:
    return output.exp() / output.exp().sum(1, keepdim=True)


# Whole networks


class Explanation(NamedTuple):
    input: Tensor
    layers: dict[str, Tensor]
    rows: list[Row]


@torch.no_grad()
def lrp(model: nn.Sequential, x: Tensor, start: Start, rule: Rule | Callable[[str], Rule]) -> Explanation:
    """Relevance of the input, of every affine layer's output (forward order), and the conservation table."""
    steps = forward(model, x)
    relevance, layers, rows = start(steps[-1].z), {}, []
    for step in reversed(steps):
        if step.affine:
            layers[step.path] = relevance
        relevance, row = step.share(relevance, rule if isinstance(rule, Rule) else rule(step.path))
        if step.affine:
            rows.append(row)
    rows.append(Row("input", relevance.sum().item(), 0, 0))
    return Explanation(relevance, dict(reversed(layers.items())), rows)


@torch.no_grad()
def algorithm_1(
    model: nn.Sequential,
    x: Tensor,
    labels: Tensor,
    factors: dict[str, float],
    start: Start = predicted,
    rule: Rule = DEFAULT,
    adjusted: Callable[[Tensor], Tensor] = lambda relevance: relevance,
) -> dict[str, Tensor]:
    """Thesis 6.1.5: gradients of the mean cross-entropy by parameter name, scaled by 1 + factor * relevance.

    factors: the guided layers by path. The output layer is never guided. `adjusted` changes the relevance just before
    it scales a gradient (normalisation, mean over the batch), not what is passed on.
    """
    steps = forward(model, x)
    output = steps[-1].z
    onehot = torch.zeros_like(output)
    onehot[torch.arange(len(output)), labels] = 1
    gradient = (softmax(output) - onehot) / len(output)
    cache = start(output)
    gradients = {}
    output_layer = True
    for step in reversed(steps):
        if step.map is not None:
            if not output_layer and step.path in factors:
                gradient = gradient * (1 + factors[step.path] * adjusted(cache))
            output_layer = False
            gradients[f"{step.path}.weight"] = step.map.weight_gradient(step.a, gradient)
            if step.module.bias is not None:
                gradients[f"{step.path}.bias"] = gradient.sum([0, *range(2, gradient.dim())])
        cache, _ = step.share(cache, rule)
        gradient = step.gradient(gradient)
    return gradients
