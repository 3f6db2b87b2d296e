"""Claims about the edges of the engine: what is input, constant, bias or padding, where the graph hardly tells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_faults import unaccounted
from test_relevance import close, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import athena
from athena.rules import Epsilon, Flat, Gamma, Rule, WSquare, ZBox, Zero, ZPlus

LABELS = torch.tensor([0, 2, 1])


def guided_gradients(
    model: nn.Module, x: Tensor, factor: float | dict[str, float], **options: Any
) -> dict[str, Tensor]:
    model.zero_grad()
    with athena.Guidance(model, factor, **options):
        F.cross_entropy(model(x), LABELS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Linear layers written in other ways

BIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "z + b": lambda z, b: z + b,
    "b + z": lambda z, b: b + z,
    "z - (-b)": lambda z, b: z - (-b),
    "b[None]": lambda z, b: z + b[None],
    "expand": lambda z, b: z + b.expand(len(z), -1),
    "view": lambda z, b: z + b.view(1, -1),
}


class WithBias(nn.Module):
    """A linear layer whose bias is added in some way, or by PyTorch's own function."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.head, self.add = nn.Linear(5, 3), add

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight.T, self.bias) if self.add is None else self.add(x @ self.weight, self.bias)
        return self.head(F.relu(z))


def twins(build: Callable[[Any], nn.Module], *variants: Any) -> list[nn.Module]:
    models = []
    for variant in variants:
        torch.manual_seed(0)
        models.append(build(variant).double())
    return models


@pytest.mark.parametrize("rule", [Epsilon(0.3), Gamma(0.25)], ids=str)
@pytest.mark.parametrize("name", ["z + b", "b + z", "z - (-b)", "b[None]", "expand", "view"])
def test_a_bias_added_by_hand_is_that_of_the_layer(name: str, rule: Rule) -> None:
    by_hand, fused = twins(WithBias, BIASES[name], None)
    x = images(3, 6)
    explained, twin = (athena.lrp(model, x, rule=rule) for model in (by_hand, fused))
    close(explained.input, twin.input)
    for parameter in ("weight", "bias"):
        close(explained.parameters[parameter], twin.parameters[parameter])
    found, expected = (guided_gradients(m, x, {p: 0.7}, rule=rule) for m, p in ((by_hand, "weight"), (fused, "weight")))
    for parameter in expected:
        close(found[parameter], expected[parameter])


@pytest.mark.parametrize("name", ["z + b", "b + z", "b[None]", "expand", "view"])
def test_a_bias_added_by_hand_is_a_bias_also_where_it_is_frozen(name: str) -> None:
    by_hand, fused = twins(WithBias, BIASES[name], None)
    x = images(3, 6)
    found = athena.lrp(by_hand.requires_grad_(False), x, rule=Epsilon(0.3)).input
    close(found, athena.lrp(fused, x, rule=Epsilon(0.3)).input)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ w": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("bti,io->bto", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("io,bti->bto", w, x),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "tensordot, weight first": lambda x, w: torch.tensordot(w, x, ([0], [2])).permute(1, 2, 0),
}


class First(nn.Module):
    """A product with a parameter as the first layer, below an activation that keeps no output."""

    def __init__(self, times: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.head, self.times = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3), times

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.times(x, self.weight).exp().mean(1))


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_first_guided_layer_may_be_any_product_with_a_parameter(name: str) -> None:
    model, twin = twins(First, PRODUCTS[name], PRODUCTS["x @ w"])
    x = images(3, 4, 6)

    def signal(relevance: Any, gradient: Tensor, output: Tensor) -> Tensor:
        return output

    signal.needs_relevance = False  # type: ignore[attr-defined]
    found, expected = (guided_gradients(m, x, {"weight": 0.7}, signal=signal) for m in (model, twin))
    close(found["weight"], expected["weight"])


# What is padding, and what is looked at once


@pytest.mark.parametrize("rule", [Flat(), WSquare(), ZBox(-3, 3)], ids=str)
def test_what_padding_keeps_of_a_window_of_zeros_is_in_the_account(rule: Rule) -> None:
    torch.manual_seed(0)
    pool, above = nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 3, 2)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Threshold(0.4, 0.0), pool, above, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    explained = athena.lrp(
        model.double(), images(2, 1, 8, 8), rule=lambda path, module: rule if module is above else Zero()
    )
    assert unaccounted(explained) < 1e-9
    assert (explained.conservation()["layer"] == "2.avg_pool2d").any()


class Checkpointed(nn.Module):
    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.below, self.middle, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.checkpoints = checkpoints

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.middle(F.relu(self.below(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x))


@pytest.mark.parametrize("rule", [Epsilon(0.3), Gamma(), ZPlus(), Flat(), WSquare(), ZBox(-3, 3)], ids=str)
def test_every_rule_explains_a_checkpoint_as_what_it_computes(rule: Rule) -> None:
    model, twin = twins(Checkpointed, True, False)
    x = images(3, 6)
    close(athena.lrp(model, x, rule=rule).input, athena.lrp(twin, x, rule=rule).input)


def test_a_model_that_returns_its_input_gives_it_the_relevance_of_the_output() -> None:
    x = images(3, 6)
    explained = athena.lrp(nn.Identity(), x, target="logits")
    assert torch.equal(explained.input, x)
    assert torch.equal(athena.lrp(nn.Identity(), x, target=2).input, x * F.one_hot(torch.tensor(2), 6))
    assert explained.conservation()["layer"].tolist() == ["input"]


# What is input and what is constant, in training


class Gate(nn.Module):
    """The input times a gate that a layer computes from it."""

    def __init__(self, matrices: bool) -> None:
        super().__init__()
        self.gate, self.head, self.matrices = nn.Linear(6, 6), nn.Linear(6, 3), matrices

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.gate(x))
        return self.head((z.mT @ x).mean(1) if self.matrices else (x * z).mean(1))


class Constant(nn.Module):
    """What a layer makes of the input times what another makes of a buffer."""

    def __init__(self, _: None = None) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("words", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) * self.gate(self.words)).mean(1))


@pytest.mark.parametrize(
    ("build", "layer"), [(lambda: Gate(False), "gate"), (lambda: Gate(True), "gate"), (Constant, "body")]
)
def test_relevance_is_the_same_in_training_as_in_an_explanation(build: Callable[[], nn.Module], layer: str) -> None:
    torch.manual_seed(0)
    model, x, seen = build().double(), images(3, 4, 6), []
    relevance = athena.lrp(model, x).layers[layer]

    def signal(relevance: Tensor, gradient: Tensor, output: Tensor) -> Tensor:
        seen.append(relevance)
        return relevance

    guided_gradients(model, x, 0.7, signal=signal)
    assert len(seen) == 1
    close(seen[0], relevance)


def test_a_layer_above_the_input_plus_a_parameter_is_guided() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.mix, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.mix(x + self.places)).mean(1))

    torch.manual_seed(0)
    model, x = Placed().double(), images(3, 4, 6)
    z = model.mix(x + model.places)
    loss = F.cross_entropy(model.head(F.relu(z).mean(1)), LABELS)
    (gradient,) = torch.autograd.grad(loss, z)
    scaled = gradient * (1 + 0.7 * athena.lrp(model, x).layers["mix"])
    close(guided_gradients(model, x, 0.7)["mix.bias"], scaled.sum((0, 1)))


OPTIONS: list[dict[str, Any]] = [{"normalise": "max"}, {"granularity": "neuron"}, {"signal": lambda r, g, z: r}]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_that_ask_for_samples_are_refused_within_attention(options: dict[str, Any], batch_first: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.head(self.attention(x, x, x)[0].mean(1 if batch_first else 0))

    torch.manual_seed(0)
    model, x = Attending(), torch.rand(3, 4, 6)
    with pytest.raises(athena.UnsupportedLayer, match=r"'attention.*tokens come first"):
        guided_gradients(model, x, 0.7, **options)
    guided_gradients(model, x, 0.7)
