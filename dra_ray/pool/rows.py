"""The heart of a replica, without Ray: requests of several clients become micro-batches of one
teacher.

A teacher runs at one batch size only, so what a request costs is counted in micro-batches. Requests
that leave a part of one empty share it, long ones are cut, and clients take turns, micro-batch by
micro-batch: a client with much to encode delays the others by one micro-batch at most.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dra_ray.errors import PoolError
from dra_ray.teachers.source import Request


class BatchedTeacher(Protocol):
    """What a replica needs of a teacher; `LocalTeacher` is one."""

    @property
    def micro_batch(self) -> int:
        """The only batch size it runs at."""
        ...

    @property
    def feature_dim(self) -> int: ...

    def check(self, request: Request) -> None:
        """Raises `DataError` for a request that cannot be encoded."""
        ...

    def encode(self, request: Request) -> Tensor:
        """Features [B,D] or [B,D,h,w] of at most `micro_batch` images, as they are sent."""
        ...

    def sample(self) -> Request:
        """A micro-batch of random rows, to try what its kernels do."""
        ...


@dataclass(frozen=True)
class Answer:
    """Features [B,D] or [B,D,h,w]; seconds of the teacher's time spent on them, and seconds that
    they waited for it.
    """

    features: Tensor
    service_s: float
    waited_s: float


@dataclass(eq=False)
class _Work:
    request: Request
    features: Tensor
    future: Future[Answer] = field(default_factory=Future)
    arrived_s: float = field(default_factory=time.monotonic)
    begun_s: float | None = None
    taken: int = 0  # rows handed to the teacher
    taken_in: int = 0  # rows of features that came back
    service_s: float = 0.0

    def __len__(self) -> int:
        return len(self.request)


Part = tuple[_Work, slice]


class Encoder:
    """Encodes requests in a thread of its own.

    Micro-batches are shared between requests only where the teacher's kernels give an image the
    same bits at any place of a batch and beside any others; that is tried once, at the start. Where
    they do not, each request has its own.

    Args:
        merge_wait_s: how long an incomplete micro-batch waits for more rows, if more than one
            client sent requests lately.
        on_batch: called with (rows, seconds) after every micro-batch.
    """

    RECENT_S = 10.0

    def __init__(
        self,
        teacher: BatchedTeacher,
        merge_wait_s: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.teacher = teacher
        self.merges = independent_rows(teacher)
        self._merge_wait_s = merge_wait_s
        self._on_batch = on_batch or (lambda rows, seconds: None)
        self._queues: dict[str, deque[_Work]] = {}  # by client, none empty; the next in turn first
        self._seen: dict[str, float] = {}
        self._changed = threading.Condition()
        self._begun_s: float | None = None  # of the micro-batch under way
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="encoder", daemon=True)
        self._thread.start()

    def submit(self, client: str, request: Request) -> Future[Answer]:
        """The answer to come. Raises `DataError` at once for what cannot be encoded."""
        self.teacher.check(request)
        work = _Work(request, torch.empty(0, self.teacher.feature_dim))
        work.future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        if not len(work):
            work.future.set_result(Answer(work.features, 0.0, 0.0))
            return work.future
        with self._changed:
            self._queues.setdefault(client, deque()).append(work)
            self._seen[client] = work.arrived_s
            self._changed.notify()
        return work.future

    @property
    def waiting(self) -> int:
        """Requests that have no row encoded or being encoded."""
        with self._changed:
            return sum(work.taken == 0 for queue in self._queues.values() for work in queue)

    def _recent(self) -> int:
        now = time.monotonic()
        self._seen = {client: at for client, at in self._seen.items() if now - at < self.RECENT_S}
        return len(self._seen)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def busy_for_s(self) -> float:
        """How long the micro-batch under way has taken; 0 when idle."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------
    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._queues:
                    if self._closed:
                        return
                    self._changed.wait()
                self._gather()
                parts = self._next()
            self._encode(parts)

    def _gather(self) -> None:
        """Wait a little for more rows, where they may come."""
        if not (self._merge_wait_s and self.merges):
            return
        oldest = min(queue[0].arrived_s for queue in self._queues.values())
        while self._rows_waiting() < self.teacher.micro_batch and self._recent() > 1:
            left_s = oldest + self._merge_wait_s - time.monotonic()
            if left_s <= 0 or not self._changed.wait(left_s):
                return

    def _rows_waiting(self) -> int:
        return sum(len(work) - work.taken for queue in self._queues.values() for work in queue)

    def _next(self) -> list[Part]:
        """BatchedTeacher of the next micro-batch: clients take turns until it is full."""
        parts: list[Part] = []
        room = self.teacher.micro_batch
        while room and self._queues and (self.merges or not parts):
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            work = queue[0]
            rows = slice(work.taken, min(work.taken + room, len(work)))
            work.taken, room = rows.stop, room - (rows.stop - rows.start)
            work.begun_s = work.begun_s or time.monotonic()
            parts.append((work, rows))
            if work.taken == len(work):
                queue.popleft()
            if queue:
                self._queues[client] = queue  # at the end of the line
        return parts

    def _encode(self, parts: Sequence[Part]) -> None:
        begun_s = self._begun_s = time.monotonic()
        try:
            features = self.teacher.encode(
                Request.joined([work.request[rows] for work, rows in parts])
            )
        except Exception as error:
            self._begun_s = None
            if len(parts) > 1:  # one of them is at fault: the others must not fail with it
                for part in parts:
                    self._encode([part])
            else:
                self._fail(parts[0][0], error)
            return
        self._begun_s = None
        seconds = time.monotonic() - begun_s
        total = len(features)
        start = 0
        for work, rows in parts:
            count = rows.stop - rows.start
            if not work.taken_in:
                work.features = features.new_empty(len(work), *features.shape[1:])
            work.taken_in += count
            work.features[rows] = features[start : start + count]
            work.service_s += seconds * count / total
            start += count
            if rows.stop == len(work) and not work.future.done():
                assert work.begun_s is not None
                work.future.set_result(
                    Answer(work.features, work.service_s, work.begun_s - work.arrived_s)
                )
        self._on_batch(total, seconds)

    def _fail(self, work: _Work, error: Exception) -> None:
        """End one request; the rest of its rows are not encoded."""
        with self._changed:
            for client in list(self._queues):
                queue = self._queues[client]
                if work in queue:
                    queue.remove(work)
                if not queue:
                    del self._queues[client]
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            size = self.teacher.micro_batch
            error = PoolError(
                f"the teacher ran out of memory at teacher.micro_batch={size}; lower it, or give "
                "replicas a larger device"
            )
        if not work.future.done():
            work.future.set_exception(error)


def independent_rows(teacher: BatchedTeacher) -> bool:
    """Whether an image's feature has the same bits at any place of a micro-batch, whatever stands
    beside it.

    A property of the kernels on this device, so it is tried.
    """
    whole = teacher.sample()
    count = len(whole)
    features = teacher.encode(whole)
    for shift in {1, count // 3, count // 2, count - 1} - {0}:
        moved = Request.joined([whole[-shift:], whole[:-shift]])
        if not torch.equal(teacher.encode(moved).roll(-shift, 0), features):
            return False
    alone = teacher.encode(whole[: count // 2])
    return torch.equal(alone, features[: count // 2])
