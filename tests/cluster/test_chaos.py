"""Some minutes of `python -m tests.cluster.chaos`, which does it for an hour."""

from __future__ import annotations

import pytest

from tests.cluster.apart import play


@pytest.mark.slow
@pytest.mark.parametrize("what", ["main", "others"])
def test_what_is_killed_changes_nothing(what: str) -> None:
    seen = play("tests.cluster.chaos", "3", "30", what, timeout_s=1800)
    print(seen)
    assert len(seen["kills"]) >= 4
    assert seen["differences"]
    assert not any(seen["differences"].values())
