"""What LRP conserves on networks of torchvision, and what two other libraries make of a residual sum.

Not here: how the libraries compare in time and memory (``benchmarks/lrp.py``).
"""

import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from athena import rules
from athena.book.tables import shown, signed
from athena.relevance import lrp

__all__ = ["Sums", "any_network", "residual_sum"]

NETWORKS = {
    "VGG-16, batch norm": "vgg16_bn",
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "DenseNet-121": "densenet121",
    "MobileNet-V3": "mobilenet_v3_large",
    "ConvNeXt-Tiny": "convnext_tiny",
    "ViT-B/16": "vit_b_16",
}
"""Architectures of torchvision by what the page calls them."""


def any_network(seed: int) -> pd.DataFrame:
    """Which share of the start arrives at the image in each of `NETWORKS`, and what kept the rest, for reading.

    Raises:
        AssertionError: anything is lost without a trace.
    """
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = []
    for title, path in NETWORKS.items():
        network = _with_random_weights(path, seed)
        for called, rule in (("LRP-ε, 1e-6", rules.Epsilon(1e-6)), ("EpsilonPlus", rules.EpsilonPlus())):
            explained = lrp(network, image, rule=rule)
            start, account = explained.output.sum().item(), explained.conservation()
            kept, bias, stabiliser = account["relevance"].iloc[-1], account["bias"].sum(), account["stabiliser"].sum()
            missing = start - kept - bias - stabiliser
            assert abs(missing) < 1e-6 * abs(start)
            rows.append(
                {
                    "network": title,
                    "rule": called,
                    "layers": len(explained.layers),
                    "conserved": _number(kept / start).removeprefix("+"),
                    "bias": _number(bias / start),
                    "stabiliser": f"{stabiliser / start:+.1e}".replace("-", "−"),
                    "missing": f"{missing / start:+.0e}".replace("-", "−"),
                }
            )
    return shown(pd.DataFrame(rows), "network")


def _number(value: float) -> str:
    """With four digits, and no sign where these are zero."""
    return signed(value, 4) if round(value, 4) else "0"


def _with_random_weights(path: str, seed: int) -> nn.Module:
    options = {"image_size": 32} if path.startswith("vit") else {}
    torch.manual_seed(seed)
    network = getattr(torchvision.models, path)(weights=None, num_classes=10, **options)
    for parameter in network.parameters():  # no bias and no scale at its starting value
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.double().eval()


class Residual(nn.Module):
    """A residual sum between two layers, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.branch, self.outer = (nn.Linear(6, n, bias=False) for n in (6, 6, 3))
        self.relu = nn.ReLU()

    def add(self, h: Tensor, g: Tensor) -> Tensor:
        """The sum of both branches."""
        return h + g

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 3) of inputs (n, 6)."""
        h = self.relu(self.inner(x))
        return self.outer(self.add(h, self.branch(h)))


@dataclass
class Sums:
    """What relevance at the input adds up to, by each library that is installed.

    Attributes:
        logit: what it should add up to.
        rows: for each library and way to write the sum, the relevance.
        missing: a sentence for each library that is not here.
        told: what is to be said of each other library.
    """

    logit: float
    rows: list[tuple[str, str, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def shown(self) -> pd.DataFrame:
        """The table for reading."""
        columns = {
            "library": [library for library, _, _ in self.rows],
            "written as": [written for _, written, _ in self.rows],
            "relevance": [signed(total, 4) for _, _, total in self.rows],
            "over the output": [f"{total / self.logit:.3f}" for _, _, total in self.rows],
        }
        return shown(pd.DataFrame(columns), "library")


def residual_sum() -> Sums:
    """`athena`, Captum and zennit on a network with a residual sum, with no bias and no stabiliser to speak of."""
    torch.manual_seed(1)
    network, x = Residual().eval(), torch.rand(1, 6)
    sums = Sums(network(x)[0, 0].item())
    own = lrp(network, x, target=0, rule=rules.Zero()).input.sum().item()
    assert abs(own - sums.logit) < 1e-5
    sums.rows.append(("athena", "h + g(h)", own))
    for library, ask in {"Captum": _captum, "zennit": _zennit}.items():
        if find_spec(library.lower()):
            ask(network, x, sums)
        else:
            install = f"`pip install {library.lower()}`"
            sums.missing.append(f"{library} is not installed here: {install} and run this chapter again to see it.")
    return sums


def _captum(network: Residual, x: Tensor, sums: Sums) -> None:
    from captum.attr import LRP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, delta = LRP(network).attribute(x.clone(), target=0, return_convergence_delta=True)
    total = found.sum().item()
    off = abs(total - sums.logit)
    assert off > 0.01 * abs(sums.logit)
    sums.rows.append((f"captum {version('captum')}", "h + g(h)", total))
    sums.told.append(
        f"**Captum** is off by {off:.4f} and raises no error; asked with `return_convergence_delta=True`, it reports "
        f"{signed(delta.item(), 4)}. It never sees the sum, which is no module."
    )


def _zennit(network: Residual, x: Tensor, sums: Sums) -> None:
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.types import Activation, Linear

    class WithSum(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Sum()

        def add(self, h: Tensor, g: Tensor) -> Tensor:
            return self.sum(torch.stack([h, g], -1))

    with_sum = WithSum().eval()
    with_sum.load_state_dict(network.state_dict())
    logit, totals = sums.logit, []
    for net, written in ((network, "h + g(h)"), (with_sum, "its own layer Sum")):
        composite = LayerMapComposite([(Activation, Pass()), (Sum, Norm()), (Linear, Epsilon(1e-9))])
        with Gradient(net, composite) as attributor:
            _, found = attributor(x.clone(), torch.tensor([[logit, 0.0, 0.0]]))
        totals.append(found.sum().item())
        sums.rows.append((f"zennit {version('zennit')}", written, totals[-1]))
    plain, own = totals
    assert abs(plain - logit) > 0.1 * abs(logit) and abs(own - logit) < 1e-3 * abs(logit)
    sums.told.append(
        f"**zennit** sends the same relevance down both branches, {plain / logit:.2f} times what there was, and raises "
        "no error. Its own way is to write the sum as a layer, `Sum`, which its canonizers put into the residual "
        "networks of torchvision; then it conserves."
    )
