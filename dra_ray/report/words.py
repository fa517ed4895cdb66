"""How a report writes its numbers: percents, counts, intervals, times and values of fields. One
place, so that they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

THIN, FIXED = "\u202f", "\u00a0"  # spaces that do not break: between thousands, and before a unit
MINUS = "−"


def in_percent(fraction: float | None) -> float | None:
    """A fraction as a number of percent with one decimal, for tables and plots; None stays None."""
    return None if fraction is None else round(100 * fraction, 1)


def percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{100 * fraction:.1f}{FIXED}%"


def points(difference: float, sign: bool = True) -> str:
    """A difference of two fractions, in percentage points."""
    return f"{100 * difference:{'+' if sign else ''}.1f}".replace("-", MINUS)


def span(interval: Iterable[float], sign: bool = False) -> str:
    """(low, high) of fractions, in percent or points."""
    return " to ".join(points(edge, sign) for edge in interval)


def count(value: float | None, none: str = "?") -> str:
    """A whole number with its thousands apart."""
    return none if value is None else f"{value:,.0f}".replace(",", THIN)


def number(value: int, one: str, many: str = "") -> str:
    """`3 tasks`, `1 task`."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def value(value: object) -> str:
    """A config value as a reader writes it: 2 for 2.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def beside_name(item: object) -> str | None:
    """A value that stands beside its name: as text, so that a table does not set it apart to the
    right.
    """
    if item is None:
        return None
    if isinstance(item, bool):
        return str(item).lower()  # as in a config file
    if isinstance(item, tuple):
        return ", ".join(value(one) for one in item)
    return count(item) if isinstance(item, int) and not isinstance(item, bool) else value(item)


def fields(changed: Mapping[str, object]) -> str:
    return ", ".join(f"{field} = {value(item)}" for field, item in changed.items()) or "–"
