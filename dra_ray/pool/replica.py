"""A replica of the pool: a Ray Serve actor around an `Encoder`, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable

import numpy as np
from ray import serve
from ray.exceptions import RayError

from dra_ray import config, meters
from dra_ray.pool import exchange
from dra_ray.pool.records import Cost, Description
from dra_ray.pool.rows import BatchedTeacher, Encoder
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import Array, LocalTeacher, Request

log = logging.getLogger("ray.serve")


def load(teacher: config.Teacher, threads: int, gpu: bool) -> BatchedTeacher:
    """The teacher of a replica, from its folder."""
    assert teacher.uri
    net = checkpoint.load(Store(teacher.uri))
    return LocalTeacher(net, teacher, threads, "cuda" if gpu else "cpu")


class TeacherReplica:
    """One replica: a frozen teacher in its own process."""

    def __init__(self, make: Callable[[], BatchedTeacher], settings: config.Pool) -> None:
        self._settings = settings
        self._app = serve.get_replica_context().app_name
        self._labels = {"teacher": self._app}
        self._service = meters.Histogram("dra_teacher_service_seconds", self._labels)
        self._queued = meters.Histogram("dra_teacher_queue_seconds", self._labels)
        self._encoded = meters.Counter("dra_teacher_encoded", [self._labels])
        self._batches = meters.Counter("dra_teacher_batches", [self._labels])
        self._gauges = meters.Gauges(self._labels)
        self._gauges.set("dra_teacher_replicas_limit", settings.max_replicas)
        self._busy_s = 0.0
        self._reported_at = time.monotonic()
        self._mean_s = 0.0  # of the last requests
        self._clients: dict[str, float] = {}  # when they sent a request last
        self._window = exchange.Window(self._settings.window_bytes)
        self._exchange = exchange.open_exchange(self._app, self._settings.window_bytes)
        self.encoder = Encoder(make(), self._settings.merge_wait_s, self._count_batch)

    def _count_batch(self, rows: int, seconds: float) -> None:
        self._busy_s += seconds
        self._encoded.add(rows, self._labels)
        self._batches.add(1, self._labels)

    def describe(self) -> Description:
        teacher = self.encoder.teacher
        return Description(teacher.feature_dim, teacher.micro_batch, self.encoder.merges)

    async def encode(self, request: Request, client: str = "") -> tuple[Array, Cost]:
        """Features [B,D] of one request, as `LocalTeacher.encode` gives them, and what
        they cost here.
        """
        cost = Cost(hit=1.0)  # unless `make` is called

        async def make() -> Array:
            nonlocal cost
            answer = await asyncio.wrap_future(self.encoder.submit(client, request))
            cost = Cost(answer.service_s, answer.waited_s)
            self._note_service(answer.service_s)
            return answer.features.numpy()

        self._clients[client] = time.monotonic()
        if self._settings.window_bytes and self.has_other_clients():
            key = request.digest()
            features = await self._window.get(key, lambda: self._once(key, make))
        else:
            features = await make()
        if not cost.hit:
            self._service.observe(cost.service_s)
            self._queued.observe(cost.waited_s)
        return features, cost

    def _note_service(self, service_s: float) -> None:
        self._mean_s = 0.9 * self._mean_s + 0.1 * service_s if self._mean_s else service_s

    def has_other_clients(self) -> bool:
        """Whether there may be something to share: more than one client sent requests lately."""
        if len(self._clients) > 1:
            now = time.monotonic()
            self._clients = {
                client: at for client, at in self._clients.items() if now - at < Encoder.RECENT_S
            }
        return len(self._clients) > 1

    async def _once(self, key: bytes, make: Callable[[], Awaitable[Array]]) -> Array:
        """The features from the replica that is at work on them, or from here."""
        max_wait_s = 2.0 + 4 * self._mean_s
        # while the exchange starts anew, each replica computes its own
        with contextlib.suppress(RayError, TimeoutError):
            claim = self._exchange.claim.remote(key, max_wait_s)
            features: Array | None = await asyncio.wait_for(claim, max_wait_s + 1)
            if features is not None:
                return np.array(features)
        try:
            features = await make()
        except Exception:
            self._exchange.drop.remote(key)
            raise
        self._exchange.give.remote(key, features)
        return features

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every so often: the busy share since the last call, requests that wait,
        and the mean service time.
        """
        now = time.monotonic()
        span_s, self._reported_at = max(now - self._reported_at, 1e-6), now
        busy_s, self._busy_s = self._busy_s, 0.0
        waiting = self.encoder.waiting
        self._gauges.set("dra_teacher_queue_length", waiting)
        # a micro-batch that is longer than the span counts while it runs
        busy = max(busy_s, min(self.encoder.busy_for_s(), span_s)) / span_s
        return {"busy": min(1.0, busy), "waiting": float(waiting), "service_s": self._mean_s}

    def check_health(self) -> None:
        """Called by Serve every so often. A replica that hangs ends itself at once, so that its
        requests are sent elsewhere: Serve would wait for them first.
        """
        stuck_s = self.encoder.busy_for_s()
        if stuck_s > self._settings.hang_s or not self.encoder.alive:
            log.error(
                "the teacher has worked for %.0f s on one micro-batch, longer than pool.hang_s; "
                "this replica ends",
                stuck_s,
            )
            os._exit(1)
