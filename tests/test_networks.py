"""Whole networks: relevance is conserved once bias and stabiliser are counted."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

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


class Norm(nn.Module):
    """A root mean square norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """Two blocks as in LLaMA: rotated queries and keys, heads that share keys and values, causal attention, gates."""

    heads, groups, width = 4, 2, 16

    def __init__(self, fused: bool) -> None:
        super().__init__()
        size = self.width // self.heads
        rows = {"q": self.width, "k": self.groups * size, "v": self.groups * size, "o": self.width}
        self.embedding = nn.Linear(6, self.width, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(self.width, width, bias=False) for name, width in rows.items()}
                | {
                    "gate": nn.Linear(self.width, 24),
                    "up": nn.Linear(self.width, 24),
                    "down": nn.Linear(24, self.width),
                }
                | {"before": Norm(self.width), "between": Norm(self.width)}
            )
            for _ in range(2)
        )
        self.head = nn.Sequential(Norm(self.width), nn.Linear(self.width, 5, bias=False))
        self.fused = fused

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) as (batch, heads, tokens, width of a head)."""
        size = self.width // self.heads
        x = x.view(*x.shape[:2], -1, size).transpose(1, 2)
        shared = self.heads // x.shape[1]
        return x[:, :, None].expand(-1, -1, shared, -1, -1).reshape(len(x), self.heads, -1, size)

    @staticmethod
    def rotated(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]), torch.ones(x.shape[3] // 2)).to(x.dtype).repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def attend(self, block: Any, x: Tensor) -> Tensor:
        q, k, v = (self.split(block[name](x)) for name in "qkv")
        q, k = self.rotated(q), self.rotated(k)
        mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = F.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + mask, dim=-1) @ v
        return block["o"](mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + self.attend(block, block["before"](x))
            between = block["between"](x)
            x = x + block["down"](F.silu(block["gate"](between)) * block["up"](between))
        return self.head(x)[:, -1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_decoder_is_explained_the_same_with_its_attention_written_out_or_fused(rule: Any) -> None:
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    explained = []
    for fused in (False, True):
        torch.manual_seed(0)
        explained.append(athena.lrp(Decoder(fused).double(), x, rule=rule))
    written, fused_one = explained
    torch.testing.assert_close(fused_one.input, written.input, rtol=1e-9, atol=1e-12)
    assert list(written.layers) == list(fused_one.layers)
    for one in explained:
        table, start = one.conservation(), one.output.sum().item()
        kept = table["bias"].sum() + table["stabiliser"].sum()
        assert table["relevance"].iloc[-1] + kept == pytest.approx(start, rel=1e-9)


def test_a_decoder_can_be_guided_in_every_layer_but_its_last() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(2, 7, 6, dtype=torch.float64), torch.tensor([0, 3])
    gradients = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = Decoder(fused).double()
        athena.Guidance(model, factor=0.1, scope="all")
        F.cross_entropy(model(x), labels).backward()
        gradients[fused] = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-9, atol=1e-12)
