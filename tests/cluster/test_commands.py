"""The commands of the README, typed one after the other with small settings, and Ctrl-C in the
middle of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dra_ray.cluster import wait_until
from dra_ray.storage import Store

pytestmark = pytest.mark.slow

DRA = [sys.executable, "-m", "dra_ray"]
SMALL = {"optim.epochs": 2, "selection.every_epochs": 1, "threat.steps": 2, "selection.steps": 2}


def environment() -> dict[str, str]:
    """As a user's: no trace of the cluster that other tests share."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def dra(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*DRA, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done


def settings(changes: dict[str, object], prefix: str = "") -> list[str]:
    return [
        part for field, value in changes.items() for part in ("--set", f"{prefix}{field}={value}")
    ]


def test_from_a_teacher_to_a_report(tmp_path: Path) -> None:
    dra(
        "teacher",
        "train",
        "digits-edm",
        *settings({"images_seen": 2560, "checkpoint_images": 1280, "data.test_images": 40}),
        cwd=tmp_path,
    )
    dra(
        "synthesize",
        *settings(
            {
                "teacher": "runs/digits-edm",
                "images": 200,
                "steps": 3,
                "batch": 50,
                "shard_images": 100,
            }
        ),
        cwd=tmp_path,
    )
    sources = {
        "teacher.uri": "runs/digits-edm",
        "synthetic.uri": "runs/digits-synthesis",
        "synthetic.images": 200,
    }
    done = dra(
        "train",
        "digits-dra",
        *settings(SMALL | sources | {"data.test_images": 40}),
        "--json",
        "row.json",
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "row.json").read_text())[0]["epoch"] == 2
    # of the pool's end, by Ray: that a call failed and is tried again for ever
    assert not re.search("retries|graceful_shutdown|Traceback", done.stderr), done.stderr
    assert "last epoch of runs/digits-dra" in done.stdout

    again = dra(
        "train", "digits-dra", *settings(SMALL | sources | {"data.test_images": 40}), cwd=tmp_path
    )
    assert "already done" in again.stderr
    dra("evaluate", "runs/digits-dra", "--json", "aa.json", cwd=tmp_path)
    rows = {row["what"]: row["accuracy"] for row in json.loads((tmp_path / "aa.json").read_text())}
    assert rows["AutoAttack"] <= rows["PGD-20"] <= rows["Clean"]

    sweep = SMALL | {"teacher.uri": "runs/digits-edm", "data.test_images": 40}
    space = ["--set", "space={align.weight: [0.0, 1.0]}", "--set", "asha.grace_epochs=1"]
    dra(
        "sweep",
        "digits-sweep",
        *settings(sweep, "base."),
        *space,
        "--json",
        "trials.json",
        cwd=tmp_path,
    )
    assert len(json.loads((tmp_path / "trials.json").read_text())) == 2
    printed = dra("report", "runs/digits-sweep", cwd=tmp_path).stdout.splitlines()[-1]
    assert (tmp_path / printed).exists()  # a path as given: relative to where the command ran
    assert printed.endswith("report.html")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_and_a_run_that_resumes(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The run would take hours, so that it is under way whenever the signal comes."""
    arguments = ["train", "digits-dm-at", *settings(SMALL | {"optim.epochs": 10_000})]
    run = Store(str(tmp_path / "runs" / "digits-dm-at"))
    before = _until_stopped(arguments, tmp_path, number, rows=1)
    after = _until_stopped(arguments, tmp_path, number, rows=len(before) + 1)
    assert [row["epoch"] for row in after] == list(range(1, len(after) + 1))
    assert after[: len(before)] == before, "a row was there whose checkpoint was not"
    starts = (run / "manifest.json").read_json()["world_sizes"]
    assert starts[-1]["step"] >= before[-1]["step"] > starts[0]["step"] == 0


def test_ctrl_c_lets_the_trials_of_a_sweep_write_a_checkpoint(tmp_path: Path) -> None:
    endless = {"optim.epochs": 10_000, "selection.every_epochs": 10_000, "threat.steps": 2}
    space = ["--set", "space={optim.lr: [0.1, 0.2]}", "--set", "asha.grace_epochs=10000"]
    alone = {"align.weight": 0.0, "resources.metrics_steps": 2}
    arguments = ["sweep", "digits-sweep", *settings(endless | alone, "base."), *space]
    trials = Store(str(tmp_path / "runs" / "digits-sweep" / "trials"))

    def under_way() -> bool:
        logs = [trials / f"trial-00{number}" / "steps.jsonl" for number in (0, 1)]
        return all(log.exists() and len(log.read_jsonl()) >= 3 for log in logs)

    _stop_once(under_way, arguments, tmp_path, signal.SIGINT)
    for name in trials.names():
        folder = trials / name / "checkpoints" / name
        states = [folder / entry / "state.json" for entry in folder.names()]
        step = max(state.read_json()["step"] for state in states if state.exists())
        assert step >= (trials / name / "steps.jsonl").read_jsonl()[-1]["step"] >= 6


def _until_stopped(
    arguments: list[str], cwd: Path, number: signal.Signals, rows: int
) -> list[dict[str, object]]:
    """Start `dra train`, send the signal once it has validated `rows` times, and return what
    metrics.jsonl holds when it has ended.
    """
    metrics = Store(str(cwd / "runs" / "digits-dm-at")) / "metrics.jsonl"
    _stop_once(
        lambda: metrics.exists() and len(metrics.read_jsonl()) >= rows, arguments, cwd, number
    )
    return metrics.read_jsonl()


def _stop_once(
    under_way: Callable[[], bool], arguments: list[str], cwd: Path, number: signal.Signals
) -> None:
    """Start `dra`, send the signal once it is under way, and hold what it says and leaves."""
    # short: Ray's sockets lie below it
    temporary = tempfile.mkdtemp(prefix="dra-", dir="/tmp")
    # inherited by every process that Ray starts
    marker = {"DRA_TEST_MARK": cwd.name, "TMPDIR": temporary}
    process = subprocess.Popen(
        [*DRA, *arguments],
        cwd=cwd,
        env=environment() | marker,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait_until(lambda: process.poll() is not None or under_way(), 240)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the whole foreground group
    else:
        process.send_signal(number)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "stopping, the checkpoint is kept" in stderr
    assert "the same command resumes it" in stderr.splitlines()[-1]
    assert wait_until(lambda: not _marked(cwd.name), 20), _marked(cwd.name)
    assert time.monotonic() - start < 60
    assert not list(Path(temporary).rglob("pymp-*")), "Ray's processes left temporary files"
    shutil.rmtree(temporary)


def _marked(mark: str) -> list[str]:
    """Command lines of living processes that carry the mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and f"DRA_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes()
            ):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it is gone, or not ours
    return found
