"""Tensors that may be larger than the memory that a driver should take."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from dra_ray.errors import StorageError
from dra_ray.storage.store import cache

LARGE_BYTES = 2**26


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of no particular contents, on the CPU. Above LARGE_BYTES it lies in a file of the
    node's `cache`, which has no name and ends with the tensor: what is not in use, the system can
    put on the disk. `StorageError` where that has no room.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size <= LARGE_BYTES:
        return torch.empty(*shape, dtype=dtype)
    folder = cache().uri
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).reshape(*shape)
    except OSError as error:
        raise StorageError(
            f"'{folder}' has no room for {size / 1e9:.1f} GB ({error}); free some, or set "
            "DRA_CACHE to a folder on a larger disk"
        ) from None


def anonymous_bytes() -> int:
    """Memory of this process that lies in no file (Linux)."""
    return _status_bytes("RssAnon")


def most_bytes() -> int:
    """The most memory that this process has had at once (Linux). Unlike `ru_maxrss`, not what the
    one had that started it.
    """
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))
