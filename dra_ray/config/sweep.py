"""Configs of many runs: a sweep of a search space, and the quickstart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dra_ray.config import expressions
from dra_ray.config.axes import Axis, Values, as_axis
from dra_ray.config.base import (
    Count,
    CountOrNone,
    Frozen,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    flatten,
    shown_value,
)
from dra_ray.config.experiment import Experiment
from dra_ray.config.fields import suggest, walk
from dra_ray.config.readers import readers, unread
from dra_ray.config.teacher import Synthesis, TeacherTraining
from dra_ray.config.text import shown
from dra_ray.errors import nearest

COMBINATIONS = 10_000  # each becomes an experiment, in memory and on every worker


class Asha(Frozen):
    """Asynchronous successive halving (Li et al. 2020) on robust validation accuracy over
    `images_seen`.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"level"})

    grace_epochs: Count = Field(2, description="no trial is stopped before")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="one trial in so many goes on to the next rung, so many times as long"
    )
    max_concurrent: Count = Field(2, description="trials that train at the same time")
    level: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05,
        description="of noise_aware: a trial is stopped only where chance alone would put it so "
        "far behind less often than this; of halving: nobody is stopped until a rung's trials "
        "differ more than chance alone would make them so often",
    )


class Search(Frozen):
    """How the trials are chosen from `space`."""

    method: Literal["grid", "random", "tpe", "gp"] = Field(
        "grid",
        description="grid: every combination of lists, or `trials` of them drawn without "
        "replacement; random: `trials` drawn from lists and ranges; tpe, gp: Optuna's "
        "tree-structured Parzen estimator (Bergstra et al. 2011) and Gaussian process, which learn "
        "from the trials that are done",
    )
    startup_trials: CountOrNone = Field(
        8, description="of tpe and gp: trials drawn at random before the first that is learnt"
    )
    points: list[dict[str, Any]] = Field(
        default_factory=list,
        description="trials to begin with, such as {align.weight: 1, align.sigma: 0.1}; axes that "
        "are left out keep base's value",
    )
    warm_start: str | None = Field(
        None,
        description="of tpe and gp: folder of a former sweep over the same fields, whose scores "
        "are learnt from",
    )


class Repeats(Frozen):
    """Further training seeds; batches, augmentation and teacher features stay those of `base`."""

    seeds: Count = Field(1, description="training seeds of a trial")
    of: Literal["finalists", "all"] = Field(
        "finalists", description="which trials are trained with all of them"
    )


class Budget(Frozen):
    """Where a sweep stops, whichever comes first. Not in the digest: a sweep goes on when it is
    raised.
    """

    trials: PositiveInt | None = Field(None, description="trials that may start; default: any")
    images: PositiveInt | None = Field(
        None, description="training images seen, over all trials; default: any"
    )
    gpu_hours: PositiveFloat | None = Field(
        None, description="hours times GPUs that are reserved, teachers' included; default: any"
    )
    money: PositiveFloat | None = Field(
        None, description="cost in the currency of `prices`; default: any"
    )


class Fidelity(Frozen):
    """Verdicts of stronger attacks on the held-out images, beside the training and at its end. They
    name the winner; what is stopped, PGD decides as before.
    """

    apgd_from: Probability | None = Field(
        None,
        description="share of a trial's epochs from which each validation also gets a verdict by "
        "AutoAttack's level screen; default: none does",
    )
    apgd_images: PositiveInt | None = Field(
        None, description="use only the first N validation images for that; default: all"
    )
    apgd_steps: Count = Field(20, description="steps of each APGD in that; AutoAttack takes 100")
    finalists: Literal["none", "standard", "plus"] = Field(
        "none",
        description="version of AutoAttack that judges the finalists on all validation images",
    )
    best: Count = Field(
        3,
        description="finalists: the best of the trials that were trained to the end by PGD, and "
        "beside them the best without alignment; each with its repeats",
    )
    workers: Count = Field(
        1, description="such attacks at the same time, each a Ray task of one CPU"
    )
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for each")

    @property
    def is_on(self) -> bool:
        return self.apgd_from is not None or self.finalists != "none"


class Sweep(Frozen):
    """Many runs: points of `space`, each a trial of `base` with some fields changed."""

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {
            "constraints",
            "search",
            "repeats",
            "scheduler",
            "budget",
            "prices",
            "max_failures",
            "fidelity",
        }
    )

    kind: Literal["sweep"] = Field("sweep", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    base: Experiment = Experiment()
    space: dict[str, Values] = Field(
        default_factory=dict,
        description="values per field: a list such as align.weight: [0, 1], or an axis as below",
    )
    constraints: list[str] = Field(
        default_factory=list,
        description="what must be true of the fields of every trial, such as synthetic.images <= "
        "1000 * optim.epochs",
    )
    search: Search = Search()
    trials: PositiveInt | None = Field(
        None,
        description="how many; default: every combination. Needed where an axis is a range, and "
        "for tpe and gp",
    )
    seed: NonNegativeInt = Field(0, description="of the draw of trials")
    repeats: Repeats = Repeats()
    # one of sweeps.schedulers.BUILDERS, which lies above this room: checked with the space
    scheduler: str = Field(
        "noise_aware",
        description="what stops a trial early: noise_aware: asha's rungs where chance cannot "
        "explain that it is behind; halving: at a rung all wait for each other and the best go on; "
        "asha: plain; median: being below the median of the trials before it; pareto: being "
        "dominated in clean and robust accuracy; none: nothing",
    )
    asha: Asha = Asha()
    fidelity: Fidelity = Fidelity()
    budget: Budget = Budget()
    prices: str | None = Field(
        None, description="URI of the YAML price table that budget.money is counted with"
    )
    max_failures: CountOrNone = Field(
        0, description="how often a trial that failed is started again"
    )

    @model_validator(mode="after")
    def _checked(self) -> Sweep:
        if not self.space:
            raise ValueError(
                "space is empty; name at least one field, such as align.weight: [0, 1]"
            )
        self._check_size()
        self._check_expressions()
        self._check_search()
        self._check_readers()
        beside = "resources.validation"
        if self.base.resources.validation == "beside" or beside in self.space:
            raise ValueError(
                f"{beside} is set in {'space' if beside in self.space else 'base'}, but a sweep "
                "decides by a validation as soon as it is due; leave it out"
            )
        if self.asha.grace_epochs > self.base.optim.epochs:
            raise ValueError(
                f"asha.grace_epochs={self.asha.grace_epochs} is beyond "
                f"base.optim.epochs={self.base.optim.epochs}; lower it"
            )
        if self.budget.money is not None and self.prices is None:
            raise ValueError(
                f"budget.money={self.budget.money:g}, but prices is not set; name a price table, "
                "or set budget.gpu_hours instead"
            )
        given, there = self.fidelity.apgd_images, self.base.data.validation_images
        if given is not None and given > there:
            raise ValueError(
                f"fidelity.apgd_images={given:,}, but base.data.validation_images={there:,}; "
                "lower it"
            )
        return self

    @property
    def axes(self) -> dict[str, Axis]:
        """Field -> axis, in order of the fields' names."""
        return {field: as_axis(self.space[field]) for field in sorted(self.space)}

    @property
    def ranges(self) -> list[str]:
        """Fields whose values come from a range."""
        return [field for field, axis in self.axes.items() if axis.choice is None]

    def parents(self, field: str) -> frozenset[str]:
        """The axes that decide whether this one matters."""
        condition = self.axes[field].when
        named = expressions.of(condition).fields if condition else frozenset()
        return named | {one.field for one in readers(field)} & self.space.keys()

    def possible(self) -> Callable[[str], Sequence[Any]]:
        """What gives the values that a field of the trials may have: those of its axis (the ends of
        a range), or base's.
        """
        base, axes = dict(flatten(self.base.model_dump(mode="json"))), self.axes

        def values(field: str) -> Sequence[Any]:
            if field not in axes:
                return [base.get(field)]
            axis = axes[field]
            return axis.choice if axis.choice is not None else axis.bounds or ()

        return values

    def _check_size(self) -> None:
        for field, axis in self.axes.items():
            if axis.choice is not None and not axis.choice:
                raise ValueError(f"space.{shown_value(field)} has no values")
        combinations = math.prod(len(axis.choice or [0]) for axis in self.axes.values())
        if combinations > COMBINATIONS:
            raise ValueError(
                f"space has {combinations:,} combinations; take fields or values out until there "
                f"are at most {COMBINATIONS:,}"
            )

    def _check_expressions(self) -> None:
        conditions = {field: axis.when for field, axis in self.axes.items() if axis.when}
        for field, when in conditions.items():
            for name in sorted(expressions.of(when).fields - self.space.keys()):
                raise ValueError(
                    f"space.{shown_value(field)}.when={shown(when)} names {shown(name)}, which is "
                    f"no axis; {nearest(name[:100], self.space)}"
                )
        if circle := _circle({field: self.parents(field) for field in self.space}):
            raise ValueError(
                f"space: whether {circle[0]} matters depends on itself ({' -> '.join(circle)}); "
                "take one of the conditions out"
            )
        known = {name for name, _ in walk(Experiment)}
        for number, text in enumerate(self.constraints):
            try:
                fields = expressions.of(text).fields
            except ValueError as error:
                raise ValueError(f"constraints.{number}: {error}") from None
            for name in sorted(fields - known - self.space.keys()):
                raise ValueError(
                    f"constraints.{number}={shown(text)} names the unknown field {shown(name)}; "
                    f"{suggest(Experiment, name.split('.'))}"
                )
            if not fields & self.space.keys():
                raise ValueError(
                    f"constraints.{number}={shown(text)} names no axis, so no trial can change it; "
                    "take it out"
                )

    def _check_readers(self) -> None:
        possible = self.possible()
        for field in self.axes:
            if why := unread(field, possible):
                raise ValueError(
                    f"space.{shown_value(field)} changes no trial: {why}; change it, or take the "
                    "axis out"
                )

    def _check_search(self) -> None:
        search, ranges = self.search, self.ranges
        if self.repeats.seeds > 1 and "seed" in self.space:
            raise ValueError(
                f"repeats.seeds={self.repeats.seeds}, but seed is an axis; take either out"
            )
        if search.method == "grid" and ranges:
            field = shown_value(ranges[0])
            raise ValueError(
                f"space.{field} is a range ({self.axes[ranges[0]]}), of which a grid has no end; "
                "set search.method to random or tpe, or list values"
            )
        if self.trials is None and (ranges or search.method in ("tpe", "gp")):
            raise ValueError(
                f"trials is not set; search.method={search.method} needs to know how many"
            )
        if self.trials is not None and self.trials > COMBINATIONS and ranges:
            raise ValueError(f"trials={self.trials:,}: write at most {COMBINATIONS:,}")
        if search.warm_start and search.method not in ("tpe", "gp"):
            raise ValueError(
                f"search.warm_start is set, but search.method={search.method} learns nothing; set "
                "search.method=tpe"
            )
        for number, point in enumerate(search.points):
            for field, value in point.items():
                place = f"search.points.{number}.{shown_value(field)}"
                if field not in self.space:
                    raise ValueError(f"{place} is no axis; {nearest(field[:100], self.space)}")
                if value not in self.axes[field]:
                    raise ValueError(
                        f"{place}={shown_value(value)} is not in {self.axes[field]}; widen the "
                        "axis or change the point"
                    )


def _circle(parents: Mapping[str, Iterable[str]]) -> list[str]:
    """A way from a field back to itself, by what its condition names; empty where there is none."""
    done: set[str] = set()

    def visit(field: str, path: list[str]) -> list[str]:
        if field in path:
            return [*path[path.index(field) :], field]
        if field in done:
            return []
        done.add(field)
        ways = (visit(parent, [*path, field]) for parent in sorted(parents.get(field, ())))
        return next(filter(None, ways), [])

    return next(filter(None, (visit(field, []) for field in parents)), [])


class Quickstart(Frozen):
    """Teacher, synthetic images and sweep in one file: `dra quickstart`."""

    kind: Literal["quickstart"] = Field("quickstart", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    teacher: TeacherTraining = TeacherTraining()
    synthesis: Synthesis = Synthesis()
    sweep: Sweep
