"""What a sweep found, from its folder: the answer, what each axis is worth and does, the front of
clean and robust accuracy, and what more would buy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dra_ray import config, runs
from dra_ray.inspection.state import read_rungs
from dra_ray.report.answers import paragraph
from dra_ray.runs import FidelityRow, Manifest, RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import effects, equal, fits, health, pareto, schedulers
from dra_ray.sweeps.answer import Answer, answer, write_recipe
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.fidelity import BEST
from dra_ray.sweeps.importance import Importance, importance

VALIDATION_IMAGES = 1024  # of a config that does not say


def _plain(value: Any) -> Any:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value


@dataclasses.dataclass(frozen=True)
class LateVerdict:
    """A stronger attack's robust accuracy beside that of the validation's PGD, fractions; None
    where there is no verdict, for a `reason`.
    """

    trial: str
    epoch: int
    attack: str
    images: int | None
    robust_accuracy: float | None
    by_pgd: float | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that is found, or a refusal in its place."""

    answer: Answer | Refused
    importance: Importance | Refused
    effects: Mapping[str, Sequence[effects.Curve]]
    front: pareto.Front | Refused
    fits: Sequence[fits.Fit | Refused]
    health: health.Health | None = None  # None where the config is of another version
    late: Sequence[LateVerdict] = ()

    def tree(self) -> dict[str, Any]:
        """Plain JSON values, with the answer in words as `paragraph`."""
        values = {name: _plain(value) for name, value in vars(self).items()}
        curves = {
            field: [dataclasses.asdict(curve) for curve in found]
            for field, found in self.effects.items()
        }
        fitted = [dataclasses.asdict(fit) for fit in self.fits]
        late = [dataclasses.asdict(verdict) for verdict in self.late]
        del values["late"]
        return (
            values
            | {"effects": curves, "fits": fitted, "paragraph": paragraph(self.answer)}
            | ({"late": late} if late else {})  # of sweeps with stronger attacks alone
        )


def find(manifest: Manifest, rows: Sequence[RungRow], late: Sequence[FidelityRow] = ()) -> Findings:
    """Of a sweep with this manifest, these rows of rungs.jsonl and those of fidelity.jsonl."""
    trials: dict[str, dict[str, Any]] = {n: dict(f) for n, f in manifest.trials.items()}
    images = validation_images(manifest.config)
    fields = sorted({field for fields in trials.values() for field in fields} - equal.SEEDS)
    curves = {field: effects.curves(field, trials, rows, images) for field in fields}
    fitted: list[fits.Fit | Refused] = []
    if "synthetic.images" in fields:
        fitted += [fits.synthetic(trials, rows, images, what) for what in fits.WHATS]
    fitted += [fits.compute(trials, rows, images, what) for what in fits.WHATS]
    return Findings(
        answer(trials, rows, images, late, best_of(manifest.config)),
        importance(trials, rows),
        {field: found for field, found in curves.items() if found},
        pareto.front(trials, rows, images),
        fitted,
        early_stopping(manifest, rows),
        _late(rows, late),
    )


def _late(rows: Sequence[RungRow], late: Sequence[FidelityRow]) -> list[LateVerdict]:
    """By trial and epoch, each beside its validation."""
    by_pgd = {(row.trial, row.images_seen): row.robust_accuracy for row in rows}
    return [
        LateVerdict(
            row.trial,
            row.epoch,
            row.attack,
            row.images,
            row.robust_accuracy,
            by_pgd.get((row.trial, row.images_seen)),
            row.reason,
        )
        for row in sorted(late, key=lambda row: (row.trial, row.epoch, row.attack))
    ]


def early_stopping(manifest: Manifest, rows: Sequence[RungRow]) -> health.Health | None:
    """What the rungs of a sweep could tell, from its reports in the order in which they came."""
    try:
        sweep = config.Sweep.model_validate(manifest.config)
    except ValidationError:
        return None
    scored = [row for row in rows if row.robust_accuracy is not None and row.epoch]
    if not scored:
        return None
    epochs = {
        name: int(str(fields.get("optim.epochs", sweep.base.optim.epochs)))
        for name, fields in manifest.trials.items()
    }
    reports = [
        schedulers.report(row, epochs[row.trial] * (row.images_seen // row.epoch))
        for row in sorted(scored, key=lambda row: row.at or 0.0)
        if row.trial in epochs
    ]
    rules = schedulers.rules(sweep, scored[0].images_seen // scored[0].epoch)
    last = {row.trial: row for row in scored}
    going = {name for name, row in last.items() if not runs.end_of(row.decision)}
    told = [report for report in reports if report is not None]
    return health.examine(told, rules, going=going)


def answered(folder: Store, sweep: config.Sweep) -> tuple[str, Store | None]:
    """What `dra sweep` ends with: the answer in words, and the winner's recipe, written into the
    sweep's folder; None where there is no winner.
    """
    manifest = runs.read_manifest(folder)
    trials: dict[str, dict[str, Any]] = {}
    if manifest:
        trials = {name: dict(fields) for name, fields in manifest.trials.items()}
    images, late = sweep.base.data.validation_images, read_late(folder)
    found = answer(trials, read_rungs(folder), images, late, sweep.fidelity.best)
    recipe = None if isinstance(found, Refused) else write_recipe(folder, sweep, found)
    return paragraph(found), recipe


def read_late(folder: Store) -> list[FidelityRow]:
    """Verdicts of stronger attacks, and why there are none; no rows of a sweep without them."""
    return runs.read_rows(folder / runs.FIDELITY, FidelityRow)


def best_of(config: Mapping[str, Any]) -> int:
    """`fidelity.best` of a sweep's whole config, as its manifest has it."""
    fidelity = config.get("fidelity")
    best = fidelity.get("best") if isinstance(fidelity, Mapping) else None
    return best if isinstance(best, int) and best > 0 else BEST


def validation_images(config: Mapping[str, Any]) -> int:
    """Of a sweep's whole config, as its manifest has it."""
    base = config.get("base")
    data = base.get("data") if isinstance(base, Mapping) else None
    count = data.get("validation_images") if isinstance(data, Mapping) else None
    return count if isinstance(count, int) and count > 0 else VALIDATION_IMAGES
