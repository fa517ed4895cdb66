"""Entries in RobustBench's form: keys and types as in all published entries, numbers as strings,
and no claim that does not hold.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dra_ray import config
from dra_ray.errors import ConfigError, DataError
from dra_ray.report import robustbench
from dra_ray.report.robustbench import Facts
from dra_ray.storage import Store

# of the 188 published entries with a radius: keys in all of them, then those in some (counted in
# RobustBench 78fcc9e)
PUBLISHED = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
}
SOME = {"footnote": str, "unreliable": bool}
EFFORT = {"apgd_steps": 100, "fab_steps": 100, "square_queries": 5000}
# the numbers of a published entry, as an evaluation would give them
RESULT: dict[str, Any] = {
    "images": 10_000,
    "clean_accuracy": 0.9244,
    "autoattack_accuracy": 0.6731,
    "threat": {"norm": "linf", "eps_255": 8.0},
    "seed": 0,
    "batch": 128,
    "effort": EFFORT,
    "flags": [],
}
FACTS = Facts(
    title="Better Diffusion Models Further Improve Adversarial Training",
    authors="Zekai Wang, Tianyu Pang, Chao Du, Min Lin, Weiwei Liu, Shuicheng Yan",
    year=2023,
    venue="ICML 2023",
    link="https://arxiv.org/abs/2302.04638",
    dataset="cifar10",
    architecture="WideResNet-28-10",
    tag="WRN-28-10",
    synthetic_images=20_000_000,
    checkpoint="https://example.org/weights",
)


def test_an_entry_has_the_published_form_key_by_key(tmp_path) -> None:
    file, text = robustbench.write(RESULT, FACTS, Store(str(tmp_path)))
    assert file.name == "Wang2023Better_WRN-28-10.json"
    assert file.read_json() == json.loads(file.read_text())
    made = file.read_json()
    assert list(made) == [*PUBLISHED, *SOME]
    for key, kind in (PUBLISHED | SOME).items():
        assert type(made[key]) is kind, key
    assert {
        key: made[key]
        for key in (
            "eps",
            "clean_acc",
            "reported",
            "autoattack_acc",
            "dataset",
            "architecture",
            "venue",
        )
    } == {
        "eps": "8/255",
        "clean_acc": "92.44",
        "reported": "67.31",
        "autoattack_acc": "67.31",
        "dataset": "cifar10",
        "architecture": "WideResNet-28-10",
        "venue": "ICML 2023",
    }
    assert (made["additional_data"], made["number_forward_passes"], made["unreliable"]) == (
        False,
        1,
        False,
    )
    assert "20M synthetic" in made["footnote"]
    assert (Store(str(tmp_path)) / "Wang2023Better_WRN-28-10.md").read_text() == text


def test_what_is_not_known_is_left_out() -> None:
    bare = robustbench.entry(
        RESULT, FACTS.model_copy(update={"synthetic_images": 0, "reported": 67.5})
    )
    assert set(bare) == {*PUBLISHED, "unreliable"}
    assert bare["reported"] == "67.50"
    assert (
        robustbench.entry(RESULT | {"flags": ["Square broke 1.1 %"]}, FACTS)["unreliable"] is True
    )


@pytest.mark.parametrize(
    ("norm", "eps_255", "dataset", "images", "eps", "words"),
    [
        ("l2", 127.5, "cifar10", 10_000, "0.5", None),
        ("linf", 4.0, "imagenet", 5000, "4/255", "fixed list of 5,000"),
        (
            "linf",
            4.0,
            "cifar10",
            10_000,
            "4/255",
            "cifar10 Linf 4/255 fits no board; there are cifar10 Linf 8/255, cifar10 L2 0.5, ",
        ),
        ("l2", 127.5, "cifar100", 10_000, "0.5", "cifar100 L2 0.5 fits no board"),
        ("linf", 8.0, "fashion-mnist", 10_000, "8/255", "fashion-mnist Linf 8/255 fits no board"),
        (
            "linf",
            8.0,
            "cifar10",
            1000,
            "8/255",
            "evaluated on 1,000 images, but the board's test set has 10,000",
        ),
    ],
)
def test_boards(
    norm: str, eps_255: float, dataset: str, images: int, eps: str, words: str | None
) -> None:
    result, facts = (
        RESULT | {"threat": {"norm": norm, "eps_255": eps_255}, "images": images},
        FACTS.model_copy(update={"dataset": dataset}),
    )
    assert robustbench.entry(result, facts)["eps"] == eps
    found = robustbench.notes(result, facts)
    assert found == [] if words is None else (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"version": "rand"}}, "evaluation.version='rand'"),
        ({"level": "screen"}, "level='screen' only bounds"),
        ({"effort": EFFORT | {"square_queries": 500}}, "less than standard"),
    ],
)
def test_only_standard_autoattack_becomes_an_entry(tmp_path, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        robustbench.write(RESULT | change, FACTS, Store(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not Store(str(tmp_path)).names()
    with pytest.raises(DataError, match="no 'autoattack_accuracy'"):
        robustbench.write(
            {"images": 1, "clean_accuracy": 1.0, "threat": {}}, FACTS, Store(str(tmp_path))
        )


def test_other_rounding_and_flags_are_told() -> None:
    found = robustbench.notes(
        RESULT
        | {"settings": {"level": "fast", "streams": "sample"}, "flags": ["Square broke 1.1 %"]},
        FACTS,
    )
    assert [
        words in note
        for words, note in zip(
            ("level=fast", "streams=sample", "flagged: Square"), found, strict=True
        )
    ] == [True] * 3


def test_the_text_answers_what_the_form_asks() -> None:
    text = robustbench.submission(robustbench.entry(RESULT, FACTS), RESULT, FACTS)
    for part in (
        FACTS.title,
        FACTS.authors,
        FACTS.link,
        "WideResNet-28-10",
        "Linf",
        "8/255",
        "92.44 %",
        "67.31 %",
        "false",
        "standard version",
    ):
        assert part in text
    assert "model_info/cifar10/Linf/Wang2023Better_WRN-28-10.json" in text
    assert FACTS.checkpoint in text
    assert "Before it is handed in" not in text
    later = FACTS.model_copy(update={"checkpoint": ""})
    assert "weights and code is missing" in robustbench.submission(
        robustbench.entry(RESULT, later), RESULT, later
    )


@pytest.mark.parametrize(
    ("author", "title", "name"),
    [
        (
            "Edoardo Debenedetti",
            "A Light Recipe to Train Robust Vision Transformers",
            "Debenedetti2022Light",
        ),
        (
            "Seyed-Mohsen Moosavi-Dezfooli",
            "Robustness via Curvature Regularization",
            "Moosavi-Dezfooli2022Robustness",
        ),
        (
            "Jingfeng Zhang",
            "Geometry-aware Instance-reweighted Adversarial Training",
            "Zhang2022Geometry",
        ),
        ("Élise Müller, B C", "«Größe» matters", "Muller2022Groe"),
    ],
)
def test_entries_are_named_as_published_ones(author: str, title: str, name: str) -> None:
    assert (
        robustbench.identifier(
            FACTS.model_copy(update={"authors": author, "title": title, "year": 2022, "tag": ""})
        )
        == name
    )


def test_facts_are_a_file_whose_gaps_the_run_fills(tmp_path) -> None:
    store = Store(str(tmp_path)) / "paper.yaml"
    store.write_text(
        "title: Some Title\nauthors: A Bee\nyear: 2026\nvenue: arXiv, Feb 2026\nlink: "
        "https://example.org\n"
    )
    experiment = config.Experiment(
        model=config.Model(name="wrn-28-10"), data=config.Data(name="cifar10", uri="x")
    )
    found = robustbench.facts(store, experiment)
    assert (found.dataset, found.architecture, found.tag, found.synthetic_images) == (
        "cifar10",
        "WideResNet-28-10",
        "WRN-28-10",
        0,
    )
    assert robustbench.identifier(found) == "Bee2026Some_WRN-28-10"
    with pytest.raises(
        ConfigError, match="dataset is not set; write dataset, architecture"
    ):  # a default is not what was evaluated
        robustbench.facts(store, config.Experiment())
    for content, words in (
        ("title: x\n", "authors is not set; write authors, year, venue, link"),
        ("title: ''\nauthors: x\nyear: 2026\nvenue: x\nlink: x\n", "title=''"),
        ("titel: x\n", "did you mean 'title'"),
        ("- x\n", "holds no fields"),
        ("a: [", "not valid YAML"),
        ("a: " + "[" * 9_000, "nested more than 32 deep"),
        ("a: 2020-99-99\n", "unknown field 'a'"),
        ("5: x\n", "put it in quotes"),
        (f"title: {'9' * 5_000}\n", "a number of 5,000 characters"),
        ("title: !!python/object:os.system x\n", "is not read"),
    ):
        store.write_text(content)
        with pytest.raises(ConfigError, match=words) as caught:
            robustbench.facts(store, experiment)
        assert "\n" not in str(caught.value)


def test_models_are_spelled_as_on_the_boards() -> None:
    names = ("relu-wrn-34-10", "rawrn-70-16", "resnet-18", "timm/convnext_base.fb_in1k")
    assert [robustbench.spelled(name) for name in names] == [
        ("WideResNet-34-10", "WRN-34-10"),
        ("RaWideResNet-70-16", "RaWRN-70-16"),
        ("ResNet-18", "R18"),
        ("convnext_base.fb_in1k", "convnext_base.fb_in1k"),
    ]
