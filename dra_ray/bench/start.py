"""`dra bench start`: what passes between a command and its first step or batch, by part."""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from dra_ray import runs
from dra_ray.errors import RunError
from dra_ray.storage import Store

LOOK_S, MOST_S = 0.02, 600.0
# what is under way, without whose or how many
_LINE = re.compile(r"\[ *[\d.]+ s\] ([^'(:]+?)(?: '| \d|:|\(|$)")


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of one part of a start, over the rounds; `part` is what the command says it does."""

    command: str
    part: str
    seconds: float  # median
    seconds_min: float
    seconds_max: float


def measure(folder: Store, rounds: int, recipe: str, run: str | None) -> list[Row]:
    """`dra train recipe` until its first step, and `dra evaluate run` until its first batch, each
    `rounds` times in new folders; `RunError` where a command ends before that.
    """
    rows: list[Row] = []
    first = ["--set", "resources.metrics_steps=1", "--storage", folder.uri]
    commands: dict[str, tuple[list[str], Callable[[Store], bool]]] = {
        f"train {recipe}": (["train", recipe, *first], lambda to: (to / runs.STEPS).exists())
    }
    if run:
        commands[f"evaluate {run}"] = (["evaluate", run], _has_a_batch)
    for command, (words, has_begun) in commands.items():
        found: dict[str, list[float]] = {}
        for number in range(rounds):
            to = folder / f"{words[0]}-{number}"
            where = ["--name", to.name] if words[0] == "train" else ["--to", to.uri]
            for part, seconds in _parts([*words, *where], functools.partial(has_begun, to)):
                found.setdefault(part, []).append(seconds)
        rows += [
            Row(command, part, statistics.median(times), min(times), max(times))
            for part, times in found.items()
        ]
    return rows


def _has_a_batch(to: Store) -> bool:
    return any(name.endswith(".npz") for name in to.files()) if to.exists() else False


def _parts(words: Sequence[str], has_begun: Callable[[], bool]) -> list[tuple[str, float]]:
    """(what was done, seconds) in order, and the whole."""
    began = time.monotonic()
    command = [sys.executable, "-m", "dra_ray", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    said: list[tuple[float, str]] = [(0.0, "starting Python")]
    reader = threading.Thread(target=_read, args=(process, began, said), daemon=True)
    reader.start()
    try:
        while not has_begun():
            if process.poll() is not None or time.monotonic() - began > MOST_S:
                raise RunError(f"`dra {' '.join(words)}` did not begin: {said[-1][1]}")
            time.sleep(LOOK_S)
        whole = time.monotonic() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        reader.join()
    marks = [
        (at, match[1].strip()) for at, line in said if at < whole if (match := _LINE.match(line))
    ]
    marks.insert(0, said[0])
    ends = [at for at, _ in marks[1:]] + [whole]
    return [
        *((part, end - at) for (at, part), end in zip(marks, ends, strict=True)),
        ("whole", whole),
    ]


def _read(process: subprocess.Popen[str], began: float, said: list[tuple[float, str]]) -> None:
    assert process.stderr
    said.extend((time.monotonic() - began, line.strip()) for line in process.stderr)
