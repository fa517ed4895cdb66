"""What a pool's clients and drivers report: totals per trial, and who still needs the pool. Without
torch, so that the actor starts at once.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from dra_ray import config
from dra_ray.pool.exchange import NAMESPACE
from dra_ray.pool.records import Books, Totals


@dataclass(frozen=True)
class _Client:
    at: float  # when it reported last
    trial: str
    totals: Totals


@ray.remote(num_cpus=0, max_restarts=-1)
class Ledger:
    """One per pool. Adds up what clients report, off the path of requests.

    It also knows the drivers that need the pool. When the last one is gone without a word (its
    machine died) and nobody else has come for `ORPHAN_S`, it takes the pool down, unless that is to
    be kept.
    """

    FRESH_S = 3.0
    DRIVER_S = 10.0  # a driver that has been silent for longer is gone; it reports twice a second
    ORPHAN_S = 60.0

    def __init__(self, app: str, teacher: config.Teacher, keep: bool) -> None:
        self._app, self._teacher, self._keep = app, teacher, keep
        self._since = time.time()
        self._clients: dict[str, _Client] = {}
        self._gone: dict[str, Totals] = {}  # by trial: of clients that left
        self._drivers: dict[str, float] = {}  # when they last said that they are there
        self._acquired_at = time.monotonic()
        self._closing = False
        threading.Thread(target=self._watch, daemon=True).start()

    def record(self, client: str, trial: str, totals: Totals, last: bool = False) -> None:
        self._clients[client] = _Client(time.monotonic(), trial, totals)
        if last:
            del self._clients[client]
            self._gone[trial] = self._gone.get(trial, Totals()) + totals

    def books(self) -> Books:
        trials = dict(self._gone)
        for client in self._clients.values():
            trials[client.trial] = trials.get(client.trial, Totals()) + client.totals
        now = time.monotonic()
        return Books(
            teacher=self._teacher,
            up_s=round(time.time() - self._since, 1),
            keep=self._keep,
            drivers=len(self._fresh()),
            clients=sum(now - client.at < self.FRESH_S for client in self._clients.values()),
            totals=Totals.sum(trials.values()),
            trials=trials,
        )

    def acquire(self, driver: str) -> bool:
        """Note that the driver needs the pool; call again every second or so. Returns False where
        the last driver before it is taking the pool down.
        """
        if not self._closing:
            self._drivers[driver] = self._acquired_at = time.monotonic()
        return not self._closing

    def release(self, driver: str) -> bool:
        """Note that the driver no longer needs the pool. Returns whether the pool may go: no other
        driver needs it, and it is not to be kept.
        """
        self._drivers.pop(driver, None)
        self._closing = not self._keep and not self._fresh()
        return self._closing

    def keep(self, keep: bool) -> None:
        self._keep = keep

    def _fresh(self) -> list[str]:
        now = time.monotonic()
        return [driver for driver, at in self._drivers.items() if now - at < self.DRIVER_S]

    def _watch(self) -> None:
        while True:
            time.sleep(5.0)
            if (
                not self._keep
                and time.monotonic() - self._acquired_at > self.ORPHAN_S
                and not self._fresh()
            ):
                from ray import serve  # takes seconds to import, and is needed once if ever

                serve.delete(self._app)
                ray.kill(ray.get_runtime_context().current_actor)


def open_ledger(app: str, teacher: config.Teacher, keep: bool) -> Any:
    """The pool's ledger, started if there is none."""
    name = {
        "name": f"{app}-ledger",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
    }
    return Ledger.options(**name).remote(app, teacher, keep)  # type: ignore[attr-defined]


def find_ledger(app: str) -> Any:
    """The pool's ledger; raises `ValueError` where there is none."""
    return ray.get_actor(f"{app}-ledger", namespace=NAMESPACE)
