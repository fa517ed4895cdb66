"""Fashion-MNIST's idx files, written here in their official layout."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from dra_ray import config, data
from dra_ray.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def written(folder: Path, ending: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 12), ("t10k", 5)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count).astype(np.uint8)
    for name, array in arrays.items():
        (folder / (name + ending)).write_bytes(gzip.compress(idx(array)) if ending else idx(array))
    return arrays


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_official_files_are_read(tmp_path, ending: str) -> None:
    arrays = written(tmp_path, ending)
    images = data.load(
        config.Data(name="fashion-mnist", uri=str(tmp_path), validation_images=4, test_images=3)
    )
    for split, part, rows in (
        (images.validation, "train", slice(4)),
        (images.train, "train", slice(4, None)),
        (images.test, "t10k", slice(3)),
    ):
        assert isinstance(split, data.Split)
        assert np.array_equal(split.images[:, 0].numpy(), arrays[f"{part}-images-idx3-ubyte"][rows])
        assert np.array_equal(split.labels.numpy(), arrays[f"{part}-labels-idx1-ubyte"][rows])


def test_files_that_are_not_whole_are_named(tmp_path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words) as caught:
            data.load(config.Data(name="fashion-mnist", uri=str(tmp_path), validation_images=4))
        assert "\n" not in str(caught.value)

    refused("has no train-images-idx3-ubyte or")
    for name, wrong, words in (
        (
            "train-images-idx3-ubyte",
            lambda whole: whole[:-1],
            "not an idx file of 3 dimensions, or not whole",
        ),
        ("train-images-idx3-ubyte", lambda whole: whole[:7], "truncated or damaged"),
        (
            "train-labels-idx1-ubyte",
            lambda whole: b"\0\0\x0d\1" + whole[4:],
            "not an idx file of 1 dimensions",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda whole: idx(np.zeros(11, np.uint8)),
            "12 train images, but 11 labels",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda whole: idx(np.full(12, 10, np.uint8)),
            "labels reach 10",
        ),
    ):
        written(tmp_path)
        (tmp_path / name).write_bytes(wrong((tmp_path / name).read_bytes()))
        refused(words)
    written(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(500))[:20])
    refused("truncated or damaged|not whole")
