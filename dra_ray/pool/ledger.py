"""What a pool's clients and drivers report: totals per trial, and who still needs the pool. Without
torch: the actor is there at once.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from dra_ray.pool.exchange import NAMESPACE

COUNTED = ("requests", "images", "hits", "retries", "service_s", "wait_s")


@ray.remote(num_cpus=0, max_restarts=-1)
class Ledger:
    """One per pool. Adds up what clients report, off the path of requests.

    It also knows the drivers that hold the pool. When the last one is gone without a word (its
    machine died) and nobody else has come for `ORPHAN_S`, it takes the pool down, unless that is to
    be kept.
    """

    FRESH_S = 3.0
    HELD_S = 10.0  # a driver says every second or so that it is there
    ORPHAN_S = 60.0

    def __init__(self, app: str, facts: dict[str, Any], keep: bool) -> None:
        self._app, self._facts, self._keep = app, facts, keep
        self._since = time.time()
        self._clients: dict[
            str, tuple[float, str, dict[str, float]]
        ] = {}  # client -> when, trial, totals
        self._gone: dict[str, dict[str, float]] = {}  # trial -> totals of clients that left
        self._drivers: dict[str, float] = {}
        self._held_at = time.monotonic()
        self._closing = False
        threading.Thread(target=self._watch, daemon=True).start()

    def record(self, client: str, trial: str, totals: dict[str, float], last: bool = False) -> None:
        self._clients[client] = (time.monotonic(), trial, totals)
        if last:
            self._leave(client)

    def _leave(self, client: str) -> None:
        _, trial, totals = self._clients.pop(client)
        self._gone[trial] = _sum([self._gone.get(trial, {}), totals])

    def totals(self) -> dict[str, float]:
        """Sums over all clients since the pool came up, and `clients`: how many asked lately."""
        now = time.monotonic()
        summed = _sum([*self._gone.values(), *(totals for _, _, totals in self._clients.values())])
        return {
            **summed,
            "clients": sum(now - at < self.FRESH_S for at, _, _ in self._clients.values()),
        }

    def status(self) -> dict[str, Any]:
        """Facts of the pool, totals, totals by trial, and the number of drivers that hold it."""
        trials = dict(self._gone)
        for _, trial, totals in self._clients.values():
            trials[trial] = _sum([trials.get(trial, {}), totals])
        held = {
            "up_s": round(time.time() - self._since, 1),
            "keep": self._keep,
            "drivers": len(self._fresh()),
        }
        return {**self._facts, **held, **self.totals(), "trials": trials}

    def acquire(self, driver: str) -> bool:
        """Whether the driver may rely on the pool; not if the last one before it is just taking it
        down.
        """
        if not self._closing:
            self._drivers[driver] = self._held_at = time.monotonic()
        return not self._closing

    def release(self, driver: str) -> bool:
        """Whether the pool may go: nobody else holds it and it is not to be kept."""
        self._drivers.pop(driver, None)
        self._closing = not self._keep and not self._fresh()
        return self._closing

    def keep(self, keep: bool) -> None:
        self._keep = keep

    def _fresh(self) -> list[str]:
        now = time.monotonic()
        return [driver for driver, at in self._drivers.items() if now - at < self.HELD_S]

    def _watch(self) -> None:
        while True:
            time.sleep(5.0)
            if (
                not self._keep
                and time.monotonic() - self._held_at > self.ORPHAN_S
                and not self._fresh()
            ):
                from ray import serve  # takes seconds to import, and is needed once if ever

                serve.delete(self._app)
                ray.kill(ray.get_runtime_context().current_actor)


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(part.get(key, 0.0) for part in parts) for key in COUNTED}


def open_ledger(app: str, facts: dict[str, Any], keep: bool) -> Any:
    """The pool's ledger, made if it is not there."""
    name = {
        "name": f"{app}-ledger",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
    }
    return Ledger.options(**name).remote(app, facts, keep)  # type: ignore[attr-defined]


def find_ledger(app: str) -> Any:
    """The pool's ledger; raises `ValueError` where there is none."""
    return ray.get_actor(f"{app}-ledger", namespace=NAMESPACE)
