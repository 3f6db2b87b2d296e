"""SmoothGrad: the mean gradient over noisy copies of the input (thesis 3.3.4, equation 3.3; Smilkov et al. 2017)."""

import torch
from captum.attr import NoiseTunnel, Saliency
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["smooth_grad"]


def smooth_grad(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
    chunk: int = 25,
    progress: bool = False,
) -> Tensor:
    """``1/n sum df/dx (x + N(0, sigma^2))``, with its sign.

    Args:
        model, x, target: as for `athena.attribution.attribute`.
        samples: noisy copies of each image, n.
        noise: the standard deviation of the noise, as a share of each image's largest value minus its smallest.
        seed: of the noise; each image gets the same.
        chunk: how many copies go through the network at once.
        progress: whether to show a bar.
    """
    method = NoiseTunnel(Saliency(model))
    found = []
    for image, chosen in tqdm(list(zip(x.split(1), target.split(1), strict=True)), "SmoothGrad", disable=not progress):
        torch.manual_seed(seed)
        found.append(
            method.attribute(
                image.clone().requires_grad_(),
                nt_type="smoothgrad",
                nt_samples=samples,
                nt_samples_batch_size=chunk,
                stdevs=noise * float(image.max() - image.min()),
                target=chosen,
                abs=False,
            )
        )
    return torch.cat(found)
