"""Synthetic sets: which images are taken, in memory or from the disk, and which sets are
refused.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.data import OnDisk, Split, in_memory, synthetic
from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Store


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load(config.Data())


def pixels(count: int, shape: tuple[int, ...] = (8, 8, 1), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def shards(store: Store, labels: list[int], shape: tuple[int, ...] = (8, 8, 1)) -> None:
    for index, part in enumerate(np.array_split(np.array(labels), 2)):
        (store / f"shard-{index:05d}.npz").write_npz(
            image=pixels(len(part), shape, index), label=part.astype(np.int64)
        )


def on_disk(
    uri: Store, count: int, of: int, positions: range | torch.Tensor, like: data.Images
) -> OnDisk:
    """What `read` makes of a large set: the records of the same files, not held in memory."""
    parts = [synthetic._part(uri / name, False, like) for name in uri.names()]
    records = synthetic.Arrays([part.name for part in parts], [part.images for part in parts])
    found = OnDisk(
        records,
        torch.cat([part.labels for part in parts])[
            positions if isinstance(positions, torch.Tensor) else slice(None)
        ],
        positions,
    )
    assert (len(found), sum(len(part.labels) for part in parts)) == (count, of)
    return found


def test_the_first_images_of_mixed_shards_are_taken(tmp_path, digits) -> None:
    store = Store(str(tmp_path))
    shards(store, list(range(10)) * 3)
    split = synthetic.read(store, 20, digits)
    assert isinstance(split, Split)
    assert split.images.shape == (20, 1, 8, 8)
    assert split.labels.tolist() == (list(range(10)) * 3)[:20]
    first = (store / "shard-00000.npz").read_npz()["image"]
    assert np.array_equal(split.images[3, 0].numpy(), first[3, :, :, 0])


@pytest.mark.parametrize("name", ["", "set.npz"])
def test_of_a_set_in_class_order_every_class_is_taken(tmp_path, digits, name: str) -> None:
    """DM-AT's files: one npz sorted by class, or several."""
    labels = [label for label in range(10) for _ in range(6)]
    store = Store(str(tmp_path)) / name if name else Store(str(tmp_path))
    if name:
        store.write_npz(image=pixels(60), label=np.array(labels))
        whole = pixels(60)
    else:
        shards(store, labels)
        whole = np.concatenate([pixels(30, seed=0), pixels(30, seed=1)])
    split = in_memory(synthetic.read(store, 20, digits))
    assert split.labels.bincount().tolist() == [2] * 10
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), whole[np.arange(20) * 3])
    assert np.array_equal(
        in_memory(synthetic.read(store, 60, digits)).images.permute(0, 2, 3, 1).numpy(), whole
    )


@pytest.mark.parametrize("positions", [range(40), torch.tensor([39, 0, 19, 20, 20])])
def test_a_set_on_disk_gives_what_memory_gives(tmp_path, digits, positions) -> None:
    store = Store(str(tmp_path))
    shards(store, [label % 10 for label in range(40)])
    whole = synthetic.read(store, 40, digits)
    lazy = on_disk(store, len(positions), 40, positions, digits)
    wanted = whole[torch.as_tensor(positions)]
    for index in (
        torch.arange(len(lazy)),
        torch.tensor([3, 1, 1]),
        torch.tensor([], dtype=torch.int64),
    ):
        for one, other in zip(lazy.take(index), wanted.take(index), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    for index in (slice(1, 4), slice(None, None, 2), torch.tensor([2, 0])):
        assert torch.equal(in_memory(lazy[index]).images, wanted[index].images)
        assert torch.equal(in_memory(lazy[index][:1]).images, wanted[index][:1].images)
        assert torch.equal(lazy[index].labels, wanted[index].labels)
    sent = pickle.loads(pickle.dumps(lazy))
    assert torch.equal(in_memory(sent).images, wanted.images)


def test_compressed_sets_are_read_too(tmp_path, digits) -> None:
    np.savez_compressed(
        tmp_path / "set.npz", image=pixels(20), label=np.arange(20, dtype=np.int32) % 10
    )
    split = in_memory(synthetic.read(Store(str(tmp_path / "set.npz")), 20, digits))
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels(20))
    assert split.labels.dtype == torch.int64


@pytest.mark.parametrize("whole", [True, False])
def test_a_remote_set_is_the_local_one(tmp_path, monkeypatch, digits, whole: bool) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    remote = Store(f"memory://{tmp_path.name}-{whole}")
    shards(remote, list(range(10)) * 2)
    shards(Store(str(tmp_path / "local")), list(range(10)) * 2)
    part = synthetic._part(remote / "shard-00001.npz", whole, digits)
    local = synthetic._part(Store(str(tmp_path / "local" / "shard-00001.npz")), True, digits)
    assert torch.equal(part.labels, local.labels)
    assert torch.equal(
        synthetic.Arrays([""], [part.images]).read([3, 9]),
        synthetic.Arrays([""], [local.images]).read([3, 9]),
    )
    assert (tmp_path / "cache").exists() != whole


def test_reading_a_set_on_disk_does_not_grow_the_process(tmp_path, digits) -> None:
    count = 400_000  # 26 MB of images
    np.savez(
        tmp_path / "a.npz", image=np.zeros((count, 8, 8, 1), np.uint8), label=np.arange(count) % 10
    )
    lazy = on_disk(Store(str(tmp_path)), count, count, range(count), digits)

    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    lazy.take(torch.arange(100))
    before = resident_bytes()
    for start in range(0, count, 20_000):
        lazy.take(torch.arange(start, start + 20_000))
    assert resident_bytes() - before < 10e6


@pytest.mark.parametrize(
    ("labels", "shape", "images", "words"),
    [
        ([0, 1], (8, 8, 1), 3, "holds 2"),
        ([0, 10], (8, 8, 1), 2, "labels reach 10"),
        ([0, -1], (8, 8, 1), 2, "labels reach -1"),
        ([0, 1], (16, 16, 1), 2, "do not fit 'digits'"),
        ([], (8, 8, 1), 1, "holds 0"),
    ],
)
def test_sets_that_do_not_fit_are_refused(
    tmp_path, digits, labels: list[int], shape: tuple[int, ...], images: int, words: str
) -> None:
    store = Store(str(tmp_path))
    shards(store, labels, shape)
    with pytest.raises(DataError, match=words):
        synthetic.read(store, images, digits)


def test_wrong_files_are_refused(tmp_path, digits) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match=r"holds no index.json and no .npz files"):
        synthetic.read(store, 1, digits)
    with pytest.raises(StorageError, match="does not exist"):
        synthetic.read(store / "none.npz", 1, digits)
    (store / "a.npz").write_npz(image=pixels(2))
    with pytest.raises(DataError, match=r"has keys \['image'\]"):
        synthetic.read(store, 1, digits)
    for label in (np.array([1, 2, 3]), np.array([[1], [2]]), np.array(1), np.array([0.5, 1.0])):
        (store / "a.npz").write_npz(image=pixels(2), label=label)
        with pytest.raises(DataError, match="labels"):
            synthetic.read(store, 1, digits)
    for image in (pixels(2).astype(np.float32), pixels(2).reshape(2, 64)):
        (store / "a.npz").write_npz(image=image, label=np.array([1, 2]))
        with pytest.raises(DataError, match="do not fit 'digits'"):
            synthetic.read(store, 1, digits)


def test_damaged_files_are_named(tmp_path, digits) -> None:
    np.savez(buffer := io.BytesIO(), image=pixels(100), label=np.arange(100) % 10)
    whole = buffer.getvalue()
    for damaged in (
        whole[:-30],
        whole[: len(whole) // 2],
        b"",
        b"PK" + bytes(50),
        whole.replace(b"(100, 8, 8, 1)", b"(900, 8, 8, 1)"),
    ):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.npz"):
            synthetic.read(Store(str(tmp_path)), 100, digits)


# -- which images of a set are taken ---------------------------------------------------------------
def in_files(store: Store, *files: list[int]) -> None:
    for index, labels in enumerate(files):
        (store / f"part-{index}.npz").write_npz(
            image=pixels(len(labels), seed=index), label=np.array(labels, np.int64)
        )


ALTERNATING = [label % 10 for label in range(200)]
SORTED = sorted(ALTERNATING)
SHUFFLED = np.random.default_rng(0).permutation(SORTED).tolist()


@pytest.mark.parametrize(
    "files",
    [
        ([0], SORTED),
        ([3], [7], SORTED),
        (SHUFFLED[:20], SORTED),
        (SORTED[:20], SHUFFLED),
        (SORTED, SHUFFLED),
        (SHUFFLED, SORTED),
        (ALTERNATING, SORTED),
        (SORTED[:100], SORTED[100:]),
        ([0] * 30, ALTERNATING),
        ([0] * 30, [0], ALTERNATING),
        tuple([label] * 20 for label in range(10)),
        tuple([label] for label in SORTED[::5]),
        ([], SORTED),
    ],
)
@pytest.mark.parametrize("images", [20, 50, 150])
def test_no_class_is_lost_whatever_the_first_file_holds(
    tmp_path, digits, files: tuple[list[int], ...], images: int
) -> None:
    store = Store(str(tmp_path))
    in_files(store, *files)
    everything = torch.tensor([label for labels in files for label in labels])
    images = min(images, len(everything))
    counts = synthetic.read(store, images, digits).labels.bincount(minlength=10)
    expected = everything.bincount(minlength=10).double() * images / len(everything)
    assert int(counts.sum()) == images
    assert bool(((counts - expected).abs() <= 6 * (expected + 1).sqrt()).all())
    if images >= 50:
        assert int(counts.min()) > 0


def test_shares_are_kept_where_even_spacing_meets_one_class_only() -> None:
    """Every tenth image of a set that alternates between ten classes is of the same class."""
    labels = torch.tensor(SORTED[:40] * 10 + ALTERNATING)
    for images in (60, 100, 37):
        chosen = labels[synthetic.choose(labels, images)]
        expected = labels.bincount().double() * images / len(labels)
        assert bool(
            ((chosen.bincount(minlength=10) - expected).abs() <= 6 * (expected + 1).sqrt()).all()
        )
    assert synthetic._within_classes(labels, 60).unique().numel() == 60
    assert torch.equal(synthetic._within_classes(labels, len(labels)), torch.arange(len(labels)))


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_first_images_of_a_shuffled_set_are_taken(classes: int) -> None:
    for seed in range(20):
        labels = torch.randint(classes, (5000,), generator=torch.Generator().manual_seed(seed))
        for images in (1, 10, 500, 4999):
            assert synthetic.choose(labels, images) == slice(images)
        in_order = labels.sort().values
        for images in (50, 500, 4999):
            assert torch.equal(
                in_order[synthetic.choose(in_order, images)],
                in_order[torch.arange(images) * 5000 // images],
            )


def test_what_macos_adds_is_no_shard(tmp_path, digits) -> None:
    store = Store(str(tmp_path))
    in_files(store, ALTERNATING)
    before = synthetic.read(store, 40, digits)
    (store / "._part-0.npz").write_bytes(b"\0\5\x16\7")
    with zipfile.ZipFile(tmp_path / "part-0.npz", "a") as archive:
        archive.writestr("__MACOSX/._image.npy", b"\0\5\x16\7")
    assert torch.equal(
        in_memory(synthetic.read(store, 40, digits)).images, in_memory(before).images
    )
