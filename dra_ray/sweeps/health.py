"""Whether early stopping was well advised: what each rung could tell, what stopping may have cost
and what it saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dra_ray.sweeps.schedulers import Ladder, Peers, Report, Rules

ENOUGH = 4  # trials at two rungs, below which a rank correlation says nothing
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rung:
    """What a rung could tell."""

    number: int  # from 1
    epoch: int  # at which most of its trials reported
    trials: int
    chance: float  # how often equally good trials would lie as far apart (Cochran's Q)
    correlation: float | None  # Spearman's, with the next rung or the end; of trials in both
    correlation_interval: Interval | None
    compared: int  # trials in both

    def informative(self, level: float) -> bool:
        return self.chance <= level


@dataclass(frozen=True)
class Health:
    """Early stopping of one sweep."""

    rungs: tuple[Rung, ...]
    images: int  # of the trials that have ended
    images_to_the_end: int  # had each of them run to its end
    regret: float | None  # expected robust accuracy lost with trials that were stopped
    regret_interval: Interval | None
    sentences: tuple[str, ...]

    @property
    def saved(self) -> float:
        """Share of the images that early stopping saved."""
        return 1 - self.images / self.images_to_the_end if self.images_to_the_end else 0.0


def examine(
    reports: Sequence[Report], rules: Rules, seed: int = 0, going: Collection[str] = ()
) -> Health:
    """The health of a sweep's reports, in the order in which they came. Trials that are still
    `going` have saved no images and lost nothing yet.
    """
    levels, ends = _levels(reports, rules), {r.trial: r for r in reports if r.final}
    later = [*levels[1:], ends] if levels else []
    rungs = tuple(
        _rung(number, here, after, seed)
        for number, (here, after) in enumerate(zip(levels, later, strict=True), 1)
    )
    last = {report.trial: report for report in reports if report.trial not in going}
    images = sum(report.images_seen for report in last.values())
    full = sum(report.end_images for report in last.values())
    regret = _regret(last, ends, reports, seed)
    lost, interval = regret or (None, None)
    health = Health(rungs, images, full, lost, interval, sentences=())
    return replace(health, sentences=_sentences(health, rules))


def _levels(reports: Sequence[Report], rules: Rules) -> list[dict[str, Report]]:
    """Per rung, ascending, the first report of each trial there."""
    ladder, levels = Ladder(rules), dict[int, dict[str, Report]]()
    for report in reports:
        if (rung := ladder.reach(report)) is not None:
            levels.setdefault(rung, {})[report.trial] = report
    return [levels[rung] for rung in sorted(levels)]


def _rung(number: int, here: dict[str, Report], after: dict[str, Report], seed: int) -> Rung:
    peers = Peers()
    for report in here.values():
        peers.add(report)
    epochs = [report.epoch for report in here.values()]
    both = [trial for trial in here if trial in after]
    pairs = np.array([(here[t].robust_accuracy, after[t].robust_accuracy) for t in both])
    rho = rank_correlation(pairs, seed) if len(both) >= ENOUGH else None
    correlation, interval = rho or (None, None)
    return Rung(
        number,
        max(set(epochs), key=epochs.count),
        len(here),
        peers.chance(),
        correlation,
        interval,
        compared=len(both),
    )


def rank_correlation(
    pairs: NDArray[np.float64], seed: int = 0, confidence: float = 0.95, draws: int = 1000
) -> tuple[float, Interval] | None:
    """Spearman's rank correlation of pairs [n, 2] with a percentile bootstrap interval over pairs;
    None where one side is constant.
    """
    from scipy import stats

    picks = np.random.default_rng(seed).integers(len(pairs), size=(draws, len(pairs)))
    ranks = stats.rankdata(pairs[np.vstack([np.arange(len(pairs)), picks])], axis=1)
    centred = ranks - ranks.mean(1, keepdims=True)
    norms = (centred**2).sum(1).prod(1) ** 0.5
    if norms[0] == 0:
        return None
    with np.errstate(invalid="ignore"):
        rhos = centred.prod(2).sum(1) / norms
    low, high = np.nanquantile(rhos[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(rhos[0]), (float(low), float(high))


def _regret(
    last: Mapping[str, Report],
    ends: Mapping[str, Report],
    reports: Sequence[Report],
    seed: int,
    draws: int = 1000,
) -> tuple[float, Interval] | None:
    """Expected gain of the best stopped trial over the winner, had all run on; 95 % of draws.

    A stopped trial's end is drawn from the trials that finished: its score plus what one of them,
    at random, gained from the same epoch to its end. That is the gain of survivors: an upper
    estimate. None where fewer than three finished or none was stopped.
    """
    scores = {(r.trial, r.epoch): r.robust_accuracy for r in reports}
    stopped = [report for trial, report in last.items() if trial not in ends]
    if len(ends) < 3 or not stopped:
        return None
    random = np.random.default_rng(seed)
    best = np.zeros(draws)
    winner = max(report.robust_accuracy for report in ends.values())
    for report in stopped:
        gains = [
            end.robust_accuracy - scores[trial, report.epoch]
            for trial, end in ends.items()
            if (trial, report.epoch) in scores
        ]
        if gains:
            final = report.robust_accuracy + random.choice(gains, draws)
            best = np.maximum(best, final - winner)
    low, high = np.quantile(best, [0.025, 0.975])
    return float(best.mean()), (float(low), float(high))


def _sentences(health: Health, rules: Rules) -> tuple[str, ...]:
    said = [_advice(health.rungs, rules)] if health.rungs else []
    for rung in health.rungs:
        if rung.correlation is not None and rung.correlation_interval is not None:
            low, high = rung.correlation_interval
            said.append(
                f"ranks at rung {rung.number} (epoch {rung.epoch}) and at the next agree with a "
                f"correlation of {rung.correlation:.2f} ({low:.2f} to {high:.2f}, "
                f"{rung.compared} trials)"
            )
    if health.images_to_the_end:
        said.append(f"early stopping saved {100 * health.saved:.0f} % of the images")
    if health.regret is not None and health.regret_interval is not None:
        said.append(
            f"a stopped trial would have beaten the winner by {100 * health.regret:.1f} points "
            f"on average (at most; {100 * health.regret_interval[0]:.1f} to "
            f"{100 * health.regret_interval[1]:.1f})"
        )
    return tuple(sentence for sentence in said if sentence)


def _advice(rungs: Sequence[Rung], rules: Rules) -> str:
    silent = []
    for rung in rungs:
        if rung.informative(rules.level):
            break
        silent.append(rung)
    if not silent:
        return ""
    names = " and ".join(f"rung {rung.number} (epoch {rung.epoch})" for rung in silent)
    told = f"{names} told nothing apart from chance; "
    if len(silent) < len(rungs):
        return told + f"set asha.grace_epochs to {rungs[len(silent)].epoch}"
    return told + "no later rung did either: set data.validation_images higher, or train longer"
