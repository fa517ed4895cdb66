"""What every config shares: frozen models, validation with one-line errors, dotted fields and
digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import credentials_problem, masked

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

# fields that never change a result: two configs that differ only in these are the same run
NOT_IN_DIGEST = frozenset(
    {
        "description",
        "paper",
        "pool",
        "resources",
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "max_concurrent",
    }
)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
        return digest_of(self.model_dump(mode="json"))


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
def validate(kind: type[C], tree: Mapping[str, Any], source: str) -> C:
    """Build `kind` from plain data; a `ConfigError` names the first bad field, its value and the
    remedy.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        line = one_line(kind, tree, error)
        if error.errors()[0]["type"] != "credentials":  # the source is a setting with its value
            line = masked(f"{source}: {line}")
        raise ConfigError(line) from None


def one_line(kind: type[Frozen], tree: Mapping[str, Any], error: ValidationError) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    field = ".".join(parts) or kind.__name__.lower()
    if first["type"] == "extra_forbidden":
        return f"unknown field '{field}'; {nearest(parts[-1], fields_at(kind, parts[:-1]))}"
    if first["type"] == "credentials":
        return f"{field}: {first['msg']}"
    if first["type"] == "value_error":
        where = f"{field}." if parts else ""
        return where + first["msg"].removeprefix("Value error, ")
    return f"{field}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def fields_at(kind: type[Frozen], path: list[str]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Frozen)):
            return []
        kind = annotation
    return list(kind.model_fields)


def override(config: C, changes: Mapping[str, Any]) -> C:
    """The same config with dotted fields changed, validated again."""
    tree = config.model_dump(mode="json")
    for field, value in changes.items():
        *folders, leaf = field.split(".")
        node, kind = tree, type(config)
        for depth, folder in enumerate(folders):
            if not isinstance(node.get(folder), dict):
                raise ConfigError(
                    f"unknown field '{field}'; {nearest(folder, fields_at(kind, folders[:depth]))}"
                )
            node = node[folder]
        node[leaf] = value
    return validate(
        type(config), tree, ", ".join(f"{field}={value}" for field, value in changes.items())
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) pairs of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
