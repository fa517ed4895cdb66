import pytest
import torch

from dra_ray import data
from dra_ray.config import Data
from dra_ray.data import Split
from dra_ray.errors import DataError
from dra_ray.inspection import quality


def test_distances_are_those_of_cdist():
    draws = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(0, 256, (count, 3, 4, 4), generator=draws, dtype=torch.uint8)
        for count in (7, 45)
    )
    wanted = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).min(1).values / (
        48**0.5 * 255
    )
    assert torch.allclose(quality.nearest(a, b, batch=3).double(), wanted, atol=1e-7)
    assert quality.nearest(b[5:7], b, batch=2).tolist() == [0, 0]
    with pytest.raises(DataError, match=r"\[7, 3, 4, 4\]"):
        quality.nearest(a, b[:, :1])


def test_copies_are_noticed():
    images = data.load(Data())
    train, held_out = images.train.images, images.validation.images
    honest = quality.memorised(images.test.images, held_out, train)
    copied = quality.memorised(train[:100], held_out, train)
    assert honest["copies"] == 0
    assert honest["suspicious_share"] < 0.05
    assert honest["synthetic_median"] == pytest.approx(honest["held_out_median"], rel=0.1)
    assert copied["copies"] == 100
    assert copied["suspicious_share"] == 1


@pytest.mark.seconds
def test_a_set_with_wrong_labels_teaches_nothing():
    images = data.load(Data())
    wrong = Split(images.train.images, (images.train.labels + 3) % 10)
    right = quality.taught(images.train, images.test, images.shape, 40)
    assert right > 0.6 > 0.2 > quality.taught(wrong, images.test, images.shape, 40)
    assert right == quality.taught(images.train, images.test, images.shape, 40)
    with pytest.raises(DataError, match="0 images to train on"):
        quality.taught(images.train[:0], images.test, images.shape, 1)
