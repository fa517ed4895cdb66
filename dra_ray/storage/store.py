"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.

A plain path, `file://`, `s3://`, `gs://` or `memory://` all work; credentials come from the
environment, as fsspec's drivers expect. This is the only module of the package that opens files,
calls `torch.load` or reads pickles.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import numpy as np

from dra_ray.errors import DataError, DraError, StorageError
from dra_ray.storage.archives import StoredArray, TarMember, stored_array, tar_member
from dra_ray.storage.unpickle import torch_from_bytes, unpickle, what_it_is


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder at any fsspec URI; cheap to pass around, picklable, holds no connection.

    `Store("s3://bucket/runs") / "a" / "metrics.jsonl"` names a path below it.
    """

    uri: str

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
        _require_plain(self.uri)
        try:
            return fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"storage URI '{self.uri}': {error}; use a path, file://, s3:// or gs://"
            ) from None

    def resolved(self) -> Store:
        """The same folder with an absolute local path, so that workers in other directories find
        it.
        """
        if not self.is_local:
            return self
        return Store(os.path.abspath(os.path.expanduser(self.uri.removeprefix("file://"))))

    # -- bytes -------------------------------------------------------------------------------------
    def exists(self) -> bool:
        fs, path = self._open_fs()
        try:
            fs.invalidate_cache()
            return bool(fs.exists(path))
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None

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
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None
        return {
            name.removeprefix(top): int(info["size"] or 0) for name, info in sorted(found.items())
        }

    def size(self) -> int:
        """Bytes of this file."""
        return int(self._info()["size"] or 0)

    def _info(self) -> dict[str, Any]:
        fs, path = self._open_fs()
        try:
            return fs.info(path)
        except FileNotFoundError:
            raise StorageError(f"'{self.uri}' does not exist; check the URI") from None
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None

    def read_bytes(
        self, start: int = 0, length: int | None = None, digest: str | None = None
    ) -> bytes:
        """The whole file, or `length` bytes of it from `start` (fewer only where it ends).

        A remote store's reply is checked: its length, and of a whole file the content, by its
        SHA-256 `digest` or the MD5 that the store gives (see `_stored_md5`). A reply that is wrong
        is requested again, ATTEMPTS times in all.

        Raises `StorageError` when the file is not there, cannot be reached or stays wrong, and
        `DataError` when the whole file is larger than this machine's free memory.
        """
        fs, path = self._open_fs()
        try:
            if self.is_local:
                if length is not None:
                    return fs.cat_file(path, start=start, end=start + length)
                file_bytes = os.stat(path).st_size
                require_plausible(self.uri, file_bytes, file_bytes)
                return fs.cat_file(path)
            if length is not None:
                return _repeated(self.uri, lambda: _range(fs, path, start, length))
            return _repeated(self.uri, lambda: _whole(fs, path, self.uri, digest))
        except FileNotFoundError:
            raise StorageError(f"'{self.uri}' does not exist; check the URI") from None
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None

    def write_bytes(self, data: bytes) -> None:
        """Write atomically: a reader sees the old content or the new, never half of it."""
        fs, path = self._open_fs()
        try:
            if not self.is_local:  # one PUT of an object store is atomic
                fs.pipe_file(path, data)
                return
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            partial = f"{path}.{uuid.uuid4().hex}.partial"
            try:
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                if os.path.exists(partial):
                    os.unlink(partial)
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None

    def probe(self) -> None:
        """Raise `StorageError` unless a small object can be written here and read back."""
        marker = self / f".dra-probe-{uuid.uuid4().hex}"
        try:
            marker.write_bytes(b"dra")
            if marker.read_bytes() != b"dra":
                raise StorageError(f"storage '{self.uri}': what was written came back different")
            fs, path = marker._open_fs()
            fs.rm_file(path)
        except StorageError as error:
            raise StorageError(str(error).replace(marker.uri, self.uri)) from None
        except Exception as error:  # drivers raise their own kinds (botocore, gcsfs, ...)
            raise StorageError(_unreachable(self.uri, error)) from None

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
        try:
            with open(f"{copy}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the process, however that ends
                if not copy.exists():
                    self._download(copy, int(info["size"] or 0), digest)
        except OSError as error:
            raise StorageError(_unreachable(self.uri, error)) from None
        return copy

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
            fs.get_file(path, f"{copy}.partial")
            with open(f"{copy}.partial", "rb") as file:
                _check_reply(
                    fs,
                    path,
                    info,
                    _byte_count(file),
                    lambda kind: hashlib.file_digest(file, kind).hexdigest(),
                    digest,
                )

        _repeated(self.uri, download)
        os.replace(f"{copy}.partial", copy.uri)

    # -- text, JSON, arrays, tensors ---------------------------------------------------------------
    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def read_json(self) -> Any:
        try:
            return read_json(self.read_bytes())
        except json.JSONDecodeError as error:
            raise DataError(
                f"'{self.uri}' is not valid JSON ({error}); restore or delete it"
            ) from None

    def write_json(self, value: Any) -> None:
        """As `strict_json` writes it: NaN comes back as None."""
        self.write_text(strict_json(value, indent=2) + "\n")

    def read_jsonl(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self.read_text().splitlines(), 1):
            try:
                rows.append(read_json(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"'{self.uri}', line {number} is not valid JSON ({error}); restore the file"
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
            members = _npy_members(archive)
            declared_bytes = sum(member.file_size for member in members.values())
            require_plausible(self.uri, declared_bytes, _byte_count(file))
            for member in members.values():
                _read_header(archive, member)
            return {name: _read_member(archive, member) for name, member in members.items()}

    def read_npy(self) -> np.ndarray:
        """The array of an `.npy` file; object arrays (pickles) are refused.

        Raises `DataError` for a damaged file, and before the array is allocated where the file is
        shorter than its header declares.
        """
        with self._readable("npy") as file:
            header = _npy_header(file, self.name)
            if header.bytes + header.array_bytes > _byte_count(file):
                raise ValueError("it is shorter than its header declares")
            require_plausible(self.uri, header.array_bytes, header.array_bytes)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)

    @contextlib.contextmanager
    def _readable(self, form: str, digest: str | None = None) -> Iterator[BinaryIO]:
        """This file opened, or held in memory where it is remote; what fails to read it is a
        `DataError`."""
        try:
            with (
                open(self.resolved().uri, "rb")
                if self.is_local
                else io.BytesIO(self.read_bytes(digest=digest)) as file
            ):
                yield file
        except DraError:
            raise
        except FileNotFoundError:
            raise StorageError(f"'{self.uri}' does not exist; check the URI") from None
        except Exception as error:  # a damaged file makes zipfile and numpy fail in any way
            raise DataError(
                f"'{self.uri}' is not a readable {form} file ({_first_line(error)}); fetch or make "
                "it again"
            ) from None

    def npz_arrays(self) -> dict[str, StoredArray] | None:
        """Where the arrays of a local `.npz` file lie, found from its headers; None when they are
        compressed.

        Raises `DataError` for a damaged file, and for object arrays (pickles).
        """
        with self._readable("npz") as file, zipfile.ZipFile(file) as archive:
            members = _npy_members(archive)
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
                return None
            path = self.resolved().uri
            return {
                name: stored_array(path, file, archive, member) for name, member in members.items()
            }

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
            status = os.stat(path)
            key = sha256(
                f"2 {path} {status.st_size} {status.st_mtime_ns} {text}".encode(
                    errors="surrogateescape"
                )
            )
            kept = cache() / f"{key[:16]}-{self.name}.json"
            if kept.exists():
                return [TarMember(*row) for row in kept.read_json()]
            with open(path, "rb") as file, open_tar(file) as archive:
                members = [
                    tar_member(archive, member, text)
                    for member in archive
                    if member.isfile() and not is_clutter(member.name)
                ]
        except FileNotFoundError:
            raise StorageError(f"'{self.uri}' does not exist; check the URI") from None
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"'{self.uri}' is not a whole, uncompressed tar file ({_first_line(error)}); fetch "
                "or make it again"
            ) from None
        if members and members[-1].offset + members[-1].size > status.st_size:
            raise DataError(
                f"'{self.uri}' ends in the middle of '{members[-1].name}'; fetch or make it again"
            )
        kept.write_json(members)
        return members

    def write_npz(self, **arrays: np.ndarray) -> None:
        """Byte-reproducible for equal arrays (numpy stamps a constant date into the archive)."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        self.write_bytes(buffer.getvalue())

    def read_tensors(self) -> dict[str, Any]:
        """Tensors of a `.safetensors` file, on the CPU."""
        import safetensors.torch
        from safetensors import SafetensorError

        content = self.read_bytes()
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            reason = what_it_is(content) or str(error)
            raise DataError(f"'{self.uri}' is not a readable safetensors file: {reason}") from None

    def write_tensors(self, tensors: Mapping[str, Any]) -> None:
        import safetensors.torch

        self.write_bytes(
            safetensors.torch.save(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            )
        )

    def read_torch(self) -> Any:
        """A `torch.save` file: tensors and plain containers, never code; see `torch_from_bytes`."""
        return torch_from_bytes(self.read_bytes(), self.uri)

    def write_torch(self, value: Any) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.write_bytes(buffer.getvalue())

    def read_pickle(self, stand_ins: Mapping[str, Callable[..., Any]]) -> Any:
        """See `unpickle`."""
        return unpickle(self.read_bytes(), self.uri, stand_ins)

    # -- Ray's own storage -------------------------------------------------------------------------
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


# -- replies of remote stores ----------------------------------------------------------------------
ATTEMPTS, WAITS_S = 4, (0.0, 0.1, 0.5)
T = TypeVar("T")


class _WrongReply(Exception):
    """What a store sent is not what it holds; the message says in what."""


def _repeated(uri: str, read: Callable[[], T]) -> T:
    """What `read` returns, called again where a reply is wrong or breaks off; `StorageError` naming
    `uri` after ATTEMPTS."""
    for wait_s in (*WAITS_S, None):
        try:
            return read()
        except Exception as error:
            if not isinstance(error, _WrongReply) and not re.search(
                "Payload|Incomplete|Streaming|Checksum|Disconnected", type(error).__name__
            ):
                raise
            if wait_s is None:
                raise StorageError(
                    f"'{uri}' came back wrong {ATTEMPTS} times, the last time with "
                    f"{_first_line(error)}; check the network and the store"
                ) from None
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _whole(fs: fsspec.AbstractFileSystem, path: str, uri: str, digest: str | None) -> bytes:
    info = fs.info(path)
    require_plausible(uri, int(info["size"] or 0), int(info["size"] or 0))
    data = fs.cat_file(path)
    _check_reply(
        fs, path, info, len(data), lambda kind: hashlib.new(kind, data).hexdigest(), digest
    )
    return data


def _range(fs: fsspec.AbstractFileSystem, path: str, start: int, length: int) -> bytes:
    data = fs.cat_file(path, start=start, end=start + length)
    if len(data) != length:
        fs.invalidate_cache()
        expected = max(0, min(length, int(fs.info(path)["size"] or 0) - start))
        if len(data) != expected:
            raise _WrongReply(f"{len(data):,} bytes instead of {expected:,}")
    return data


def _check_reply(
    fs: fsspec.AbstractFileSystem,
    path: str,
    info: Mapping[str, Any],
    length: int,
    hashed: Callable[[str], str],
    digest: str | None,
) -> None:
    """`_WrongReply` unless a whole file of this length, and of these hashes by their names, is what
    `info` and `digest` say."""
    problem, size, md5 = "", info.get("size"), _stored_md5(fs, info)
    if size is not None and length != int(size):
        problem = f"{length:,} bytes instead of {int(size):,}"
    elif digest:
        problem = (
            ""
            if hashed("sha256") == digest
            else "contents of another SHA-256 than the one that was recorded"
        )
    elif md5 and hashed("md5") != md5 and not _has_other_etag(fs, path):
        problem = "contents of another MD5 than the store gives"
    if problem:
        fs.invalidate_cache()  # what was known of the file may be older than the file
        raise _WrongReply(problem)


def _stored_md5(fs: fsspec.AbstractFileSystem, info: Mapping[str, Any]) -> str | None:
    """The MD5 of the contents in hex, where the store gives it: S3's ETag of what was uploaded in
    one part, GCS's md5Hash."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    etag = str(info.get("ETag") or "").strip('"')
    if protocols & {"s3", "s3a"} and re.fullmatch("[0-9a-f]{32}", etag):
        return etag
    return (
        base64.b64decode(info["md5Hash"]).hex()
        if protocols & {"gs", "gcs"} and info.get("md5Hash")
        else None
    )


def _has_other_etag(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether S3 encrypts the object with a key of KMS or of the customer: its ETag is then no MD5
    (S3 API, Object)."""
    try:
        bucket, key, _ = fs.split_path(path)
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    except Exception:  # a store that cannot say has not said that it does
        return False
    return (
        str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        or "SSECustomerAlgorithm" in head
    )


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


def _free_memory_bytes() -> int:
    """What Linux can give without swapping; elsewhere all memory there is."""
    try:
        with open("/proc/meminfo", "rb") as file:
            return int(re.search(rb"MemAvailable:\s+(\d+) kB", file.read())[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _byte_count(file: BinaryIO) -> int:
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


def _npy_header(stream: IO[bytes], name: str) -> _Header:
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


def _npy_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an npz by their names."""
    return {
        member.filename.removesuffix(".npy"): member
        for member in archive.infolist()
        if member.filename.endswith(".npy") and not is_clutter(member.filename)
    }


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Header:
    with archive.open(member) as stream:
        header = _npy_header(stream, member.filename)
    if header.bytes + header.array_bytes != member.file_size:
        raise ValueError(f"{member.filename} is not of the size that its header declares")
    return header


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
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
    return tarfile.open(fileobj=_SmallReads(file), mode="r:")  # type: ignore[call-overload, no-any-return]


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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


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
        raise StorageError(_unreachable(folder, error)) from None


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


OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"})


def _require_plain(uri: str) -> None:
    """`StorageError` for a URI of an object store whose parts would silently become part of the
    objects' names."""
    scheme, separator, rest = uri.partition("://")
    problem = ""
    if not separator:
        if slip := re.match(r"([a-z][a-z0-9]+):/(?!/)", uri):
            problem = f"it is neither a path nor a URI; write {slip[1]}://"
    elif scheme in OBJECT_STORES and "::" not in uri:
        if "?" in rest:
            problem = "what follows '?' would become part of a name; leave it out, credentials come from the environment"
        elif not rest or rest.startswith("/"):
            problem = f"it names no bucket; write {scheme}://BUCKET/FOLDER"
        elif "//" in rest:
            problem = "it has a folder without a name between two slashes; write one slash"
    if problem:
        raise StorageError(f"storage URI '{uri.partition('?')[0]}': {problem}")


def _unreachable(uri: str, error: Exception) -> str:
    reason = (
        getattr(error, "strerror", None) or str(error).splitlines()[0]
        if str(error)
        else type(error).__name__
    )
    return f"storage '{uri}' cannot be reached or written ({reason}); check the path, permissions and credentials"


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads, keys sorted: what is not a number is null; infinity is 1e999,
    which reads back as infinity.

    Python's own `NaN` and `Infinity` are no JSON: jq, browsers and DuckDB refuse a whole file for
    one of them.
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)
    except ValueError:
        token = (
            uuid.uuid4().hex
        )  # stands for infinity until the text is there: json has no hook for floats
        text = json.dumps(_finite(value, token), indent=indent, sort_keys=True, allow_nan=False)
        return text.replace(f'"-{token}"', "-1e999").replace(f'"{token}"', "1e999")


def read_json(text: str | bytes) -> Any:
    """As `strict_json` wrote it; files of earlier versions may hold NaN, which is None here too."""
    return json.loads(
        text, parse_constant=lambda constant: None if constant == "NaN" else float(constant)
    )


def _finite(value: Any, infinity: str) -> Any:
    """The same tree with None for NaN and a word for infinity."""
    if isinstance(value, float):
        return (
            None
            if math.isnan(value)
            else value
            if math.isfinite(value)
            else infinity
            if value > 0
            else f"-{infinity}"
        )
    if isinstance(value, Mapping):
        return {key: _finite(item, infinity) for key, item in value.items()}
    return [_finite(item, infinity) for item in value] if isinstance(value, list | tuple) else value


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
