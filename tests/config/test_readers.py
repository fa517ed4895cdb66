"""The table of what reads which field, against the config and against the step itself."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from dra_ray import config
from dra_ray.config.fields import walk
from dra_ray.config.readers import READERS, is_read, missing, readers
from dra_ray.sweeps.schedulers import BUILDERS

FIELDS = {**dict(walk(config.Experiment)), **dict(walk(config.Sweep))}


def test_every_field_of_the_table_is_one_of_the_config() -> None:
    named = set(READERS) | {one.field for field in READERS for one in readers(field)}
    assert named <= set(FIELDS)


@pytest.mark.parametrize("field", sorted(READERS))
def test_a_field_is_read_for_one_choice_and_not_for_another(field: str) -> None:
    """A misspelt choice would never be read, or always."""
    for one in READERS[field]:
        kind = FIELDS[one.field].annotation
        choices: list[Any] = [*get_args(kind), True, False, 0, 1, None, (), "vit-s-4", "wrn-10-2"]
        choices += ["diffusion/runs/edm"]
        choices += list(config.data_sets.DATA_SETS) if one.field == "data.name" else []
        choices += list(BUILDERS) if one.field == "scheduler" else []
        assert {bool(one.reads(choice)) for choice in choices} == {True, False}


def test_the_first_setting_that_is_in_the_way_is_named() -> None:
    values: dict[str, list[Any]] = {"align.weight": [0], "align.loss": ["cosine", "infonce"]}
    reader = missing("align.temperature", lambda field: values[field])
    assert reader is not None
    assert reader.field == "align.weight"
    values["align.weight"] = [0, 0.5]
    assert missing("align.temperature", lambda field: values[field]) is None
    assert missing("optim.lr", lambda field: values[field]) is None


def test_a_field_is_read_beside_others() -> None:
    assert is_read("align.sigma", {"align.weight": 0.5})
    assert not is_read("align.sigma", {"align.weight": 0})
    assert is_read("align.sigma", {"optim.lr": 0.1})  # the weight is base's, which is not told
