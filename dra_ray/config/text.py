"""YAML and JSON text as plain values: bounded before it is expanded, and every value has a place.

Only the plain part of YAML is read: null, booleans, finite numbers, text, lists and mappings with
names as keys. Aliases and merge keys count for what they stand for, so a few hundred bytes cannot
become a few hundred megabytes; tags, which name types, are refused, and a date is text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor
from yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from yaml.resolver import Resolver

from dra_ray.errors import ConfigError
from dra_ray.storage import masked

TEXT_BYTES = 100_000  # a sweep that lists 10,000 seeds has half of it
EXPANDED_CHARACTERS = 1_000_000
DEPTH = 32  # nested lists and mappings; the deepest field has 6
NUMBER_CHARACTERS = 40
_SHOWN_CHARACTERS = 80

# libyaml is 20 times as fast; its Python twin gives the same events where it is not built in
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"

Path = tuple[str, ...]
Places = Mapping[Path, str]  # path of a value -> where it is written, such as "a.yaml, line 3"


class Document(NamedTuple):
    """A value and where each mapping's fields are written."""

    value: Any
    places: dict[Path, str]


def refusal(message: str) -> ConfigError:
    """A `ConfigError` of one printable line, whatever text it quotes."""
    return ConfigError(printable(message))


def printable(text: str, kept: str = "") -> str:
    """The text, with what a terminal would obey (move the cursor, change colours, turn the
    direction of writing) or cannot be encoded written as Python writes it; `kept` stays.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shown(value: object) -> str:
    """`repr`, cut where a message would drown in it; without secrets, which could not be told as
    such once they are cut.
    """
    text = masked(value) if isinstance(value, str) else _shallow(value)
    cut = text[:_SHOWN_CHARACTERS]
    word = repr(cut) if isinstance(value, str) else cut
    return word if len(text) <= _SHOWN_CHARACTERS else f"{word}..."


def _shallow(value: object) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{shown(k)}: {shown(v)}" for k, v in list(value.items())[:5])
        return f"{{{inner}{', ...' if len(value) > 5 else ''}}}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(shown(item) for item in value[:9])
        return f"[{inner}{', ...' if len(value) > 9 else ''}]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**100:
        return "a number of more than 100 digits"  # Python refuses to print those of 4,300
    return repr(value)


def parse(text: str, source: str) -> Document:
    """The one document in `text`, None where there is none. Raises `ConfigError` with the line and
    the column of what cannot be read.
    """
    require_short(len(text), source)
    return _Parser(text, source).document()


def require_short(length: int, source: str) -> None:
    """`ConfigError` for a text of more than TEXT_BYTES."""
    if length > TEXT_BYTES:
        raise refusal(
            f"{source}: has more than {TEXT_BYTES:,} bytes, so it is no config; check the name"
        )


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.events = self._events(text)
        self.places: dict[Path, str] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, characters when spelt out
        self.characters = 0
        self.resolver = Resolver()
        self.constructor = SafeConstructor()

    def _events(self, text: str) -> Iterator[Event]:
        try:
            yield from yaml.parse(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = error.problem or error.context or "unreadable"
            hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
            raise refusal(f"{self._place(mark)}: not valid YAML ({problem}{hint})") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise refusal(
                f"{self.source}, line {line}: not valid YAML (a character that is not printable)"
            ) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8
            problem = (str(error) or type(error).__name__).splitlines()[0]
            raise refusal(f"{self.source}: not valid YAML ({problem})") from None

    def _place(self, mark: Any) -> str:
        if mark is None or self.source.startswith("--set"):
            return self.source
        return f"{self.source}, line {mark.line + 1}, column {mark.column + 1}"

    def _error(self, event: Event, problem: str) -> ConfigError:
        return refusal(f"{self._place(event.start_mark)}: {problem}")

    def document(self) -> Document:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), StreamEndEvent):
            return Document(None, {})
        value = self._value(next(self.events), (), DEPTH)
        next(self.events)  # end of the document
        after = next(self.events)
        if not isinstance(after, StreamEndEvent):
            raise self._error(after, "a second document begins here; keep one, without '---'")
        return Document(value, self.places)

    def _value(self, event: Event, path: Path, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            return self._alias(event)
        tag = getattr(event, "tag", None)
        if tag is not None:
            short = f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag
            raise self._error(event, f"tag {shown(short)} is not read; write the plain value")
        if not depth:
            raise self._error(event, f"nested more than {DEPTH} deep; no field is")
        before = self.characters
        self._count(event, 1)
        value: Any
        if isinstance(event, ScalarEvent):
            self._count(event, len(event.value))
            value = self._scalar(event)
        elif isinstance(event, SequenceStartEvent):
            value = self._list(path, depth)
        else:
            value = self._mapping(path, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = (value, self.characters - before)
        return value

    def _count(self, event: Event, characters: int) -> None:
        self.characters += characters
        if self.characters > EXPANDED_CHARACTERS:
            raise self._error(
                event,
                f"the aliases up to here stand for more than {EXPANDED_CHARACTERS:,} characters; "
                "write less",
            )

    def _alias(self, event: AliasEvent) -> Any:
        if event.anchor not in self.anchors:
            raise self._error(
                event, f"alias *{event.anchor} stands for itself or for nothing before it"
            )
        value, characters = self.anchors[event.anchor]
        self._count(event, characters)
        return value

    def _list(self, path: Path, depth: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            values.append(self._value(event, (*path, str(len(values))), depth - 1))
        return values

    def _mapping(self, path: Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._key(event, path, depth)
            if key is None:
                part = self._value(next(self.events), path, depth - 1)
                merged = self._merge(event, part) | merged
                continue
            if key in values:
                raise self._error(event, f"{shown(key)} is given twice; keep one")
            self.places[(*path, key)] = self._place(event.start_mark)
            values[key] = self._value(next(self.events), (*path, key), depth - 1)
        return merged | values

    def _key(self, event: Event, path: Path, depth: int) -> str | None:
        """A mapping's key; None for the merge key `<<`."""
        if isinstance(event, ScalarEvent) and event.implicit[0] and event.value == "<<":
            self._count(event, 2)
            return None
        key = self._value(event, path, depth - 1)
        if isinstance(key, str):
            return key
        if isinstance(event, ScalarEvent):
            raise self._error(
                event,
                f"{shown(event.value)} is read as {type(key).__name__}, not as a name; put it "
                "in quotes",
            )
        raise self._error(event, f"{shown(key)} is not a name; a field's name is plain text")

    def _merge(self, event: Event, part: Any) -> dict[str, Any]:
        parts = part if isinstance(part, list) else [part]
        merged: dict[str, Any] = {}
        for item in parts:
            if not isinstance(item, dict):
                raise self._error(event, f"<< takes a mapping, not {shown(item)}")
            merged = item | merged  # YAML: the earlier of two wins
        return merged

    def _scalar(self, event: ScalarEvent) -> Any:
        text = event.value
        resolve = self.resolver.resolve
        tag: str = resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        kind = tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return self.constructor.bool_values[text.lower()]
        if kind not in ("int", "float"):
            return text
        if len(text) > NUMBER_CHARACTERS:
            raise self._error(
                event, f"a number of {len(text):,} characters; write at most {NUMBER_CHARACTERS}"
            )
        node = yaml.ScalarNode(_TAG + kind, text)
        try:
            if kind == "int":
                return self._integer(event, self.constructor.construct_yaml_int(node))
            number = self.constructor.construct_yaml_float(node)
        except (ValueError, OverflowError):  # "0b", "0x_": the pattern is wider than the number
            return text
        if not math.isfinite(number):
            raise self._error(event, f"{text} is not a finite number")
        return number

    def _integer(self, event: ScalarEvent, value: int) -> int:
        """Hexadecimal digits stand for more decimal ones, which could not be read back."""
        characters = len(str(value))
        if characters > NUMBER_CHARACTERS:
            raise self._error(
                event, f"a number of {characters} digits; write at most {NUMBER_CHARACTERS}"
            )
        return value
