"""Reads a run directory into one plain dictionary, in which every number has a file that it came
from.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue

from dra_ray import runs
from dra_ray.config import catalogue, flatten
from dra_ray.errors import DataError
from dra_ray.evaluation import compare
from dra_ray.evaluation.result import FILE, parse
from dra_ray.inspection import state
from dra_ray.inspection.state import read_rungs
from dra_ray.pool.records import LogRow
from dra_ray.report import words
from dra_ray.report.summary import Asha, Evaluated, Scores, Stop, Summary, Trial
from dra_ray.report.words import in_percent
from dra_ray.runs import Manifest, R, RungRow, TeacherRow, ValidationRow
from dra_ray.storage import Store, masked_tree
from dra_ray.sweeps import equal
from dra_ray.sweeps.spaces import is_repeat
from dra_ray.teachers.checkpoint import CARD, WEIGHTS, build, digest, read_card

# Where the parts of a run of each kind lie, below its own folder.
PARTS: dict[str, dict[str, str]] = {
    "quickstart": {"teacher": "teacher", "synthetic": "synthetic", "sweep": "sweep"},
    "sweep": {"sweep": ""},
    "train": {"train": ""},
    "teacher": {"teacher": ""},
    "synthetic": {"synthetic": ""},
}
EVALUATION = (
    "evaluation"  # the kind of a folder without a training run, and the folder's name within one
)
RESULT = FILE
LOGS = (
    runs.METRICS,
    runs.STEPS,
    runs.RUNGS,
    runs.POOL,
)  # their rows say when they were written, as `at`


def collect(run: Store) -> Summary:
    """Everything a report needs. Raises `DataError` when the folder is neither a run nor an
    evaluation, or one of its files is damaged.
    """
    facts = _Facts(run)
    manifest = _manifest(run)
    kind = manifest.kind
    facts.values |= {
        "kind": kind,
        "name": manifest.name or run.name,
        "title": _title(run, manifest),
        "status": state.status(run, manifest),
        "created": manifest.created,
        "description": manifest.config.get("description", ""),
        "config": manifest.config,
        "versions": manifest.versions,
        "hardware": manifest.hardware,
        "stages": [stage.on_disk() for stage in manifest.stages],
        "elapsed_s": _elapsed(manifest),
    }
    if manifest.data:
        facts.put("data", manifest.data, runs.MANIFEST)
    if facts.values["stages"] or kind != EVALUATION:
        facts.cite("stages", runs.MANIFEST)
    if facts.values["elapsed_s"] is not None:
        facts.cite("elapsed_s", runs.MANIFEST)
    if facts.values["status"] != "done":
        facts.missing.append(_why(run, manifest, facts.values["status"]))
    readers = {"teacher": _teacher, "synthetic": _synthetic, "sweep": _sweep, "train": _train}
    if kind == EVALUATION:
        _evaluation(facts)
    for part, folder in PARTS.get(kind, {}).items():
        if facts.needs(_path(folder, runs.MANIFEST), part):
            readers[part](facts, folder)
    return facts.finish()


def rows(run: Store) -> list[dict[str, object]]:
    """The trial table for a terminal: one flat row per trial (one for a single training run or
    evaluation), accuracies in percent.
    """
    summary = collect(run)
    if summary.kind == EVALUATION:
        return [_evaluation_row(summary.evaluated["run"])]
    tested = {final.trial: final.autoattack_accuracy for final in summary.evaluated.values()}
    if summary.train:
        only = _trial_row(summary.name, {}, summary.train)
        return [only | {"AutoAttack %": in_percent(tested.get(summary.name))}]
    return [
        _trial_row(trial.trial, trial.fields, trial)
        | {"AutoAttack %": in_percent(tested.get(trial.trial))}
        for trial in summary.sweep
    ]


def _trial_row(name: str, fields: Mapping[str, object], scores: Scores) -> dict[str, object]:
    return {
        "trial": name,
        **fields,
        "epoch": scores.epoch,
        "images seen": scores.images_seen,
        "clean %": in_percent(scores.clean_accuracy),
        "robust %": in_percent(scores.robust_accuracy),
        "best robust %": in_percent(scores.best_robust_accuracy),
        "decision": outcome(scores),
    }


def _evaluation_row(final: Evaluated) -> dict[str, object]:
    after = {
        f"after {attack} %": in_percent(accuracy) for attack, accuracy in final.after_attack.items()
    }
    return {
        "run": final.trial,
        "images": final.images,
        "clean %": in_percent(final.clean_accuracy),
        "PGD %": in_percent(final.pgd_accuracy),
        **after,
        "AutoAttack %": in_percent(final.autoattack_accuracy),
    }


# -- reading files ---------------------------------------------------------------------------------
class _Dated(runs.Record):
    """A row of any log."""

    at: float | None = None


def read_pool(folder: Store) -> list[LogRow]:
    """Rows of pool.jsonl in order of time; empty when the run had no pool."""
    return sorted(runs.read_rows(folder / runs.POOL, LogRow), key=lambda row: row.at)


def read_metrics(folder: Store, kind: type[R]) -> list[R]:
    """Rows of metrics.jsonl: `ValidationRow` of a student, `TeacherRow` of a teacher; empty when
    nothing was logged yet.
    """
    return runs.read_rows(folder / runs.METRICS, kind)


def _manifest(run: Store) -> Manifest:
    remedy = "pass a folder written by `dra quickstart`, `dra sweep`, `dra train` or `dra evaluate`"
    manifest = runs.read_manifest(run)
    if manifest and manifest.kind in PARTS:
        return manifest
    if _evaluated(run) is not None:
        beside = manifest.on_disk() if manifest else {}
        return Manifest.model_validate({"status": "done"} | beside | {"kind": EVALUATION})
    if not manifest:
        raise DataError(f"'{run}' is not a run: it has no {runs.MANIFEST}; {remedy}")
    raise DataError(
        f"'{run / runs.MANIFEST}' is of kind {manifest.kind!r}, which no report knows; {remedy}"
    )


def _part(facts: _Facts, folder: str) -> Manifest:
    """The manifest of a part of the run, which is there."""
    manifest = runs.read_manifest(facts.at(folder))
    assert manifest is not None
    return manifest


def _title(run: Store, manifest: Manifest) -> str:
    """The run's name; of a trial, and of an evaluation within a run, after the name of what it
    belongs to.
    """
    name = manifest.name or run.name
    if sweep := state.sweep_of(run):
        return f"{sweep.name}, {name}"
    if inside := re.fullmatch(
        r"(?:.*/)?([^/]+)/evaluation(?:/([^/]+))?", run.resolved().uri.rstrip("/")
    ):
        return f"{inside[1]}, evaluation" + (f" {inside[2]}" if inside[2] else "")
    return name


def _why(run: Store, manifest: Manifest, status: str) -> str:
    """Why a run is not done, as far as its files know."""
    if reason := manifest.stopped:
        return f"training stopped: {reason}"
    sweep = state.sweep_of(run)
    if sweep and (end := state.end_of(sweep, run.name)):
        if end.decision == "failed":
            return f"sweep '{sweep.name}' ended this trial, which failed: {end.reason}"
        return (
            f"the rest of the training: sweep '{sweep.name}' stopped this trial after epoch "
            f"{end.epoch}, at {words.percent(end.robust_accuracy)} robust accuracy"
        )
    sign = _last_sign(run, manifest)
    seen = f"; its last sign of life is from {sign}" if sign else ""
    if status == "running":
        return f"the run is still running{seen}"
    return (
        f"the run is {status}{seen}. Where nothing trains it any more, the command that started it "
        "resumes it"
    )


def _last_sign(run: Store, manifest: Manifest) -> str | None:
    """When a file of the run was last added to, in UTC; None where none says so."""
    folders = {"", *PARTS.get(manifest.kind, {}).values()}
    files = [run / _path(folder, log) for folder in folders for log in LOGS]
    times = [
        row.at for file in files for row in runs.read_rows(file, _Dated)[-1:] if row.at is not None
    ]
    if not times:
        started = manifest.started_at or manifest.created
        return started or None
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC).strftime(
        "%Y-%m-%d %H:%M:%S UTC"
    )


def _evaluated(run: Store) -> str | None:
    """Where an evaluation lies below a folder: in its own folder, or right here."""
    return next(
        (folder for folder in (EVALUATION, "") if (run / _path(folder, RESULT)).exists()), None
    )


def _read_object(file: Store) -> dict[str, Any]:
    value = masked_tree(file.read_json())  # earlier versions kept URIs with credentials
    if not isinstance(value, dict):
        raise DataError(
            f"'{file}' holds a {type(value).__name__} instead of an object; restore or delete it"
        )
    return value


def _path(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _elapsed(manifest: Manifest) -> float | None:
    if manifest.elapsed_s or not manifest.stages:
        return manifest.elapsed_s or None  # 0 until the first driver of a sweep has ended
    return sum(stage.seconds for stage in manifest.stages)


# -- the parts of a run ----------------------------------------------------------------------------
class _Facts:
    """The summary while it grows: values, the file behind each of them, and what is missing."""

    def __init__(self, run: Store) -> None:
        self.run = run
        self.values: dict[str, Any] = {}
        self.sources: dict[str, list[str]] = {}
        self.missing: list[str] = []
        self.files: dict[str, str] = {}

    def at(self, folder: str) -> Store:
        return self.run / folder if folder else self.run

    def needs(self, name: str, what: str) -> bool:
        """True when the file is there; otherwise says that `what` is missing."""
        found = self.at(name).exists()
        if not found:
            self.missing.append(f"{what}: {name} is not written yet")
        return found

    def cite(self, key: str, *names: str) -> None:
        self.sources[key] = list(names)

    def put(self, key: str, values: Mapping[str, Any], *names: str) -> None:
        """Store values under `key` and note the files they came from, per number."""
        self.values.setdefault(key.split(".")[0], {})
        node = self.values
        for step in key.split("."):
            node = node.setdefault(step, {})
        node |= values
        for leaf, value in flatten(values, f"{key}."):
            if isinstance(value, int | float | list) and not isinstance(value, bool):
                self.cite(leaf, *names)

    def link(self, what: str, name: str) -> str | None:
        """Note the URI of a file or folder that exists, and return its name."""
        target = self.at(name)
        if not target.exists():
            return None
        self.files[what] = target.uri
        return name

    def finish(self) -> Summary:
        self.link("this run's manifest", runs.MANIFEST)
        self.values |= {"missing": self.missing, "files": self.files, "sources": self.sources}
        summary = Summary.model_validate(self.values)
        return summary.model_copy(update={"headline": headline(summary)})


def _teacher(facts: _Facts, folder: str) -> None:
    run = facts.at(folder)
    logged = read_metrics(run, TeacherRow)
    facts.put(
        "teacher",
        {"images_seen": logged[-1].images_seen if logged else None},
        _path(folder, runs.METRICS),
    )
    card = _path(folder, CARD)
    if facts.needs(card, "teacher"):
        facts.put(
            "teacher",
            {"params": _params(facts.at(folder)), "digest": digest(facts.at(folder))},
            card,
        )
        facts.link("teacher card", card)
    facts.link("teacher weights", _path(folder, WEIGHTS))
    sheets = [
        name
        for name in run.names()
        if name.startswith("samples-") and name.endswith(".png") and name[8:-4].isdigit()
    ]
    if sheets:
        last = max(sheets, key=lambda name: int(name[8:-4]))
        facts.values["teacher"]["samples"] = facts.link("teacher sample sheet", _path(folder, last))


def _params(teacher: Store) -> int:
    """Parameters of the network that the card describes; built without memory for its weights."""
    with torch.device("meta"):
        net = build(read_card(teacher), str(teacher / CARD))
    return sum(parameter.numel() for parameter in net.parameters())


def _synthetic(facts: _Facts, folder: str) -> None:
    name = _path(folder, runs.MANIFEST)
    manifest = _part(facts, folder)
    facts.put(
        "synthetic",
        {
            "images": manifest.images,
            "counts": manifest.counts,
        },
        name,
    )
    facts.put("synthetic.sampler", manifest.sampler, name)
    facts.values["synthetic"]["teacher_digest"] = manifest.teacher_digest
    facts.link("synthetic images", folder)
    facts.values["synthetic"]["samples"] = facts.link(
        "synthetic sample sheet", _path(folder, "samples.png")
    )


def _sweep(facts: _Facts, folder: str) -> None:
    name = _path(folder, runs.MANIFEST)
    manifest = _part(facts, folder)
    chosen = manifest.trials
    rungs = read_rungs(facts.at(folder))
    facts.needs(_path(folder, runs.RUNGS), "sweep")
    history: dict[str, list[RungRow]] = {trial: [] for trial in chosen}
    for row in rungs:
        history.setdefault(row.trial, []).append(row)
    images_per_epoch = rungs[0].images_seen // max(rungs[0].epoch, 1) if rungs else 1
    epochs = state.rungs_of(manifest.config, images_per_epoch)
    last = {row.trial: row for row in runs.read_rows(facts.at(folder) / runs.RUNGS, RungRow)}
    trials = [
        _trial(trial, chosen.get(trial, {}), reports, epochs, last.get(trial))
        for trial, reports in sorted(history.items())
    ]
    facts.missing += [
        f"{trial}: it failed and is ranked last ({row.reason or ''})"
        for trial, row in sorted(last.items())
        if row.decision == "failed"
    ]
    facts.values["sweep"] = trials
    facts.cite("sweep", name, _path(folder, runs.RUNGS))
    decisions = [trial.decision for trial in trials]
    counts = {"trials": len(trials)} | {
        key: decisions.count(decision) for key, decision in COUNTED.items()
    }
    stops = [stop.model_dump() for stop in _stops(trials)]
    facts.put("asha", counts | {"stops": stops}, name, _path(folder, runs.RUNGS))
    facts.put("asha", {"rungs": epochs}, name)
    _equal(facts, folder, rungs)
    _spent(facts, manifest, trials, name, _path(folder, runs.RUNGS))
    _pool(facts, folder)
    facts.link("sweep trials", _path(folder, "trials"))
    facts.link("rung scores", _path(folder, runs.RUNGS))
    finals = manifest.finals
    if not finals:
        facts.missing.append("finals: the sweep has not chosen its finalists yet")
    for role, final in sorted(finals.items(), reverse=True):  # DRA first
        _final(facts, role, final, chosen.get(final, {}), _path(folder, f"trials/{final}"))
    _paired(facts)


COUNTED = {
    "trained_to_the_end": "done",
    "stopped_early": "stopped",
    "unfinished": "unfinished",
    "failed": "failed",
    "not_started": "not started",
}


def _spent(facts: _Facts, manifest: Manifest, trials: list[Trial], *sources: str) -> None:
    """What the trials used up, by the names that a plan has, and the plan where there was one."""
    used: dict[str, float] = {
        "trials": sum(
            trial.images_seen is not None and not is_repeat(trial.trial) for trial in trials
        ),
        "images": sum(trial.images_seen or 0 for trial in trials),
    }
    if (elapsed_s := _elapsed(manifest)) is not None:
        used["seconds"] = elapsed_s
    if manifest.money is not None:
        used["money"] = manifest.money
    facts.put("spent", used, *sources)
    if manifest.plan is not None:
        facts.put("plan", manifest.plan.on_disk(), sources[0])


def _stops(trials: list[Trial]) -> list[Stop]:
    """Where trials were stopped, and the lowest and highest robust accuracy at which that
    happened.
    """
    stopped: dict[int, list[Trial]] = {}
    for trial in trials:
        if trial.decision == "stopped" and trial.epoch is not None:
            stopped.setdefault(trial.epoch, []).append(trial)
    return [
        Stop(
            epoch=epoch,
            rung=of_epoch[0].rung,
            trials=len(of_epoch),
            lowest=min(trial.robust_accuracy or 0.0 for trial in of_epoch),
            highest=max(trial.robust_accuracy or 0.0 for trial in of_epoch),
        )
        for epoch, of_epoch in sorted(stopped.items())
    ]


def outcome(trial: Scores) -> str:
    """What became of a trial, in words."""
    if trial.decision == "stopped" and trial.epoch is None:
        return "stopped before its first validation"
    if trial.decision != "stopped":
        return {"done": "trained to the end"}.get(trial.decision, trial.decision)
    return f"stopped {_at(trial)} at {words.percent(trial.robust_accuracy)}"


def _at(stop: Scores | Stop) -> str:
    return f"at rung {stop.rung}" if stop.rung else f"after epoch {stop.epoch}"


def _trial(
    trial: str,
    fields: Mapping[str, JsonValue],
    reports: list[RungRow],
    rungs: list[int],
    end: RungRow | None,
) -> Trial:
    """Its last validation, and what its last row makes of it, also where it ended before it had
    scores; `rung` is the number of the rung at which it stopped, None where it did not stop at one.
    """
    last = reports[-1] if reports else None
    stopped_at = last.epoch if last and last.decision == "stop" else None
    return Trial(
        trial=trial,
        fields=dict(fields),
        **_scores_of(reports),
        decision=state.of_decision(end.decision) if end else "not started",
        rung=rungs.index(stopped_at) + 1 if stopped_at in rungs else None,
    )


def _scores_of(rows: Sequence[RungRow | ValidationRow]) -> dict[str, Any]:
    """The scores of the last row and the best robust accuracy; None where there is no row."""
    last = rows[-1] if rows else None
    robust = [row.robust_accuracy for row in rows if row.robust_accuracy is not None]
    return {
        "epoch": last.epoch if last else None,
        "images_seen": last.images_seen if last else None,
        "clean_accuracy": last.clean_accuracy if last else None,
        "robust_accuracy": last.robust_accuracy if last else None,
        "best_robust_accuracy": max(robust, default=None),
    }


def _equal(facts: _Facts, folder: str, rungs: list[RungRow]) -> None:
    """The best trial with alignment against the best without, wherever the other fields and the
    epoch are equal.
    """
    trials = {trial.trial: trial.fields for trial in facts.values["sweep"]}
    matches = equal.matches(trials, equal.scores(rungs))
    if matches:
        facts.values["equal"] = [dataclasses.asdict(match) for match in matches]
        facts.cite("equal", _path(folder, runs.MANIFEST), _path(folder, runs.RUNGS))


def _pool(facts: _Facts, folder: str) -> None:
    logged = read_pool(facts.at(folder))
    if not logged:
        return
    running = [row.running for row in logged]
    replicas = [count for i, count in enumerate(running) if i == 0 or count != running[i - 1]]
    totals = {
        "requests": max(row.requests for row in logged),
        "images": max(row.images for row in logged),
        "retries": max(row.retries for row in logged),
    }
    seconds = logged[-1].at - logged[0].at
    facts.put(
        "pool",
        {"replicas": replicas, "max_running": max(running), "seconds": seconds} | totals,
        _path(folder, runs.POOL),
    )
    facts.link("pool history", _path(folder, runs.POOL))


def _train(facts: _Facts, folder: str) -> None:
    logged = read_metrics(facts.at(folder), ValidationRow)
    facts.put("train", _scores_of(logged), _path(folder, runs.METRICS))
    epochs = dict(flatten(_part(facts, folder).config)).get("optim.epochs")
    facts.put("train", {"epochs": epochs}, _path(folder, runs.MANIFEST))
    facts.values["train"] |= {"decision": facts.values["status"], "rung": None}
    if facts.values["elapsed_s"] is None and logged:
        facts.values["elapsed_s"] = logged[-1].elapsed_s
        facts.cite("elapsed_s", _path(folder, runs.METRICS))
    if not logged:
        facts.missing.append("train: metrics.jsonl has no validated epoch yet")
    _pool(facts, folder)
    _final(facts, "run", facts.values["name"], {}, folder)


def _final(facts: _Facts, role: str, trial: str, fields: Mapping[str, Any], folder: str) -> None:
    """A finalist's files and, as written by the evaluation, its test scores."""
    evaluation = _path(folder, EVALUATION)
    entry = {"run": folder, "trial": trial, "fields": dict(fields), "evaluation": evaluation}
    facts.values.setdefault("finals", {})[role] = entry
    facts.link(f"{LABELS[role]}: run", folder)
    facts.link(f"{LABELS[role]}: weights", _path(folder, "model.safetensors"))
    facts.link(f"{LABELS[role]}: checkpoints", _path(folder, "checkpoints"))
    if facts.needs(_path(evaluation, RESULT), f"AutoAttack of {trial}"):
        _scores(facts, role, evaluation)
    _others(facts, role, evaluation)


def _evaluation(facts: _Facts) -> None:
    """An evaluation alone: its versions and machine are those of the page."""
    folder, name = _evaluated(facts.run) or "", facts.values["name"]
    facts.values["finals"] = {"run": {"run": "", "trial": name, "fields": {}, "evaluation": folder}}
    _scores(facts, "run", folder)
    final = facts.values["finals"]["run"]
    facts.values["versions"] = facts.values["versions"] or final.get("versions", {})
    if facts.values["elapsed_s"] is None and "elapsed_s" in final:
        facts.values["elapsed_s"] = final["elapsed_s"]
        facts.cite("elapsed_s", _path(folder, RESULT))


NEEDED = ("images", "clean_accuracy", "autoattack_accuracy", "interval", "after_attack")
# Of later versions of the evaluation, or measured only where the config asks for it.
KEPT: tuple[str, ...] = (
    "pgd_accuracy",
    "pgd_steps",
    "pgd_restarts",
    "eot",
    "elapsed_s",
    "seed",
    "batch",
    "batch_asked",
    "attack_s",
)
KEPT += (
    "resumed_batches",
    "curve",
    "corruptions",
    "version",
    "level",
    "streams",
    "effort",
    "numerics",
    "versions",
    "subject",
    "tasks",
)


def _scores(facts: _Facts, role: str, folder: str) -> None:
    """What an evaluation in `folder` found, cost, and depends on, each number with its file."""
    name, entry = _path(folder, RESULT), facts.values["finals"][role]
    found = _read_object(facts.at(name))
    result = parse(found, facts.at(name))
    facts.put(
        f"finals.{role}",
        {key: found[key] for key in (*NEEDED, *KEPT) if found.get(key) is not None},
        name,
    )
    after = result.after_attack
    order = catalogue.in_order(set(after), result.version)
    entry["after_attack"] = {attack: after[attack] for attack in order}
    entry["flags"] = result.flags
    entry["threat"] = found.get("threat", {})
    if "settings" in found:
        facts.put(f"finals.{role}.settings", found["settings"], name)
    chunks = _path(folder, "chunks")
    if "tasks" not in entry and (tasks := _tasks(facts.at(chunks))):
        facts.put(f"finals.{role}.tasks", tasks, chunks)
    for what, file in (
        ("AutoAttack verdicts", RESULT),
        ("verdict per image", "per_sample.npz"),
        ("adversarial images", "adversarial.npz"),
    ):
        facts.link(f"{LABELS[role]}: {what}", _path(folder, file))


def _others(facts: _Facts, role: str, folder: str) -> None:
    """Evaluations of the same run with other settings, each in a folder of its own below the
    first.
    """
    names = {other: _path(folder, f"{other}/{RESULT}") for other in facts.at(folder).names()}
    names = {other: name for other, name in names.items() if facts.at(name).exists()}
    if names:
        keys = ("images", "clean_accuracy", "pgd_accuracy", "autoattack_accuracy", "interval")
        found = {other: _read_object(facts.at(name)) for other, name in names.items()}
        facts.values["finals"][role]["others"] = [
            {"name": other} | {key: found[other].get(key) for key in keys} for other in found
        ]
        facts.cite(f"finals.{role}.others", *names.values())


def _tasks(chunks: Store) -> dict[str, int]:
    """Batches, each a task, of every stage of an evaluation: the files `<stage>-<number>.npz`."""
    stages = [name.rsplit("-", 1)[0] for name in chunks.names() if name.endswith(".npz")]
    return {stage: stages.count(stage) for stage in dict.fromkeys(stages)}


LABELS = {"dra": "DRA", "baseline": "Baseline", "run": "This run"}


def _paired(facts: _Facts) -> None:
    """Compare the finalists image by image, as `dra compare` does; where they cannot be, say
    why.
    """
    finals = facts.values.get("finals", {})
    if not {"dra", "baseline"} <= set(finals):
        return
    names = [_path(finals[role]["evaluation"], "per_sample.npz") for role in ("baseline", "dra")]
    scored = all("autoattack_accuracy" in finals[role] for role in ("baseline", "dra"))
    there = [
        facts.needs(name, "paired comparison") for name in names
    ]  # a list, so that each is named
    if not all(there) or not scored:
        return
    baseline, dra = (compare.read(facts.at(finals[role]["run"])) for role in ("baseline", "dra"))
    if reason := compare.different(baseline, dra, "autoattack"):
        facts.missing.append(
            f"paired comparison: the finalists cannot be compared image by image, since {reason}; "
            "evaluate both alike"
        )
        return
    found = compare.pair(baseline, dra)
    values = {
        "images": found.images,
        "difference": found.difference,
        "interval": list(found.interval),
        "p_value": found.p_value,
        "only_dra": found.only_b,
        "only_baseline": found.only_a,
    }
    facts.put("paired", values, *reversed(names))
    fields = [finals[role]["fields"] for role in ("dra", "baseline")]
    differing = {field: list(pair) for field, pair in equal.differing(*fields).items()}
    facts.values["paired"] |= {"distinguishable": found.distinguishable, "also_differ": differing}


# -- in words --------------------------------------------------------------------------------------
def headline(summary: Summary) -> str:
    """What was run and what was found, in plain words; never claims more than the interval and the
    test allow.
    """
    return " ".join(part for part in (_what_ran(summary), _what_was_found(summary)) if part)


def _what_ran(summary: Summary) -> str:
    if summary.asha:
        return _trials(summary.asha)
    if train := summary.train:
        epoch, epochs = train.epoch, train.epochs
        of = "" if summary.status == "done" or epochs is None else f" of {words.count(epochs)}"
        return (
            f"One classifier was trained against attacks for {words.count(epoch, 'no')}{of} "
            f"epochs{_ended(summary)}."
        )
    if teacher := summary.teacher:
        return (
            "A diffusion teacher was trained on "
            f"{words.count(teacher.images_seen, 'no')} images{_ended(summary)}."
        )
    if synthetic := summary.synthetic:
        return f"{words.count(synthetic.images, 'no')} synthetic images were made."
    if final := summary.evaluated.get("run"):
        return f"One classifier was attacked on {words.count(final.images, 'no')} test images."
    return "Nothing has been run yet."


def _ended(summary: Summary) -> str:
    """How a run ended that is not done."""
    return {
        "done": "",
        "stopped": " and then stopped",
        "failed": " and then failed",
        "running": "; the run is still running",
        "unfinished": "; the run is unfinished",
    }.get(summary.status, "")


def _trials(asha: Asha) -> str:
    """How many classifiers trained how far, and where the others stopped."""
    total, done, stopped = asha.trials, asha.trained_to_the_end, asha.stopped_early
    if asha.not_started == total:
        are = "is" if total == 1 else "are"
        return (
            f"{words.number(total, 'classifier')} {are} to be trained against attacks; none has "
            "been validated yet."
        )
    told = [f"{words.count(done)} {'was' if done == 1 else 'were'} trained to the end"]
    if stopped:
        places = [
            f"{words.count(stop.trials)} {_at(stop)} at {_range(stop)}" for stop in asha.stops
        ]
        told.append(
            f"{words.count(stopped)} {'was' if stopped == 1 else 'were'} stopped early "
            f"({', '.join(places)})"
        )
    others = {
        "unfinished": asha.unfinished,
        "failed": asha.failed,
        "not started": asha.not_started,
    }
    told += [f"{words.count(number)} {text}" for text, number in others.items() if number]
    listed = f"{', '.join(told[:-1])} and {told[-1]}" if len(told) > 1 else told[0]
    return f"Of {words.number(total, 'classifier')}, {listed}."


def _range(stop: Stop) -> str:
    """Robust accuracy at which trials stopped."""
    low, high = words.percent(stop.lowest), words.percent(stop.highest)
    return low if low == high else f"{words.points(stop.lowest, sign=False)} to {high}"


def _what_was_found(summary: Summary) -> str:
    finals = summary.evaluated
    if not finals:
        return (
            ""
            if not summary.finals
            else "AutoAttack has not been run, so nothing is known about its test accuracy under "
            "attack yet."
        )
    paired = summary.paired
    if paired is None:
        kept = [
            f"{LABELS[role]} keeps {words.percent(final.autoattack_accuracy)} of {final.images}"
            for role, final in finals.items()
        ]
        return f"{' and '.join(kept)} test images right under AutoAttack."
    dra, baseline = (
        words.percent(finals[role].autoattack_accuracy) for role in ("dra", "baseline")
    )
    interval = words.span(paired.interval, sign=True)
    gap = words.points(abs(paired.difference), sign=False)
    test = f"{gap} points (95 % interval {interval}, McNemar p = {paired.p_value:.2g})"
    scores = (
        f"Under AutoAttack the best classifier with DRA keeps {dra} of {paired.images} test "
        f"images right and the best without it {baseline}:"
    )
    if paired.difference == 0:
        return f"{scores} no difference (McNemar p = {paired.p_value:.2g})."
    leader = "DRA is ahead" if paired.difference > 0 else "the baseline is ahead"
    if not paired.distinguishable:
        return (
            f"{scores} {leader} by {test}, which chance in the choice of test images can explain, "
            "so this run shows no difference."
        )
    told = f"{scores} {leader} by {test}, more than chance in the choice of test images explains."
    if paired.also_differ:
        told += (
            f" But the two also differ in {also_differ(paired.also_differ)}, so that is not "
            "what DRA alone does."
        )
    return told


def also_differ(fields: Mapping[str, Sequence[Any]]) -> str:
    """Such as `synthetic.images (4000 with DRA, 0 without)`."""
    pairs = {field: [words.value(value) for value in pair] for field, pair in fields.items()}
    return " and ".join(
        f"{field} ({dra} with DRA, {baseline} without)" for field, (dra, baseline) in pairs.items()
    )
