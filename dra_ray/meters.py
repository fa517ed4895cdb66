"""Metrics of `config.metrics`, emitted through Ray.

Ray forgets a gauge that was not set for 20 s, and does not know a counter before its first event
(Ray 2.60). So gauges are set again while what they tell of goes on, and counters begin with 0.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from ray.util import metrics

from dra_ray.config.metrics import BY_NAME, SECONDS, Metric
from dra_ray.errors import DraError
from dra_ray.storage import held_bytes, tally

PERIOD_S = 5.0
Labels = Mapping[str, str]


def _known(name: str, kind: str) -> Metric:
    metric = BY_NAME[name]
    assert metric.kind == kind, name
    return metric


class Counter:
    """A counter that is there from now on, with 0 for each of the sets of labels `each`."""

    def __init__(self, name: str, each: Iterable[Labels] = ({},)) -> None:
        metric = _known(name, "counter")
        self._counter = metrics.Counter(name, metric.help, tag_keys=metric.labels)
        for labels in each:
            # `inc` refuses 0, which the exporter takes
            self._counter._record(0.0, tags=dict(labels))

    def add(self, amount: float, labels: Labels | None = None) -> None:
        """Nothing for 0."""
        if amount > 0:
            self._counter.inc(amount, dict(labels or {}))


class Histogram:
    """Seconds, for one set of labels; Prometheus sees it from its first value on."""

    def __init__(self, name: str, labels: Labels) -> None:
        metric = _known(name, "histogram")
        self._labels = dict(labels)
        self._histogram = metrics.Histogram(name, metric.help, SECONDS, tag_keys=metric.labels)

    def observe(self, seconds: float) -> None:
        self._histogram.observe(seconds, self._labels)


class Gauges:
    """Gauges of something that goes on, with its `labels`; they vanish within a minute after
    `close`, and with their process.

    Args:
        look: called before they are set again, every PERIOD_S, such as to set them anew.
    """

    def __init__(self, labels: Labels, look: Callable[[Gauges], None] | None = None) -> None:
        self._labels, self._look = dict(labels), look
        self._gauges: dict[str, metrics.Gauge] = {}
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._repeat, daemon=True, name="dra-gauges").start()

    def set(self, name: str, value: float, **more: str) -> None:
        labels = self._labels | more
        with self._lock:
            if self._stop.is_set():
                return
            if name not in self._gauges:
                metric = _known(name, "gauge")
                gauge = metrics.Gauge(name, metric.help, tag_keys=metric.labels)
                self._gauges[name] = gauge
            self._values[name, frozenset(labels.items())] = value
            self._gauges[name].set(value, labels)

    def values(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """What is set again, by labels."""
        with self._lock:
            return {labels: value for (of, labels), value in self._values.items() if of == name}

    def close(self) -> None:
        """May be called again."""
        self._stop.set()

    def _repeat(self) -> None:
        while not self._stop.wait(PERIOD_S):
            if self._look is not None:
                self._look(self)
            with self._lock:
                for (name, labels), value in self._values.items():
                    self._gauges[name].set(value, dict(labels))


@contextlib.contextmanager
def gauges(labels: Labels, look: Callable[[Gauges], None] | None = None) -> Iterator[Gauges]:
    """`Gauges` for the length of a `with` block."""
    with contextlib.closing(Gauges(labels, look)) as some:
        yield some


# -- what this process does with stores ------------------------------------------------------------
_COUNTERS: Mapping[tally.Event, str] = {
    "cache_hits": "dra_data_cache_hits",
    "cache_misses": "dra_data_cache_misses",
    "fetched_bytes": "dra_data_fetched_bytes",
    "retries": "dra_storage_retries",
    "errors": "dra_storage_errors",
}


_told: dict[tally.Event, int] = {}  # of this process, to any cluster


@contextlib.contextmanager
def of_stores() -> Iterator[None]:
    """Emit what this process reads and writes, and the cache of its node, for the length of a
    `with` block.
    """
    counters = {event: Counter(name) for event, name in _COUNTERS.items()}

    def look(some: Gauges) -> None:
        for event, count in tally.sums().items():
            counters[event].add(count - _told.get(event, 0))
            _told[event] = count
        with contextlib.suppress(OSError, DraError):  # the next look tells
            some.set("dra_data_cache_bytes", held_bytes())

    with gauges({}, look) as some:
        look(some)
        yield
    look(some)
