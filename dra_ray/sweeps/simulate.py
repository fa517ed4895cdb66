"""What a scheduler costs and finds where the truth is known: learning curves by formula, verdicts
by chance.

A robust accuracy stays near chance for a while, then rises to a level of its own; curves cross. An
image is right where a normal variable falls below the quantile of the true accuracy, so every
score is binomial around it; the variable is shared in part by all trials (hard images are hard for
all), in part by the validations of one trial.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dra_ray.sweeps import rungs
from dra_ray.sweeps.schedulers import Decision, Report, Rules, Scheduler


@dataclass(frozen=True)
class World:
    """The trials that a sweep could draw, and how they are scored."""

    trials: int = 64
    epochs: int = 27
    images_per_epoch: int = 1000
    concurrent: int = 8
    validation_images: int = 512
    chance: float = 0.1
    best: tuple[float, float] = (0.40, 0.03)  # mean and standard deviation of final accuracy
    plateau_epochs: tuple[float, float] = (0.0, 5.0)  # near chance, uniform
    rise_epochs: tuple[float, float] = (3.0, 9.0)  # time constant after it, uniform
    wobble: float = 0.005  # standard deviation of the true accuracy from epoch to epoch
    shared: float = 0.6  # part of an image's variance that is the image's, for every trial
    lasting: float = 0.25  # part that a trial keeps from epoch to epoch
    budget: float | None = None  # images of all trials together, in trials of full length
    lengths: tuple[int, ...] = ()  # epochs of each trial; default: `epochs`, which is the most

    def length(self, trial: int) -> int:
        """Epochs of a trial."""
        return self.lengths[trial] if self.lengths else self.epochs

    @property
    def all_epochs(self) -> int:
        """Of all trials, trained to their ends."""
        return sum(self.lengths) if self.lengths else self.trials * self.epochs


class Curves:
    """One draw of a world: every scheduler that is compared sees the same verdicts."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        draws = np.random.default_rng([seed, 0])
        final = np.clip(draws.normal(*world.best, world.trials), world.chance, 0.99)
        plateau = draws.uniform(*world.plateau_epochs, world.trials)
        rise = draws.uniform(*world.rise_epochs, world.trials)
        after = np.maximum(0, np.arange(1, world.epochs + 1) - plateau[:, None]) / rise[:, None]
        end = np.maximum(1e-9, world.epochs - plateau) / rise
        share = (1 - np.exp(-after)) / (1 - np.exp(-end))[:, None]
        self.truth: NDArray[np.float64] = (
            world.chance + (final - world.chance)[:, None] * share
        )  # [trials, epochs]
        self.speed: NDArray[np.float64] = draws.uniform(0.9, 1.1, world.trials)
        self.hard = draws.standard_normal(world.validation_images, dtype=np.float32)
        self.verdicts = functools.cache(self._verdicts)

    def _verdicts(self, trial: int) -> NDArray[np.bool_]:
        """[epochs, images] of a trial."""
        from scipy import special

        world = self.world
        draws = np.random.default_rng([self.seed, 1, trial])
        own = draws.standard_normal(world.validation_images, dtype=np.float32)
        noise = draws.standard_normal((world.epochs, world.validation_images), dtype=np.float32)
        wobble = draws.normal(0, world.wobble, world.epochs)
        height = special.ndtri(np.clip(self.truth[trial] + wobble, 1e-6, 1 - 1e-6))
        rest = 1 - world.shared - world.lasting
        fixed = world.shared**0.5 * self.hard + world.lasting**0.5 * own
        correct: NDArray[np.bool_] = fixed + rest**0.5 * noise < height[:, None]
        return correct

    def report(self, trial: int, epoch: int) -> Report:
        """What the trial reports after an epoch, from 1 on."""
        world = self.world
        verdicts = self.verdicts(trial)[epoch - 1]
        return Report(
            trial=f"trial-{trial:03d}",
            epoch=epoch,
            images_seen=epoch * world.images_per_epoch,
            clean_accuracy=float(min(1.0, 1.5 * self.truth[trial, epoch - 1])),
            robust_accuracy=float(np.count_nonzero(verdicts) / len(verdicts)),
            verdicts=verdicts,
            end_images=world.length(trial) * world.images_per_epoch,
            final=epoch == world.length(trial),
        )


@dataclass(frozen=True)
class Outcome:
    """A sweep that ended, or whose budget did."""

    images: float  # of all trials, as a share of all of them trained to the end
    regret: float  # true final accuracy of the best trial there is, minus that of the winner
    started: int
    finished: int
    decisions: tuple[tuple[str, int, Decision], ...] = ()  # trial, epoch, in order
    reached: Mapping[int, tuple[int, float]] = field(default_factory=dict)  # epoch, last score


def play(
    curves: Curves,
    scheduler: Scheduler,
    keep_decisions: bool = False,
    trials: int | None = None,
) -> Outcome:
    """A sweep of `concurrent` trials at a time, each report decided on before its next epoch; of
    the first `trials` of the world, or of all.

    The winner is the best score of those that got furthest, as a sweep picks its finalists.
    """
    world = curves.world
    limit = world.all_epochs
    if world.budget is not None:
        limit = min(limit, round(world.budget * world.epochs))
    listed = iter(range(trials or world.trials))
    running: list[tuple[float, int, int]] = []  # (time, trial, epoch)
    reached: dict[int, tuple[int, float]] = {}
    decisions: list[tuple[str, int, Decision]] = []
    waiting: dict[str, tuple[int, int]] = {}  # (trial, epoch) by name
    spent = 0

    def start(now: float) -> None:
        if (trial := next(listed, None)) is not None:
            heapq.heappush(running, (now + curves.speed[trial], trial, 1))

    for _ in range(world.concurrent):
        start(0.0)
    while running and spent < limit:
        now, trial, epoch = heapq.heappop(running)
        spent += 1
        report = curves.report(trial, epoch)
        decision = scheduler.decide(report)
        reached[trial] = (epoch, report.robust_accuracy)
        if keep_decisions:
            decisions.append((report.trial, epoch, decision))
        if decision == "wait":
            waiting[report.trial] = (trial, epoch)
        if decision != "continue" or report.final:
            start(now)
        else:
            heapq.heappush(running, (now + curves.speed[trial], trial, epoch + 1))
        if not running:
            for name in sorted(scheduler.promoted(waiting)):
                trial, epoch = waiting[name]
                heapq.heappush(running, (now + curves.speed[trial], trial, epoch + 1))
            waiting.clear()
    winner = max(reached, key=lambda trial: (*reached[trial], -trial))
    final = curves.truth[:, -1]
    return Outcome(
        images=spent / world.all_epochs,
        regret=float(final.max() - final[winner]),
        started=len(reached),
        finished=sum(epoch == world.length(trial) for trial, (epoch, _) in reached.items()),
        decisions=tuple(decisions),
        reached=reached,
    )


def affordable(world: World, rules: Rules) -> int:
    """How many trials a sweep lists. What halving costs is known before it starts, so its list is
    as long as the budget; the others list every trial and stop with the budget.
    """
    if world.budget is None or rules.scheduler != "halving":
        return world.trials
    end_images = world.epochs * world.images_per_epoch
    limit, sizes = world.budget * end_images, range(1, world.trials + 1)
    return max((n for n in sizes if halving_images(n, end_images, rules) <= limit), default=1)


def halving_images(trials: int, end_images: int, rules: Rules) -> float:
    """Images of `trials` trials of one length under successive halving, where every rung tells its
    trials apart.
    """
    heights = [*rungs.milestones(rules.grace_images, rules.reduction, end_images), end_images]
    total, before = 0.0, 0.0
    for height in heights:
        total += trials * (height - before)
        trials, before = math.ceil(trials / rules.reduction), height
    return total


@dataclass(frozen=True)
class Row:
    """One scheduler at one noise level, over all repeats."""

    scheduler: str
    validation_images: int
    regret: float
    regret_interval: tuple[float, float]
    images: float
    images_interval: tuple[float, float]
    started: float
    beats_asha: float | None = None  # mean regret of plain ASHA minus ours, same draws
    beats_asha_interval: tuple[float, float] | None = None


def compare(
    world: World,
    rules: Mapping[str, Rules],
    repeats: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Every scheduler on the same `repeats` draws of a world. `rules` may have any names; `asha` is
    what the others are compared with, in pairs. Intervals are 95 % bootstrap intervals of the mean.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in rules}
    for repeat in range(repeats):
        curves = Curves(world, 1_000_003 * seed + repeat)
        for name, rule in rules.items():
            outcomes[name].append(play(curves, rule.build(), trials=affordable(world, rule)))
        tick()
    regrets = {
        name: np.array([outcome.regret for outcome in played]) for name, played in outcomes.items()
    }
    return [
        _row(name, world, played, regrets[name], regrets.get("asha"))
        for name, played in outcomes.items()
    ]


def _row(
    name: str,
    world: World,
    played: list[Outcome],
    regrets: NDArray[np.float64],
    asha: NDArray[np.float64] | None,
) -> Row:
    images = np.array([outcome.images for outcome in played])
    row = Row(
        name,
        world.validation_images,
        float(regrets.mean()),
        mean_interval(regrets),
        float(images.mean()),
        mean_interval(images),
        float(np.mean([outcome.started for outcome in played])),
    )
    if asha is None or name == "asha":
        return row
    gain = asha - regrets
    return replace(row, beats_asha=float(gain.mean()), beats_asha_interval=mean_interval(gain))


def mean_interval(
    values: NDArray[np.float64], confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of a mean."""
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def rules_of(world: World, grace_epochs: int = 3, level: float = 0.05) -> dict[str, Rules]:
    """The schedulers that the table compares."""
    common = Rules(
        grace_images=grace_epochs * world.images_per_epoch,
        level=level,
        slot_images=world.images_per_epoch,
    )
    return {
        "asha": replace(common, scheduler="asha"),
        "halving": replace(common, scheduler="halving"),
        "noise_aware": replace(common, scheduler="noise_aware"),
        "median": replace(common, scheduler="median"),
        "none": replace(common, scheduler="none"),
    }
