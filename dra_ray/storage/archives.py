"""What lies inside npz and tar archives: sizes before contents, and no unpacking."""

from __future__ import annotations

import codecs
import io
import math
import mmap
import os
import re
import struct
import tarfile
import zipfile
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from dra_ray.errors import DataError

# -- sizes before contents -------------------------------------------------------------------------
# A file may declare up to SMALL_BYTES whatever it holds; beyond that at most MOST_EXPANSION times
# its own bytes. Images compress 1 to 10 times, while a compression bomb expands 1,000 times.
SMALL_BYTES = 2**26
MOST_EXPANSION = 100
# of what a tar holds beside its files: names, extended headers, class numbers
TEXT_BYTES = 2**16
HEADER_BYTES = 2**20


def require_plausible(source: str, declared_bytes: int, stored_bytes: int) -> None:
    """`DataError` naming `source` unless `stored_bytes` can hold what it declares, and this
    machine's memory too."""
    if declared_bytes <= SMALL_BYTES:
        return
    if declared_bytes > MOST_EXPANSION * stored_bytes:
        raise DataError(
            f"'{source}' declares {declared_bytes:,} bytes of contents but has {stored_bytes:,} "
            "bytes; it is damaged or hostile, fetch it again"
        )
    free_bytes = _free_memory_bytes()
    if declared_bytes > free_bytes:
        raise DataError(
            f"'{source}' holds {declared_bytes:,} bytes, but this machine has {free_bytes:,} bytes "
            "of memory free; "
            "use a smaller file, or a machine with more memory"
        )


def require_readable(source: str, size_bytes: int, at_most: int | None) -> None:
    """`DataError` naming `source` where a whole file has more bytes than `at_most`, or than this
    machine's memory."""
    if at_most is not None and size_bytes > at_most:
        raise DataError(
            f"'{source}' has {size_bytes:,} bytes, and at most {at_most:,} are read of such a "
            "file; restore or delete it"
        )
    require_plausible(source, size_bytes, size_bytes)


def _free_memory_bytes() -> int:
    """What Linux can give without swapping; elsewhere all memory there is."""
    try:
        with open("/proc/meminfo", "rb") as file:
            available = re.search(rb"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        available = None
    if available:
        return int(available[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def byte_count(file: BinaryIO) -> int:
    """Bytes of an open file, whose position stays."""
    position = file.tell()
    count = file.seek(0, io.SEEK_END)
    file.seek(position)
    return count


def is_clutter(name: str) -> bool:
    """Whether a member of an archive is no content: what macOS adds to archives (`._x`,
    `__MACOSX/`), and hidden files."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX"
        for part in name.split("/")
    )


class _Header(NamedTuple):
    """Of an array in npy format: bytes of the header, and what it declares."""

    bytes: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def array_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(stream: IO[bytes], name: str) -> _Header:
    """Raises `ValueError` for a version, shape or type that is not read here."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} is of npy version {version}")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject or (not dtype.itemsize and 0 not in shape) or min(shape, default=0) < 0:
        what = "objects" if dtype.hasobject else f"{dtype} {shape}"
        raise ValueError(f"{name} holds {what}, not numbers")
    return _Header(stream.tell(), shape, fortran, dtype)


def require_complete(header: _Header, file: BinaryIO) -> None:
    if header.bytes + header.array_bytes > byte_count(file):
        raise ValueError("it is shorter than its header declares")


def npy_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an npz by their names."""
    return {
        member.filename.removesuffix(".npy"): member
        for member in archive.infolist()
        if member.filename.endswith(".npy") and not is_clutter(member.filename)
    }


def read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Header:
    with archive.open(member) as stream:
        header = npy_header(stream, member.filename)
    if header.bytes + header.array_bytes != member.file_size:
        raise ValueError(f"{member.filename} is not of the size that its header declares")
    return header


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


Seekable = BinaryIO | io.BufferedIOBase


class _SmallReads:
    """A seekable binary file of which tarfile may not read more than HEADER_BYTES at once, whatever
    a header declares."""

    def __init__(self, file: Seekable) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header declares {size:,} bytes")
        return self._file.read(size)


def open_tar(file: Seekable) -> tarfile.TarFile:
    """An uncompressed tar, or one inside a decompressing file; no single read passes HEADER_BYTES,
    see `tar_content`."""
    return tarfile.TarFile(fileobj=_SmallReads(file))  # type: ignore[arg-type]


def tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a regular member, whose size the caller has checked."""
    content = archive.extractfile(member)
    assert content is not None
    return b"".join(iter(lambda: content.read(HEADER_BYTES), b""))


def readable_name(name: str) -> str:
    """A name that is not UTF-8 is read as Latin-1, as older tools wrote them."""
    raw = name.encode(errors="surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin1")


def decoded_text(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one; bytes of no encoding are
    replaced."""
    encoding = (
        "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    )
    return raw.decode(encoding, errors="replace")


class StoredArray(NamedTuple):
    """An array that lies uncompressed inside a file. Cheap to pickle; nothing is read before it is
    asked for. `crc32` is what an archive says of its `header` bytes before `offset` and the array.
    """

    path: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    header: int = 0
    crc32: int | None = None

    def read(self) -> np.ndarray:
        """All of it, in memory."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return np.fromfile(file, self.dtype, math.prod(self.shape)).reshape(self.shape)
        except (OSError, ValueError, MemoryError) as error:
            raise self._gone(error) from None

    def map(self) -> np.ndarray:
        """A read-only view of the file. Make one for every access: pages count as the process's own
        for as long as a view lives.
        """
        try:
            with open(self.path, "rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view.madvise(
                mmap.MADV_RANDOM
            )  # or each image of 3 kB would bring 128 kB of its neighbours from the disk
            return np.frombuffer(view, self.dtype, math.prod(self.shape), self.offset).reshape(
                self.shape
            )
        except (OSError, ValueError, MemoryError) as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> DataError:
        return DataError(
            f"'{self.path}' is gone or shorter than it was ({error}); put it back and start again"
        )


class TarMember(NamedTuple):
    """A file inside a tar: where its bytes begin, and its contents if they were asked for."""

    name: str
    offset: int
    size: int
    text: str | None


def stored_array(
    path: str, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> StoredArray:
    header = read_header(archive, member)
    if header.fortran and len(header.shape) > 1:
        raise ValueError(f"{member.filename} is in Fortran order; save it again in C order")
    # zip, section 4.3.7: a local header of 30 bytes, whose last two fields are the lengths of a
    # name and of extra data
    file.seek(member.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    offset = member.header_offset + 30 + name_bytes + extra_bytes + header.bytes
    if offset + header.array_bytes > byte_count(file):
        raise ValueError(f"{member.filename} is longer than the file")
    return StoredArray(path, offset, header.dtype, header.shape, header.bytes, member.CRC)


def tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, text: str) -> TarMember:
    name = readable_name(member.name)
    if member.issparse():
        raise tarfile.ReadError(f"'{name}' is sparse")
    if not member.name.endswith(text):
        return TarMember(name, member.offset_data, member.size, None)
    if member.size > TEXT_BYTES:
        raise tarfile.ReadError(f"'{name}' declares {member.size:,} bytes of text")
    return TarMember(
        name, member.offset_data, member.size, decoded_text(tar_content(archive, member))
    )
