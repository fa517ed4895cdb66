"""What the terminal shows: progress bars with the time left, tables, one-line errors. Everything
but results goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dra_ray import config, runs
from dra_ray.attacks.catalogue import STAGES
from dra_ray.storage import Store
from dra_ray.sweeps import spaces

# neither markup nor wrapping: what is printed may be a path, and goes into logs and pipes
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
out = Console(
    highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200
)


class Bars:
    """Named progress bars, one per stage; without a terminal, a plain line whenever a stage moved
    on by a tenth.
    """

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=err, disable=not err.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._start = time.monotonic()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, stage: str, share: float, text: str) -> None:
        """Stage `stage` is done to `share` (0 to 1)."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(text, total=1.0)
        self._progress.update(self._tasks[stage], completed=min(share, 1.0), description=text)
        if not err.is_terminal and (share >= 1 or share - self._said.get(stage, -1.0) >= 0.1):
            self._said[stage] = share
            err.print(f"[{time.monotonic() - self._start:6.1f} s] {text}: {share:4.0%}")

    def say(self, text: str) -> None:
        (self._progress.console if err.is_terminal else err).print(text)


Row = Mapping[str, object]


def teacher_rows(bars: Bars, settings: config.TeacherTraining) -> Callable[[runs.TeacherRow], None]:
    """Rows of the control carry its accuracy where a checkpoint was written."""
    score = ""

    def show(row: runs.TeacherRow) -> None:
        nonlocal score
        if row.validation_accuracy is not None:
            score = f", {row.validation_accuracy:.1%} of noisy images"
        bars.show(
            "teacher",
            row.images_seen / settings.images_seen,
            f"teacher: loss {row.loss:.3g}{score}",
        )

    return show


def synthetic_rows(bars: Bars) -> Callable[[runs.SyntheticProgress], None]:
    def show(row: runs.SyntheticProgress) -> None:
        bars.show("synthetic", row.images / row.images_total, f"synthetic images: {row.images}")

    return show


def train_rows(
    bars: Bars, settings: config.Experiment
) -> Callable[[runs.ValidationRow | runs.StepRow], None]:
    """Rows of steps.jsonl move the bar; those of metrics.jsonl, which validate, also give the
    accuracies.
    """
    scores = ""

    def show(row: runs.ValidationRow | runs.StepRow) -> None:
        nonlocal scores
        speed = ""
        if isinstance(row, runs.ValidationRow):
            scores = f"{row.clean_accuracy:.1%} clean, {row.robust_accuracy:.1%} robust"
        else:
            speed = f"loss {row.loss:.3f}, {row.images_per_s:,.0f} images/s"
        bars.show(
            "train",
            row.epoch / settings.optim.epochs,
            "training: " + ", ".join(part for part in (scores, speed) if part),
        )

    return show


def sweep_rows(bars: Bars, settings: config.Sweep) -> Callable[[runs.RungRow], None]:
    """A trial that ASHA stopped has done all it will ever do, so its remaining epochs count as
    done.
    """
    epochs, trials, best = settings.base.optim.epochs, len(spaces.Space(settings).trials()), 0.0
    done: dict[str, int] = {}

    def show(row: runs.RungRow) -> None:
        nonlocal best
        done[row.trial] = (
            epochs if row.decision in ("stop", "failed") else max(done.get(row.trial, 0), row.epoch)
        )
        best = max(best, row.robust_accuracy or 0.0)
        if row.decision == "failed":
            bars.say(f"{row.trial} failed and is ranked last: {row.reason}")
        ended = sum(count == epochs for count in done.values())
        bars.show(
            "sweep",
            sum(done.values()) / (epochs * trials),
            f"sweep: {ended}/{trials} trials, best {best:.1%}",
        )

    return show


def evaluate_rows(bars: Bars, subjects: int) -> Callable[[dict[str, Any]], None]:
    shares: dict[str, dict[str, float]] = {}

    def show(row: dict[str, Any]) -> None:
        passes = sum(STAGES[stage].passes for stage in row["stages"])
        done = shares.setdefault(row["run"], {})
        done[row["attack"]] = row["done"] / row["of"] * STAGES[row["attack"]].passes / passes
        total = sum(sum(parts.values()) for parts in shares.values()) / subjects
        bars.show("autoattack", total, f"AutoAttack: {row['attack']} on {row['run']}")

    return show


def table(rows: Sequence[Row], title: str, json_file: str | None = None) -> None:
    """Print rows of equal keys; with `json_file`, write the same rows there as JSON."""
    if json_file:
        Store(json_file).write_json(list(rows))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        shown.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(_cell(column, row.get(column)) for column in columns))
    out.print(shown)


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2%}" if column.endswith("accuracy") else f"{value:.4g}"
    if isinstance(value, list | tuple) and column == "interval":
        return " - ".join(f"{v:.2%}" for v in value)
    return value if isinstance(value, str) else json.dumps(value)
