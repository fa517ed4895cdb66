"""The entry points in jobs/, submitted to a real head node through the Jobs API."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from dra_ray.storage import Store
from tests.cluster.small import submitted

JOBS = Path(__file__).parents[2] / "jobs"
TIMEOUT_S = 120


class Head:
    """The head node of the shared cluster, as a user of the Jobs API sees it."""

    def __init__(self, ray_context: Any) -> None:
        self.client = JobSubmissionClient(f"http://{ray_context.dashboard_url}")
        # Ray tells a job the address of some cluster on the machine, which is ours only if there is
        # no other: say which
        self.environment = ["env", f"RAY_ADDRESS={ray_context.address_info['gcs_address']}"]

    def submit(self, script: str, *arguments: str) -> str:
        """A new job's id."""
        entrypoint = shlex.join([*self.environment, sys.executable, script, *arguments])
        return submitted(self.client, entrypoint, runtime_env={"working_dir": str(JOBS)})

    def finish(self, job: str) -> tuple[JobStatus, str]:
        """(status, log) of the job once it has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (status := self.client.get_job_status(job)).is_terminal():
            assert time.monotonic() < deadline, self.client.get_job_logs(job)
            time.sleep(0.25)
        return status, self.client.get_job_logs(job)


@pytest.fixture(scope="module")
def head(ray_cluster: Any) -> Head:
    return Head(ray_cluster)


def test_synthesis_as_a_job(head: Head, teacher: Store, tmp_path: Path) -> None:
    """Two shards from a tiny teacher: the job succeeds, prints its manifest as one JSON line, and
    leaves the images.
    """
    (tmp_path / "synthesis.yaml").write_text(
        "kind: synthesis\nimages: 40\nshard_images: 20\nbatch: 20\nsteps: 2\n"
    )
    arguments = (
        str(tmp_path / "synthesis.yaml"),
        "--storage",
        str(tmp_path),
        "--name",
        "images",
        "--set",
        f"teacher={teacher.uri}",
    )
    status, log = head.finish(head.submit("synthesize.py", *arguments))
    assert status == JobStatus.SUCCEEDED, log
    results = [
        json.loads(line) for line in log.splitlines() if line.startswith("{") and '"status"' in line
    ]
    assert [(result["status"], result["images"]) for result in results] == [("done", 40)]
    assert '"images_total": 40' in log  # progress on the way
    run = Store(str(tmp_path / "images"))
    files = [name for name in run.names() if "lease.json" not in name]
    shards = ["shard-00000.npy", "shard-00001.npy"]
    assert files == ["index.json", "manifest.json", "samples.png", *shards]
    assert (run / "shard-00001.npy").read_npy()["image"].shape == (20, 8, 8, 1)


@pytest.mark.slow
def test_a_training_job_tells_what_its_teacher_can_teach(
    head: Head, teacher: Store, tmp_path: Path
) -> None:
    """Where the run starts anew; a job that goes on, or is done, does not look again."""
    settings = {
        "teacher.uri": teacher.uri,
        "optim.epochs": 1,
        "model.name": "wrn-10-1",
        "threat.steps": 1,
        "selection.steps": 1,
        "align.hidden": 32,
        "data.validation_images": 300,
    }
    changes = [part for item in settings.items() for part in ("--set", "{}={}".format(*item))]
    arguments = ("digits-dra", "--storage", str(tmp_path), "--name", "run", *changes)
    status, log = head.finish(head.submit("train.py", *arguments))
    assert status == JobStatus.SUCCEEDED, log
    assert "targets: dec." in log
    assert "raw pixels" in log
    status, log = head.finish(head.submit("train.py", *arguments))
    assert status == JobStatus.SUCCEEDED, log
    assert "targets: dec." not in log


def test_a_users_mistake_fails_the_job_with_one_line(head: Head) -> None:
    """Exit code 2, which Ray records, and no traceback."""
    arguments = ("synthesis.yaml", "--storage", "runs", "--name", "images")
    job = head.submit("synthesize.py", *arguments)
    status, log = head.finish(job)
    assert status == JobStatus.FAILED
    assert head.client.get_job_info(job).driver_exit_code == 2
    assert "error: --storage 'runs' is relative" in log
    assert "Traceback" not in log
