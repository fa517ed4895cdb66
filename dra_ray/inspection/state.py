"""What became of a run, as far as its files tell: one truth for reports, lists and the status
screen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dra_ray import runs
from dra_ray.runs import Manifest, RungRow
from dra_ray.storage import Store
from dra_ray.storage.lease import has_driver
from dra_ray.sweeps.rungs import rung_epochs

Status = Literal["done", "running", "stopped", "failed", "unfinished"]
STATUSES: tuple[Status, ...] = get_args(Status)


def status(run: Store, manifest: Manifest) -> Status:
    """What became of a run or of a trial of a sweep.

    "running" while its driver holds the lease; "unfinished" is what the command that started it
    resumes; "stopped" is a trial that its sweep stopped early; "failed" would fail alike again.
    """
    if manifest.is_done:
        return "done"
    sweep = sweep_of(run)
    if sweep and (last := end_of(sweep, run.name)):
        return of_decision(last.decision)
    if manifest.stopped:
        return "failed"
    return "running" if has_driver(sweep or run) else "unfinished"


def of_decision(decision: runs.Decision, is_driven: bool = False) -> Status:
    """What the last row of a trial in rungs.jsonl makes of it; one that goes on, or waits for the
    others of its rung, is running only while the sweep's driver is.
    """
    on_its_way = is_driven and decision in ("continue", "waiting")
    going: Status = "running" if on_its_way else "unfinished"
    return runs.end_of(decision) or going


def sweep_of(run: Store) -> Store | None:
    """The sweep of a trial, whose folder is SWEEP/trials/TRIAL."""
    inside = re.fullmatch(rf"(.+)/{runs.TRIALS}/[^/]+", run.resolved().uri.rstrip("/"))
    return Store(inside[1]) if inside and (Store(inside[1]) / runs.RUNGS).exists() else None


def end_of(sweep: Store, trial: str) -> RungRow | None:
    """The row with which a sweep ended a trial before its time, stopped or failed; the trial's own
    manifest does not know of it.
    """
    of_trial = [row for row in runs.read_rows(sweep / runs.RUNGS, RungRow) if row.trial == trial]
    return of_trial[-1] if of_trial and of_trial[-1].decision in ("stop", "failed") else None


def read_rungs(sweep: Store) -> list[RungRow]:
    """Rows of rungs.jsonl by trial and epoch; a resumed sweep may report an epoch twice, and then
    the later row counts.
    """
    logged = runs.read_rows(sweep / runs.RUNGS, RungRow)
    scored = [row for row in logged if row.robust_accuracy is not None]  # not what failed before
    latest = {(row.trial, row.epoch): row for row in scored}
    return [latest[key] for key in sorted(latest)]


def rungs_of(config: Mapping[str, Any], images_per_epoch: int) -> list[int]:
    """Epochs of a sweep's rungs, as its manifest's config places them; a config that lacks a field
    has no rungs.
    """
    asha, base = config.get("asha", {}), config.get("base", {})
    return rung_epochs(
        base.get("optim", {}).get("epochs", 0),
        asha.get("grace_epochs", 0),
        asha.get("reduction_factor", 0),
        base.get("selection", {}).get("every_epochs", 1),
        images_per_epoch,
    )
