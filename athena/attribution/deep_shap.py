"""DeepSHAP: DeepLIFT's contributions, averaged over several baselines (thesis 3.5; Lundberg, Lee 2017)."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from athena.attribution.deep_lift import rescaled

__all__ = ["deep_shap"]


def deep_shap(
    model: nn.Module, x: Tensor, target: Tensor, *, baselines: Tensor | None = None, progress: bool = False
) -> Tensor:
    """The mean over baselines of DeepLIFT by the rescale rule; it adds up to ``f(x)`` minus the mean ``f(baseline)``.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        baselines: (n, ...) samples of the shape of those in `x`, such as training images. None: black, grey and white,
            the values 0, 0.5 and 1 everywhere.
        progress: whether to show a bar.

    Raises:
        ValueError: `baselines` is of another shape, or contributions miss the difference by more than 1 %.
        UnsupportedLayer: the network uses an operation that DeepLIFT has no rule for.
    """
    if baselines is None:
        baselines = torch.stack([torch.full_like(x[0], value) for value in (0.0, 0.5, 1.0)])
    if baselines.shape[1:] != x.shape[1:] or not len(baselines):
        raise ValueError(f"baselines has shape {tuple(baselines.shape)}; it must be (n, {tuple(x.shape[1:])})")
    total = torch.zeros_like(x)
    for baseline in tqdm(baselines.to(x), "DeepSHAP", disable=not progress):
        total += rescaled(model, x, target, baseline.expand_as(x))
    return total / len(baselines)
