"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled.

A plain path, `file://`, `s3://`, `gs://` or `memory://` all work; credentials come from the environment, as
fsspec's drivers expect. This is the only module of the package that opens files or calls `torch.load`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
import os
import platform
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import fsspec
import numpy as np

from dra_ray.errors import ConfigError, DataError, StorageError


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
        try:
            return fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise StorageError(f"storage URI '{self.uri}': {error}; use a path, file://, s3:// or gs://") from None

    def resolved(self) -> Store:
        """The same folder with an absolute local path, so that workers in other directories find it."""
        if not self.is_local:
            return self
        return Store(os.path.abspath(os.path.expanduser(self.uri.removeprefix("file://"))))

    # -- bytes ---------------------------------------------------------------------------------------------------
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
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read_bytes(self) -> bytes:
        fs, path = self._open_fs()
        try:
            return fs.cat_file(path)
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

    # -- text, JSON, arrays, tensors -----------------------------------------------------------------------------
    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def read_json(self) -> Any:
        try:
            return json.loads(self.read_bytes())
        except json.JSONDecodeError as error:
            raise DataError(f"'{self.uri}' is not valid JSON ({error}); restore or delete it") from None

    def write_json(self, value: Any) -> None:
        self.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=True) + "\n")

    def read_jsonl(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"'{self.uri}', line {number} is not valid JSON ({error}); restore the file") from None
        return rows

    def write_jsonl(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))

    def read_npz(self) -> dict[str, np.ndarray]:
        """Arrays of an `.npz` file; object arrays (pickles) are refused."""
        try:
            with np.load(io.BytesIO(self.read_bytes()), allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise DataError(f"'{self.uri}' is not a readable npz file ({error}); fetch or make it again") from None

    def write_npz(self, **arrays: np.ndarray) -> None:
        """Byte-reproducible for equal arrays (numpy stamps a constant date into the archive)."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        self.write_bytes(buffer.getvalue())

    def read_tensors(self) -> dict[str, Any]:
        """Tensors of a `.safetensors` file, on the CPU."""
        import safetensors.torch
        from safetensors import SafetensorError

        try:
            return safetensors.torch.load(self.read_bytes())
        except SafetensorError as error:
            raise DataError(f"'{self.uri}' is not a readable safetensors file ({error})") from None

    def write_tensors(self, tensors: Mapping[str, Any]) -> None:
        import safetensors.torch

        self.write_bytes(safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))

    def read_torch(self) -> Any:
        """A `torch.save` file, weights only: tensors and plain containers, never code."""
        import torch

        try:
            return torch.load(io.BytesIO(self.read_bytes()), map_location="cpu", weights_only=True)
        except StorageError:
            raise
        except Exception as error:  # a damaged file can make the unpickler fail in any way
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"'{self.uri}' is not a weights-only torch file ({first})") from None

    def write_torch(self, value: Any) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.write_bytes(buffer.getvalue())

    # -- Ray's own storage ---------------------------------------------------------------------------------------
    def for_ray(self) -> dict[str, Any]:
        """`storage_path` and `storage_filesystem` arguments of Ray's RunConfig for this folder."""
        if self.is_local:
            return {"storage_path": self.resolved().uri}
        import pyarrow.fs

        fs, path = self._open_fs()
        return {"storage_path": path, "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))}


def _unreachable(uri: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"storage '{uri}' cannot be reached or written ({reason}); check the path, permissions and credentials"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def utc_now() -> str:
    """ISO 8601 time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, for a manifest."""
    names = ("dra-ray", "torch", "torchvision", "ray", "timm", "pyautoattack", "numpy", "fsspec", "s3fs", "pydantic")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- run directories -------------------------------------------------------------------------------------------------
def begin_run(run: Store, kind: str, config: Mapping[str, Any], digest: str, **facts: Any) -> dict[str, Any]:
    """Claim a run directory: its manifest, new or found. The caller returns at once when `status` is "done".

    Raises what `check_run` raises.
    """
    manifest = check_run(run, kind, config, digest)
    if manifest is None:
        manifest = {"kind": kind, "name": run.name, "created": utc_now(), "config": config, "digest": digest, "versions": versions(), **facts}
        manifest["status"] = "running"
        (run / "manifest.json").write_json(manifest)
    return manifest


def check_run(run: Store, kind: str, config: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
    """The manifest of a run that this config may go on with; None where the directory is free.

    Raises `ConfigError` when the directory holds a run of another config (equal digests are the same run), and
    `StorageError` when it cannot be written.
    """
    manifest = read_manifest(run)
    if manifest is None:
        run.probe()
    elif manifest.get("kind") != kind:
        raise ConfigError(f"run '{run}' exists and is of kind '{manifest.get('kind')}', not '{kind}'; choose another --name")
    elif manifest.get("digest") != digest:
        change = _first_change(manifest.get("config", {}), config)
        raise ConfigError(f"run '{run}' exists with another config ({change}); choose another --name or go back to its config")
    return manifest


def read_manifest(run: Store) -> dict[str, Any] | None:
    """The manifest of a run directory, None where there is none."""
    return (run / "manifest.json").read_json() if (run / "manifest.json").exists() else None


def update_manifest(run: Store, **facts: Any) -> dict[str, Any]:
    """Add or replace top-level facts, such as `status="done"`."""
    manifest = {**(run / "manifest.json").read_json(), **facts}
    (run / "manifest.json").write_json(manifest)
    return manifest


def _first_change(before: Any, after: Any, field: str = "") -> str:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(k for k in after if k not in before)]:
            if before.get(key) != after.get(key) and key not in NOT_IN_DIGEST:
                return _first_change(before.get(key), after.get(key), f"{field}.{key}" if field else str(key))
    return f"{field} is {json.dumps(before)} there and {json.dumps(after)} now"


# fields that never change a result: two configs that differ only in these are the same run
NOT_IN_DIGEST = frozenset({"description", "paper", "pool", "resources", "workers", "cpus_per_worker", "gpus_per_worker", "max_concurrent"})
