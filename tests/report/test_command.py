"""Commands that reproduce a run, read back as the command line would: they give its config
again.
"""

from __future__ import annotations

import json
import random
import shlex
from typing import Any

import pytest

from dra_ray import config
from dra_ray.report import command

KIND_OF = {model: kind for kind, (model, _) in command.COMMANDS.items()}


def read_back(text: str, kind: str) -> config.Frozen:
    words = shlex.split(text)
    model, start = command.COMMANDS[kind]
    assert words[: len(start.split())] == start.split()
    recipe = "quickstart" if kind == "quickstart" else words[len(start.split())]
    settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    return config.load(recipe, model, settings)


@pytest.mark.seconds
@pytest.mark.parametrize("name", config.recipe_names())
def test_a_recipe_is_its_own_command(name: str) -> None:
    settings: Any = config.load(name)
    kind = KIND_OF[type(settings)]
    text = command.reproduce(kind, "x", settings.model_dump(mode="json"))
    assert text is not None
    assert "\n" not in text
    assert read_back(text, kind) == settings
    assert "--set" not in text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "digits-dra",
            {
                "optim.lr": 1e-5,
                "optim.weight_decay": 3e-07,
                "teacher.uri": "/a b/it's; rm -rf $HOME",
                "seed": 3,
            },
        ),
        (
            "digits-dra",
            {"data.uri": "null", "model.name": "timm/resnet18", "optim.clip_norm": None},
        ),
        (
            "digits-dra",
            {
                "evaluation.curve_255": [1, 2.5],
                "evaluation.corruptions": "generated",
                "pool.max_replicas": 3,
            },
        ),
        (
            "digits-sweep",
            {
                "space": {
                    "align.weight": [0, 1e-5],
                    "optim.lr": [0.1],
                    "teacher.uri": ["no", "1e-3", "a: b"],
                },
                "trials": 1,
            },
        ),
        (
            "digits-sweep",
            {"asha.reduction_factor": 1.5, "base.optim.epochs": 9, "base.teacher.uri": "s3://b/t"},
        ),
        (
            "digits-synthesis",
            {"teacher": "package:fashion-edm", "select": {"run": "runs/x", "keep": 0.5}},
        ),
        ("digits-edm", {"images_seen": 1234, "net.channel_mult": [1, 2]}),
        ("quickstart", {"sweep.space": {"align.weight": [0, 2]}, "teacher.images_seen": 5000}),
        (
            "cifar10-wrn-28-10-1m-dra",
            {"paper": None, "description": "mine", "threat.norm": "l2", "threat.start": "normal"},
        ),
    ],
)
def test_a_changed_config_comes_back(name: str, changes: dict[str, Any]) -> None:
    settings: Any = config.override(config.load(name), changes)  # type: ignore[type-var]
    kind = KIND_OF[type(settings)]
    stored = json.loads(json.dumps(settings.model_dump(mode="json")))
    text = command.reproduce(kind, "a run", stored)
    assert text is not None
    assert "--name 'a run-again'" in text
    back = read_back(text, kind).model_dump(mode="json")
    assert {key: value for key, value in back.items() if key not in command.SAME} == {
        k: v for k, v in stored.items() if k not in command.SAME
    }


@pytest.mark.seconds
def test_fields_of_any_kind_survive_the_shell_and_yaml() -> None:
    draws = random.Random(0)
    characters = "ab1.:{}[]#&*!|>'\"%@`,-? =$\\~é"
    for _ in range(60):
        uri = "".join(draws.choices(characters, k=draws.randint(1, 12)))
        if uri.strip() and not uri.startswith("package:"):
            settings = config.override(
                config.load("digits-dra", config.Experiment),
                {"synthetic.uri": uri, "seed": draws.randint(0, 99)},
            )
            text = command.reproduce("train", "x", settings.model_dump(mode="json"))
            assert text is not None, uri
            assert read_back(text, "train").digest() == settings.digest(), uri


def test_an_evaluation_names_what_differs_from_its_run() -> None:
    tree = config.load("digits-dra", config.Experiment).model_dump(mode="json")
    same = tree["evaluation"] | {
        "threat": {"norm": tree["threat"]["norm"], "eps_255": tree["threat"]["eps_255"]}
    }
    assert command.evaluate("runs/x", tree, same) == "dra evaluate runs/x"
    other = same | {"batch": 64, "threat": {"norm": "l2", "eps_255": 127.5}}
    expected = (
        "dra evaluate runs/x --set evaluation.batch=64 --set threat.norm=l2 --set "
        "threat.eps_255=127.5"
    )
    assert command.evaluate("runs/x", tree, other) == expected


def test_what_no_recipe_is_like_has_no_command() -> None:
    assert command.reproduce("cake", "x", {"a": 1}) is None
    assert command.reproduce("train", "x", {}) is None
