"""What would fail alike again is told from what may pass, and a log that fails stops nothing."""

from __future__ import annotations

import os

import pytest
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import WorkerGroupError

from dra_ray import cluster, errors
from dra_ray.errors import StorageError
from dra_ray.pool.records import LogRow
from dra_ray.pool.service import Watch
from dra_ray.runs import StepRow, read_rows
from dra_ray.storage import Store
from dra_ray.workloads import sweep
from dra_ray.workloads.train import StepLog

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
def test_a_failure_that_comes_again_ends_its_trial(error: Exception) -> None:
    assert sweep.ending(error) == (str(error), True)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_may_pass_leaves_its_trial_to_be_resumed(error: Exception) -> None:
    assert sweep.ending(error) == (str(error), False)


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


def test_a_row_that_came_in_an_outage_is_there_before_the_next_checkpoint(tmp_path) -> None:
    """A run that is killed after that checkpoint goes on behind the row."""
    run, row = Store(str(tmp_path)) / "run", [1.0, 1.0, 0.0, 0.0]
    log = StepLog(run, 0, 8, 10)
    log.write(1, row, 0.1)
    os.rename(tmp_path / "run", tmp_path / "away")
    (tmp_path / "run").write_text("a file where the folder should be")
    log.write(2, row, 0.1)
    with pytest.raises(StorageError):
        log.flush()
    (tmp_path / "run").unlink()
    os.rename(tmp_path / "away", tmp_path / "run")
    log.flush()
    written = (tmp_path / "run" / "steps.jsonl").stat().st_mtime_ns
    log.flush()
    assert (tmp_path / "run" / "steps.jsonl").stat().st_mtime_ns == written, "nothing was late"
    again = StepLog(run, 2, 8, 10)
    again.write(3, row, 0.1)
    assert [row.step for row in read_rows(run / "steps.jsonl", StepRow)] == [1, 2, 3]


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
