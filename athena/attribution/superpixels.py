"""The features of perturbation methods: superpixels of an image, and what the network says with some taken away."""

import numpy as np
import torch
from skimage.segmentation import slic
from torch import Tensor

__all__ = ["label_maps", "spread"]


def label_maps(x: Tensor, segments: int | Tensor) -> Tensor:
    """Which feature each element belongs to, numbered from 0 without gaps for each sample, int64 in the shape of `x`.

    Args:
        x: (batch, channels, h, w), of which superpixels are made by SLIC, or of another shape, of which each element
            is a feature.
        segments: about how many superpixels, or the superpixels: integers (h, w) or (batch, h, w), and for `x` of
            another shape integers that broadcast to it.

    Raises:
        ValueError: `segments` is not of that form.
    """
    if isinstance(segments, Tensor):
        if segments.is_floating_point():
            raise ValueError(f"segments has dtype {segments.dtype}; give integers, the superpixel of each pixel")
        given = segments[:, None] if x.dim() == 4 and segments.dim() == 3 else segments
        try:
            maps = given.to(x.device).expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"segments has shape {tuple(segments.shape)}, which does not fit {tuple(x.shape)}"
            ) from None
        return torch.stack([labels.unique(return_inverse=True)[1] for labels in maps])
    if x.dim() != 4:
        return torch.arange(x[0].numel(), device=x.device).view(x.shape[1:]).expand_as(x)
    if segments < 1:
        raise ValueError(f"segments is {segments}; it must be at least 1")
    return torch.stack([_superpixels(image, segments).expand_as(image) for image in x])


def _superpixels(image: Tensor, count: int) -> Tensor:
    """About `count` superpixels of an image (channels, h, w), (h, w) int64; its values are brought to 0 to 1 first."""
    values = image.detach().double().cpu()
    spread_of_values = float(values.max() - values.min()) or 1.0
    pixels = ((values - values.min()) / spread_of_values).permute(1, 2, 0).numpy()
    labels = slic(pixels, n_segments=count, compactness=1.0, start_label=0, channel_axis=-1, convert2lab=False)
    _, numbered = np.unique(labels, return_inverse=True)
    return torch.from_numpy(numbered.reshape(labels.shape)).long().to(image.device)


def spread(values: Tensor, labels: Tensor) -> Tensor:
    """The value of each feature (features,) in equal shares over its elements, in the shape of `labels`."""
    sizes = labels.flatten().bincount(minlength=len(values))
    return (values / sizes.to(values))[labels]
