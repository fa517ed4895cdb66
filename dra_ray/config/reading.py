"""Configs from recipes, YAML files and `--set FIELD=VALUE`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from dra_ray.config.base import C, Frozen, override, validate
from dra_ray.config.experiment import Experiment
from dra_ray.config.sweep import Quickstart, Sweep
from dra_ray.config.teacher import Synthesis, TeacherTraining
from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import Store

Config = Experiment | Sweep | TeacherTraining | Synthesis | Quickstart
KINDS: dict[str, type[Frozen]] = {
    "experiment": Experiment,
    "sweep": Sweep,
    "teacher": TeacherTraining,
    "synthesis": Synthesis,
    "quickstart": Quickstart,
}


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["a.b=1", ...]` of the command line as dotted fields and YAML values."""
    changes = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise ConfigError(f"--set {setting}: write it as field=value, such as optim.epochs=2")
        try:
            changes[field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: the value is not valid YAML") from None
    return changes


def recipe_names() -> list[str]:
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files("dra_ray.recipes").iterdir()
        if f.name.endswith(".yaml")
    )


def _read_tree(source: str) -> dict[str, Any]:
    """A recipe by name, or a YAML or JSON file at any URI; `extends: NAME` starts from another."""
    if source.endswith((".yaml", ".yml", ".json")):
        text = Store(source).read_text()
    elif source in recipe_names():
        text = (resources.files("dra_ray.recipes") / f"{source}.yaml").read_text()
    else:
        raise ConfigError(
            f"unknown recipe '{source}'; {nearest(source, recipe_names())} (a file must end in "
            ".yaml or .json)"
        )
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: expected fields such as 'kind: experiment', found {type(tree).__name__}"
        )
    parent = tree.pop("extends", None)
    return _merged(_read_tree(parent), tree) if parent else tree


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = (
            _merged(below, value)
            if isinstance(below, dict) and isinstance(value, Mapping) and key != "space"
            else value
        )
    return merged


def _expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a sweep or quickstart may name a recipe instead of spelling it out."""
    expanded = dict(tree)
    for field in ("base", "teacher", "synthesis", "sweep"):
        part = tree.get(field)
        if isinstance(part, str) and tree.get("kind") != "synthesis":
            part = _read_tree(part)
        if isinstance(part, Mapping):
            part = _expanded(part)
        if field in tree:
            expanded[field] = part
    return expanded


def load(source: str, kind: type[C] | None = None, settings: list[str] | None = None) -> C:
    """Read a recipe name or a file, apply `--set` settings, validate, and check that it is of the
    wanted kind.
    """
    tree = _read_tree(source)
    found = tree.get("kind", "experiment")
    if found not in KINDS:
        raise ConfigError(f"{source}: unknown kind '{found}'; {nearest(str(found), KINDS)}")
    if kind is not None and KINDS[found] is not kind:
        wanted = next(name for name, known in KINDS.items() if known is kind)
        raise ConfigError(
            f"{source}: is of kind '{found}', but this command takes kind '{wanted}'; see `dra "
            "recipes`"
        )
    config = validate(KINDS[found], _expanded(tree), source)
    changes = parse_settings(settings or [])
    return override(config, changes) if changes else config  # type: ignore[return-value]
