"""Networks that more than one benchmark measures, or that are here to be of another kind than those of the package."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer


def vit(classes: int = 10) -> VisionTransformer:
    """torchvision's vision transformer, small: 16 patches of 8 x 8 pixels, 6 blocks, 4 heads, width 128."""
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=classes
    )


class OwnMLP(nn.Module):
    """The MLP of thesis table 6.1 as a user may write it: a class with its own `forward`, activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(1024, 1024), nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, 32, 32)."""
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.second(x))
        return self.last(x)
