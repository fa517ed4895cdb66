"""Where a training step's time goes, without making anybody wait for it.

On a GPU the host runs ahead, so its own clock says little. There a part is the time between two
CUDA events, which are read once the GPU has passed them. Around a wait of the host, that is the
time for which the GPU had nothing to do: none where it was still busy when the answer came.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from dra_ray.teachers.source import FeatureSource, Pending, Request

Part = Literal["step", "attack", "teacher_wait", "data_wait"]
T = TypeVar("T")


class Mark(Protocol):
    """A moment."""

    def passed(self) -> bool:
        """Whether it can be read without a wait."""
        ...

    def seconds_to(self, later: Mark) -> float: ...


class _OnHost:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def passed(self) -> bool:
        return True

    def seconds_to(self, later: Mark) -> float:
        assert isinstance(later, _OnHost)
        return later.at - self.at


class _OnGpu:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def passed(self) -> bool:
        return self.event.query()

    def seconds_to(self, later: Mark) -> float:
        assert isinstance(later, _OnGpu)
        return self.event.elapsed_time(later.event) / 1e3


class Clock:
    """Adds up the parts of steps on this device; parts lie inside of a step and side by side.

    Args:
        mark: gives this moment, by the clock that counts; default: that of the device.
    """

    def __init__(self, device: torch.device | str, mark: Callable[[], Mark] | None = None) -> None:
        on_gpu = torch.device(device).type == "cuda"
        self._mark: Callable[[], Mark] = mark or (_OnGpu if on_gpu else _OnHost)
        self._open: deque[tuple[Part, Mark, Mark]] = deque()
        self._sums: dict[str, float] = {}  # of the step under way
        self._done: dict[str, float] = {}  # since `split` was called last

    @contextlib.contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """The block is this part of a step."""
        begun = self._mark()
        try:
            yield
        finally:
            self._open.append((part, begun, self._mark()))

    def timed(self, part: Part, get: Callable[[int], T]) -> Callable[[int], T]:
        """`get`, whose every call is this part of a step."""

        def call(number: int) -> T:
            with self.part(part):
                return get(number)

        return call

    def sources(self, sources: Sequence[FeatureSource]) -> list[FeatureSource]:
        """The same sources, of which sending and waiting count as waits for the teacher."""
        timed = {source: _Timed(source, self) for source in dict.fromkeys(sources)}
        return [timed[source] for source in sources]

    def split(self) -> dict[str, float]:
        """Seconds by part, "rest" included, of the steps that have ended since the last call; what
        the GPU has not passed yet, the next call gives.
        """
        while self._open and self._open[0][2].passed():
            part, begun, ended = self._open.popleft()
            self._sums[part] = self._sums.get(part, 0.0) + begun.seconds_to(ended)
            if part == "step":
                self._complete()
        done, self._done = self._done, {}
        return done

    def _complete(self) -> None:
        """A step has ended: its parts are whole."""
        sums, self._sums = self._sums, {}
        whole = sums.pop("step", 0.0)
        parts: dict[str, float] = {**sums, "rest": max(0.0, whole - sum(sums.values()))}
        self._done = {
            name: self._done.get(name, 0.0) + parts.get(name, 0.0)
            for name in self._done.keys() | parts.keys()
        }


class _Timed:
    """A source whose callers' waits are counted."""

    def __init__(self, source: FeatureSource, clock: Clock) -> None:
        self._source, self._clock = source, clock

    @property
    def feature_dim(self) -> int:
        return self._source.feature_dim

    def submit(self, request: Request) -> Pending:
        with self._clock.part("teacher_wait"):
            return _TimedAnswer(self._source.submit(request), self._clock)

    def close(self) -> None:
        self._source.close()


class _TimedAnswer:
    def __init__(self, pending: Pending, clock: Clock) -> None:
        self._pending, self._clock = pending, clock

    def result(self, timeout_s: float | None = None) -> Tensor:
        with self._clock.part("teacher_wait"):
            return self._pending.result(timeout_s)
