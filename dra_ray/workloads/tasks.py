"""A bounded number of Ray tasks at a time, each with a key that says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import ray

K = TypeVar("K")


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
