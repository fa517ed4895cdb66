"""A bounded number of Ray tasks at a time, each with a key that says what it is for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from dra_ray import memory
from dra_ray.errors import DraError, RunError
from dra_ray.runs import SyntheticProgress
from dra_ray.storage import Store

K = TypeVar("K")


def prepare() -> None:
    """For a task that computes on one thread, where sums have one order."""
    torch.set_num_threads(1)
    memory.keep_freed()


def in_order(
    count: int,
    start: Callable[[int], ray.ObjectRef[Any]],
    at_once: int,
    what: str,
    store: Store,
    on_end: Callable[[int], None],
) -> list[Any]:
    """What the tasks that `start` starts for 0 to `count` - 1 return, in that order; at most
    `at_once` run. `on_end` gets how many have ended.

    Raises a task's own `DraError`, or `RunError` naming `what` is being made and `store`, where it
    goes on.
    """
    waiting = list(range(count))
    ended: dict[int, Any] = {}

    def submit() -> tuple[ray.ObjectRef[Any], int] | None:
        if not waiting:
            return None
        index = waiting.pop(0)
        return start(index), index

    try:
        with Tasks[int](at_once) as tasks:
            for ref, index in tasks.finished(submit):
                ended[index] = ray.get(ref)
                on_end(len(ended))
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, DraError):
            raise cause from None
        raise RunError(
            f"{what} failed ({str(cause).strip().splitlines()[-1]}); repeat the command to go on "
            f"in {store}"
        ) from error
    return [ended[index] for index in range(count)]


def told(
    progress: Callable[[SyntheticProgress], None] | None,
    shard_images: int,
    total: int,
    started: float,
) -> Callable[[int], None]:
    """What tells `progress` of the images in so many ended shards, since `started` (monotonic)."""

    def on_end(shards: int) -> None:
        if progress:
            elapsed_s = round(time.monotonic() - started, 3)
            done = min(shards * shard_images, total)
            progress(SyntheticProgress(images=done, images_total=total, elapsed_s=elapsed_s))

    return on_end


class Tasks(Generic[K]):
    """At most `at_once` tasks; whatever still runs when the block is left is cancelled.

        with Tasks[int](4) as tasks:
            for ref, key in tasks.finished(submit):
                outcome[key] = ray.get(ref)

    A context manager and not the generator's own `finally`: an exception in the loop's body keeps
    the generator alive, and with it the tasks.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._running: dict[ray.ObjectRef[Any], K] = {}

    def __enter__(self) -> Tasks[K]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def finished(
        self, submit: Callable[[], tuple[ray.ObjectRef[Any], K] | None]
    ) -> Iterator[tuple[ray.ObjectRef[Any], K]]:
        """Tasks as they end, well or not: `ray.get` of the reference says how.

        `submit` starts the next task, or returns None where there is none just now; it is called
        again after each that ended. The iteration ends when nothing runs and nothing is left.
        """
        while True:
            while len(self._running) < self._at_once and (task := submit()):
                ref, key = task
                self._running[ref] = key
            if not self._running:
                return
            (done,), _ = ray.wait(list(self._running), num_returns=1)
            yield done, self._running.pop(done)

    def cancel(self, chosen: Callable[[K], bool] = lambda key: True) -> None:
        """Kill the running tasks whose keys are chosen; they are never yielded."""
        for ref in [ref for ref, key in self._running.items() if chosen(key)]:
            ray.cancel(ref, force=True)
            del self._running[ref]
