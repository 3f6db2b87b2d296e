"""Claims about relevance that keeps its graph, against finite differences in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_relevance import NETWORKS, RULES, every_network, every_rule, images, narrow_mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import athena
from athena.rules import Epsilon, Gamma, Zero

STEP = 1e-6


def agrees(model: nn.Module, x: Tensor, samples: int = 3, tolerance: float = 1e-5, **options: Any) -> None:
    """The gradient of a weighted sum of relevance equals finite differences, in every parameter and in the input."""
    weights: Any = None

    def value(differentiable: bool = False) -> Tensor:
        nonlocal weights
        r = athena.lrp(model, x, differentiable=differentiable, **options).input
        assert r.requires_grad == differentiable
        weights = torch.randn_like(r).detach() if weights is None else weights
        return (r * weights).sum()

    x.requires_grad_()
    tensors = [*model.parameters(), x]
    gradients = torch.autograd.grad(value(True), tensors, allow_unused=True)
    x.requires_grad_(False)
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients[:-1])
    for tensor, gradient in zip(tensors, gradients, strict=True):
        flat = tensor.detach().view(-1)
        for place in torch.randperm(len(flat))[:samples].tolist():
            before, ends = flat[place].item(), []
            for sign in (1, -1):
                with torch.no_grad():
                    flat[place] = before + sign * STEP
                ends.append(value().item())
            with torch.no_grad():
                flat[place] = before
            expected = (ends[0] - ends[1]) / (2 * STEP)
            actual = 0.0 if gradient is None else gradient.reshape(-1)[place].item()
            assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance)


@every_network
@every_rule
def test_the_gradient_of_relevance_equals_finite_differences(network: str, rule: str) -> None:
    build, shape = NETWORKS[network]
    agrees(build(), images(2, *shape[1:]), target="logits", rule=RULES[rule][0])


@pytest.mark.parametrize("target", [None, "softmax", "logits", lambda output: output.square()])
def test_it_does_so_from_every_start(target: Any) -> None:
    agrees(narrow_mlp(), images(2, 1, 3, 4), target=target)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        nn.init.normal_(self.attention.in_proj_bias)  # at 0, where it starts, the parts by sign have no derivative
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def flat(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 3), *copy.deepcopy(layers), nn.Flatten(), nn.LazyLinear(3))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention and layer norm": (Attending, (2, 4, 6)),
    "batch norm": (flat(nn.BatchNorm2d(4), nn.ReLU()), (2, 2, 5, 5)),
    "instance norm": (flat(nn.InstanceNorm2d(4, affine=True), nn.ReLU()), (2, 2, 5, 5)),
    "group norm": (flat(nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2)), (2, 2, 6, 6)),
    "rms norm": (flat(nn.Flatten(2), nn.RMSNorm(9), nn.GELU()), (2, 2, 5, 5)),
    "gelu": (flat(nn.GELU()), (2, 2, 5, 5)),
    "elu": (flat(nn.ELU()), (2, 2, 5, 5)),
    "sigmoid": (flat(nn.Sigmoid()), (2, 2, 5, 5)),
    "tanh": (flat(nn.Tanh()), (2, 2, 5, 5)),
    "silu, gated": (flat(nn.SiLU(), nn.GLU(1)), (2, 2, 5, 5)),
    "softmax": (flat(nn.Softmax(1)), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.1), Gamma()])
def test_it_does_so_through_norms_activations_and_attention(block: str, rule: athena.rules.Rule) -> None:
    build, shape = BLOCKS[block]
    model, x = build(), images(*shape)
    with torch.no_grad():
        model(x.float())
    agrees(model.double().eval(), x, samples=2, target=1, rule=rule)


@every_rule
def test_the_relevance_is_that_without_a_graph_and_its_gradient_is_finite_at_zeros(rule: str) -> None:
    model, x = NETWORKS["cnn"][0](), images(2, 2, 6, 6)
    x[:, :, :3] = 0
    with torch.no_grad():
        model.get_parameter("features.conv1.weight")[0] = 0
        model.get_parameter("features.conv1.bias")[0] = 0
    plain = athena.lrp(model, x, rule=RULES[rule][0])
    r = athena.lrp(model, x, rule=RULES[rule][0], differentiable=True)
    assert not plain.input.requires_grad
    torch.testing.assert_close(r.input, plain.input, rtol=1e-9, atol=1e-11)
    r.input.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(r.layers["head.1"], plain.layers["head.1"], rtol=1e-9, atol=1e-11)


def test_frozen_layers_let_the_gradient_through_to_what_lies_below_them() -> None:
    model = narrow_mlp()
    model.get_submodule("linear2").requires_grad_(False)
    model.get_submodule("linear3").requires_grad_(False)
    x = images(2, 1, 3, 4)
    r = athena.lrp(model, x, target=1, differentiable=True)
    (found,) = torch.autograd.grad(r.input.square().sum(), model.get_parameter("linear1.weight"))
    model.requires_grad_(True)
    r = athena.lrp(model, x, target=1, differentiable=True)
    (expected,) = torch.autograd.grad(r.input.square().sum(), model.get_parameter("linear1.weight"))
    torch.testing.assert_close(found, expected)


def test_relevance_in_a_loss_moves_relevance_away_from_where_it_is_not_wanted() -> None:
    x, y = images(8, 1, 3, 4), torch.zeros(8, dtype=torch.long)

    def unwanted(model: nn.Module, differentiable: bool = True) -> Tensor:
        return athena.lrp(model, x, y, differentiable=differentiable).input[:, :, 0].square().mean()

    def trained(weight: float) -> float:
        torch.manual_seed(1)
        model = narrow_mlp()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimiser.zero_grad()
            (weight * unwanted(model) + nn.functional.cross_entropy(model(x), y)).backward()
            optimiser.step()
        return unwanted(model, differentiable=False).item()

    assert trained(10.0) < trained(0.0) / 4


def test_tokens_train_their_embedding() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.embed(tokens)).mean(1))

    model = Bag().double()
    r = athena.lrp(model, torch.tensor([[1, 2]]), target=0, rule=Zero(), at="embed", differentiable=True)
    (gradient,) = torch.autograd.grad(r.input.sum(), model.embed.weight)
    expected = (model.embed.weight > 0) * model.head.weight[0] / 2
    torch.testing.assert_close(gradient[1:3], expected[1:3])
    assert not gradient[3:].any()


def test_a_checkpointed_part_is_refused() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = narrow_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    with pytest.raises(ValueError, match="checkpoint"):
        athena.lrp(Saving(), images(2, 1, 3, 4), differentiable=True)
