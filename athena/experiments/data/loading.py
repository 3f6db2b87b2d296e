"""Loads a data set: found or downloaded, cut to a fraction, and put on the device as tensors."""

import functools
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from athena.experiments import places
from athena.experiments.data import originals, planted, stand_ins
from athena.experiments.data.record import Arrays, DamagedData, DataError, DataSet, MissingData, UInt8, scratch

DATA_SETS: dict[str, DataSet] = {
    record.name: record for record in (*originals.DATA_SETS, *stand_ins.DATA_SETS, *planted.DATA_SETS)
}
NAMES = tuple(DATA_SETS)

HELD_OUT_SEED = 1
"""A fixed choice, drawn by numpy's RandomState, whose stream is frozen across versions."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set on the device. Images are (n, channels, 32, 32) float32 in [0, 1], labels (n,) int64.

    `validation_*` is the held-out part of the training set (n = 0 if nothing is held out). `test_masks`, for
    `mnistm5k` and the data sets with a shortcut, is (n_test, 32, 32) bool: the digit's own pixels. `train_masks`, for
    the latter alone, is the same of the training images. `fingerprint`: 16 hex digits of the sha256
    over the whole data set as uint8, the same for every fraction, seed and device. `source`: where it came from.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_masks: Tensor | None
    fingerprint: str
    source: str
    train_masks: Tensor | None = None

    @property
    def channels(self) -> int:
        """Colour channels of an image: 1 or 3."""
        return int(self.train_images.shape[1])

    @property
    def classes(self) -> int:
        """Number of classes: 10 in every data set here."""
        return 10


def load(
    name: str, fraction: float = 1.0, seed: int = 0, held_out: float = 0.0, device: torch.device | str = "cpu"
) -> Data:
    """A data set, its training part cut to a fraction.

    name: one of `NAMES`. fraction: share of the training set, in (0, 1]; at least one image. seed: decides which
    images those are, and their order; for one seed, a smaller fraction is the beginning of a larger one.
    held_out: share of the training set, in [0, 1), set aside as validation set before the fraction is taken; the same
    images whatever seed and fraction are. device: where the tensors go.

    Downloads a data set that is not in `folder()`. Leaves the global random generators alone.
    Raises ValueError for arguments out of range, DataError if the data set is missing or damaged.
    """
    record = _record(name)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must lie in (0, 1]")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, but must lie in [0, 1)")
    arrays = _arrays(record, folder())
    train, validation = _choose(len(arrays.train_labels), fraction, seed, held_out)

    def images(array: UInt8) -> Tensor:
        return torch.from_numpy(array).to(device).to(torch.float32).div_(255)

    def labels(array: UInt8) -> Tensor:
        return torch.from_numpy(array).to(device).to(torch.int64)

    return Data(
        name=name,
        train_images=images(arrays.train_images[train]),
        train_labels=labels(arrays.train_labels[train]),
        validation_images=images(arrays.train_images[validation]),
        validation_labels=labels(arrays.train_labels[validation]),
        test_images=images(arrays.test_images),
        test_labels=labels(arrays.test_labels),
        test_masks=None if arrays.test_masks is None else torch.tensor(arrays.test_masks, device=device),
        fingerprint=arrays.fingerprint,
        source=arrays.source,
        train_masks=None if arrays.train_masks is None else torch.tensor(arrays.train_masks[train], device=device),
    )


def _choose(n: int, fraction: float, seed: int, held_out: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices, out of n training images, of the subset and of the held-out part."""
    order = np.random.RandomState(HELD_OUT_SEED).permutation(n)
    k = min(round(held_out * n), n - 1)
    validation, rest = np.sort(order[:k]), np.sort(order[k:])
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
    return rest[drawn[: max(1, round(fraction * len(rest)))]], validation


def stand_in(name: str) -> str:
    """The data set that takes the place of `name` where `name` cannot be had; itself if it needs no download."""
    return _record(name).stand_in or name


def at_hand(name: str) -> str:
    """`name` if it can be loaded, by download if need be, else its stand-in. Damaged data are warned about."""
    record = _record(name)
    try:
        _arrays(record, folder())
    except DataError as error:
        if record.stand_in is None:
            raise
        if isinstance(error, DamagedData):
            warnings.warn(f"{record.stand_in} takes the place of {name}: {error}", stacklevel=2)
        return record.stand_in
    return name


def folder() -> Path:
    """Where data sets lie: $ATHENA_DATA, else data/ in the checkout, else data/ in the current folder."""
    if chosen := os.environ.get("ATHENA_DATA"):
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            raise MissingData(f"ATHENA_DATA is {chosen!r}, and there is no such user: {error}") from error
    return places.root() / "data"


def inventory(download: bool = False) -> pd.DataFrame:
    """Which data sets are here: one row for each of `NAMES`.

    Columns: name, here (bool), source, train and test (number of images), fingerprint, note (why it is not here).
    download: get what is missing, also where that has failed before.
    """
    if download:
        _failed.clear()
    rows: list[tuple[object, ...]] = []
    for record in DATA_SETS.values():
        try:
            arrays = _arrays(record, folder(), download)
        except DataError as error:
            rows.append((record.name, False, "", pd.NA, pd.NA, "", str(error).splitlines()[0]))
        else:
            counts = len(arrays.train_labels), len(arrays.test_labels)
            rows.append((record.name, True, arrays.source, *counts, arrays.fingerprint, ""))
    table = pd.DataFrame(rows, columns=["name", "here", "source", "train", "test", "fingerprint", "note"])
    return table.astype({"train": "Int64", "test": "Int64"})


def _record(name: str) -> DataSet:
    if name not in DATA_SETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    return DATA_SETS[name]


def _arrays(record: DataSet, root: Path, download: bool = True) -> Arrays:
    """The data set from memory, from `root`, or by download."""
    try:
        return _cached(record, root)
    except MissingData as error:
        if record.download is None:
            raise
        problem = f"{record.name} is not in {root}"
        remedy = (
            "Set ATHENA_DATA to the folder that holds it, run `athena data --download`, "
            f"or use the stand-in {record.stand_in!r}, which needs no download."
        )
        if not download:
            raise MissingData(f"{problem}.\n{remedy}") from error
        if (record, root) not in _failed:
            try:
                _download(record, root)
                return _cached(record, root)
            except Exception as failure:  # torchvision, the network and the disk each have errors of their own
                _failed[record, root] = " ".join(str(failure).split()) or type(failure).__name__
        raise MissingData(f"{problem}, and downloading it failed: {_failed[record, root]}\n{remedy}") from error


@functools.lru_cache(maxsize=8)
def _cached(record: DataSet, root: Path) -> Arrays:
    return record.load(root)


_failed: dict[tuple[DataSet, Path], str] = {}
"""Downloads that failed in this process, and why: an offline machine waits for the network once."""


def _download(record: DataSet, root: Path) -> None:
    """Downloads into a temporary folder, checks what came, and moves it into `root` in one step."""
    assert record.download is not None
    root.mkdir(parents=True, exist_ok=True)
    with scratch(root, "download") as folder:
        with suppress(DataError):
            record.load(root)
            return  # another process has put it there meanwhile
        record.download(folder)
        record.load(folder)
        place = root / record.place
        place.parent.mkdir(exist_ok=True)
        if place.is_dir():  # with files of others in it, such as .DS_Store: they stay
            for file in (folder / record.place).iterdir():
                file.replace(place / file.name)
        else:
            (folder / record.place).replace(place)
