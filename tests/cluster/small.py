"""A digits experiment of seconds, and the processes that a test kills."""

from __future__ import annotations

from typing import Any

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
