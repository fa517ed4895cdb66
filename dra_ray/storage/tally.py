"""What this process has done with stores: plain sums, which whoever emits metrics reads."""

from __future__ import annotations

import threading
from typing import Literal

Event = Literal["cache_hits", "cache_misses", "fetched_bytes", "retries", "errors"]

_lock = threading.Lock()
_sums: dict[Event, int] = {
    "cache_hits": 0,
    "cache_misses": 0,
    "fetched_bytes": 0,
    "retries": 0,
    "errors": 0,
}


def add(event: Event, count: int = 1) -> None:
    with _lock:
        _sums[event] += count


def sums() -> dict[Event, int]:
    """Since this process began."""
    with _lock:
        return dict(_sums)
