"""The runs below a storage URI: what each is, what became of it, its age and cost."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dra_ray import runs
from dra_ray.config import flatten
from dra_ray.errors import ConfigError, DataError
from dra_ray.inspection import state
from dra_ray.runs import Manifest
from dra_ray.storage import Store

AT_ONCE = 16  # manifests that are read at the same time
UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# where a sweep and a quickstart keep the config that their trials share
_INSIDE = ("", "base.", "sweep.base.")


@dataclasses.dataclass(frozen=True)
class Listed:
    """A run in a list.

    Attributes:
        age_s: since it was begun; None where its manifest does not say when.
        images: that training has seen, over all trials, or synthetic or canonical ones that were
            made; None where that is not known before the end.
        gpu_hours: GPUs reserved times hours; 0 without GPUs.
        note: why it is damaged or how it ended, on one line.
    """

    run: str
    kind: str
    status: state.Status
    age_s: float | None
    images: int | None
    gpu_hours: float | None
    note: str | None
    uri: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Which runs to list; what is None or empty lets every run pass.

    Attributes:
        where: value by dotted field of the config; of a sweep, some trial's value.
        older_s, newer_s: bounds of the age.
    """

    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: str | None = None
    kind: str | None = None
    older_s: float | None = None
    newer_s: float | None = None

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a status that no run can have."""
        if self.status is not None and self.status not in state.STATUSES:
            raise ConfigError(f"--status {self.status}: choose from {', '.join(state.STATUSES)}")

    def passes(self, listed: Listed) -> bool:
        if self.older_s is not None and (listed.age_s is None or listed.age_s < self.older_s):
            return False
        if self.newer_s is not None and (listed.age_s is None or listed.age_s > self.newer_s):
            return False
        return self.status in (None, listed.status) and self.kind in (None, listed.kind)


def read_age(option: str, text: str) -> float:
    """Seconds of an age such as 30m, 12h, 3d or 2w; `ConfigError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if match is None:
        raise ConfigError(f"{option} {text}: write a number and m, h, d or w, such as 12h or 3d")
    return float(match[1]) * UNITS_S[match[2]]


def runs_below(storage: Store, chosen: Filter, now_s: float) -> list[Listed]:
    """The runs in the folders right below `storage` that `chosen` lets pass, newest first.

    One listing, then one manifest each, and the lease of those that are not at their end. A damaged
    manifest is listed as a failed run and hides no other. Raises `ConfigError` where no run has a
    field of `chosen.where`.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        read = [
            found
            for found in pool.map(lambda name: _read(storage / name, now_s), storage.names())
            if found is not None
        ]
    kept = [listed for listed, manifest in read if _has(manifest, chosen.where)]
    if not kept:
        _require_known(storage, chosen.where, [manifest for _, manifest in read])
    return sorted(filter(chosen.passes, kept), key=lambda listed: (listed.age_s or 0.0, listed.run))


def _read(run: Store, now_s: float) -> tuple[Listed, Manifest] | None:
    """A folder as a run; None where it is none."""
    try:
        manifest = runs.read_manifest(run)
        if manifest is None:
            return None
        status = state.status(run, manifest)
    except DataError as error:
        damaged = Listed(run.name, "?", "failed", None, None, None, str(error), run.uri)
        return damaged, Manifest()
    began_s = seconds(manifest.created)
    age_s = None if began_s is None else max(0.0, now_s - began_s)
    made = manifest.kind in ("canonical", "synthetic")
    images = manifest.images if made else manifest.images_seen
    note = manifest.stopped if status == "failed" else None
    listed = Listed(
        run.name, manifest.kind, status, age_s, images, gpu_hours(manifest), note, run.uri
    )
    return listed, manifest


def seconds(time: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time; None where a manifest has none that can be read."""
    try:
        return datetime.datetime.fromisoformat(time).timestamp() if time else None
    except ValueError:
        return None


def gpu_hours(manifest: Manifest) -> float | None:
    """GPUs reserved times hours of a run that is done; None where its manifest does not say."""
    if manifest.gpu_hours is not None:
        return manifest.gpu_hours
    resources = manifest.config.get("resources")
    if manifest.elapsed_s is None or not isinstance(resources, Mapping):
        return None
    gpus_each, workers = resources.get("gpus_per_worker"), resources.get("workers", 1)
    if not isinstance(gpus_each, int | float) or not isinstance(workers, int):
        return None
    workers = manifest.world_sizes[-1].workers if manifest.world_sizes else workers
    return gpus_each * workers * manifest.elapsed_s / 3600


# -- filtering by config ---------------------------------------------------------------------------
def _has(manifest: Manifest, where: Mapping[str, Any]) -> bool:
    return all(value in _values(manifest, field) for field, value in where.items())


def _values(manifest: Manifest, field: str) -> list[Any]:
    """What a field of a run's config is: of a sweep in each of its trials."""
    of_trials = [fields[field] for fields in manifest.trials.values() if field in fields]
    config = dict(flatten(manifest.config))
    return of_trials or [config[f"{home}{field}"] for home in _INSIDE if f"{home}{field}" in config]


def _require_known(storage: Store, where: Iterable[str], manifests: Sequence[Manifest]) -> None:
    for field in where:
        if not manifests or any(_values(manifest, field) for manifest in manifests):
            continue
        fields = {
            name.removeprefix("sweep.").removeprefix("base.")
            for manifest in manifests
            for name, _ in flatten(manifest.config)
        }
        nearest = difflib.get_close_matches(field, sorted(fields), n=1)
        remedy = f"did you mean '{nearest[0]}'?" if nearest else "see docs/fields.md"
        raise ConfigError(f"--where {field}: no run in '{storage}' has this field; {remedy}")
