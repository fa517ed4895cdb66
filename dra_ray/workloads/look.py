"""Look at models for analyses by Ray tasks: one for each batch of a model's images, its attacks and
features, then one for each size of autoencoder, and one for each radius within which a head on the
teacher or a model is attacked. All is kept in a folder from which `inspection.analyses` takes it.

A batch is the same bytes whoever makes it (on one kind of machine), and what is there is not made
again, so a killed analysis goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from dra_ray import config, runs
from dra_ray.errors import ConfigError
from dra_ray.evaluation.subjects import Options, Subject
from dra_ray.inspection import analyses, models, sae
from dra_ray.inspection.frozen import EPS_255
from dra_ray.inspection.kept import Kept
from dra_ray.inspection.models import How
from dra_ray.storage import Lease, Store
from dra_ray.workloads import tasks

FOUND = "analysis.json"  # rows and curves


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be looked at, by which analysis: classifiers as they were given, how, and of each
    the key of what is seen, its number of batches and the width of its features.
    """

    what: str
    teacher: str | None
    given: tuple[str, ...]
    options: Options
    how: How
    keys: tuple[str, ...]
    batches: tuple[int, ...]
    widths: tuple[int, ...]


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
        what,
        teacher,
        tuple(each for each in given if each != teacher),
        options,
        how,
        tuple(models.seen_key(each, how) for each in chosen),
        tuple(models.batch_count(each) for each in chosen),
        tuple(models.width(each) for each in chosen),
    )


def run(
    plan: Plan,
    store: Store,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make every batch, autoencoder and attack that `store` lacks; `progress` gets how many of them
    are made. Ray must have been initialised. Raises `RunError` where a task fails, after which the
    same call goes on.
    """
    kept, uri = Kept(store.resolved()), store.resolved().uri
    look, autoencode, probe = _task(_look), _task(_autoencode), _task(_probe)
    seen = (plan.options, plan.how, uri)
    batches = [
        functools.partial(look.remote, plan.given[place], *seen, number)
        for place, (key, count) in enumerate(zip(plan.keys, plan.batches, strict=True))
        for number in range(count)
        if not kept.has(models.batch_name(key, number))
    ]
    autoencoders = [
        functools.partial(autoencode.remote, plan.keys[place], plan.batches[place], settings, uri)
        for place, settings in _sizes(plan)
    ]
    attacks = [
        functools.partial(probe.remote, plan.teacher, plan.given, *seen, attack)
        for attack in _radii(plan)
    ]
    total, before = len(batches) + len(autoencoders) + len(attacks), 0
    for works in (batches, autoencoders, attacks):  # autoencoders need all batches
        _in_turn(works, workers, store, functools.partial(_told, progress, before, total))
        before += len(works)


def _task(work: Callable[..., None]) -> Any:
    return ray.remote(work).options(num_cpus=1, max_retries=3)


def _in_turn(
    works: Sequence[Callable[[], ray.ObjectRef[None]]],
    workers: int,
    store: Store,
    on_end: Callable[[int], None],
) -> None:
    tasks.in_order(len(works), lambda index: works[index](), workers, "the analysis", store, on_end)


def _told(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def analyse(
    settings: config.Analysis,
    folder: Store,
    progress: Callable[[runs.AnalysisProgress], None] | None = None,
) -> dict[str, object]:
    """Write the analyses that `settings` ask for to `folder`, as a page and a JSON file, and return
    what each of them sees here, in a sentence. What was looked at is kept there too. Ray must have
    been initialised.

    Raises `ConfigError` where `folder` holds something else, beside what `plan` and `run` raise.
    """
    from dra_ray.report import analyses as page  # with plots, which nothing else here draws

    options, how = models.asked(settings)
    planned = plan(settings.what, settings.models, options, how)
    tree, digest = settings.model_dump(mode="json"), settings.digest()
    if runs.begin_run(folder, "analysis", tree, digest).is_done:
        told_before = (folder / FOUND).read_json()
        return {name: each["here"] for name, each in told_before.items()}
    began = time.monotonic()

    def told(done: int, total: int) -> None:
        if progress:
            elapsed_s = round(time.monotonic() - began, 3)
            progress(runs.AnalysisProgress(done=done, total=total, elapsed_s=elapsed_s))

    with Lease(folder):
        run(planned, folder, settings.workers, told)
        found, facts = analyses.analyse(
            settings.what,
            settings.models,
            options,
            how,
            neighbours=settings.neighbours,
            kept=Kept(folder),
        )
        (folder / FOUND).write_json({each.name: dataclasses.asdict(each) for each in found})
        page.write(folder / runs.REPORT, ", ".join(settings.models), facts, found)
        elapsed_s = round(time.monotonic() - began, 3)
        runs.update_manifest(folder, runs.Facts(status="done", elapsed_s=elapsed_s))
    return {each.name: each.here for each in found}


def _radii(plan: Plan) -> list[tuple[int, float]]:
    """A curve's number and a radius, of every task; those that take longest first."""
    if plan.what not in ("probe", "all") or plan.teacher is None:
        return []
    curves = range(models.curve_count(plan.given))
    longest_first = sorted(curves, key=lambda n: n != len(models.HEADS) - 1)
    return [(number, radius) for number in longest_first for radius in EPS_255]


def _sizes(plan: Plan) -> list[tuple[int, sae.Settings]]:
    """A model's place and the autoencoders' settings, of every task."""
    if plan.what not in ("sae", "all"):
        return []
    return [
        (place, settings)
        for place, width in enumerate(plan.widths)
        for settings in analyses.autoencoders(width, plan.how.sae_steps)
    ]


def _autoencode(key: str, batches: int, settings: sae.Settings, store: str) -> None:
    """Ray task: train a model's autoencoders of one size, from its kept features."""
    tasks.prepare()
    kept = Kept(Store(store))
    analyses.autoencoded(models.kept_features(key, batches, kept), settings, kept)


_SUBJECTS: dict[str, list[tuple[Subject, str]]] = {}


def _subjects(given: Sequence[str], options: Options, how: How) -> list[tuple[Subject, str]]:
    """Models as they were given, each with the key of what is seen of it; a worker keeps the last
    ones.
    """
    name = f"{given} {options} {how}"
    if name not in _SUBJECTS:
        found = [models.subject(each, options, how) for each in given]
        _SUBJECTS.clear()
        _SUBJECTS[name] = [(each, models.seen_key(each, how)) for each in found]
    return _SUBJECTS[name]


def _look(given: str, options: Options, how: How, store: str, number: int) -> None:
    """Ray task: look at one batch of a model."""
    tasks.prepare()
    ((found, key),) = _subjects([given], options, how)
    models.look_at_batch(found, how, number, Kept(Store(store)), key)


def _probe(
    teacher: str,
    given: tuple[str, ...],
    options: Options,
    how: How,
    store: str,
    attack: tuple[int, float],
) -> None:
    """Ray task: attack what a curve is of within one radius; `attack` is the curve's number and the
    radius.
    """
    number, radius_255 = attack
    tasks.prepare()
    chosen = [found for found, _ in _subjects(given, options, how)]
    models.curve(teacher, chosen, how, number, Kept(Store(store)), [radius_255])
