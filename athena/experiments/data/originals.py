"""MNIST and CIFAR-10: read and downloaded by torchvision, and CIFAR-10 from folders of images as well."""

import contextlib
import io
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from athena.experiments.data.record import Arrays, DamagedData, DataSet, MissingData, UInt8, scratch

SILENCE_SECONDS = 10.0
"""How long a server may take to answer, and a download that has begun may stall."""


def from_torchvision(class_name: str, place: str, title: str, **known: Any) -> DataSet:
    """The record of a data set of ``torchvision.datasets``.

    Args:
        class_name: the class; its images are (n, h, w) or (n, h, w, 3), at most 32 pixels high and wide.
        place: where it keeps the files that it reads, below the data folder.
        title: the data set in words, for `Arrays.source`.
        known: the other fields of `DataSet`.
    """
    return DataSet(
        read=partial(_read, class_name, place, title),
        remedy=f"Delete {place} in the data folder and run `athena data --download`.",
        download=partial(_download, class_name, place),
        place=place,
        **known,
    )


def _read(class_name: str, place: str, title: str, folder: Path) -> Arrays:
    if not (folder / place).is_dir() or all(path.name.startswith(".") for path in (folder / place).iterdir()):
        raise MissingData(f"there is no {folder / place}, or nothing in it")
    try:
        train, test = (_torchvision(class_name)(folder, train=part) for part in (True, False))
    except Exception as error:  # of whatever class: torchvision leaves the errors of its readers as they are
        raise DamagedData(
            f"torchvision cannot read {folder / place}: {error or type(error).__name__}.\n"
            f"Delete that folder and run `athena data --download`."
        ) from error
    return Arrays(_images(train.data), _labels(train.targets), _images(test.data), _labels(test.targets), title)


def _torchvision(class_name: str) -> Callable[..., Any]:
    return getattr(import_module("torchvision.datasets"), class_name)


def _images(images: Any) -> UInt8:
    """(n, h, w) or (n, h, w, 3) to (n, channels, 32, 32): black on all sides of smaller images (thesis table 6.1)."""
    array = np.asarray(images, np.uint8)
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    rows, columns = ((32 - size) // 2 for size in array.shape[1:])
    return np.pad(array, ((0, 0), (rows, rows), (columns, columns)))[:, None]


def _labels(labels: Any) -> UInt8:
    return np.asarray(labels, np.uint8)


def _download(class_name: str, place: str, folder: Path) -> None:
    """By torchvision, without its progress bars. Its archives are not kept.

    Raises whatever torchvision does: OSError if no server answers, RuntimeError for a wrong md5.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # torchvision sets none: a stalled download would wait for ever
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _torchvision(class_name)(folder, download=True)
    finally:
        socket.setdefaulttimeout(before)
    for archive in (folder / place).glob("*.gz"):
        archive.unlink()


def _read_cifar10(folder: Path) -> Arrays:
    """The original batches, else the folders ``cifar10/{train,test}/{class}/*.{png,jpg}``.

    Decoding 60,000 files takes long, so they are converted once, into ``cifar10.npz``, which is read from then on.
    """
    with contextlib.suppress(MissingData):
        return _read("CIFAR10", CIFAR10_BATCHES, "CIFAR-10, the original batches", folder)
    images, converted = folder / "cifar10", folder / "cifar10.npz"
    if converted.exists():
        return _read_converted(converted)
    if not images.is_dir():
        raise MissingData(f"there is neither {CIFAR10_BATCHES} nor cifar10 in {folder}")
    train, test = _decoded(images / "train"), _decoded(images / "test")
    kinds = sorted({"PNG" if path.suffix.lower() == ".png" else "JPEG" for path in images.glob("*/*/*")})
    arrays = Arrays(*train, *test, source=f"CIFAR-10, {' and '.join(kinds)} image folders")
    with contextlib.suppress(OSError), scratch(folder, "convert") as place:
        content = {name: value for name, value in vars(arrays).items() if value is not None}
        np.savez(place / converted.name, **content)
        (place / converted.name).replace(converted)  # whole or not at all
    return arrays


def _read_converted(path: Path) -> Arrays:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            if stored.zip.testzip() is not None:  # numpy reads no further than a header says, and checks no sum then
                raise ValueError("a checksum in it is wrong")
            content = {name: stored[name] for name in stored.files}
        return Arrays(**content | {"source": str(content["source"])})
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own
        raise DamagedData(f"{path} is damaged: {error}.\nDelete it, and it is made again from the images.") from error


def _decoded(part: Path) -> tuple[UInt8, UInt8]:
    """Images (n, 3, 32, 32) and labels (n,): first of every class, second of every class, and so on.

    So the first images show all classes.
    """
    from torchvision.datasets import ImageFolder

    again = f"Unpack {part.parent} again, or delete it and run `athena data --download`."
    try:
        files = ImageFolder(part)
    except OSError as error:
        raise DamagedData(f"{part} does not hold a folder of images for each class: {error}.\n{again}") from error
    if tuple(files.classes) != CIFAR10_CLASSES:
        raise DamagedData(
            f"{part} does not hold the ten classes of CIFAR-10; it has {', '.join(files.classes)}.\n"
            f"Expected {', '.join(CIFAR10_CLASSES)}. {again}"
        )
    labels = _labels(files.targets)
    place_in_class = np.concatenate([np.arange(count) for count in np.bincount(labels)])
    order = np.lexsort((labels, place_in_class))
    images = np.empty((len(order), 32, 32, 3), np.uint8)
    for image, index in zip(images, order, strict=True):
        path = files.samples[index][0]
        try:
            decoded = files.loader(path)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise DamagedData(f"{path} is not a whole image: {error}.\n{again}") from error
        if decoded.size != (32, 32):
            raise DamagedData(f"{path} has {'x'.join(map(str, decoded.size))} pixels, expected 32x32.\n{again}")
        image[:] = decoded
    return _images(images), labels[order]


CIFAR10_BATCHES = "cifar-10-batches-py"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

MNIST = from_torchvision(
    "MNIST",
    "MNIST/raw",
    "MNIST, the original idx files",
    name="mnist",
    train=60_000,
    test=10_000,
    fingerprint="71b3b24f6bb5c23c",
    stand_in="mnist5k",
)
CIFAR10 = replace(
    from_torchvision(
        "CIFAR10", CIFAR10_BATCHES, "CIFAR-10", name="cifar10", train=50_000, test=10_000, stand_in="mnistm5k"
    ),
    read=_read_cifar10,  # torchvision checks the md5 of each batch; images in folders have no one fingerprint
)
DATA_SETS = (MNIST, CIFAR10)
