"""A sweep's plan beside what it took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dra_ray.report import words
from dra_ray.runs import Manifest, Planned
from dra_ray.sweeps.spaces import is_repeat


@dataclasses.dataclass(frozen=True)
class Against:
    """One quantity; `interval` is what early stopping and chance were expected to make of it."""

    what: str
    planned: float
    interval: tuple[float, float] | None
    spent: float

    @property
    def share(self) -> float:
        """Of the plan, that was spent."""
        return self.spent / self.planned if self.planned else 0.0

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds it; None where there is no interval."""
        return self.interval and self.interval[0] <= self.spent <= self.interval[1]


def compare(plan: Planned, spent: Mapping[str, float | None]) -> list[Against]:
    """Trials, images, seconds and money, as far as both are known."""
    rows = []
    trials = spent.get("trials")
    if trials is not None:
        rows.append(Against("trials", plan.trials, None, trials))
    for what in ("images", "seconds", "money"):
        estimate, used = getattr(plan, what), spent.get(what)
        if estimate is not None and used is not None:
            interval = (estimate.low, estimate.high)
            rows.append(Against(what, estimate.expected, interval, used))
    return rows


def spent(manifest: Manifest) -> dict[str, float | None]:
    """What a sweep that has ended, or paused, says that it took."""
    return {
        "trials": sum(not is_repeat(trial) for trial in manifest.trials),
        "images": manifest.images_seen,
        "seconds": manifest.elapsed_s,
        "money": manifest.money,
    }


def sentence(plan: Planned, rows: list[Against]) -> str:
    """In words; empty where nothing can be compared. Trials are named where more, or fewer, were
    tried than planned.
    """
    parts = [_part(row, plan) for row in rows if row.interval]
    tried = [row for row in rows if row.what == "trials" and row.spent != row.planned]
    of = f", of {tried[0].planned:g} and {tried[0].spent:g} trials" if tried else ""
    return f"Planned and taken{of}: {'; '.join(parts)}." if parts else ""


def _part(row: Against, plan: Planned) -> str:
    low, high = row.interval or (row.planned, row.planned)
    planned, least, most, used = (
        _shown(row.what, value) for value in (row.planned, low, high, row.spent)
    )
    # no share where it is of arithmetic, which alone says little of a small run
    if row.what == "seconds" and not plan.measured:
        return f"{planned} of arithmetic and {used} in all"
    unit = {"images": " images", "money": f" {plan.currency}"}.get(row.what, "")
    return f"{planned} ({least} to {most}) and {used}{unit}, {row.share:.0%} of the plan"


def _shown(what: str, value: float) -> str:
    if what == "seconds":
        return words.duration(value)
    return words.count(round(value)) if what == "images" else f"{value:,.2f}"
