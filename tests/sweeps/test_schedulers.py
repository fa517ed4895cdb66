"""Schedulers against Ray Tune's ASHA on the same reports, against a plain slow replay of hundreds
of trials, and by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time

import numpy as np
import pytest
from scipy import stats

from dra_ray.config import Asha, Experiment, Optim, Selection, Sweep
from dra_ray.errors import ConfigError
from dra_ray.evaluation import intervals
from dra_ray.runs import RungRow, pack_verdicts
from dra_ray.sweeps import pareto, rungs, schedulers, simulate
from dra_ray.sweeps.schedulers import Report, Rules
from tests.support.rungs import IMAGES_PER_EPOCH, RayAsha

WORLD = simulate.World(trials=500, concurrent=50, epochs=12, validation_images=200)
LOAD = Rules(
    scheduler="noise_aware",
    grace_images=2 * WORLD.images_per_epoch,
    reduction=2.0,
    slot_images=WORLD.images_per_epoch,
)


def scored(trial: str, epoch: int, score: float, end: int, **facts: object) -> Report:
    report = Report(
        trial=trial,
        epoch=epoch,
        images_seen=epoch * IMAGES_PER_EPOCH,
        clean_accuracy=score,
        robust_accuracy=score,
        verdicts=None,
        end_images=end * IMAGES_PER_EPOCH,
        final=epoch == end,
    )
    return dataclasses.replace(report, **facts)  # type: ignore[arg-type]


def exact(trial: str, epoch: int, robust: int, end: int = 27, images: int = 200) -> Report:
    """The first `robust` images withstand."""
    verdicts = np.arange(images) < robust
    return scored(trial, epoch, robust / images, end, verdicts=verdicts)


def rules(name: str, grace: int = 1, factor: float = 3.0, level: float = 0.05) -> Rules:
    return Rules(name, grace * IMAGES_PER_EPOCH, factor, level, IMAGES_PER_EPOCH)


def test_plain_asha_decides_as_ray_tune_does() -> None:
    draws = random.Random(0)
    for _ in range(60):
        epochs = draws.randint(2, 30)
        grace, every = draws.randint(1, epochs), draws.choice((1, 1, 2, 3))
        factor = draws.choice((1.2, 1.5, 2, 3, 4))
        reports = {f"t{n}": iter(range(every, epochs, every)) for n in range(20)}
        theirs = RayAsha(epochs, grace, factor, list(reports))
        ours = rules("asha", grace, factor).build()
        while reports:
            name = draws.choice(list(reports))
            epoch = next(reports[name], None)
            if epoch is None:
                del reports[name]
                continue
            score = draws.choice((round(draws.random(), 1), draws.random()))
            stop = ours.decide(scored(name, epoch, score, epochs)) == "stop"
            assert stop == theirs.stops(name, epoch, score)
            if stop:
                del reports[name]


def test_a_rung_is_where_rungs_says() -> None:
    for grace, factor, every in itertools.product((1, 2, 5), (1.5, 2, 3), (1, 3)):
        ladder = schedulers.Ladder(rules("asha", grace, factor))
        reports = [scored("a", epoch, 0.5, 30) for epoch in range(every, 31, every)]
        at = [report.epoch for report in reports if ladder.reach(report) is not None]
        assert at == rungs.rung_epochs(30, grace, factor, every, IMAGES_PER_EPOCH)


def replay(reports: list[Report], rule: Rules) -> list[str]:
    """Noise-aware ASHA from its description, every list scanned anew at every report."""
    answers: list[str] = []
    apart: set[int] = set()  # validations after which trials were seen to differ
    before: list[Report] = []
    for report in reports:
        answers.append(plain_noise_aware(report, before, apart, rule))
        if not report.final:
            before.append(report)
    return answers


def plain_noise_aware(report: Report, before: list[Report], apart: set[int], rule: Rules) -> str:
    k = -1
    while rule.grace_images * rule.reduction ** (k + 1) <= report.images_seen:
        k += 1
    if report.final or k < 0:
        return "continue"
    low = rule.grace_images * rule.reduction**k
    others = {b.trial for b in before if low <= b.images_seen < low * rule.reduction}
    others.discard(report.trial)
    if not others:
        return "continue"
    peers = [b for b in before if b.images_seen == report.images_seen]
    place = (len(others) - 1) // int(rule.reduction)
    if place >= len(peers):
        return "continue"
    ranked = sorted(enumerate(peers), key=lambda p: (-p[1].robust_accuracy, -p[0]))
    rival = ranked[place][1]
    assert report.verdicts is not None
    assert rival.verdicts is not None
    only = int((report.verdicts & ~rival.verdicts).sum())
    theirs = int((rival.verdicts & ~report.verdicts).sum())
    chance = stats.binom.cdf(only, only + theirs, 0.5) if only + theirs else 1.0
    if report.robust_accuracy >= rival.robust_accuracy:
        return "continue"
    if report.images_seen not in apart:
        table = np.array([peer.verdicts for peer in [*peers, report]])
        if cochran_by_hand(table) > rule.level:
            return "continue"
        apart.add(report.images_seen)
    return "stop" if chance <= rule.level else "continue"


def cochran_by_hand(table: np.ndarray) -> float:
    k, rows, columns = len(table), table.sum(1), table.sum(0)
    below = (columns * (k - columns)).sum()
    if not below:
        return 1.0
    return float(stats.chi2.sf((k - 1) * (k * (rows**2).sum() - rows.sum() ** 2) / below, k - 1))


@pytest.mark.seconds
def test_500_trials_50_at_once_replay_alike() -> None:
    curves = simulate.Curves(WORLD, seed=3)
    played = simulate.play(curves, LOAD.build(), keep_decisions=True)
    assert played.started == WORLD.trials
    reports = [curves.report(int(name[6:]), epoch) for name, epoch, _ in played.decisions]
    decisions = [decision for _, _, decision in played.decisions]
    assert 100 < decisions.count("stop") < 500
    assert replay(reports, LOAD) == decisions
    again = LOAD.build()
    half = len(reports) // 2
    assert [again.decide(report) for report in reports] == decisions
    restarted = LOAD.build()
    for report in reports[:half]:
        restarted.decide(report)
    assert [restarted.decide(report) for report in reports[half:]] == decisions[half:]


@pytest.mark.seconds
@pytest.mark.parametrize("name", list(schedulers.BUILDERS))
def test_10_000_reports_are_quick(name: str) -> None:
    scheduler = dataclasses.replace(LOAD, scheduler=name).build()
    draws = np.random.default_rng(0)
    reports = [
        exact(f"t{trial}", epoch, int(draws.integers(200)), 21)
        for epoch in range(1, 21)
        for trial in range(500)
    ]
    began = time.process_time()
    for report in reports:
        scheduler.decide(report)
    assert time.process_time() - began < 30


def test_equal_trials_are_rarely_stopped_and_worse_ones_are() -> None:
    scheduler, plain = rules("noise_aware").build(), rules("asha").build()
    draws = np.random.default_rng(1)
    stopped = {"noise": 0, "plain": 0}
    for trial in range(300):
        verdicts = draws.random(500) < 0.11
        report = scored(f"t{trial}", 1, float(verdicts.mean()), 27, verdicts=verdicts)
        stopped["noise"] += scheduler.decide(report) == "stop"
        stopped["plain"] += plain.decide(report) == "stop"
    assert stopped["plain"] > 150
    assert stopped["noise"] < 15
    assert scheduler.decide(exact("last", 1, 5, images=500)) == "stop"


def test_the_benefit_of_the_doubt_ends_with_later_evidence() -> None:
    scheduler = rules("noise_aware").build()
    assert scheduler.decide(exact("first", 1, 40)) == "continue", "nobody to compare with"
    assert scheduler.decide(exact("second", 1, 60)) == "continue"
    assert scheduler.decide(exact("second", 2, 90)) == "continue"
    assert scheduler.decide(exact("first", 2, 50)) == "stop"


def test_a_last_report_stops_nothing_and_is_nobody_s_rival() -> None:
    for name in schedulers.BUILDERS:
        scheduler = rules(name).build()
        assert scheduler.decide(exact("short", 3, 150, end=3)) == "continue"
        assert scheduler.decide(exact("long", 3, 100, end=27)) != "stop"
        assert scheduler.decide(exact("low", 3, 10, end=3)) == "continue"


def test_without_verdicts_the_counts_are_compared() -> None:
    for images, decision in ((100, "continue"), (10_000, "stop"), (None, "stop")):
        scheduler = rules("noise_aware").build()
        scheduler.decide(scored("a", 1, 0.33, 27, images=images))
        assert scheduler.decide(scored("b", 1, 0.30, 27, images=images)) == decision


def test_nan_is_never_a_cut() -> None:
    for name in schedulers.BUILDERS:
        scheduler = rules(name).build()
        assert scheduler.decide(scored("nan", 1, math.nan, 27)) == "continue"
        assert scheduler.decide(scored("low", 1, 0.1, 27)) != "stop"


def reported(scheduler: schedulers.Scheduler, correct: dict[str, tuple[int, ...]]) -> set[str]:
    """Every trial's images that are right after each epoch, to the rung at epoch 3; who waits."""
    waits = set()
    for trial, counts in correct.items():
        for epoch, count in enumerate(counts, start=1):
            if scheduler.decide(exact(trial, epoch, count)) == "wait":
                waits.add(trial)
    return waits


def test_at_a_rung_of_halving_the_best_third_by_two_validations_goes_on() -> None:
    scheduler = rules("halving").build()
    correct = {f"t{k}": (0, 60 + 20 * k, 60 + 20 * k) for k in range(6)}
    correct["lucky"] = (0, 60, 165)  # ahead of all at the rung alone
    waits = reported(scheduler, correct)
    assert waits == set(correct)
    assert scheduler.promoted(waits) == {"t5", "t4", "t3"}
    assert scheduler.promoted({"t1", "t5"}) == {"t5"}  # a driver that asks again hears the same


def test_halving_decides_nothing_until_a_rung_tells_trials_apart() -> None:
    scheduler = rules("halving").build()
    near_chance = {f"t{k}": (20, 20, 19 + k) for k in range(4)}
    waits = reported(scheduler, near_chance)
    assert scheduler.promoted(waits) == waits


def test_halving_costs_what_its_plan_says_and_loses_less_than_asha_at_equal_images() -> None:
    world = simulate.World(trials=60, concurrent=4, budget=14)
    both = {name: rule for name, rule in simulate.rules_of(world, 4).items() if "h" in name}
    rows = {row.scheduler: row for row in simulate.compare(world, both, repeats=60)}
    assert rows["halving"].images <= rows["asha"].images <= 14 / 60
    assert rows["halving"].regret < rows["asha"].regret
    count = simulate.affordable(world, both["halving"])
    images = simulate.halving_images(count, 27_000, both["halving"])
    played = simulate.play(simulate.Curves(world, 0), both["halving"].build(), trials=count)
    assert played.images * 60 * 27_000 == pytest.approx(images)


def test_median_by_hand() -> None:
    scheduler = rules("median").build()
    for trial, score in (("a", 0.3), ("b", 0.5), ("c", 0.4)):
        assert scheduler.decide(scored(trial, 1, score, 9)) == "continue"
    assert scheduler.decide(scored("d", 1, 0.39, 9)) == "stop"
    assert scheduler.decide(scored("e", 1, 0.40, 9)) == "continue", "median of 0.3 .35 .4 .5"


def test_fronts_against_their_definition() -> None:
    draws = np.random.default_rng(2)
    for _ in range(50):
        points = draws.integers(0, 8, (30, 2)) / 8
        left, expected = set(range(30)), np.zeros(30, dtype=int)
        for rank in itertools.count():
            front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
            expected[list(front)] = rank
            left -= front
            if not left:
                break
        assert (pareto.fronts(points) == expected).all()


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one >= other).all() and (one > other).any())


def test_pareto_keeps_both_ends_of_the_front() -> None:
    scheduler = rules("pareto", factor=2.0).build()

    def decide(trial: str, clean: float, robust: float) -> str:
        return scheduler.decide(scored(trial, 1, robust, 9, clean_accuracy=clean))

    assert decide("robust", 0.6, 0.50) == "continue"
    assert decide("worse", 0.5, 0.40) == "stop"
    assert decide("middling", 0.55, 0.45) == "stop"
    assert decide("clean", 0.9, 0.30) == "continue"


def test_a_net_goes_to_the_farthest() -> None:
    points = np.array([[0.0, 1.0], [0.1, 0.95], [0.5, 0.5], [1.0, 0.0]])
    assert schedulers.net(points)[:3] == [3, 0, 2]


def test_rows_become_reports() -> None:
    verdicts = np.arange(19) % 3 == 0
    row = RungRow(
        trial="a",
        epoch=2,
        images_seen=20,
        clean_accuracy=0.5,
        robust_accuracy=0.4,
        images=19,
        verdicts=pack_verdicts(verdicts),
        decision="continue",
    )
    report = schedulers.report(row, end_images=20)
    assert report is not None
    assert report.verdicts is not None
    assert (report.verdicts == verdicts).all()
    assert report.final
    assert report.counts == (7, 19)


def test_one_sided_tests_against_scipy() -> None:
    draws = np.random.default_rng(4)
    for _ in range(30):
        one, two = draws.random((2, 60)) < 0.4
        only, theirs = intervals.discordant(one, two)
        expected = stats.binomtest(only, only + theirs, alternative="less").pvalue
        assert intervals.behind(one, two) == pytest.approx(expected)
        table = [[one.sum(), 60 - one.sum()], [two.sum(), 60 - two.sum()]]
        fisher = stats.fisher_exact(table, alternative="less").pvalue
        unpaired = intervals.behind_unpaired((int(one.sum()), 60), (int(two.sum()), 60))
        assert unpaired == pytest.approx(fisher)
        chi2 = stats.chi2_contingency(table, correction=False).pvalue
        wins = np.array([one.sum(), two.sum()])
        assert intervals.homogeneous(wins, np.array([60, 60])) == pytest.approx(chi2)


def test_a_sweep_says_its_rules() -> None:
    base = Experiment(optim=Optim(epochs=20), selection=Selection(every_epochs=5))
    asha = Asha(grace_epochs=2, reduction_factor=1.5, level=0.1)
    sweep = Sweep(base=base, space={"align.weight": [0, 1]}, asha=asha, scheduler="noise_aware")
    expected = Rules("noise_aware", 200, 1.5, 0.1, slot_images=500)
    assert schedulers.rules(sweep, images_per_epoch=100) == expected
    assert isinstance(schedulers.of(sweep, 100), schedulers.NoiseAware)


def test_bad_rules_are_named() -> None:
    with pytest.raises(ConfigError, match="level=0 must be between 0 and 1"):
        Rules(level=0)
