"""An evaluation's file as a record: complete, of an earlier version, and damaged."""

import pytest
import torch
from pydantic import ValidationError

from dra_ray import config
from dra_ray.config.catalogue import STANDARD
from dra_ray.errors import DataError
from dra_ray.evaluation.result import FILE, Result, read
from dra_ray.evaluation.verdicts import Verdicts, table
from dra_ray.storage import Store

OLD = {
    "images": 40,
    "clean_accuracy": 0.9,
    "autoattack_accuracy": 0.5,
    "interval": [0.35, 0.65],
    "after_attack": {"square": 0.5, "apgd-ce": 0.6},
}


@pytest.fixture
def folder(tmp_path):
    return Store(str(tmp_path))


def test_a_file_of_an_earlier_version_opens_and_loses_nothing(folder):
    (folder / FILE).write_json(OLD | {"of another version": [1, 2]})
    result = read(folder)
    assert (result.images, result.interval, result.pgd_accuracy) == (40, (0.35, 0.65), None)
    assert result.tree() == OLD | {"of another version": [1, 2]}
    assert [row["what"] for row in table(result)] == ["Clean", "after apgd-ce", "AutoAttack"]
    with pytest.raises(ValidationError, match="frozen"):
        result.images = 41


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], "holds no object"),
        ({**OLD, "interval": None}, "wrong 'interval'"),
        ({**OLD, "after_attack": {"square": "half"}}, r"wrong 'after_attack\.square'"),
        ({**OLD, "curve": [{"eps_255": 4}]}, r"has no 'curve\.0\.accuracy'"),
        *(
            ({key: value for key, value in OLD.items() if key != absent}, f"has no '{absent}'")
            for absent in OLD
        ),
    ],
)
def test_a_damaged_file_names_its_field(folder, tree, words):
    (folder / FILE).write_json(tree)
    with pytest.raises(DataError, match=words) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert "run the evaluation again" in str(caught.value)


def test_what_is_measured_is_what_is_read_back(folder):
    """From verdicts to the file and back; `curve` and `corruptions` only where measured."""
    evaluation = config.Evaluation(curve_255=(2.0,), corruptions="generated", pgd_steps=3)
    measured = {}
    for radii, corrupted in (((), []), ((2.0,), [("fog", 1, 0.5), ("fog", 2, 0.25)])):
        verdicts = Verdicts(4, radii)
        verdicts.clean[:3], verdicts.num_classes, verdicts.numerics = True, 10, [{"device": "cpu"}]
        verdicts.corrupted = corrupted
        plan = verdicts.begin_attacks(torch.rand(4, 1, 4, 4), 4, evaluation)
        while chunks := plan.chunks():
            (chunk,) = chunks
            broken = torch.arange(len(chunk.indices)) == 0
            plan.merge(chunk, broken, torch.zeros(len(broken), 1, 4, 4))
        summary = verdicts.summary(evaluation, config.Threat(eps_255=8), STANDARD)
        result = Result(**summary.given(), batch=4, elapsed_s=1.5)
        (folder / FILE).write_json(result.tree())
        assert read(folder) == result
        measured[bool(radii)] = (folder / FILE).read_json()
    assert measured[True].keys() - measured[False].keys() == {"curve", "corruptions"}
    assert measured[True]["corruptions"] == {
        "source": "generated",
        "rows": [
            {"name": "fog", "severity": 1, "accuracy": 0.5},
            {"name": "fog", "severity": 2, "accuracy": 0.25},
        ],
        "mean": 0.375,
        "by_corruption": {"fog": 0.375},
        "published_sets": False,
    }
    assert measured[False]["threat"] == {"norm": "linf", "eps_255": 8.0}
    assert measured[False]["after_attack"] == {
        "apgd-ce": 0.5,
        "apgd-t": 0.25,
        "fab-t": 0.0,
        "square": 0.0,
    }
