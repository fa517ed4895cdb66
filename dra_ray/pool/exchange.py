"""Equal requests are computed once: the last answers by key, and those under way to wait for.

Trials with the same data seed and noise level request the same features at about the same time. The
key is a digest of all that a feature depends on, so sharing is right by construction. Nothing here
needs torch, so that the actor starts at once.

Sending equal requests to one replica, by their digest, would need no exchange. It was measured
(docs/pool.md): as soon as each replica must get its share of what a client sends at once, trials
that are a few milliseconds apart choose differently, and up to twice the work is done.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import ray

NAMESPACE = "dra_ray"  # of the actors of pools


class Window:
    """Features by digest, the last ones used up to `limit_bytes`. For one event loop; nothing here
    waits for a lock.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._there: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._coming: dict[bytes, asyncio.Task[np.ndarray]] = {}

    async def get(self, key: bytes, make: Callable[[], Awaitable[np.ndarray]]) -> np.ndarray:
        """Features [B,D]: those that are there or under way, or else what `make` gives. What it
        raises, all who wait for it get.

        A caller that goes away does not take the work of the others with it.
        """
        if key in self._there:
            self._there.move_to_end(key)
            return self._there[key]
        task = self._coming.get(key)
        if task is None:
            task = self._coming[key] = asyncio.ensure_future(self._make(key, make))
        return await asyncio.shield(task)

    async def _make(self, key: bytes, make: Callable[[], Awaitable[np.ndarray]]) -> np.ndarray:
        try:
            features = await make()
            self.keep(key, features)
            return features
        finally:
            del self._coming[key]

    def keep(self, key: bytes, features: np.ndarray) -> None:
        if features.nbytes > self._limit_bytes or key in self._there:
            return
        self._there[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._limit_bytes:
            _, old = self._there.popitem(last=False)
            self._bytes -= old.nbytes

    def find(self, key: bytes) -> np.ndarray | None:
        return self._there.get(key)

    @property
    def bytes(self) -> int:
        return self._bytes


class Exchange:
    """What the replicas of one pool tell each other: who is at work on which request, and the
    answers. For one event loop.

    The first to claim a request computes it; others wait for at most `max_wait_s`, then one of them
    takes over. So a replica that dies delays those that wait, and changes nothing.
    """

    STALE_S = 60.0

    def __init__(self, limit_bytes: int) -> None:
        self._window = Window(limit_bytes)
        self._claims: OrderedDict[bytes, tuple[asyncio.Event, float]] = OrderedDict()

    async def claim(self, key: bytes, max_wait_s: float) -> np.ndarray | None:
        """Features [B,D] that another replica computed, or None: the caller computes them, and then
        calls `give`, or `drop` if it failed.
        """
        while (features := self._window.find(key)) is None and key in self._claims:
            mine, _ = self._claims[key]
            try:
                await asyncio.wait_for(mine.wait(), max_wait_s)
            except TimeoutError:
                if (
                    self._claims.get(key, (None,))[0] is mine
                ):  # nobody else has lost patience before
                    break
        if features is None:
            self._claim(key)
        return features

    def _claim(self, key: bytes) -> None:
        now = time.monotonic()
        while (
            self._claims and (oldest := next(iter(self._claims.values())))[1] < now - self.STALE_S
        ):
            self._claims.popitem(last=False)
            oldest[0].set()
        if old := self._claims.pop(key, None):
            old[0].set()
        self._claims[key] = (asyncio.Event(), now)

    def give(self, key: bytes, features: np.ndarray) -> None:
        self._window.keep(key, features)
        self.drop(key)

    def drop(self, key: bytes) -> None:
        """Give up a claim: one of those that wait computes it."""
        if claim := self._claims.pop(key, None):
            claim[0].set()


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)  # type: ignore[call-overload]
class ExchangeActor:
    """`Exchange` as an actor, one per pool; a client that is alone never meets it."""

    def __init__(self, limit_bytes: int) -> None:
        self._exchange = Exchange(limit_bytes)

    async def claim(self, key: bytes, max_wait_s: float) -> np.ndarray | None:
        return await self._exchange.claim(key, max_wait_s)

    async def give(self, key: bytes, features: np.ndarray) -> None:
        self._exchange.give(
            key, np.array(features)
        )  # a copy: what Ray hands over lies in its object store

    async def drop(self, key: bytes) -> None:
        self._exchange.drop(key)


def open_exchange(app: str, limit_bytes: int) -> Any:
    """The pool's exchange, started if there is none."""
    name = {
        "name": f"{app}-exchange",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
    }
    return ExchangeActor.options(**name).remote(limit_bytes)  # type: ignore[attr-defined]
