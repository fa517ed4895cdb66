"""Jobs as they were found, and what follows for a submission. No Ray here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from dra_ray.errors import ConfigError
from dra_ray.submission.work import Work

Outcome = Literal["started", "attached", "done"]
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job; `run` is the URI of its run's folder, "" for jobs of others.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        started, ended: in seconds since 1970.
        exit_code: of its driver, once that has ended by itself.
        exact: see `Work.exact`.
    """

    id: str
    status: str
    kind: str = ""
    name: str = ""
    run: str = ""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    message: str = ""
    exact: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


@dataclasses.dataclass(frozen=True)
class Submitted:
    """What became of a submission."""

    job: Job
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Step:
    """What a submission comes to: a job that is there, or a new one with this id."""

    id: str
    job: Job | None
    outcome: Outcome


def next_step(work: Work, jobs: Sequence[Job], again: bool = False) -> Step:
    """Attach to the job of this work that runs; it is done where the last one has succeeded and no
    field has changed since; else a new job, under the next free id.

    Args:
        again: a new job also where it has succeeded.
    """
    base = work.base_id
    attempts = sorted(
        (job for job in jobs if _number(job.id, base)), key=lambda job: _number(job.id, base)
    )
    if not attempts:
        return Step(base, None, "started")
    last = attempts[-1]
    if not last.has_ended:
        return Step(last.id, last, "attached")
    if last.status == "SUCCEEDED" and last.exact == work.exact and not again:
        return Step(last.id, last, "done")
    return Step(f"{base}-{_number(last.id, base) + 1}", None, "started")


def meant(text: str, jobs: Sequence[Job]) -> Job:
    """The job that a user means: an id, its beginning, or a run's name; of several attempts the
    last in `jobs`, which has the oldest first. `ConfigError` where none or several are meant.
    """
    for found in (
        [job for job in jobs if job.id == text],
        [job for job in jobs if text and job.name == text],
        [job for job in jobs if text and job.id.startswith(text)],
    ):
        works = {(job.kind, job.run) if job.run else (job.id,) for job in found}
        if len(works) == 1:
            return found[-1]
        if works:
            ids = ", ".join(sorted(job.id for job in found))
            raise ConfigError(f"'{text}' is short for several jobs: {ids}; give more of an id")
    raise ConfigError(f"there is no job '{text}' on this cluster; see `dra jobs list`")


def _number(id_: str, base: str) -> int:
    """Which attempt of the work `base` a job is, from 1; 0 for other work."""
    if id_ == base:
        return 1
    head, _, tail = id_.rpartition("-")
    return int(tail) if head == base and tail.isdigit() and tail.isascii() else 0
