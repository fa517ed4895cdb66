"""Where targets of a training worker come from, and what that takes. Ray Serve is imported once a
pool is asked, not before: it takes half a second in every process.
"""

from __future__ import annotations

import hashlib
import json

from dra_ray import config
from dra_ray.data.canonical import CanonicalImages
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import CanonicalFeatures, FeatureSource, LocalTeacher

PREFIX = "teacher-"  # of the applications that are pools


def app_name(teacher: config.Teacher) -> str:
    """The Serve application for this teacher: equal weights and settings share one, wherever the
    weights lie.
    """
    assert teacher.uri
    settings = teacher.model_copy(update={"uri": None})
    parts = [checkpoint.digest(Store(teacher.uri)), settings.digest()]
    return PREFIX + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def reserved(experiment: config.Experiment) -> tuple[float, float]:
    """(CPUs, GPUs) that the pools of this experiment may take on a machine that it shares with
    training workers.
    """
    pools = len(set(experiment.teachers)) if experiment.pool.kind == "pool" else 0
    cpus, gpus = of_pool(experiment.pool)
    return pools * cpus, pools * gpus


def of_pool(pool: config.Pool) -> tuple[float, float]:
    """(CPUs, GPUs) that one pool may take."""
    return (
        pool.max_replicas * pool.cpus_per_replica,
        pool.max_replicas * pool.gpus_per_replica,
    )


def sources(
    experiment: config.Experiment,
    device: str,
    sender: str = "",
    samples: CanonicalImages | None = None,
) -> list[FeatureSource]:
    """The source of each term of the alignment; none without alignment. Terms of one teacher share
    one: a client of its pool, or the teacher itself where `pool.kind` is local. With
    align.target=canonical it is `samples`.
    """
    if samples and experiment.aligns_to_canonical:
        return [CanonicalFeatures(samples)]
    teachers = experiment.teachers
    of_teacher = {
        teacher: _source(teacher, experiment.pool, device, sender) for teacher in set(teachers)
    }
    return [of_teacher[teacher] for teacher in teachers]


def _source(teacher: config.Teacher, pool: config.Pool, device: str, sender: str) -> FeatureSource:
    if pool.kind == "pool":
        from dra_ray.pool.client import PoolClient

        return PoolClient(app_name(teacher), pool, sender)
    assert teacher.uri
    net = checkpoint.load(Store(teacher.uri))
    return LocalTeacher(net, teacher, pool.threads_per_replica, device)
