"""What a pool says of itself keeps its keys on disk; what must start at once imports little."""

from __future__ import annotations

import json

import pytest

from dra_ray import config
from dra_ray.pool.records import Books, LogRow, Status, Totals
from tests.support.imports import without


def test_totals_add_up_field_by_field() -> None:
    one, two = Totals(1, 64, 0, 2, 0.5, 0.25), Totals(requests=3, hits=1)
    assert Totals.sum([one, two, Totals()]) == Totals(4, 64, 1, 2, 0.5, 0.25)
    assert Totals.sum([]) == Totals()


def test_a_status_keeps_its_keys_on_disk() -> None:
    teacher = config.Teacher(uri="/teacher", micro_batch=16)
    trials = {"trial-7": Totals(2, 128, 1, 0, 0.5, 1.0)}
    books = Books(teacher, 3.5, True, 1, 2, Totals.sum(trials.values()), trials)
    facts = Status("teacher-1", {"RUNNING": 1}, books).as_json()
    totals = {"requests": 2, "images": 128, "hits": 1, "retries": 0, "service_s": 0.5, "wait_s": 1}
    assert facts == teacher.model_dump(mode="json") | totals | {
        "pool": "teacher-1",
        "replicas": {"RUNNING": 1},
        "up_s": 3.5,
        "keep": True,
        "drivers": 1,
        "clients": 2,
        "trials": {"trial-7": totals},
    }
    assert Status("teacher-1", {}).as_json() == {"pool": "teacher-1", "replicas": {}}


def test_a_status_is_a_line_of_a_table() -> None:
    totals = Totals(2, 128, 1, 0, 0.5, 1.0)
    books = Books(config.Teacher(uri="/teacher"), 3.5, True, 1, 2, totals, {})
    row = Status("teacher-1", {"STARTING": 2, "RUNNING": 1}, books).row()
    assert (row["replicas"], row["teacher"], row["kept"]) == (
        "1 running, 2 starting",
        "/teacher",
        True,
    )
    assert (row["mean_service_s"], row["mean_wait_s"]) == (0.25, 0.5)
    bare = Status("teacher-1", {}).row()
    assert (bare["replicas"], bare["teacher"], bare["requests"], bare["mean_wait_s"]) == (
        "none",
        "?",
        0,
        0,
    )
    assert list(bare) == list(row)


def test_rows_of_a_log_are_read_back_and_older_ones_too() -> None:
    text = (
        '{"at": 1.5, "running": 1, "target": 2, "demand": 0.25, "clients": 3, "requests": 4, '
        '"images": 5, "hits": 6, "retries": 7}'
    )
    row = LogRow.model_validate_json(text)
    assert row.on_disk() == json.loads(text)
    assert LogRow.model_validate({"at": 1.5, "running": 1}).target is None


@pytest.mark.seconds
def test_what_must_start_at_once_imports_no_torch() -> None:
    """The ledger, the exchange and the policy: torch alone takes seconds."""
    modules = [f"dra_ray.pool.{name}" for name in ("policy", "exchange", "ledger", "records")]
    without("torch", f"import {', '.join([*modules, 'dra_ray.config.metrics'])}")


@pytest.mark.seconds
def test_a_training_worker_imports_no_ray_serve_before_it_asks_a_pool() -> None:
    without("ray.serve", "import dra_ray.workloads.train, dra_ray.workloads.sweep")
