"""What is known of a data set, its arrays in memory, and what can be wrong with it."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

UInt8 = npt.NDArray[np.uint8]


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder in `folder`, for one process at a time. What a killed one has left in it goes first.

    Raises:
        OSError: it cannot be written.
    """
    place = folder / f".{name}"
    with FileLock(folder / f".{name}.lock"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):
                (folder / f".{name}.lock").unlink()


class DataError(Exception):
    """A data set cannot be used. The message says what is wrong with which file, and what to do."""


class MissingData(DataError):
    """The data set is not here, and could not be downloaded."""


class DamagedData(DataError):
    """The data set is here, but a file is missing, truncated or altered."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """A whole data set in memory: images (n, channels, 32, 32), labels (n,), both uint8; masks (n, 32, 32) bool.

    A mask is the digit's own pixels, where a data set knows them. source: where it came from, in words.
    """

    train_images: UInt8
    train_labels: UInt8
    test_images: UInt8
    test_labels: UInt8
    source: str
    test_masks: npt.NDArray[np.bool_] | None = None
    train_masks: npt.NDArray[np.bool_] | None = None

    def problem(self) -> str | None:
        """What is wrong with the shapes, the dtypes or the labels, or None."""
        for part in ("train", "test"):
            images, labels = (getattr(self, f"{part}_{what}") for what in ("images", "labels"))
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] not in ((1, 32, 32), (3, 32, 32)):
                return f"its {part} images are {images.dtype} {images.shape}, expected uint8 (n, 1 or 3, 32, 32)"
            if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
                return f"its {part} labels are {labels.dtype} {labels.shape}, expected uint8 {images.shape[:1]}"
            if labels.max(initial=0) > 9:
                return f"its {part} labels go up to {labels.max()}, expected 9"
        return None

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 over images and labels, with their dtypes and shapes."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DataSet:
    """One data set. To add one, write its record into `DATA_SETS` of one of the files here; nothing else changes.

    Attributes:
        name: what `athena.data.load` and `Run` call it.
        train, test: how many images there are.
        read: reads it from the data folder. Raises MissingData if it is not there, DamagedData if it cannot be read.
        remedy: what to do where it is damaged, one sentence.
        fingerprint: of the whole data set; None if copies of it differ, as JPEG files do.
        download: gets it into a folder that is given, in the form that `read` takes; None if it needs no download.
        place: what `download` makes in that folder.
        stand_in: the data set that takes its place where it cannot be had; None if it needs no download.
    """

    name: str
    train: int
    test: int
    read: Callable[[Path], Arrays]
    remedy: str
    fingerprint: str | None = None
    download: Callable[[Path], None] | None = None
    place: str = ""
    stand_in: str | None = None

    def load(self, folder: Path) -> Arrays:
        """The data set as it lies in `folder`, checked.

        Raises:
            MissingData: it is not there.
            DamagedData: it cannot be read, or is not the data set that the record describes.
        """
        try:
            arrays = self.read(folder)
        except OSError as error:
            raise DamagedData(
                f"{self.name} cannot be read: {error}.\nSee that ATHENA_DATA names a folder, and that you may read it."
            ) from error
        found, expected = (len(arrays.train_labels), len(arrays.test_labels)), (self.train, self.test)
        if found != expected:
            raise DamagedData(
                f"{self.name} in {folder} has {found[0]} training and {found[1]} test images, expected "
                f"{expected[0]} and {expected[1]}.\n{self.remedy}"
            )
        if self.fingerprint not in (None, arrays.fingerprint):
            raise DamagedData(
                f"{self.name} in {folder} is damaged: its fingerprint is {arrays.fingerprint}, expected "
                f"{self.fingerprint}.\n{self.remedy}"
            )
        if problem := arrays.problem():
            raise DamagedData(f"{self.name} in {folder} is damaged: {problem}.\n{self.remedy}")
        return arrays
