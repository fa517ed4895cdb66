"""JSON that every parser reads."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from typing import Any


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads, keys sorted: what is not a number is null; infinity is 1e999,
    which reads back as infinity.

    Python's own `NaN` and `Infinity` are no JSON: jq, browsers and DuckDB refuse a whole file for
    one of them.
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)
    except ValueError:
        token = (
            uuid.uuid4().hex
        )  # stands for infinity until the text is there: json has no hook for floats
        text = json.dumps(_finite(value, token), indent=indent, sort_keys=True, allow_nan=False)
        return text.replace(f'"-{token}"', "-1e999").replace(f'"{token}"', "1e999")


def read_json(text: str | bytes) -> Any:
    """As `strict_json` wrote it; files of earlier versions may hold NaN, which is None here too.

    `ValueError` for what is no JSON, and for half a character, which no file could be written with.
    """
    value = json.loads(
        text, parse_constant=lambda constant: None if constant == "NaN" else float(constant)
    )
    if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(value: Any, infinity: str) -> Any:
    """The same tree with None for NaN and a word for infinity."""
    if isinstance(value, float):
        return (
            None
            if math.isnan(value)
            else value
            if math.isfinite(value)
            else infinity
            if value > 0
            else f"-{infinity}"
        )
    if isinstance(value, Mapping):
        return {key: _finite(item, infinity) for key, item in value.items()}
    return [_finite(item, infinity) for item in value] if isinstance(value, list | tuple) else value
