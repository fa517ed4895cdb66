"""What would fail once a run has begun: looked at before its folder is made, and before Ray starts.

All that a plan finds, and what only reading the data and the weights tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping

import torch

from dra_ray import config, data, plan, runs
from dra_ray.data import canonical, synthetic
from dra_ray.errors import DraError
from dra_ray.storage import Store
from dra_ray.sweeps import spaces
from dra_ray.teachers import fitting

log = logging.getLogger("dra_ray")


def of_experiment(experiment: config.Experiment) -> runs.Facts:
    """`facts`, for a run that is planned too. Raises what planning, reading and building raise."""
    experiment.tracking.require_installed()
    found = facts(experiment)
    plan.check(experiment)
    return found


def facts(experiment: config.Experiment) -> runs.Facts:
    """What the manifest is to say of the run's data. Data, synthetic images, teacher, student and
    weights are read as far as they must fit each other.
    """
    images = _load(experiment)
    generated = load_synthetic(experiment, images)
    samples = load_canonical(experiment, images.shape)
    fits(experiment, images.shape)
    said = runs.Facts(data=images.facts(), seed=experiment.seed)
    further = {}
    if generated is not None:
        further["synthetic"] = data.picture_facts(generated)
    if samples is not None:
        further["canonical"] = samples.facts()
    return said.model_copy(update=further)


@dataclasses.dataclass(frozen=True)
class Trials:
    """Of a sweep, each with its sources named in full.

    Attributes:
        planned: by name; of a search that learns, random ones stand for those after its opening.
        possible: these, and what such a search may come to, by words.
    """

    planned: dict[str, config.Experiment]
    possible: dict[str, config.Experiment]


def of_sweep(sweep: config.Sweep, raised: int | None = None) -> Trials:
    """The trials; every data set, synthetic set, teacher and student among the possible ones was
    looked at as `of_experiment` does, and the errors name the trial.

    Args:
        raised: as `Space.trials` has it.
    """
    sweep.base.tracking.require_installed()
    planned, ends = (
        {name: experiment.with_sources() for name, experiment in some.items()}
        for some in (spaces.experiments(sweep, raised), spaces.ends(sweep))
    )
    trials = Trials(planned, planned | ends)
    by_data: dict[config.Data, dict[str, config.Experiment]] = {}
    for name, experiment in trials.possible.items():
        by_data.setdefault(experiment.data, {})[name] = experiment
    for alike in by_data.values():
        _look_at(alike)
    plan.plan(sweep, raised=raised)
    return trials


def _look_at(trials: Mapping[str, config.Experiment]) -> None:
    """At trials on the same data."""
    first = next(iter(trials))
    with _naming(first):
        images = _load(trials[first])
    most: dict[str | None, str] = {}  # the trial that takes the most of each synthetic set
    for name, experiment in trials.items():
        with _naming(name):
            fits(experiment, images.shape)
        of_set = most.setdefault(experiment.synthetic.uri, name)
        if experiment.synthetic.images > trials[of_set].synthetic.images:
            most[experiment.synthetic.uri] = name
    for name in most.values():
        with _naming(name):
            load_synthetic(trials[name], images)
    sets: set[tuple[config.CanonicalSet, bool]] = set()
    for name, experiment in trials.items():
        read = experiment.canonical, experiment.aligns_to_canonical
        if experiment.needs_canonical and read not in sets:
            sets.add(read)
            with _naming(name):
                load_canonical(experiment, images.shape)


@contextlib.contextmanager
def _naming(trial: str) -> Iterator[None]:
    try:
        yield
    except DraError as error:
        raise type(error)(f"{trial}: {error}") from None


def _load(experiment: config.Experiment) -> data.Images:
    log.info("loading the data '%s'", experiment.data.name)
    return data.load(experiment.data)


def load_synthetic(experiment: config.Experiment, images: data.Images) -> data.Pictures | None:
    """The synthetic images of a run on `images`, if it has some."""
    if not experiment.synthetic.images:
        return None
    assert experiment.synthetic.uri
    return synthetic.read(Store(experiment.synthetic.uri), experiment.synthetic.images, images)


def load_canonical(
    experiment: config.Experiment, shape: data.Shape
) -> canonical.CanonicalImages | None:
    """The canonical samples of a run on images of `shape`, if it has some. Raises what reading
    them raises, and `DataError` where images are to be aligned to samples of a class without any.
    """
    if not experiment.needs_canonical:
        return None
    assert experiment.canonical.uri
    found = canonical.read(Store(experiment.canonical.uri), experiment.canonical.images, shape)
    if experiment.aligns_to_canonical:
        every = torch.arange(shape.num_classes)
        canonical.of_class(found.members, wanted=every, seeds=every)
    return found


def fits(experiment: config.Experiment, shape: data.Shape) -> None:
    """Raise where the teacher, the student or its weights do not fit images of `shape`."""
    if experiment.teachers:
        assert experiment.teacher.uri
        fitting.check(experiment, fitting.known(experiment.teacher.uri), shape)
    student = plan.student(experiment.model, shape)
    if experiment.align.weight and experiment.teacher.tokens:
        size = (2, shape.channels, shape.resolution, shape.resolution)
        student.with_map(torch.zeros(size, device="meta"))
