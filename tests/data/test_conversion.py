"""Sets of others as rows: every image once, whatever its form and place, in an order in which every
shard is a sample of all.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dra_ray import config
from dra_ray.data import checking, conversion, folders, rows
from dra_ray.data.conversion import Order
from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Store, combined
from dra_ray.workloads import convert

COUNT = 503


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Images that say their number, in the order of their classes."""
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (COUNT, 4, 4, 3)).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(COUNT) % 256, np.arange(COUNT) // 256
    return images, np.sort(drawn.integers(0, 5, COUNT))


def npz(file: Store, compressed: bool, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    file.write_bytes(buffer.getvalue())


def converted(settings: config.Conversion, to: Store) -> tuple[np.ndarray, np.ndarray]:
    """What a conversion without Ray writes, in its order."""
    source = conversion.open_source(settings, to / conversion.STAGED)
    source = pickle.loads(pickle.dumps(source))
    order = convert.order_of(settings, source)
    made = [convert._make(to.uri, source, order, index, False) for index in range(order.shards)]
    counts = convert._counts(made)
    assert source.problem(np.concatenate([each.checks for each in made]), counts) is None
    index = rows.write_index(to, [each.shard for each in made], source.shape, counts, {})
    checking.check(to)
    pictures = rows.RowSet(to, index, index.images)
    images, labels = pictures.take(torch.arange(len(pictures)))
    return images.permute(0, 2, 3, 1).numpy(), labels.numpy()


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("remote", [False, True], ids=["disk", "elsewhere"])
@pytest.mark.parametrize("files", [1, 3])
def test_npz_files_are_all_there_once(tmp_path, monkeypatch, compressed, remote, files) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    images, labels = arrays()
    where = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    source = Store(f"{where}/source")
    for number, part in enumerate(np.array_split(np.arange(COUNT), files)):
        parts = {"image": images[part], "label": labels[part], "more": part}
        npz(source / f"part-{number}.npz", compressed, **parts)
    one = source if files > 1 else source / "part-0.npz"
    settings = config.Conversion(source=one.uri, shard_images=90)
    found, classes = converted(settings, Store(f"{where}/rows"))
    numbers = found[:, 0, 0, 0].astype(int) + 256 * found[:, 0, 0, 1].astype(int)
    assert np.array_equal(np.sort(numbers), np.arange(COUNT))
    assert np.array_equal(found, images[numbers])
    assert np.array_equal(classes, labels[numbers])
    copies = Store(str(tmp_path / "cache")).files()
    assert not [name for name in copies if "part-" in name], "no part is copied whole"
    assert len(np.unique(classes[:50])) == 5, "the first images have every class"


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_images_in_files_are_decoded(tmp_path, form: str) -> None:
    import tarfile

    drawn = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3)).astype(np.uint8)
    names = []
    for number, pixels in enumerate(drawn):
        part = "val" if number >= 20 else "train"
        folder = tmp_path / "all" / part / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        names.append((part, folder / f"{number:02d}.png", number % 2))
    if form == "tar":
        (tmp_path / "tar").mkdir()
        for part in ("train", "val"):
            with tarfile.open(tmp_path / "tar" / f"x-{part}-0.tar", "w") as archive:
                for own, file, label in names:
                    if own == part:
                        archive.add(file, f"{file.stem}.png")
                        text = tarfile.TarInfo(f"{file.stem}.cls")
                        text.size = 1
                        archive.addfile(text, io.BytesIO(str(label).encode()))
    source = tmp_path / ("tar" if form == "tar" else "all")
    settings = config.Conversion(source=str(source), resolution=6, shard_images=7)
    found, labels = converted(settings, Store(str(tmp_path / "rows")))
    as_data = config.Data(name="folder", uri=str(source), resolution=6)
    images, classes = folders.read(as_data).train.take(torch.arange(20))
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    by_bytes = {one.tobytes(): label for one, label in zip(pixels, classes.tolist(), strict=True)}
    assert sorted(one.tobytes() for one in found) == sorted(by_bytes)
    assert [by_bytes[one.tobytes()] for one in found] == labels.tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": None}, r"has keys \['image'\]; expected 'image' and 'label'"),
        ({"image": np.zeros((4, 4, 4, 3), np.float32)}, "are no images uint8"),
        ({"image": np.zeros((4, 48), np.uint8)}, "are no images uint8"),
        ({"label": np.zeros(3, np.int64)}, "are no images uint8"),
        ({"label": np.zeros(4)}, "are no images uint8"),
        ({"label": np.array([0, 1, -1, 0])}, "has the label -1; classes are numbered from 0 on"),
        ({"label": np.array([0, 1, 10**6, 0])}, "has the label 1000000"),
    ],
)
def test_wrong_sources_are_named(tmp_path, changes, words: str) -> None:
    good = {"image": np.zeros((4, 4, 4, 3), np.uint8), "label": np.array([0, 1, 2, 0])}
    parts = {name: array for name, array in (good | changes).items() if array is not None}
    npz(Store(str(tmp_path / "a.npz")), False, **parts)
    with pytest.raises(DataError, match=words):
        converted(config.Conversion(source=str(tmp_path / "a.npz")), Store(str(tmp_path / "to")))


def test_what_is_no_set_is_said(tmp_path) -> None:
    for name in ("empty", "none"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=f"{name}' is no folder, or it is empty"):
            conversion.check(config.Conversion(source=str(tmp_path / name)))
    with pytest.raises(StorageError, match="none.npz' does not exist"):
        conversion.check(config.Conversion(source=str(tmp_path / "none.npz")))
    (tmp_path / "empty" / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no \.npz files; .*say --resolution"):
        converted(config.Conversion(source=str(tmp_path / "empty")), Store(str(tmp_path / "to")))
    for number, size in enumerate((4, 5)):
        pixels = np.zeros((2, size, size, 3), np.uint8)
        npz(Store(str(tmp_path / f"{number}.npz")), False, image=pixels, label=np.zeros(2, int))
    with pytest.raises(DataError, match=r"images \[4, 4, 3\] and .* \[5, 5, 3\]"):
        converted(config.Conversion(source=str(tmp_path)), Store(str(tmp_path / "to")))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("field", ["image", "label"])
def test_one_wrong_bit_is_noticed(tmp_path, files: int, field: str) -> None:
    """By the CRC-32 that the archive has of the whole array, though no task sees the whole."""
    images, labels = arrays()
    for number, part in enumerate(np.array_split(np.arange(COUNT), files)):
        npz(Store(str(tmp_path / f"{number}.npz")), False, image=images[part], label=labels[part])
    to = Store(str(tmp_path / "to"))
    settings = config.Conversion(source=str(tmp_path), shard_images=90)
    source = conversion.open_source(settings, to)
    order = convert.order_of(settings, source)

    def checks() -> tuple[np.ndarray, np.ndarray]:
        made = [convert._make(to.uri, source, order, index, False) for index in range(order.shards)]
        return np.concatenate([each.checks for each in made]), convert._counts(made)

    assert source.problem(*checks()) is None
    whole, counts = checks()
    assert "are missing or there twice" in str(source.problem(whole[1:], counts))
    file = to / "shard-00002.npy"
    written = file.read_npy().copy()
    written[field][7] ^= 1
    file.write_npy(written)
    assert f"has another CRC-32 of its {field}s" in str(source.problem(*checks()))


@dataclasses.dataclass
class Flaky:
    """A source of which every other read has a wrong pixel, another one each time."""

    inner: conversion.Source
    reads: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.inner.shape

    def read(self, runs: list[range]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.inner.read(runs)
        self.reads += 1
        if self.reads % 2:
            images[self.reads % len(images), 1, 1, 1] ^= 1
        return images, labels

    def checksums(self, *written: Any) -> np.ndarray:
        return self.inner.checksums(*written)


def test_what_came_wrong_is_read_until_two_reads_agree(tmp_path) -> None:
    images, labels = arrays()
    npz(Store(str(tmp_path / "a.npz")), False, image=images, label=labels)
    to, settings = Store(str(tmp_path / "to")), config.Conversion(source=str(tmp_path / "a.npz"))
    source = conversion.open_source(settings, to)
    order = convert.order_of(settings, source)
    flaky: Any = Flaky(source)

    def problem(again: bool) -> str | None:
        made = convert._make(to.uri, flaky, order, 0, again)
        return source.problem(made.checks, made.counts)

    assert "another CRC-32 of its images" in str(problem(again=False))
    assert problem(again=True) is None
    assert flaky.reads == 4, "neither the first nor the third is another's"
    before = (to / "shard-00000.npy").read_bytes()
    assert problem(again=True) is None
    assert (to / "shard-00000.npy").read_bytes() == before


@pytest.mark.parametrize("case", range(20))
def test_checksums_of_parts_are_that_of_the_whole(case: int) -> None:
    """Against zlib."""
    drawn = np.random.default_rng(case)
    whole = drawn.integers(0, 256, int(drawn.integers(0, 5000))).astype(np.uint8).tobytes()
    cuts = np.sort(drawn.integers(0, len(whole) + 1, int(drawn.integers(0, 30))))
    ends = [0, *cuts.tolist(), len(whole)]
    parts = [whole[begin:end] for begin, end in itertools.pairwise(ends)]
    crcs = np.array([zlib.crc32(part) for part in parts], np.uint32)
    assert combined(crcs, np.array([len(part) for part in parts])) == zlib.crc32(whole)


# -- the order -------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(30))
def test_every_image_is_in_one_shard(case: int) -> None:
    drawn = np.random.default_rng(case)
    images, shard_images, block = (int(drawn.integers(1, most)) for most in (3000, 400, 20))
    order = Order(images, shard_images, block, seed=case)
    shards = [
        np.concatenate([np.arange(run.start, run.stop) for run in order.blocks(shard)])
        for shard in range(order.shards)
    ]
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(images))
    assert max(map(len, shards)) - min(map(len, shards)) <= 2 * block
    for shard, positions in enumerate(shards):
        assert np.array_equal(np.sort(order.shuffled(shard, len(positions))), range(len(positions)))


def test_of_a_source_in_class_order_every_beginning_is_a_sample() -> None:
    """Of 200,000 images in ten classes of their own sizes: no beginning has other shares than
    chance gives, at four deviations.
    """
    sizes = np.random.default_rng(3).integers(10_000, 30_000, 10)
    labels = np.repeat(np.arange(10), sizes)
    order = Order(len(labels), 4000, 16, seed=1)
    written = []
    for shard in range(order.shards):
        positions = np.concatenate([np.arange(run.start, run.stop) for run in order.blocks(shard)])
        written.append(labels[positions][order.shuffled(shard, len(positions))])
    found, shares = np.concatenate(written), sizes / sizes.sum()
    for count in (500, 1000, 3000, 10_000, 50_000, 100_001):
        counts = np.bincount(found[:count], minlength=10)
        assert (np.abs(counts - count * shares) < 4 * np.sqrt(count * shares)).all(), count


def test_the_seed_decides_the_order() -> None:
    one, same, other = (Order(5000, 500, 16, seed) for seed in (0, 0, 1))
    assert one.blocks(3) == same.blocks(3) != other.blocks(3)
    assert not np.array_equal(one.shuffled(3, 50), other.shuffled(3, 50))
    assert not np.array_equal(one.shuffled(3, 50), one.shuffled(4, 50))
