"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.

A plain path, `file://`, `s3://`, `gs://` or `memory://` all work; credentials come from the
environment, as fsspec's drivers expect. This is the only module of the package that opens files,
calls `torch.load` or reads pickles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import fsspec
import numpy as np

from dra_ray.errors import DataError, DraError, StorageError
from dra_ray.storage import tally
from dra_ray.storage.archives import (
    SMALL_BYTES,
    StoredArray,
    TarMember,
    byte_count,
    is_clutter,
    npy_header,
    npy_members,
    open_tar,
    read_header,
    read_member,
    require_complete,
    require_plausible,
    require_readable,
    stored_array,
    tar_member,
)
from dra_ray.storage.failures import explained, first_line, unreachable
from dra_ray.storage.plain_json import read_json, strict_json
from dra_ray.storage.replies import ATTEMPTS, WrongReply, check_reply, repeated, whole
from dra_ray.storage.room import PARTIAL, Held, copied_bytes, held, lock_of, room
from dra_ray.storage.unpickle import torch_from_bytes, what_it_is
from dra_ray.storage.uris import require_named, require_no_credentials, require_plain

STREAM_BYTES = 2**22  # of a file that is read or written part by part
AT_ONCE_BYTES = 2**26  # of a file that is made in memory before it is written
HELD = "held"  # the part of a node's cache that has a bound
TEXT_BYTES = 2**26  # of a log's segment or a summary; those that we write are far smaller


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder at any fsspec URI; cheap to pass around, picklable, holds no connection.

    `Store("s3://bucket/runs") / "a" / "metrics.jsonl"` names a path below it.
    """

    uri: str

    def __post_init__(self) -> None:
        """Raises `StorageError` for an empty URI, and for one with credentials, which would reach
        every manifest and message.
        """
        require_named(self.uri)
        require_no_credentials(self.uri)

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri or self.uri.startswith("file://")

    def _open_fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        require_plain(self.uri)
        bounded = self.uri.startswith(("s3://", "s3a://")) and "::" not in self.uri
        options = {"config_kwargs": _s3_config()} if bounded else {}
        try:
            fs, path = fsspec.core.url_to_fs(self.uri, **options)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"storage URI '{self.uri}': {error}; use a path, file://, s3:// or gs://"
            ) from None
        if bounded:
            fs.retries = S3_ROUNDS
        return fs, path

    def resolved(self) -> Store:
        """The same folder with an absolute local path, so that workers in other directories find
        it.
        """
        if not self.is_local:
            return self
        return Store(os.path.abspath(os.path.expanduser(self.uri.removeprefix("file://"))))

    # -- bytes -------------------------------------------------------------------------------------
    @explained("reach")
    def exists(self) -> bool:
        fs, path = self._open_fs()
        fs.invalidate_cache()
        return bool(fs.exists(path))

    @explained("reach")
    def is_file(self) -> bool:
        """Whether a file, and no folder, is here."""
        fs, path = self._open_fs()
        fs.invalidate_cache()
        return bool(fs.isfile(path))

    @explained("list")
    def names(self) -> list[str]:
        """Sorted names directly below this folder; empty when it does not exist."""
        fs, path = self._open_fs()
        fs.invalidate_cache()
        try:
            return sorted(
                entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)
            )
        except FileNotFoundError:
            return []

    @explained("list")
    def files(self) -> dict[str, int]:
        """Size in bytes of every file below this folder, by its path from here, sorted; empty when
        the folder does not exist.
        """
        if self.is_local:
            return dict(sorted(_local_files(self.resolved().uri)))
        fs, path = self._open_fs()
        fs.invalidate_cache()
        top = path.rstrip("/") + "/"
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name.removeprefix(top): int(info["size"] or 0) for name, info in sorted(found.items())
        }

    def size(self) -> int:
        """Bytes of this file."""
        return int(self._info()["size"] or 0)

    @explained("reach")
    def _info(self) -> dict[str, Any]:
        fs, path = self._open_fs()
        info: dict[str, Any] = fs.info(path)
        return info

    @explained("read")
    def read_bytes(
        self,
        start: int = 0,
        length: int | None = None,
        digest: str | None = None,
        at_most: int | None = None,
    ) -> bytes:
        """The whole file, or `length` bytes of it from `start` (fewer only where it ends).

        A remote store's reply is checked: its length and its content, by the file's SHA-256
        `digest` or the MD5 that the store gives (see `_stored_md5`). A reply that is wrong is
        requested again, ATTEMPTS times in all. No store has a checksum of a part: that is taken
        from the `local_copy`, which was checked whole.

        Raises `StorageError` when the file is not there, cannot be reached or stays wrong, and
        `DataError` when the whole file is larger than this machine's free memory, or than `at_most`
        bytes.
        """
        fs, path = self._open_fs()
        if self.is_local:
            self._require_file(path)
            if length is not None:
                part: bytes = fs.cat_file(path, start=start, end=start + length)
                return part
            require_readable(self.uri, os.stat(path).st_size, at_most)
            content: bytes = fs.cat_file(path)
            return content
        if length is not None:
            return self.local_copy(digest).read_bytes(start, length)
        return repeated(self.uri, lambda: whole(fs, path, self.uri, digest, at_most))

    def _require_file(self, path: str) -> None:
        """`StorageError` for what a read would wait for, or never come to the end of."""
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise StorageError(f"'{self.uri}' is a pipe, a socket or a device; give a file")

    @explained("write")
    def write_bytes(self, data: bytes) -> None:
        """Write atomically: a reader sees the old content or the new, never half of it."""
        fs, path = self._open_fs()
        if not self.is_local:  # one PUT of an object store is atomic
            fs.pipe_file(path, data)
            return
        _write_local(path, [data])

    @explained("write")
    def append_bytes(self, data: bytes) -> None:
        """Add to the end of a file on a disk, for formats whose readers follow a file that grows
        and wait where it ends within a record. No other file is written like this.
        """
        if not self.is_local:
            raise StorageError(f"'{self.uri}': an object store cannot append; write the file whole")
        path = self.resolved().uri
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            file.write(data)

    @explained("read")
    def read_versioned(self) -> tuple[bytes, str] | None:
        """The content and its version, for `replace`; None where there is no such file."""
        fs, path = self._open_fs()
        if self.is_local:
            with _alone(path):
                if not os.path.exists(path):
                    return None
                with open(path, "rb") as file:
                    data = file.read()
            return data, sha256(data)
        for _ in range(ATTEMPTS):
            fs.invalidate_cache()
            try:
                before = fs.info(path)
                data = fs.cat_file(path)
                fs.invalidate_cache()
                after = fs.info(path)
            except FileNotFoundError:
                return None
            if _version(before, data) == _version(after, data):
                return data, _version(after, data)
        raise StorageError(f"'{self.uri}' changes faster than it can be read; try again later")

    @explained("read")
    def read_dated(self) -> tuple[bytes, float] | None:
        """The content and when it was written, in seconds since 1970 by the store's clock; None
        where there is no such file.
        """
        fs, path = self._open_fs()
        fs.invalidate_cache()
        try:
            return fs.cat_file(path), _written_at(fs.info(path))
        except FileNotFoundError:
            return None

    @explained("write")
    def replace(self, data: bytes, version: str | None) -> str | None:
        """Write `data` if the content still has `version`, as `read_versioned` or the last
        `replace` gave it, or if there is none and `version` is None.

        Returns the new version; None where somebody else was faster, and nothing is written. Exact
        on a disk (by a lock beside the file) and on S3 (by a conditional PUT). Other stores have no
        such request in fsspec: there, two that write within the same moment can both succeed.
        """
        fs, path = self._open_fs()
        if self.is_local:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with _alone(path):
                there = Store(path)
                now = sha256(there.read_bytes()) if os.path.exists(path) else None
                if now != version:
                    return None
                there.write_bytes(data)
            return sha256(data)
        if self.uri.startswith(("s3://", "s3a://")):
            condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
            try:
                reply = fs.pipe_file(path, data, **condition)
            except OSError as error:
                if _is_refusal(error):
                    return None
                raise
            return str(reply["ETag"])
        current = self.read_versioned()
        if (current[1] if current else None) != version:
            return None
        fs.pipe_file(path, data)
        fs.invalidate_cache()
        return _version(fs.info(path), data)

    @explained("write")
    def remove(self) -> None:
        """Delete this file, or this folder with all that is below it; nothing where there is
        none.
        """
        fs, path = self._open_fs()
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)

    @explained("write")
    def require_place(self) -> None:
        """Raise `StorageError` where a file cannot come to lie here, before the work of which it is
        to tell: a folder is here, or no folder can hold it. Writes nothing; whether an object store
        lets us write, only writing tells.
        """
        if not self.is_local:
            self.exists()
            return
        path = self.resolved().uri
        if os.path.isdir(path):
            raise StorageError(f"'{self.uri}' is a folder; name a file in it")
        folder = os.path.dirname(path)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied", folder)

    @explained("write")
    def probe(self) -> None:
        """Raise `StorageError` unless a small object can be written here and read back; folders
        made for it go again.
        """
        if self.is_local:
            with _folders_made(self.resolved().uri):
                self._probe()
        else:
            self._probe()

    def _probe(self) -> None:
        marker = self / f".dra-probe-{uuid.uuid4().hex}"
        try:
            marker.write_bytes(b"dra")
            if marker.read_bytes() != b"dra":
                raise StorageError(f"storage '{self.uri}': what was written came back different")
            fs, path = marker._open_fs()
            fs.rm_file(path)
        except StorageError as error:
            raise StorageError(str(error).replace(marker.uri, self.uri)) from None

    @explained("copy from")
    def local_copy(self, digest: str | None = None) -> Store:
        """This file on a local disk: itself, or a copy in the node's `cache`, made once however
        many processes need it.

        A file that has changed since is copied again. The copy is checked as `read_bytes` checks a
        whole file. Raises `StorageError` when the disk is too small, or the copy stays wrong.
        """
        if self.is_local:
            return self.resolved()
        info = self._info()
        version = next(
            (
                info[key]
                for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created")
                if info.get(key)
            ),
            "",
        )
        key = sha256(f"{self.uri} {info['size']} {version}".encode())
        copy = cache() / f"{key[:16]}-{self.name}"
        with open(f"{copy}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the process, however that ends
            if copy.exists():
                tally.add("cache_hits")
            else:
                self._download(copy, int(info["size"] or 0), digest)
        return copy

    @explained("copy from")
    def held(self, digest: str) -> Held:
        """This file on a local disk: itself, or a copy in the part of the node's `cache` that has
        a bound, where it stays until it is released or this process ends.

        The copy is of the file with this SHA-256, made once however many processes need it.
        Copies that nobody holds give way, the longest unused first, as soon as all of them would
        have more than DRA_CACHE_BYTES or the disk would be full. Raises what `local_copy` raises.
        """
        if self.is_local:
            path = self.resolved().uri
            return Held(path, os.open(path, os.O_RDONLY))
        folder = cache() / HELD
        copy = folder / f"{digest[:32]}-{self.name}"
        os.makedirs(folder.uri, exist_ok=True)
        with open(lock_of(copy.uri), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the process, however that ends
            if (descriptor := held(copy.uri)) is not None:
                tally.add("cache_hits")
            while descriptor is None:
                size = int(self._info()["size"] or 0)
                with room(copy.uri, size, self.uri):
                    self._download(copy, size, digest)
                descriptor = held(copy.uri)
        return Held(copy.uri, descriptor)

    def _download(self, copy: Store, size: int, digest: str | None) -> None:
        free = shutil.disk_usage(os.path.dirname(copy.uri)).free
        if free < size:
            raise StorageError(
                f"'{self.uri}' has {size:,} bytes, but '{os.path.dirname(copy.uri)}' has room for "
                f"{free:,}; set DRA_CACHE to a larger folder"
            )
        fs, path = self._open_fs()

        def download() -> None:
            info = fs.info(path)
            fs.get_file(path, f"{copy}{PARTIAL}")
            with open(f"{copy}{PARTIAL}", "rb") as file:
                check_reply(
                    fs,
                    path,
                    info,
                    byte_count(file),
                    lambda kind: hashlib.file_digest(file, kind).hexdigest(),
                    digest,
                )

        repeated(self.uri, download)
        os.replace(f"{copy}{PARTIAL}", copy.uri)
        tally.add("cache_misses")
        tally.add("fetched_bytes", size)

    # -- text, JSON, arrays, tensors ---------------------------------------------------------------
    def read_text(self) -> str:
        """Raises `DataError` where the bytes are no UTF-8, or more than TEXT_BYTES."""
        try:
            return self.read_bytes(at_most=TEXT_BYTES).decode()
        except UnicodeDecodeError:
            raise DataError(f"'{self.uri}' is not text; restore or delete it") from None

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def read_json(self, at_most: int | None = TEXT_BYTES) -> Any:
        """Raises `DataError` where the bytes are no JSON, or more than `at_most`."""
        content = self.read_bytes(at_most=at_most)
        try:
            return read_json(content)
        except (ValueError, RecursionError) as error:  # also no text, or nested too deeply
            raise DataError(
                f"'{self.uri}' is not valid JSON ({first_line(error)}); restore or delete it"
            ) from None

    def write_json(self, value: Any) -> None:
        """As `strict_json` writes it: NaN comes back as None."""
        self.write_text(strict_json(value, indent=2) + "\n")

    def read_jsonl(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self.read_text().splitlines(), 1):
            try:
                rows.append(read_json(line))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"'{self.uri}', line {number} is not valid JSON ({first_line(error)}); restore "
                    "the file"
                ) from None
        return rows

    def write_jsonl(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """A line per row, as `strict_json` writes it."""
        self.write_text("".join(strict_json(row) + "\n" for row in rows))

    def read_npz(self, digest: str | None = None) -> dict[str, np.ndarray]:
        """Arrays of an `.npz` file; object arrays (pickles) are refused. `digest` is checked as in
        `read_bytes`.

        Raises `DataError` for a damaged file, and before any array is allocated where the sizes
        that the file declares do not fit its bytes.
        """
        with self._readable("npz", digest) as file, zipfile.ZipFile(file) as archive:
            members = npy_members(archive)
            declared_bytes = sum(member.file_size for member in members.values())
            require_plausible(self.uri, declared_bytes, byte_count(file))
            for member in members.values():
                read_header(archive, member)
            return {name: read_member(archive, member) for name, member in members.items()}

    def read_npy(self) -> np.ndarray:
        """The array of an `.npy` file; object arrays (pickles) are refused.

        Raises `DataError` for a damaged file, and before the array is allocated where the file is
        shorter than its header declares.
        """
        with self._readable("npy") as file:
            return self._npy(file)

    def npy_of(self, content: bytes) -> np.ndarray:
        """What `read_npy` gives of this file, of which `content` was read."""
        with self._telling("npy"):
            return self._npy(io.BytesIO(content))

    def _npy(self, file: BinaryIO) -> np.ndarray:
        header = npy_header(file, self.name)
        require_complete(header, file)
        require_plausible(self.uri, header.array_bytes, header.array_bytes)
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)

    def npy_array(self) -> StoredArray:
        """Where the array of an `.npy` file lies, found from its header.

        Raises `DataError` for a damaged file, and for object arrays (pickles).
        """
        with self._seekable("npy") as file:
            header = npy_header(file, self.name)
            require_complete(header, file)
            return StoredArray(self.resolved().uri, header.bytes, header.dtype, header.shape)

    def write_npy(self, array: np.ndarray) -> str:
        """Write `array`, C-contiguous, and return the file's SHA-256."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(array)
        )
        parts = (header.getvalue(), array.reshape(-1).view(np.uint8).data)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        self.write_stream(parts)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _readable(self, form: str, digest: str | None = None) -> Iterator[BinaryIO]:
        """This file opened, or held in memory where it is remote; what fails to read it is a
        `DataError`."""
        with self._opened(form, lambda: io.BytesIO(self.read_bytes(digest=digest))) as file:
            yield file

    @contextlib.contextmanager
    def _seekable(self, form: str) -> Iterator[BinaryIO]:
        """This file opened, also where it is remote: then reads ask for ranges of it."""

        def remote() -> BinaryIO:
            fs, path = self._open_fs()
            file: BinaryIO = fs.open(path, "rb", block_size=STREAM_BYTES)
            return file

        with self._opened(form, remote) as file:
            yield file

    @contextlib.contextmanager
    def _opened(self, form: str, remote: Callable[[], BinaryIO]) -> Iterator[BinaryIO]:
        with self._telling(form):
            if self.is_local:
                self._require_file(self.resolved().uri)
            with open(self.resolved().uri, "rb") if self.is_local else remote() as file:
                yield file

    @contextlib.contextmanager
    def _telling(self, form: str) -> Iterator[None]:
        try:
            yield
        except DraError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise StorageError(unreachable(self.uri, error)) from None
        except Exception as error:  # a damaged file makes zipfile and numpy fail in any way
            raise DataError(
                f"'{self.uri}' is not a readable {form} file ({first_line(error)}); fetch or make "
                "it again"
            ) from None

    def npz_arrays(self) -> dict[str, StoredArray] | None:
        """Where the arrays of an `.npz` file lie, found from its headers; None when they are
        compressed. Of a remote file only headers are read.

        Raises `DataError` for a damaged file, and for object arrays (pickles).
        """
        with self._seekable("npz") as file, zipfile.ZipFile(file) as archive:
            members = npy_members(archive)
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
                return None
            path = self.resolved().uri
            return {
                name: stored_array(path, file, archive, member) for name, member in members.items()
            }

    def inflate(self, folder: Store) -> dict[str, StoredArray]:
        """Write the arrays of a compressed `.npz` file into `folder`, as NAME.npy each, in bounded
        memory; where they lie then. Those that are whole there already stay.

        Raises what `npz_arrays` raises.
        """
        with self._seekable("npz") as file, zipfile.ZipFile(file) as archive:
            members = npy_members(archive)
            for name, member in members.items():
                array = folder / f"{name}.npy"
                if array.exists() and array.size() == member.file_size:
                    continue
                require_plausible(self.uri, min(member.file_size, SMALL_BYTES), byte_count(file))
                with archive.open(member) as stream:
                    array.write_stream(iter(functools.partial(stream.read, STREAM_BYTES), b""))
            arrays = {name: (folder / f"{name}.npy").npy_array() for name in members}
            return {
                name: array._replace(header=array.offset, crc32=members[name].CRC)
                for name, array in arrays.items()
            }

    @explained("write")
    def write_stream(self, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file whose parts come one by one, atomically; an object store gets it in the
        parts of one upload.
        """
        fs, path = self._open_fs()
        if not self.is_local:
            with fs.open(path, "wb") as file:
                for part in parts:
                    file.write(part)
            return
        _write_local(path, parts)

    @explained("read")
    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """The bytes at (start, length) of each, one after another, uint8; from an object store at
        the same time. No store has a checksum of a part, so that only their lengths are checked.
        """
        fs, path = self._open_fs()
        found = np.empty(sum(length for _, length in ranges), np.uint8)
        ends = np.cumsum([length for _, length in ranges]).tolist()
        places = [found[end - length : end] for end, (_, length) in zip(ends, ranges, strict=True)]
        if self.is_local:
            with open(path, "rb", buffering=0) as file:
                lengths = [
                    os.preadv(file.fileno(), [place.data], start)
                    for place, (start, _) in zip(places, ranges, strict=True)
                ]
            _require_lengths(lengths, ranges)
            return found
        begins = [start for start, _ in ranges]
        stops = [start + length for start, length in ranges]

        def read() -> np.ndarray:
            parts = fs.cat_ranges([path] * len(ranges), begins, stops)
            for part in parts:
                if isinstance(part, Exception):
                    raise part
            _require_lengths([len(part) for part in parts], ranges)
            for place, part in zip(places, parts, strict=True):
                place[:] = np.frombuffer(part, np.uint8)
            return found

        return repeated(self.uri, read)

    def tar_members(self, text: str) -> list[TarMember]:
        """The files inside a local, uncompressed tar, in order, with the contents of those whose
        name ends in `text`.

        The list is kept in the node's `cache`, because reading the headers of ImageNet takes
        minutes. What macOS adds (see `is_clutter`) is left out. Text is UTF-8 or, with a byte order
        mark, UTF-16.

        Raises `DataError` for a damaged file, for a text of more than TEXT_BYTES and for sparse
        members.
        """
        path = self.resolved().uri
        try:
            self._require_file(path)
            status = os.stat(path)
            key = sha256(
                f"2 {path} {status.st_size} {status.st_mtime_ns} {text}".encode(
                    errors="surrogateescape"
                )
            )
            kept = cache() / f"{key[:16]}-{self.name}.json"
            if kept.exists():
                return [TarMember(*row) for row in kept.read_json(at_most=None)]
            with open(path, "rb") as file, open_tar(file) as archive:
                members = [
                    tar_member(archive, member, text)
                    for member in archive
                    if member.isfile() and not is_clutter(member.name)
                ]
        except (FileNotFoundError, PermissionError) as error:
            raise StorageError(unreachable(self.uri, error)) from None
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"'{self.uri}' is not a whole, uncompressed tar file ({first_line(error)}); fetch "
                "or make it again"
            ) from None
        if members and members[-1].offset + members[-1].size > status.st_size:
            raise DataError(
                f"'{self.uri}' ends in the middle of '{members[-1].name}'; fetch or make it again"
            )
        kept.write_json(members)
        return members

    def write_npz(self, **arrays: np.ndarray) -> None:
        """Byte-reproducible for equal arrays (numpy stamps a constant date into the archive), and
        without a copy of large ones."""
        if sum(array.nbytes for array in arrays.values()) <= AT_ONCE_BYTES:
            self.write_bytes(b"".join(_zipped(arrays)))
        else:
            self.write_stream(_zipped(arrays))

    def read_tensors(self) -> dict[str, Any]:
        """Tensors of a `.safetensors` file, on the CPU."""
        import safetensors.torch

        content = self.read_bytes()
        try:
            return safetensors.torch.load(content)
        except KeyError as error:  # a type of the format, of which PyTorch has no numbers
            reason = f"it holds numbers of type {error}"
        except Exception as error:  # a damaged header makes safetensors and torch fail in any way
            reason = what_it_is(content) or first_line(error)
        raise DataError(f"'{self.uri}' is not a readable safetensors file: {reason}")

    def write_tensors(self, tensors: Mapping[str, Any]) -> None:
        import safetensors.torch

        self.write_bytes(
            safetensors.torch.save(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            )
        )

    def read_torch(self, digest: str | None = None) -> Any:
        """A `torch.save` file, of SHA-256 `digest` if that is given: tensors and plain containers,
        never code; see `torch_from_bytes`. Torch itself checks no checksum.
        """
        return torch_from_bytes(self.read_bytes(digest=digest), self.uri)

    def write_torch(self, value: Any) -> str:
        """Returns the SHA-256 of what was written."""
        import torch

        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
        self.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    # -- Ray's own storage -------------------------------------------------------------------------
    @explained("reach")
    def for_ray(self) -> dict[str, Any]:
        """`storage_path` and `storage_filesystem` arguments of Ray's RunConfig for this folder."""
        if self.is_local:
            return {"storage_path": self.resolved().uri}
        import pyarrow.fs

        fs, path = self._open_fs()
        return {
            "storage_path": path,
            "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
        }


def _write_local(path: str, parts: Iterable[bytes | memoryview]) -> None:
    """Atomically, and on the disk when it returns."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _require_lengths(lengths: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
    for found, (start, length) in zip(lengths, ranges, strict=True):
        if found != length:
            raise WrongReply(f"{found:,} bytes from {start:,} on instead of {length:,}")


@contextlib.contextmanager
def _folders_made(path: str) -> Iterator[None]:
    """Those above and at `path` that are not there before go after the block, while empty."""
    new = []
    while path and not os.path.lexists(path):
        new.append(path)
        path = os.path.dirname(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody else has begun to use one
            for folder in new:
                os.rmdir(folder)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Nobody else of this file system is in such a block for `path`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    folder, name = os.path.split(path)
    with open(os.path.join(folder, f".{name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _written_at(info: Mapping[str, Any]) -> float:
    """Seconds since 1970; 0 where a store does not say."""
    keys = ("mtime", "LastModified", "updated", "created")
    at = next((info[key] for key in keys if info.get(key)), 0.0)
    if isinstance(at, str):
        at = datetime.datetime.fromisoformat(at)
    return at.timestamp() if isinstance(at, datetime.datetime) else float(at)


def _version(info: Mapping[str, Any], data: bytes) -> str:
    """What a store calls a version of an object; the digest of its content where it calls it
    nothing.
    """
    return str(info.get("ETag") or info.get("etag") or sha256(data))


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a store refused a conditional write: s3fs turns most of its codes into OSError."""
    while error is not None:
        reply = getattr(error, "response", None) or {}
        code = str(reply.get("Error", {}).get("Code", ""))
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            return True
        error = error.__cause__
    return False


def _local_files(folder: str, prefix: str = "") -> Iterable[tuple[str, int]]:
    """(path from `folder`, bytes): fsspec's own walk takes ten times as long on a million files."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from _local_files(entry.path, f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StorageError(unreachable(folder, error)) from None


# Bounds how long a busy S3 (503) is waited for: 3 rounds of s3fs of 4 requests of botocore, which
# pauses up to 1, 2 and 4 s between them: about 12 s and at most 23 s, instead of up to 80 s.
S3_ROUNDS, S3_REQUESTS = 3, 4


def _s3_config() -> dict[str, Any]:
    """botocore's config: retries are bounded, unless the user's environment says otherwise."""
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    if {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        return dict(given)
    return {"retries": {"mode": "standard", "total_max_attempts": S3_REQUESTS}, **given}


def cache() -> Store:
    """This node's folder for copies of remote files: DRA_CACHE, or one of the user's own below the
    temporary folder.
    """
    folder = os.environ.get("DRA_CACHE") or os.path.join(
        tempfile.gettempdir(), f"dra-cache-{os.getuid()}"
    )
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if not os.environ.get("DRA_CACHE") and os.stat(folder).st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
    except OSError as error:
        raise StorageError(
            f"cache folder '{folder}' cannot be used ({error}); set DRA_CACHE to a folder that you "
            "can write"
        ) from None
    return Store(os.path.abspath(folder))


def held_bytes() -> int:
    """Bytes of the copies in the part of this node's cache that has a bound."""
    return copied_bytes((cache() / HELD).uri)


class _Sink(io.RawIOBase):
    """A file without positions, whose contents are taken away piece by piece."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def taken(self) -> Iterator[bytes]:
        parts, self._parts = self._parts, []
        yield from parts


def _zipped(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The bytes of an `.npz` file, which begin before the last array was looked at."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays.items():
            plain = np.ascontiguousarray(array).reshape(np.shape(array))
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(plain)
                np.lib.format.write_array_header_1_0(member, header)
                content = plain.reshape(-1).view(np.uint8).data
                for begin in range(0, len(content), STREAM_BYTES):
                    member.write(content[begin : begin + STREAM_BYTES])
                    yield from sink.taken()
    yield from sink.taken()


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
