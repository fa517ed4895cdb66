"""The part of a node's cache that has a bound: copies that processes hold stay, others give way.

Everything is said by files and their locks, which end with the process that holds them, however
that ends; so nothing is left to clean up after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator

import numpy as np

from dra_ray.errors import DataError, StorageError

PARTIAL, RESERVED = ".partial", ".reserved"  # of a copy that is being made, and its room


@dataclasses.dataclass
class Held:
    """A file on this node's disk that nobody removes before it is released."""

    path: str
    descriptor: int | None

    def read_rows(self, offset: int, rows: np.ndarray, out: np.ndarray) -> None:
        """Rows with the numbers `rows` int64 [n], of as many bytes as `out` uint8 [n,bytes] has, of
        which the first begins at `offset`. One read each: a mapped file would count as this
        process's memory, and pages of which a few kB are needed cost more to map than to read.

        Raises `DataError` where the file is shorter.
        """
        assert self.descriptor is not None
        row_bytes = out.shape[1]
        begins = (offset + rows * row_bytes).tolist()
        for place, begin in zip(out, begins, strict=True):
            if os.preadv(self.descriptor, [place], begin) != row_bytes:
                raise DataError(
                    f"'{self.path}' is shorter than it was; put it back and start again"
                )

    def release(self) -> None:
        """May be called again."""
        if self.descriptor is not None:
            os.close(self.descriptor)  # and with it the lock
            self.descriptor = None


@contextlib.contextmanager
def room(copy: str, needed: int, uri: str) -> Iterator[None]:
    """The cache has `needed` bytes for `copy` while the block makes it: as long, an empty file of
    that size stands for it, so that downloads at the same time do not count on the same room.
    """
    folder, reserved = os.path.dirname(copy), f"{copy}{RESERVED}"
    with open(os.path.join(folder, "room.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_room(folder, needed, uri)
        with open(reserved, "wb") as file:
            file.truncate(needed)
    try:
        yield
    finally:
        os.unlink(reserved)


def _make_room(folder: str, needed: int, uri: str) -> None:
    """Remove copies from `folder` that no process holds until `needed` more bytes, of the file at
    `uri`, fit: within DRA_CACHE_BYTES, where that is set, and onto the disk.

    Raises `StorageError` where those that are held leave no room.
    """
    copies = _copies(folder)
    most = most_bytes()
    used = sum(status.st_size for status in copies.values())
    free = shutil.disk_usage(folder).free

    def short() -> bool:
        return needed > free or (most is not None and used + needed > most)

    for path, status in sorted(copies.items(), key=lambda copy: copy[1].st_mtime_ns):
        if not short():
            return
        if _remove_unheld(path):
            used, free = used - status.st_size, free + status.st_size
    if short():
        larger = (
            "set DRA_CACHE to a larger disk" if most is None else f"raise DRA_CACHE_BYTES={most}"
        )
        raise StorageError(
            f"'{uri}' has {needed:,} bytes, but the cache '{folder}' has no room for it: "
            f"{used:,} bytes there are in use, and its disk has {free:,} bytes left; {larger}, or "
            "lower synthetic.window_images"
        )


def copied_bytes(folder: str) -> int:
    """Bytes of all copies in the folder, which need not be there."""
    try:
        return sum(status.st_size for status in _copies(folder).values())
    except FileNotFoundError:
        return 0


def _copies(folder: str) -> dict[str, os.stat_result]:
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                if not entry.name.endswith(".lock"):
                    found[entry.path] = entry.stat()
    for path in [path for path in found if path.endswith(RESERVED)]:
        found.pop(f"{path.removesuffix(RESERVED)}{PARTIAL}", None)
        found.pop(path.removesuffix(RESERVED), None)  # renamed a moment ago
    return found


def held(path: str) -> int | None:
    """A descriptor that keeps others from removing the file; None where it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        os.utime(path)
        return descriptor
    os.close(descriptor)  # it was removed before the lock was ours
    return None


def lock_of(path: str) -> str:
    """Held while a copy is made: one of 256 files, by the digest that its name begins with."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f"{name[:2]}.lock")


def _remove_unheld(path: str) -> bool:
    """Whether the copy could be removed: nobody holds it or, where it is a part of one, whoever
    made it was killed.
    """
    locked = lock_of(path) if path.endswith((PARTIAL, RESERVED)) else path
    try:
        with open(locked, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False


def most_bytes() -> int | None:
    """DRA_CACHE_BYTES, what copies of shards may take on this node's disk; None where it is not
    set, and they may take all of it.
    """
    given = os.environ.get("DRA_CACHE_BYTES", "").strip()
    if not given:
        return None
    if not given.isdecimal() or not int(given):
        raise StorageError(
            f"DRA_CACHE_BYTES={given} is not a number of bytes; set it to one, such as 50000000000"
        )
    return int(given)
