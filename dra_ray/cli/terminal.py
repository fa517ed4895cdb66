"""What the terminal shows: progress bars with the time left, tables, one-line errors. Everything
but results goes to stderr.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import math
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
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
from rich.table import Column
from rich.text import Text

from dra_ray import config, runs
from dra_ray.config.catalogue import STAGES
from dra_ray.config.text import printable
from dra_ray.storage import Store
from dra_ray.sweeps import spaces

# of a page: what keeps its numbers together, and logs and pipes need not have
_SPACES = str.maketrans({"\u202f": " ", "\u00a0": " "})


def plain(text: str) -> str:
    """What may be printed of a text that may be a stranger's: no control sequences but lines. The
    spaces that keep a page's numbers together are ordinary ones.
    """
    return printable(text.translate(_SPACES), "\n")


class _Plain(Console):
    """Neither markup, emoji codes nor wrapping: what is printed may be a path, and goes into logs
    and pipes; a file's name or contents may be a stranger's.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        texts = (plain(each) if isinstance(each, str) else each for each in objects)
        super().print(*texts, **how)


def _console(**where: Any) -> Console:
    return _Plain(highlight=False, markup=False, emoji=False, soft_wrap=True, **where)


err = _console(stderr=True)
alert = _console(stderr=True)  # also with --quiet
out = _console(width=None if sys.stdout.isatty() else 80)

BAR_WIDTH = 12
_BESIDE = BAR_WIDTH + 29  # what a bar's line has besides its text: spinner, share, times, gaps
STOPPING = "stopping, the checkpoint is kept"


class Bars:
    """Named progress bars, one per stage; without a terminal, a plain line whenever a stage moved
    on by a tenth.

    Until the first bar, and between bars, a line says what is waited for: `stage`, or what the
    package's logger says at level INFO. Its warnings stay on the screen. The first Ctrl-C is
    answered at once.
    """

    def __init__(self) -> None:
        text = Column(width=max(20, err.width - _BESIDE), no_wrap=True, overflow="ellipsis")
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=text),
            BarColumn(BAR_WIDTH),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
        )
        self._progress = Progress(
            *columns, console=err, disable=not err.is_terminal or err.quiet, expand=False
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._start = time.monotonic()
        self._log = _Log(self)
        self._before: Any = None

    def __enter__(self) -> Bars:
        logger = logging.getLogger("dra_ray")
        logger.addHandler(self._log)
        self._level = logger.level
        logger.setLevel(logging.INFO)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, _stop)
        self._progress.start()
        self.stage("loading torch and Ray")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        logger = logging.getLogger("dra_ray")
        logger.removeHandler(self._log)
        logger.setLevel(self._level)

    def stage(self, text: str) -> None:
        """What is waited for, with no share that is done."""
        text = plain(text)
        if not err.is_terminal:
            self._line(text)
        elif _STAGE in self._tasks:
            self._progress.update(self._tasks[_STAGE], description=text, visible=True)
        else:
            self._tasks[_STAGE] = self._progress.add_task(text, total=None)

    def show(self, stage: str, share: float, text: str) -> None:
        """Stage `stage` is done to `share` (0 to 1)."""
        text = plain(text)
        if _STAGE in self._tasks:
            self._progress.update(self._tasks[_STAGE], visible=False)
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(text, total=1.0)
        self._progress.update(self._tasks[stage], completed=min(share, 1.0), description=text)
        if not err.is_terminal and (share >= 1 or share - self._said.get(stage, -1.0) >= 0.1):
            self._said[stage] = share
            self._line(f"{text}: {share:4.0%}")

    def say(self, text: str) -> None:
        (self._progress.console if err.is_terminal else err).print(text)

    def _line(self, text: str) -> None:
        err.print(f"[{time.monotonic() - self._start:6.1f} s] {text}")


_STAGE = ""  # the task of what is waited for


class _Log(logging.Handler):
    """Hands on what the package logs: INFO to the stage, warnings to the screen."""

    def __init__(self, bars: Bars) -> None:
        super().__init__(logging.INFO)
        self._bars = bars

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._bars.stage(record.getMessage())
        elif err.quiet:
            alert.print(record.getMessage())
        else:
            self._bars.say(record.getMessage())


def _stop(number: int, frame: FrameType | None) -> None:
    """Of the first Ctrl-C; the next one is Python's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    alert.print(STOPPING)
    raise KeyboardInterrupt


@contextlib.contextmanager
def busy(text: str) -> Iterator[None]:
    """On a terminal, a line that says what is waited for, until the block ends: importing torch
    takes seconds.
    """
    shown = err.is_terminal and not err.quiet
    with err.status(Text(plain(text))) if shown else contextlib.nullcontext():
        yield


def be_quiet() -> None:
    """From here on, results, warnings and errors only."""
    err.quiet = True


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


def synthetic_rows(
    bars: Bars, price_per_hour: float | None = None
) -> Callable[[runs.SyntheticProgress], None]:
    """Images, and how many came per second over the last rows, how long the rest takes and, with a
    price of all devices in an hour, what it costs.
    """
    last: deque[runs.SyntheticProgress] = deque(maxlen=20)

    def show(row: runs.SyntheticProgress) -> None:
        last.append(row)
        text = f"synthetic images: {row.images:,} of {row.images_total:,}"
        seconds, images = row.elapsed_s - last[0].elapsed_s, row.images - last[0].images
        if seconds > 0 and images > 0:
            rate = images / seconds
            hours = (row.images_total - row.images) / rate / 3600
            left = f"{hours:,.1f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"
            text += f", {rate:,.0f} a second, {left} left"
            if price_per_hour is not None:
                text += f" for {price_per_hour * hours:,.2f}"
        bars.show("synthetic", row.images / row.images_total, text)

    return show


def canonical_rows(bars: Bars) -> Callable[[runs.SyntheticProgress], None]:
    def show(row: runs.SyntheticProgress) -> None:
        bars.show("canonical", row.images / row.images_total, f"canonical samples: {row.images}")

    return show


def analysis_rows(bars: Bars) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bars.show(
            "models", done / max(total, 1), f"batches, autoencoders and attacks: {done} of {total}"
        )

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
    done. Repeats with other seeds count from the start, as many as are known to come.
    """
    epochs, trials, best = settings.base.optim.epochs, len(spaces.Space(settings).trials()), 0.0
    done: dict[str, int] = {}
    stopped: set[str] = set()
    # the best with alignment and the best without
    finalists = len({e.align.weight > 0 for e in spaces.experiments(settings).values()})

    def expected() -> int:
        first = max(trials, sum(not spaces.is_repeat(name) for name in done))
        of_all = settings.repeats.of == "all"
        repeated = first - len(stopped) if of_all else finalists
        return first + repeated * (settings.repeats.seeds - 1)

    def show(row: runs.RungRow) -> None:
        nonlocal best
        done[row.trial] = (
            epochs if row.decision in ("stop", "failed") else max(done.get(row.trial, 0), row.epoch)
        )
        best = max(best, row.robust_accuracy or 0.0)
        if row.decision in ("stop", "failed") and not spaces.is_repeat(row.trial):
            stopped.add(row.trial)
        if row.decision == "failed":
            bars.say(f"{row.trial} failed and is ranked last: {row.reason}")
        ended = sum(count == epochs for count in done.values())
        bars.show(
            "sweep",
            sum(done.values()) / (epochs * expected()),
            f"sweep: best {best:.1%}, {ended}/{expected()} trials",
        )

    return show


def evaluate_rows(bars: Bars, subjects: int) -> Callable[[runs.EvaluationProgress], None]:
    shares: dict[str, dict[str, float]] = {}

    def show(row: runs.EvaluationProgress) -> None:
        passes = sum(STAGES[stage].passes for stage in row.stages)
        done = shares.setdefault(row.run, {})
        done[row.attack] = row.done / row.of * STAGES[row.attack].passes / passes
        total = sum(sum(parts.values()) for parts in shares.values()) / subjects
        bars.show("autoattack", total, f"AutoAttack: {row.attack} on {row.run}")

    return show


def row(record: runs.Record) -> Row:
    """A record as its file holds it, its fields in the order of their definition."""
    on_disk = record.on_disk()
    known = [field for field in type(record).model_fields if field in on_disk]
    return {field: on_disk[field] for field in (*known, *sorted(on_disk.keys() - set(known)))}


def table(
    rows: Sequence[Row], title: str, json_file: str | None = None, hidden: Sequence[str] = ()
) -> None:
    """Print rows of equal keys; with `json_file`, write the same rows there as JSON, with numbers
    as numbers.

    A table that is wider than the terminal is printed as one record after the other. `hidden`
    columns are for the file alone.
    """
    if json_file:
        Store(json_file).write_json(list(rows))
    for line in lines(rows, title, out.width, hidden):
        out.print(line)


def lines(rows: Sequence[Row], title: str, width: int, hidden: Sequence[str] = ()) -> list[str]:
    """The lines that `table` prints, of at most `width` characters unless a single name is
    longer.
    """
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if column not in hidden and any(row.get(column) is not None for row in rows)
    ]
    cells = [[cell(column, row.get(column)) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    headings = [_heading(column) for column in columns]
    above = _wrapped(title, width)
    if not columns:
        return [*above, "  (none)"]
    if widths := _widths(headings, cells, width):
        return above + _grid(headings, cells, numeric, widths)
    return above + _records(headings, cells, width)


_GAP = 2
_PROSE = 16  # columns that a text which may wrap needs at least


def _widths(headings: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Of the columns of a table: names and numbers in full, sentences wrapped. None where there is
    no room.
    """
    whole = [
        max(_longest_word(heading), *(len(row[place]) for row in cells))
        for place, heading in enumerate(headings)
    ]
    room -= _GAP * (len(headings) - 1)
    least = [
        min(whole[place], max(_PROSE, *(_longest_word(row[place]) for row in cells)))
        for place in range(len(headings))
    ]
    prose = [place for place, width in enumerate(whole) if least[place] < width]
    spare = room - sum(width for place, width in enumerate(whole) if place not in prose)
    for left, place in zip(range(len(prose), 0, -1), prose, strict=True):
        whole[place] = min(whole[place], max(least[place], spare // left))
        spare -= whole[place]
    return whole if spare >= 0 else None


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _grid(
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    numeric: Sequence[bool],
    widths: Sequence[int],
) -> list[str]:
    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return (" " * _GAP).join(padded).rstrip()

    def block(texts: Sequence[str]) -> list[str]:
        parts = [_wrapped(text, width) for text, width in zip(texts, widths, strict=True)]
        return [line(row) for row in itertools.zip_longest(*parts, fillvalue="")]

    rule = "─" * (sum(widths) + _GAP * (len(widths) - 1))
    return [*block(headings), rule, *itertools.chain.from_iterable(map(block, cells))]


def _records(headings: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """One line per field; a text goes on below itself, a name is never broken."""
    label = max(map(len, headings)) + _GAP
    shown: list[str] = []
    for row in cells:
        shown.append("")
        for heading, text in zip(headings, row, strict=True):
            for number, part in enumerate(_wrapped(text, max(_PROSE, width - label))):
                shown.append(f"{'' if number else heading:<{label}}{part}")
    return shown


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _heading(column: str) -> str:
    if column in _MOMENTS or column.endswith("_at"):
        return column.removesuffix("_at").replace("_", " ")
    return column.removesuffix("_s").replace("_", " ")


_MOMENTS = ("at", "created")
_MINUTE, _HOUR = 60, 3600


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def cell(column: str, value: object) -> str:
    """A value as people write it; the column's name says what it is: an accuracy, seconds, a
    moment.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(column, value)
    if isinstance(value, list | tuple):
        if column == "interval":
            return " - ".join(f"{v:.2%}" for v in value)
        return ", ".join(cell(column, v) for v in value)
    return printable(value) if isinstance(value, str) else json.dumps(value)


def _number(column: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if column.endswith("accuracy"):
        return f"{value:.2%}"
    if column.endswith("share"):
        return f"{value:.1%}"
    if (column in _MOMENTS or column.endswith("_at")) and value > 1e9:
        return datetime.datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")
    if column.endswith("_s") and not column.endswith("per_s"):
        return duration(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as 0.034 s, 12.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < _MINUTE:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    whole = round(seconds / _MINUTE)
    return f"{whole // 60:,} h {whole % 60:02d} min"
