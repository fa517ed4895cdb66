"""From real images to a report: teacher, synthetic images, sweep, AutoAttack. Every stage is a run
that resumes by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import JsonValue

from dra_ray import cluster, config, plan, report, runs
from dra_ray.inspection import diagnosis
from dra_ray.pool import service
from dra_ray.runs import RungRow, SyntheticProgress, TeacherRow
from dra_ray.storage import Store
from dra_ray.sweeps import spaces
from dra_ray.workloads import evaluate, sweep, synthesize, train_teacher

log = logging.getLogger("dra_ray")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What receives the rows of progress of each stage."""

    teacher: Callable[[TeacherRow], None] | None = None
    synthetic: Callable[[SyntheticProgress], None] | None = None
    sweep: Callable[[RungRow], None] | None = None
    autoattack: Callable[[runs.EvaluationProgress], None] | None = None


def check(settings: config.Quickstart) -> None:
    """Raise what its stages can be refused for before the first has begun; needs no Ray."""
    train_teacher.check(settings.teacher)
    plan.plan(settings)


def run(settings: config.Quickstart, store: Store, progress: Progress | None = None) -> Store:
    """Run every stage that is not done yet below `store`; returns the report's place. Ray must be
    initialised.
    """
    store = store.resolved()
    check(settings)
    manifest = runs.begin_run(
        store,
        "quickstart",
        settings.model_dump(mode="json"),
        settings.digest(),
        runs.Facts(hardware=hardware()),
    )
    if manifest.is_done and (store / runs.REPORT).exists():
        return store / runs.REPORT
    progress = progress or Progress()
    teacher, images, trials = (
        store / folder for folder in (runs.TEACHER, runs.SYNTHETIC, runs.SWEEP)
    )
    with _timed(store, "teacher"):
        train_teacher.fit(settings.teacher, teacher, progress.teacher)
    with _timed(store, "synthetic"):
        synthesis = config.override(settings.synthesis, {"teacher": teacher.uri})
        synthesize.run(synthesis, images, progress.synthetic)
    sources = {"base.teacher.uri": teacher.uri, "base.synthetic.uri": images.uri}
    wide = config.override(settings.sweep, sources)
    if not (trials / runs.MANIFEST).exists():
        for line in diagnosis.told(list(spaces.experiments(wide).values())):
            log.info(line)
    with contextlib.ExitStack() as stack:
        if wide.base.pool.kind == "pool" and not _is_done(trials):
            # up until the end of AutoAttack, so that its log also shows it shrink
            app = stack.enter_context(
                service.serving(wide.base.teacher, wide.base.pool, trials / runs.POOL)
            )
            stack.callback(_until_shrunk, app, wide.base.pool)
        with _timed(store, "sweep"):
            finals = sweep.run(wide, trials, progress.sweep).finals
        with _timed(store, "autoattack"):
            finalists = [trials / runs.TRIALS / trial for trial in finals.values()]
            evaluate.evaluate_many(finalists, progress=progress.autoattack)
    runs.update_manifest(store, runs.Facts(status="done"))
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
    manifest = runs.read_manifest(run)
    return manifest is not None and manifest.is_done


def hardware() -> dict[str, JsonValue]:
    """What the times were measured on."""
    return {"machine": platform.machine(), "cpus": os.cpu_count()}


@contextmanager
def _timed(store: Store, stage: str) -> Iterator[None]:
    """Add the stage's seconds to the manifest; a resumed stage adds up."""
    start = time.monotonic()
    try:
        yield
    finally:
        manifest = runs.read_manifest(store)
        assert manifest is not None
        seconds = {entry.name: entry.seconds for entry in manifest.stages}
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 1)
        stages = [runs.Stage(name=name, seconds=s) for name, s in seconds.items()]
        runs.update_manifest(store, runs.Facts(stages=stages))
