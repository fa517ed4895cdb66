"""Recipes against the paper's tables (arXiv 2602.19931), and against each other: a pair differs
only in what it compares.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from dra_ray import config
from dra_ray.config import Experiment, Sweep, flatten, recipe_names

load: Any = functools.cache(config.load)

# Table 2, and the rows of Table 1 that it lacks: (synthetic images, batch, epochs, clean,
# AutoAttack); None where the paper gives none
CIFAR10 = {
    "cifar10-wrn-34-10-at": (0, 128, 200, 84.33, 55.25),
    "cifar10-wrn-34-10-adr": (0, 128, 200, 86.11, 55.26),
    "cifar10-wrn-34-10-ikl": (0, 128, 200, 84.80, 57.09),
    "cifar10-wrn-34-10-dra": (0, 128, 200, 88.54, 57.29),
    "cifar10-wrn-28-10-1m-dm-at": (1_000_000, 512, 400, 91.12, 63.35),
    "cifar10-wrn-28-10-1m-b1024-dm-at": (1_000_000, 1024, 800, 91.43, 63.96),
    "cifar10-wrn-28-10-1m-dra": (1_000_000, 512, 400, 92.36, 64.12),
    "cifar10-wrn-28-10-20m-dm-at": (20_000_000, 2048, 2400, 92.44, 67.31),
    "cifar10-wrn-28-10-20m-ikl": (20_000_000, 2048, 2400, 92.16, 67.75),
    "cifar10-wrn-28-10-20m-dra": (20_000_000, 2048, 2400, 93.14, 67.83),
    "cifar10-vit-b-2-20m-dm-at": (20_000_000, 1024, 500, 92.27, 66.47),
    "cifar10-vit-b-2-20m-dra": (20_000_000, 1024, 500, 93.36, 67.74),
    "cifar10-wrn-70-16-50m-dm-at": (50_000_000, 1024, 2000, 93.25, 70.69),
    "cifar10-rawrn-70-16-50m-dm-at": (50_000_000, 1024, 2000, 93.27, 71.07),
    "cifar10-vit-b-2-50m-dm-at": (50_000_000, 1024, 2000, 94.35, 71.31),
    "cifar10-vit-b-2-50m-dra": (50_000_000, 1024, 2000, 95.22, 71.77),
}
OTHERS = {
    "cifar100-wrn-28-10-1m-dm-at": (1_000_000, None, None, 68.34, 35.72),
    "cifar100-wrn-28-10-1m-dra": (1_000_000, None, None, 69.85, 36.27),
    "cifar100-vit-b-2-1m-dm-at": (1_000_000, 1024, None, 68.53, 36.52),
    "cifar100-vit-b-2-1m-dra": (1_000_000, 1024, None, 69.95, 37.43),
    "imagenet-convnext-b-dm-at": (4_000_000, None, 100, 74.49, 54.44),
    "imagenet-convnext-b-dra": (4_000_000, None, 100, 76.03, 56.07),
    "imagenet-vit-b-16-dm-at": (4_000_000, None, 100, 74.62, 54.64),
    "imagenet-vit-b-16-dra": (4_000_000, None, 100, 76.87, 55.16),
}
IN_BOTH_TABLES = {
    f"cifar10-{net}-{method}"
    for net in ("wrn-28-10-20m", "vit-b-2-50m")
    for method in ("dm-at", "dra")
}
# section 5.6 and appendix D: (clean, AutoAttack)
ABLATIONS = {
    "cifar10-wrn-28-10-1m-dra-noisy": (None, 62.62),
    "cifar10-wrn-28-10-20m-dra-one-sigma": (None, None),
}

SIZE = {
    "synthetic.images",
    "synthetic.fraction",
    "optim.batch",
    "optim.epochs",
    "resources.workers",
}
EXTRA = {
    "cifar10-wrn-28-10-20m-dra",
    "cifar10-vit-b-2-20m-dra",
    "cifar10-vit-b-2-50m-dra",
}  # a second feature per image (App. D)
DRA = [name for name in recipe_names() if name.endswith("-dra")]


def differences(left: str, right: str) -> set[str]:
    """Fields in which two recipes differ, but for what they say of themselves."""
    a, b = (
        dict(flatten(load(name).model_dump(mode="json", exclude={"description", "paper"})))
        for name in (left, right)
    )
    return {field for field in a.keys() | b.keys() if a.get(field) != b.get(field)}


def experiments() -> dict[str, Experiment]:
    loaded = {name: load(name) for name in recipe_names()}
    return {name: recipe for name, recipe in loaded.items() if isinstance(recipe, Experiment)}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_described(name):
    assert load(name).description


def test_recipes_carry_the_numbers_of_the_paper():
    stated = {name: recipe.paper for name, recipe in experiments().items() if recipe.paper}
    assert {name: (paper.clean, paper.autoattack) for name, paper in stated.items()} == {
        **{name: row[3:] for name, row in (CIFAR10 | OTHERS).items()},
        **ABLATIONS,
    }
    tables = {
        name: "Tables 1, 2"
        if name in IN_BOTH_TABLES
        else "Table 2"
        if name in CIFAR10
        else "Table 1"
        for name in CIFAR10 | OTHERS
    }
    assert {name: paper.table for name, paper in stated.items() if name not in ABLATIONS} == tables
    named = {"dm-at": "DM-AT", "dra": "+ DRA", "ikl": "+ IKL", "adr": "+ ADR", "at": "AT"}
    assert all(stated[name].method.startswith(("AT", "DM-AT")) for name in stated)
    assert all(
        named[name.rsplit("-", 1)[1]] in stated[name].method
        for name in tables
        if not name.endswith("dm-at")
    )


def test_the_guide_lists_them():
    guide = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for name, (*_, clean, autoattack) in (CIFAR10 | OTHERS).items():
        assert f"| `{name}` | {clean:.2f} | {autoattack:.2f} |" in guide
    assert all(
        f"`{name}`" in guide
        for name in recipe_names()
        if name.startswith(("cifar", "imagenet", "fashion-d"))
    )


@pytest.mark.parametrize("name", CIFAR10 | OTHERS)
def test_recipes_have_the_size_of_their_row(name):
    recipe = load(name, Experiment)
    found = (recipe.synthetic.images, recipe.optim.batch, recipe.optim.epochs)
    wanted = (CIFAR10 | OTHERS)[name][:3]
    assert all(want in (None, have) for have, want in zip(found, wanted, strict=True))
    if recipe.synthetic.images:
        assert recipe.synthetic.fraction == (0.7 if recipe.synthetic.images <= 1_000_000 else 0.8)


@pytest.mark.parametrize("name", DRA)
def test_a_pair_differs_in_the_alignment_only(name):
    stem = name.removesuffix("-dra")
    pair = next(
        f"{stem}-{method}" for method in ("dm-at", "at") if f"{stem}-{method}" in recipe_names()
    )
    assert differences(name, pair) == {"align.weight"} | (
        {"align.extra_weight"} if name in EXTRA else set()
    )
    assert load(pair, Experiment).align.weight == 0


def test_one_lambda_for_every_run_of_the_paper():
    """Section 5.6: chosen on CIFAR-100, then fixed."""
    assert (
        len(
            {
                recipe.align.weight
                for recipe in experiments().values()
                if recipe.paper and recipe.align.weight
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    ("name", "other", "fields"),
    [
        (
            "cifar10-wrn-28-10-1m-b1024-dm-at",
            "cifar10-wrn-28-10-1m-dm-at",
            {"optim.batch", "optim.epochs", "resources.workers"},
        ),
        ("cifar10-wrn-28-10-20m-dm-at", "cifar10-wrn-28-10-1m-dm-at", SIZE),
        ("cifar10-wrn-70-16-50m-dm-at", "cifar10-wrn-28-10-1m-dm-at", {"model.name"} | SIZE),
        ("cifar10-rawrn-70-16-50m-dm-at", "cifar10-wrn-70-16-50m-dm-at", {"model.name"}),
        (
            "cifar10-vit-b-2-20m-dm-at",
            "cifar10-vit-b-2-50m-dm-at",
            {"synthetic.images", "optim.epochs"},
        ),
        (
            "cifar100-wrn-28-10-1m-dm-at",
            "cifar10-wrn-28-10-1m-dm-at",
            {"data.name", "data.rotate_degrees"},
        ),
        ("imagenet-convnext-b-dm-at", "imagenet-vit-b-16-dm-at", {"model.name"}),
        (
            "cifar10-wrn-28-10-20m-ikl",
            "cifar10-wrn-28-10-20m-dm-at",
            {"loss.name", "loss.alpha", "loss.beta"},
        ),
        (
            "cifar10-wrn-28-10-1m-dra-noisy",
            "cifar10-wrn-28-10-1m-dra",
            set(),
        ),  # the user's teacher.uri is the difference
        (
            "cifar10-wrn-28-10-20m-dra-one-sigma",
            "cifar10-wrn-28-10-20m-dra",
            {"align.extra_weight"},
        ),
    ],
)
def test_other_rows_differ_in_what_they_are_named_for(name, other, fields):
    assert differences(name, other) == fields


def test_vits_have_their_own_optimiser_and_the_attack_of_dm_at():
    changed = {
        field.split(".")[0]
        for field in differences("cifar10-vit-b-2-50m-dm-at", "cifar10-wrn-28-10-1m-dm-at")
    }
    assert changed == {"data", "synthetic", "model", "loss", "optim", "resources"}


def test_ikl_without_synthetic_images_keeps_network_and_data():
    changed = {
        field.split(".")[0]
        for field in differences("cifar10-wrn-34-10-ikl", "cifar10-wrn-34-10-at")
    }
    assert changed == {"threat", "loss", "optim"}


def test_every_run_of_the_paper_is_selected_and_evaluated_alike():
    papers = [recipe for recipe in experiments().values() if recipe.paper]
    assert {(r.selection.steps, r.selection.loss, r.selection.every_epochs) for r in papers} == {
        (40, "margin", 1)
    }
    assert {(r.evaluation.batch, r.evaluation.seed) for r in papers} == {(128, 1)}
    assert {(r.data.name, r.threat.norm, r.threat.eps_255) for r in papers} == {
        ("cifar10", "linf", 8), ("cifar100", "linf", 8), ("imagenet", "linf", 4)
    }  # fmt: skip
    assert (
        {r.data.uri for r in papers}
        == {r.synthetic.uri for r in papers}
        == {r.teacher.uri for r in papers}
        == {None}
    )


@pytest.mark.parametrize(
    "name",
    [name for name in recipe_names() if name.startswith("cifar") and name.endswith("-sweep")],
)
def test_sweeps_of_the_paper_train_every_trial_in_full(name):
    sweep = load(name, Sweep)
    assert sweep.asha.grace_epochs == sweep.base.optim.epochs
    varied = next(iter(sweep.space))
    assert dict(flatten(sweep.base.model_dump()))[varied] in sweep.space[varied]


def test_digests_change_only_on_purpose():
    """A run goes on only with the digest that it was begun with, so that of a recipe changes only
    with its results: then it is written here anew, and CHANGELOG.md says why.
    """
    recorded = json.loads((Path(__file__).parent / "parity" / "recipe_digests.json").read_text())
    settings = {name: config.load(name) for name in recorded}
    assert {name: each.digest()[:16] for name, each in settings.items()} == recorded
    left_out = set(recipe_names()) - recorded.keys()
    # whose teacher's folder is part of it
    assert left_out == {"fashion-canonical", "fashion-synthesis"}
