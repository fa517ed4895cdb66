"""What a trial of a sweep costs besides its training: processes, imports, data and checkpoints; in
a process of its own and on Ray Train.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray  # noqa: F401  # brings psutil along

import psutil  # isort: skip

from dra_ray import cluster, config, runs
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.workloads import sweep as job

LOOK_S = 0.2


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train a trial; seconds are means per trial, beyond its training steps."""

    way: str
    trials: int
    wall_s: float  # of a slot, from one trial's end to the next one's, without its training
    cpu_s: float  # of all processes but the training itself
    processes: float  # started per trial
    trials_per_hour: float


class Processes:
    """CPU seconds of this process's descendants, by process, seen every LOOK_S: what ends between
    two looks is counted up to the first.
    """

    def __init__(self) -> None:
        self._me, self._cpu_s = psutil.Process(), dict[tuple[int, float], float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Processes:
        self._look()
        self._before = dict(self._cpu_s)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def spent(self) -> tuple[float, int]:
        """(CPU seconds, processes that began) since the block was entered."""
        cpu_s = sum(s - self._before.get(key, 0.0) for key, s in self._cpu_s.items())
        return cpu_s, len(self._cpu_s.keys() - self._before.keys())

    def _repeat(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        for process in [self._me, *self._me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue  # it has ended


@contextmanager
def _warm() -> Iterator[None]:
    with cluster.connect(num_cpus=4):
        yield


def study(trials: int, epochs: int, elastic: bool) -> config.Sweep:
    """A sweep of tiny digits students, one at a time, none stopped; `elastic` ones are trained by
    Ray Train even with one worker.
    """
    base = config.override(
        config.Experiment(),
        {
            "model.name": "wrn-10-1",
            "optim.epochs": epochs,
            "optim.batch": 128,
            "threat.steps": 3,
            "selection.steps": 3,
            "align.weight": 0.0,
            "resources.min_workers": 1 if elastic else None,
        },
    )
    return config.Sweep(
        base=base,
        space={"optim.lr": [round(0.1 + number / 100, 2) for number in range(trials)]},
        asha=config.Asha(max_concurrent=1, grace_epochs=1),
        scheduler="none",
    )


def measure(folder: Store, trials: int, epochs: int) -> list[Row]:
    """Both ways, one after the other in one cluster of this machine, after a trial to warm up.

    The training of a trial is its `elapsed_s`: steps and validations of its loop, on one thread.
    """
    rows = []
    with _warm():
        for way, elastic in (("own process", False), ("Ray Train", True)):
            job.run(study(1, 1, elastic), folder / f"warm-{way.replace(' ', '-')}")
            place = folder / way.replace(" ", "-")
            with Processes() as processes:
                began = time.monotonic()
                job.run(study(trials, epochs, elastic), place)
                wall_s = time.monotonic() - began
            cpu_s, started = processes.spent()
            training_s = sum(
                row.elapsed_s or 0.0
                for row in runs.read_rows(place / runs.RUNGS, RungRow)
                if row.decision == "done"
            )
            rows.append(
                Row(
                    way,
                    trials,
                    (wall_s - training_s) / trials,
                    (cpu_s - training_s) / trials,
                    started / trials,
                    3600 * trials / wall_s,
                )
            )
    return rows
