"""Configs from recipes, YAML files and `--set FIELD=VALUE`."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from importlib import resources
from typing import Any, overload

import yaml
from pydantic import BaseModel

from dra_ray.config.analysis import Analysis
from dra_ray.config.base import C, Frozen, override, shown_value, validate
from dra_ray.config.canonical import Canonical
from dra_ray.config.experiment import Experiment
from dra_ray.config.fields import nested
from dra_ray.config.sweep import Quickstart, Sweep
from dra_ray.config.teacher import Synthesis, TeacherTraining
from dra_ray.config.text import Document, Path, parse, refusal, require_short, shown
from dra_ray.errors import ConfigError, DraError, nearest
from dra_ray.storage import Store

FILE_ENDINGS = (".yaml", ".yml", ".json")
FILES, CHAIN = 32, 8  # files that one config may be made of, and how many of them in a row

Config = Experiment | Sweep | TeacherTraining | Synthesis | Canonical | Analysis | Quickstart
KINDS: dict[str, type[Frozen]] = {
    "experiment": Experiment,
    "sweep": Sweep,
    "teacher": TeacherTraining,
    "synthesis": Synthesis,
    "canonical": Canonical,
    "analysis": Analysis,
    "quickstart": Quickstart,
}


def parse_settings(settings: list[str], option: str = "--set") -> dict[str, Any]:
    """`["a.b=1", ...]` of the command line as dotted fields and YAML values."""
    changes = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise refusal(
                f"{option} {shown_value(setting)}: write it as field=value, such as optim.epochs=2"
            )
        changes[field] = parse(value, f"{option} {shown_value(setting)}").value
    return changes


def recipe_names() -> list[str]:
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files("dra_ray.recipes").iterdir()
        if f.name.endswith(".yaml")
    )


class _Files:
    """The files that one config is made of: what `extends` and the parts of sweeps name, which must
    not lead in circles nor fan out without end.
    """

    def __init__(self) -> None:
        self.count = 0

    def read(self, source: str, chain: tuple[str, ...] = ()) -> Document:
        """A recipe by name, or a YAML or JSON file at any URI, on top of what it extends; `chain`
        has the files that led here.
        """
        name = _identity(source)
        if name in chain:
            circle = " -> ".join([*chain[chain.index(name) :], name])
            raise refusal(f"{source}: leads back to itself ({circle}); take one of the links out")
        self.count += 1
        if len(chain) == CHAIN or self.count > FILES:
            raise refusal(
                f"{source}: comes after {self.count - 1} other files; a config is made of at "
                f"most {FILES}, of which {CHAIN} in a row"
            )
        document = parse(_text(source), source)
        tree = document.value
        if not isinstance(tree, dict):
            kind = "nothing" if tree is None else type(tree).__name__
            raise refusal(f"{source}: expected fields such as 'kind: experiment', found {kind}")
        beside = Document(_anchored(tree, _folder(source)), document.places)
        return self._on_top(beside, (*chain, name))

    def _on_top(self, document: Document, chain: tuple[str, ...]) -> Document:
        """Fields on top of what their `extends` names, if they have one."""
        tree = dict(document.value)
        parent = tree.pop("extends", None)
        if parent is None:
            return document
        if not isinstance(parent, str):
            raise refusal(
                f"{document.places['extends',]}: extends={shown(parent)} is not the name of a "
                "recipe or a file; write one name"
            )
        base = self.read(parent, chain)
        return Document(_merged(base.value, tree), base.places | document.places)

    def with_parts(
        self, kind: type[BaseModel], document: Document, chain: tuple[str, ...]
    ) -> Document:
        """A part of a sweep or quickstart may name a recipe instead of spelling it out, or extend
        one: the same with that recipe in its place.
        """
        tree, places = dict(document.value), dict(document.places)
        for field, info in kind.model_fields.items():
            part, inner = tree.get(field), nested(info)
            if inner is None or inner not in KINDS.values():
                continue
            below, links = Document(part, _below(field, places)), chain
            if isinstance(part, str):
                below, links = self.read(part, chain), (*chain, _identity(part))
            if isinstance(below.value, dict):
                below = self._on_top(below, links)
                below = self.with_parts(inner, below, links)
                tree[field] = below.value
                places |= {(field, *path): place for path, place in below.places.items()}
        return Document(tree, places)


def _folder(source: str) -> str:
    """That of a file, with its slash; "" for a recipe, and for a file of the working directory."""
    return source[: source.rfind("/") + 1] if source.endswith(FILE_ENDINGS) else ""


def _anchored(tree: dict[str, Any], folder: str) -> dict[str, Any]:
    """The same with the files that it is made of named from where we stand: a file names them from
    where it lies itself.
    """
    parts = _parts()

    def named(value: Any) -> Any:
        relative = isinstance(value, str) and value.endswith(FILE_ENDINGS)
        return _joined(folder, value) if relative and _is_relative(value) else value

    def of(key: str, value: Any) -> Any:
        if key == "extends" or (key in parts and isinstance(value, str)):
            return named(value)
        return _anchored(value, folder) if key in parts and isinstance(value, dict) else value

    return {key: of(key, value) for key, value in tree.items()} if folder else tree


def _joined(folder: str, file: str) -> str:
    scheme, separator, path = folder.rpartition("://")
    # object stores have no folder ".."
    return f"{scheme}://{posixpath.normpath(path + file)}" if separator else folder + file


def _is_relative(file: str) -> bool:
    return "://" not in file and not file.startswith(("/", "~"))


def _below(field: str, places: Mapping[Path, str]) -> dict[Path, str]:
    return {path[1:]: place for path, place in places.items() if path[0] == field and path[1:]}


def _identity(source: str) -> str:
    return Store(source).resolved().uri if source.endswith(FILE_ENDINGS) else source


def _text(source: str) -> str:
    if source in recipe_names():
        return (resources.files("dra_ray.recipes") / f"{source}.yaml").read_text()
    if not source.endswith(FILE_ENDINGS) and "/" in source:
        raise refusal(
            f"{shown(source)} is no recipe, and no file whose name ends in .yaml or .json; see "
            "`dra recipes`"
        )
    if not source.endswith(FILE_ENDINGS):
        raise refusal(
            f"unknown recipe {shown(source)}; {nearest(source[:100], recipe_names())} (a file must "
            "end in .yaml or .json)"
        )
    try:
        require_short(Store(source).size(), source)
        raw = Store(source).read_bytes()
    except DraError:
        raise
    except Exception as error:  # a scheme's driver raises its own kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refusal(f"{shown(source)} cannot be read ({reason}); check the name") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refusal(
            f"{source}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as "
            "UTF-8"
        ) from None


def _parts() -> set[str]:
    """Fields of configs that are configs themselves, and may be named by a recipe."""
    return {
        field
        for kind in KINDS.values()
        for field, info in kind.model_fields.items()
        if nested(info) in KINDS.values()
    }


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, str) and isinstance(value, Mapping) and key in _parts():
            value = {"extends": below, **value}  # what the parent names, with these changes
        merged[key] = (
            _merged(below, value)
            if isinstance(below, dict) and isinstance(value, Mapping) and key != "space"
            else value
        )
    return merged


@overload
def load(source: str, kind: type[C], settings: list[str] | None = None) -> C: ...


@overload
def load(source: str, kind: None = None, settings: list[str] | None = None) -> Config: ...


def load(
    source: str, kind: type[Frozen] | None = None, settings: list[str] | None = None
) -> Frozen:
    """Read a recipe name or a file, apply `--set` settings, validate, and check that it is of the
    wanted kind.
    """
    files = _Files()
    document = files.read(source)
    tree, places = document
    found = tree.get("kind", "experiment")
    if not isinstance(found, str) or found not in KINDS:
        place = places.get(("kind",), source)
        raise refusal(f"{place}: unknown kind {shown(found)}; {nearest(str(found)[:100], KINDS)}")
    if kind is not None and KINDS[found] is not kind:
        wanted = next(name for name, known in KINDS.items() if known is kind)
        raise ConfigError(
            f"{source}: is of kind '{found}', but this command takes kind '{wanted}'; see `dra "
            "recipes`"
        )
    tree, places = files.with_parts(KINDS[found], document, (_identity(source),))
    config = validate(KINDS[found], tree, source, places)
    changes = parse_settings(settings or [])
    return override(config, changes) if changes else config


class _Dumper(yaml.SafeDumper):
    """Lists in one line, so that a sweep of many seeds stays short."""


_Dumper.add_representer(
    list,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=True
    ),
)


def to_yaml(config: Frozen | Mapping[str, Any]) -> str:
    """Every field with its value; `load` of a file of this text gives an equal config. Also of a
    config's plain data.
    """
    tree = config.model_dump(mode="json") if isinstance(config, Frozen) else dict(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)
