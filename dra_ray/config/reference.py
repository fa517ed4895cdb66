"""docs/fields.md: every field with its values, default and meaning, from the models themselves.

`python -m dra_ray.config.reference > docs/fields.md` brings it up to date.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dra_ray.config.fields import is_table, nested
from dra_ray.config.reading import KINDS

_INTRODUCTION = """\
# Fields

What a recipe, a YAML file or `--set FIELD=VALUE` may say, by kind of config. A field of a part is
named with dots: `optim.lr`; in a sweep it is `base.optim.lr`, in the quickstart
`sweep.base.optim.lr`. `dra config RECIPE` prints the values that a recipe has. Units are in names:
`*_255` are pixel steps of 1/255, `*_s` seconds.

This page is generated: `python -m dra_ray.config.reference > docs/fields.md`.
"""
_HEAD = "| field | value | default | meaning |\n|---|---|---|---|"
_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}
_NO_BOUND = 2**62  # what int64 holds

Schema = Mapping[str, Any]  # as JSON Schema has it


def reference() -> str:
    """The page, as Markdown."""
    documented: dict[type[BaseModel], str] = {}
    sections = [
        section
        for name, kind in KINDS.items()
        for section in _sections(kind, f"kind: {name}", documented)
    ]
    return "\n".join([_INTRODUCTION, *sections])


def _sections(
    kind: type[BaseModel], title: str, documented: dict[type[BaseModel], str]
) -> Iterator[str]:
    """A section of `kind`, then one of each of its parts that has none yet; `documented` keeps
    their titles.
    """
    documented[kind] = title
    schema = kind.model_json_schema()
    new: dict[str, type[BaseModel]] = {}
    rows = []
    for name, field in kind.model_fields.items():
        part, entry = nested(field), _entry(field.annotation) if is_table(field) else None
        values = _values(schema["properties"][name])
        for inner in filter(None, (part, entry)):
            if inner not in documented:
                new[name] = inner
                documented[inner] = name
            link = f"see [{documented[inner]}](#{_anchor(documented[inner])})"
            values = link if inner is part else f"{values} or {link}"
        default = "needed"
        if not field.is_required():
            default = _default(field.get_default(call_default_factory=True), part is not None)
        meaning = field.description or (_summary(part) if part is not None else "")
        rows.append(f"| `{name}` | {_cell(values)} | {_cell(default)} | {_cell(meaning)} |")
    level = "##" if kind in KINDS.values() else "###"
    yield f"{level} {title}\n\n{inspect.getdoc(kind)}\n\n{_HEAD}\n" + "\n".join(rows) + "\n"
    for name, part in new.items():
        if part not in KINDS.values():
            yield from _sections(part, name, documented)
        else:
            documented[part] = f"kind: {_kind_name(part)}"


def _entry(annotation: object) -> type[BaseModel] | None:
    """The config that a table's entry may be, None where entries are plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_entry, typing.get_args(annotation))), None)


def _kind_name(kind: type[BaseModel]) -> str:
    return next(name for name, known in KINDS.items() if known is kind)


def _summary(part: type[BaseModel]) -> str:
    return re.split(r"[.:](?:\s|$)", inspect.getdoc(part) or "")[0].replace("\n", " ")


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return title.lower().replace(":", "").replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _default(value: object, is_part: bool) -> str:
    if value is None:
        return "none"
    if is_part or value in ("", {}, ()):
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _values(schema: Schema) -> str:
    """`integer >= 1`, "`a` or `b`", ..."""
    if "anyOf" in schema:
        parts = [_values(part) for part in schema["anyOf"] if "$ref" not in part]
        return " or ".join("none" if part == "null" else part for part in parts)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} of: {_values(schema['prefixItems'][0])}"
        return f"list of: {_values(schema['items'])}"
    if schema.get("type") == "object":
        entry = schema.get("additionalProperties")
        return f"name: {_values(entry if isinstance(entry, Mapping) else {})}"
    bounds = [
        f"{sign} {_number(schema[key])}"
        for key, sign in _BOUNDS.items()
        if abs(schema.get(key, _NO_BOUND)) < _NO_BOUND
    ]
    word = {"string": "text", "boolean": "true, false"}.get(schema.get("type", ""), "")
    return " ".join([word or schema.get("type", "any"), ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    return f"{value:,}" if abs(value) < 2**40 else f"{value:.3g}"


if __name__ == "__main__":
    print(reference(), end="")
