"""Look at models for analyses by Ray tasks, one for each batch of a model's images: attacks and
features, kept in a folder from which `inspection.analyses` takes them.

A batch is the same bytes whoever makes it (on one kind of machine), and what is there is not made
again, so a killed analysis goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ray
import torch

from dra_ray.errors import ConfigError
from dra_ray.evaluation.subjects import Options, Subject
from dra_ray.inspection import analyses, models
from dra_ray.inspection.kept import Kept
from dra_ray.inspection.models import How
from dra_ray.storage import Store
from dra_ray.workloads import tasks


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be looked at: classifiers as they were given, how, and how many batches each has
    under which key.
    """

    given: tuple[str, ...]
    options: Options
    how: How
    keys: tuple[str, ...]
    batches: tuple[int, ...]


def plan(what: str, given: Sequence[str], options: Options, how: How) -> Plan:
    """Of the analysis `what`; before Ray starts. Raises what `analyses.analyse` raises, and
    `ConfigError` for a model that is code on this machine alone.
    """
    teacher, chosen = analyses.sort(what, given, options, how)
    for each in chosen:
        if each.code:
            raise ConfigError(
                f"'{each.name}' is code of this machine; leave --workers out, and it is looked at "
                "here"
            )
    return Plan(
        tuple(each for each in given if each != teacher),
        options,
        how,
        tuple(models.seen_key(each, how) for each in chosen),
        tuple(models.batch_count(each) for each in chosen),
    )


def run(
    plan: Plan,
    store: Store,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make every batch that `store` lacks; `progress` gets how many of them are made. Ray must have
    been initialised. Raises `RunError` where a task fails, after which the same call goes on.
    """
    kept = Kept(store.resolved())
    missing = [
        (place, number)
        for place, (key, count) in enumerate(zip(plan.keys, plan.batches, strict=True))
        for number in range(count)
        if not kept.has(models.batch_name(key, number))
    ]
    task = ray.remote(_look).options(num_cpus=1, max_retries=3)

    def start(index: int) -> ray.ObjectRef[None]:
        place, number = missing[index]
        ref: ray.ObjectRef[None] = task.remote(
            plan.given[place], plan.options, plan.how, store.resolved().uri, number
        )
        return ref

    tasks.in_order(
        len(missing),
        start,
        workers,
        "the analysis",
        store,
        lambda done: progress(done, len(missing)),
    )


_SUBJECTS: dict[str, tuple[Subject, str]] = {}


def _look(given: str, options: Options, how: How, store: str, number: int) -> None:
    """Ray task: look at one batch of a model."""
    torch.set_num_threads(1)
    name = f"{given} {options} {how}"
    if name not in _SUBJECTS:  # a worker keeps the last model
        found = models.subject(given, options, how)
        _SUBJECTS.clear()
        _SUBJECTS[name] = found, models.seen_key(found, how)
    found, key = _SUBJECTS[name]
    models.look_at_batch(found, how, number, Kept(Store(store)), key)
