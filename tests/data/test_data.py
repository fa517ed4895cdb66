"""Digits against scikit-learn's own reader; splits; synthetic shards; augmentation against a loop over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data import augment, digits, synthetic
from dra_ray.data.plan import generator
from dra_ray.errors import DataError
from dra_ray.storage import Store


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
    assert torch.equal(everything, torch.sort(digits.read()[0].flatten(1).float() @ torch.arange(1.0, 65)).values)


def test_a_split_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match="1797 images; lower one"):
        data.load(config.Data(validation_images=1000, test_images=1000))


def shards(store: Store, labels: list[int], shape: tuple[int, ...] = (8, 8, 1)) -> None:
    rng = np.random.default_rng(0)
    for index, part in enumerate(np.array_split(np.array(labels), 2)):
        image = rng.integers(0, 256, (len(part), *shape)).astype(np.uint8)
        (store / f"shard-{index:05d}.npz").write_npz(image=image, label=part.astype(np.int64))


def test_synthetic_shards_are_read_in_order(tmp_path) -> None:
    store, real = Store(str(tmp_path)), data.load(config.Data())
    shards(store, list(range(10)) * 3)
    split = synthetic.read(store, 20, real)
    assert split.images.shape == (20, 1, 8, 8)
    assert split.labels.tolist() == (list(range(10)) * 3)[:20]
    first = (store / "shard-00000.npz").read_npz()["image"]
    assert np.array_equal(split.images[3, 0].numpy(), first[3, :, :, 0])


@pytest.mark.parametrize(
    ("labels", "shape", "images", "words"),
    [
        ([0, 1], (8, 8, 1), 3, "holds 2"),
        ([0, 10], (8, 8, 1), 2, "labels reach 10"),
        ([0, 1], (16, 16, 1), 2, "do not fit 'digits'"),
        ([], (8, 8, 1), 1, "holds 0"),
    ],
)
def test_synthetic_sets_that_do_not_fit_are_refused(tmp_path, labels: list[int], shape: tuple[int, ...], images: int, words: str) -> None:
    store = Store(str(tmp_path))
    shards(store, labels, shape)
    with pytest.raises(DataError, match=words):
        synthetic.read(store, images, data.load(config.Data()))


def test_augmentation_equals_a_loop_over_images() -> None:
    settings = config.Data(crop_pad=2, flip=True)
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=generator(0))
    corners, flips = augment.parameters(32, settings, generator(1))
    fast = augment.augment(images, settings, generator(1))
    for index in range(32):
        padded = F.pad(images[index], (2, 2, 2, 2))
        row, column = corners[index].tolist()
        slow = padded[:, row : row + 8, column : column + 8]
        assert torch.equal(fast[index], slow.flip(2) if flips[index] else slow)


def test_a_slice_of_the_parameters_is_the_slice_of_the_batch() -> None:
    settings = config.Data(crop_pad=1)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator(0))
    corners, flips = augment.parameters(16, settings, generator(1))
    whole = augment.augment(images, settings, generator(1))
    assert torch.equal(whole[4:9], augment.apply(images[4:9], settings, corners[4:9], flips[4:9]))
