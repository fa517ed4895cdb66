"""A row of metrics.jsonl is there once its checkpoint is committed."""

from __future__ import annotations

from pathlib import Path

from dra_ray import runs
from dra_ray.runs import ValidationRow
from dra_ray.storage import Store
from dra_ray.workloads import train


def row(step: int) -> ValidationRow:
    return ValidationRow(
        step=step,
        epoch=1,
        images_seen=step * 8,
        loss=1.0,
        loss_clean=0.5,
        loss_robust=0.5,
        loss_align=0.0,
        lr=0.1,
        clean_accuracy=0.5,
        robust_accuracy=0.25,
        elapsed_s=1.0,
        at=2.0,
    )


def commit(run: Store, rows: list[ValidationRow], step: int) -> None:
    """As Ray Train leaves it: a checkpoint's folder, then the snapshot that names it."""
    folder = run / "checkpoints" / run.name
    (folder / f"checkpoint_{step}" / "state.json").write_json(
        {"step": step, "rows": [row.on_disk() for row in rows]}
    )
    (folder / "checkpoint_manager_snapshot.json").write_json(
        {
            "latest_checkpoint_result": {
                "checkpoint_dir_name": f"checkpoint_{step}",
                "metrics": {"step": step},
            }
        }
    )


def written(run: Store) -> list[int]:
    return [row.step for row in runs.read_rows(run / runs.METRICS, ValidationRow)]


def test_rows_wait_for_their_checkpoints(tmp_path: Path) -> None:
    run, state = Store(str(tmp_path)) / "run", list[ValidationRow]()
    rows = train.Rows(run, state)
    rows.PERIOD_S = 0.0  # type: ignore[misc]
    state.append(row(10))
    rows.checkpoint(10)
    rows.look()
    assert written(run) == []
    commit(run, list(state), 10)
    rows.look()
    assert written(run) == [10]
    for step in (20, 30):
        state.append(row(step))
        rows.checkpoint(step)
    commit(run, list(state[:2]), 25)  # between two validations
    rows.look()
    assert written(run) == [10, 20]
    (run / "checkpoints" / "run" / "checkpoint_manager_snapshot.json").write_bytes(
        b'{"latest'
    )  # half written
    rows.look()
    assert written(run) == [10, 20]
    commit(run, state, 30)  # the worker has ended by now
    train.complete_rows(run)
    assert written(run) == [10, 20, 30]


def test_a_run_that_goes_on_brings_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    run = Store(str(tmp_path)) / "run"
    train.complete_rows(run)
    assert written(run) == []
    train.Rows(run, [row(10), row(20)])
    assert written(run) == [10, 20]


def test_a_row_of_a_validation_beside_training_waits_for_the_checkpoint_that_has_it(
    tmp_path: Path,
) -> None:
    """The checkpoint of its own step has the weights that wait for their verdicts, and no row."""
    run, state = Store(str(tmp_path)) / "run", list[ValidationRow]()
    rows = train.Rows(run, state)
    rows.PERIOD_S = 0.0  # type: ignore[misc]
    rows.checkpoint(10)
    commit(run, [], 10)
    state.append(row(10))
    rows.checkpoint(20)
    rows.look()
    assert written(run) == []
    commit(run, state, 20)
    rows.look()
    assert written(run) == [10]
