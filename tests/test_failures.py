"""What would fail alike again is told from what may pass, and a log that fails stops nothing."""

from __future__ import annotations

import pytest
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import WorkerGroupError

from dra_ray import cluster, errors
from dra_ray.pool.records import LogRow
from dra_ray.pool.service import Watch
from dra_ray.runs import read_rows
from dra_ray.storage import Store
from dra_ray.workloads import sweep
from dra_ray.workloads.train import StepLog
from tests.workloads.test_sweep import SWEEP, result

LASTING = [
    errors.ConfigError("a"),
    errors.DataError("b"),
    errors.CheckpointError("c"),
    errors.LastingError("d"),
    ValueError("shapes differ"),
]
PASSING = [
    errors.RunError("a"),
    errors.PoolError("b"),
    errors.StorageError("c"),
    ConnectionResetError("d"),
    RayError("a node went"),
]


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_a_failure_that_comes_again_ends_its_trial_and_ranks_it_last(
    error: Exception, tmp_path
) -> None:
    rungs = sweep.Rungs(SWEEP, Store(str(tmp_path)) / "rungs.jsonl", None)
    rungs.add("trial-001", result(1, 0.9), stop=False)
    rungs.add("trial-002", result(1, 0.2), stop=False)
    assert rungs.fail("trial-001", error) is None
    assert rungs.fail("trial-000", error) is None
    again = sweep.Rungs(SWEEP, Store(str(tmp_path)) / "rungs.jsonl", None)  # as a restart reads it
    assert again.unfinished(["trial-000", "trial-001", "trial-002", "trial-003"]) == [
        "trial-002",
        "trial-003",
    ]
    assert again.last("trial-001").robust_accuracy == 0.9
    assert again.last("trial-000").robust_accuracy is None
    assert again.last("trial-001").reason == str(error)
    experiments = dict.fromkeys(("trial-000", "trial-001", "trial-002"), SWEEP.base)
    assert set(sweep.finalists(experiments, again.rows).values()) == {"trial-002"}
    again.scheduler()  # ASHA takes the scores, not the failures


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_may_pass_leaves_its_trial_to_be_resumed(error: Exception, tmp_path) -> None:
    rungs = sweep.Rungs(SWEEP, Store(str(tmp_path)) / "rungs.jsonl", None)
    assert rungs.fail("trial-001", error) == str(error)
    assert rungs.unfinished(["trial-000", "trial-001"]) == ["trial-000", "trial-001"]


class _Raised(Exception):
    """As Ray Train wraps what a worker raised."""

    def __init__(self, cause: Exception) -> None:
        self._base_exc = cause


@pytest.mark.parametrize(
    ("failures", "lasting"),
    [
        ({0: _Raised(ValueError("shapes differ"))}, True),
        ({0: _Raised(errors.PoolError("no answer"))}, False),
        ({0: RayError("the worker died")}, False),
        (
            {
                0: RayError("the worker died"),
                1: _Raised(RuntimeError("[gloo] Connection closed by peer")),
            },
            False,
        ),
        ({1: _Raised(RuntimeError("[gloo] Connection closed by peer"))}, False),
    ],
)
def test_a_lost_worker_is_no_mistake_of_the_run(
    failures: dict[int, Exception], lasting: bool
) -> None:
    assert cluster._repeats(WorkerGroupError("failed", failures)) is lasting


def test_a_step_log_that_cannot_be_written_stops_no_training(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = Store(str(tmp_path)) / "run"
    (tmp_path / "run").write_text("a file where the folder should be")
    log = StepLog(blocked, 0, 8, 10)
    log.write(1, [1.0, 1.0, 0.0, 0.0], 0.1)
    assert "training goes on" in caplog.text
    (tmp_path / "run").unlink()
    log.write(2, [1.0, 1.0, 0.0, 0.0], 0.1)
    assert [row["step"] for row in (blocked / "steps.jsonl").read_jsonl()] == [1, 2]


def test_a_pool_log_that_cannot_be_written_is_one_warning(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    log = Store(str(tmp_path)) / "run" / "pool.jsonl"
    watch = Watch("teacher-x", log)
    rows = [LogRow(at=float(at), running=0) for at in range(3)]
    watch.log(rows[0])
    watch.log(rows[1])
    assert caplog.text.count("the pool goes on without its log") == 1
    (tmp_path / "run").unlink()
    watch.log(rows[2])
    assert read_rows(log, LogRow) == rows
