"""What stops a trial early: pure decisions on reports, in the order in which they came.

A scheduler has no clock, no random numbers and no Ray: fed the recorded reports again in their
order, it reaches the recorded decisions, so a restarted driver needs nothing else. The clock is
`images_seen`, which compares trials of any batch size and length; where the rungs lie is
`sweeps.rungs`'.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dra_ray import config, runs
from dra_ray.config.text import refusal, shown
from dra_ray.errors import ConfigError
from dra_ray.evaluation import intervals
from dra_ray.runs import RungRow
from dra_ray.sweeps import rungs
from dra_ray.sweeps.pareto import fronts

Decision = Literal["continue", "stop", "wait"]
Verdicts = NDArray[np.bool_]
MEDIAN_OF = 3  # the median rule waits for so many other trials, as Ray Tune's does


@dataclass(frozen=True, eq=False)
class Report:
    """One validation of a trial."""

    trial: str
    epoch: int
    images_seen: int
    clean_accuracy: float
    robust_accuracy: float
    verdicts: Verdicts | None  # [N], robust on each validation image
    end_images: int  # where this trial ends by itself
    final: bool  # its last: nothing is left to stop
    images: int | None = None  # validation images, where verdicts were not kept

    @property
    def counts(self) -> tuple[int, int] | None:
        """(robust images, images), where that is known."""
        if self.verdicts is not None:
            return int(np.count_nonzero(self.verdicts)), len(self.verdicts)
        if self.images and math.isfinite(self.robust_accuracy):
            return round(self.robust_accuracy * self.images), self.images
        return None


def report(row: RungRow, end_images: int) -> Report | None:
    """The report of a recorded row; None for a trial that failed, which reports nothing."""
    if row.decision == "failed" or row.robust_accuracy is None or row.clean_accuracy is None:
        return None
    verdicts = None
    if row.verdicts is not None and row.images:
        verdicts = runs.unpack_verdicts(row.verdicts, row.images)
    return Report(
        trial=row.trial,
        epoch=row.epoch,
        images_seen=row.images_seen,
        clean_accuracy=row.clean_accuracy,
        robust_accuracy=row.robust_accuracy,
        verdicts=verdicts,
        end_images=end_images,
        final=row.images_seen >= end_images,
        images=row.images,
    )


class Scheduler(Protocol):
    """Decides on reports, each once and in order."""

    def decide(self, report: Report) -> Decision: ...

    def promoted(self, waiting: Iterable[str]) -> set[str]:
        """Which trials that wait go on, asked once no other trial is on its way; the rest stop."""


class AtOnce:
    """A scheduler that lets nobody wait."""

    def promoted(self, waiting: Iterable[str]) -> set[str]:
        return set()


@dataclass(frozen=True)
class Rules:
    """What a sweep says of early stopping, in images."""

    scheduler: str = "noise_aware"  # of BUILDERS
    grace_images: int = 1  # no trial is stopped before
    reduction: float = 3.0
    level: float = 0.05  # of noise_aware and halving
    slot_images: int = 1  # between two validations of the base trial

    def __post_init__(self) -> None:
        require_known(self.scheduler)
        for name, valid, need in (
            ("grace_images", self.grace_images >= 1, "at least 1"),
            ("reduction", self.reduction > 1, "above 1"),
            ("level", 0 < self.level < 1, "between 0 and 1"),
            ("slot_images", self.slot_images >= 1, "at least 1"),
        ):
            if not valid:
                raise ConfigError(f"{name}={getattr(self, name)} must be {need}")

    def build(self) -> Scheduler:
        """A scheduler that has seen nothing yet."""
        return BUILDERS[self.scheduler](self)


def require_known(scheduler: str) -> None:
    """`ConfigError` for a name that no scheduler has."""
    if scheduler not in BUILDERS:
        *others, last = map(repr, BUILDERS)
        raise refusal(
            f"scheduler={shown(scheduler)}: input should be {', '.join(others)} or {last}"
        )


def of(sweep: config.Sweep, images_per_epoch: int) -> Scheduler:
    """The scheduler of a sweep, new; `images_per_epoch` of its base trial."""
    return rules(sweep, images_per_epoch).build()


def rules(sweep: config.Sweep, images_per_epoch: int) -> Rules:
    """What a sweep says of early stopping, in images."""
    asha = sweep.asha
    return Rules(
        scheduler=sweep.scheduler,
        grace_images=asha.grace_epochs * images_per_epoch,
        reduction=asha.reduction_factor,
        level=asha.level,
        slot_images=sweep.base.selection.every_epochs * images_per_epoch,
    )


class Never(AtOnce):
    """Every trial runs to its end."""

    def decide(self, report: Report) -> Decision:
        return "continue"


class Ladder:
    """Which rung a report reaches first: each trial is at each rung once.

    A trial's last report is at no rung: it has finished its schedule, so a longer trial that is
    midway through its own would be compared with an annealed one.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.heights: list[float] = []
        self.at: dict[str, int] = {}  # trial -> the highest rung that it reached

    def rung(self, images_seen: int) -> int:
        """The highest rung at or below `images_seen`; -1 below the first."""
        if not self.heights or self.heights[-1] <= images_seen:
            rules = self.rules
            self.heights = rungs.milestones(
                rules.grace_images, rules.reduction, 2 * rules.reduction * images_seen + 1
            )
        return bisect.bisect_right(self.heights, images_seen) - 1

    def reach(self, report: Report) -> int | None:
        """The rung that this report is the trial's first at, or None."""
        rung = self.rung(report.images_seen)
        if report.final or rung <= self.at.get(report.trial, -1):
            return None
        self.at[report.trial] = rung
        return rung


class Asha(AtOnce):
    """Asynchronous successive halving, the stopping variant (Li et al. 2020, arXiv 1810.05934,
    section 3.3), as Ray Tune implements it.

    At a rung a trial goes on if its robust accuracy is at least the (1 - 1/reduction) quantile of
    the trials that were there before it.
    """

    def __init__(self, rules: Rules) -> None:
        self.keep = 1 - 1 / rules.reduction
        self.ladder = Ladder(rules)
        self.scores: dict[int, list[float]] = {}

    def decide(self, report: Report) -> Decision:
        rung = self.ladder.reach(report)
        if rung is None or math.isnan(report.robust_accuracy):
            return "continue"
        before = self.scores.setdefault(rung, [])
        behind = bool(before) and report.robust_accuracy < quantile(before, self.keep)
        bisect.insort(before, report.robust_accuracy)
        return "stop" if behind else "continue"


def quantile(ascending: list[float], share: float) -> float:
    """numpy's linear quantile of a sorted list, to the bit, without sorting it again."""
    place = (len(ascending) - 1) * (share * 100 / 100)
    below = math.floor(place)
    low, high = ascending[below], ascending[min(below + 1, len(ascending) - 1)]
    part = place - below
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


@dataclass
class Peers:
    """The trials after the same validation: sorted, with what tells whether they differ at all."""

    order: list[tuple[float, int]] = field(default_factory=list)  # (robust accuracy, arrival)
    reports: list[Report] = field(default_factory=list)  # by arrival
    wins: list[int] = field(default_factory=list)  # robust images of each trial
    per_image: NDArray[np.int64] | None = None  # [N], trials that are robust on each image
    paired: bool = True
    told_apart: bool = False

    def add(self, report: Report) -> None:
        bisect.insort(self.order, (report.robust_accuracy, len(self.reports)))
        self.reports.append(report)
        if counts := report.counts:
            self.wins.append(counts[0])
        if report.verdicts is None:
            self.paired = False
        elif self.per_image is None:
            self.per_image = report.verdicts.astype(np.int64)
        elif self.per_image.shape == report.verdicts.shape:
            self.per_image += report.verdicts
        else:
            self.paired = False

    def best(self, place: int) -> Report | None:
        """The trial at a place, 0 the best; None where there are fewer."""
        return self.reports[self.order[-1 - place][1]] if place < len(self.order) else None

    def differ(self, level: float) -> bool:
        """Whether the trials differ at all, at `level`. Once they do, they do: more of them only
        sharpen it, and a decision should not hang on a test that wavers.
        """
        if not self.told_apart:
            self.told_apart = self.chance() <= level
        return self.told_apart

    def chance(self) -> float:
        """How often equally good trials would lie as far apart as these; 0 where noise is unknown
        and 1 where there are fewer than two.
        """
        if len(self.reports) < 2:
            return 1.0
        if len(self.wins) < len(self.reports):
            return 0.0
        wins = np.array(self.wins)
        if self.paired and self.per_image is not None:
            return intervals.cochran(wins, self.per_image)
        counts = [report.counts for report in self.reports]
        return intervals.homogeneous(wins, np.array([c[1] for c in counts if c]))


@dataclass
class Rung:
    """The trials that reached a rung of `Halving`."""

    peers: Peers = field(default_factory=Peers)
    scores: dict[str, float] = field(default_factory=dict)  # of each trial, by arrival

    def best(self, reduction: float) -> set[str]:
        """One in `reduction` of the trials, rounded up; of equal ones those that came first."""
        places = math.ceil(len(self.scores) / reduction)
        return set(sorted(self.scores, key=self.scores.__getitem__, reverse=True)[:places])


class Halving:
    """Successive halving (Karnin et al. 2013, ICML; Jamieson and Talwalkar 2016, arXiv 1502.07943,
    section 3): at a rung a trial waits with its checkpoint until the others are there, and the
    best 1/reduction of all go on.

    ASHA lets the first to arrive pass and can never take up again what it stopped; the wait costs
    neither images nor GPU-hours, only the time of a slot that has nothing else to do. A trial's
    score is its mean over the last two validations, which halves what chance does from one to the
    next. Until a rung has told its trials apart at `level` (Cochran's Q), as where all are still
    near chance, nothing is decided and all go on. Once one has, trials that do not differ at a
    higher rung are all good, and the fewer go on the better.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self.ladder = rules, Ladder(rules)
        self.rungs: dict[int, Rung] = {}
        self.before: dict[str, Report] = {}

    def decide(self, report: Report) -> Decision:
        before = self.before.get(report.trial)
        repeated = before is not None and report.images_seen <= before.images_seen
        if repeated or math.isnan(report.robust_accuracy):
            return "continue"
        self.before[report.trial] = report
        reached = self.ladder.reach(report)
        if reached is None:
            return "continue"
        rung = self.rungs.setdefault(reached, Rung())
        rung.peers.add(report)
        recent = [each.robust_accuracy for each in (before, report) if each is not None]
        rung.scores[report.trial] = sum(recent) / len(recent)
        return "wait"

    def promoted(self, waiting: Iterable[str]) -> set[str]:
        rungs_ = {trial: self.rungs[self.ladder.at[trial]] for trial in waiting}
        return {
            trial
            for trial, rung in rungs_.items()
            if trial in rung.best(self.rules.reduction) or not self._told_apart(trial)
        }

    def _told_apart(self, trial: str) -> bool:
        """Whether the rung where a trial waits, or a lower one, told its trials apart."""
        heights = range(self.ladder.at[trial] + 1)
        seen = [self.rungs[height] for height in heights if height in self.rungs]
        return any(rung.peers.differ(self.rules.level) for rung in seen)


class NoiseAware(AtOnce):
    """ASHA that stops a trial only where chance does not explain that it is behind.

    At a rung, ASHA would let the best 1/reduction of the trials go on. Here a trial is stopped if
    it is behind the last of those by more than chance explains at `level`: by McNemar's exact
    test on verdicts per image where both have them, else by Fisher's. Whoever has the benefit of
    the doubt is tested again after every later validation, against the same place among the trials
    that got there: evidence that comes later counts, and the first to reach a rung, whom ASHA
    always lets through, is stopped once others are seen to be better. Where all trials together do
    not differ (Cochran's Q), as where all are near chance, nothing is decided: the order statistic
    of many equal trials would look ahead of the worst of them.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self.ladder = rules, Ladder(rules)
        self.at_rung: dict[int, int] = {}  # trials that reached each rung
        self.peers: dict[int, Peers] = {}  # by validation
        self.seen: dict[str, int] = {}  # trial -> images of its last report

    def decide(self, report: Report) -> Decision:
        repeated = report.images_seen <= self.seen.get(report.trial, -1)
        if repeated or report.final or math.isnan(report.robust_accuracy):
            return "continue"
        self.seen[report.trial] = report.images_seen
        reached = self.ladder.reach(report)
        rung = self.ladder.rung(report.images_seen)
        if rung < 0:
            return "continue"
        others = self.at_rung.get(rung, 0) - (reached is None)
        if reached is not None:
            self.at_rung[rung] = others + 1
        peers = self.peers.setdefault(self._slot(report), Peers())
        rival = peers.best(math.floor((others - 1) / self.rules.reduction)) if others > 0 else None
        peers.add(report)
        stop = rival is not None and self._behind(report, rival, peers)
        return "stop" if stop else "continue"

    def _slot(self, report: Report) -> int:
        """Validations of trials with other batch sizes fall a little beside each other: to the
        nearest of the base trial's.
        """
        return round(report.images_seen / self.rules.slot_images)

    def _behind(self, report: Report, rival: Report, peers: Peers) -> bool:
        if report.robust_accuracy >= rival.robust_accuracy:
            return False
        return peers.differ(self.rules.level) and chance_behind(report, rival) <= self.rules.level


def chance_behind(first: Report, second: Report) -> float:
    """How often chance alone would put `first` as far behind `second`; 0 where noise is unknown."""
    one, two = first.verdicts, second.verdicts
    if one is not None and two is not None and one.shape == two.shape:
        return intervals.behind(one, two)
    ours, theirs = first.counts, second.counts
    return intervals.behind_unpaired(ours, theirs) if ours and theirs else 0.0


class Median(AtOnce):
    """The median stopping rule (Golovin et al. 2017, KDD, section 3.2.2): a trial stops where its
    best robust accuracy so far is below the median of the other trials' running means, at the same
    validation.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.means: dict[int, list[float]] = {}  # by validation, ascending
        self.own: dict[str, tuple[int, float, float]] = {}  # trial -> (reports, sum, best)
        self.seen: dict[str, int] = {}

    def decide(self, report: Report) -> Decision:
        score = report.robust_accuracy
        repeated = report.images_seen <= self.seen.get(report.trial, -1)
        if repeated or report.final or math.isnan(score):
            return "continue"
        self.seen[report.trial] = report.images_seen
        count, total, best = self.own.get(report.trial, (0, 0.0, -math.inf))
        best = max(best, score)
        if report.images_seen < self.rules.grace_images:
            self.own[report.trial] = (0, 0.0, best)
            return "continue"
        self.own[report.trial] = (count + 1, total + score, best)
        others = self.means.setdefault(round(report.images_seen / self.rules.slot_images), [])
        behind = len(others) >= MEDIAN_OF and best < quantile(others, 0.5)
        bisect.insort(others, (total + score) / (count + 1))
        return "stop" if behind else "continue"


class Pareto(AtOnce):
    """ASHA on clean and robust accuracy together: MO-ASHA (Schmucker et al. 2021, arXiv
    2106.12639, section 4), the stopping variant.

    At a rung, trials are sorted by non-dominated fronts and, within a front, by an epsilon-net:
    from the most robust trial on, always the one farthest from those before. A trial goes on where
    no more are before it than ASHA would let through.
    """

    def __init__(self, rules: Rules) -> None:
        self.reduction, self.ladder = rules.reduction, Ladder(rules)
        self.points: dict[int, list[tuple[float, float]]] = {}

    def decide(self, report: Report) -> Decision:
        rung = self.ladder.reach(report)
        point = (report.robust_accuracy, report.clean_accuracy)
        if rung is None or any(math.isnan(value) for value in point):
            return "continue"
        points = self.points.setdefault(rung, [])
        points.append(point)
        allowed = math.floor((len(points) - 2) / self.reduction) if len(points) > 1 else 0
        return "stop" if standing(np.array(points)) > allowed else "continue"


def standing(points: NDArray[np.float64]) -> int:
    """How many of the points [n, 2] come before the last of them."""
    ranks = fronts(points)
    front = np.flatnonzero(ranks == ranks[-1])
    return int((ranks < ranks[-1]).sum()) + net(points[front]).index(len(front) - 1)


def net(points: NDArray[np.float64]) -> list[int]:
    """An order of the points [n, 2] of a front in which every beginning covers it: the largest
    first value, then always the farthest from those chosen, each value scaled to the front's range.
    """
    span = np.ptp(points, axis=0)
    scaled = points / np.where(span > 0, span, 1)
    chosen = [int(np.argmax(points[:, 0]))]
    distance = np.full(len(points), np.inf)
    for _ in range(len(points) - 1):
        distance = np.minimum(distance, ((scaled - scaled[chosen[-1]]) ** 2).sum(1))
        distance[chosen] = -1
        chosen.append(int(np.argmax(distance)))
    return chosen


BUILDERS: dict[str, Callable[[Rules], Scheduler]] = {
    "halving": Halving,
    "noise_aware": NoiseAware,
    "asha": Asha,
    "median": Median,
    "pareto": Pareto,
    "none": lambda rules: Never(),
}
