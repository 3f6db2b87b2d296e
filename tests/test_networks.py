"""Whole networks of torchvision: relevance is conserved once bias and stabiliser are counted."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import athena
from athena.rules import Epsilon, EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, Flat, Gamma, Zero

slow = pytest.mark.slow
NETWORKS = [
    pytest.param("vgg16_bn", 32, marks=slow),
    pytest.param("resnet18", 48),
    pytest.param("resnet50", 48, marks=slow),
    pytest.param("densenet121", 48, marks=slow),
    pytest.param("mobilenet_v3_small", 48),
    pytest.param("mobilenet_v3_large", 48, marks=slow),
    pytest.param("convnext_tiny", 48, marks=slow),
    pytest.param("vit_b_16", 32, marks=slow),
]
RULES = [Zero(), Epsilon(1e-6), Gamma(0.25), EpsilonPlus(), EpsilonAlpha2Beta1(), EpsilonGammaBox(-5.0, 5.0), Flat()]


def random_network(name: str, size: int) -> nn.Module:
    """With weights that a trained one might have: none of its norms is the identity, no bias and no layer is 0."""
    torch.manual_seed(0)
    options = {"image_size": size} if name.startswith("vit") else {}
    network: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in network.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.double()


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_relevance_is_conserved_once_bias_and_stabiliser_are_counted(name: str, size: int) -> None:
    network, x = random_network(name, size), torch.randn(2, 3, size, size, dtype=torch.float64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    layers: dict[str, Any] = {
        path: module for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    for rule in RULES:
        explained = athena.lrp(network, x, rule=rule)
        table = explained.conservation()
        start = explained.output.sum().item()
        kept = table["bias"].sum() + table["stabiliser"].sum()
        assert abs(table["relevance"].iloc[-1] + kept - start) < 1e-6 * abs(start), rule
        assert explained.input.shape == x.shape and explained.input.isfinite().all()
        assert set(layers) - {"self_attention.out_proj"} <= {path.partition("#")[0] for path in explained.layers}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_lrp0_on_a_residual_network_is_gradient_times_input() -> None:
    network, x = random_network("resnet18", 48).eval(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf).max(1).values.sum(), leaf)
    explained = athena.lrp(network, x, rule=Zero()).input
    torch.testing.assert_close(explained, x * gradient, rtol=0, atol=1e-10 * explained.abs().max().item())
