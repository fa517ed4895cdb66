"""A digits experiment of seconds, and the processes that a test kills."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors

from dra_ray import config
from dra_ray.storage import Store


def experiment(teacher: Store, **changes: Any) -> config.Experiment:
    """A digits experiment of seconds, with alignment; `changes` are dotted fields with `__` for the
    dot.
    """
    small = {
        "teacher.uri": teacher.uri,
        "model.name": "wrn-10-1",
        "optim.epochs": 2,
        "optim.batch": 128,
        "threat.eps_255": 32,
        "threat.step_255": 16,
        "threat.steps": 3,
        "selection.steps": 3,
        "selection.every_epochs": 1,
        "align.hidden": 32,
        "pool.cpus_per_replica": 0.1,
        "resources.cpus_per_worker": 0.5,
    }
    return config.override(
        config.Experiment(),
        small | {field.replace("__", "."): value for field, value in changes.items()},
    )


def replica_pids() -> list[int]:
    """Process ids of the teacher replicas that live."""
    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return [
        actor.pid
        for actor in actors
        if "TeacherReplica" in actor.class_name or "ServeReplica:teacher" in actor.class_name
    ]


def submitted(client: JobSubmissionClient, entrypoint: str, **options: Any) -> str:
    """A new job's id; right after the head's start its job agent may not be there yet, which is
    HTTP 500.
    """
    for _ in range(20):
        try:
            return client.submit_job(entrypoint=entrypoint, **options)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(0.5)
    raise TimeoutError("the head never offered a job agent")


def processes() -> list[int]:
    """This process and all that descend from it: Ray's daemons, their workers."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text().rpartition(")")[2].split()[1]
                )
        except OSError:
            continue  # it has ended
    family = [os.getpid()]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def running(task: str) -> list[int]:
    """Process ids of the workers of our cluster that are at work, at this moment, on a Ray task
    whose name matches a pattern: Ray titles its processes so. Its own list of tasks lags behind.
    """
    found = []
    for pid in processes():
        try:
            title = Path("/proc", str(pid), "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if re.fullmatch(f"ray::{task}", title.rstrip(b"\0 ").decode(errors="replace")):
            found.append(pid)
    return sorted(found)


def some_running(task: str, timeout_s: float) -> list[int]:
    """The first such workers that can be seen; `AssertionError` after `timeout_s` without any."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if pids := running(task):
            return pids
        time.sleep(0.01)
    raise AssertionError(f"nobody worked on {task} for {timeout_s:g} s")


# Before every row a driver asks whether it may go on: the work waits for what a test does to it,
# however fast the machine. Ray prints to stdout as well, so a row is marked.
ROW = "row:"
ASK = """
def ask(text):
    print("row:", text, flush=True)
    input()
"""


def next_row(driver: subprocess.Popen[str]) -> str:
    """The text of the row before which the driver waits; "" if it has ended."""
    assert driver.stdout
    return next((line for line in driver.stdout if line.startswith(ROW)), "")


def go_on(driver: subprocess.Popen[str]) -> None:
    assert driver.stdin
    driver.stdin.write("\n")
    driver.stdin.flush()
