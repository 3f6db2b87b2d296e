"""What a plain and a guided network look at on CIFAR-10: heat maps of three trained networks, stored with their labels.

    two_networks.store(two_networks.measure())      # what is kept in results/cifar-heat-maps.json

The third network is plain, with another seed: by as much do maps differ that owe nothing to guidance. The images
themselves are not stored; they are drawn where CIFAR-10 is on the machine.
"""

import base64
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import athena
from athena import experiments, figures
from athena.experiments import data, training
from athena.experiments.data.originals import CIFAR10_CLASSES

__all__ = ["FILE", "drawn", "load", "measure", "said", "store"]

FILE = "results/cifar-heat-maps.json"
SHOWN = 10
"""Images of which the maps are kept: the first test image of each class."""
COMPARED = 500
"""Test images on which the maps of two networks are compared."""
NETWORKS = {"plain": (0.0, 0), "guided": (0.1, 0), "plain, another seed": (0.0, 1)}
"""For each network the factor, in the linear part, and the seed."""


def measure(fraction: float = 0.2, device: str | None = None) -> dict[str, Any]:
    """Trains the networks on a share of CIFAR-10 and explains test images, each for its true class by LRP-ε.

    Args:
        fraction: share of the training data.
        device: where; by default a GPU if there is one.

    Raises:
        athena.data.DataError: CIFAR-10 is not here, or damaged.
    """
    base = experiments.Study.read(experiments.root() / "studies" / "cifar-linear.toml").base
    base = replace(base, fraction=fraction, epochs=3, precision="float32", tested="at the end")
    images = data.load("cifar10")
    x, y = images.test_images[:COMPARED], images.test_labels[:COMPARED]
    maps, networks = {}, {}
    for name, (factor, seed) in NETWORKS.items():
        *_, last = training.watch(replace(base, factor=factor, seed=seed), every=10_000, images=10_000, device=device)
        model = last.model.cpu()
        maps[name] = athena.lrp(model, x, target=y, rule=athena.rules.Epsilon()).input.sum(1)
        with torch.no_grad():
            predicted = model(x[:SHOWN]).argmax(1)
        networks[name] = {
            "accuracy": last.accuracy,
            "predicted": predicted.tolist(),
            "maps": _packed(maps[name][:SHOWN]),
        }
    return {
        "run": asdict(replace(base, factor=NETWORKS["guided"][0], seed=0)),
        "fingerprint": images.fingerprint,
        "code": training.CODE,
        "labels": y[:SHOWN].tolist(),
        "networks": networks,
        "similarity": {
            name: F.cosine_similarity(maps["plain"].flatten(1), maps[name].flatten(1)).tolist()
            for name in list(NETWORKS)[1:]
        },
    }


def store(measured: dict[str, Any]) -> None:
    """Writes what `measure` returned to `FILE`."""
    (experiments.root() / FILE).write_text(json.dumps(measured, indent=1) + "\n", "utf8")


def load() -> dict[str, Any]:
    """What is kept in `FILE`; as `measure` returns it."""
    stored: dict[str, Any] = json.loads((experiments.root() / FILE).read_text("utf8"))
    return stored


def drawn(stored: dict[str, Any]) -> Figure:
    """The images, where CIFAR-10 is on this machine, and the maps of the plain and of the guided network below them."""
    blank = torch.ones(SHOWN, 3, 32, 32)
    images = data.load("cifar10").test_images[:SHOWN] if data.at_hand("cifar10") == "cifar10" else blank
    shown = {name: stored["networks"][name] for name in ("plain", "guided")}
    return figures.heat_maps(
        images,
        {name: _unpacked(network["maps"]) for name, network in shown.items()},
        names=[CIFAR10_CLASSES[label] for label in stored["labels"]],
        notes={name: [CIFAR10_CLASSES[label] for label in network["predicted"]] for name, network in shown.items()},
        each=True,
        across=True,
    )


def said(stored: dict[str, Any]) -> str:
    """How much guidance changes the maps, beside what another seed does."""
    guided, other = (np.mean(stored["similarity"][name]) for name in list(NETWORKS)[1:])
    run, networks = stored["run"], stored["networks"]
    accuracies = ", ".join(f"{100 * network['accuracy']:.1f} % ({name})" for name, network in networks.items())
    less = (
        "Guidance changes what the network looks at, and another seed changes it more."
        if guided > other
        else "Guidance changes what the network looks at at least as much as another seed does."
    )
    return (
        f"Trained on {100 * run['fraction']:g} % of CIFAR-10 for {run['epochs']} epochs, the networks reach "
        f"{accuracies} on the test images. On the first {COMPARED} of these, the maps of plain and guided training "
        f"with one seed have a cosine similarity of {guided:.2f} on average, where 1 is the same map; those of plain "
        f"training with two seeds have {other:.2f}. {less} Which map is the better one, this does not say."
    )


def _packed(maps: Tensor) -> str:
    """Each map (n, 32, 32) over its largest magnitude, in steps of 1/127."""
    scaled = 127 * maps / maps.abs().amax((1, 2), keepdim=True)
    return base64.b64encode(scaled.round().to(torch.int8).numpy().tobytes()).decode()


def _unpacked(packed: str) -> Tensor:
    values = np.frombuffer(base64.b64decode(packed), np.int8).reshape(SHOWN, 1, 32, 32)
    return torch.from_numpy(values / 127.0)
