"""Which point a sweep tries next: a grid, seeded draws, or Optuna's samplers (Akiba et al. 2019,
arXiv 1907.10902).

`Search.suggest` is a pure function of the sweep, the number of the trial and what is known of the
trials before it. It feeds a fresh, seeded sampler each time, so a driver that was killed asks again
and is told the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dra_ray import config, runs
from dra_ray.config.axes import Axis
from dra_ray.config.text import refusal, shown
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.sweeps.spaces import Point, Space, rounded

if TYPE_CHECKING:  # importing it takes a second, which a trial and a grid need not spend
    import optuna

State = Literal["running", "stopped", "done", "failed"]

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "grid": (),
    "random": (),
    "tpe": ("optuna",),
    "gp": ("optuna", "scipy", "torch"),
}
# of a sampler, before a draw takes their place; a Gaussian process is fitted anew for each
PROPOSALS: Mapping[str, int] = {"tpe": 50, "gp": 4}


@dataclasses.dataclass(frozen=True)
class Told:
    """What is known of a trial: its last scores (None before the first) and what became of it."""

    number: int
    point: Point
    robust_accuracy: float | None
    clean_accuracy: float | None
    images_seen: int
    state: State
    by_hand: bool = False  # added by somebody, beside what the search suggests


def require(method: str, packages: Iterable[str]) -> None:
    """`ConfigError` where a package that the search method needs is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise refusal(
            f"search.method={method} needs {' and '.join(missing)}, not installed here; run `pip "
            f"install {' '.join(missing)}`, or set search.method=random"
        )


class Search:
    """The points of a sweep, one after the other.

    Args:
        former: trials of a former sweep to learn from; default: those in `search.warm_start`.
        raised: how many trials the sweep was raised to after it began.

    Raises `ConfigError` for a method whose packages are missing, for a former sweep over other axes
    and for points that a constraint forbids.
    """

    def __init__(
        self,
        sweep: config.Sweep,
        former: Sequence[Told] | None = None,
        raised: int | None = None,
    ) -> None:
        self.sweep, self.space = sweep, Space(sweep)
        require(sweep.search.method, PACKAGES[sweep.search.method])
        self.former = former_trials(sweep) if former is None else tuple(former)
        self.raise_to(raised)

    def raise_to(self, trials: int | None) -> None:
        """Let the search have so many trials, where that is more than its sweep says."""
        self._limit = None if self.sweep.trials is None else max(self.sweep.trials, trials or 0)
        adaptive = self.space.is_adaptive
        self._opening = (
            self.space.opening() if adaptive else list(self.space.trials(trials).values())
        )

    def suggest(self, number: int, told: Sequence[Told]) -> Point | None:
        """The point of trial `number`, from 0; None where there are as many trials as there may be,
        or no point is left.
        """
        budget, by_hand = self.sweep.budget.trials, [trial for trial in told if trial.by_hand]
        place = number - len(by_hand)  # among the search's own
        if budget is not None and number >= budget:
            return None
        if self._limit is not None and place >= self._limit:
            return None
        opening = self._besides(by_hand)
        if place < len(opening):
            return opening[place]
        if not self.space.is_adaptive:
            return None
        told = sorted(told, key=lambda trial: trial.number)
        tried = {self.space.key(trial.point) for trial in (*told, *_as_told(self._opening))}
        scored = [trial for trial in (*self.former, *told) if _is_scored(trial)]
        if len(scored) >= max(self.sweep.search.startup_trials, 1):
            proposal = self._learnt(number, [*self.former, *told], tried)
            if proposal is not None:
                return proposal
        drawn = self.space.draws(self.sweep.seed)
        return next((point for point in drawn if self.space.key(point) not in tried), None)

    def _besides(self, by_hand: Sequence[Told]) -> list[Point]:
        """What the search begins with, less what somebody has added before its turn came."""
        if not by_hand:
            return self._opening
        added = {self.space.key(trial.point) for trial in by_hand}
        return [point for point in self._opening if self.space.key(point) not in added]

    # -- Optuna ----------------------------------------------------------------------------------
    def _learnt(self, number: int, told: Sequence[Told], tried: set[str]) -> Point | None:
        """What the sampler proposes; None where nothing of that can be a trial."""
        import optuna

        study = self._study(number, told)
        method = self.sweep.search.method
        for _ in range(PROPOSALS[method]):
            trial = study.ask()
            point = self._asked(trial)
            distance = self.space.violation(point)
            if distance == 0 and self.space.key(point) not in tried and self._is_valid(point):
                return point
            # TPE learns where constraints are broken, without a score, for nothing was trained;
            # what else is refused stays a running trial, from which both samplers keep away
            if method == "tpe" and distance:
                trial.set_constraint("space", distance)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return None

    def _study(self, number: int, told: Sequence[Told]) -> optuna.Study:
        """A study in memory with every trial so far, and a sampler seeded by the sweep and the
        number of the trial that is asked for.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # each call makes a study, in silence
        objectives = 2 if self.sweep.scheduler == "pareto" else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # groups of axes are called experimental
            study = optuna.create_study(
                directions=["maximize"] * objectives, sampler=self._sampler(number)
            )
            for trial in told:
                frozen = self._frozen(trial, objectives)
                if frozen is not None:
                    study.add_trial(frozen)
        return study

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        # as random.Random does, but within what numpy takes for a seed
        seed = (self.sweep.seed * 1_000_003 + number) % 2**32
        if self.sweep.search.method == "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=1, warn_independent_sampling=False
            )
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, multivariate=True, group=True, constant_liar=True
        )

    def _asked(self, trial: optuna.Trial) -> Point:
        """A proposal of the sampler, one axis after the other, those that matter."""
        point: Point = {}
        for field in self.space.order:
            if self.space.matters(field, point):
                point[field] = _proposed(trial, field, self.space.axes[field])
        return dict(sorted(point.items()))

    def _frozen(self, told: Told, objectives: int) -> optuna.trial.FrozenTrial | None:
        """A trial as the sampler learns from it; None for one that failed, has no score, or has a
        value that the axes do not have.
        """
        import optuna

        states = optuna.trial.TrialState
        axes = {field: self.space.axes[field] for field in told.point if field in self.space.axes}
        if told.state == "failed" or any(told.point[f] not in axis for f, axis in axes.items()):
            return None
        kept: dict[str, Any] = {"state": states.RUNNING}
        if told.state != "running":
            scores = [told.robust_accuracy, told.clean_accuracy][:objectives]
            if None in scores:
                return None
            # TPE ranks what was stopped by how far it got, below all that came to the end; a
            # Gaussian process and a Pareto front know no such thing and take the last score
            if told.state == "stopped" and objectives == 1 and self.sweep.search.method == "tpe":
                kept = {
                    "state": states.PRUNED,
                    "intermediate_values": {told.images_seen: scores[0]},
                }
            else:
                kept = {"state": states.COMPLETE, "values": scores}
        return optuna.trial.create_trial(
            params={field: _parameter(axis, told.point[field]) for field, axis in axes.items()},
            distributions={field: _distribution(axis) for field, axis in axes.items()},
            **kept,
        )

    def _is_valid(self, point: Point) -> bool:
        """Whether the proposal is a config: fields may exclude each other where no constraint says
        so.
        """
        try:
            self.space.experiment(point)
        except ConfigError:
            return False
        return True


def _as_told(points: Iterable[Point]) -> list[Told]:
    return [Told(n, point, None, None, 0, "running") for n, point in enumerate(points)]


def _is_scored(trial: Told) -> bool:
    return trial.state in ("stopped", "done") and trial.robust_accuracy is not None


def _proposed(trial: optuna.Trial, field: str, axis: Axis) -> Any:
    if axis.choice is not None:  # by position, since a value may be a list or a mapping
        return axis.choice[trial.suggest_categorical(field, range(len(axis.choice)))]
    if axis.integer is not None:
        first, last, step = _whole(axis)
        return trial.suggest_int(field, first, last, step=step)
    low, high = axis.bounds or (0.0, 1.0)
    value = trial.suggest_float(field, low, high, log=axis.log_uniform is not None)
    return rounded(axis, value)


def _whole(axis: Axis) -> tuple[int, int, int]:
    """Smallest value, largest value that steps reach, and step."""
    low, high = axis.integer or (0, 0)
    step = axis.step or 1
    return low, high - (high - low) % step, step


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    from optuna import distributions as kinds

    if axis.choice is not None:
        return kinds.CategoricalDistribution(range(len(axis.choice)))
    if axis.integer is not None:
        first, last, step = _whole(axis)
        return kinds.IntDistribution(first, last, step=step)
    low, high = axis.bounds or (0.0, 1.0)
    return kinds.FloatDistribution(low, high, log=axis.log_uniform is not None)


def _parameter(axis: Axis, value: Any) -> Any:
    """A value as its distribution has it."""
    return axis.position(value) if axis.choice is not None else value


# -- warm start ------------------------------------------------------------------------------------
def former_trials(sweep: config.Sweep) -> tuple[Told, ...]:
    """The trials of the sweep in the folder `search.warm_start`, numbered below 0; none where it is
    not set.

    Raises `ConfigError` where the folder has no sweep, or one over other axes.
    """
    uri = sweep.search.warm_start
    if uri is None:
        return ()
    store = Store(uri).resolved()
    manifest = runs.read_manifest(store)
    if manifest is None or manifest.kind != "sweep":
        raise refusal(
            f"search.warm_start={shown(uri)} is no sweep's folder; name one with a "
            f"{runs.MANIFEST} of a sweep"
        )
    former = manifest.config.get("space")
    _require_same_axes(uri, former if isinstance(former, dict) else {}, sweep)
    last = {row.trial: row for row in runs.read_rows(store / runs.RUNGS, runs.RungRow)}
    space = Space(sweep)
    names = [name for name in manifest.trials if name in last]
    return tuple(
        Told(
            number - len(names),
            space.point(manifest.trials[name]),
            last[name].robust_accuracy,
            last[name].clean_accuracy,
            last[name].images_seen,
            # one that was cut off with its sweep has a score like one that was stopped
            runs.end_of(last[name].decision) or "stopped",
        )
        for number, name in enumerate(names)
    )


def _require_same_axes(uri: str, former: Mapping[str, Any], sweep: config.Sweep) -> None:
    lacks = sorted(sweep.space.keys() - former.keys())
    more = sorted(former.keys() - sweep.space.keys())
    if lacks or more:
        differences = [f"lacks {', '.join(lacks)}"] * bool(lacks)
        differences += [f"has {', '.join(more)} besides"] * bool(more)
        raise refusal(
            f"search.warm_start={shown(uri)}: that sweep is over other axes: it "
            f"{' and '.join(differences)}; take it out or make space the same"
        )
