"""Rows of a run's logs, without what two runs never have alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TIMES = {"elapsed_s", "validation_s", "at", "images_per_s"}


def without_times(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the time that they took or were written at."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
