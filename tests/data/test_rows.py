"""Sets in rows: what was written is what is read, wherever it lies; what is wrong is named."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dra_ray import config, data
from dra_ray.data import checking, export, in_memory, rows, synthetic
from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Store

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load(config.Data())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))


def pixels(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose first two pixels number them, and labels."""
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(count) % 256, np.arange(count) // 256
    return images, drawn.integers(0, 10, count)


def written(store: Store, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = pixels(sum(sizes))
    shards, begin = [], 0
    for number, size in enumerate(sizes):
        part = slice(begin, begin + size)
        file = store / rows.shard_name(number)
        digest = file.write_npy(rows.records(images[part], labels[part]))
        shards.append(rows.Shard(name=file.name, images=size, sha256=digest))
        begin += size
    rows.write_index(store, shards, SHAPE, np.bincount(labels, minlength=10), {"by": "a test"})
    return images, labels


def stores(tmp_path: Path, where: str) -> Store:
    return Store(str(tmp_path / "set") if where == "disk" else f"memory://{tmp_path.name}")


@pytest.mark.parametrize("where", ["disk", "elsewhere"])
def test_a_set_gives_what_was_written(tmp_path, digits, where: str) -> None:
    store = stores(tmp_path, where)
    images, labels = written(store, [30, 30, 7])
    found = synthetic.read(store, 67, digits)
    whole = in_memory(found)
    assert np.array_equal(whole.images[:, 0].numpy(), images[..., 0])
    assert np.array_equal(whole.labels.numpy(), labels)
    chosen = torch.tensor([66, 0, 31, 31, 29, 60])
    for pictures in (found, pickle.loads(pickle.dumps(found))):
        some = pictures.take(chosen)
        assert torch.equal(some[0], whole.images[chosen])
        assert torch.equal(some[1], whole.labels[chosen])
        assert torch.equal(in_memory(pictures[5:50:3]).images, whole.images[5:50:3])
        assert torch.equal(pictures[chosen].labels, whole.labels[chosen])
    assert found.take(chosen[:0])[0].shape == (0, 1, 8, 8)
    # others read a shard in one line
    shard = (store / "shard-00001.npy").read_npy()
    assert np.array_equal(shard["image"], images[30:60])


def test_a_smaller_set_is_the_beginning_and_needs_no_more_shards(tmp_path, digits) -> None:
    store = stores(tmp_path, "elsewhere")
    images, _ = written(store, [30, 30, 7])
    few = synthetic.read(store, 40, digits)
    assert few.offsets.tolist() == [0, 30, 40]
    assert np.array_equal(in_memory(few).images[:, 0].numpy(), images[:40, ..., 0])
    (store / "shard-00002.npy").remove()
    assert len(in_memory(synthetic.read(store, 60, digits))) == 60
    names = {name for name in os.listdir(tmp_path / "cache/held") if name.endswith(".npy")}
    assert len(names) == 2
    with pytest.raises(StorageError, match=r"shard-00002\.npy' does not exist"):
        in_memory(synthetic.read(store, 61, digits))


def test_what_a_run_records_is_the_shards_and_how_many_images(tmp_path, digits) -> None:
    store = stores(tmp_path, "disk")
    written(store, [30, 30, 7])
    facts = [data.picture_facts(synthetic.read(store, images, digits)) for images in (40, 60, 67)]
    assert len({str(fact["sha256"]) for fact in facts}) == 3
    (store / "shard-00002.npy").write_bytes(b"")
    assert data.picture_facts(synthetic.read(store, 60, digits)) == facts[1], "no shard is read"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda store: (store / "index.json").write_text("{"), "not valid JSON"),
        (lambda store: (store / "index.json").write_text("[]"), "instead of an object"),
        (lambda store: edited(store, format="mine"), "has format='mine'"),
        (lambda store: edited(store, counts={"0": 1}), "counts 1 images by class and 67 by shard"),
        (lambda store: edited(store, shape=[9, 9, 1]), r"images \[9, 9, 1\] of 10 classes do not"),
        (lambda store: edited(store, num_classes=11), "of 11 classes do not fit 'digits'"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, digits, change, words: str) -> None:
    store = stores(tmp_path, "disk")
    written(store, [30, 30, 7])
    change(store)
    with pytest.raises(DataError, match=words):
        synthetic.read(store, 60, digits)


def edited(store: Store, **changes: object) -> None:
    (store / "index.json").write_json((store / "index.json").read_json() | changes)


def test_more_images_than_there_are(tmp_path, digits) -> None:
    store = stores(tmp_path, "disk")
    written(store, [30])
    with pytest.raises(DataError, match=re.escape(f"synthetic.images=31, but '{store}' holds 30")):
        synthetic.read(store, 31, digits)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable npy file"),
        (b"half", "not a readable npy file"),
        (rows.records(*pixels(29)), "holds 29 images, but its index says 30"),
        (rows.records(pixels(30)[0][:, :4], pixels(30)[1]), "not records of image uint8"),
        (pixels(30)[1], "not records of image uint8"),
        (rows.records(pixels(30)[0], pixels(30)[1] + 10), "labels reach 1[0-9], but there are 10"),
    ],
)
def test_a_wrong_shard_on_a_disk_is_named(tmp_path, digits, content, words: str) -> None:
    store = stores(tmp_path, "disk")
    written(store, [30, 30])
    file = store / "shard-00001.npy"
    _ = file.write_bytes(content) if isinstance(content, bytes) else file.write_npy(content)
    found = synthetic.read(store, 60, digits)
    assert len(found.take(torch.arange(30))[0]) == 30
    with pytest.raises(DataError, match=words):
        found.take(torch.tensor([3, 31]))


def test_a_wrong_shard_elsewhere_gives_no_pixel(tmp_path, digits) -> None:
    """By its SHA-256, though it is a readable shard of the right size."""
    store = stores(tmp_path, "elsewhere")
    written(store, [30, 30])
    (store / "shard-00001.npy").write_npy(rows.records(*pixels(30)))
    with pytest.raises(StorageError, match=r"shard-00001\.npy' came back wrong 4 times.*SHA-256"):
        synthetic.read(store, 60, digits).take(torch.tensor([31]))
    with pytest.raises(DataError, match=r"shard-00001\.npy' has another SHA-256"):
        checking.check(store)


# -- the node's cache ------------------------------------------------------------------------------
def cached(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache/held"
    return {name.split("-", 1)[1] for name in os.listdir(folder) if not name.endswith(".lock")}


def test_copies_that_nobody_holds_give_way(tmp_path, digits, monkeypatch) -> None:
    store = stores(tmp_path, "elsewhere")
    written(store, [30] * 6)
    size = (store / "shard-00000.npy").size()
    monkeypatch.setenv("DRA_CACHE_BYTES", str(3 * size))
    one, two = (synthetic.read(store, 180, digits) for _ in range(2))
    one.take(torch.tensor([0, 30]))
    two.take(torch.tensor([30, 60]))
    with pytest.raises(StorageError, match="no room for it.*raise DRA_CACHE_BYTES"):
        one.take(torch.tensor([90]))
    assert cached(tmp_path) == {f"shard-0000{number}.npy" for number in range(3)}, "all are in use"
    two.close()
    assert len(one.take(torch.tensor([90]))[0]) == 1
    assert cached(tmp_path) == {f"shard-0000{number}.npy" for number in (0, 1, 3)}, "2 was unheld"
    one.close()
    assert len(two.take(torch.tensor([120, 150]))[0]) == 2


def test_a_download_that_was_killed_leaves_nothing_behind(tmp_path, digits, monkeypatch) -> None:
    store = stores(tmp_path, "elsewhere")
    written(store, [30, 30])
    size = (store / "shard-00000.npy").size()
    monkeypatch.setenv("DRA_CACHE_BYTES", str(2 * size))
    held = Store(str(tmp_path / "cache/held"))
    (held / f"{'0' * 32}-shard-00009.npy.partial").write_bytes(b"x" * size)
    (held / "00.lock").write_bytes(b"")  # nobody has it locked any more
    found = synthetic.read(store, 60, digits)
    assert len(found.take(torch.tensor([0, 30]))[0]) == 2
    assert cached(tmp_path) == {"shard-00000.npy", "shard-00001.npy"}


READING = """
import sys, numpy as np, torch
from dra_ray.data import rows
from dra_ray.data.windows import Windows
from dra_ray.storage import Store

store, seed = Store(sys.argv[1]), int(sys.argv[2])
index = rows.read_index(store)
pictures = rows.RowSet(store, index, index.images)
windows = Windows(seed, pictures.offsets, 60, replace=False)
total = 0
for draw in range(0, 4 * index.images, 20):
    pictures.fetch(windows.near(draw))
    positions = windows.draws(draw, 20)
    images, _ = pictures.take(positions)
    numbers = images[:, 0, 0, :2].long()
    assert torch.equal(numbers[:, 0] + 256 * numbers[:, 1], positions)
    print(draw, flush=True)
"""


def test_two_jobs_share_a_cache_that_is_too_small_for_both_and_one_is_killed(
    tmp_path, s3_bucket
) -> None:
    store = Store(f"{s3_bucket}/{tmp_path.name}")
    written(store, [30] * 12)
    size = (store / "shard-00000.npy").size()
    environment = os.environ | {"DRA_CACHE_BYTES": str(11 * size)}
    command = [sys.executable, "-c", READING, store.uri]
    one, two = (
        subprocess.Popen([*command, seed], env=environment, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    )
    assert one.stdout
    for _ in range(20):
        one.stdout.readline()
    one.kill()
    assert two.wait(60) == 0
    assert two.stdout
    assert len(two.stdout.read().splitlines()) == 72
    assert one.wait() == -signal.SIGKILL
    third = subprocess.run([*command, "3"], env=environment, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    held = (tmp_path / "cache/held").iterdir()
    assert sum(file.stat().st_size for file in held) <= 11 * size
    assert not list((tmp_path / "cache/held").glob("*.reserved"))


@pytest.mark.parametrize("given", ["0", "-5", "10GB"])
def test_a_cache_of_no_size_is_refused(tmp_path, digits, monkeypatch, given: str) -> None:
    store = stores(tmp_path, "elsewhere")
    written(store, [30])
    monkeypatch.setenv("DRA_CACHE_BYTES", given)
    with pytest.raises(StorageError, match=f"DRA_CACHE_BYTES={given} is not a number of bytes"):
        synthetic.read(store, 30, digits).take(torch.tensor([0]))


# -- export ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_goes_out_as_webdataset(tmp_path, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, channels)).astype(np.uint8)
    labels, store = np.array([1, 0, 1, 2, 0]), stores(tmp_path, "disk")
    shards = []
    for number, part in enumerate((slice(0, 3), slice(3, 5))):
        name = rows.shard_name(number)
        digest = (store / name).write_npy(rows.records(images[part], labels[part]))
        shards.append(rows.Shard(name=name, images=part.stop - part.start, sha256=digest))
    rows.write_index(store, shards, (4, 4, channels), np.bincount(labels), {})
    assert export.to_tar(store, Store(str(tmp_path / "tars"))) == 2
    found = {}
    for file in sorted((tmp_path / "tars").glob("tars-train-*.tar")):
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content
                found[member.name] = content.read()
    assert len(found) == 10
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        assert found[f"{number:010d}.cls"] == str(label).encode()
        pixels = np.array(Image.open(io.BytesIO(found[f"{number:010d}.png"])))
        assert np.array_equal(pixels.reshape(4, 4, channels), image)


# -- dra data check --------------------------------------------------------------------------------
def test_checking_says_what_is_there(tmp_path) -> None:
    store = stores(tmp_path, "disk")
    written(store, [30] * 10)
    checked = checking.check(store)
    assert (checked.images, checked.shards, checked.classes) == (300, 10, 10)
    assert checked.prefix_z < 4
    assert checking.check(store, 31).images == 60
    edited(store, counts={"0": 300})
    with pytest.raises(DataError, match="other images by class than its index says"):
        checking.check(store)


@pytest.mark.parametrize(
    "counts", [[[0, 0, 0]], [[1, 0, 0]] * 3, [[5, 0, 1], [0, 0, 0], [1, 1, 0]]]
)
def test_the_share_of_a_prefix_is_a_number(counts: list[list[int]]) -> None:
    assert np.isfinite(checking.prefix_z(np.array(counts)))


def test_a_set_in_class_order_is_seen() -> None:
    assert checking.prefix_z(np.kron(np.eye(10, dtype=int), np.array([[100]]))) > 20
    assert checking.prefix_z(np.full((100, 10), 100)) < 1
