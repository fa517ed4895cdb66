"""What a file declares is checked before memory is allocated: each bomb is refused in one line, in
3 s and 200 MB."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dra_ray import config, data
from dra_ray.data import synthetic
from dra_ray.errors import DataError
from dra_ray.storage import Store

LARGE = 400_000_000  # of zeros, which compress a thousandfold
SECONDS, BYTES = 3.0, 200_000_000


def resident(field: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at most since `refused` began (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def refused(read: Callable[[], Any], words: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = resident("VmRSS"), time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        read()
    assert time.monotonic() - started < SECONDS
    assert resident("VmHWM") - before < BYTES
    assert "\n" not in str(caught.value)


def loaded(name: str, uri: Path) -> Callable[[], Any]:
    settings: dict[str, Any] = {"name": name, "uri": str(uri), "validation_images": 1}
    return lambda: data.load(
        config.Data(**settings | ({"resolution": 16} if name == "folder" else {}))
    )


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    np.lib.format.write_array_header_1_0(
        buffer := io.BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue() + content


def packed(head: bytes = b"", zeros: int = LARGE) -> bytes:
    """gzip of `head` and so many zeros."""
    packer = zlib.compressobj(1, wbits=31)
    part = bytes(10**7)
    return b"".join(
        [
            packer.compress(head),
            *(packer.compress(part) for _ in range(zeros // len(part))),
            packer.flush(),
        ]
    )


# -- npz and npy -----------------------------------------------------------------------------------
def npz_with_a_false_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("image", "label", "test_image", "test_label"):
            archive.writestr(f"{name}.npy", npy((10**9, 32, 32, 3)))


def npz_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as stream:
            stream.write(npy((LARGE // 3072, 32, 32, 3)))
            for _ in range(LARGE // 3072 // 10):
                stream.write(bytes(30720))
        archive.writestr("label.npy", npy((1,), b"\0"))


def npz_with_a_false_directory(path: Path) -> None:
    """A stored member whose central directory declares 3 GB and agrees with the array's header."""
    header = npy((10**6, 32, 32, 3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", header)
        archive.writestr("label.npy", npy((10**6,)))
    raw = path.read_bytes()
    for name, size in (
        ("image.npy", len(header) + 3072 * 10**6),
        ("label.npy", len(npy((10**6,))) + 10**6),
    ):
        at = raw.index(name.encode(), raw.index(b"PK\1\2")) - 46 + 20
        raw = raw[:at] + struct.pack("<II", size, size) + raw[at + 8 :]
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "make", [npz_with_a_false_header, npz_of_zeros, npz_with_a_false_directory]
)
def test_npz(tmp_path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.npz")
    refused(loaded("cifar10", tmp_path / "a.npz"), r"a\.npz")
    like = data.Images(
        "cifar10", data.OFFICIAL["cifar10"][0], *(data.Split(torch.zeros(0), torch.zeros(0)),) * 3
    )
    refused(lambda: synthetic.read(Store(str(tmp_path)), 1, like), r"a\.npz")


@pytest.mark.parametrize("shape", [(10**9, 32, 32, 3), (10**30,), (-1, -10), (0, 10**30)])
def test_npy(tmp_path, shape: tuple[int, ...]) -> None:
    for name in ("train_images", "test_images", "train_labels", "test_labels"):
        (tmp_path / f"{name}.npy").write_bytes(npy(shape))
    refused(loaded("cifar10", tmp_path), r"images\.npy")


# -- archives and pickles --------------------------------------------------------------------------
def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


ARCHIVES = {
    "a member declares 10 GB": lambda: gzip.compress(tar_header("x/data_batch_1", 10**10)),
    "a member of zeros": lambda: packed(tar_header("x/data_batch_1", LARGE)),
    "an unused member of zeros": lambda: packed(tar_header("x/readme", LARGE)),
    "a name of 400 MB": lambda: packed(tar_header("x", LARGE, tarfile.GNUTYPE_LONGNAME)),
    "an extended header of 8 GB": lambda: packed(tar_header("x", 8 * 10**9, tarfile.XHDTYPE)),
    "xz": lambda: lzma.compress(tar_header("x/data_batch_1", 10**10)),
    "plain": lambda: tar_header("x/data_batch_1", 10**10),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_cifar_archives(tmp_path, kind: str) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVES[kind]())
    refused(loaded("cifar10", tmp_path / "cifar-10-python.tar.gz"), r"cifar-10-python\.tar\.gz")


def sparse(path: Path, head: bytes = b"", size: int = 10**10) -> None:
    """A file of many bytes that takes no room on the disk."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "data_batch_1", "train-0.parquet"])
def test_files_that_are_too_large_for_cifar(tmp_path, name: str) -> None:
    sparse(tmp_path / name)
    if name.startswith("train"):
        sparse(tmp_path / "test-0.parquet")
    refused(loaded("cifar10", tmp_path), name)


def nested(depth: int) -> list[Any]:
    """10^depth numbers in a few bytes of pickle, as it refers to what it has seen."""
    return [0] * 10 if depth == 1 else [nested(depth - 1)] * 10


def labels_of(labels: Any) -> bytes:
    return pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": labels}, protocol=2)


TEXT = b"X" + struct.pack("<I", 10**6) + b"x" * 10**6
ENCODED = (
    b"\x80\x02(c_codecs\nencode\nq\0"
    + TEXT
    + b"q\1"
    + b"h\0h\1X\x06\0\0\0latin1\x86R" * 10**5
    + b"l."
)

PICKLES = {
    "a bytearray of 10 GB": b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b"x",
    "bytes of 10 GB": b"\x80\x04\x8e" + struct.pack("<Q", 10**10) + b"x",
    "a frame of 10 GB": b"\x80\x04\x95" + struct.pack("<Q", 10**10) + b"x",
    "labels in lists in lists": labels_of(nested(9)),
    "a number of 10^5 digits": b"I" + b"9" * 10**5 + b"\n.",
    "a text encoded 10^5 times": ENCODED,
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path, kind: str) -> None:
    for name in (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(PICKLES[kind])
    refused(loaded("cifar10", tmp_path), "data_batch_1")


# -- idx and parquet -------------------------------------------------------------------------------
IDX = {
    "10^9 images": gzip.compress(struct.pack(">4I", 0x803, 10**9, 28, 28)),
    "more than 64 bits": gzip.compress(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "more zeros than declared": packed(struct.pack(">4I", 0x803, 10, 28, 28)),
    "images of zeros": packed(struct.pack(">4I", 0x803, LARGE // 784, 28, 28)),
}


@pytest.mark.parametrize("kind", IDX)
def test_idx(tmp_path, kind: str) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(IDX[kind])
    refused(loaded("fashion-mnist", tmp_path), r"train-images-idx3-ubyte\.gz")


def png(side: int = 32) -> bytes:
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def repeated(values: list[Any], times: int) -> pyarrow.Array:
    return pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * times, pyarrow.int32()), pyarrow.array(values)
    )


PARQUET = {
    "10^7 rows": lambda: {"img": repeated([png()], 10**7), "label": repeated([1], 10**7)},
    "one large image in every row": lambda: {
        "img": repeated([png() + bytes(2 * 10**6)], 5000),
        "label": repeated([1], 5000),
    },
    "pages of zeros": lambda: {
        "img": pyarrow.array([png() + bytes([index]) + bytes(10**6) for index in range(100)]),
        "label": pyarrow.array([1] * 100),
    },
}


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet(tmp_path, kind: str) -> None:
    for part in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.table(PARQUET[kind]()),
            tmp_path / f"{part}-0.parquet",
            compression="zstd",
            store_schema=False,
        )
    refused(loaded("cifar10", tmp_path), "train-0.parquet")


# -- pictures and shards ---------------------------------------------------------------------------
def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_header(width: int, height: int) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )


def tiff_header(width: int, height: int) -> bytes:
    sizes = ((256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1))
    tags = (*sizes, (273, 4, 200), (278, 4, height), (279, 4, width * height % 2**32))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)


PICTURES = {
    "a.png": png_header(40_000, 25_000),
    "b.png": png_header(12_000, 10_000),
    "c.png": png_header(8_000, 8_000),
    "strip.png": png_header(1, 60_000_000),
    "a.bmp": bmp_header(40_000, 25_000),
    "a.tif": tiff_header(40_000, 25_000),
    "a.ppm": b"P6 100000 10000 255\n" + bytes(100),
    "a.pgm": b"P5 100000 10000 65535\n" + bytes(100),
    "a.gif": b"GIF89a"
    + struct.pack("<HH", 65535, 65535)
    + b"\0\0\0,\0\0\0\0"
    + struct.pack("<HH", 65535, 65535)
    + b"\0\2\2\x4c\1\0;",
    "a.qoi": b"qoif" + struct.pack(">IIBB", 40_000, 25_000, 3, 0) + bytes(100),
}


def one_picture(root: Path, name: str) -> Path:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            (root / part / label / "0.png").write_bytes(png())
    return root / "train" / "a" / name


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name: str) -> None:
    one_picture(tmp_path, name).write_bytes(PICTURES[name])
    images = loaded("folder", tmp_path)()
    refused(
        lambda: [data.in_memory(part) for part in (images.train, images.validation)],
        f"{name}'.*(pixels|decoded|declares)",
    )


def test_a_long_strip(tmp_path) -> None:
    Image.new("L", (1, 60_000)).save(one_picture(tmp_path, "strip.png"))
    images = data.load(
        config.Data(name="folder", uri=str(tmp_path), validation_images=1, resolution=1024)
    )
    refused(
        lambda: [data.in_memory(part) for part in (images.train, images.validation)],
        "strip.png' .*too long a strip",
    )


def test_a_picture_of_10_gb(tmp_path) -> None:
    sparse(one_picture(tmp_path, "a.jpg"), b"\xff\xd8\xff")
    refused(loaded("folder", tmp_path), r"a\.jpg' has 10,000,000,000 bytes")


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "number",
    [b"1000000000", b"100000", b"999999999999999999999", b"9" * 5000, b"6", b"1_0", "٣".encode()],
)
def test_class_numbers_of_shards(tmp_path, monkeypatch, number: bytes) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    for part in ("train", "val"):
        shard(
            tmp_path / f"{part}.tar",
            {
                "0.png": png(),
                "0.cls": b"0",
                "1.png": png(),
                "1.cls": b"1",
                "2.png": png(),
                "2.cls": number,
            },
        )
    refused(loaded("folder", tmp_path), "classes by the largest class number|not a class number")


@pytest.mark.parametrize(
    "head",
    [
        tar_header("0.cls", 10**10),
        tar_header("0.png", 10**10),
        tar_header("x", 10**10, tarfile.GNUTYPE_LONGNAME),
        tar_header("x", 10**10, tarfile.XHDTYPE),
        tar_header("0.cls", 512, tarfile.GNUTYPE_SPARSE),
    ],
)
def test_members_of_shards(tmp_path, monkeypatch, head: bytes) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    for part in ("train", "val"):
        sparse(tmp_path / f"{part}.tar", head, 11 * 10**9)
    refused(loaded("folder", tmp_path), r"train\.tar")
