"""Good files with bytes changed, cut and inserted: each is read, or refused in one line by a
`DraError`.
"""

from __future__ import annotations

import gzip
import io
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dra_ray import config, data
from dra_ray.data import decode, synthetic
from dra_ray.errors import DraError
from dra_ray.storage import Store

BATCHES = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch")


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def archive(members: dict[str, bytes], mode: str) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def npz(save: Callable[..., None]) -> bytes:
    save(buffer := io.BytesIO(), image=np.zeros((20, 8, 8, 1), np.uint8), label=np.arange(20) % 10)
    return buffer.getvalue()


def batch(protocol: int) -> bytes:
    return pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]}, protocol)


def table() -> bytes:
    columns = {"img": [{"bytes": picture("PNG"), "path": None}] * 3, "label": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer := io.BytesIO())
    return buffer.getvalue()


SHARD = {
    f"x/{number}.{kind}": picture("JPEG") if kind == "jpg" else b"%d" % number
    for number in range(3)
    for kind in ("jpg", "cls")
}
# contents, the names of the files that hold them, and the data set that is read from their folder
FILES: dict[str, tuple[bytes, tuple[str, ...], str]] = {
    "npz": (npz(np.savez), ("a.npz",), "synthetic"),
    "compressed npz": (npz(np.savez_compressed), ("a.npz",), "synthetic"),
    "protocol 2": (batch(2), BATCHES, "cifar10"),
    "protocol 5": (batch(5), BATCHES, "cifar10"),
    "archive": (
        archive(dict.fromkeys(BATCHES, batch(2)), "w:gz"),
        ("cifar-10-python.tar.gz",),
        "cifar10",
    ),
    "parquet": (table(), ("train-0.parquet", "test-0.parquet"), "cifar10"),
    "shard": (archive(SHARD, "w"), ("train.tar", "val.tar"), "folder"),
    "idx": (
        gzip.compress(struct.pack(">4I", 0x803, 12, 28, 28) + bytes(784 * 12)),
        ("train-images-idx3-ubyte.gz",),
        "fashion-mnist",
    ),
} | {
    kind: (picture(kind), ("train/a/0.png", "val/a/0.png", "train/a/1.png"), "folder")
    for kind in decode.FORMATS
}


def mutated(raw: bytes, rng: random.Random) -> bytes:
    content, how = bytearray(raw), rng.randrange(5)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(min(len(content), 200) if how == 3 else len(content)) if content else 0
        if how == 0:
            content[at : at + 1] = rng.randbytes(1)
        elif how == 1 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del content[at:]
        elif how == 3:
            content[at : at + 4] = rng.choice((b"\xff", b"\0", b"\x7f")) * 4
        else:
            content[at:at] = rng.randbytes(rng.randrange(9))
    return bytes(content)


def read(name: str, folder: Path, like: data.Images) -> None:
    if name == "synthetic":
        data.in_memory(synthetic.read(Store(str(folder)), 5, like))
        return
    settings = {"name": name, "uri": str(folder), "validation_images": 1} | (
        {"resolution": 16} if name == "folder" else {}
    )
    images = data.load(config.Data.model_validate(settings))
    data.in_memory(images.train)


def hold(kind: str, count: int, folder: Path) -> None:
    """Read `count` mutations of the file."""
    rng, like = random.Random(kind), data.load(config.Data())
    raw, names, name = FILES[kind]
    for number in range(count):
        place = folder / str(number)
        for file in names:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(mutated(raw, rng))
        try:
            read(name, place, like)
        except DraError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most mutations are refused, some are read


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", FILES)
def test_mutations_are_read_or_refused(tmp_path, kind: str) -> None:
    hold(kind, 10, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_2000_mutations_are_read_or_refused(tmp_path, kind: str) -> None:
    hold(kind, 2000 // len(FILES) + 1, tmp_path)
