"""Files of strangers: one line that names the file, nothing of theirs runs, and memory stays
small.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dra_ray.errors import DraError
from dra_ray.report import bundle
from dra_ray.storage import Store
from dra_ray.students import weights

SMALL = 300 * 2**20


def refused(read: Callable[[], object], name: str, at_most: int = SMALL) -> str:
    """`read` raises one line that names the file, and takes at most so many bytes meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DraError) as caught:
        read()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < at_most, f"{grown:,} bytes"
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert name in line
    assert "\n" not in line
    assert len(line) < 1000
    return line


class Runs:
    """A pickle that makes a file if anybody runs what it says."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Zeros:
    """A few bytes of pickle that stand for 8 GB."""

    def __reduce__(self) -> Any:
        return bytearray, (2**33,)


# -- torch and safetensors -------------------------------------------------------------------------
def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, zeros: int = 0) -> bytes:
    """As torch.save lays it out: the pickle, and `zeros` bytes of a tensor."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", b"3\n")
        with archive.open("a/data/0", "w", force_zip64=True) as member:
            for _ in range(zeros // 2**20):
                member.write(bytes(2**20))
    return buffer.getvalue()


def torch_stream(pickled: bytes) -> bytes:
    """As torch.save wrote before its zip files."""
    magic = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
    return b"".join(pickle.dumps(part, 2) for part in magic) + pickled + pickle.dumps([], 2)


LAYOUTS: dict[str, Callable[[bytes], bytes]] = {
    "zip": zipped,
    "compressed zip": lambda pickled: zipped(pickled, zipfile.ZIP_DEFLATED),
    "stream": torch_stream,
    "plain pickle": lambda pickled: pickled,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_checkpoint_runs_nothing(layout: str, protocol: int, tmp_path: Path) -> None:
    hostile = pickle.dumps({"state_dict": Runs(tmp_path / "ran")}, protocol)
    (tmp_path / "x.pt").write_bytes(LAYOUTS[layout](hostile))
    refused(lambda: weights.read_weights(Store(f"{tmp_path}/x.pt")), "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_that_a_checkpoint_only_names_take_no_room(layout: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(LAYOUTS[layout](pickle.dumps({"a": Zeros()}, 2)))
    refused(lambda: weights.read_weights(Store(f"{tmp_path}/x.pt")), "x.pt")


def test_a_compressed_checkpoint_is_not_unpacked_beyond_proportion(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    (tmp_path / "x.pt").write_bytes(zipped(pickled, zipfile.ZIP_DEFLATED, 2**27))
    line = refused(lambda: weights.read_weights(Store(f"{tmp_path}/x.pt")), "x.pt")
    assert "damaged or hostile" in line


def test_an_honest_compressed_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, buffer := io.BytesIO())
    with (
        zipfile.ZipFile(buffer) as stored,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert weights.read_weights(Store(f"{tmp_path}/x.pt")).tensors["a"].tolist() == [0, 1, 2, 3]


def tensors(header: bytes, content: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(header)) + header + content


def one(**changes: object) -> bytes:
    fields: dict[str, object] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return tensors(json.dumps({"a": fields | changes}).encode())


SAFETENSORS = {
    "nothing": b"",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 90 MB": struct.pack("<Q", 9 * 10**7) + b"{}",
    "no UTF-8": tensors(b'{"\xff\xfe": 1}'),
    "deep": tensors(b'{"a":' * 50_000),
    "a type without a meaning": one(dtype="F99"),
    "a type that torch has not": one(dtype="F4", shape=[16]),
    "negative": one(shape=[-2]),
    "a shape beyond 64 bits": one(shape=[2**62, 2**62]),
    "beyond the end": one(data_offsets=[0, 2**40]),
    "backwards": one(data_offsets=[8, 0]),
    "another length": one(shape=[3]),
    "a list": tensors(b"[]"),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[kind])
    refused(lambda: weights.read_weights(Store(f"{tmp_path}/x.safetensors")), "x.safetensors")


# -- bundles ---------------------------------------------------------------------------------------
def member(kind: bytes, name: str = "x", link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def hole(real_bytes: int) -> bytes:
    """A file of GNU tar's old sparse kind: no bytes of its own, and a hole of so many."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[386:398], head[398:410] = b"%011o " % 0, b"%011o " % 0
    head[482] = 0
    head[483:495] = b"%011o " % real_bytes
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1024)


BUNDLES = {
    "a link": tar(member(tarfile.SYMTYPE, link="/etc/passwd")),
    "a hard link": tar(member(tarfile.LNKTYPE, link="../../x")),
    "a device": tar(member(tarfile.CHRTYPE)),
    "a pipe": tar(member(tarfile.FIFOTYPE)),
    "a folder": tar(member(tarfile.DIRTYPE)),
    "above": tar(member(tarfile.REGTYPE, "../x")),
    "from the root": tar(member(tarfile.REGTYPE, "/tmp/x")),
    "another store": tar(member(tarfile.REGTYPE, "memory://x")),
    "through another store": tar(member(tarfile.REGTYPE, "x::memory")),
    "a hole": hole(2**32),
    "a long name": tarfile.TarInfo("x").tobuf()[:156] + b"L" + bytes(355),
    "a header that is cut": tarfile.TarInfo("x").tobuf()[:300],
    "not utf-8": tar(member(tarfile.REGTYPE, "\udcff")),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_bundle_writes_nothing_elsewhere(kind: str, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(BUNDLES[kind])
    to = Store(str(tmp_path / "out" / "deep"))
    refused(lambda: bundle.check(Store(f"{tmp_path}/b.tar"), to), "b.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar"]


# -- text ------------------------------------------------------------------------------------------
TEXTS = {
    "deep": b"[" * 200_000,
    "deep mappings": b'{"a":' * 100_000,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "half a character": b'{"a": "\\ud800"}',
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "half": b'{"a": [1, 2',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(TEXTS[kind])
    file = Store(f"{tmp_path}/x.json")
    refused(file.read_json, "x.json")
    refused(file.read_jsonl, "x.json")
