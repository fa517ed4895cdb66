"""Trials of a sweep compared like with like: after the same epoch, against the same attack, on the
same images.

Successive halving leaves trials at different epochs, and a sweep may change what a trial is
attacked with or trained on. A best value read off all of them would compare budgets or tasks, not
values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dra_ray.runs import RungRow

TASK = (
    "threat.norm",
    "threat.eps_255",
    "selection.steps",
    "selection.loss",
    "selection.step_255",
    "data.name",
    "data.uri",
    "data.resolution",
    "data.background",
    "data.validation_images",
    "data.split_seed",
)
"""Fields that decide what robust accuracy means: trials that differ in one of them do not compare.
"""

ALIGNMENT = ("align.", "teacher.", "pool.", "resources.")
"""Beginnings of fields in which a trial with alignment and its baseline may differ: the rest should
be equal.
"""

SEEDS = frozenset({"seed", "data_seed"})
"""The fields in which repeats of one trial differ: a repeat names the data seed that the first has
by default.
"""

Fields = Mapping[str, Any]
Scores = Mapping[str, Mapping[int, float]]  # trial -> epoch -> robust accuracy


@dataclasses.dataclass(frozen=True)
class Refused:
    """Why a question about a sweep has no honest answer yet, on one line."""

    reason: str


def scores(rows: Iterable[RungRow]) -> dict[str, dict[int, float]]:
    """Robust accuracy by trial and epoch."""
    robust: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.robust_accuracy is not None:
            robust.setdefault(row.trial, {})[row.epoch] = row.robust_accuracy
    return robust


def common_epoch(groups: Iterable[Iterable[str]], reported: Scores) -> int | None:
    """The last epoch after which at least one trial of every group was validated; None where there
    is none.
    """
    epochs = [{epoch for trial in group for epoch in reported.get(trial, {})} for group in groups]
    return max(set.intersection(*epochs), default=None) if epochs else None


def scored(rows: Iterable[RungRow]) -> dict[str, list[RungRow]]:
    """Trial -> its validations, ascending in `images_seen`; what was reported twice counts once."""
    reports: dict[str, dict[int, RungRow]] = {}
    for row in rows:
        if row.robust_accuracy is not None and row.decision != "failed":
            reports.setdefault(row.trial, {})[row.images_seen] = row
    return {trial: [of[seen] for seen in sorted(of)] for trial, of in reports.items()}


def at(images_seen: int, reports: Mapping[str, Sequence[RungRow]]) -> dict[str, RungRow]:
    """Trial -> its last validation at or before `images_seen`, of the trials that got that far.

    Trials of one length are validated at the same counts. Where lengths or batches differ, a
    trial is judged at most one validation early, never late.
    """
    return {
        trial: [row for row in rows if row.images_seen <= images_seen][-1]
        for trial, rows in reports.items()
        if rows and rows[0].images_seen <= images_seen <= rows[-1].images_seen
    }


def furthest(reports: Mapping[str, Sequence[RungRow]], least: int = 0) -> int | None:
    """The most `images_seen` that at least `least` trials reached, by default all of them; None
    where fewer have reports.
    """
    ends = sorted((rows[-1].images_seen for rows in reports.values() if rows), reverse=True)
    count = least or len(ends)
    return ends[count - 1] if 0 < count <= len(ends) else None


def finished(rows: Iterable[RungRow]) -> set[str]:
    """Trials that were trained to their end."""
    return {row.trial for row in rows if row.decision == "done"}


def active(fields: Fields) -> dict[str, Any]:
    """The fields that have an effect: without alignment, no teacher is asked, and how does not
    matter.
    """
    if fields.get("align.weight") != 0:
        return dict(fields)
    return {
        field: value
        for field, value in fields.items()
        if field == "align.weight" or not field.startswith(ALIGNMENT)
    }


def broad(
    trials: Mapping[str, Fields], rows: Iterable[RungRow], least: int
) -> tuple[int, dict[str, RungRow]] | Refused:
    """Trials of one task at the furthest fidelity that at least half of them, and `least`, reached.

    Further on, only what did well is left, and what an axis is worth cannot be seen among equals;
    earlier, noise decides.

    Returns: (images_seen, trial -> validation).
    """
    reports = scored(rows)
    names = largest_task(trials, reports.keys() & trials.keys())
    reports = {name: reports[name] for name in names}
    seen = furthest(reports, max(least, -(-len(names) // 2)))
    if seen is None:
        return Refused(
            f"{len(names)} trials have comparable scores, and it takes {least}; let more trials run"
        )
    return seen, at(seen, reports)


def largest_task(trials: Mapping[str, Fields], names: Iterable[str]) -> list[str]:
    """Of `names`, those of the task that most of them share, in order; the first where two tasks
    have as many.
    """
    by_task: dict[str, list[str]] = {}
    for name in sorted(names):
        by_task.setdefault(repr(task(trials.get(name, {}))), []).append(name)
    return max(by_task.values(), key=len, default=[])


def task(fields: Fields) -> dict[str, Any]:
    return {field: fields[field] for field in TASK if field in fields}


@dataclasses.dataclass(frozen=True)
class Effect:
    """Trials that differ in a field, all after `epoch` and of one `task`: trial -> robust accuracy,
    and who is left out.
    """

    epoch: int
    task: Fields
    robust_accuracy: Mapping[str, float]
    left_out: tuple[str, ...]


def effects(field: str, trials: Mapping[str, Fields], reported: Scores) -> list[Effect]:
    """How `field` matters, once per task; nothing where its values are tasks themselves, or where
    fewer than two compare.

    The epoch is the last one that some trial of every value has reached; trials that stopped before
    are left out.
    """
    if field in TASK:
        return []
    by_task: dict[str, list[str]] = {}
    for trial, fields in trials.items():
        if field in fields:
            by_task.setdefault(repr(task(fields)), []).append(trial)
    found = []
    for names in by_task.values():
        by_value: dict[str, list[str]] = {}
        for name in names:
            if reported.get(name):
                by_value.setdefault(repr(trials[name][field]), []).append(name)
        epoch = common_epoch(by_value.values(), reported)
        if len(by_value) < 2 or epoch is None:
            continue
        robust = {name: reported[name][epoch] for name in names if epoch in reported.get(name, {})}
        left_out = tuple(name for name in names if name not in robust)
        found.append(Effect(epoch, task(trials[names[0]]), robust, left_out))
    return found


@dataclasses.dataclass(frozen=True)
class Match:
    """The best trial with alignment and the best without after `epoch`, where all `shared` fields
    are equal.
    """

    epoch: int
    shared: Fields
    aligned: str
    aligned_accuracy: float
    baseline: str
    baseline_accuracy: float


def matches(trials: Mapping[str, Fields], reported: Scores) -> list[Match]:
    """Alignment against none, for every combination of the other fields of which both kinds were
    validated.
    """
    combinations: dict[str, dict[bool, list[str]]] = {}
    for trial, fields in trials.items():
        if "align.weight" in fields and reported.get(trial):
            kinds = combinations.setdefault(repr(shared(fields)), {True: [], False: []})
            kinds[fields["align.weight"] > 0].append(trial)
    found = []
    for kinds in combinations.values():
        epoch = common_epoch(kinds.values(), reported)
        if epoch is None:
            continue
        robust = {
            trial: reported[trial][epoch]
            for names in kinds.values()
            for trial in names
            if epoch in reported[trial]
        }
        best = {
            kind: max(
                (name for name in names if name in robust), key=lambda name: (robust[name], name)
            )
            for kind, names in kinds.items()
        }
        accuracies = {kind: robust[name] for kind, name in best.items()}
        found.append(
            Match(
                epoch,
                shared(trials[best[True]]),
                best[True],
                accuracies[True],
                best[False],
                accuracies[False],
            )
        )
    return found


def shared(fields: Fields) -> dict[str, Any]:
    """The fields in which a trial and its baseline should agree, in order of their names."""
    return {field: fields[field] for field in sorted(fields) if not field.startswith(ALIGNMENT)}


def differing(a: Fields, b: Fields) -> dict[str, tuple[Any, Any]]:
    """What A and B differ in besides alignment: field -> their values."""
    one, two = shared(a), shared(b)
    return {
        field: (one.get(field), two.get(field))
        for field in sorted({*one, *two})
        if one.get(field) != two.get(field)
    }
