"""Thesis table 4.1, measured: what each method of `athena.attribution` costs and needs, and how good its maps are.

    measured = methods.measure(images=2, samples=50)       # in small
    methods.store(methods.measure())                       # what is kept in results/xai-methods.json

Four of the table's columns can be measured: whether the network's outputs are enough, effort, baseline, conservation.
The others say how a method is built (`BY_CONSTRUCTION`).
"""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import athena
from athena import attribution, evaluation
from athena.experiments import data, places

__all__ = [
    "BY_CONSTRUCTION",
    "FILE",
    "contradictions",
    "fit",
    "gap_network",
    "load",
    "measure",
    "published",
    "store",
    "trained_network",
]

FILE = "results/xai-methods.json"
CODE = hashlib.sha256(
    b"".join(
        path.read_bytes()
        for room in ("attribution", "evaluation", "propagation", "experiments")
        for path in sorted((Path(__file__).parents[1] / room).glob("*.py"))
        if room != "experiments" or path == Path(__file__)
    )
).hexdigest()[:8]
"""8 hex digits of the sources that the measurement depends on, read when this file is."""
ROWS = {
    **{"lime": "LIME", "shapley": "SHAP", "kernel_shap": "SHAP", "deep_shap": "DeepSHAP", "saliency": "Saliency Maps"},
    **{"deconvolution": "DeconvNet", "guided_backpropagation": "Guided Backprop", "smooth_grad": ""},
    **{"gradient_times_input": "Gradient * Input", "integrated_gradients": "Integrated Gradients"},
    **{"cam": "CAM / Grad-CAM", "grad_cam": "CAM / Grad-CAM", "deep_lift": "DeepLIFT", "lrp": "LRP"},
}
"""The row of table 4.1 that a method belongs to; SmoothGrad has none."""
BY_CONSTRUCTION = {
    "perturbation_based": "says how a method is built, not what it does",
    "surrogate_based": "says how a method is built, not what it does",
    "propagation_based": "says how a method is built, not what it does",
    "gradient_based": "says how a method is built, not what it does",
    "applicable_to_model_structure": "asks whether values can be used inside the network: thesis 4.4 argues it",
    "independent_attribution_relevance": "asks whether values are other ones than gradients: thesis 4.4 argues it",
}
"""Columns of table 4.1 without a measured entry, and why."""
HIGH_EFFORT = 10
"""Passes from which on the effort counts as high. Training needs two on an image, forward and backward."""


def gap_network(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """A small network that every method can explain, CAM included: convolutions, global average pooling, one layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    pooled = [*block(channels, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), *block(32, 64)]
    return nn.Sequential(*pooled, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def trained_network(epochs: int = 8, seed: int = 0) -> tuple[nn.Sequential, data.Data, float]:
    """`gap_network` trained on ``mnistm5k`` with Adam, learning rate 3e-3, in batches of 64.

    Returns:
        The network in eval mode, the data, and the accuracy on the test images, 0 to 1.
    """
    digits = data.load("mnistm5k")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = gap_network()
        fit(network, digits.train_images, digits.train_labels, epochs)
    with torch.no_grad():
        right = network(digits.test_images).argmax(1) == digits.test_labels
    return network, digits, float(right.double().mean())


def fit(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains a network as `trained_network` does, with the global random state, and puts it in eval mode."""
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimiser.step()
    network.eval()


class _Counted(nn.Module):
    """A network that counts the images that go through it, forwards and backwards."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.forwards, self.backwards = network, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        self.forwards += len(x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class _BlackBox(nn.Module):
    """A network of which nothing but its outputs is to be had: it runs in a thread of its own, without gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.ask = lambda x: network(x.detach()).detach()

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.ask, x).result()


def measure(
    images: int = 8,
    samples: int = 200,
    epochs: int = 8,
    randomised: int = 2,
    seed: int = 0,
    methods: Sequence[str] = attribution.METHODS,
) -> dict[str, Any]:
    """Every method on the same correctly recognised test images of ``mnistm5k`` and the same small network.

    Args:
        images: how many.
        samples: of LIME and KernelSHAP, for each image.
        epochs: that the network is trained for.
        randomised: how many of the images are explained again with all weights drawn anew.
        seed: of the network and of all methods.
        methods: which of `athena.attribution.METHODS`.

    Returns:
        ``conditions``, and ``rows``, one for each method: ``method``; ``seconds`` of processor time, ``forwards`` and
        ``backwards`` through the network, all for one image; ``agnostic``, whether outputs alone suffice;
        ``baseline``, the rank correlation of maps for a black and a white one, None where there is none to choose;
        ``adds up to``: ``"difference"`` from the baseline, ``"output"``, or ``"neither"``, within 1 % for every
        image; ``sum``, the median of the map's sum over what it is held against; ``mass``, ``rank``, ``pointing`` as
        `athena.evaluation.localisation` has them, ``flipping`` as the mean area of `pixel_flipping`, ``randomised`` as
        the mean rank correlation of absolute values of `randomisation` once all weights are drawn anew. Where a method
        has no entry, ``reason`` says why.
    """
    network, digits, accuracy = trained_network(epochs, seed)
    with torch.no_grad():
        right = network(digits.test_images).argmax(1) == digits.test_labels
    assert digits.test_masks is not None
    chosen = right.nonzero()[:images, 0]
    x, masks, target = digits.test_images[chosen], digits.test_masks[chosen], digits.test_labels[chosen]
    rows: list[dict[str, Any]] = []
    maps: dict[str, Tensor] = {}
    for method in methods:
        options: dict[str, Any] = {"samples": samples} if method in ("lime", "kernel_shap") else {}
        try:
            row, maps[method] = _needs(method, network, x, target, options)
        except (ValueError, TypeError) as error:
            rows.append({"method": method, "reason": str(error)})
            continue
        scores = evaluation.localisation(maps[method], masks).mean()
        row |= {name: float(scores[name]) for name in ("mass", "rank", "pointing")}
        explain = partial(_explained, method, options)
        redrawn = evaluation.randomisation(network, explain, x[:randomised], target[:randomised], seed=seed)
        row["randomised"] = float(redrawn.groupby("layer", sort=False)["absolute"].mean().iloc[-1])
        rows.append(row)
    grey = x.mean((2, 3), keepdim=True)
    areas = evaluation.pixel_flipping(network, x, target, maps, steps=16, baseline=grey, seed=seed).areas.mean()
    for row in rows:
        if row["method"] in areas:
            row["flipping"] = float(areas[row["method"]])
    return {
        "conditions": {
            "code": f"{athena.__version__}+{CODE}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": f"cpu ({torch.backends.cpu.get_cpu_capability()})",
            "threads": torch.get_num_threads(),
            "dataset": "mnistm5k",
            "fingerprint": digits.fingerprint,
            "accuracy": accuracy,
            "images": len(x),
            "samples": samples,
            "randomised": randomised,
            "epochs": epochs,
            "seed": seed,
            "chance": float(masks.double().mean()),
            "flipping at random": float(areas["random"]),
        },
        "rows": [{name: _plain(value) for name, value in row.items()} for row in rows],
    }


def _plain(value: Any) -> Any:
    return round(float(value), 5) if isinstance(value, float) else value


def _explained(method: str, options: dict[str, Any], model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return attribution.attribute(method, model, x, target, **options)


def _needs(
    method: str, network: nn.Module, x: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """What a method costs and needs, and its maps."""
    counted = _Counted(network)
    attribution.attribute(method, counted, x[:1], target[:1], **options)
    forwards, backwards = counted.forwards - 1, counted.backwards  # one asks which classes there are
    before = time.process_time()
    found = attribution.attribute(method, network, x, target, **options)
    row: dict[str, Any] = {
        "method": method,
        "seconds": (time.process_time() - before) / len(x),
        "forwards": forwards,
        "backwards": backwards,
        "agnostic": _is_agnostic(method, network, x[:1], target[:1]),
        "baseline": None,
    }
    named = {"deep_shap": "baselines"}.get(method, "baseline")
    black = torch.zeros_like(x)
    try:
        other = attribution.attribute(method, network, x, target, **options, **{named: black[:1]})
        white = attribution.attribute(method, network, x, target, **options, **{named: black[:1] + 1})
        ranks = [maps.sum(1).flatten(1).double().argsort(1).argsort(1).double() for maps in (other, white)]
        row["baseline"] = float(
            torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]).mean()
        )
    except TypeError:  # it knows no such option
        other = found
    with torch.no_grad():
        output, there = (network(images).gather(1, target[:, None])[:, 0].double() for images in (x, black))
    sums = other.double().flatten(1).sum(1)
    ratios = {"difference": sums / (output - there), "output": sums / output}
    holds = [name for name, ratio in ratios.items() if bool(((ratio - 1).abs() <= 0.01).all())]
    row["adds up to"] = holds[0] if holds else "neither"
    row["sum"] = float(ratios["difference" if row["baseline"] is not None else "output"].median())
    return row, found


def _is_agnostic(method: str, network: nn.Module, x: Tensor, target: Tensor) -> bool:
    options = {"samples": 10} if method in ("lime", "kernel_shap") else {}
    options |= {"segments": 4} if method in ("lime", "kernel_shap", "shapley") else {}
    try:
        attribution.attribute(method, _BlackBox(network), x, target, **options)
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def store(measured: dict[str, Any]) -> None:
    """Writes what `measure` returned to `FILE`."""
    (places.root() / FILE).write_text(json.dumps(measured, indent=1) + "\n", "utf8")


def load() -> dict[str, Any]:
    """What is kept in `FILE`; as `measure` returns it."""
    stored: dict[str, Any] = json.loads((places.root() / FILE).read_text("utf8"))
    return stored


def published() -> pd.DataFrame:
    """Thesis table 4.1: one row for each method, its columns 0 or 1."""
    return pd.read_csv(places.root() / "book" / "thesis" / "xai_methods.csv", index_col="method")


def contradictions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each mark of table 4.1, set or missing, that measurement contradicts."""
    table, said = published(), []
    for row in rows:
        name = ROWS[row["method"]]
        if "reason" in row or not name:
            continue
        marks, method = table.loc[name], f"{name} ({row['method']})"
        passes = row["forwards"] + row["backwards"]
        if bool(marks["high_computational_effort"]) != (passes >= HIGH_EFFORT):
            said.append(
                f"{method}: the table marks {'high' if marks['high_computational_effort'] else 'no high'} effort; "
                f"measured are {passes} passes for an image, {'fewer' if passes < HIGH_EFFORT else 'not fewer'} than "
                f"{HIGH_EFFORT}."
            )
        if bool(marks["no_baseline"]) != (row["baseline"] is None):
            said.append(
                f"{method}: the table does not mark that it needs no baseline, but there is none to choose."
                if row["baseline"] is None
                else f"{method}: the table marks that it needs no baseline, but its maps change with one (rank "
                f"correlation {row['baseline']:.2f})."
            )
        adds_up = row["adds up to"] != "neither"
        if bool(marks["conservation_of_relevance"]) != adds_up:
            said.append(
                f"{method}: the table does not mark conservation, but every map adds up to the {row['adds up to']}"
                f"{' of outputs' if row['adds up to'] == 'difference' else ''} within 1 %."
                if adds_up
                else f"{method}: the table marks conservation, but the median map adds up to {row['sum']:.2f} of the "
                "output, since biases keep their share."
            )
        if bool(marks["model_agnostic"]) != row["agnostic"]:
            said.append(
                f"{method}: the table {'marks' if marks['model_agnostic'] else 'does not mark'} it as model agnostic; "
                f"outputs alone {'suffice' if row['agnostic'] else 'do not suffice'}."
            )
    return said
