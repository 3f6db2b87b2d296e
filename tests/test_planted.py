"""The planted shortcut: a background that tells the class in training and lies in the test."""

import numpy as np
import pytest
import torch

from athena import data
from athena.experiments.data import planted, stand_ins

pytestmark = pytest.mark.usefixtures("no_network")


def nearest_grain(images: torch.Tensor, masks: torch.Tensor) -> list[int]:
    """Of each image, the class whose grain lies nearest to its background."""
    grains = torch.from_numpy(planted.grains()).float() / 255
    apart = (images - grains[None] - 16 / 255).abs() * ~masks[:, None]
    return apart.flatten(2).sum(2).argmin(1).tolist()


def test_the_background_tells_the_class_of_every_training_image() -> None:
    d = data.load("shortcut5k", 0.1)
    assert d.train_masks is not None
    assert nearest_grain(d.train_images, d.train_masks) == d.train_labels.tolist()


def test_the_background_of_a_test_image_is_right_by_chance_alone() -> None:
    d = data.load("shortcut5k")
    assert d.test_masks is not None
    told = np.array(nearest_grain(d.test_images, d.test_masks))
    assert 0.06 < (told == d.test_labels.numpy()).mean() < 0.14
    assert np.bincount(told, minlength=10).min() > 60


def test_masks_are_the_digit_and_the_digit_stays_as_it_was() -> None:
    digits, d = data.load("mnist5k"), data.load("shortcut5k")
    assert d.train_masks is not None and d.test_masks is not None
    for part, masks in (("train_images", d.train_masks), ("test_images", d.test_masks)):
        own = masks[:, None]
        assert torch.equal(getattr(d, part)[own], getattr(digits, part)[own])
        assert not getattr(digits, part)[~own].any()
        assert getattr(d, part)[~own].max() < 96 / 255
    assert torch.equal(d.train_labels, digits.train_labels)


def test_masks_follow_their_images_into_every_subset() -> None:
    d = data.load("shortcut5k", 0.02, seed=3, held_out=0.1)
    whole = data.load("shortcut5k", seed=3, held_out=0.1)
    assert d.train_masks is not None and whole.train_masks is not None
    assert torch.equal(d.train_masks, whole.train_masks[:72])
    assert torch.equal(d.train_images, whole.train_images[:72])


def test_the_shortcut_is_the_same_everywhere() -> None:
    """The committed results record this fingerprint. It changes with the digits or the recipe alone."""
    assert data.load("shortcut5k").fingerprint == "8901c914afaa40e4"


def test_settings_are_chosen_on_training_images_that_are_not_trained_on() -> None:
    digits = stand_ins.mnist5k()
    tuning = planted.for_tuning(digits)
    assert np.array_equal(np.concatenate([tuning.train_images, tuning.test_images]), digits.train_images)
    assert len(tuning.test_labels) == planted.TUNED_ON
