"""What each early-stopping rule costs and finds, on learning curves that are known."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from dra_ray.sweeps import simulate
from dra_ray.sweeps.simulate import Row, World

NOISE = (128, 512, 1024)  # validation images: binomial errors of 4.2, 2.1 and 1.5 points at 35 %
LIST, BUDGET = "every trial", "equal images"


@dataclass(frozen=True)
class Cell:
    """One world of the table. In `every trial` a sweep of `trials` ends by itself; in `equal
    images` twice as many are on the list, half as many train at once, and the images of half of
    `trials` are spent: four full lengths after one another, so that survivors can finish.
    """

    question: str
    world: World

    def rows(self, repeats: int, grace_epochs: int, level: float, seed: int) -> list[Row]:
        rules = simulate.rules_of(self.world, grace_epochs, level)
        return simulate.compare(self.world, rules, repeats, seed)


def cells(trials: int, noise: Sequence[int] = NOISE) -> list[Cell]:
    """The table's worlds."""
    whole = [World(trials=trials, validation_images=images) for images in noise]
    return [Cell(LIST, world) for world in whole] + [
        Cell(BUDGET, replace(world, trials=2 * trials, concurrent=4, budget=trials / 2))
        for world in whole
    ]


def compare(
    trials: int, repeats: int, grace_epochs: int, level: float, seed: int = 0
) -> list[dict[str, object]]:
    """Rows of the table: per question, noise and scheduler. Takes every core."""
    table = cells(trials)
    job = functools.partial(
        Cell.rows, repeats=repeats, grace_epochs=grace_epochs, level=level, seed=seed
    )
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return [
            _shown(cell, row)
            for cell, rows in zip(table, pool.map(job, table), strict=True)
            for row in rows
        ]


def _shown(cell: Cell, row: Row) -> dict[str, object]:
    return {
        "question": cell.question,
        "validation_images": row.validation_images,
        "scheduler": row.scheduler,
        "regret_points": _with_interval(row.regret, row.regret_interval),
        "images_percent": _with_interval(row.images, row.images_interval),
        "less_regret_than_asha": _with_interval(row.beats_asha, row.beats_asha_interval),
        "trials_started": round(row.started, 1),
    }


def _with_interval(mean: float | None, interval: tuple[float, float] | None) -> str | None:
    """Of fractions, in percent or points."""
    if mean is None or interval is None:
        return None
    low, high = interval
    return f"{100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
