"""Lists of runs, and where a run is, against folders of which every number is known."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dra_ray.cli.status import COLUMNS, duration, lines
from dra_ray.config import Experiment, Sweep
from dra_ray.errors import ConfigError, DataError
from dra_ray.inspection import listing, overview, state
from dra_ray.inspection.listing import Filter, runs_below
from dra_ray.runs import Manifest, read_manifest
from dra_ray.storage import Lease, Store
from tests.support.rungs import rung

NOW_S = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC).timestamp()
SPACE = {"align.weight": [0.0, 1.0, 2.0, 4.0]}


def manifest(run: Store, kind: str, days: float = 1, **more: object) -> None:
    created = datetime.datetime.fromtimestamp(NOW_S - days * 86400, datetime.UTC).isoformat()
    facts = {"kind": kind, "name": run.name, "created": created, "digest": "d", "config": {}}
    (run / "manifest.json").write_json(facts | {"status": "running"} | more)


def score(trial: int, epoch: int, robust: float | None, decision: str) -> dict[str, object]:
    return rung(trial, epoch, robust, decision, NOW_S - 60 + epoch).on_disk()


@pytest.fixture
def storage(tmp_path: Path) -> Store:
    """A run of every kind and of every end, and folders that are none."""
    store = Store(str(tmp_path / "runs"))
    experiment = Experiment.model_validate({"resources": {"workers": 2, "gpus_per_worker": 0.5}})
    tree = experiment.model_dump(mode="json")
    manifest(
        store / "old", "train", 30, status="done", config=tree, images_seen=500, elapsed_s=7200.0
    )
    (store / "old" / "metrics.jsonl").write_jsonl([])
    manifest(store / "diverged", "train", 3, config=tree, stopped="the loss is nan")
    manifest(store / "teacher", "teacher", 2, images_seen=640, status="done")
    sweep = Sweep.model_validate({"space": SPACE, "base": {"optim": {"epochs": 8}}})
    trials = {f"trial-{i:03d}": {"align.weight": w} for i, w in enumerate(SPACE["align.weight"])}
    manifest(
        store / "sweep",
        "sweep",
        trials=trials,
        config=sweep.model_dump(mode="json") | {"budget": {"images": 4000, "gpu_hours": None}},
    )
    (store / "sweep" / "rungs.jsonl").write_jsonl(
        [
            score(0, 2, 0.25, "continue"),
            score(1, 2, 0.125, "stop"),
            score(2, 1, 0.5, "continue"),
            score(2, 1, 0.5, "failed"),
            score(0, 8, 0.375, "done"),
        ]
    )
    for trial in trials:
        manifest(store / "sweep" / "trials" / trial, "train", config=tree)
    (store / "notes.txt").write_text("no run")
    (store / "data" / "images.bin").write_bytes(b"no run")
    return store


def test_every_run_is_listed_newest_first(storage: Store) -> None:
    listed = runs_below(storage, Filter(), NOW_S)
    assert [(run.run, run.status) for run in listed] == [
        ("sweep", "unfinished"),
        ("teacher", "done"),
        ("diverged", "failed"),
        ("old", "done"),
    ]
    old = listed[-1]
    assert (old.age_s, old.images) == (pytest.approx(30 * 86400), 500)
    assert old.gpu_hours == pytest.approx(0.5 * 2 * 2.0)  # GPUs of a worker, workers, hours
    assert [run.note for run in listed] == [None, None, "the loss is nan", None]


def test_runs_are_chosen_by_config_status_kind_and_age(storage: Store) -> None:
    def names(**chosen: object) -> list[str]:
        return [run.run for run in runs_below(storage, Filter(**chosen), NOW_S)]

    assert names(where={"align.weight": 4}) == ["sweep"]  # of one of its trials
    assert names(where={"resources.gpus_per_worker": 0.5}) == ["diverged", "old"]
    assert names(where={"optim.epochs": 8}) == ["sweep"]  # of what its trials share
    assert names(where={"align.weight": 99}) == []
    assert names(status="done") == ["teacher", "old"]
    assert names(kind="teacher", status="done") == ["teacher"]
    assert names(older_s=2.5 * 86400) == ["diverged", "old"]
    assert names(newer_s=2.5 * 86400) == ["sweep", "teacher"]


def test_bad_filters_are_one_line(storage: Store) -> None:
    with pytest.raises(ConfigError, match=r"--where align.wieght: no run.*'align.weight'"):
        runs_below(storage, Filter(where={"align.wieght": 1}), NOW_S)
    with pytest.raises(ConfigError, match="--status dead: choose from done, running"):
        Filter(status="dead")
    with pytest.raises(ConfigError, match="--older yesterday: write a number"):
        listing.read_age("--older", "yesterday")
    assert listing.read_age("--older", "1.5h") == 5400


def test_a_damaged_manifest_hides_no_other(storage: Store) -> None:
    (storage / "broken" / "manifest.json").write_text("{")
    listed = {run.run: run for run in runs_below(storage, Filter(), NOW_S)}
    assert len(listed) == 5
    assert listed["broken"].status == "failed"
    assert "is not valid JSON" in (listed["broken"].note or "")


def test_a_run_is_running_while_its_driver_lives(storage: Store) -> None:
    sweep = storage / "sweep"

    def statuses() -> list[str]:
        trials = [sweep, *(sweep / "trials" / f"trial-{i:03d}" for i in range(4))]
        manifests = [read_manifest(run) for run in trials]
        return [
            state.status(run, m or Manifest()) for run, m in zip(trials, manifests, strict=True)
        ]

    with Lease(sweep):
        assert statuses() == ["running", "running", "stopped", "failed", "running"]
        assert overview.read(sweep, NOW_S).status == "running"
    assert statuses() == ["unfinished", "unfinished", "stopped", "failed", "unfinished"]


def test_a_driver_that_was_killed_is_not_running(storage: Store) -> None:
    run = storage / "sweep"
    killed = (
        "import os, sys\nfrom dra_ray.storage import Lease, Store\n"
        "with Lease(Store(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", killed, run.uri], timeout=60)
    assert done.returncode == -9
    assert runs_below(storage, Filter(kind="sweep"), NOW_S)[0].status == "unfinished"


def test_a_sweep_on_one_screen(storage: Store) -> None:
    shown = overview.read(storage / "sweep", NOW_S)
    sweeping = shown.sweeping
    assert sweeping is not None
    assert sweeping.by_state == {"done": 1, "failed": 1, "not started": 1, "stopped": 1}
    assert [(rung.epoch, rung.reached, rung.stopped, rung.best) for rung in sweeping.rungs] == [
        (2, 2, 1, 0.25),
        (6, 0, 0, None),
    ]
    best = sweeping.best
    assert best is not None
    assert (best.trial, best.robust_accuracy, best.epoch) == ("trial-000", 0.375, 8)
    spent = {part.what: (part.spent, part.limit) for part in sweeping.spent}
    assert spent == {"trials": (3, None), "images": (800 + 200 + 100, 4000)}
    assert shown.last_sign_s == pytest.approx(52)
    text = lines(shown)
    assert "  trials     4: 1 done, 1 failed, 1 not started, 1 stopped" in text
    assert any("1,100 of 4,000 (28%)" in line for line in text)
    json.dumps(dataclasses.asdict(shown))


def test_lines_fit_the_screen(storage: Store, tmp_path: Path) -> None:
    deep = Store(str(tmp_path / ("a" * 100)))
    manifest(deep, "train", stopped="the loss is nan at step 5 " * 9)
    for run in (deep, *(storage / name for name in ("sweep", "teacher", "old", "diverged"))):
        assert max(map(len, lines(overview.read(run, NOW_S)))) <= COLUMNS
    with pytest.raises(DataError, match="is not a run"):
        overview.read(storage / "data", NOW_S)
    assert [duration(s) for s in (59.0, 60.0, 5400.0, 40 * 3600.0, 76 * 3600.0)] == [
        "59 s",
        "1 min",
        "1 h 30 min",
        "40 h",
        "3 d 4 h",
    ]


@pytest.mark.seconds
def test_the_requests_of_a_list_are_bounded(s3_bucket: str) -> None:
    """By the requests that reached the S3 server: the same few for every further run."""
    requests: list[str] = []

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            requests.append(record.getMessage())

    def count(storage: Store) -> int:
        requests.clear()
        handler = Count()
        server = logging.getLogger("werkzeug")
        level = server.level
        server.addHandler(handler)
        server.setLevel(logging.INFO)
        try:
            runs_below(storage, Filter(), NOW_S)
        finally:
            server.removeHandler(handler)
            server.setLevel(level)
        return len(requests)

    counts = []
    for number in (4, 8):
        storage = Store(f"{s3_bucket}/runs-{number}")
        for run in range(number):
            manifest(storage / f"run-{run}", "train", status="done")
            (storage / f"run-{run}" / "metrics.jsonl").write_jsonl([])
        counts.append(count(storage))
    assert counts[0] > 4, "the server's log was not read"
    assert (counts[1] - counts[0]) / 4 <= 4  # is it there, what is it, and its content


@pytest.mark.seconds
def test_commands_print_lines_and_records(storage: Store) -> None:
    def dra(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dra_ray", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (teacher,) = json.loads(dra("runs", storage.uri, "--kind", "teacher", "--json", "-"))
    assert (teacher["run"], teacher["images"]) == ("teacher", 640)
    assert "teacher done" in dra("status", f"{storage}/teacher", "--follow")  # ends at once
