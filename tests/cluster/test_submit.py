"""`dra submit` and `dra jobs` against a real head that wants a token: submitted, followed, stopped,
killed, and gone on with to the weights of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dra_ray import config, runs
from dra_ray.storage import Store
from tests.cluster.head import JOB_S, Head, drivers, lose, started, until
from tests.cluster.small import experiment

pytestmark = pytest.mark.slow
SECRET = "hunter2hunter2"  # stands for a key of this machine's
QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started(more=QUICK) as head:
        yield head


@pytest.fixture(scope="module")
def place(teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config in two files; runs go into its folder `runs`."""
    folder = tmp_path_factory.mktemp("submit")
    whole = experiment(teacher, optim__epochs=30)
    (folder / "base.yaml").write_text(config.to_yaml(whole))
    (folder / "small.yaml").write_text(f"extends: {folder}/base.yaml\nseed: 1\n")
    return folder


def train(place: Path, name: str) -> list[str]:
    where = ["--storage", str(place / "runs"), "--name", name]
    return ["submit", "train", str(place / "small.yaml"), *where]


def weights(place: Path, name: str) -> bytes:
    return (place / "runs" / name / runs.MODEL).read_bytes()


def is_done(place: Path, name: str) -> bool:
    manifest = runs.read_manifest(Store(str(place / "runs" / name)))
    return manifest is not None and manifest.is_done


def some_rows(place: Path, name: str) -> bool:
    file = place / "runs" / name / runs.METRICS
    return file.exists() and file.stat().st_size > 0


@pytest.fixture(scope="module")
def undisturbed(head: Head, place: Path) -> subprocess.CompletedProcess[str]:
    """Followed to its end, with the code of this working tree."""
    return head.dra(*train(place, "calm"), "--code", "tree", AWS_SECRET_ACCESS_KEY=SECRET)


def test_without_the_token_nobody_gets_in(head: Head, place: Path) -> None:
    for command in (["jobs", "list"], train(place, "calm")):
        for token, status in (({}, "401"), ({"RAY_AUTH_TOKEN": SECRET}, "403")):
            done = subprocess.run(
                [sys.executable, "-m", "dra_ray", *command, "--address", head.address],
                env=head.outside | token,
                capture_output=True,
                text=True,
                timeout=JOB_S,
            )
            assert done.returncode == 2
            assert f"HTTP {status}" in done.stderr
            assert "RAY_AUTH_TOKEN" in done.stderr
            assert done.stderr.count("\n") == 1
            assert SECRET not in done.stderr + done.stdout
    assert not (place / "runs").exists()


def test_a_run_is_submitted_and_followed(
    head: Head, place: Path, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    assert "py_modules_files" in undisturbed.stdout, "the tree's code"
    assert '"robust_accuracy"' in undisturbed.stdout
    assert "succeeded" in undisturbed.stderr
    manifest = runs.read_manifest(Store(str(place / "runs" / "calm")))
    assert manifest is not None
    assert manifest.is_done
    again = head.dra(*train(place, "calm"), "--code", "tree")
    assert again.returncode == 0, again.stderr
    assert "has succeeded" in again.stderr
    (job,) = again.stdout.split()
    listed = head.dra("jobs", "list", "--json", str(place / "jobs.json"))
    assert listed.returncode == 0, listed.stderr
    rows = json.loads((place / "jobs.json").read_text())
    assert [(row["id"], row["status"]) for row in rows] == [(job, "SUCCEEDED")]
    for name in (job, job[:-3], "calm"):
        assert head.dra("jobs", "logs", name).stdout == undisturbed.stdout


def test_no_secret_travels(
    head: Head, place: Path, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    """Neither the token nor what the submitting process has in its environment."""
    told = head.get("/api/jobs/").text + undisturbed.stdout + undisturbed.stderr
    told += (place / "runs" / "calm" / runs.MANIFEST).read_text()
    for secret in (head.token, SECRET):
        assert secret not in told


def test_a_job_is_attached_to_stopped_and_gone_on_with(
    head: Head, place: Path, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    """Nothing but checkpoints is left of it, and the weights are the undisturbed run's."""
    begun = head.dra(*train(place, "stopped"), "--no-follow")
    assert begun.returncode == 0, begun.stderr
    (job,) = begun.stdout.split()
    follower = head.start(*train(place, "stopped"))
    until(lambda: some_rows(place, "stopped"), JOB_S, "a validation")
    stopped = head.dra("jobs", "stop", "stopped")
    assert stopped.returncode == 0, stopped.stderr
    assert f"job '{job}': stopped" in stopped.stderr
    said, _ = follower.communicate(timeout=JOB_S)
    assert follower.returncode == 3, said
    assert f"'{job}' runs already" in said
    assert "holds no" not in stopped.stdout
    assert "holds 0 checkpoints" not in stopped.stdout, stopped.stdout
    until(lambda: not head.living(), 60, f"the end of {head.living()}")
    assert not is_done(place, "stopped"), "it was stopped too late"
    on = head.dra(*train(place, "stopped"))
    assert on.returncode == 0, on.stdout + on.stderr
    assert f"submitted job '{job}-2'" in on.stderr
    assert weights(place, "stopped") == weights(place, "calm")


def test_a_job_whose_driver_was_killed_goes_on(
    head: Head, place: Path, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    begun = head.dra(*train(place, "killed"), "--no-follow")
    (job,) = begun.stdout.split()
    until(lambda: some_rows(place, "killed"), JOB_S, "a validation")
    (driver,) = drivers("killed")
    os.kill(driver, signal.SIGKILL)
    followed = head.dra("jobs", "follow", job)
    assert followed.returncode == 1, followed.stderr
    assert "failed (" in followed.stderr
    on = head.dra(*train(place, "killed"))
    assert on.returncode == 0, on.stdout + on.stderr
    assert f"submitted job '{job}-2'" in on.stderr
    assert weights(place, "killed") == weights(place, "calm")
    # Ray's own, without resources, of a killed controller: it calls `exit_actor` from a thread of
    # its own, which ends nothing (ray 2.60)
    until(lambda: set(head.living()) <= {"PlacementGroupCleaner"}, 120, "the end of all actors")


def test_after_a_lost_head_the_same_command_goes_on_with_a_new_one(
    place: Path, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    """Jobs and their logs are gone with it; the run's folder is not."""
    with started(more=QUICK) as lost:
        begun = lost.dra(*train(place, "headless"), "--no-follow")
        assert begun.returncode == 0, begun.stderr
        until(lambda: some_rows(place, "headless"), JOB_S, "a validation")
        lose(lost.process)
        refused = lost.dra("jobs", "list")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1, refused.stderr
    assert not is_done(place, "headless"), "it was lost too late"
    with started(more=QUICK) as new:
        on = new.dra(*train(place, "headless"))
        assert on.returncode == 0, on.stdout + on.stderr
        assert f"submitted job '{begun.stdout.strip()}'" in on.stderr
    assert weights(place, "headless") == weights(place, "calm")


def test_two_commands_at_once_are_one_job(head: Head, place: Path) -> None:
    """Whoever comes second attaches, or hears that it is done."""
    small = [*train(place, "twice"), "--set", "optim.epochs=1"]
    pair = [head.start(*small), head.start(*small)]
    said = [each.communicate(timeout=JOB_S)[0] for each in pair]
    assert [each.returncode for each in pair] == [0, 0], said
    assert sum("submitted job" in text for text in said) == 1, said
    listed = [job["metadata"] for job in head.get("/api/jobs/").json() if job.get("metadata")]
    assert sum(labels.get("dra_name") == "twice" for labels in listed) == 1


def test_a_users_mistake_fails_the_job_and_the_command(head: Head, place: Path) -> None:
    done = head.dra("submit", "evaluate", "--storage", str(place / "runs"), "--name", "nowhere")
    assert done.returncode == 1
    assert "failed (exit code 2)" in done.stderr
    assert "Traceback" not in done.stdout
    unknown = head.dra("jobs", "logs", "nothing-like-it")
    assert unknown.returncode == 2
    assert "there is no job 'nothing-like-it'" in unknown.stderr
