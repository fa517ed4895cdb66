"""Every workload, run small, gives the recorded numbers, files and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parity.same_numbers import RECORD, differences, measure, scenario


@pytest.mark.slow
def test_no_number_changes(tmp_path: Path) -> None:
    scenario(tmp_path)
    how, lines = differences(measure(tmp_path), json.loads(RECORD.read_text()))
    print(f"compared {how}")
    assert lines == [], f"compared {how}"
