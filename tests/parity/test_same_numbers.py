"""Every workload, run small, gives the recorded numbers, files and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.same_numbers import ABSOLUTE, RECORD, differences, machine, measure, scenario


@pytest.mark.slow
def test_no_number_changes(tmp_path: Path) -> None:
    scenario(tmp_path)
    how, lines = differences(measure(tmp_path), json.loads(RECORD.read_text()))
    print(f"compared {how}")
    assert lines == [], f"compared {how}"


def small(accuracy: float = 0.5, bits: str = "a", key: str = "loss") -> dict[str, Any]:
    structure = {"files": ["m.json"], "keys": {"m.json": [key]}, "config digests": {"run": "d"}}
    numbers = {"m.json:accuracy": accuracy, "m.json:epoch": 2}
    return {"structure": structure, "bits": {"weights": bits}, "numbers": numbers}


def record(name: str) -> dict[str, Any]:
    return {"structure": small()["structure"], "machines": {name: small()}}


def test_every_kind_of_change_is_seen() -> None:
    recorded = record(machine())
    how, lines = differences(small(), recorded)
    assert how.startswith("bits")
    assert lines == []
    assert differences(small(bits="b"), recorded)[1] == ["weights was a, is b"]
    assert differences(small(accuracy=0.5 + 1e-9), recorded)[1] != []
    renamed = differences(small(key="cost"), recorded)[1]
    assert renamed == ["keys of m.json: cost is new", "keys of m.json: loss is gone"]


def test_on_another_machine_numbers_have_a_tolerance_and_bits_do_not_count() -> None:
    recorded = record("another machine")
    how, lines = differences(small(bits="b", accuracy=0.5 + ABSOLUTE / 2), recorded)
    assert how.startswith("accuracies")
    assert "another machine" in how
    assert lines == []
    assert len(differences(small(accuracy=0.5 + 2 * ABSOLUTE), recorded)[1]) == 1
    assert len(differences(small(key="cost"), recorded)[1]) == 2
