"""The search space of a sweep as points: every combination, seeded draws, and the experiment that a
point stands for.

A point names the axes that matter in it. An axis whose condition is false is not in it, nor is one
that nothing reads there (config.readers): without alignment whatever alignment alone reads, IKL's
alpha in TRADES. Two draws that differ only there are one point, and one trial.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import Any

from dra_ray import config
from dra_ray.config import expressions
from dra_ray.config.axes import Axis
from dra_ray.config.readers import WEIGHT, is_read
from dra_ray.config.sweep import COMBINATIONS
from dra_ray.config.text import refusal, shown
from dra_ray.errors import ConfigError
from dra_ray.sweeps import schedulers

ATTEMPTS = (
    1000  # draws in a row that constraints or repetition refuse before a space counts as empty
)
_DIGITS = 6  # significant ones of a value from a range: what a person can type again

Point = dict[str, Any]  # dotted field -> plain value, the active axes alone


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def repeat_name(trial: str, number: int) -> str:
    """Of the trial that repeats another with training seed `number`, from 1."""
    return f"{trial}-seed-{number}"


def is_repeat(trial: str) -> bool:
    return "-seed-" in trial


def experiments(sweep: config.Sweep, raised: int | None = None) -> dict[str, config.Experiment]:
    """Trial name -> experiment of `Space.trials`. Raises `ConfigError` naming trial, field and
    value where one is not valid, and for an unknown scheduler.
    """
    schedulers.require_known(sweep.scheduler)
    space = Space(sweep)
    space.ends()
    valid = {}
    for name, point in space.trials(raised).items():
        try:
            valid[name] = space.experiment(point)
        except ConfigError as error:
            raise refusal(f"{name}: {error}") from None
    return valid


def ends(sweep: config.Sweep) -> dict[str, config.Experiment]:
    """`Space.ends` of a sweep."""
    return Space(sweep).ends()


class Space:
    """The points of a sweep. Everything is a pure function of the sweep and the arguments."""

    def __init__(self, sweep: config.Sweep) -> None:
        self.sweep = sweep
        self.axes = sweep.axes
        self.conditions = {
            field: expressions.of(axis.when) for field, axis in self.axes.items() if axis.when
        }
        self.constraints = [expressions.of(text) for text in sweep.constraints]
        self.order = self._parents_first()
        self._base = dict(config.flatten(sweep.base.model_dump(mode="json")))

    def _parents_first(self) -> list[str]:
        """Fields so that what a condition names comes before the field that has it."""
        left = list(self.axes)
        order: list[str] = []
        while left:
            ready = next(f for f in left if self.sweep.parents(f) <= set(order))
            order.append(ready)
            left.remove(ready)
        return order

    # -- points --------------------------------------------------------------------------------
    def matters(self, field: str, point: Mapping[str, Any]) -> bool:
        """Whether an axis has an effect, given the point's values of the axes before it in
        `order`.
        """
        if not is_read(field, self._beside(point)):
            return False
        condition = self.conditions.get(field)
        return condition is None or (condition.fields <= point.keys() and condition.holds(point))

    def _beside(self, point: Mapping[str, Any]) -> Mapping[str, Any]:
        """The point's values, and base's of other fields."""
        return ChainMap(dict(point), self._base)

    def _aligns(self, point: Mapping[str, Any]) -> bool:
        return bool(self._beside(point).get(WEIGHT))

    def point(self, values: Mapping[str, Any]) -> Point:
        """The point with these values of the axes, and base's where none is given."""
        point: Point = {}
        for field in self.order:
            if self.matters(field, point):
                point[field] = values[field] if field in values else self._base.get(field)
        return dict(sorted(point.items()))

    def key(self, point: Mapping[str, Any]) -> str:
        """Equal for points that are the same trial."""
        whole = {
            field: int(value) if isinstance(value, float) and value.is_integer() else value
            for field, value in point.items()
        }
        return json.dumps(whole, sort_keys=True)

    def _filled(self, point: Point) -> Point:
        """The point with the first of the listed values for axes that are idle in it."""
        idle = {field: axis.choice[0] for field, axis in self.axes.items() if axis.choice}
        return idle | point

    def values(self, point: Point) -> dict[str, Any]:
        """Every field of the point's experiment, as far as known before it is validated."""
        return self._base | self.changes(point)

    def changes(self, point: Point) -> dict[str, Any]:
        """What the point's experiment has different from base.

        An axis that a condition switches off keeps base's value. One that nothing reads there has
        the first of its values.
        """
        idle = {
            field: axis.choice[0]
            for field, axis in self.axes.items()
            if axis.choice and axis.when is None
        }
        return dict(sorted((idle | point).items()))

    def experiment(self, point: Point, repeat: int = 0) -> config.Experiment:
        """What the point stands for. Repeat 1, 2, ... has another training seed, on the same
        batches with the same augmentation and teacher features. Raises `ConfigError`.
        """
        return config.override(self.sweep.base, self.changes(point) | self.seeds(repeat))

    def seeds(self, repeat: int) -> dict[str, Any]:
        """What a repeat changes besides its point; nothing for repeat 0."""
        base = self.sweep.base
        return {"seed": base.seed + repeat, "data_seed": base.shared_seed} if repeat else {}

    def problem(self, point: Point) -> str | None:
        """Why the point can be no trial: the constraint that it violates; None where it can."""
        values = self.values(point)
        return next((rule.text for rule in self.constraints if not rule.holds(values)), None)

    def violation(self, point: Point) -> float:
        """How far the point is from satisfying every constraint; 0 where it does."""
        values = self.values(point)
        return sum(rule.violation(values) for rule in self.constraints)

    # -- baselines -----------------------------------------------------------------------------
    def baseline(self) -> Point | None:
        """The point without alignment that a search begins with, its other fields as in base as far
        as the axes have that; None where the weight is no axis, or a constraint forbids it.
        """
        if WEIGHT not in self.axes:
            return None
        usual = {field: self._usual(field, axis) for field, axis in self.axes.items()}
        draws = Random(self.sweep.seed)
        others = (self._draw(draws) for _ in range(ATTEMPTS))
        candidates = (
            self.point(values | {WEIGHT: 0}) for values in itertools.chain([usual], others)
        )
        return next((point for point in candidates if self.problem(point) is None), None)

    def without_alignment(self, point: Point) -> Point:
        """The baseline that a point is compared with: the same in all that is not alignment."""
        return self.point(point | {WEIGHT: 0})

    def _usual(self, field: str, axis: Axis) -> Any:
        """Base's value, or the nearest that the axis has."""
        value = self._base.get(field)
        if value in axis:
            return value
        if axis.choice is not None:
            return axis.choice[0]
        assert axis.bounds is not None
        low, high = axis.bounds
        return high if isinstance(value, int | float) and value > high else low

    # -- draws ---------------------------------------------------------------------------------
    def grid(self) -> list[Point]:
        """Every combination of listed values that the constraints allow, each point once.

        Axes of ranges keep base's value.
        """
        points: dict[str, Point] = {}
        fields = [field for field, axis in self.axes.items() if axis.choice is not None]
        for values in itertools.product(*(self.axes[field].choice or () for field in fields)):
            point = self.point(dict(zip(fields, values, strict=True)))
            points.setdefault(self.key(point), point)
        return [point for point in points.values() if self.problem(point) is None]

    def draws(self, seed: int) -> Iterator[Point]:
        """Points at random, none twice; ends where lists are exhausted, or where `ATTEMPTS` draws
        in a row give nothing new that the constraints allow.
        """
        draws = Random(seed)
        if not self.sweep.ranges:
            points = self.grid()
            draws.shuffle(points)
            yield from points
            return
        seen: set[str] = set()
        failures = 0
        while failures < ATTEMPTS:
            point = self.point(self._draw(draws))
            if self.key(point) in seen or self.problem(point) is not None:
                failures += 1
                continue
            failures = 0
            seen.add(self.key(point))
            yield point

    def random(self, number: int, seed: int) -> list[Point]:
        """The first `number` of `draws`, or as many as there are."""
        return list(itertools.islice(self.draws(seed), number))

    def _draw(self, draws: Random) -> dict[str, Any]:
        return {field: _drawn(axis, draws) for field, axis in self.axes.items()}

    # -- trials --------------------------------------------------------------------------------
    @property
    def is_adaptive(self) -> bool:
        """Whether trials are chosen by what those before them scored."""
        return self.sweep.search.method in ("tpe", "gp")

    def opening(self) -> list[Point]:
        """What every search begins with: the baseline, except in a grid, whose lists say whether
        there is one; then the points to try first. Raises `ConfigError` where a constraint forbids
        one of those.
        """
        first = None if self.sweep.search.method == "grid" else self.baseline()
        points = [] if first is None else [first]
        for number, given in enumerate(self.sweep.search.points):
            point = self.point(given)
            if (broken := self.problem(point)) is not None:
                raise refusal(
                    f"search.points.{number}={shown(given)} violates the constraint {shown(broken)}"
                    "; change either"
                )
            points.append(point)
        return list({self.key(point): point for point in points}.values())

    def trials(self, raised: int | None = None) -> dict[str, Point]:
        """Trial name -> point, in the order in which they start.

        A search that learns from scores does not know its trials in advance: then points at random
        stand for those after the opening, for plans and checks.

        Args:
            raised: how many the sweep was raised to after it began; the first ones stay.
        """
        points = self._drawn_grid() if self.sweep.search.method == "grid" else self._started()
        if not points:
            raise refusal("constraints allow no point of space; loosen one")
        points += itertools.islice(self._besides(points), max(0, (raised or 0) - len(points)))
        return {trial_name(number): point for number, point in enumerate(points)}

    def most(self) -> int | None:
        """How many trials the space has; None where a range has no end of them."""
        return None if self.sweep.ranges else len(self.trials(COMBINATIONS))

    def _started(self) -> list[Point]:
        opening = self.opening()
        drawn = self._besides(opening)
        return list(itertools.islice(itertools.chain(opening, drawn), self.sweep.trials))

    def _besides(self, points: Iterable[Point]) -> Iterator[Point]:
        """`draws` without these."""
        known = {self.key(point) for point in points}
        return (point for point in self.draws(self.sweep.seed) if self.key(point) not in known)

    def _drawn_grid(self) -> list[Point]:
        """Every combination, or `trials` of them: with one baseline where there is one, since a
        sweep without it proves nothing.
        """
        opening = self.opening()
        known = {self.key(point) for point in opening}
        picked = [point for point in self.grid() if self.key(point) not in known]
        number = None if self.sweep.trials is None else self.sweep.trials - len(opening)
        if number is not None and number < len(picked):
            baselines = [p for p in (*opening, *picked) if not self._aligns(p)]
            baseline = [] if baselines and baselines[0] in opening else baselines[:1]
            baseline = baseline if WEIGHT in self.axes else []
            rest = [point for point in picked if point not in baseline]
            size = max(number - len(baseline), 0)
            picked = baseline + Random(self.sweep.seed).sample(rest, size)
            picked.sort(key=lambda point: json.dumps(self._filled(point), sort_keys=True))
        return (opening + picked)[: self.sweep.trials]

    def ends(self) -> dict[str, config.Experiment]:
        """Both ends of the ranges of a search that learns, which may come to any value, and every
        listed value: by what they are, one at a time on the first trial. None of another search,
        whose trials are known. Raises `ConfigError` for a value that would be no config.
        """
        found: dict[str, config.Experiment] = {}
        if not self.is_adaptive:
            return found
        first = next(iter(self.trials().values()))
        for field, axis in self.axes.items():
            for value in axis.choice if axis.choice is not None else axis.bounds or ():
                point = self.point(self._filled(first) | {field: value})
                if self.problem(point) is None:
                    try:
                        found[f"space.{field}={shown(value)}"] = self.experiment(point)
                    except ConfigError as error:
                        raise refusal(f"space.{field}: a trial with {error}") from None
        return found


def _drawn(axis: Axis, draws: Random) -> Any:
    if axis.choice is not None:
        return draws.choice(axis.choice)
    if axis.integer is not None:
        first, last = axis.integer
        return draws.randrange(first, last + 1, axis.step or 1)
    assert axis.bounds is not None
    low, high = axis.bounds
    if axis.uniform is not None:
        return rounded(axis, draws.uniform(low, high))
    return rounded(axis, math.exp(draws.uniform(math.log(low), math.log(high))))


def rounded(axis: Axis, value: float) -> float:
    """A value of a range in few digits, not outside of it."""
    assert axis.bounds is not None
    return min(max(float(f"{value:.{_DIGITS}g}"), axis.bounds[0]), axis.bounds[1])
