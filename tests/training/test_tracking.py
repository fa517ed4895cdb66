"""Trackers: none holds a run up or ends it, rows come once, and a real MLflow server has them."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dra_ray.config import Experiment, Tracking
from dra_ray.errors import ConfigError
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.training import tensorboard
from dra_ray.training.tracking import (
    MLflow,
    Progress,
    Row,
    Tracked,
    Tracker,
    Trackers,
    Trackio,
    Wandb,
    of_sweep,
    of_training,
    services,
)
from tests.training.test_tensorboard import ROWS, START_S, own_points


class Told:
    """A tracker that keeps what it is told, and fails at one of its rows."""

    def __init__(self, fails_at: int | None = None, waits_s: float = 0.0) -> None:
        self.rows: list[Row] = []
        self.status: str | None = None
        self._fails_at, self._waits_s = fails_at, waits_s

    def row(self, trial: str, row: Row) -> None:
        time.sleep(self._waits_s)
        if len(self.rows) == self._fails_at:
            raise ConnectionError("the server is away\nand more")
        self.rows.append(row)

    def end(self, status: str) -> None:
        self.status = status


def rung(trial: int, epoch: int, decision: str = "continue") -> RungRow:
    return RungRow.model_validate(
        {
            "trial": f"trial-{trial:03d}",
            "epoch": epoch,
            "images_seen": 100 * epoch,
            "clean_accuracy": 0.5,
            "robust_accuracy": epoch / 16,
            "decision": decision,
            "at": START_S + epoch,
        }
    )


RUNGS = [rung(0, 1), rung(1, 1, "stop"), rung(0, 2), rung(0, 3, "done")]
POINTS = {"trial-000": {"align.weight": 1.0}, "trial-001": {"align.weight": 0.0}}


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = Told(), Told(fails_at=2)

    def never() -> Tracker:
        raise ImportError("no such package")

    with (
        caplog.at_level(logging.WARNING, "dra_ray"),
        Trackers({"bad": lambda: bad, "worse": never, "good": lambda: good}) as trackers,
    ):
        for row in ROWS:
            trackers.row("run", row)
    assert good.rows == ROWS
    assert good.status == "done"
    assert bad.rows == ROWS[:2]
    assert bad.status is None
    assert [record.getMessage() for record in caplog.records] == [
        "worse gets no more rows until this run is started again: no such package",
        "bad gets no more rows until this run is started again: the server is away",
    ]


def test_a_slow_tracker_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    slow = Told(waits_s=0.5)
    began_s = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, "dra_ray"),
        Trackers({"slow": lambda: slow}, end_s=0.2) as trackers,
    ):
        for row in ROWS:
            trackers.row("run", row)
        assert time.monotonic() - began_s < 0.4
    assert "slow did not take the last rows within 0.2 s" in caplog.text


def test_a_run_that_is_interrupted_is_unfinished() -> None:
    told = Told()
    with pytest.raises(KeyboardInterrupt), Trackers({"told": lambda: told}):
        raise KeyboardInterrupt
    assert told.status == "unfinished"


def test_progress_takes_each_row_once(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    first = Progress(run, "wandb")
    assert [first.is_new("run", row) for row in ROWS] == [True] * len(ROWS)
    resumed = Progress(run, "wandb")
    assert [resumed.is_new("run", row) for row in ROWS] == [False] * len(ROWS)
    assert Progress(run, "trackio").is_new("run", ROWS[0])
    assert resumed.is_new("run", rung(0, 1))
    assert not Progress(run, "wandb").is_new("run", rung(0, 1))


def test_training_writes_its_event_file_with_the_rows_so_far(tmp_path: Path) -> None:
    from dra_ray import runs

    run = Store(str(tmp_path))
    runs.write_rows(run / runs.STEPS, [row for row in ROWS if isinstance(row, runs.StepRow)])
    for _ in range(2):
        with of_training(Experiment(), run) as trackers:
            for row in ROWS:
                trackers.row(run.name, row)
    robust = [p for p in own_points(run / tensorboard.EVENTS) if p[0].endswith("robust_accuracy")]
    assert [step for _, step, *_ in robust] == [10, 20]


def test_a_sweep_writes_the_event_files_of_its_trials(tmp_path: Path) -> None:
    """Also the rows that a trial's log has only after its last score."""
    from dra_ray import runs

    sweep = Store(str(tmp_path / "sweep"))
    trial = sweep / runs.TRIALS / "trial-000"
    validations = [row for row in ROWS if isinstance(row, runs.ValidationRow)]
    now = RungRow.model_validate(rung(0, 1).on_disk() | {"at": time.time() + 60})
    with of_sweep(Tracking(), sweep, POINTS, []) as trackers:
        runs.write_rows(trial / runs.METRICS, validations[:1])
        trackers.row("trial-000", now)
        trackers.row("trial-000", now.model_copy(update={"decision": "stop"}))
        runs.write_rows(trial / runs.METRICS, validations)
    shown = {point[:2] for point in own_points(trial / tensorboard.EVENTS)}
    assert {step for _, step in shown} == {10, 20}
    assert len(shown) == len(own_points(trial / tensorboard.EVENTS)) == 16


@pytest.mark.parametrize("service", ["mlflow", "wandb", "trackio"])
def test_a_service_that_is_not_installed_is_one_line(service: str, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec(service):
        pytest.skip("it is installed")
    tracked = Tracked(Store(str(tmp_path)), {})
    with pytest.raises(ConfigError, match=rf"tracking\.{service}='x'.*pip install 'dra-ray\["):
        services(Tracking.model_validate({service: "x"}), tracked)


def test_tracking_is_in_no_digest() -> None:
    tracked = Experiment(tracking=Tracking(mlflow="http://127.0.0.1:5000"))
    assert tracked.digest() == Experiment().digest()


# -- real services ---------------------------------------------------------------------------------
def sweep_told(settings: Tracking, sweep: Store, rows: list[RungRow]) -> None:
    """A driver that begins with no rows and is told of all of them."""
    with of_sweep(settings, sweep, POINTS, []) as trackers:
        for row in rows:
            trackers.row(row.trial, row)


@pytest.fixture
def mlflow_uri(tmp_path: Path) -> Any:
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    where = ["--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    server = subprocess.Popen(
        [*command, *where, "--workers", "1"], cwd=tmp_path, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    import os
    import signal

    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)


@pytest.mark.slow
def test_a_real_mlflow_server_has_every_row_once(tmp_path: Path, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    sweep, settings = Store(str(tmp_path / "sweep")), Tracking(mlflow=mlflow_uri)
    sweep_told(settings, sweep, RUNGS[:2])
    sweep_told(settings, sweep, RUNGS)  # a driver that took over
    sweep_told(settings, sweep, RUNGS)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("sweep")
    there = client.search_runs([experiment.experiment_id])
    ended = {run.info.run_name: run.info.status for run in there}
    assert ended == {"trial-000": "FINISHED", "trial-001": "KILLED"}
    first = next(run for run in there if run.info.run_name == "trial-000")
    assert first.data.params == {"align.weight": "1.0"}
    history = client.get_metric_history(first.info.run_id, "rungs/robust_accuracy")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (100 * epoch, epoch / 16, int((START_S + epoch) * 1000)) for epoch in (1, 2, 3)
    ]

    halved = [
        rung(0, 1, "waiting"),
        rung(1, 1, "stop"),
        rung(0, 1),  # among the best of its rung
        rung(1, 1),  # and one without alignment goes on too
        rung(1, 3, "done"),
        rung(0, 2, "waiting"),
        rung(2, 2, "paused"),
    ]
    later = [*halved, rung(0, 3, "done")]
    for rows, state in ((halved[:1], "KILLED"), (halved, "KILLED"), (later, "FINISHED")):
        sweep_told(settings, Store(str(tmp_path / "halved")), rows)
        experiment = client.get_experiment_by_name("halved")
        there = client.search_runs([experiment.experiment_id])
        ended = {run.info.run_name: run.info.status for run in there}
        assert ended["trial-000"] == state
    assert ended == {"trial-000": "FINISHED", "trial-001": "FINISHED", "trial-002": "KILLED"}

    tracked = Tracked(Store(str(tmp_path / "run")), {"run": {"optim.lr": 0.1}})
    for _ in range(2):
        tracker = MLflow(mlflow_uri, tracked)
        for row in ROWS:
            tracker.row("run", row)
        tracker.end("done")
    experiment = client.get_experiment_by_name("dra_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(run.info.run_id, "steps/loss")
    assert [metric.step for metric in losses] == [5, 10, 15, 20]
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_wandb_takes_rows_of_several_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Offline: what the client writes is what `wandb sync` sends."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked = Tracked(Store(str(tmp_path)), POINTS, "sweep")
    tracker = Wandb("somebody/project", tracked)
    for row in RUNGS:
        tracker.row(row.trial, row)
    tracker.end("done")
    again = Wandb("somebody/project", tracked)
    for row in RUNGS:
        again.row(row.trial, row)
    assert again._runs == {}  # nothing was new


@pytest.mark.slow
def test_trackio_has_every_row_once(tmp_path: Path) -> None:
    """In processes of their own, since Trackio reads where its database is when it is imported."""
    pytest.importorskip("trackio")
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.training import test_tracking as t\n"
        "t.tell_trackio(Path(sys.argv[1]))"
    )
    import os

    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=300
        )
    read = (
        "from trackio.sqlite_storage import SQLiteStorage as s\n"
        "print([(row['step'], row['rungs/robust_accuracy'])"
        " for row in s.get_logs('sweep', 'trial-000')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", read], env=environment, capture_output=True, text=True, timeout=300
    )
    expected = [(100 * epoch, epoch / 16) for epoch in (1, 2, 3)]
    assert done.stdout.strip().splitlines()[-1] == str(expected), done.stderr


def tell_trackio(folder: Path) -> None:
    tracker = Trackio("local", Tracked(Store(str(folder)), POINTS, "sweep"))
    for row in RUNGS:
        tracker.row(row.trial, row)
    tracker.end("done")
