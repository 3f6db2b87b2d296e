"""What `athena.data` reads, downloads and refuses. The files are tiny fakes, and nothing reaches the network."""

import hashlib
import pickle
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST

from athena import data
from athena.experiments.data import originals
from athena.experiments.data.loading import _cached

pytestmark = pytest.mark.usefixtures("no_network")
OPEN = urllib.request.urlopen


def load_afresh(name: str) -> data.Data:
    """As in a new process: nothing is in memory."""
    _cached.cache_clear()
    return data.load(name)


# MNIST


@pytest.mark.usefixtures("mnist")
def test_another_data_folder_is_respected_within_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.load("mnist").train_images.shape == (40, 1, 32, 32)
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(data.MissingData):
        data.load("mnist")


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[:-1], lambda c: b"", lambda c: c[:20] + b"\x0b" + c[21:], lambda c: c + b"more"],
    ids=["truncated", "empty", "one byte changed", "too long"],
)
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_mnist_is_noticed(mnist: Path, file: str, spoil: Callable[[bytes], bytes]) -> None:
    (mnist / file).write_bytes(spoil((mnist / file).read_bytes()))
    with pytest.raises(data.DamagedData, match=r"MNIST(.|\n)*`athena data --download`"):
        data.load("mnist")


def test_a_missing_file_of_mnist_is_noticed(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DamagedData, match=r"torchvision cannot read .*MNIST/raw(.|\n)*Delete that folder"):
        data.load("mnist")


def test_a_data_set_that_is_not_the_recorded_one_is_refused_with_both_fingerprints(
    mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = data.DATA_SETS["mnist"]
    monkeypatch.setitem(data.DATA_SETS, "mnist", replace(record, fingerprint="0123456789abcdef"))
    with pytest.raises(data.DamagedData, match=rf"fingerprint is {record.fingerprint}, expected 0123456789abcdef"):
        data.load("mnist")
    monkeypatch.setitem(data.DATA_SETS, "mnist", replace(record, train=41))
    with pytest.raises(data.DamagedData, match="40 training and 10 test images, expected 41 and 10"):
        data.load("mnist")


# What else can be wrong with a folder


def test_a_file_of_the_systems_own_in_the_folder_of_a_data_set_does_not_stop_its_download(
    data_folder: Path, tiny_mnist: dict[str, bytes], download_as: Callable[..., None]
) -> None:
    (data_folder / "MNIST" / "raw").mkdir(parents=True)
    (data_folder / "MNIST" / "raw" / ".DS_Store").write_bytes(b"Finder's")
    download_as(tiny_mnist)
    assert data.load("mnist").train_images.shape == (40, 1, 32, 32)
    there = {path.name for path in (data_folder / "MNIST" / "raw").iterdir()}
    assert there == {".DS_Store", *tiny_mnist}


def test_what_a_killed_process_has_left_goes_with_the_next(
    data_folder: Path, tiny_mnist: dict[str, bytes], download_as: Callable[..., None]
) -> None:
    (data_folder / ".download").mkdir()
    (data_folder / ".download" / "half of an archive").touch()
    (data_folder / ".download.lock").touch()
    download_as(tiny_mnist)
    data.load("mnist")
    assert [path.name for path in data_folder.iterdir()] == ["MNIST"]


@pytest.mark.parametrize("name", ["x" * 5000, "a file/below it", "~no-such-user/data"])
def test_a_data_folder_that_the_system_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ATHENA_DATA", name if name.startswith("~") else str(tmp_path / name))
    for read in (lambda: data.load("mnist"), lambda: data.load("cifar10")):
        with pytest.raises(data.DataError, match="ATHENA_DATA"):
            read()


# CIFAR-10


def small_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATA_SETS, "cifar10", replace(data.DATA_SETS["cifar10"], train=20, test=10))


@pytest.fixture
def cifar10(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny CIFAR-10 of image folders: two and one for each class; returns the image folder."""
    small_cifar10(monkeypatch)
    random = np.random.RandomState(0)
    for part, count in (("train", 2), ("test", 1)):
        for name in originals.CIFAR10_CLASSES:
            (data_folder / "cifar10" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(data_folder / "cifar10" / part / name / f"{i:04}.jpg")
    return data_folder / "cifar10"


@pytest.mark.usefixtures("cifar10")
def test_image_folders_give_every_class_with_its_own_images() -> None:
    d = data.load("cifar10")
    assert d.train_images.shape == (20, 3, 32, 32)
    assert d.channels == 3
    assert d.train_labels.bincount().tolist() == [2] * 10
    assert d.test_labels.tolist() == list(range(10))
    assert d.source == "CIFAR-10, JPEG image folders"
    with Image.open(data.folder() / "cifar10/test/cat/0000.jpg") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal((d.test_images[3] * 255).round().to(torch.uint8), pixels)


def test_a_broken_image_is_named(cifar10: Path) -> None:
    path = cifar10 / "train" / "dog" / "0001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(data.DamagedData, match=r"train/dog/0001\.jpg is not a whole image"):
        data.load("cifar10")
    assert [path.name for path in cifar10.parent.iterdir()] == ["cifar10"]


def test_an_image_of_another_size_is_named(cifar10: Path) -> None:
    Image.new("RGB", (31, 32)).save(cifar10 / "test" / "ship" / "0000.jpg")
    with pytest.raises(data.DamagedData, match=r"test/ship/0000\.jpg has 31x32 pixels, expected 32x32"):
        data.load("cifar10")


def test_a_missing_image_is_noticed(cifar10: Path) -> None:
    (cifar10 / "train" / "frog" / "0001.jpg").unlink()
    with pytest.raises(data.DamagedData, match="19 training and 10 test images, expected 20 and 10"):
        data.load("cifar10")


def test_image_folders_without_the_ten_classes_are_refused(cifar10: Path) -> None:
    (cifar10 / "test" / "truck").rename(cifar10 / "test" / "lorry")
    with pytest.raises(data.DamagedData, match=r"ten classes of CIFAR-10; it has airplane.* lorry"):
        data.load("cifar10")


def test_image_folders_are_converted_once(cifar10: Path) -> None:
    first = data.load("cifar10")
    assert sorted(path.name for path in cifar10.parent.iterdir()) == ["cifar10", "cifar10.npz"]
    cifar10.rename(cifar10.with_name("elsewhere"))
    again = load_afresh("cifar10")
    assert (again.fingerprint, again.source) == (first.fingerprint, first.source)
    assert torch.equal(again.train_images, first.train_images)


@pytest.mark.parametrize("spoil", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:9000] + b"x" + c[9001:]])
def test_damage_to_the_converted_images_is_noticed(cifar10: Path, spoil: Callable[[bytes], bytes]) -> None:
    data.load("cifar10")
    converted = cifar10.parent / "cifar10.npz"
    converted.write_bytes(spoil(converted.read_bytes()))
    with pytest.raises(data.DamagedData, match=r"cifar10\.npz is damaged(.|\n)*Delete it"):
        load_afresh("cifar10")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def half(file: Path, **arrays: object) -> None:
        file.write_bytes(b"half a file")
        raise interruption

    monkeypatch.setattr(np, "savez", half)
    if interruption is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar10")
    else:
        assert data.load("cifar10").channels == 3  # the disk is full or read-only: the images are read nevertheless
    assert [path.name for path in cifar10.parent.iterdir()] == ["cifar10"]


@pytest.fixture
def batches(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny CIFAR-10 in torchvision's layout."""
    place = data_folder / "cifar-10-batches-py"
    place.mkdir()
    random = np.random.RandomState(0)

    def dump(file: str, content: dict[str, object]) -> str:
        (place / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((place / file).read_bytes()).hexdigest()

    def batch(file: str, n: int) -> list[str]:
        pixels = random.randint(0, 256, (n, 3072)).astype(np.uint8)
        return [file, dump(file, {"data": pixels, "labels": [i % 10 for i in range(n)]})]

    small_cifar10(monkeypatch)
    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1", 20)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 10)])
    md5 = dump("batches.meta", {"label_names": list(originals.CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return place


def test_the_original_batches_are_read_channels_first(batches: Path) -> None:
    d = data.load("cifar10")
    stored = pickle.loads((batches / "test_batch").read_bytes())["data"].reshape(10, 3, 32, 32)
    assert d.train_images.shape == (20, 3, 32, 32)
    assert d.source == "CIFAR-10, the original batches"
    assert torch.equal((d.test_images * 255).round().to(torch.uint8), torch.from_numpy(stored))


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_damaged_or_missing_batch_is_noticed(batches: Path, file: str) -> None:
    content = (batches / file).read_bytes()
    (batches / file).write_bytes(content[:-1])
    with pytest.raises(data.DamagedData, match=r"torchvision cannot read .*cifar-10-batches-py"):
        data.load("cifar10")
    (batches / file).unlink()
    with pytest.raises(data.DamagedData, match=r"torchvision cannot read .*cifar-10-batches-py"):
        data.load("cifar10")


# A data set of torchvision's that the package does not know yet


def test_another_data_set_of_torchvision_takes_one_record(
    mnist: Path, tiny_mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = originals.from_torchvision(
        "FashionMNIST",
        "FashionMNIST/raw",
        "Fashion-MNIST",
        name="fashion",
        train=40,
        test=10,
        stand_in="mnist5k",
    )
    monkeypatch.setitem(data.DATA_SETS, "fashion", record)
    with pytest.raises(data.MissingData, match="fashion is not in"):
        data.load("fashion")
    assert data.at_hand("fashion") == "mnist5k"
    mnist.parent.rename(mnist.parent.with_name("FashionMNIST"))
    assert data.at_hand("fashion") == "fashion"
    assert data.load("fashion").train_images.shape == (40, 1, 32, 32)
    assert "fashion" in set(data.inventory()["name"])


# Downloads


@pytest.fixture
def download_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what takes the place of torchvision's download: it writes the files given, then raises the error given."""

    def begin(files: dict[str, bytes], error: BaseException | None = None) -> None:
        def fake(self: MNIST) -> None:
            print("50 %", file=sys.stderr)
            print("done")
            Path(self.raw_folder).mkdir(parents=True)
            for name, content in files.items():
                (Path(self.raw_folder) / name).write_bytes(content)
            if error is not None:
                raise error

        monkeypatch.setattr(MNIST, "download", fake)

    return begin


def test_a_download_is_quiet_and_put_in_place_whole(
    data_folder: Path,
    tiny_mnist: dict[str, bytes],
    download_as: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    download_as({**tiny_mnist, "train-images-idx3-ubyte.gz": b"the archive"})
    assert data.load("mnist").train_images.shape == (40, 1, 32, 32)
    assert sorted(str(path.relative_to(data_folder)) for path in data_folder.rglob("*") if path.is_file()) == sorted(
        f"MNIST/raw/{name}" for name in tiny_mnist
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Error downloading"), OSError("connection lost")])
def test_an_interrupted_download_leaves_nothing(
    data_folder: Path, tiny_mnist: dict[str, bytes], download_as: Callable[..., None], error: BaseException
) -> None:
    download_as(dict(list(tiny_mnist.items())[:2]), error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else data.MissingData):
        data.load("mnist")
    assert not list(data_folder.iterdir())


def test_a_download_that_is_not_the_data_set_leaves_nothing(
    data_folder: Path, tiny_mnist: dict[str, bytes], download_as: Callable[..., None]
) -> None:
    labels = tiny_mnist["t10k-labels-idx1-ubyte"]
    download_as({**tiny_mnist, "t10k-labels-idx1-ubyte": labels[:-1] + b"\x0b"})
    with pytest.raises(data.MissingData, match=r"downloading it failed: mnist in .* is damaged: its fingerprint is"):
        data.load("mnist")
    assert not list(data_folder.iterdir())


def test_what_cannot_be_had_says_where_it_looked_why_and_what_to_do(data_folder: Path) -> None:
    with pytest.raises(data.MissingData) as caught:
        data.load("cifar10")
    for part in (str(data_folder), "no network in tests", "ATHENA_DATA", "athena data --download", "'mnistm5k'"):
        assert part in str(caught.value)
    assert not list(data_folder.iterdir())


@pytest.mark.usefixtures("data_folder")
def test_a_failed_download_is_not_tried_again_unless_asked(no_network: list[str]) -> None:
    for _ in range(3):
        with pytest.raises(data.MissingData):
            data.load("mnist")
    first = list(no_network)
    assert first
    data.inventory()
    assert no_network == first
    data.inventory(download=True)
    assert no_network[len(first) : 2 * len(first)] == first
    assert any("cifar" in address for address in no_network)


@pytest.mark.usefixtures("data_folder")
def test_a_silent_server_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", OPEN)
    monkeypatch.setattr(originals, "SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        start = time.perf_counter()
        with pytest.raises(data.MissingData, match="downloading it failed"):
            data.load("mnist")
        assert time.perf_counter() - start < 2.5
    assert socket.getdefaulttimeout() is None


# What is here


@pytest.mark.usefixtures("data_folder")
def test_the_stand_in_takes_the_place_of_what_is_not_here() -> None:
    stand_ins = {"mnist": "mnist5k", "cifar10": "mnistm5k", "mnist5k": "mnist5k", "mnistm5k": "mnistm5k"}
    assert {name: data.at_hand(name) for name in stand_ins} == stand_ins
    assert {name: data.stand_in(name) for name in stand_ins} == stand_ins


@pytest.mark.usefixtures("mnist")
def test_what_is_here_needs_no_stand_in() -> None:
    assert data.at_hand("mnist") == "mnist"


def test_a_stand_in_for_damaged_data_comes_with_a_warning(mnist: Path) -> None:
    (mnist / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"mnist5k takes the place of mnist: torchvision cannot read .*MNIST/raw"):
        assert data.at_hand("mnist") == "mnist5k"


def test_the_data_folder_is_the_checkouts_or_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATHENA_DATA", raising=False)
    monkeypatch.setattr("athena.experiments.places.CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    assert data.folder() == tmp_path / "data"
    (tmp_path / "checkout" / "studies").mkdir(parents=True)
    assert data.folder() == tmp_path / "checkout" / "data"


def test_the_inventory_says_what_is_here_and_why_not(mnist: Path, no_network: list[str]) -> None:
    table = data.inventory().set_index("name")
    assert list(table.index) == list(data.NAMES)
    assert table.here[["mnist", "cifar10", "mnist5k", "mnistm5k"]].tolist() == [True, False, True, True]
    assert (table.train["mnist"], table.test["mnist"], table.train["mnist5k"]) == (40, 10, 4000)
    assert table.fingerprint["mnist"] == data.load("mnist").fingerprint
    assert table.fingerprint["cifar10"] == ""
    assert table.note["cifar10"] == f"cifar10 is not in {mnist.parent.parent}."
    assert table.note["mnist"] == ""
    assert not no_network


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("train_images", np.zeros((20, 2, 32, 32), np.uint8), r"its train images are uint8 \(20, 2, 32, 32\)"),
        ("train_images", np.zeros((20, 3, 32, 32), np.int8), "its train images are int8"),
        ("test_labels", np.zeros((10, 1), np.uint8), r"its test labels are uint8 \(10, 1\)"),
        ("test_labels", np.full(10, 10, np.uint8), "its test labels go up to 10, expected 9"),
    ],
)
def test_converted_images_of_another_form_are_refused(
    cifar10: Path, name: str, value: np.ndarray, message: str
) -> None:
    data.load("cifar10")
    converted = cifar10.parent / "cifar10.npz"
    with np.load(converted) as stored:
        content = dict(stored) | {name: value}
    np.savez(converted, **content)
    with pytest.raises(data.DamagedData, match=message):
        load_afresh("cifar10")


def test_what_a_killed_conversion_has_left_goes_with_the_next(cifar10: Path) -> None:
    (cifar10.parent / ".convert").mkdir()
    (cifar10.parent / ".convert" / "cifar10.npz").write_bytes(b"half")
    load_afresh("cifar10")
    assert sorted(path.name for path in cifar10.parent.iterdir()) == ["cifar10", "cifar10.npz"]
