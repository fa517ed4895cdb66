"""Backgrounds are painted behind objects, and only there."""

import pytest
import torch

from dra_ray import config, data
from dra_ray.data import backgrounds
from dra_ray.data.pictures import Split
from dra_ray.errors import DataError


def test_objects_stay_and_the_background_tells_the_class_or_nothing() -> None:
    plain, by_class, at_random = (
        data.load(config.Data(background=kind)) for kind in ("none", "class", "random")
    )
    known = backgrounds.textures(10, (1, 8, 8))
    for part in ("train", "validation", "test"):
        was, told, drawn = (
            data.in_memory(getattr(images, part)) for images in (plain, by_class, at_random)
        )
        behind = was.images == 0
        assert torch.equal(told.images[~behind], was.images[~behind])
        assert torch.equal(drawn.images[~behind], was.images[~behind])
        assert torch.equal(told.images, torch.where(behind, known[was.labels], was.images))
        assert torch.equal(told.labels, was.labels)
        assert torch.equal(drawn.labels, was.labels)
        # which texture an image has says nothing about its class
        match = (drawn.images == told.images).flatten(1).all(1).float().mean()
        assert 0.02 < match < 0.25
    again = data.load(config.Data(background="random"))
    assert again.sha256 == at_random.sha256 != plain.sha256


def test_textures_differ_and_are_neither_black_nor_white() -> None:
    known = backgrounds.textures(10, (3, 32, 32)).float()
    apart = (known[:, None] - known[None]).abs().flatten(2).mean(2)
    assert float((apart + 100 * torch.eye(10)).min()) > 10
    assert 16 <= float(known.min()) <= float(known.max()) <= 160


def test_fewer_images_have_the_same_backgrounds() -> None:
    whole, few = (
        data.load(config.Data(background="random", train_images=count)) for count in (None, 20)
    )
    ours, theirs = data.in_memory(whole.train), data.in_memory(few.train)
    assert torch.equal(ours.images[:20], theirs.images)


def test_natural_images_are_refused() -> None:
    bright = Split(torch.full((5, 3, 8, 8), 90, dtype=torch.uint8), torch.arange(5))
    with pytest.raises(DataError, match="data.background=class paints where pixels are 0"):
        backgrounds.painted(bright, "class", 10, 0)


def test_runs_of_other_days_keep_their_digest() -> None:
    assert config.Data().digest() == config.Data(background="none").digest()
    assert config.Data().digest() != config.Data(background="class").digest()
    assert "background" not in config.Data()._without_added()
