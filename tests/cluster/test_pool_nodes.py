"""Nodes of teachers: one that is lost loses nothing, an autoscaling cluster gets them for a sweep
and gives them back; and a soak.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dra_ray.storage import Store
from tests.cluster.apart import play


@pytest.mark.slow
def test_a_lost_node_loses_nothing() -> None:
    seen = play("tests.cluster.pool_nodes", "lost", timeout_s=300)
    assert seen["wrong"] == []
    assert (seen["requests"], seen["images"]) == (8, 1280)
    assert seen["retries"] > 0


@pytest.mark.slow
def test_a_sweep_gets_teacher_nodes_and_gives_them_back(teacher: Store, tmp_path: Path) -> None:
    """Only such nodes: the students have room on the head, and a replica runs nowhere else."""
    (tmp_path / "teacher").symlink_to(teacher.uri)
    seen = play("tests.cluster.pool_nodes", "grown", str(tmp_path), timeout_s=500)
    print(seen)
    assert seen["status"] == "done"
    assert seen["kinds"] == ["teacher"]
    assert seen["most"] >= 1
    assert seen["gone"]


@pytest.mark.slow
def test_the_nodes_that_the_plan_predicts_come_and_idle_teachers_go(tmp_path: Path) -> None:
    """On the node types of our cluster.yaml, students and teachers each on their own."""
    seen = play("tests.cluster.pool_nodes", "planned", str(tmp_path), timeout_s=900)
    print(seen)
    assert seen["predicted"] == {"student": 2, "teacher": 2}
    assert seen["came"]
    assert seen["most"] == seen["predicted"]
    assert seen["stayed"] == {"student": 2}


@pytest.mark.slow
def test_a_soak() -> None:
    """Three minutes of what `python -m tests.cluster.soak 20` does for twenty."""
    seen = play("tests.cluster.soak", "3", timeout_s=600)
    print(seen)
    assert seen["errors"] == []
    assert seen["mismatches"] == 0
    assert seen["sent"] == seen["answered"]
    assert seen["kills"] >= 3
    assert seen["retries"] > 0
    assert seen["memory_mb_end"] < 1.5 * seen["memory_mb_start"]
