"""Digits against scikit-learn's own reader; splits; outlines; what a manifest records."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.data import digits
from dra_ray.errors import DataError


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = digits.read()
    reference = load_digits()
    assert np.array_equal(np.rint(images[:, 0].numpy() / 255 * 16), reference.images)
    assert np.array_equal(labels.numpy(), reference.target)


def test_splits_are_disjoint_and_fixed_by_their_seed() -> None:
    one, again, other = (data.load(config.Data(split_seed=seed)) for seed in (0, 0, 1))
    assert one.sha256 == again.sha256 != other.sha256
    assert (len(one.train), len(one.validation), len(one.test)) == (1241, 256, 300)
    rows = torch.cat([s.images.flatten(1) for s in (one.train, one.validation, one.test)])
    assert len(rows) == 1797
    everything = torch.sort(rows.float() @ torch.arange(1.0, 65)).values
    assert torch.equal(
        everything, torch.sort(digits.read()[0].flatten(1).float() @ torch.arange(1.0, 65)).values
    )


def test_a_split_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match="1797 images; lower one"):
        data.load(config.Data(validation_images=1000, test_images=1000))


def test_the_hash_is_of_pixels_and_labels() -> None:
    images = data.load(config.Data())
    digest = hashlib.sha256()
    for split in (images.train, images.validation, images.test):
        assert isinstance(split, data.Split)
        digest.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    assert images.facts()["sha256"] == digest.hexdigest()
    assert images.facts()["sha256_of"] == "pixels and labels"


@pytest.mark.parametrize(
    ("settings", "shape", "counts"),
    [
        (config.Data(name="cifar10"), (10, 3, 32), (48_976, 1024, 10_000)),
        (config.Data(name="cifar100", train_images=100), (100, 3, 32), (100, 1024, 10_000)),
        (config.Data(name="imagenet"), (1000, 3, 224), (1_280_143, 1024, 50_000)),
        (
            config.Data(name="imagenet", resolution=64, test_images=5000),
            (1000, 3, 64),
            (1_280_143, 1024, 5000),
        ),
        (config.Data(name="fashion-mnist", validation_images=0), (10, 1, 28), (60_000, 0, 10_000)),
    ],
)
def test_official_sets_are_outlined_without_files(settings, shape, counts) -> None:
    outline = data.outline(settings)
    assert (outline.shape.num_classes, outline.shape.channels, outline.shape.resolution) == shape
    assert (outline.train, outline.validation, outline.test) == counts


@pytest.mark.parametrize("settings", [config.Data(), config.Data(train_images=50, test_images=20)])
def test_an_outline_is_what_is_loaded(settings) -> None:
    images, outline = data.load(settings), data.outline(settings)
    assert (outline.train, outline.validation, outline.test) == (
        len(images.train),
        len(images.validation),
        len(images.test),
    )
    assert outline.shape == images.shape


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python"),
        ("imagenet", "ILSVRC2012"),
        ("folder", "train/<class>/"),
    ],
)
def test_a_set_without_files_says_what_to_give(name: str, words: str) -> None:
    with pytest.raises(DataError, match=f"data.uri is not set.*{words}") as caught:
        data.load(config.Data(name=name, resolution=8))
    assert "\n" not in str(caught.value)
