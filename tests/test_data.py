"""What `athena.data` promises. Needs neither data set nor network: files are tiny fakes, or come with packages."""

import gzip
import hashlib
import io
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from athena import data

FAKE_SHAPES = {
    "train-images-idx3-ubyte": (40, 28, 28),
    "train-labels-idx1-ubyte": (40,),
    "t10k-images-idx3-ubyte": (10, 28, 28),
    "t10k-labels-idx1-ubyte": (10,),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No test reaches the network; returns the addresses that would have been asked."""
    asked: list[str] = []

    def refuse(url: str) -> None:
        asked.append(url)
        raise OSError("no network in tests")

    monkeypatch.setattr(data, "_answers", refuse)
    return asked


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def idx_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four tiny idx files, no two images alike, whose sizes and md5 take the place of MNIST's."""
    random = np.random.RandomState(0)
    files, expected = {}, {}
    for name, shape in FAKE_SHAPES.items():
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        body = random.randint(0, 256 if len(shape) == 3 else 10, shape).astype(np.uint8)
        files[name] = header + body.tobytes()
        expected[name] = (shape, hashlib.md5(files[name]).hexdigest())
    monkeypatch.setattr(data, "MNIST_FILES", expected)
    return files


def write(raw: Path, files: dict[str, bytes]) -> Path:
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny MNIST; returns its raw folder."""
    return write(root / "MNIST" / "raw", idx_files(monkeypatch))


@pytest.fixture
def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny CIFAR-10 of image folders: two and one for each class; returns the image folder."""
    monkeypatch.setattr(data, "CIFAR10_PER_CLASS", {"train": 2, "test": 1})
    random = np.random.RandomState(0)
    for part, count in data.CIFAR10_PER_CLASS.items():
        for name in data.CIFAR10_CLASSES:
            (root / "cifar10" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "cifar10" / part / name / f"{i:04}.jpg")
    return root / "cifar10"


def load_afresh(name: str) -> data.Data:
    """As in a new process: nothing is in memory."""
    data._kept.cache_clear()
    return data.load(name)


def keys(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


# Subsets


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.0005, 1), st.floats(0.0005, 1), st.integers(0, 2**31), st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_subsets_of_one_seed_are_nested(one: float, other: float, seed: int, held_out: float) -> None:
    small = data.load("mnist5k", min(one, other), seed, held_out)
    large = data.load("mnist5k", max(one, other), seed, held_out)
    n = len(small.train_labels)
    assert torch.equal(small.train_images, large.train_images[:n])
    assert torch.equal(small.train_labels, large.train_labels[:n])


@pytest.mark.parametrize(
    ("fraction", "held_out", "n"), [(1, 0, 40), (0.5, 0, 20), (0.1, 0.1, 4), (1e-9, 0, 1), (1, 0.25, 30), (1, 0.999, 1)]
)
@pytest.mark.usefixtures("mnist")
def test_a_fraction_is_of_what_is_not_held_out_and_at_least_one_image(fraction: float, held_out: float, n: int) -> None:
    assert len(data.load("mnist", fraction, held_out=held_out).train_labels) == n


@pytest.mark.usefixtures("mnist")
def test_subsets_depend_on_the_seed_alone() -> None:
    first, again, other = (data.load("mnist", 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)


@pytest.mark.usefixtures("mnist")
def test_a_subset_holds_no_image_twice_and_the_whole_is_all_images() -> None:
    assert len(set(keys(data.load("mnist", 0.7).train_images))) == 28
    whole = data.load("mnist", 1.0, seed=1).train_images, data.load("mnist", 1.0, seed=2).train_images
    assert set(keys(whole[0])) == set(keys(whole[1]))
    assert len(set(keys(whole[0]))) == 40


@pytest.mark.usefixtures("mnist")
def test_labels_stay_with_their_images() -> None:
    plain = data.load("mnist")
    label_of = dict(zip(keys(plain.train_images), plain.train_labels.tolist(), strict=True))
    part = data.load("mnist", 0.5, seed=3, held_out=0.25)
    for images, labels in ((part.train_images, part.train_labels), (part.validation_images, part.validation_labels)):
        assert [label_of[key] for key in keys(images)] == labels.tolist()


@pytest.mark.usefixtures("mnist")
def test_the_held_out_part_is_never_trained_on() -> None:
    for seed in range(5):
        part = data.load("mnist", 1.0, seed, held_out=0.25)
        assert len(part.validation_labels) == 10
        assert not set(keys(part.train_images)) & set(keys(part.validation_images))


@pytest.mark.usefixtures("mnist")
def test_the_held_out_part_is_the_same_for_every_seed_and_fraction() -> None:
    reference = data.load("mnist", held_out=0.25)
    for fraction, seed in ((1.0, 7), (0.1, 0), (0.5, 123)):
        part = data.load("mnist", fraction, seed, held_out=0.25)
        assert torch.equal(part.validation_images, reference.validation_images)
        assert torch.equal(part.validation_labels, reference.validation_labels)


def test_with_nothing_held_out_the_validation_set_is_empty_and_of_the_right_shape() -> None:
    plain = data.load("mnistm5k")
    assert plain.validation_images.shape == (0, 3, 32, 32)
    assert plain.validation_labels.shape == (0,)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_named(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        data.load("mnist5k", fraction)


@pytest.mark.parametrize("held_out", [1, -0.1])
def test_a_held_out_share_out_of_range_is_named(held_out: float) -> None:
    with pytest.raises(ValueError, match=f"held_out is {held_out}"):
        data.load("mnist5k", held_out=held_out)


@pytest.mark.parametrize("call", [data.load, data.at_hand, data.stand_in])
def test_an_unknown_name_is_answered_with_the_known_ones(call: object) -> None:
    with pytest.raises(ValueError, match="'minst'; there are mnist, cifar10, mnist5k, mnistm5k"):
        call("minst")  # type: ignore[operator]


# What comes back


@pytest.mark.parametrize(("name", "channels"), [("mnist5k", 1), ("mnistm5k", 3)])
def test_tensors_have_the_promised_shapes_types_and_range(name: str, channels: int) -> None:
    d = data.load(name, held_out=0.1)
    assert (d.channels, d.classes) == (channels, 10)
    for images, labels, n in (
        (d.train_images, d.train_labels, 3600),
        (d.validation_images, d.validation_labels, 400),
        (d.test_images, d.test_labels, 1000),
    ):
        assert images.shape == (n, channels, 32, 32)
        assert labels.shape == (n,)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.is_contiguous()
        assert images.min() == 0
        assert 0.9 < images.max() <= 1


def test_tensors_go_to_the_device() -> None:
    d = data.load("mnistm5k", device="meta")
    assert d.test_masks is not None
    assert {tensor.device.type for tensor in (d.train_images, d.validation_labels, d.test_masks)} == {"meta"}


def test_every_load_returns_tensors_of_its_own() -> None:
    spoilt = data.load("mnistm5k")
    assert spoilt.test_masks is not None
    for tensor in (spoilt.train_images, spoilt.train_labels, spoilt.test_images, spoilt.test_labels, spoilt.test_masks):
        tensor.zero_()
    fresh = data.load("mnistm5k")
    assert fresh.test_masks is not None
    assert all(tensor.any() for tensor in (fresh.train_images, fresh.train_labels, fresh.test_images, fresh.test_masks))


@pytest.mark.usefixtures("mnist")
def test_mnist_is_padded_with_two_black_pixels_on_each_side() -> None:
    images = data.load("mnist").test_images
    stored = np.frombuffer((data.folder() / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    assert torch.equal(images[:, 0, 2:30, 2:30] * 255, torch.from_numpy(stored.reshape(10, 28, 28).astype(np.float32)))
    assert images.sum() == images[:, :, 2:30, 2:30].sum()


def test_mnist5k_is_stratified_and_its_parts_share_no_image() -> None:
    d = data.load("mnist5k")
    assert d.train_labels.bincount().tolist() == [400] * 10
    assert d.test_labels.bincount().tolist() == [100] * 10
    assert not set(keys(d.train_images)) & set(keys(d.test_images))


@pytest.mark.parametrize("name", ["mnist5k", "mnistm5k"])
def test_the_first_ten_test_images_of_the_stand_ins_show_every_class(name: str) -> None:
    assert data.load(name).test_labels[:10].tolist() == list(range(10))


def test_loading_leaves_the_global_random_generators_alone() -> None:
    data._kept.cache_clear()
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    data.load("mnistm5k", 0.1, seed=5, held_out=0.1)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]  # noqa: NPY002


def test_a_second_load_is_cheap() -> None:
    data.load("mnist5k")
    start = time.perf_counter()
    for seed in range(20):
        data.load("mnist5k", 0.05, seed)
    assert time.perf_counter() - start < 2


# MNIST-M


def test_mnistm5k_is_the_absolute_difference_of_a_patch_and_a_digit() -> None:
    random = np.random.RandomState(0)
    patches, digits = (random.randint(0, 256, (5, n, 32, 32)).astype(np.uint8) for n in (3, 1))
    expected = np.abs(patches.astype(float) - digits.astype(float))
    assert np.array_equal(data._blend(patches, digits), expected)


def test_mnistm5k_shows_the_photographs_where_the_digit_is_black() -> None:
    rows = {row.tobytes() for photograph in data._photographs() for row in rows_of_32(photograph)}
    for name in ("train_images", "test_images"):
        images = getattr(data.load("mnistm5k"), name)[:50]
        first_rows = (images[:, :, 0] * 255).round().to(torch.uint8).numpy()  # padding: black in every digit
        assert all(row.tobytes() in rows for row in first_rows)


def test_mnistm5k_holds_the_digits_of_mnist5k() -> None:
    blended, digits = data.load("mnistm5k"), data.load("mnist5k")
    assert torch.equal(blended.test_labels, digits.test_labels)
    assert torch.equal(blended.train_labels, digits.train_labels)


def rows_of_32(photograph: data.Array) -> data.Array:
    """Every 32 pixels in a row of a (3, height, width) photograph, as (n, 3, 32)."""
    rows = np.lib.stride_tricks.sliding_window_view(photograph, 32, axis=2)
    return np.ascontiguousarray(rows.transpose(1, 2, 0, 3)).reshape(-1, 3, 32)


def test_mnistm5k_masks_are_the_pixels_of_the_digit_brighter_than_half_of_white() -> None:
    masks, digits = data.load("mnistm5k").test_masks, data.load("mnist5k").test_images
    assert masks is not None
    assert masks.dtype == torch.bool
    assert torch.equal(masks, digits[:, 0] > 0.5)
    assert masks.flatten(1).any(1).all()


def test_only_mnistm5k_has_masks() -> None:
    assert data.load("mnist5k").test_masks is None


def test_training_and_test_patches_come_from_different_parts_of_a_photograph() -> None:
    position = np.tile(np.arange(100, dtype=np.uint8), (3, 40, 1))  # every pixel holds its column
    left, right = position[:, :, :75], position[:, :, 75:]
    patches = data._patches([left], 50, np.random.RandomState(0))
    assert patches.max() < 75 <= right.min()
    assert patches.shape == (50, 3, 32, 32)


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PHOTOGRAPHS", ("chelsea.png", "nowhere.png"))
    with pytest.raises(data.DataError, match=r"nowhere\.png"):
        data._mnistm5k()


# Fingerprints


@pytest.mark.usefixtures("mnist")
def test_the_fingerprint_is_of_the_whole_data_set_whatever_part_is_loaded() -> None:
    prints = {data.load("mnist", f, s, h).fingerprint for f in (1.0, 0.1) for s in (0, 1) for h in (0.0, 0.2)}
    assert len(prints) == 1
    assert len(prints.pop()) == 16


@pytest.mark.parametrize("field", ["train_images", "train_labels", "test_images", "test_labels"])
def test_the_fingerprint_changes_with_one_value(field: str) -> None:
    def whole(value: int) -> data._Whole:
        arrays = {
            "train_images": np.zeros((4, 1, 32, 32), np.uint8),
            "train_labels": np.zeros(4, np.uint8),
            "test_images": np.zeros((2, 1, 32, 32), np.uint8),
            "test_labels": np.zeros(2, np.uint8),
        }
        arrays[field].flat[-1] = value
        return data._Whole(**arrays, source="made up")  # type: ignore[arg-type]

    assert whole(0).fingerprint == whole(0).fingerprint != whole(1).fingerprint


def test_the_fingerprint_knows_the_shape() -> None:
    labels = np.zeros(1, np.uint8)
    tall, wide = np.zeros((1, 1, 64, 16), np.uint8), np.zeros((1, 1, 16, 64), np.uint8)
    one, other = (data._Whole(images, labels, images, labels, source="made up") for images in (tall, wide))
    assert one.fingerprint != other.fingerprint


def test_the_stand_ins_are_the_same_everywhere() -> None:
    """The committed results record these. They change with the digits, the photographs or the recipe alone."""
    assert data.load("mnist5k").fingerprint == "95518a81c1f0956a"
    assert data.load("mnistm5k").fingerprint == "2cc5bf312bae4560"


# Files of MNIST


@pytest.mark.usefixtures("mnist")
def test_another_data_folder_is_respected_within_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.load("mnist").train_images.shape == (40, 1, 32, 32)
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(data.MissingData):
        data.load("mnist")


def test_compressed_idx_files_give_the_same_data(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = data.load("mnist")
    packed = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in mnist.iterdir()}
    write(tmp_path / "packed" / "MNIST" / "raw", packed)
    monkeypatch.setenv("ATHENA_DATA", str(tmp_path / "packed"))
    assert data.load("mnist").fingerprint == plain.fingerprint
    assert len(list((tmp_path / "packed" / "MNIST" / "raw").iterdir())) == 4


def test_a_missing_idx_file_is_named(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DamagedData, match=r"incomplete: .*t10k-labels-idx1-ubyte is missing(.|\n)*unpack"):
        data.load("mnist")


def test_a_truncated_idx_file_is_named_with_both_sizes(mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DamagedData, match=r"train-images-idx3-ubyte is truncated: 31375 bytes, expected 31376"):
        data.load("mnist")


def test_an_idx_file_with_one_changed_byte_is_named(mnist: Path) -> None:
    path = mnist / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        data.DamagedData, match=r"train-labels-idx1-ubyte is damaged: its md5 is [0-9a-f]{32}, expected"
    ):
        data.load("mnist")


@pytest.mark.parametrize("spoil", [lambda c: c[:-9], lambda c: b"no gzip", lambda c: c[:40] + b"xxxxxxxx" + c[48:]])
def test_a_broken_compressed_idx_file_is_named(mnist: Path, spoil: object) -> None:
    path = mnist / "train-images-idx3-ubyte"
    (mnist / f"{path.name}.gz").write_bytes(spoil(gzip.compress(path.read_bytes())))  # type: ignore[operator]
    path.unlink()
    with pytest.raises(data.DamagedData, match=r"train-images-idx3-ubyte\.gz"):
        data.load("mnist")


# Files of CIFAR-10


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
    assert not list(cifar10.parent.glob(".cache*"))


def test_an_image_of_another_size_is_named(cifar10: Path) -> None:
    Image.new("RGB", (31, 32)).save(cifar10 / "test" / "ship" / "0000.jpg")
    with pytest.raises(data.DamagedData, match=r"test/ship/0000\.jpg is 31x32 RGB, expected 32x32 RGB"):
        data.load("cifar10")


def test_a_class_with_too_few_images_is_named(cifar10: Path) -> None:
    (cifar10 / "train" / "frog" / "0001.jpg").unlink()
    with pytest.raises(data.DamagedData, match=r"train/frog holds 1 images, expected 2"):
        data.load("cifar10")


def test_image_folders_without_the_ten_classes_are_refused(cifar10: Path) -> None:
    (cifar10 / "test" / "truck").rename(cifar10 / "test" / "lorry")
    with pytest.raises(data.DamagedData, match=r"ten classes of CIFAR-10; it has airplane.* lorry"):
        data.load("cifar10")


def test_decoded_images_are_kept_and_used_again(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("cifar10").fingerprint
    assert [path.name for path in cifar10.parent.glob(".*")] == [".cache-cifar10.npz"]
    monkeypatch.setattr(data, "_decode", None)
    assert load_afresh("cifar10").fingerprint == first


def test_a_changed_image_makes_the_cache_be_built_again(cifar10: Path) -> None:
    first = data.load("cifar10").fingerprint
    Image.new("RGB", (32, 32)).save(cifar10 / "test" / "ship" / "0000.jpg")
    changed = load_afresh("cifar10").fingerprint
    assert changed != first
    assert load_afresh("cifar10").fingerprint == changed


@pytest.mark.parametrize("spoil", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:9000] + b"x" + c[9001:]])
def test_a_damaged_cache_is_built_again(cifar10: Path, spoil: object) -> None:
    first = data.load("cifar10").fingerprint
    cache = cifar10.parent / ".cache-cifar10.npz"
    whole = cache.read_bytes()
    cache.write_bytes(spoil(whole))  # type: ignore[operator]
    assert load_afresh("cifar10").fingerprint == first
    assert len(cache.read_bytes()) == len(whole)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_cache_leaves_nothing(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def half(file: Path, **arrays: object) -> None:
        file.write_bytes(b"half a cache")
        raise interruption

    monkeypatch.setattr(np, "savez", half)
    if interruption is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar10")
    else:
        assert data.load("cifar10").channels == 3  # a full or read-only disk: goes on without a cache
    assert [path.name for path in cifar10.parent.iterdir()] == ["cifar10"]


@pytest.fixture
def batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny CIFAR-10 in torchvision's layout."""
    from torchvision.datasets import CIFAR10

    place = root / "cifar-10-batches-py"
    place.mkdir()
    random = np.random.RandomState(0)

    def dump(file: str, content: dict[str, object]) -> str:
        (place / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((place / file).read_bytes()).hexdigest()

    def batch(file: str, n: int) -> list[str]:
        pixels = random.randint(0, 256, (n, 3072)).astype(np.uint8)
        return [file, dump(file, {"data": pixels, "labels": [i % 10 for i in range(n)]})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1", 20)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 10)])
    md5 = dump("batches.meta", {"label_names": list(data.CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return place


def test_the_original_batches_are_read_channels_first(batches: Path) -> None:
    d = data.load("cifar10")
    stored = pickle.loads((batches / "test_batch").read_bytes())["data"].reshape(10, 3, 32, 32)
    assert d.train_images.shape == (20, 3, 32, 32)
    assert d.source == "CIFAR-10, the original batches"
    assert torch.equal((d.test_images * 255).round().to(torch.uint8), torch.from_numpy(stored))


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_damaged_or_missing_batch_is_named(batches: Path, file: str) -> None:
    content = (batches / file).read_bytes()
    (batches / file).write_bytes(content[:-1])
    with pytest.raises(data.DamagedData, match=f"{file} does not have the md5"):
        data.load("cifar10")
    (batches / file).unlink()
    with pytest.raises(data.DamagedData, match=f"{file} is missing"):
        data.load("cifar10")


# Downloads


def download_as(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], error: BaseException | None = None) -> None:
    """In place of torchvision's download: writes `files`, then raises `error`."""
    from torchvision.datasets import MNIST

    def fake(self: MNIST) -> None:
        write(Path(self.raw_folder), files)
        if error is not None:
            raise error

    monkeypatch.setattr(MNIST, "download", fake)
    monkeypatch.setattr(data, "_answers", lambda url: None)


def test_a_download_is_put_in_place_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = idx_files(monkeypatch)
    download_as(monkeypatch, {**files, "train-images-idx3-ubyte.gz": b"the archive"})
    assert data.load("mnist").train_images.shape == (40, 1, 32, 32)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == sorted(
        f"MNIST/raw/{name}" for name in files
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Error downloading"), OSError("connection lost")])
@pytest.mark.parametrize("folder_exists", [True, False])
def test_an_interrupted_download_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, folder_exists: bool
) -> None:
    half = dict(list(idx_files(monkeypatch).items())[:2])
    download_as(monkeypatch, half, error)
    if not folder_exists:
        root.rmdir()
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else data.MissingData):
        data.load("mnist")
    assert root.exists() == folder_exists
    assert not list(root.parent.rglob("*")) or list(root.parent.rglob("*")) == [root]


def test_a_download_that_is_not_the_data_set_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = idx_files(monkeypatch)
    files["t10k-labels-idx1-ubyte"] = files["t10k-labels-idx1-ubyte"][:-1] + b"\x0b"
    download_as(monkeypatch, files)
    with pytest.raises(data.MissingData, match=r"downloading it failed: .*t10k-labels-idx1-ubyte is damaged"):
        data.load("mnist")
    assert not list(root.iterdir())


@pytest.mark.usefixtures("root")
def test_a_download_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import sys

    files = idx_files(monkeypatch)
    download_as(monkeypatch, files)
    from torchvision.datasets import MNIST

    fake = MNIST.download
    monkeypatch.setattr(MNIST, "download", lambda self: (print("50 %", file=sys.stderr), print("done"), fake(self)))
    data.load("mnist")
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_had_says_where_it_looked_why_and_what_to_do(root: Path) -> None:
    with pytest.raises(data.MissingData) as caught:
        data.load("cifar10")
    for part in (str(root), "no network in tests", "ATHENA_DATA", "athena data --download", "'mnistm5k'"):
        assert part in str(caught.value)
    assert not list(root.iterdir())


@pytest.mark.usefixtures("root")
def test_a_failed_download_is_not_tried_again_unless_asked(no_network: list[str]) -> None:
    for _ in range(3):
        with pytest.raises(data.MissingData):
            data.load("mnist")
    assert len(no_network) == 1
    data.inventory()
    assert len(no_network) == 1
    data.inventory(download=True)
    assert len(no_network) == 3  # mnist again, and cifar10


def test_a_silent_server_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: time.sleep(3) or io.BytesIO())
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"https://example\.org did not answer within 0\.1 s"):
        data._answers("https://example.org")
    assert time.perf_counter() - start < 2.5


# What is here


@pytest.mark.usefixtures("root")
def test_the_stand_in_takes_the_place_of_what_is_not_here() -> None:
    assert [data.at_hand(name) for name in data.NAMES] == ["mnist5k", "mnistm5k", "mnist5k", "mnistm5k"]
    assert [data.stand_in(name) for name in data.NAMES] == ["mnist5k", "mnistm5k", "mnist5k", "mnistm5k"]


@pytest.mark.usefixtures("mnist")
def test_what_is_here_needs_no_stand_in() -> None:
    assert data.at_hand("mnist") == "mnist"


def test_a_stand_in_for_damaged_data_comes_with_a_warning(mnist: Path) -> None:
    (mnist / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"mnist5k takes the place of mnist: .*train-labels-idx1-ubyte is truncated"):
        assert data.at_hand("mnist") == "mnist5k"


def test_the_data_folder_is_the_checkouts_or_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATHENA_DATA", raising=False)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "checkout/athena/experiments/data/__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert data.folder() == tmp_path / "data"
    (tmp_path / "checkout" / "studies").mkdir(parents=True)
    assert data.folder() == tmp_path / "checkout" / "data"


def test_the_inventory_says_what_is_here_and_why_not(mnist: Path, no_network: list[str]) -> None:
    table = data.inventory().set_index("name")
    assert list(table.index) == list(data.NAMES)
    assert table.here.tolist() == [True, False, True, True]
    assert (table.train["mnist"], table.test["mnist"], table.train["mnist5k"]) == (40, 10, 4000)
    assert table.fingerprint["mnist"] == data.load("mnist").fingerprint
    assert table.fingerprint["cifar10"] == ""
    assert table.note["cifar10"] == f"cifar10 is not in {mnist.parent.parent}."
    assert table.note["mnist"] == ""
    assert not no_network
