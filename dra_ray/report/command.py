"""The commands that reproduce a run, written from its config: the nearest recipe, and a --set for
every field that differs.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dra_ray import config
from dra_ray.errors import ConfigError

# kind in a run's manifest -> (kind of its config, command)
COMMANDS: dict[str, tuple[type[config.Frozen], str]] = {
    "quickstart": (config.Quickstart, "dra quickstart"),
    "sweep": (config.Sweep, "dra sweep"),
    "train": (config.Experiment, "dra train"),
    "teacher": (config.TeacherTraining, "dra teacher train"),
    "canonical": (config.Canonical, "dra canonical make"),
    "synthetic": (config.Synthesis, "dra synthesize"),
}
SAME = ("description", "paper")  # what changes nothing that runs
EVALUATED = tuple(field for field in config.Evaluation.model_fields if field != "workers")


def reproduce(kind: str, name: str, tree: Mapping[str, Any]) -> str | None:
    """One shell command that starts a run of the same config under a new name; None where no recipe
    is of its kind.

    Args:
        kind: of the run, as in its manifest.
        tree: its whole config.
    """
    if kind not in COMMANDS:
        return None
    model, command = COMMANDS[kind]
    tree = {field: value for field, value in tree.items() if field in model.model_fields}
    recipes = _recipes(model)
    if not recipes or not tree:
        return None
    settings = {
        recipe: list(_differences(of_recipe, tree)) for recipe, of_recipe in recipes.items()
    }
    told = tree.get("description")
    recipe = min(
        settings, key=lambda known: (len(settings[known]), recipes[known]["description"] != told)
    )
    words = [
        *command.split(),
        *([] if kind == "quickstart" else [recipe]),
        "--name",
        f"{name}-again",
    ]
    return shlex.join(
        [*words, *(word for setting in settings[recipe] for word in ("--set", setting))]
    )


def evaluate(run: str, tree: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The command that evaluates a run as `settings` of a result say, given the run's whole
    config.
    """
    own = tree.get("evaluation", {})
    radius = {
        "norm": settings.get("threat", {}).get("norm"),
        "eps_255": settings.get("threat", {}).get("eps_255"),
    }
    changed = {
        f"evaluation.{field}": settings[field]
        for field in EVALUATED
        if field in settings and settings[field] != own.get(field)
    }
    changed |= {
        f"threat.{field}": value
        for field, value in radius.items()
        if value is not None and value != tree.get("threat", {}).get(field)
    }
    words = ["dra", "evaluate", run]
    return shlex.join(
        [
            *words,
            *(
                word
                for field, value in changed.items()
                for word in ("--set", _setting(field, value))
            ),
        ]
    )


@functools.cache
def _recipes(model: type[config.Frozen]) -> dict[str, dict[str, Any]]:
    """Configs of the package's recipes of one kind, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name in config.recipe_names():
        try:
            found[name] = config.load(name, model).model_dump(mode="json")
        except ConfigError:  # of another kind
            continue
    return found


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Settings that turn one config into the other. Maps whose keys have dots, such as a sweep's
    space, go as a whole.
    """
    for field, value in after.items():
        old = before.get(field)
        if value == old or (not prefix and field in SAME):
            continue
        plain = isinstance(value, Mapping) and not any("." in key for key in value)
        if plain and isinstance(old, Mapping) and set(value) == set(old):
            yield from _differences(old, value, f"{prefix}{field}.")
        else:
            yield _setting(f"{prefix}{field}", value)


def _setting(field: str, value: Any) -> str:
    """As the command line reads it back: in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{field}={text.removesuffix(chr(10)).removesuffix('...').strip()}"
