"""The folder of a run: its manifest, begun once, checked at every resume and updated atomically."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from dra_ray.config.base import NOT_IN_DIGEST
from dra_ray.errors import ConfigError, DataError
from dra_ray.storage import Store, masked_tree


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


def commit(folder: str | None = None) -> dict[str, str]:
    """{"commit": hash} of the checkout that this package (or `folder`) is part of, with "-dirty"
    where files differ; else {}.

    A folder that git ignores, such as an environment inside some other checkout, is no part of it.
    """
    folder = folder or os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", folder]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "."], capture_output=True, timeout=10, check=True
        )
        if not tracked.stdout:
            return {}
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return {}
    return {"commit": described.stdout.strip()}


# -- run directories -------------------------------------------------------------------------------
def begin_run(
    run: Store, kind: str, config: Mapping[str, Any], digest: str, **facts: Any
) -> dict[str, Any]:
    """Claim a run directory: its manifest, new or old. The caller returns at once when `status` is
    "done".

    Raises what `check_run` raises, and `DataError` when the run was begun on other data than
    `facts` now say: "data" as `Images.facts` gives it, "synthetic" as `Pictures` of a synthetic set
    have it. What an older manifest lacks is not compared.
    """
    manifest = check_run(run, kind, config, digest)
    if manifest is not None:
        for fact in DATA_FACTS & facts.keys():
            _require_same_data(run, fact, manifest.get(fact), facts[fact])
    if manifest is None:
        manifest = {
            "kind": kind,
            "name": run.name,
            "created": utc_now(),
            "config": config,
            "digest": digest,
            "versions": versions() | commit(),
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
    """The manifest of a run directory, None where there is none; earlier versions may have kept
    credentials inside a URI, which are masked."""
    file = run / "manifest.json"
    return masked_tree(file.read_json()) if file.exists() else None  # type: ignore[no-any-return]


def update_manifest(run: Store, **facts: Any) -> dict[str, Any]:
    """Add or replace top-level facts, such as `status="done"`."""
    manifest = {**masked_tree((run / "manifest.json").read_json()), **facts}
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


DATA_FACTS = frozenset({"data", "synthetic"})
# in this order the first difference is named: numbers say more than hashes
_COUNTS = ("num_classes", "train", "validation", "test", "images")


def _require_same_data(run: Store, fact: str, before: Any, now: Mapping[str, Any]) -> None:
    """`DataError` naming what differs between two records of the same data, as far as both have it."""
    if not isinstance(before, Mapping):
        return
    both = before.keys() & now.keys()
    parts = before.get("parts"), now.get("parts")
    changes = [
        f"{key} is {before[key]} there and {now[key]} now"
        for key in _COUNTS
        if key in both and before[key] != now[key]
    ]
    if (
        not changes
        and before.get("sha256_of") == now.get("sha256_of")
        and "sha256" in both
        and before["sha256"] != now["sha256"]
    ):
        changed = [
            part
            for part in now.get("parts", ())
            if isinstance(parts[0], Mapping) and parts[0].get(part) != now["parts"][part]
        ]
        of_parts = f" of {' and '.join(changed)}" if changed else ""
        changes = [f"the {now.get('sha256_of', 'contents')}{of_parts} are others"]
    if changes:
        raise DataError(
            f"run '{run}' was begun on other {'data' if fact == 'data' else 'synthetic images'} "
            f"({'; '.join(changes)}); "
            "restore the files, or choose another --name"
        )
