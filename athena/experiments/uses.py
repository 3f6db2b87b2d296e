"""Uses of an explanation in training other than scaling gradients, and what each is compared with (thesis 4 and 5).

A use changes one of three things: the loss of a batch (`LOSSES`), the gradients of the weights before the optimiser has
them (`GRADIENTS`), or, after half of the steps, which samples the rest is trained on and how much each counts
(`CHOICES`). To add one, write its function and enter it into its table. Each takes the `Use` it belongs to, which holds
the run, the network and random numbers of its own. Not here: scaling gradients, which is `athena.Guidance`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena import relevance, rules
from athena.experiments import controls, marks
from athena.experiments.data import Data

if TYPE_CHECKING:
    from athena.experiments.run import Run

__all__ = ["CHOICES", "GRADIENTS", "LOSSES", "SCORES", "Use", "shifted"]


class Use:
    """What one run does with an explanation.

    Args:
        run: the run; `use`, `strength`, `score`, `control`, `target`, `rule`, `smoothing`, `marked`, `every` are read.
        model: the network, an `nn.Sequential` that ends with a linear layer.
        device: where it is.
        data: what the run is trained on; only where images of it are marked.
    """

    def __init__(
        self, run: "Run", model: nn.Module, device: torch.device | str = "cpu", data: Data | None = None
    ) -> None:
        assert isinstance(model, nn.Sequential)
        self.run, self.model = run, model
        self.generator = torch.Generator(device).manual_seed(run.seed)
        self.steps = 0
        self._marked = None
        if run.marked and data is not None:
            self._marked = marks.Marked(data, run.marked, self.generator, run.control == "shuffled")
        self.control = None if run.control is None else controls.Signal(run.control, run.seed, device)

    def loss(self, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """The loss of a batch.

        Args:
            x, y: images (batch, channels, height, width) and labels (batch,).
            weights: how much each sample counts (batch,), or None for all alike.
        """
        self.steps += 1
        if self.run.use in LOSSES:
            return LOSSES[self.run.use](self, x, y)
        if self.run.use in marks.LOSSES:
            return marks.LOSSES[self.run.use](self, x, y)
        return self.entropy(self.model(x), y, weights)

    def gradients(self, x: Tensor, y: Tensor) -> None:
        """Changes the gradients that ``loss.backward()`` has left."""
        if self.run.use in GRADIENTS:
            GRADIENTS[self.run.use](self, x, y)

    @property
    def marked(self) -> marks.Marked:
        """The images on which the digit is marked."""
        assert self._marked is not None
        return self._marked

    @property
    def is_due(self) -> bool:
        """Whether marked images are looked at in this step, one in `run.every`, the first included."""
        return (self.steps - 1) % self.run.every == 0

    @property
    def chooses(self) -> bool:
        """Whether samples are chosen after half of the steps."""
        return self.run.use in CHOICES

    def first(self, count: int) -> int:
        """How many of `count` samples the first half of the steps is trained on."""
        return max(1, round(RETRAINED * count)) if self.run.use == "retraining" else count

    def choose(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that the second half of the steps is trained on: indices (chosen,) and weights (all samples,)."""
        assert self.run.use is not None
        return CHOICES[self.run.use](self, images, labels)

    def entropy(self, logits: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy with the run's label smoothing, the mean over the batch or over its weights."""
        if weights is None:
            return F.cross_entropy(logits, y, label_smoothing=self.run.smoothing)
        losses = F.cross_entropy(logits, y, label_smoothing=self.run.smoothing, reduction="none")
        return (weights * losses).mean()

    def relevance(self, part: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The relevance of `x`, the input of `part`, in its shape, from where the run starts it."""
        target = {"label": y, "predicted": None}.get(self.run.target, self.run.target)
        return relevance.lrp(part, x.detach(), target, rules.parse(self.run.rule)).input.detach()

    def signal(self, part: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Relevance of `x`, the input of `part`, or the run's control in its place, in the shape of `x`."""
        if self.control is None:
            return self.relevance(part, x, y)
        found = self.relevance(part, x, y) if self.control.needs_relevance else None
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.entropy(part(leaf), y), leaf)
        return self.control(found, gradient, leaf.detach()).detach()

    def halves(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The network up to its last hidden layer, and its last linear layer."""
        return self.model[:-1], self.model[-1:]


def features(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """Features times ``1 + R / max|R|`` in a second loss (Sun, Lapuschkin et al. 2020, arXiv 2007.08790).

    The features are the last hidden layer; `strength` is the weight of the second loss.
    """
    below, last = use.halves()
    hidden = below(x)
    found = use.signal(last, hidden, y)
    largest = found.abs().amax(1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    return use.entropy(last(hidden), y) + use.run.strength * use.entropy(last(hidden * (1 + found / largest)), y)


def dropout(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """Ordinary dropout of the last hidden layer with probability `strength`."""
    below, last = use.halves()
    hidden = below(x)
    kept = torch.rand(hidden.shape, generator=use.generator, device=x.device) >= use.run.strength
    return use.entropy(last(hidden * kept / (1 - use.run.strength)), y)


def excitation_dropout(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """Dropout that prefers the relevant neurons of the last hidden layer (Zunino et al. 2018, arXiv 1805.09092).

    With P = 1 - `strength` and N neurons, the neuron whose share of the positive relevance is p is kept with
    probability ``1 - (1 - P)(N - 1) p / (((1 - P) N - 1) p + P)``, which is P where all shares are alike. What is kept
    is divided by P, as in ordinary dropout. The paper's excitation backprop is LRP with the rule ``ZPlus()``.
    """
    below, last = use.halves()
    hidden = below(x)
    found = use.signal(last, hidden, y).clamp_min(0)
    p = found / found.sum(1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    dropped, n = use.run.strength, hidden.shape[1]
    drops = dropped * (n - 1) * p / ((dropped * n - 1) * p + 1 - dropped)
    kept = torch.rand(hidden.shape, generator=use.generator, device=x.device) >= drops
    return use.entropy(last(hidden * kept / (1 - dropped)), y)


def hiding(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """Hides the share `strength` of the pixels that are not 0, the most relevant ones first.

    With the control ``"noise"`` it is any pixels, and so a kind of Cutout (DeVries and Taylor 2017).
    """
    active = (x != 0).flatten(1)
    found = use.signal(use.model, x, y).flatten(1).masked_fill(~active, -torch.inf)
    rank = found.argsort(dim=1, descending=True).argsort(dim=1)
    hidden = (rank < (use.run.strength * active.sum(1, keepdim=True)).round()).view_as(x)
    return use.entropy(use.model(x.masked_fill(hidden, 0)), y)


def agreement(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """A penalty where an image and itself moved by up to two pixels have different maps: one minus their cosine.

    Needs relevance that can be differentiated; `strength` is the penalty's weight.
    """
    dy, dx = torch.randint(-2, 3, (2,), generator=use.generator, device=x.device).tolist()
    moved = x.roll((dy, dx), (2, 3))
    rule = rules.parse(use.run.rule)
    here, there = (relevance.lrp(use.model, image, y, rule, differentiable=True).input for image in (x, moved))
    cosine = F.cosine_similarity(here.flatten(1), there.roll((-dy, -dx), (2, 3)).flatten(1))
    return use.entropy(use.model(x), y) + use.run.strength * (1 - cosine).mean()


LOSSES: dict[str, Callable[[Use, Tensor, Tensor], Tensor]] = {
    "features": features,
    "dropout": dropout,
    "excitation dropout": excitation_dropout,
    "hiding": hiding,
    "agreement": agreement,
}
"""Uses that change the loss of a batch: of the use, images and labels."""


def times_relevance(use: Use, x: Tensor, y: Tensor) -> None:
    """The gradient of each neuron's weights times its relevance (thesis equation 5.1, after Lee et al. 2019).

    Which relevance the paper takes, and what its three variants are, the thesis does not say. Here it is the magnitude
    of the neuron's mean relevance over the batch, over the mean of that in its layer.
    """
    found = relevance.lrp(use.model, x, {"label": y}.get(use.run.target), rules.parse(use.run.rule))
    for path, of_layer in found.layers.items():
        size = of_layer.mean(0).abs()
        size = size if size.dim() == 1 else size.flatten(1).sum(1)
        if use.run.control == "shuffled":
            size = size[torch.randperm(len(size), generator=use.generator, device=size.device)]
        size = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        layer = use.model.get_submodule(path)
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(size.view(-1, *[1] * (parameter.dim() - 1)).to(parameter.grad.dtype))


def times_weight(use: Use, x: Tensor, y: Tensor) -> None:
    """The gradient of each weight times its magnitude.

    On a ReLU network this is the update of layer-wise feedback propagation (Weber et al. 2023, arXiv 2308.12053) with
    the reward ``logits * (onehot - softmax)``.
    """
    for parameter in use.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(parameter.detach().abs())


GRADIENTS: dict[str, Callable[[Use, Tensor, Tensor], None]] = {
    "gradient times relevance": times_relevance,
    "gradient times |weight|": times_weight,
}
"""Uses that change the gradients of the weights, in place: of the use, images and labels."""


RETRAINED = 0.8
"""The share of the samples that a run which is retrained on its mistakes sees before, the rest being held out."""
ROUND = 200
"""Samples that are explained or scored at once."""


def outputs(use: Use, x: Tensor) -> Tensor:
    """Logits (samples, classes), without a graph."""
    with torch.no_grad():
        return torch.cat([use.model(part) for part in x.split(ROUND)])


def maps(use: Use, x: Tensor, target: Tensor | None) -> Tensor:
    """Relevance of the pixels (samples, pixels), from the logit of the class `target` (samples,) or the predicted."""
    rule = rules.parse(use.run.rule)
    chosen = outputs(use, x).argmax(1) if target is None else target
    parts = zip(x.split(ROUND), chosen.split(ROUND), strict=True)
    return torch.cat([relevance.lrp(use.model, part, of, rule).input.detach().flatten(1) for part, of in parts])


def total_relevance(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The sum of a sample's relevance: the logit of its predicted class, but for what biases absorb."""
    return maps(use, x, None).sum(1)


def mean_relevance(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The mean over the pixels that carry relevance."""
    found = maps(use, x, None)
    return found.sum(1) / (found != 0).sum(1).clamp_min(1)


def largest_relevance(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The largest relevance of a pixel."""
    return maps(use, x, None).amax(1)


def masked_difference(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The masked difference (thesis 5.1, after Sun, Servadei et al. 2022), with relevance for SHAP values.

    Over the pixels that speak for the predicted class: how much more they speak for it than for the true one. 0 where
    the prediction is right.
    """
    predicted, true = maps(use, x, None), maps(use, x, y)
    return ((predicted - true) * (predicted > 0)).sum(1).clamp_min(0)


def local_difference(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The local difference (thesis 5.1): the sum over the pixels of ``|R of predicted - R of true class|``."""
    return (maps(use, x, None) - maps(use, x, y)).abs().sum(1)


def low_confidence(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """One minus the probability of the predicted class."""
    return 1 - outputs(use, x).softmax(1).amax(1)


def el2n(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """EL2N (Paul et al. 2021, arXiv 2107.07075): the length of probabilities minus one-hot label."""
    probabilities = outputs(use, x).softmax(1)
    return (probabilities - F.one_hot(y, probabilities.shape[1])).norm(dim=1)


def own_loss(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample."""
    return F.cross_entropy(outputs(use, x), y, reduction="none")


def chance(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """Random numbers between 0 and 1."""
    return torch.rand(len(y), generator=use.generator, device=y.device)


def equal(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The same for each sample."""
    return torch.ones(len(y), device=y.device)


SCORES: dict[str, Callable[[Use, Tensor, Tensor], Tensor]] = {
    "total relevance": total_relevance,
    "mean relevance": mean_relevance,
    "largest relevance": largest_relevance,
    "masked difference": masked_difference,
    "local difference": local_difference,
    "low confidence": low_confidence,
    "EL2N": el2n,
    "loss": own_loss,
    "random": chance,
    "equal": equal,
}
"""What samples are ranked or weighted by (samples,), by the network that half of the steps have trained."""


def scores(use: Use, x: Tensor, y: Tensor) -> Tensor:
    """The run's score of each sample, dealt anew among them where its control is ``"shuffled"``."""
    assert use.run.score is not None
    found = SCORES[use.run.score](use, x, y)
    if use.run.control == "shuffled":
        found = found[torch.randperm(len(found), generator=use.generator, device=found.device)]
    return found


def sampling(use: Use, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The share `strength` of the samples with the highest scores (thesis 4.1), each with weight 1."""
    kept = scores(use, x, y).topk(max(1, round(use.run.strength * len(y)))).indices
    return kept, torch.ones(len(y), device=y.device)


def _weights(use: Use, found: Tensor) -> Tensor:
    """``1 + strength * (score / its mean - 1)``, scores counted from the lowest, so that the mean weight is 1."""
    above = found - found.min()
    mean = above.mean()
    if mean == 0:
        return torch.ones_like(found)
    return 1 + use.run.strength * (above / mean - 1)


def weighting(use: Use, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All samples, each with a weight by its score (thesis 4.2)."""
    return torch.arange(len(y), device=y.device), _weights(use, scores(use, x, y))


def retraining(use: Use, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The samples seen so far and those held-out ones that are misclassified, weighted by score (thesis 5.1).

    A fifth of the training samples is held out for this; the test set is never looked at.
    """
    seen = use.first(len(y))
    wrong = seen + (outputs(use, x[seen:]).argmax(1) != y[seen:]).nonzero().flatten()
    weights = torch.ones(len(y), device=y.device)
    if len(wrong):
        weights[wrong] = _weights(use, scores(use, x[wrong], y[wrong]))
    return torch.cat([torch.arange(seen, device=y.device), wrong]), weights


CHOICES: dict[str, Callable[[Use, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sampling": sampling,
    "weighting": weighting,
    "retraining": retraining,
}
"""Uses that choose or weight samples: of the use, all images and all labels."""


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image (batch, channels, height, width) moved by up to `most` pixels in both directions, 0 moved in."""
    count, channels, height, width = x.shape
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator, device=x.device)
    rows = (torch.arange(height, device=x.device) + down)[:, None, :, None]
    columns = (torch.arange(width, device=x.device) + right)[:, None, None, :]
    images = torch.arange(count, device=x.device)[:, None, None, None]
    colours = torch.arange(channels, device=x.device)[:, None, None]
    return F.pad(x, [most] * 4)[images, colours, rows, columns]
