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

from dra_ray.config import UNet
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM

JOBS = Path(__file__).parents[2] / "jobs"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def client(ray_cluster: Any) -> JobSubmissionClient:
    return JobSubmissionClient(f"http://{ray_cluster.dashboard_url}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("teacher"))
    checkpoint.save(Store(folder), EDM(UNet(channel_mult=(1,)), 8, 1, 10), {})
    return folder


def submit(client: JobSubmissionClient, script: str, *arguments: str) -> str:
    """A new job's id; right after the head's start its job agent may not be there yet, which is HTTP 500."""
    entrypoint = shlex.join([sys.executable, script, *arguments])
    for _ in range(20):
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(JOBS)})
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(0.5)
    raise TimeoutError("the head never offered a job agent")


def finish(client: JobSubmissionClient, job: str) -> tuple[JobStatus, str]:
    """(status, log) of the job once it has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.25)
    return status, client.get_job_logs(job)


def test_synthesis_as_a_job(client: JobSubmissionClient, teacher: str, tmp_path: Path) -> None:
    """Two shards from a tiny teacher: the job succeeds, prints its manifest as one JSON line, and leaves the images."""
    (tmp_path / "synthesis.yaml").write_text("kind: synthesis\nimages: 40\nshard_images: 20\nbatch: 20\nsteps: 2\n")
    arguments = (str(tmp_path / "synthesis.yaml"), "--storage", str(tmp_path), "--name", "images", "--set", f"teacher={teacher}")
    status, log = finish(client, submit(client, "synthesize.py", *arguments))
    assert status == JobStatus.SUCCEEDED, log
    results = [json.loads(line) for line in log.splitlines() if line.startswith("{") and '"status"' in line]
    assert [(result["status"], result["images"]) for result in results] == [("done", 40)]
    assert '"images_total": 40' in log  # progress on the way
    run = Store(str(tmp_path / "images"))
    assert run.names() == ["manifest.json", "samples.png", "shard-00000.npz", "shard-00001.npz"]
    assert (run / "shard-00001.npz").read_npz()["image"].shape == (20, 8, 8, 1)


def test_a_users_mistake_fails_the_job_with_one_line(client: JobSubmissionClient, tmp_path: Path) -> None:
    """Exit code 2, which Ray records, and no traceback."""
    arguments = ("synthesis.yaml", "--storage", "runs", "--name", "images")
    job = submit(client, "synthesize.py", *arguments)
    status, log = finish(client, job)
    assert status == JobStatus.FAILED
    assert client.get_job_info(job).driver_exit_code == 2
    assert "error: --storage 'runs' is relative" in log and "Traceback" not in log
