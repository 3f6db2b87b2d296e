"""What `athena.data` promises. Needs neither data set nor network: files are tiny fakes, or come with packages."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athena import data
from athena.experiments.data import stand_ins
from athena.experiments.data.loading import _cached
from athena.experiments.data.record import UInt8

pytestmark = pytest.mark.usefixtures("no_network")


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
    with pytest.raises(ValueError, match=f"'minst'; there are {', '.join(data.NAMES)}"):
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
    _cached.cache_clear()
    stand_ins.mnist5k.cache_clear()
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
    assert np.array_equal(stand_ins.blend(patches, digits), expected)


def test_mnistm5k_shows_the_photographs_where_the_digit_is_black() -> None:
    rows = {row.tobytes() for photograph in stand_ins.photographs() for row in rows_of_32(photograph)}
    for name in ("train_images", "test_images"):
        images = getattr(data.load("mnistm5k"), name)[:50]
        first_rows = (images[:, :, 0] * 255).round().to(torch.uint8).numpy()  # padding: black in every digit
        assert all(row.tobytes() in rows for row in first_rows)


def test_mnistm5k_holds_the_digits_of_mnist5k() -> None:
    blended, digits = data.load("mnistm5k"), data.load("mnist5k")
    assert torch.equal(blended.test_labels, digits.test_labels)
    assert torch.equal(blended.train_labels, digits.train_labels)


def rows_of_32(photograph: UInt8) -> UInt8:
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
    patches = stand_ins.patches([left], 50, np.random.RandomState(0))
    assert patches.max() < 75 <= right.min()
    assert patches.shape == (50, 3, 32, 32)


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "PHOTOGRAPHS", ("chelsea.png", "nowhere.png"))
    with pytest.raises(data.MissingData, match=r"nowhere\.png"):
        stand_ins.photographs()


# Fingerprints


@pytest.mark.usefixtures("mnist")
def test_the_fingerprint_is_of_the_whole_data_set_whatever_part_is_loaded() -> None:
    prints = {data.load("mnist", f, s, h).fingerprint for f in (1.0, 0.1) for s in (0, 1) for h in (0.0, 0.2)}
    assert len(prints) == 1
    assert len(prints.pop()) == 16


@pytest.mark.parametrize("field", ["train_images", "train_labels", "test_images", "test_labels"])
def test_the_fingerprint_changes_with_one_value(field: str) -> None:
    def whole(value: int) -> data.Arrays:
        arrays = {
            "train_images": np.zeros((4, 1, 32, 32), np.uint8),
            "train_labels": np.zeros(4, np.uint8),
            "test_images": np.zeros((2, 1, 32, 32), np.uint8),
            "test_labels": np.zeros(2, np.uint8),
        }
        arrays[field].flat[-1] = value
        return data.Arrays(**arrays, source="made up")  # type: ignore[arg-type]

    assert whole(0).fingerprint == whole(0).fingerprint != whole(1).fingerprint


def test_the_fingerprint_knows_the_shape() -> None:
    labels = np.zeros(1, np.uint8)
    tall, wide = np.zeros((1, 1, 64, 16), np.uint8), np.zeros((1, 1, 16, 64), np.uint8)
    one, other = (data.Arrays(images, labels, images, labels, source="made up") for images in (tall, wide))
    assert one.fingerprint != other.fingerprint


def test_the_stand_ins_are_the_same_everywhere() -> None:
    """The committed results record these. They change with the digits, the photographs or the recipe alone."""
    assert data.load("mnist5k").fingerprint == "95518a81c1f0956a"
    assert data.load("mnistm5k").fingerprint == "2cc5bf312bae4560"
