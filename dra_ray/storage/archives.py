"""Arrays and files that lie inside npz and tar archives, addressed without unpacking them."""

from __future__ import annotations

import io
import math
import mmap
import struct
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np

from dra_ray.errors import DataError


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
        except (OSError, ValueError) as error:
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
        except (OSError, ValueError) as error:
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
    path: str, file: io.BufferedReader, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> StoredArray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} is of npy version {version}")
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(stream)
        header_bytes = stream.tell()
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError(f"{member.filename} holds objects or is in Fortran order")
    if header_bytes + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} is not of the size that its header says")
    # zip, section 4.3.7: a local header of 30 bytes, whose last two fields are the lengths of a
    # name and of extra data
    file.seek(member.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return StoredArray(
        path, member.header_offset + 30 + name_bytes + extra_bytes + header_bytes, dtype.str, shape
    )


def tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, text: str) -> TarMember:
    content = archive.extractfile(member) if member.name.endswith(text) else None
    return TarMember(
        member.name, member.offset_data, member.size, content.read().decode() if content else None
    )
