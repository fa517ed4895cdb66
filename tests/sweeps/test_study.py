"""The study of a sweep, read back by Optuna itself."""

from __future__ import annotations

import random
import time
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.sweeps.study import JOURNAL, Study
from tests.support.rungs import rung

SPACE: dict[str, Any] = {
    "align.weight": {"log_uniform": [0.1, 10.0]},
    "align.sigma": {"uniform": [0.0, 1.0], "when": "align.weight > 0"},
    "synthetic.images": {"integer": [0, 4000], "step": 1000},
    "optim.averaging": ["step", "none"],
    "teacher.channels": {"choice": [[1, 2], [1, 2, 4]]},
}
POINTS: dict[str, dict[str, Any]] = {
    "trial-000": {"align.weight": 0.0, "synthetic.images": 0, "optim.averaging": "step"},
    "trial-001": {"align.weight": 2.5, "align.sigma": 0.25, "synthetic.images": 4000},
    "trial-002": {"align.weight": 0.5, "teacher.channels": [1, 2, 4]},
    "trial-003": {"align.weight": 0.7},
    "trial-004": {"align.weight": 0.9},
}
START_S = 1_764_000_000.0


def row(trial: int, epoch: int, robust: float | None, decision: str) -> RungRow:
    return rung(trial, epoch, robust, decision, START_S + 60 * trial + epoch)


ROWS = [
    row(0, 1, 0.25, "continue"),
    row(1, 1, 0.125, "stop"),
    row(0, 2, 0.5, "continue"),
    row(2, 1, 0.375, "stop"),
    row(0, 3, 0.625, "done"),
    row(3, 0, None, "failed"),
    row(2, 2, 0.4375, "continue"),  # a trial that was stopped goes on to the end
    row(2, 3, 0.46875, "done"),
    row(4, 1, 0.25, "continue"),
]


def mirrored(sweep: Store, rows: list[RungRow]) -> None:
    study = Study(sweep, SPACE, POINTS)
    for one in rows:
        study.row(one.trial, one)
    study.end("done")


def read(path: str, name: str) -> list[Any]:
    storage = JournalStorage(JournalFileBackend(path))
    trials: list[Any] = optuna.load_study(study_name=name, storage=storage).trials
    return trials


def test_optuna_reads_what_was_recorded(tmp_path: Path) -> None:
    sweep = Store(str(tmp_path / "sweep"))
    mirrored(sweep, ROWS)
    trials = read(f"{sweep}/{JOURNAL}", "sweep")
    states = [(trial.user_attrs["trial"], trial.state, trial.value) for trial in trials]
    assert states == [
        ("trial-000", TrialState.COMPLETE, 0.625),
        ("trial-001", TrialState.PRUNED, 0.125),
        ("trial-002", TrialState.PRUNED, 0.375),
        ("trial-003", TrialState.FAIL, None),
        ("trial-002", TrialState.COMPLETE, 0.46875),
        ("trial-004", TrialState.RUNNING, None),
    ]
    assert trials[0].intermediate_values == {100: 0.25, 200: 0.5, 300: 0.625}
    assert trials[0].datetime_start.timestamp() == START_S + 1
    # a weight of 0 has no logarithm: outside of the axis, it is an attribute
    assert trials[0].params == {"synthetic.images": 0, "optim.averaging": "step"}
    assert trials[0].user_attrs["align.weight"] == 0.0
    assert trials[1].params == POINTS["trial-001"]
    assert trials[4].params == {"align.weight": 0.5, "teacher.channels": "[1, 2, 4]"}
    assert trials[4].user_attrs["goes_on_from"] == 2
    assert trials[4].intermediate_values == {100: 0.375, 200: 0.4375, 300: 0.46875}
    assert trials[3].user_attrs["reason"] == "the loss is nan"


def test_a_trial_starts_where_its_training_did(tmp_path: Path) -> None:
    sweep = Store(str(tmp_path / "sweep"))
    first, *later = [row(2, 1, 0.375, "stop"), row(2, 2, 0.4375, "continue")]
    mirrored(sweep, [first.model_copy(update={"elapsed_s": 40.0}), *later])
    begun = [trial.datetime_start.timestamp() for trial in read(f"{sweep}/{JOURNAL}", "sweep")]
    assert begun == [first.at - 40, later[0].at]


@pytest.mark.parametrize("seed", range(5))
def test_a_restart_at_any_row_mirrors_nothing_twice(tmp_path: Path, seed: int) -> None:
    """Each driver begins with every row that is recorded, as a restarted sweep does."""
    whole, broken = Store(str(tmp_path / "whole" / "s")), Store(str(tmp_path / "broken" / "s"))
    mirrored(whole, ROWS)
    draws = random.Random(seed)
    for end in sorted(draws.choices(range(len(ROWS)), k=4)):
        mirrored(broken, ROWS[:end])
    mirrored(broken, ROWS)
    mirrored(broken, ROWS)

    def seen(sweep: Store) -> list[Any]:
        return [
            (t.state, t.values, t.params, t.intermediate_values, t.user_attrs)
            for t in read(f"{sweep}/{JOURNAL}", "s")
        ]

    assert seen(broken) == seen(whole)


def test_an_object_store_gets_the_study_at_the_end(tmp_path: Path) -> None:
    sweep = Store("memory://study/sweep")
    mirrored(sweep, ROWS[:4])
    mirrored(sweep, ROWS)
    copy = Store(str(tmp_path / JOURNAL))
    copy.write_bytes((sweep / JOURNAL).read_bytes())
    assert len(read(copy.uri, "sweep")) == 6


@pytest.mark.slow
def test_optuna_dashboard_serves_the_study(tmp_path: Path) -> None:
    """Its real server, while rows are still coming."""
    import json
    import socketserver
    import threading
    from wsgiref.simple_server import WSGIServer, make_server

    dashboard = pytest.importorskip("optuna_dashboard")
    sweep = Store(str(tmp_path / "sweep"))
    study = Study(sweep, SPACE, POINTS)
    for one in ROWS[:3]:
        study.row(one.trial, one)
    app = dashboard.wsgi(JournalStorage(JournalFileBackend(f"{sweep}/{JOURNAL}")))

    class Threaded(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    server = make_server("127.0.0.1", 0, app, server_class=Threaded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:

        def get(path: str) -> Any:
            address = f"http://127.0.0.1:{server.server_port}{path}"
            with urllib.request.urlopen(address, timeout=30) as reply:
                return json.loads(reply.read())

        (listed,) = get("/api/studies")["study_summaries"]
        assert listed["study_name"] == "sweep"
        before = get(f"/api/studies/{listed['study_id']}?after=0")["trials"]
        for one in ROWS[3:]:
            study.row(one.trial, one)
        deadline = time.monotonic() + 60  # it looks at the file every few seconds
        after = before
        while len(after) < 6 and time.monotonic() < deadline:
            time.sleep(1)
            after = get(f"/api/studies/{listed['study_id']}?after=0")["trials"]
        assert (len(before), len(after)) == (2, 6)
    finally:
        server.shutdown()


def test_a_trial_that_its_budget_paused_is_still_running(tmp_path: Path) -> None:
    sweep = Store(str(tmp_path / "paused"))
    mirrored(sweep, [row(0, 1, 0.25, "continue"), row(0, 2, 0.5, "paused")])
    (paused,) = read((sweep / JOURNAL).uri, "paused")
    assert paused.state == TrialState.RUNNING
    assert paused.intermediate_values == {100: 0.25, 200: 0.5}
    mirrored(sweep, [row(0, 2, 0.5, "continue"), row(0, 3, 0.625, "done")])
    (done,) = read((sweep / JOURNAL).uri, "paused")
    assert (done.state, done.value) == (TrialState.COMPLETE, 0.625)
