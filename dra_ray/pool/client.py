"""A training worker's side of the pool: requests are cut into parts, and sent again when their
replica dies, within a deadline.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from typing import Any

import grpc
import numpy as np
import torch
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RaySystemError
from ray.serve.exceptions import RayServeException
from torch import Tensor

from dra_ray import config, meters
from dra_ray.errors import PoolError
from dra_ray.pool.ledger import find_ledger
from dra_ray.pool.records import Cost, Description, Totals
from dra_ray.teachers.source import Request

# Such a request never ran to its end. RayTaskError is not among them: it says that the request ran
# and failed.
_DIED = (RayActorError, RaySystemError, ObjectLostError, NodeDiedError, grpc.RpcError)
_REFUSED = (RayServeException,)  # nobody took it: the deployment is coming up, or going
# A part that was lost so often is cut into micro-batches, to isolate the images that kill their
# replicas; a micro-batch that was lost so often is given up.
CUT_AFTER, GIVE_UP_AFTER = 3, 6


class PoolClient:
    """A `FeatureSource` whose features come from the pool, equal to those of `LocalTeacher` to the
    bit.

    Args:
        app: name of the application, as `up` gave it.
        settings: bounds and deadline.
        sender: names a run, or a trial as RUN/TRIAL, in totals; metrics name the run.
    """

    REPORT_S = 1.0

    def __init__(self, app: str, settings: config.Pool, sender: str = "") -> None:
        self._handle = serve.get_app_handle(app).options(_by_reference=False)
        self._settings = settings
        self._ledger = find_ledger(app)
        self._name, self._sender = uuid.uuid4().hex, sender
        self._inflight: deque[Call] = deque()
        self._totals = Totals()
        self._reported = 0.0
        labels = {"teacher": app, "run": sender.partition("/")[0]}
        self._labels = labels
        self._wait = meters.Histogram("dra_teacher_wait_seconds", labels)
        self._requests = meters.Counter("dra_teacher_requests", [labels])
        self._images = meters.Counter("dra_teacher_images", [labels])
        self._hits = meters.Counter("dra_teacher_hits", [labels])
        self._retries = meters.Counter("dra_teacher_retries", [labels])
        teacher: Description = self._handle.describe.remote().result(timeout_s=settings.timeout_s)
        self.feature_dim, self.micro_batch = teacher.feature_dim, teacher.micro_batch

    def submit(self, request: Request) -> Call:
        """Send a request; where `pool.max_inflight` are under way, wait for the oldest first."""
        while len(self._inflight) >= self._settings.max_inflight:
            self._inflight[0].result()
        call = Call(self, request)
        self._inflight.append(call)
        return call

    def close(self) -> None:
        self._report(last=True)

    def count(self, more: Totals) -> None:
        self._totals += more
        self._retries.add(more.retries, self._labels)

    def answered(self, images: int, cost: Cost) -> None:
        """Note that a replica answered a part of a request."""
        self.count(Totals(service_s=cost.service_s, hits=cost.hit))
        self._requests.add(1, self._labels)
        self._images.add(images, self._labels)
        self._hits.add(cost.hit, self._labels)

    @property
    def totals(self) -> Totals:
        """Since the client began."""
        return self._totals

    def _finished(self, call: Call, images: int, waited_s: float) -> None:
        self._inflight.remove(call)
        self.count(Totals(requests=1, images=images, wait_s=waited_s))
        self._wait.observe(waited_s)
        self._report()

    def _report(self, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._reported >= self.REPORT_S:
            self._reported = now
            self._ledger.record.remote(self._name, self._sender, self.totals, last)


class Call:
    """One request to the pool; `result` may be called again and gives the same.

    A long request travels in parts, cut between micro-batches: the features are those of the whole.
    As many parts as the client may have in flight are sent at once, the others as answers come.
    """

    def __init__(self, client: PoolClient, request: Request) -> None:
        self._client = client
        size = max(1, client._settings.request_images // client.micro_batch) * client.micro_batch
        self._parts = [_Part(client, part) for part in request.split(size)]
        self._features: Tensor | None = None
        self._send(0)

    def _send(self, first: int) -> None:
        for part in self._parts[first : first + self._client._settings.max_inflight]:
            part.send()

    def result(self, timeout_s: float | None = None) -> Tensor:
        """Features float32 [B,D]. A request that died with its replica is sent again until the
        deadline: it is a pure function of its arguments, so the answer is the same. Raises
        `PoolError` when the time is over.
        """
        if self._features is None:
            begun_s = time.monotonic()
            limit_s = self._client._settings.timeout_s if timeout_s is None else timeout_s
            features = []
            for number, part in enumerate(self._parts):
                self._send(number)
                features.append(part.result(begun_s + limit_s, limit_s))
            self._features = torch.from_numpy(np.concatenate(features)).float()
            self._client._finished(self, len(self._features), time.monotonic() - begun_s)
        return self._features


class _Part:
    """What one replica answers; sent when it is first needed, or with the parts before it."""

    def __init__(self, client: PoolClient, request: Request) -> None:
        self._client, self._request = client, request
        self._response: Any = None
        self._features: np.ndarray | None = None
        self._lost = 0

    def send(self, again: bool = False) -> None:
        if self._features is None and (again or self._response is None):
            client = self._client
            self._response = client._handle.encode.remote(self._request, client._name)

    def result(self, deadline_s: float, limit_s: float) -> np.ndarray:
        """Features [b,D] as they were sent; see `Call.result`. `limit_s` is for the message."""
        pause_s = 0.05
        while self._features is None:
            self.send()
            try:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise TimeoutError
                features, cost = self._response.result(timeout_s=remaining_s)
            except TimeoutError:
                raise PoolError(
                    f"the teacher pool did not answer within pool.timeout_s={limit_s:g}; see `dra "
                    "pool status`, raise pool.max_replicas or "
                    "timeout_s, and start the run again: it resumes from its last checkpoint"
                ) from None
            except (*_DIED, *_REFUSED) as error:
                self._lost += isinstance(error, _DIED)
                self._client.count(Totals(retries=1))
                if self._lost >= CUT_AFTER:
                    self._features = self._in_pieces(error, deadline_s, limit_s)
                    continue
                time.sleep(min(pause_s, max(0.0, deadline_s - time.monotonic())))
                pause_s = min(2 * pause_s, 2.0)
                self.send(again=True)
            except Exception as error:
                # the teacher itself refused: sending the request again changes nothing
                raise PoolError(
                    f"the teacher failed on a request ({_reason(error)}); check teacher.uri and "
                    "data.name"
                ) from error
            else:
                self._client.answered(len(self._request), cost)
                self._features = np.array(features)
        return self._features

    def _in_pieces(self, error: Exception, deadline_s: float, limit_s: float) -> np.ndarray:
        """Send one micro-batch at a time: a part that is lost again and again may hold the images
        that kill its replicas.
        """
        size = self._client.micro_batch
        if len(self._request) > size:
            parts = [_Part(self._client, part) for part in self._request.split(size)]
            return np.concatenate([part.result(deadline_s, limit_s) for part in parts])
        if self._lost >= GIVE_UP_AFTER:
            raise PoolError(
                f"{self._lost} replicas died with the same {len(self._request)} images "
                f"({_reason(error)}); if they ran out of memory, lower "
                "teacher.micro_batch or give replicas more, then start the run again: it resumes "
                "from its last checkpoint"
            ) from error
        time.sleep(0.5)
        self.send(again=True)
        return self.result(deadline_s, limit_s)


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "cause", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
