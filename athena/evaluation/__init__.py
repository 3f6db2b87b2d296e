"""How good a heat map is: does it find the object, does the class hang on what it marks, does it show this network?

Three measures, none of them asking how a heat map was made: `localisation` against the object's known pixels,
`pixel_flipping` against the network's own answer, `randomisation` against the same network with other weights. Beside
each stands what a map that knows nothing would get. Not here: heat maps themselves (`athena.relevance`), and
intervals or tests over what is measured (`athena.statistics`).
"""

import copy
import itertools
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn

__all__ = ["Explain", "Flipping", "localisation", "pixel_flipping", "randomisation"]

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A function from a model, x and the classes to explain, (batch,) int64, to a heat map (batch, channels, h, w)."""

FIRST_SEED = 181003292
"""Models are made from small seeds; from the same one, a layer could be given the very numbers it began with."""


def localisation(relevance: Tensor, mask: Tensor) -> pd.DataFrame:
    """How much of the relevance that speaks for a class lies on the object, for each image.

    Relevance is summed over channels, and what is then below 0 counts as 0, the pooling "sum,pos" of Arras et al. In
    a tie, every order of the tied pixels counts the same, so a map without any difference gets the chance level.

    Args:
        relevance: (batch, channels, h, w), any floating point dtype.
        mask: (batch, h, w) bool, True on the object, such as `athena.data.Data.test_masks`; no image without one.

    Returns:
        One row an image, in the order of the batch; all columns are shares from 0 to 1, more is better.
        mass: of the relevance, that on the object (Arras et al.: relevance mass accuracy); NaN if there is none.
        rank: of the k most relevant pixels, those on the object, which has k pixels (relevance rank accuracy).
        pointing: 1 if the most relevant pixel is on the object (Zhang et al.: pointing game, without their tolerance
        of 15 pixels), 0 if not, between them in a tie.
        chance: pixels on the object, of all. What a map of independent random numbers gets in each of the three.

    Raises:
        TypeError, ValueError: an argument is not of the form above, relevance is not finite, or a mask is empty.

    Sources: Arras, Osman, Samek, CLEVR-XAI, Information Fusion 81 (2022), section 3; Zhang et al., Top-down neural
    attention by excitation backprop, IJCV 126 (2018).
    """
    summed = _summed(relevance, "relevance")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != summed.shape:
        raise ValueError(f"mask is {_described(mask)}; for this relevance it must be bool {tuple(summed.shape)}")
    inside = mask.flatten(1).to(summed)
    pixels = inside.sum(1)
    if not pixels.all():
        raise ValueError(f"mask {int((pixels == 0).nonzero()[0])} of the batch is empty; leave that image out")
    positive = summed.clamp(min=0).flatten(1)
    columns = {
        "mass": (positive * inside).sum(1) / positive.sum(1),
        "rank": _hits(positive, inside, pixels) / pixels,
        "pointing": _hits(positive, inside, torch.ones_like(pixels)),
        "chance": inside.mean(1),
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    return table.rename_axis("sample")


class Flipping(NamedTuple):
    """What `pixel_flipping` measured, both with one column for each map and a last one, ``random``.

    Attributes:
        curves: the mean probability over the batch, 0 to 1, by the share of pixels flipped, 0 to 1 (the index).
        areas: one row an image: the area under its own curve, which is its mean probability, 0 to 1; less is better.
    """

    curves: pd.DataFrame
    areas: pd.DataFrame


def pixel_flipping(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None,
    maps: Mapping[str, Tensor],
    *,
    steps: int = 32,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
) -> Flipping:
    """How soon the probability of a class falls when pixels are taken away, the most relevant ones first.

    A pixel goes with all its channels. Pixels of equal relevance go in random order, drawn from `seed` for each image
    and the same for every map; the column ``random`` takes all pixels in that order. The probability is the softmax
    of the output: logits have another unit in every network, and fall below 0. What is measured is the network on
    images such as it has never seen, so compare maps under more than one baseline before preferring one.

    Args:
        model: gives logits (batch, classes). A copy in eval mode is asked.
        x: (batch, channels, h, w), in the range that the model was trained on.
        target: the class to follow, one or (batch,) int64; None for the class predicted.
        maps: for each name, a heat map (batch, channels, h, w); pixels are ordered by its signed sum over channels.
        steps: into how many equal parts the pixels are cut, 1 to h * w; a curve has ``steps + 1`` points.
        baseline: what takes a pixel's place: a number, 0 being black, or a tensor that broadcasts to `x`. The mean
            colour is ``x.mean((2, 3), keepdim=True)``; ``1 - x`` inverts; ``torch.rand_like(x)`` is noise.
        seed: of the random order.

    Raises:
        TypeError, ValueError: an argument is not of the form above, or relevance is not finite.

    Sources: Bach et al., On pixel-wise explanations, PLoS ONE 10 (2015), "pixel-flipping", with inverted pixels; Samek
    et al., Evaluating the visualization of what a deep neural network has learned, IEEE TNNLS 28 (2017), with noise.
    """
    asked = _copy(model)
    chosen = _classes(asked, x, target)
    batch, _, height, width = x.shape
    pixels = height * width
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps is {steps}; for images of {height} by {width} pixels it must be 1 to {pixels}")
    if "random" in maps:
        raise ValueError('maps has the name "random", which is that of the control')
    try:
        other = torch.as_tensor(baseline).to(x).expand_as(x)
    except RuntimeError as error:
        raise ValueError(f"baseline does not broadcast to x of shape {tuple(x.shape)}: {error}") from None

    noise = torch.rand(batch, pixels, generator=torch.Generator().manual_seed(seed))
    by_chance = noise.argsort(1).to(x.device)
    orders = {}
    for name, relevance in maps.items():
        drawn = _summed(relevance, f"maps[{name!r}]", x).to(x.device).flatten(1).gather(1, by_chance)
        orders[name] = by_chance.gather(1, drawn.argsort(stable=True, dim=1, descending=True))
    orders["random"] = by_chance

    counts = torch.linspace(0, pixels, steps + 1, dtype=torch.float64).round().long()
    shares = counts.double() / pixels
    curves, areas = {}, {}
    for name, order in orders.items():
        turn = order.argsort(1).view(batch, 1, height, width)  # when a pixel is flipped, from 0 on
        curve = torch.stack([_probability(asked, torch.where(turn < n, other, x), chosen) for n in counts.tolist()])
        curves[name] = curve.mean(1).numpy()
        areas[name] = torch.trapezoid(curve, shares, dim=0).numpy()
    return Flipping(
        pd.DataFrame(curves, index=pd.Index(shares.numpy(), name="share")),
        pd.DataFrame(areas).rename_axis("sample"),
    )


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
    drawn = _copy(model)
    chosen = _classes(drawn, x, target)
    layers = _from_the_top(drawn, x)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters to draw anew")
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(FIRST_SEED + seed)

        def heat_map() -> NDArray[np.float64]:
            return _summed(explain(drawn, x, chosen), "what explain gave", x).cpu().numpy()

        trained = heat_map()
        stages = [_likeness(trained, heat_map()).assign(layer="none")]
        for layer in layers:
            _draw(drawn.get_submodule(layer))
            stages.append(_likeness(trained, heat_map()).assign(layer=layer))
    table = pd.concat(stages).rename_axis("sample").reset_index()
    return table[["layer", "sample", "spearman", "absolute", "ssim"]]


def _hits(values: Tensor, inside: Tensor, k: Tensor) -> Tensor:
    """How many of the `k` largest values lie inside, (batch,); in a tie, the mean over all orders of what is tied."""
    least = values.sort(1, descending=True).values.gather(1, k.long()[:, None] - 1)
    above, tied = (values > least).to(values), (values == least).to(values)
    left = k - above.sum(1)
    return (above * inside).sum(1) + left * (tied * inside).sum(1) / tied.sum(1)


def _probability(model: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """The probability of the chosen class for each image, (batch,) float64 on the CPU."""
    with torch.no_grad():
        return model(x).double().softmax(1).gather(1, chosen[:, None])[:, 0].cpu()


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


def _copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode: what happens to it does not happen to the user's model."""
    return copy.deepcopy(model).eval()


def _summed(relevance: Tensor, what: str, x: Tensor | None = None) -> Tensor:
    """Relevance summed over channels, (batch, h, w) float64, checked; `x` is the batch that it is to fit."""
    if not isinstance(relevance, Tensor) or not relevance.is_floating_point() or relevance.dim() != 4:
        raise TypeError(f"{what} is {_described(relevance)}; it must be floating point (batch, channels, h, w)")
    if x is not None and (len(relevance), *relevance.shape[2:]) != (len(x), *x.shape[2:]):
        raise ValueError(f"{what} is {_described(relevance)}, which does not fit x of shape {tuple(x.shape)}")
    broken = ~relevance.isfinite().flatten(1).all(1)
    if broken.any():
        raise ValueError(f"{what} is not finite for image {int(broken.nonzero()[0])} of the batch")
    return relevance.detach().double().sum(1)


def _classes(model: nn.Module, x: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of each image, (batch,) int64 on the device of `x`, checked against the model's output."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4 or not len(x):
        raise TypeError(f"x is {_described(x)}; it must be floating point (batch, channels, h, w)")
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        raise TypeError(f"the model gave {_described(output)}; it must give (batch, classes)")
    if target is None:
        return output.argmax(1)
    chosen = torch.as_tensor(target, device=x.device)
    if chosen.dtype != torch.int64 or chosen.shape not in ((), (len(x),)):
        raise TypeError(f"target is {_described(target)}; give None, a class, or int64 of shape ({len(x)},)")
    if chosen.min() < 0 or chosen.max() >= output.shape[1]:
        raise ValueError(
            f"target has classes {int(chosen.min())} to {int(chosen.max())}; the model has 0 to {output.shape[1] - 1}"
        )
    return chosen.expand(len(x))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"
