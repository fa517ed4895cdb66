"""What the pool says of itself: totals, status and the rows of pool.jsonl.

Without torch and Ray, so that the ledger is there at once and a report can read a log anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dra_ray import config
from dra_ray.runs import Record


@dataclasses.dataclass(frozen=True)
class Totals:
    """What clients have counted.

    Attributes:
        hits: requests answered with what another client requested.
        retries: requests sent again after a replica died or refused.
        service_s: time of teachers; wait_s: time that callers waited for answers.
    """

    requests: float = 0.0
    images: float = 0.0
    hits: float = 0.0
    retries: float = 0.0
    service_s: float = 0.0
    wait_s: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            *map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )

    @classmethod
    def sum(cls, parts: Iterable[Totals]) -> Totals:
        return sum(parts, start=cls())


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a request cost its replica: the teacher's time, the wait for it, and 1 for an answer
    that was there or under way.
    """

    service_s: float = 0.0
    waited_s: float = 0.0
    hit: float = 0.0


@dataclasses.dataclass(frozen=True)
class Description:
    """What a client must know of a pool's teacher, and whether requests share micro-batches."""

    feature_dim: int
    micro_batch: int
    merges: bool


@dataclasses.dataclass(frozen=True)
class Books:
    """What a pool's ledger knows.

    Attributes:
        keep: whether it stays when no driver needs it.
        drivers: how many need it now; clients: how many sent requests lately.
    """

    teacher: config.Teacher
    up_s: float
    keep: bool
    drivers: int
    clients: int
    totals: Totals
    trials: Mapping[str, Totals]


@dataclasses.dataclass(frozen=True)
class Status:
    """A pool: its application's name, replicas by state, and its books where it has any."""

    pool: str
    replicas: Mapping[str, int]
    books: Books | None = None

    def as_json(self) -> dict[str, Any]:
        """For a file: the teacher's settings and the totals stand beside the rest."""
        facts: dict[str, Any] = {"pool": self.pool, "replicas": dict(self.replicas)}
        if self.books:
            books = dataclasses.asdict(self.books)
            facts |= self.books.teacher.model_dump(mode="json")
            facts |= {key: books[key] for key in ("up_s", "keep", "drivers")}
            facts |= books["totals"] | {"clients": books["clients"], "trials": books["trials"]}
        return facts

    def row(self) -> dict[str, Any]:
        """A line of a table."""
        states = sorted(self.replicas.items())
        books, totals = self.books, self.books.totals if self.books else Totals()
        requests = max(totals.requests, 1.0)
        return {
            "pool": self.pool,
            "teacher": books.teacher.uri if books else "?",
            "replicas": ", ".join(f"{count} {state.lower()}" for state, count in states) or "none",
            "kept": books.keep if books else False,
            "drivers": books.drivers if books else 0,
            "clients": books.clients if books else 0,
            "requests": totals.requests,
            "images": totals.images,
            "hits": totals.hits,
            "retries": totals.retries,
            "mean_service_s": totals.service_s / requests,
            "mean_wait_s": totals.wait_s / requests,
        }


class LogRow(Record):
    """A row of pool.jsonl; totals are those since the log began.

    Attributes:
        at: seconds since 1970.
        running, target: replicas that answer, and that are to be there; the latter may be unknown.
        demand: work of the last seconds, in replicas; None where it is unknown.
    """

    at: float
    running: int
    target: int | None = None
    demand: float | None = None
    clients: int = 0
    requests: int = 0
    images: int = 0
    hits: int = 0
    retries: int = 0
