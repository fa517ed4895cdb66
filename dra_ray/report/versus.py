"""Several sweeps on one page: their winners, what they spent, and how fast they got there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dra_ray import runs
from dra_ray.config import flatten
from dra_ray.errors import DataError
from dra_ray.inspection.state import read_rungs
from dra_ray.report import html, sweep_plots, words
from dra_ray.report.answers import paragraph
from dra_ray.report.findings import validation_images
from dra_ray.runs import Manifest, RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import equal
from dra_ray.sweeps.answer import Answer, answer
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.resample import Difference, difference


@dataclasses.dataclass(frozen=True)
class Entry:
    """A sweep with its answer; `course` is the best robust accuracy so far over images spent."""

    name: str
    manifest: Manifest
    rows: Sequence[RungRow]
    answer: Answer | Refused
    images: int
    course: Sequence[tuple[float, float]]

    @property
    def winner(self) -> RungRow | None:
        """The winner's validation at which it was compared."""
        if isinstance(self.answer, Refused):
            return None
        return equal.at(self.answer.images_seen, equal.scored(self.rows))[self.answer.trial]

    @property
    def task(self) -> dict[str, Any]:
        """What decides the meaning of robust accuracy, of the winner."""
        base = self.manifest.config.get("base", {})
        fields = dict(flatten(base)) if isinstance(base, Mapping) else {}
        own = self.answer.fields if isinstance(self.answer, Answer) else {}
        return equal.task({**fields, **own})


def read(folder: Store) -> Entry:
    """Raises `DataError` where the folder is no sweep; a quickstart's sweep is taken."""
    folder = folder / runs.SWEEP if (folder / runs.SWEEP / runs.RUNGS).exists() else folder
    manifest = runs.read_manifest(folder)
    if manifest is None or manifest.kind != "sweep":
        raise DataError(f"'{folder}' is not a sweep; give folders that `dra sweep` wrote")
    rows, images = read_rungs(folder), validation_images(manifest.config)
    trials: dict[str, dict[str, Any]] = {n: dict(f) for n, f in manifest.trials.items()}
    name = manifest.name or folder.name
    return Entry(name, manifest, rows, answer(trials, rows, images), images, _course(rows))


def _course(rows: Sequence[RungRow]) -> list[tuple[float, float]]:
    """(images spent by all trials, best robust accuracy so far), where it rose and at the end."""
    seen: dict[str, int] = {}
    best, course = -1.0, []
    for row in sorted(rows, key=lambda row: (row.at or 0.0, row.images_seen, row.trial)):
        seen[row.trial] = max(row.images_seen, seen.get(row.trial, 0))
        if (row.robust_accuracy or 0.0) > best:
            best = row.robust_accuracy or 0.0
            course.append((float(sum(seen.values())), best))
    return [*course, (float(sum(seen.values())), best)] if course else []


def gap(entry: Entry, other: Entry) -> Difference | str:
    """Robust accuracy of the winner of `entry` minus that of `other`, or why they do not
    compare.
    """
    one, two = entry.winner, other.winner
    if one is None or two is None:
        return "no winner yet"
    both = entry.task.keys() & other.task.keys()
    for field in sorted(both):
        if entry.task[field] != other.task[field]:
            return f"another {field}: {entry.task[field]} against {other.task[field]}"
    return difference(one, two, entry.images)


def rows(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """The table of a terminal, accuracies in percent; differences are to the first sweep."""
    return [
        dict(zip(HEAD, _row(entry, entries[0] if number else None), strict=True))
        for number, entry in enumerate(entries)
    ]


HEAD = (
    "sweep",
    "trials",
    "trained to the end",
    "images",
    "winner",
    "robust %",
    "95 % interval",
    "clean %",
    "to the first, points",
)


def _row(entry: Entry, first: Entry | None) -> list[object]:
    spent = int(entry.course[-1][0]) if entry.course else 0
    head = [entry.name, len(entry.manifest.trials), len(equal.finished(entry.rows)), spent]
    if isinstance(entry.answer, Refused):
        return [*head, None, None, None, None, None]
    return [
        *head,
        entry.answer.trial,
        words.in_percent(entry.answer.robust_accuracy),
        words.span(entry.answer.interval),
        words.in_percent(entry.answer.clean_accuracy),
        _told(gap(entry, first)) if first else None,
    ]


def _told(found: Difference | str) -> str:
    if isinstance(found, str):
        return found
    certain = "clear" if found.is_clear else "may be chance"
    interval = words.span(found.interval, sign=True)
    return f"{words.points(found.value)} ({interval}; {certain})"


def write(sweeps: Sequence[Store], to: Store) -> list[dict[str, object]]:
    """Write the page to the file `to`; returns its table. Raises `DataError` as `read` does."""
    entries = [read(folder) for folder in sweeps]
    table = rows(entries)
    names = _distinct(entries, sweeps)
    sections = [
        html.section(
            "sweeps",
            "The sweeps",
            "Each sweep's best trial. Two winners are compared image by image where both were "
            "judged on the same validation images with the same attack.",
            html.Table(HEAD, [list(row.values()) for row in table], sortable=True),
            html.plot(
                sweep_plots.courses({n: e.course for n, e in zip(names, entries, strict=True)}),
                "What the images bought",
                "The best robust accuracy of any trial so far, whatever length it trained. Higher "
                "and further left is better.",
            ),
        ),
        html.section(
            "answers",
            "Their answers",
            "",
            *(
                html.Text(paragraph(entry.answer), lead=f"{name}:")
                for name, entry in zip(names, entries, strict=True)
            ),
        ),
    ]
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} sweeps"
    headline = f"{len(entries)} sweeps side by side."
    to.write_text(html.page(title, "Comparison of sweeps", headline, sections))
    return table


def _distinct(entries: Sequence[Entry], sweeps: Sequence[Store]) -> list[str]:
    """Names, or URIs where two sweeps have one name."""
    names = [entry.name for entry in entries]
    return names if len(set(names)) == len(names) else [str(folder) for folder in sweeps]
