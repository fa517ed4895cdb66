"""An axis of a sweep: the values that one field takes, listed or from a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dra_ray.config import expressions
from dra_ray.config.base import Frozen, PositiveInt, first_error, one_line
from dra_ray.config.text import shown

Kind = Literal["choice", "uniform", "log_uniform", "integer"]
_KINDS: tuple[Kind, ...] = ("choice", "uniform", "log_uniform", "integer")
_LARGEST = 2**62  # what int64 holds


class Axis(Frozen):
    """The values of one field: `[0, 1]` and `{choice: [0, 1]}` say the same. Exactly one of choice,
    uniform, log_uniform and integer.
    """

    choice: list[Any] | None = Field(None, description="one of these values")
    uniform: tuple[float, float] | None = Field(
        None, description="any number from the first to the second"
    )
    log_uniform: tuple[float, float] | None = Field(
        None, description="the same, every ratio as likely wherever it lies; above 0"
    )
    integer: tuple[int, int] | None = Field(
        None, description="whole numbers from the first to the second, both included"
    )
    step: PositiveInt | None = Field(None, description="of integer: from one to the next")
    when: str | None = Field(
        None,
        description="the field matters only where this is true of other axes, such as "
        "align.weight > 0; elsewhere it keeps base's value",
    )

    @model_validator(mode="after")
    def _checked(self) -> Axis:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "no values"
            raise ValueError(f"has {said}; give one of {', '.join(_KINDS)}")
        if self.choice is not None and not self.choice:
            raise ValueError("has no values; name at least one")
        if self.step is not None and self.integer is None:
            raise ValueError(f"step={self.step} goes with integer alone; take it out")
        if self.bounds is not None:
            self._check_bounds(given[0], *self.bounds)
        if self.when is not None:
            try:
                expressions.of(self.when)
            except ValueError as error:
                raise ValueError(f"when: {error}") from None
        return self

    def _check_bounds(self, kind: str, low: float, high: float) -> None:
        if low >= high:
            raise ValueError(f"{kind}=[{low:g}, {high:g}] is empty; write the smaller value first")
        if kind == "log_uniform" and low <= 0:
            raise ValueError(
                f"log_uniform=[{low:g}, {high:g}] begins at {low:g}, which has no logarithm; begin "
                "above 0, or use uniform"
            )
        if kind == "integer" and max(abs(low), abs(high)) > _LARGEST:
            raise ValueError(f"integer=[{shown(low)}, {shown(high)}] is beyond 2**62; narrow it")
        if not math.isfinite(high - low):
            raise ValueError(f"{kind}=[{low:g}, {high:g}] is wider than a float holds; narrow it")

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def kind(self) -> Kind:
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def bounds(self) -> tuple[float, float] | tuple[int, int] | None:
        """Smallest and largest value of a range; None of a choice."""
        return self.uniform or self.log_uniform or self.integer

    def __contains__(self, value: object) -> bool:
        if self.choice is not None:
            return self.position(value) is not None
        if self.bounds is None or isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds
        inside = low <= value <= high
        return inside and (self.integer is None or (value - low) % (self.step or 1) == 0)

    def position(self, value: object) -> int | None:
        """Where a value stands in the list; None where it does not."""
        listed = enumerate(self.choice or [])
        return next((number for number, known in listed if _same(value, known)), None)

    def __str__(self) -> str:
        if self.choice is not None:
            return shown(self.choice)
        assert self.bounds is not None
        step = f" in steps of {self.step}" if self.step else ""
        return f"{self.kind}=[{self.bounds[0]:g}, {self.bounds[1]:g}]{step}"


def _same(one: object, other: object) -> bool:
    """Equal as YAML means it: 1 and 1.0 are, 1 and true are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _read(value: object) -> object:
    """A mapping as an axis, whose error names the key; a list stays what it is."""
    if not isinstance(value, Mapping):
        if isinstance(value, list | Axis):
            return value
        raise ValueError(
            f"is {shown(value)}; write a list of values, or one of {', '.join(_KINDS)} with its "
            "bounds"
        )
    try:
        return Axis.model_validate(value)
    except ValidationError as error:
        first = first_error(error)
        if first["type"] == "credentials":  # whose message must not be quoted with its place
            raise PydanticCustomError(
                "credentials", "{problem}", {"problem": first["msg"]}
            ) from None
        raise ValueError(one_line(Axis, first).removeprefix("axis.")) from None


# a list is kept as it is written, so that configs of runs that exist keep their digest
Values = Annotated[list[Any] | Axis, BeforeValidator(_read)]


def as_axis(values: list[Any] | Axis) -> Axis:
    """An axis as such, however it was written."""
    return values if isinstance(values, Axis) else Axis.model_construct(choice=values)
