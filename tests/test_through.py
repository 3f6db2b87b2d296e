"""Claims about relevance that some channels alone let through, against masks put on by hand in float64."""

from typing import Any

import pytest
import torch
from test_relevance import close, images, narrow_cnn, narrow_mlp
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import AlphaBeta, Epsilon, EpsilonPlus, Flat, Gamma, Zero, ZPlus

RULES = [Zero(), Epsilon(0.1), Gamma(0.25), ZPlus(), AlphaBeta(2.0, 1.0), EpsilonPlus(), Flat()]


def closes(explained: athena.Relevance) -> None:
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    whole = explained.output.sum().item()
    assert kept + explained.input.sum().item() == pytest.approx(whole, abs=1e-9 * abs(whole))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_a_network_of_two_layers_is_explained_as_the_formula_with_a_mask_between_them(epsilon: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double(), images(6, 5)
    first, _, second = model

    def over(relevance: Tensor, z: Tensor) -> Tensor:
        return relevance / (z + epsilon * z.sign())

    z1 = x @ first.weight.T + first.bias
    a1 = z1.relu()
    z2 = a1 @ second.weight.T + second.bias
    relevance = F.one_hot(z2.argmax(1), 3) * z2
    relevance = a1 * (over(relevance, z2) @ second.weight)
    relevance = relevance * torch.tensor([1, 0, 0, 1])
    expected = x * (over(relevance, z1) @ first.weight)
    rule = Epsilon(epsilon) if epsilon else Zero()
    for path in ("0", "1"):
        explained = athena.lrp(model, x, rule=rule, through={path: [0, 3]})
        close(explained.input, expected.detach())
        close(explained.layers["0"], relevance.detach())
        closes(explained)


@pytest.mark.parametrize("path", ["features.conv1", "features.relu1", "features.conv2", "features.relu2", "features"])
def test_lrp0_on_a_convolutional_network_is_gradient_times_input_with_a_masked_gradient(path: str) -> None:
    torch.manual_seed(0)
    model, x = narrow_cnn(), images(3, 2, 6, 6).requires_grad_()
    h = x
    for name, module in model.features.named_children():
        h = module(h)
        if f"features.{name}" == path or (path == "features" and name == "pool"):
            at = h
    logits = model.head(h)
    (d,) = torch.autograd.grad(logits.max(1).values.sum(), at, retain_graph=True)
    mask = torch.zeros(at.shape[1], dtype=torch.bool)
    mask[[0, 2]] = True
    (gradient,) = torch.autograd.grad(at, x, d * mask.view(1, -1, 1, 1))
    for channels in ([0, 2], mask, mask.tolist(), torch.tensor([2, 0]), mask.view(1, -1, 1, 1)):
        explained = athena.lrp(model, x.detach(), rule=Zero(), through={path: channels})
        close(explained.input, (x * gradient).detach())
        closes(explained)


def with_norms() -> nn.Sequential:
    """A chain in which batch norm is merged into the layer below it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(5, 6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 3)),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.double()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_maps_of_all_channels_add_up_to_the_whole_map_at_every_module_of_a_chain(rule: Any) -> None:
    model, x = with_norms(), images(2, 2, 6, 6)
    whole = athena.lrp(model, x, target=1, rule=rule)
    for path, module in model.named_children():
        channels = [4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 3][int(path)]
        parts = [athena.lrp(model, x, target=1, rule=rule, through={path: [channel]}) for channel in range(channels)]
        close(torch.stack([part.input for part in parts]).sum(0), whole.input)
        closes(parts[1])
        if isinstance(module, nn.Conv2d | nn.Linear):
            expected = torch.zeros_like(whole.layers[path])
            expected[:, 1] = whole.layers[path][:, 1]
            close(parts[1].layers[path], expected)


def test_what_is_cut_away_has_a_row_above_its_layer() -> None:
    model, x = narrow_mlp(), images(4, 12)
    explained = athena.lrp(model, x, through={"linear2": [1, 2]})
    table = explained.conservation().set_index("layer")
    assert list(table.index)[:4] == ["linear3", "linear2 (through)", "linear2", "linear1"]
    came, cut = table.loc["linear2 (through)", ["relevance", "bias"]]
    whole = athena.lrp(model, x).layers["linear2"]
    assert came == pytest.approx(whole.sum().item())
    assert cut == pytest.approx((whole.sum() - whole[:, [1, 2]].sum()).item())
    assert table.loc["linear2", "relevance"] == pytest.approx(came - cut)
    closes(explained)


def test_several_modules_cut_one_after_the_other() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    both = athena.lrp(model, x, target=0, through={"features.relu1": [1], "features.relu2": [0, 4]})
    relevance = athena.lrp(model, x, target=0, through={"features.relu2": [0, 4]}, layers=["features.relu1"])
    only = torch.zeros(4, dtype=torch.float64)
    only[1] = 1
    masked = relevance.layers["features.relu1"] * only.view(1, -1, 1, 1)
    lower = athena.lrp(model.features[:2], x, target=lambda out: masked)
    close(both.input, lower.input)
    closes(both)


def test_neurons_of_tokens_and_channels_of_each_sample_are_chosen_by_a_mask_of_all_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).double()
    x = images(2, 5, 3)
    for mask in (torch.rand(1, 1, 4) > 0.5, torch.rand(2, 1, 4) > 0.5, torch.rand(2, 5, 4) > 0.5):
        h = model[:2](x).detach().requires_grad_()
        (d,) = torch.autograd.grad(model[2:](h).max(1).values.sum(), h)
        below = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model[:2](below), below, d * mask)
        for path in ("0", "1"):
            explained = athena.lrp(model, x, rule=Zero(), through={path: mask})
            close(explained.input, x * gradient)
            closes(explained)


class Around(nn.Module):
    """A module that gives out what it was given, beside a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(h + self.same(h))


def test_what_goes_around_the_module_is_not_cut() -> None:
    model, x = Around().double(), images(3, 4)
    whole = athena.lrp(model, x, rule=Zero(), layers=["first"]).layers["first"]
    explained = athena.lrp(model, x, rule=Zero(), through={"same": [0, 1]}, layers=["first"])
    close(explained.layers["first"], whole * torch.tensor([1.0, 1.0, 0.5, 0.5]))
    closes(explained)


def test_a_module_that_is_used_twice_lets_through_the_same_channels_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice().double(), images(3, 4).requires_grad_()
    first = model.layer(x)
    second = model.layer(first.relu())
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (d,) = torch.autograd.grad(model.head(second.relu()).max(1).values.sum(), second, retain_graph=True)
    (d,) = torch.autograd.grad(second, first, d * mask, retain_graph=True)
    (gradient,) = torch.autograd.grad(first, x, d * mask)
    explained = athena.lrp(model, x.detach(), rule=Zero(), through={"layer": [0, 2]})
    close(explained.input, (x * gradient).detach())
    closes(explained)
    assert [row for row in explained.conservation()["layer"] if "through" in row] == [
        "layer (through)#2",
        "layer (through)",
    ]


def test_the_model_comes_back_as_it_was_and_a_map_in_a_loss_is_cut_too() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    only = {"features.relu1": [1]}
    explained = athena.lrp(model, x, 1, Zero(), through=only, differentiable=True)
    close(explained.input.detach(), athena.lrp(model, x, 1, Zero(), through=only).input)
    explained.input.square().sum().backward()
    gradient = model.features.conv1.weight.grad
    assert gradient[1].any() and not gradient[[0, 2, 3]].any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("through", "error", "match"),
    [
        ({"features.relu": [0]}, ValueError, "through: Sequential has no module 'features.relu'; see 'features.relu"),
        ({"features.relu1": [4]}, ValueError, r"gives \(3, 4, 6, 6\); it has no channel 4, only 0 to 3"),
        ({"features.relu1": []}, ValueError, "no channel of 'features.relu1' is let through"),
        ({"features.relu1": [0.5]}, TypeError, "give a list of channels, or a mask of bool"),
        ({"features.relu1": 2}, TypeError, "give a list of channels, or a mask of bool"),
        ({"features.relu1": torch.ones(6, dtype=torch.bool)}, ValueError, "so 4 channels; the mask has 6"),
        ({"features.relu1": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"a mask of \(4, 1\) does not fit that"),
    ],
)
def test_channels_that_a_module_does_not_have_are_refused(through: Any, error: type[Exception], match: str) -> None:
    model = narrow_cnn()
    with pytest.raises(error, match=match):
        athena.lrp(model, images(3, 2, 6, 6), through=through)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_that_no_relevance_comes_to_or_that_gives_several_tensors_is_refused() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head, self.unused = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.head(self.lstm(x)[0][:, -1])

    model, x = Several().double(), images(2, 5, 3)
    with pytest.raises(ValueError, match=r"through: 'lstm' gives a tuple of .*name a module that gives one tensor"):
        athena.lrp(model, x, through={"lstm": [0]})
    with pytest.raises(ValueError, match="through: no relevance came to the output of 'unused'"):
        athena.lrp(model, x, through={"unused": [0]})
