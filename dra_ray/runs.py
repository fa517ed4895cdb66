"""The folder of a run: its manifest, begun once, checked at every resume and updated atomically."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from dra_ray.config.base import NOT_IN_DIGEST
from dra_ray.errors import ConfigError
from dra_ray.storage import Store


def utc_now() -> str:
    """ISO 8601 time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, for a manifest."""
    names = (
        "dra-ray",
        "torch",
        "torchvision",
        "ray",
        "timm",
        "pyautoattack",
        "numpy",
        "fsspec",
        "s3fs",
        "pydantic",
    )
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- run directories -------------------------------------------------------------------------------
def begin_run(
    run: Store, kind: str, config: Mapping[str, Any], digest: str, **facts: Any
) -> dict[str, Any]:
    """Claim a run directory: its manifest, new or found. The caller returns at once when `status`
    is "done".

    Raises what `check_run` raises.
    """
    manifest = check_run(run, kind, config, digest)
    if manifest is None:
        manifest = {
            "kind": kind,
            "name": run.name,
            "created": utc_now(),
            "config": config,
            "digest": digest,
            "versions": versions(),
            **facts,
        }
        manifest["status"] = "running"
        (run / "manifest.json").write_json(manifest)
    return manifest


def check_run(
    run: Store, kind: str, config: Mapping[str, Any], digest: str
) -> dict[str, Any] | None:
    """The manifest of a run that this config may go on with; None where the directory is free.

    Raises `ConfigError` when the directory holds a run of another config (equal digests are the
    same run), and `StorageError` when it cannot be written.
    """
    manifest = read_manifest(run)
    if manifest is None:
        run.probe()
    elif manifest.get("kind") != kind:
        raise ConfigError(
            f"run '{run}' exists and is of kind '{manifest.get('kind')}', not '{kind}'; choose "
            "another --name"
        )
    elif manifest.get("digest") != digest:
        change = _first_change(manifest.get("config", {}), config)
        raise ConfigError(
            f"run '{run}' exists with another config ({change}); choose another --name or go back "
            "to its config"
        )
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
                return _first_change(
                    before.get(key), after.get(key), f"{field}.{key}" if field else str(key)
                )
    return f"{field} is {json.dumps(before)} there and {json.dumps(after)} now"
