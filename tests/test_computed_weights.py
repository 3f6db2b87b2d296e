"""Claims about layers whose weights are computed, frozen between steps, or whose bias is added by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Gamma, Rule, Zero


class Adapted(nn.Module):
    """A linear layer with an update of low rank in its weight, as LoRA merges it."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.linear, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 5))
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        update = self.up @ self.down
        weight = self.linear.weight + (update.detach() if self.detached else update)
        return self.head(F.linear(self.below(x).relu(), weight, self.linear.bias).relu())


def test_a_product_that_makes_a_weight_is_no_layer() -> None:
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    gradients = []
    for detached in (False, True):
        model = Adapted(detached).double()
        with athena.Guidance(model, factor=0.7):
            for _ in range(2):
                model.zero_grad()
                F.cross_entropy(model(x), labels).backward()
        gradients.append(model.below.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [Zero(), Epsilon(1e-3), Gamma(0.25)], ids=str)
def test_a_layer_that_is_frozen_between_two_steps_is_guided_as_one_frozen_from_the_start(rule: Rule) -> None:
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
        return nn.Sequential(*layers).double()

    found = []
    for steps in (1, 2):
        network = model()
        with athena.Guidance(network, factor=0.7, rule=rule):
            for step in range(steps):
                network[2].requires_grad_(step < steps - 1)
                network.zero_grad()
                F.cross_entropy(network(x), labels).backward()
        found.append(network[0].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("written", ["x @ w + b", "add_"])
def test_a_bias_added_by_hand_is_guided_like_that_of_a_linear_layer(written: str) -> None:
    class ByHand(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(layer.weight.detach().T.clone()), nn.Parameter(layer.bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).add_(self.bias) if written == "add_" else x @ self.weight + self.bias

    torch.manual_seed(0)
    layers = [nn.Linear(6, 5).double(), nn.Linear(5, 5).double(), nn.Linear(5, 3).double()]
    fused = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    by_hand = nn.Sequential(ByHand(layers[0]), nn.ReLU(), ByHand(layers[1]), nn.ReLU(), ByHand(layers[2]))
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    for model in (fused, by_hand):
        with athena.Guidance(model, factor=0.7, scope=["0", "2"]):
            F.cross_entropy(model(x), labels).backward()
    for place in (0, 2):
        torch.testing.assert_close(by_hand[place].weight.grad.T, fused[place].weight.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(by_hand[place].bias.grad, fused[place].bias.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.3), Gamma(0.25)], ids=str)
def test_cross_attention_with_biases_conserves(batch_first: bool, rule: Rule) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            query = x[:, :2] if batch_first else x[:2]
            return self.head(self.attention(query, x, x)[0].mean(1 if batch_first else 0))

    torch.manual_seed(0)
    model = Cross().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    explained = athena.lrp(model, torch.randn(3, 5, 8, dtype=torch.float64), rule=rule)
    table = explained.conservation()
    kept = table["bias"].sum() + table["stabiliser"].sum()
    assert explained.input.sum().item() + kept == pytest.approx(explained.output.sum().item(), rel=1e-9)


def test_a_factor_may_be_set_between_two_steps_and_is_checked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def gradient() -> Tensor:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        found = model[0].weight.grad
        assert found is not None
        return found.clone()

    plain = gradient()
    with athena.Guidance(model, factor=0.7) as guidance:
        guided = gradient()
        guidance.factor = 0.0
        assert torch.equal(gradient(), plain)
        guidance.factor = 0.7
        assert torch.equal(gradient(), guided)
        with pytest.raises(TypeError, match="finite"):
            guidance.factor = float("nan")
        with pytest.raises(ValueError, match="lines"):
            guidance.scope = "lines"
        assert torch.equal(gradient(), guided)


def test_a_backward_hook_on_a_layer_passes_relevance_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    found = []
    for hooked in (False, True):
        if hooked:
            model[2].register_full_backward_hook(lambda module, below, above: None)
        model.zero_grad()
        with athena.Guidance(model, factor=0.7):
            F.cross_entropy(model(x), labels).backward()
        found.append((model[0].weight.grad, model[2].weight.grad, athena.lrp(model, x).input))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
