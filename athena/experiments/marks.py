"""Uses of images on which someone has marked what counts, so that a network does not learn from the rest.

The first `marked` images of a run's subset are marked: which pixels are the digit's own is known. Each use here is a
loss: of its `uses.Use`, and of the images and labels of a batch. Where it draws a batch of marked images of its own, it
does so at one step in `every`, and the penalty on it, or its loss, is weighted by `strength`. Not here: the data whose
background misleads (`athena.experiments.data.planted`), and uses that need no marks (`uses`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from athena import relevance, rules
from athena.experiments.data import Data

if TYPE_CHECKING:
    from athena.experiments.uses import Use

__all__ = ["LOSSES", "Marked"]


class Marked:
    """The first `count` training images, and which of their pixels lie off the digit.

    Args:
        data: images with `train_masks`.
        count: how many of the images are marked; all of them if there are no more.
        generator: of the batches that are drawn.
        shuffled: whether each image has the mask of another one, a control.

    Raises:
        ValueError: the data set has no masks of its training images.
    """

    def __init__(self, data: Data, count: int, generator: torch.Generator, shuffled: bool = False) -> None:
        if data.train_masks is None:
            raise ValueError(f"Run(dataset={data.name!r}, marked={count}): nothing is marked in its training images")
        self.images, self.labels = data.train_images[:count], data.train_labels[:count]
        self.off = ~data.train_masks[:count, None]
        self.generator = generator
        if shuffled:
            self.off = self.off[torch.randperm(len(self.off), generator=generator, device=self.off.device)]

    def draw(self, count: int) -> Tensor:
        """Indices (count,) of marked images, drawn with replacement."""
        return torch.randint(len(self.labels), (count,), generator=self.generator, device=self.labels.device)

    def on_another_background(self, index: Tensor) -> Tensor:
        """The marked images `index` (n,), each digit on the background of another marked image, (n, channels, 32, 32).

        Where that image has its own digit, the mean of its background is filled in.
        """
        other = self.draw(len(index))
        background, off = self.images[other], self.off[other]
        mean = (background * off).sum((2, 3), keepdim=True) / off.sum((2, 3), keepdim=True).clamp_min(1)
        return torch.where(self.off[index], torch.where(off, background, mean), self.images[index])


def masking(use: "Use", x: Tensor, y: Tensor) -> Tensor:
    """Marked images whose background is exchanged for that of another marked image are trained on as well."""
    loss, marked = use.entropy(use.model(x), y), use.marked
    if not use.is_due:
        return loss
    index = marked.draw(len(y))
    own = use.entropy(use.model(marked.on_another_background(index)), marked.labels[index])
    return loss + use.run.strength * own


def marked_alone(use: "Use", x: Tensor, y: Tensor) -> Tensor:
    """The marked images alone, with exchanged backgrounds; the rest of the data is left unused.

    With all images marked it is training without a shortcut.
    """
    index = use.marked.draw(len(y))
    return use.entropy(use.model(use.marked.on_another_background(index)), use.marked.labels[index])


def gradient_off_mark(use: "Use", x: Tensor, y: Tensor) -> Tensor:
    """Right for the right reasons (Ross et al. 2017, arXiv 1703.03717, equation 1) on marked images.

    The penalty is the squared gradient of the summed log-probabilities, off the digit, as a sum over pixels and a mean
    over images.
    """
    loss, marked = use.entropy(use.model(x), y), use.marked
    if not use.is_due:
        return loss
    index = marked.draw(len(y))
    leaf = marked.images[index].requires_grad_()
    log_probabilities = F.log_softmax(use.model(leaf), 1).sum()
    (gradient,) = torch.autograd.grad(log_probabilities, leaf, create_graph=True)
    return loss + use.run.strength * (gradient * marked.off[index]).square().flatten(1).sum(1).mean()


def relevance_off_mark(use: "Use", x: Tensor, y: Tensor) -> Tensor:
    """What the background contributes to the logits: the squared sum of relevance off the digit, on marked images.

    Relevance starts from all logits, each times a random number of mean 0 and variance 1. So the expected penalty is
    the sum over the classes of the squared relevance off the digit for that class, at the price of one map.
    """
    loss, marked = use.entropy(use.model(x), y), use.marked
    if not use.is_due:
        return loss
    index = marked.draw(len(y))
    rule = rules.parse(use.run.rule)

    def start(logits: Tensor) -> Tensor:
        return logits * torch.randn(logits.shape, generator=marked.generator, device=logits.device)

    found = relevance.lrp(use.model, marked.images[index], start, rule, differentiable=True).input
    return loss + use.run.strength * (found * marked.off[index]).flatten(1).sum(1).square().mean()


LOSSES: dict[str, Callable[["Use", Tensor, Tensor], Tensor]] = {
    "masking": masking,
    "marked alone": marked_alone,
    "gradient off mark": gradient_off_mark,
    "relevance off mark": relevance_off_mark,
}
"""Uses that need marked images, by name."""
