"""The two networks of thesis table 6.1, and a small one. Any other PyTorch model works with this package as well.

To add a model to the experiments, write its function here and enter it into `MODELS` and `STEP_COST`.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

__all__ = ["MODELS", "STEP_COST", "cnn", "mlp", "small"]


def mlp(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """The multi-layer network of table 6.1: 1024 inputs, layers of 1024, 512 and `classes` neurons, ReLU between.

    Takes (batch, channels, 32, 32), gives logits (batch, classes). With more than one channel the first layer has
    1024 inputs for each.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(channels * 32 * 32, 1024),
            relu1=nn.ReLU(),
            linear2=nn.Linear(1024, 512),
            relu2=nn.ReLU(),
            linear3=nn.Linear(512, classes),
        )
    )


def cnn(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """The convolutional network of table 6.1: five 3x3 convolutions, three poolings, the linear part of `mlp`.

    Takes (batch, channels, 32, 32), gives logits (batch, classes). The table leaves kernel and padding open; 3x3
    with padding 1 keeps the image size, so that the linear part starts from 256 maps of 4x4.
    """

    def convolution(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)

    return nn.Sequential(
        OrderedDict(
            conv1=convolution(channels, 64),
            relu1=nn.ReLU(),
            conv2=convolution(64, 64),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=convolution(64, 128),
            relu3=nn.ReLU(),
            conv4=convolution(128, 128),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv5=convolution(128, 256),
            relu5=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(256 * 4 * 4, 1024),
            relu6=nn.ReLU(),
            linear2=nn.Linear(1024, 512),
            relu7=nn.ReLU(),
            linear3=nn.Linear(512, classes),
        )
    )


def small(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Layers of 50, 30 and `classes` neurons with ReLU between (Ross et al. 2017, arXiv 1703.03717, for Decoy MNIST).

    Takes (batch, channels, 32, 32), gives logits (batch, classes). For experiments on what a network looks at, which
    need no large one.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(channels * 32 * 32, 50),
            relu1=nn.ReLU(),
            linear2=nn.Linear(50, 30),
            relu2=nn.ReLU(),
            linear3=nn.Linear(30, classes),
        )
    )


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": mlp, "cnn": cnn, "small": small}
"""What `Run(model=...)` may be: functions of the number of channels and classes."""
STEP_COST: dict[str, float] = {"mlp": 1.0, "cnn": 45.0, "small": 0.2}
"""Time of a training step on one image, in steps of the MLP, on a CPU."""
