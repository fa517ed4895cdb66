"""Where a run is: what `dra status` shows, as records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dra_ray import runs
from dra_ray.config import flatten
from dra_ray.errors import DataError
from dra_ray.evaluation import result
from dra_ray.inspection import listing, state
from dra_ray.runs import Manifest, RungRow, StepRow, TeacherRow, ValidationRow
from dra_ray.storage import Store

PARTS = (runs.TEACHER, runs.SYNTHETIC, runs.SWEEP)  # of a quickstart
CHUNKS = "chunks"  # of an evaluation that is under way: STAGE-NUMBER.npz for each batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A student's training; accuracies in 0..1, None before the first validation."""

    epoch: float
    epochs: int | None
    images_seen: int
    loss: float | None
    images_per_s: float | None
    clean_accuracy: float | None
    robust_accuracy: float | None
    best_robust_accuracy: float | None
    remaining_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """A teacher's training."""

    images_seen: int
    images_total: int | None
    loss: float | None
    validation_accuracy: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """Trials that were validated after an epoch at which a trial can be stopped.

    Attributes:
        reached: trials with a score there.
        stopped: those that were stopped by it.
        best: the highest robust accuracy there.
    """

    epoch: int
    reached: int
    stopped: int
    best: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """Of the trials that got furthest, the most robust one."""

    trial: str
    fields: Mapping[str, Any]
    epoch: int
    clean_accuracy: float | None
    robust_accuracy: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """A part of the budget: "trials", "images", "gpu_hours" or "money".

    Attributes:
        spent: None where the run does not record it.
        limit: None where the budget does not bound it.
    """

    what: str
    spent: float | None
    limit: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweeping:
    """A sweep.

    Attributes:
        trials: how many there are.
        by_state: trials by what became of them: "running", "done", "stopped", "failed",
            "unfinished" and "not started", those without a score.
    """

    trials: int
    by_state: Mapping[str, int]
    rungs: tuple[Rung, ...]
    best: Best | None
    spent: tuple[Spent, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating:
    """An evaluation; accuracies in 0..1, None while it is under way.

    Attributes:
        batches: batches that are attacked, by stage, while it is under way.
    """

    images: int | None = None
    clean_accuracy: float | None = None
    pgd_accuracy: float | None = None
    autoattack_accuracy: float | None = None
    interval: tuple[float, float] | None = None
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overview:
    """A run; of the parts those that it has.

    Attributes:
        age_s: since it was begun.
        last_sign_s: since one of its logs grew; None where none did yet.
        why: how it ended, where that was before its time.
    """

    run: str
    kind: str
    status: state.Status
    age_s: float | None = None
    last_sign_s: float | None = None
    gpu_hours: float | None = None
    why: str | None = None
    training: Training | None = None
    teaching: Teaching | None = None
    sweeping: Sweeping | None = None
    evaluating: Evaluating | None = None
    images_made: int | None = None
    parts: tuple[Overview, ...] = ()

    @property
    def has_ended(self) -> bool:
        return self.status in ("done", "stopped", "failed")


def read(run: Store, now_s: float) -> Overview:
    """Raises `DataError` where the folder holds neither a run nor an evaluation, or one of its
    files is damaged.
    """
    manifest = runs.read_manifest(run)
    if manifest is None:
        if evaluating := _evaluating(run):
            done = evaluating.autoattack_accuracy is not None
            status: state.Status = "done" if done else "unfinished"
            return Overview(run=run.uri, kind="evaluation", status=status, evaluating=evaluating)
        raise DataError(
            f"'{run}' is not a run: it has no {runs.MANIFEST}; `dra runs` lists those that are"
        )
    status, began_s = state.status(run, manifest), listing.seconds(manifest.created)
    overview = Overview(
        run=run.uri,
        kind=manifest.kind,
        status=status,
        age_s=None if began_s is None else max(0.0, now_s - began_s),
        gpu_hours=listing.gpu_hours(manifest),
        why=_why(run, manifest, status),
    )
    if manifest.kind == "train":
        return _with_training(overview, run, manifest, now_s)
    if manifest.kind == "teacher":
        return _with_teaching(overview, run, manifest, now_s)
    if manifest.kind == "sweep":
        return _with_sweeping(overview, run, manifest, now_s)
    if manifest.kind == "quickstart":
        parts = (run / name for name in PARTS if (run / name / runs.MANIFEST).exists())
        return dataclasses.replace(overview, parts=tuple(read(part, now_s) for part in parts))
    return dataclasses.replace(overview, images_made=manifest.images)


def _why(run: Store, manifest: Manifest, status: state.Status) -> str | None:
    """How a run ended before its time."""
    if status == "failed" and manifest.stopped:
        return manifest.stopped
    sweep = state.sweep_of(run) if status in ("stopped", "failed") else None
    end = state.end_of(sweep, run.name) if sweep else None
    if sweep is None or end is None:
        return None
    return end.reason or f"sweep '{sweep.name}' stopped it after epoch {end.epoch}"


def _since(now_s: float, times: Iterable[float | None]) -> float | None:
    """Seconds since the latest of some times; None where there is none."""
    latest = max((at for at in times if at is not None), default=None)
    return None if latest is None else max(0.0, now_s - latest)


def _with_training(overview: Overview, run: Store, manifest: Manifest, now_s: float) -> Overview:
    validated = runs.read_rows(run / runs.METRICS, ValidationRow)
    steps = runs.read_rows(run / runs.STEPS, StepRow)
    last, step = validated[-1] if validated else None, steps[-1] if steps else None
    epochs = dict(flatten(manifest.config)).get("optim.epochs")
    remaining_s = None
    if last and isinstance(epochs, int) and last.epoch and not overview.has_ended:
        remaining_s = last.elapsed_s / last.epoch * (epochs - last.epoch)
    training = Training(
        epoch=max(last.epoch if last else 0, step.epoch if step else 0),
        epochs=epochs,
        images_seen=last.images_seen if last else 0,
        loss=step.loss if step else last.loss if last else None,
        images_per_s=step.images_per_s if step else None,
        clean_accuracy=last.clean_accuracy if last else None,
        robust_accuracy=last.robust_accuracy if last else None,
        best_robust_accuracy=max((row.robust_accuracy for row in validated), default=None),
        remaining_s=remaining_s,
    )
    return dataclasses.replace(
        overview,
        training=training,
        evaluating=_evaluating(run / runs.EVALUATION),
        last_sign_s=_since(now_s, [row.at for row in (last, step) if row]),
    )


def _with_teaching(overview: Overview, run: Store, manifest: Manifest, now_s: float) -> Overview:
    rows = runs.read_rows(run / runs.METRICS, TeacherRow)
    scores = [row.validation_accuracy for row in rows if row.validation_accuracy is not None]
    total = manifest.config.get("images_seen")
    teaching = Teaching(
        images_seen=rows[-1].images_seen if rows else 0,
        images_total=total if isinstance(total, int) else None,
        loss=rows[-1].loss if rows else None,
        validation_accuracy=scores[-1] if scores else None,
    )
    return dataclasses.replace(
        overview, teaching=teaching, last_sign_s=_since(now_s, [row.at for row in rows[-1:]])
    )


# -- sweeps ----------------------------------------------------------------------------------------
def _with_sweeping(overview: Overview, run: Store, manifest: Manifest, now_s: float) -> Overview:
    rows = runs.read_rows(run / runs.RUNGS, RungRow)
    latest = {row.trial: row for row in rows}
    names = list(dict.fromkeys([*manifest.trials, *latest]))
    is_driven = overview.status == "running"
    states = [
        state.of_decision(latest[name].decision, is_driven) if name in latest else "not started"
        for name in names
    ]
    sweeping = Sweeping(
        trials=len(names),
        by_state={what: states.count(what) for what in dict.fromkeys(sorted(states))},
        rungs=_rungs(manifest, rows),
        best=_best(manifest, latest.values()),
        spent=_spent(manifest, latest),
    )
    return dataclasses.replace(
        overview, sweeping=sweeping, last_sign_s=_since(now_s, [row.at for row in rows])
    )


def _rungs(manifest: Manifest, rows: list[RungRow]) -> tuple[Rung, ...]:
    first = next((row for row in rows if row.epoch), None)
    images_per_epoch = first.images_seen // first.epoch if first else 1
    reports = {(row.trial, row.epoch): row for row in rows if row.robust_accuracy is not None}
    rungs = []
    for epoch in state.rungs_of(manifest.config, images_per_epoch):
        there = [row for (_, at), row in reports.items() if at == epoch]
        rungs.append(
            Rung(
                epoch=epoch,
                reached=len(there),
                stopped=sum(row.decision == "stop" for row in there),
                best=max((row.robust_accuracy or 0.0 for row in there), default=None),
            )
        )
    return tuple(rungs)


def _best(manifest: Manifest, latest: Iterable[RungRow]) -> Best | None:
    scored = [
        (row.images_seen, row.robust_accuracy, row)
        for row in latest
        if row.robust_accuracy is not None and row.decision != "failed"
    ]
    if not scored:
        return None
    _, robust, row = max(scored, key=lambda entry: (*entry[:2], entry[2].trial))
    return Best(
        trial=row.trial,
        fields=manifest.trials.get(row.trial, {}),
        epoch=row.epoch,
        clean_accuracy=row.clean_accuracy,
        robust_accuracy=robust,
    )


def _spent(manifest: Manifest, latest: Mapping[str, RungRow]) -> tuple[Spent, ...]:
    budget = manifest.config.get("budget")
    limits = budget if isinstance(budget, Mapping) else {}
    spent = {
        "trials": float(len(latest)),
        "images": float(sum(row.images_seen for row in latest.values())),
        "gpu_hours": manifest.gpu_hours,
        "money": manifest.money,
    }
    return tuple(
        Spent(
            what=what,
            spent=_number(value),
            limit=_number(limits.get(what)),
        )
        for what, value in spent.items()
        if value is not None or limits.get(what) is not None
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# -- evaluations -----------------------------------------------------------------------------------
def _evaluating(folder: Store) -> Evaluating | None:
    """The evaluation in a folder; None where there is none."""
    file = folder / result.FILE
    if file.exists():
        done = result.parse(file.read_json(), file)
        return Evaluating(
            images=done.images,
            clean_accuracy=done.clean_accuracy,
            pgd_accuracy=done.pgd_accuracy,
            autoattack_accuracy=done.autoattack_accuracy,
            interval=done.interval,
        )
    stages = [name.rsplit("-", 1)[0] for name in (folder / CHUNKS).names() if name.endswith(".npz")]
    batches = {stage: stages.count(stage) for stage in dict.fromkeys(stages)}
    return Evaluating(batches=batches) if batches else None
