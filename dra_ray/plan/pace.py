"""How fast an experiment's own work goes on one machine, and how long trials take there side by
side.

A trial that differs from the measured experiment is scaled by its FLOPs. Trials that run at the
same time advance alike, each at 1/factor of its pace alone: factor = busy threads / cores, at least
1. A busy thread is a thread of a training worker, or of a teacher replica for the share of the time
in which its trials keep it busy.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

# Wall time of a start, in starts of a Python process that imports what a worker imports, which is
# nearly all of it. A slot's first trial brings a process, its next ones find it warm; Ray Train has
# a controller and then its workers, after Ray itself; a pool has Serve's controller, then replicas
PROCESSES_OF_SLOT = 1.5
PROCESSES_OF_WARM_TRIAL = 0.5
PROCESSES_OF_TRAIN = 4.0
PROCESSES_OF_POOL = 2.0


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of one worker, or one replica, with the threads that the experiment gives it and the
    machine to itself.

    Attributes:
        training: per PFLOP of a student's steps, projectors included.
        validation: per PFLOP of validation.
        encoding: per PFLOP of the teacher; None where none was timed.
        process_s: of the start of a Python process that imports what a worker imports.
        cores: of the machine; 0 where its devices are GPUs, which trials do not share.
        what: what was timed, in words.
    """

    training: float
    validation: float
    encoding: float | None
    process_s: float
    cores: int
    what: str

    def factor(self, threads: float) -> float:
        """How much slower than alone anything is while so many threads are busy."""
        return max(1.0, threads / self.cores) if self.cores else 1.0


def makespan(
    durations: Sequence[float], slots: int, factor: Callable[[int], float] = lambda running: 1.0
) -> float:
    """Seconds until all are done: they start in their order whenever one of `slots` is free, and
    while n run each advances at 1/factor(n) of its pace alone.
    """
    waiting = [each for each in durations if each > 0]
    waiting.reverse()
    running: list[float] = []  # what each ends at, on a clock of progress that all share
    clock, seconds = 0.0, 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, clock + waiting.pop())
        seconds += (running[0] - clock) * factor(len(running))
        clock = heapq.heappop(running)
    return seconds
