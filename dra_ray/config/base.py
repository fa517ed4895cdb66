"""What every config shares: frozen models, validation with one-line errors, dotted fields and
digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from dra_ray.config.fields import is_table, kind_at, suggest
from dra_ray.config.text import Places, refusal, shown
from dra_ray.storage import credentials_problem, masked

# The upper bounds are far beyond any run. They refuse at once what would fill memory, count for
# hours or overflow a clock, a random generator or int64 before any other error
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**62)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**62)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=100_000)]  # of epochs, steps, workers, replicas
CountOrNone = Annotated[int, Field(ge=0, le=100_000)]
Pixels = Annotated[int, Field(ge=1, le=4096)]  # a side
Batch = Annotated[int, Field(ge=1, le=2**20)]
Images = Annotated[int, Field(ge=0, le=10**10)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]  # three years
SecondsOrNone = Annotated[float, Field(ge=0, le=1e8)]

# fields that never change a result: two configs that differ only in these are the same run
NOT_IN_DIGEST = frozenset(
    {
        "description",
        "paper",
        "pool",
        "resources",
        "tracking",
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "max_concurrent",
        "max_failures",
        "budget",
        "prices",
    }
)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    # fields that came after runs had been recorded: at its default such a field is not in the
    # digest, so that those runs can go on
    ADDED: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        """A config is kept in manifests and shown in reports, so no field may hold a secret."""
        if problem := next(filter(None, map(credentials_problem, _texts(value))), None):
            raise PydanticCustomError("credentials", "{problem}", {"problem": problem})
        return value

    def digest(self) -> str:
        """SHA-256 of what a result depends on: every field but the description, the pool and the
        resources.
        """
        return digest_of(self._without_added())

    def _without_added(self) -> dict[str, Any]:
        """As plain data, without the `ADDED` fields that have their default."""
        tree = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.ADDED and value == field.get_default(call_default_factory=True):
                del tree[name]
            elif isinstance(value, Frozen) and name in tree:
                tree[name] = value._without_added()
        return tree


def _texts(value: Any) -> Iterator[str]:
    """Every text in a field's value; a config inside it has checked its own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


C = TypeVar("C", bound=Frozen)


def digest_of(tree: Mapping[str, Any]) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: kept(item) for key, item in value.items() if key not in NOT_IN_DIGEST}
        return value

    return hashlib.sha256(json.dumps(kept(tree), sort_keys=True).encode()).hexdigest()


# -- reading and changing --------------------------------------------------------------------------
def validate(
    kind: type[C], tree: Mapping[str, Any], source: str, places: Places | None = None
) -> C:
    """Build `kind` from plain data; a `ConfigError` names the first bad field, its value and the
    remedy, and where `places` knows it the line that it is written in.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = first_error(error)
        place = _place_of([str(part) for part in first["loc"]], places or {}, source)
        line = one_line(kind, first)
        if first["type"] == "credentials":
            raise refusal(line) from None  # the source may be a setting with its value
        raise refusal(masked(f"{place}: {line}")) from None


def first_error(error: ValidationError) -> ErrorDetails:
    """A misspelt field before one that is missing, since it is often the same field."""
    errors = error.errors(include_url=False)
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    return unknown[0] if unknown and errors[0]["type"] == "missing" else errors[0]


def _place_of(path: list[str], places: Places, source: str) -> str:
    for length in range(len(path), 0, -1):
        if tuple(path[:length]) in places:
            return places[tuple(path[:length])]
    return source


def one_line(kind: type[Frozen], first: ErrorDetails) -> str:
    parts = [str(part) for part in first["loc"]]
    name = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return f"unknown field {shown(name)}; {suggest(kind, parts)}"
    field = shown_value(name) or kind.__name__.lower()
    if first["type"] == "credentials":
        return f"{field}: {first['msg']}"
    if first["type"] == "value_error":
        said = first["msg"].removeprefix("Value error, ")
        joint = "=" if said.startswith(("'", '"')) else "."
        return f"{field}{joint}{said}" if parts else said
    if first["type"] == "missing":
        return f"{field} is not set; this part needs it"
    message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if "extra fields" in message or first["type"] == "model_type":
        fields = ", ".join(kind_at(kind, parts)[0].model_fields)
        message = f"takes fields of its own ({fields}), not one value"
    return f"{field}={shown(first['input'])}: {message}"


def override(config: C, changes: Mapping[str, Any]) -> C:
    """The same config with dotted fields changed, validated again."""
    tree = config.model_dump(mode="json")
    for field, value in changes.items():
        _place_value(type(config), tree, field, value)
    return validate(
        type(config),
        tree,
        ", ".join(f"{shown_value(field)}={shown_value(v)}" for field, v in changes.items()),
    )


def shown_value(value: object) -> str:
    """As on a command line: text without its quotes, unless it was cut."""
    word = shown(value)
    return word[1:-1] if isinstance(value, str) and word.endswith(("'", '"')) else word


def _place_value(kind: type[Frozen], tree: dict[str, Any], field: str, value: Any) -> None:
    """Put `value` at a dotted field; a part that is null begins anew, and a table's key may hold
    dots (`space.align.weight`).
    """
    parts = field.split(".")
    home, depth = kind_at(kind, parts[:-1])
    for part in parts[:depth]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    rest = parts[depth:]
    if len(rest) > 1:
        table = home.model_fields.get(rest[0])
        if table is None or not is_table(table):
            raise refusal(f"unknown field {shown(field)}; {suggest(kind, parts)}")
        if not isinstance(tree.get(rest[0]), dict):
            tree[rest[0]] = {}
        tree = tree[rest[0]]
        rest = [".".join(rest[1:])]
    tree[rest[0]] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) pairs of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
