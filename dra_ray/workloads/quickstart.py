"""From real images to a report: teacher, synthetic images, sweep, AutoAttack. Every stage is a run
that resumes by itself.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dra_ray import cluster, config, report
from dra_ray import runs as run_folder
from dra_ray.pool import service
from dra_ray.storage import Store
from dra_ray.workloads import evaluate, sweep, synthesize, train_teacher

# (stage, row) for every row of progress that a stage gives
Progress = Callable[[str, dict[str, Any]], None]
STAGES = ("teacher", "synthetic", "sweep", "autoattack", "report")


def run(settings: config.Quickstart, store: Store, progress: Progress | None = None) -> Store:
    """Run every stage that is not done yet below `store`; returns the report's place. Ray must be
    initialised.
    """
    store = store.resolved()
    manifest = run_folder.begin_run(
        store,
        "quickstart",
        settings.model_dump(mode="json"),
        settings.digest(),
        hardware=hardware(),
    )
    if manifest["status"] == "done" and (store / "report.html").exists():
        return store / "report.html"

    def rows(stage: str) -> Callable[[dict[str, Any]], None] | None:
        return (lambda row: progress(stage, row)) if progress else None

    with _timed(store, "teacher"):
        train_teacher.fit(settings.teacher, store / "teacher", rows("teacher"))
    with _timed(store, "synthetic"):
        wanted = config.override(settings.synthesis, {"teacher": (store / "teacher").uri})
        synthesize.run(wanted, store / "synthetic", rows("synthetic"))
    sources = {
        "base.teacher.uri": (store / "teacher").uri,
        "base.synthetic.uri": (store / "synthetic").uri,
    }
    wide = config.override(settings.sweep, sources)
    with contextlib.ExitStack() as stack:
        if wide.base.pool.kind == "pool" and not _is_done(
            store / "sweep"
        ):  # up until the end of AutoAttack, so that its log also shows it shrink
            app = stack.enter_context(
                service.serving(wide.base.teacher, wide.base.pool, store / "sweep" / "pool.jsonl")
            )
            stack.callback(_until_shrunk, app, wide.base.pool)
        with _timed(store, "sweep"):
            finals = sweep.run(wide, store / "sweep", rows("sweep"))["finals"]
        with _timed(store, "autoattack"):
            runs = [store / "sweep" / "trials" / trial for trial in finals.values()]
            evaluate.evaluate_many(runs, progress=rows("autoattack"))
    run_folder.update_manifest(store, status="done")
    return report.write(store)


def _until_shrunk(app: str, settings: config.Pool) -> None:
    """AutoAttack usually takes longer than an idle replica is kept; where it does not, wait for the
    rest of that time.
    """
    patience_s = settings.downscale_delay_s + settings.look_back_period_s + 10
    with contextlib.suppress(KeyError):
        cluster.wait_until(
            lambda: service.replicas(app).get("RUNNING", 0) <= settings.min_replicas, patience_s
        )


def _is_done(run: Store) -> bool:
    manifest = run_folder.read_manifest(run)
    return manifest is not None and manifest["status"] == "done"


def hardware() -> dict[str, Any]:
    """What the times were measured on."""
    return {"machine": platform.machine(), "cpus": os.cpu_count()}


@contextmanager
def _timed(store: Store, stage: str) -> Iterator[None]:
    """Add the stage's seconds to the manifest; a resumed stage adds up."""
    start = time.monotonic()
    try:
        yield
    finally:
        manifest = run_folder.read_manifest(store)
        assert manifest is not None
        seconds = {entry["name"]: entry["seconds"] for entry in manifest.get("stages", [])}
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 1)
        run_folder.update_manifest(
            store, stages=[{"name": name, "seconds": s} for name, s in seconds.items()]
        )
