"""A row of metrics.jsonl is there once its checkpoint is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dra_ray.storage import Store
from dra_ray.workloads import train


def commit(run: Store, rows: list[dict[str, Any]], step: int) -> None:
    """As Ray Train leaves it: a checkpoint's folder, then the snapshot that names it."""
    folder = run / "checkpoints" / run.name
    (folder / f"checkpoint_{step}" / "state.json").write_json({"step": step, "rows": rows})
    (folder / "checkpoint_manager_snapshot.json").write_json(
        {
            "latest_checkpoint_result": {
                "checkpoint_dir_name": f"checkpoint_{step}",
                "metrics": {"step": step},
            }
        }
    )


def written(run: Store) -> list[int]:
    file = run / "metrics.jsonl"
    return [row["step"] for row in file.read_jsonl()] if file.exists() else []


def test_rows_wait_for_their_checkpoints(tmp_path: Path) -> None:
    run, state = Store(str(tmp_path)) / "run", []
    rows = train.Rows(run, state)
    rows.PERIOD_S = 0.0  # type: ignore[misc]
    state.append({"step": 10})
    rows.look()
    assert written(run) == []
    commit(run, list(state), 10)
    rows.look()
    assert written(run) == [10]
    state += [{"step": 20}, {"step": 30}]
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
    train.Rows(run, [{"step": 10}, {"step": 20}])
    assert written(run) == [10, 20]
