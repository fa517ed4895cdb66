"""Which verdicts of stronger attacks a sweep is to have, and what they make of its order.

PGD judges every validation and decides what is stopped. Stronger attacks judge late: validations
near a trial's end, and the finalists. Their rows never enter the rungs. All of this is pure: from
the recorded rows, a driver that was killed finds the verdicts that are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dra_ray import config
from dra_ray.runs import FidelityRow, LateAttack, RungRow
from dra_ray.sweeps import equal
from dra_ray.sweeps.equal import SEEDS, Fields
from dra_ray.sweeps.resample import robust

BEST = config.Fidelity().best
STRONGEST: tuple[LateAttack, ...] = ("autoattack", "apgd")  # the most informative first

Key = tuple[str, int, LateAttack]


@dataclasses.dataclass(frozen=True)
class Contest:
    """The trials that were trained to their end, at the most `images_seen` that all of them
    reached.

    Attributes:
        standing: trial -> its validation there.
        groups: the first trial of every point -> all trials of it, which differ in the training
            seed.
        left_out: finished trials of another task.
    """

    images_seen: int
    standing: Mapping[str, RungRow]
    groups: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    def mean(self, first: str) -> tuple[float, float]:
        """Robust and clean accuracy of a point over its training seeds."""
        rows = [self.standing[name] for name in self.groups[first]]
        clean = [row.clean_accuracy for row in rows if row.clean_accuracy is not None]
        average = float(np.mean([robust(row) for row in rows]))
        return average, float(np.mean(clean)) if clean else 0.0

    def order(self) -> list[str]:
        """The points, best first."""
        return sorted(self.groups, key=lambda first: (*self.mean(first), first), reverse=True)


def contest(trials: Mapping[str, Fields], rows: Sequence[RungRow]) -> Contest | None:
    """Of a sweep's trials and its validations, in any order; None where none was trained to its
    end.
    """
    reports = equal.scored(rows)
    done = equal.finished(rows) & reports.keys() & trials.keys()
    competing = {name: reports[name] for name in equal.largest_task(trials, done)}
    seen = equal.furthest(competing)
    if seen is None:
        return None
    groups: dict[str, list[str]] = {}
    for name in competing:
        groups.setdefault(repr(sorted(point(trials[name]).items())), []).append(name)
    return Contest(
        seen,
        equal.at(seen, competing),
        {members[0]: tuple(members) for members in groups.values()},
        tuple(sorted(done - competing.keys())),
    )


def point(fields: Fields) -> dict[str, object]:
    """What a trial changes, without its seeds."""
    return {field: value for field, value in fields.items() if field not in SEEDS}


def finalists(found: Contest, trials: Mapping[str, Fields], best: int = BEST) -> list[str]:
    """The `best` points and beside them the best without alignment, best first."""
    order = found.order()
    plain = [name for name in order if trials[name].get("align.weight") == 0]
    return [*order[:best], *(name for name in plain[:1] if name not in order[:best])]


# -- what is to be judged --------------------------------------------------------------------------
def due(fidelity: config.Fidelity, rows: Iterable[RungRow], epochs: Mapping[str, int]) -> list[Key]:
    """The validations that APGD is to judge, in the order of the rows.

    Args:
        epochs: trial -> how many it trains.
    """
    if fidelity.apgd_from is None:
        return []
    keys: dict[Key, None] = {}
    for row in rows:
        scored = row.robust_accuracy is not None and row.decision != "failed"
        if scored and row.epoch >= fidelity.apgd_from * epochs.get(row.trial, row.epoch + 1):
            keys[row.trial, row.images_seen, "apgd"] = None
    return list(keys)


def due_of_finalists(
    fidelity: config.Fidelity, trials: Mapping[str, Fields], rows: Sequence[RungRow]
) -> list[Key]:
    """The validations of the finalists and their repeats that AutoAttack is to judge, best first,
    once every trial is over.
    """
    found = contest(trials, rows)
    if fidelity.finalists == "none" or found is None:
        return []
    return [
        (name, found.standing[name].images_seen, "autoattack")
        for first in finalists(found, trials, fidelity.best)
        for name in found.groups[first]
    ]


def missing(keys: Iterable[Key], late: Iterable[FidelityRow]) -> list[Key]:
    """Those without a row, be it a verdict or the reason why there is none."""
    there = {(row.trial, row.images_seen, row.attack) for row in late}
    return [key for key in keys if key not in there]


# -- what the verdicts say -------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Judged:
    """The finalists by the strongest attack that judged all of them.

    Attributes:
        contest: of the finalists alone, with that attack's verdicts in their rows.
        before: the finalists in PGD's order, best first.
        disagrees: whether two of them that PGD told apart have changed places.
    """

    attack: LateAttack
    contest: Contest
    before: tuple[str, ...]
    disagrees: bool


def judged(
    found: Contest,
    trials: Mapping[str, Fields],
    late: Iterable[FidelityRow],
    best: int = BEST,
) -> Judged | None:
    """None where no stronger attack has judged every finalist, with its repeats."""
    names = finalists(found, trials, best)
    groups = {first: found.groups[first] for first in names}
    verdicts = {
        (row.trial, row.images_seen, row.attack): row
        for row in late
        if row.robust_accuracy is not None
    }
    for attack in STRONGEST:
        standing = {}
        for name in (name for members in groups.values() for name in members):
            before = found.standing[name]
            if row := verdicts.get((name, before.images_seen, attack)):
                standing[name] = _with(before, row)
        if len(standing) == sum(map(len, groups.values())):
            now = dataclasses.replace(found, standing=standing, groups=groups)
            return Judged(attack, now, tuple(names), _disagree(found, now, names))
    return None


def _with(before: RungRow, row: FidelityRow) -> RungRow:
    """A validation with the verdicts of a stronger attack in place of PGD's."""
    return before.model_copy(
        update={
            "clean_accuracy": row.clean_accuracy,
            "robust_accuracy": row.robust_accuracy,
            "images": row.images,
            "verdicts": row.verdicts,
        }
    )


def _disagree(before: Contest, now: Contest, names: Sequence[str]) -> bool:
    """Whether a finalist that was ahead of another is now behind it."""
    was = [before.mean(name)[0] for name in names]
    is_ = [now.mean(name)[0] for name in names]
    pairs = [(a, b) for a in range(len(names)) for b in range(len(names))]
    return any(was[a] > was[b] and is_[a] < is_[b] for a, b in pairs)
