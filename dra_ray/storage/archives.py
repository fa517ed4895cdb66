"""Arrays and files that lie inside npz and tar archives, addressed without unpacking them."""

from __future__ import annotations

import math
import mmap
import struct
import tarfile
import zipfile
from typing import BinaryIO, NamedTuple

import numpy as np

from dra_ray.errors import DataError
from dra_ray.storage.store import (
    TEXT_BYTES,
    _byte_count,
    _read_header,
    decoded_text,
    readable_name,
    tar_content,
)


class StoredArray(NamedTuple):
    """An array that lies uncompressed inside a local file. Cheap to pickle; nothing is read before
    it is asked for.
    """

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

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
    header = _read_header(archive, member)
    if header.fortran and len(header.shape) > 1:
        raise ValueError(f"{member.filename} is in Fortran order; save it again in C order")
    # zip, section 4.3.7: a local header of 30 bytes, whose last two fields are the lengths of a
    # name and of extra data
    file.seek(member.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    offset = member.header_offset + 30 + name_bytes + extra_bytes + header.bytes
    if offset + header.array_bytes > _byte_count(file):
        raise ValueError(f"{member.filename} is longer than the file")
    return StoredArray(path, offset, header.dtype.str, header.shape)


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
