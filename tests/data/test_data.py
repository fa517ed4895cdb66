"""Digits against scikit-learn's own reader; splits; outlines; what a manifest records."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import JsonValue

from dra_ray import config, data, runs
from dra_ray.config.data_sets import DATA_SETS
from dra_ray.data import digits
from dra_ray.errors import DataError
from dra_ray.storage import Store


def all_digits() -> data.Split:
    everything = digits.read(config.Data()).train
    assert isinstance(everything, data.Split)
    return everything


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    everything, reference = all_digits(), load_digits()
    assert np.array_equal(np.rint(everything.images[:, 0].numpy() / 255 * 16), reference.images)
    assert np.array_equal(everything.labels.numpy(), reference.target)


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_has_a_reader(name: str) -> None:
    module = importlib.import_module(f"dra_ray.data.{DATA_SETS[name].reader}")
    assert callable(module.read)


def test_splits_are_disjoint_and_fixed_by_their_seed() -> None:
    one, again, other = (data.load(config.Data(split_seed=seed)) for seed in (0, 0, 1))
    assert one.sha256 == again.sha256 != other.sha256
    assert (len(one.train), len(one.validation), len(one.test)) == (1241, 256, 300)
    rows = torch.cat([s.images.flatten(1) for s in (one.train, one.validation, one.test)])
    assert len(rows) == 1797
    weights = torch.arange(1.0, 65)
    everything = all_digits().images.flatten(1).float()
    assert torch.equal(
        torch.sort(rows.float() @ weights).values, torch.sort(everything @ weights).values
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


# -- a run goes on with its own data ---------------------------------------------------------------
def test_a_run_goes_on_with_its_own_data_only(tmp_path) -> None:
    run, images = Store(str(tmp_path / "run")), data.load(config.Data())

    def begin(facts: dict[str, JsonValue]) -> None:
        runs.begin_run(run, "train", {}, "digest", runs.Facts(data=facts))

    begin(images.facts())
    begin(data.load(config.Data()).facts())
    fewer = dataclasses.replace(images, train=images.train[:1200])
    other = dataclasses.replace(
        images, test=data.Split(255 - images.test.images, images.test.labels)
    )
    labels = dataclasses.replace(
        images, train=data.Split(images.train.images, images.train.labels.flip(0))
    )
    for changed, words in (
        (fewer, "train is 1241 there and 1200 now"),
        (other, "the pixels and labels of test are others"),
        (labels, "the pixels and labels of train are others"),
        (
            dataclasses.replace(images, shape=dataclasses.replace(images.shape, num_classes=11)),
            "num_classes is 10 there and 11 now",
        ),
    ):
        with pytest.raises(
            DataError, match=rf"run '.*run' was begun on other data \({words}\); restore the files"
        ) as caught:
            begin(changed.facts())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lacking",
    [("data",), ("data", "parts"), ("data", "sha256"), ("data", "sha256_of"), ("synthetic",)],
)
def test_manifests_without_a_fact_still_open(tmp_path, lacking: tuple[str, ...]) -> None:
    """Runs of before the facts were recorded, or recorded in another way."""
    run, images = Store(str(tmp_path / "run")), data.load(config.Data())
    facts = runs.Facts(data=images.facts(), synthetic=data.picture_facts(images.train))
    runs.begin_run(run, "train", {}, "digest", facts)
    manifest = (run / runs.MANIFEST).read_json()
    holder = manifest if len(lacking) == 1 else manifest[lacking[0]]
    del holder[lacking[-1]]
    (run / "manifest.json").write_json(manifest)
    assert runs.begin_run(run, "train", {}, "digest", facts).name == "run"


def test_a_run_goes_on_with_its_own_synthetic_images_only(tmp_path) -> None:
    run, images = Store(str(tmp_path / "run")), data.load(config.Data())
    facts = runs.Facts(synthetic=data.picture_facts(images.train))
    runs.begin_run(run, "train", {}, "digest", facts)
    for changed, words in (
        (images.train[:10], "images is 1241 there and 10 now"),
        (images.train[torch.arange(1240, -1, -1)], "are others"),
    ):
        facts = runs.Facts(synthetic=data.picture_facts(changed))
        with pytest.raises(DataError, match=f"was begun on other synthetic images .*{words}"):
            runs.begin_run(run, "train", {}, "digest", facts)


def test_files_that_are_gone_are_noticed(tmp_path) -> None:
    for part, count in (("train", 6), ("val", 3)):
        for label in ("a", "b"):
            (tmp_path / "set" / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (9, 9), number).save(
                    tmp_path / "set" / part / label / f"{number}.png"
                )
    settings = config.Data(
        name="folder", uri=str(tmp_path / "set"), resolution=8, validation_images=2
    )
    run = Store(str(tmp_path / "run"))
    runs.begin_run(run, "train", {}, "digest", runs.Facts(data=data.load(settings).facts()))
    file = tmp_path / "set" / "train" / "b" / "3.png"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match="train is 10 there and 9 now"):
        runs.begin_run(run, "train", {}, "digest", runs.Facts(data=data.load(settings).facts()))
    file.write_bytes(content + b"\0")
    with pytest.raises(
        DataError, match="the file names, file sizes and labels of train and validation are others"
    ):
        runs.begin_run(run, "train", {}, "digest", runs.Facts(data=data.load(settings).facts()))
    file.write_bytes(content)
    runs.begin_run(run, "train", {}, "digest", runs.Facts(data=data.load(settings).facts()))


# -- fewer pixels ----------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [4, 3, 5, 7])
def test_images_are_reduced_to_means_over_areas(side: int) -> None:
    """Where sides do not divide, pixels on the edge of an area count in part: in numpy, cut every
    pixel into side x side equal ones.
    """
    whole, small = (data.load(config.Data(resolution=pixels)) for pixels in (8, side))
    for part in ("train", "validation", "test"):
        images = getattr(whole, part).images.double().numpy()
        cut = images.repeat(side, 2).repeat(side, 3)
        means = cut.reshape(len(images), 1, side, 8, side, 8).mean((3, 5))
        assert np.array_equal(getattr(small, part).images.numpy(), np.rint(means))
        assert torch.equal(getattr(small, part).labels, getattr(whole, part).labels)
    assert small.resolution == data.outline(config.Data(resolution=side)).shape.resolution == side
    assert small.sha256 != whole.sha256 == data.load(config.Data()).sha256


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion-mnist"])
def test_they_are_not_enlarged(name: str) -> None:
    with pytest.raises(DataError, match="data.resolution=64.*are only ever reduced; lower it"):
        data.outline(config.Data(name=name, resolution=64))


def test_digits_are_read_from_nowhere_else() -> None:
    with pytest.raises(DataError, match="data.uri='/mine'.*leave data.uri out"):
        data.load(config.Data(uri="/mine"))
