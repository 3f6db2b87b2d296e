"""Does a heat map show this network? Against the same network with other weights."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from athena.evaluation.checks import classes, copied, summed

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A function from a model, x and the classes to explain, (batch,) int64, to a heat map (batch, channels, h, w)."""
FIRST_SEED = 181003292
"""Models are made from small seeds; from the same one, a layer could be given the very numbers it began with."""


def randomisation(
    model: nn.Module, explain: Explain, x: Tensor, target: int | Tensor | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """How much of a heat map is left when the parameters are drawn anew, layer after layer from the output down.

    A map that stays as it was shows the image, not what the network has learned. But likeness need not fall to 0: where
    the image has edges, and where the input that a map is multiplied by is large, absolute values stay large. Compare
    methods with each other, and with a map of the image alone.

    A module draws its parameters as PyTorch does for a new one (``reset_parameters``); those that it has no draw for
    are put in random order. The model itself and the global random state stay as they are.

    Args:
        model: gives (batch, classes).
        explain: ``explain(model, x, target)`` gives the heat map of `model`, which is a copy in eval mode. It must
            explain the model that it is given, not one that it knows from elsewhere.
        x: (batch, channels, h, w).
        target: the classes to explain throughout, one or (batch,) int64; None for those `model` predicts for x.
        seed: of the parameters drawn. One draw says little about another: repeat with several.

    Returns:
        One row for each stage and image. Columns: ``layer``, the module drawn last, those above it having been drawn
        before, and ``"none"`` for the first stage, which explains the same model twice and shows what chance there is
        in `explain` itself; ``sample``; and three likenesses to the map of the trained model, all summed over
        channels: ``spearman``, rank correlation, -1 to 1; ``absolute``, that of their absolute values, -1 to 1;
        ``ssim``, structural similarity of the absolute values in 7x7 windows, each map divided by its 99th
        percentile and cut there, -1 to 1. NaN where a map is the same everywhere. ``table.groupby("layer",
        sort=False).mean()`` gives a row a stage.

    Raises:
        TypeError, ValueError: an argument or what `explain` gave is not of the form above, or the model has no
            parameters.

    Source: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018, section 4.1, cascading randomisation.
    """
    drawn = copied(model)
    chosen = classes(drawn, x, target)
    layers = _from_the_top(drawn, x)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters to draw anew")
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(FIRST_SEED + seed)

        def heat_map() -> NDArray[np.float64]:
            return summed(explain(drawn, x, chosen), "what explain gave", x).cpu().numpy()

        trained = heat_map()
        stages = [_likeness(trained, heat_map()).assign(layer="none")]
        for layer in layers:
            _draw(drawn.get_submodule(layer))
            stages.append(_likeness(trained, heat_map()).assign(layer=layer))
    table = pd.concat(stages).rename_axis("sample").reset_index()
    return table[["layer", "sample", "spearman", "absolute", "ssim"]]


def _likeness(trained: NDArray[np.float64], drawn: NDArray[np.float64]) -> pd.DataFrame:
    """The three likenesses of `randomisation`, for maps (batch, h, w)."""
    sizes, others = np.abs(trained), np.abs(drawn)
    return pd.DataFrame(
        {
            "spearman": _spearman(trained, drawn),
            "absolute": _spearman(sizes, others),
            "ssim": [_ssim(size, other) for size, other in zip(sizes, others, strict=True)],
        }
    )


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation of the images of two batches, (batch,)."""
    ranks = [stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (a, b)]
    p, q = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    scale = np.sqrt((p**2).sum(1) * (q**2).sum(1))
    return np.divide((p * q).sum(1), scale, out=np.full(len(p), np.nan), where=scale > 0)


def _ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Structural similarity of two maps (h, w) of values of at least 0."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    a, b = (np.minimum(m / (np.quantile(m, 0.99) or m.max()), 1) for m in (a, b))
    window = min(7, (min(a.shape) - 1) // 2 * 2 + 1)
    return float(structural_similarity(a, b, win_size=window, data_range=1.0))


def _from_the_top(model: nn.Module, x: Tensor) -> list[str]:
    """Paths of all modules with parameters of their own, from the output down: by when each was last called.

    A module that is not called, since its parent reads its parameters, goes with its parent.
    """
    clock = itertools.count()
    called: dict[str, int] = {}

    def note(path: str, *_: Any) -> None:
        called[path] = next(clock)

    hooks = [module.register_forward_pre_hook(partial(note, path)) for path, module in model.named_modules()]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()

    def time(path: str) -> int:
        return called[path] if path in called else time(path.rpartition(".")[0])

    own = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return sorted(own, key=lambda path: (time(path), own.index(path)), reverse=True)


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    """Draws the module's own parameters anew."""
    before = [parameter.clone() for parameter in module.parameters(recurse=False)]
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    for parameter, old in zip(module.parameters(recurse=False), before, strict=True):
        if torch.equal(parameter, old):
            order = torch.randperm(old.numel()).to(old.device)
            parameter.copy_(old.flatten()[order].view_as(old))
