"""The course of a sweep: killed at any time, it goes on as if nothing had happened; every report is
written before it is acted on, and what is spent ends it.
"""

from __future__ import annotations

import dataclasses
import random
import tracemalloc
from collections import Counter
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dra_ray import config, runs
from dra_ray.errors import ConfigError, LastingError
from dra_ray.runs import RungRow, TrialRow
from dra_ray.storage import Store
from dra_ray.sweeps import orders, schedulers
from dra_ray.sweeps.orders import Order
from dra_ray.sweeps.tournament import STATES, Circumstances, Scores, Tournament

EPOCHS, PER_EPOCH, IMAGES = 12, 1000, 200


def sweep(**changes: Any) -> config.Sweep:
    base = config.override(
        config.Experiment(),
        {"optim.epochs": EPOCHS, "teacher.uri": "package:fashion-edm", "data.name": "digits"},
    )
    fields: dict[str, Any] = {
        "base": base,
        "space": {"align.weight": [0.0, 0.5, 1.0, 2.0, 4.0, 8.0], "align.sigma": [0.1, 0.3]},
        "asha": {"grace_epochs": 2, "reduction_factor": 3},
    }
    return config.Sweep.model_validate(fields | changes)


RANGES: dict[str, Any] = {
    "align.weight": {"uniform": [0.0, 8.0]},
    "optim.lr": {"log_uniform": [0.01, 1.0]},
}
ADAPTIVE: dict[str, Any] = {
    "space": RANGES,
    "search": {"method": "tpe", "startup_trials": 3},
    "trials": 12,
}


class Killed(Exception):
    """The end of the driver's process."""


class Clock:
    """Time that passes by a second at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def around(**changes: Any) -> Circumstances:
    usual = Circumstances(images_per_epoch=lambda experiment: PER_EPOCH, at=Clock())
    return dataclasses.replace(usual, **changes)


def scores(fields: dict[str, Any], epoch: int) -> Scores:
    """What a trial reports: a curve of its own, judged on images of which each has its own
    difficulty.
    """
    weight = float(fields.get("align.weight", 0.0))
    rate = float(fields.get("optim.lr", 0.1))
    quality = 0.5 - 0.02 * (weight - 3.0) ** 2 / 3 - 0.05 * abs(np.log10(rate) + 1)
    difficulty = np.random.default_rng(0).random(IMAGES)
    noise = np.random.default_rng([epoch, round(weight * 1e6), round(rate * 1e6)])
    share = max(0.1, quality * epoch / EPOCHS)
    withstood = difficulty + 0.1 * noise.standard_normal(IMAGES) < share
    return Scores(
        epoch=epoch,
        images_seen=epoch * PER_EPOCH,
        clean_accuracy=min(1.0, share + 0.3),
        robust_accuracy=float(withstood.mean()),
        images=IMAGES,
        verdicts=runs.pack_verdicts(withstood),
        elapsed_s=36.0 * epoch,
    )


def drive(tournament: Tournament, slots: int = 1) -> None:
    """What Ray Tune does, one report after the other."""
    running: dict[str, int] = {}
    while True:
        while len(running) < slots and (name := tournament.start()) is not None:
            last = tournament.last(name)
            running[name] = last.epoch if last is not None else 0
        if not running:
            return
        name = min(running, key=lambda n: (running[n], n))
        running[name] += 1
        decision = tournament.report(name, scores(tournament.fields[name], running[name]))
        if decision == "stop" or running[name] == EPOCHS:
            del running[name]


def whole(tournament: Tournament, slots: int = 1) -> dict[str, str]:
    """The race and its finals, as the workload runs them."""
    drive(tournament, slots)
    while behind := [n for n in tournament.finals().values() if not tournament.is_over(n)]:
        tournament.go_on_with(behind)
        drive(tournament, slots)
    return tournament.finals()


def course(folder: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trials and rungs as they were recorded, without the time."""
    trials, rungs = (
        runs.read_rows(folder / "trials.jsonl", TrialRow),
        runs.read_rows(folder / "rungs.jsonl", RungRow),
    )
    return (
        [row.model_dump(exclude={"at"}) for row in trials],
        [row.model_dump(exclude={"at"}) for row in rungs],
    )


@pytest.mark.seconds
@pytest.mark.parametrize("scheduler", ["noise_aware", "halving"])
@pytest.mark.parametrize("kind", ["grid", "tpe"])
def test_twenty_kills_change_nothing(kind: str, scheduler: str) -> None:
    settings = sweep(**(ADAPTIVE if kind == "tpe" else {}), scheduler=scheduler)
    quiet = Store(f"memory://quiet-{kind}-{scheduler}")
    finals = whole(Tournament(settings, quiet, around()))

    disturbed, kills, draws = Store(f"memory://disturbed-{kind}-{scheduler}"), 0, random.Random(7)
    while True:
        left = [draws.randrange(1, 8) if kills < 20 else 10**9]

        def burn(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed

        # before a write, or right after it, before anybody has heard of it
        before = draws.random() < 0.5
        tournament = Tournament(settings, disturbed, around(guard=burn) if before else around())
        if not before:
            tournament.on_row = burn
        try:
            again = whole(tournament)
        except Killed:
            kills += 1
            continue
        break
    assert kills == 20
    assert again == finals
    assert course(disturbed) == course(quiet)


def test_finalists_are_the_best_that_got_furthest() -> None:
    tournament = Tournament(sweep(), Store("memory://finalists"), around())
    while tournament.start() is not None:
        pass
    aligned = [n for n in tournament.fields if tournament.experiment(n).align.weight > 0]
    (baseline,) = set(tournament.fields) - set(aligned)

    def reported(name: str, epoch: int, robust: float) -> None:
        tournament.report(name, Scores(epoch, epoch * PER_EPOCH, 0.9, robust))

    reported(baseline, 6, 0.4)
    assert tournament.finals() == {"baseline": baseline}
    reported(aligned[0], 2, 0.9)  # the best score, at another rung: not comparable
    reported(aligned[1], 8, 0.5)
    reported(aligned[2], 8, 0.6)
    assert tournament.finals() == {"dra": aligned[2], "baseline": baseline}
    tournament.fail(aligned[2], "the loss is nan")
    assert tournament.finals() == {"dra": aligned[1], "baseline": baseline}


@pytest.mark.parametrize(
    "scheduler", ["halving", "noise_aware", "asha", "median", "pareto", "none"]
)
def test_decisions_follow_from_the_recorded_reports(scheduler: str) -> None:
    settings, folder = sweep(scheduler=scheduler), Store(f"memory://replay-{scheduler}")
    drive(Tournament(settings, folder, around()), slots=4)
    again = schedulers.of(settings, PER_EPOCH)
    waited: set[tuple[str, int]] = set()
    for row in runs.read_rows(folder / "rungs.jsonl", RungRow):
        if (row.trial, row.images_seen) in waited:  # what became of it
            promoted = again.promoted({row.trial})
            assert (row.trial in promoted) == (row.decision == "continue"), row
            continue
        report = schedulers.report(row, EPOCHS * PER_EPOCH)
        assert report is not None
        ended = {"stop": "stop", "waiting": "wait"}.get(row.decision, "continue")
        assert again.decide(report) == ended, row
        if ended == "wait":
            waited.add((row.trial, row.images_seen))


@pytest.mark.parametrize("scheduler", ["noise_aware", "halving"])
def test_every_trial_is_accounted_for_and_no_report_stands_twice(scheduler: str) -> None:
    folder = Store(f"memory://accounted-{scheduler}")
    whole(Tournament(sweep(scheduler=scheduler), folder, around()), slots=4)
    trials, rungs = course(folder)
    assert [row["trial"] for row in trials] == [f"trial-{k:03d}" for k in range(11)]
    reports = Counter((row["trial"], row["images_seen"]) for row in rungs)
    waited = {(r["trial"], r["images_seen"]) for r in rungs if r["decision"] == "waiting"}
    assert {trial for trial, count in reports.items() if count == 2} == waited  # and its end
    assert bool(waited) == (scheduler == "halving")


def test_trials_are_counted_by_state_while_they_go_on() -> None:
    folder = Store("memory://states")
    tournament = Tournament(sweep(scheduler="none"), folder, around())
    assert not any(tournament.by_state().values())
    one, two = tournament.start(), tournament.start()
    assert one
    assert two
    assert tournament.by_state() == dict.fromkeys(STATES, 0) | {"running": 2}
    tournament.stop(one, "by hand")
    assert tournament.by_state() == dict.fromkeys(STATES, 0) | {"running": 1, "stopped": 1}
    # a trial is on record before it starts, so the next driver finds it
    again = Tournament(sweep(scheduler="none"), folder, around())
    assert again.by_state() == dict.fromkeys(STATES, 0) | {"queued": 1, "stopped": 1}


def test_a_budget_pauses_and_a_larger_one_goes_on() -> None:
    quiet, folder = Store("memory://unbounded"), Store("memory://budget")
    finals = whole(Tournament(sweep(), quiet, around()))
    total = Tournament(sweep(), quiet, around()).spent().images

    limit = total // 2
    tournament = Tournament(sweep(budget={"images": limit}), folder, around())
    drive(tournament)
    assert limit <= tournament.spent().images < limit + PER_EPOCH
    assert f"budget.images={limit:,} is spent" in str(tournament.exhausted())
    assert tournament.rows[-1].decision == "paused"
    assert tournament.start() is None

    again = Tournament(sweep(budget={"images": 10 * total}), folder, around())
    assert whole(again) == finals
    assert again.spent().images == total
    assert [row["decision"] for row in course(folder)[1]].count("paused") == 1


@pytest.mark.parametrize(
    ("budget", "gpus", "spent_h"), [({"gpu_hours": 0.25}, 2.0, 0.25), ({"money": 1.0}, 1.0, 0.2)]
)
def test_gpu_hours_and_money_are_counted(
    budget: dict[str, float], gpus: float, spent_h: float
) -> None:
    extra = {"prices": "gpus.yaml"} if "money" in budget else {}
    settings = sweep(budget=budget, **extra)
    settings = config.override(settings, {"base.resources.gpus_per_worker": gpus})
    folder = Store(f"memory://spent-{next(iter(budget))}")
    tournament = Tournament(settings, folder, around(money=lambda hours: 5 * hours))
    drive(tournament)
    used = tournament.spent()
    assert spent_h <= used.gpu_hours + 1e-9
    assert used.gpu_hours < spent_h + 0.05
    assert used.money == pytest.approx(5 * used.gpu_hours)
    assert tournament.exhausted()


def test_a_trial_that_fails_is_tried_as_often_as_configured_and_ranks_last() -> None:
    tournament = Tournament(sweep(max_failures=1), Store("memory://fails"), around())
    name = tournament.start()
    assert name
    assert tournament.fail(name, "the loss is nan")
    tournament.start_again(name)
    assert tournament.start() == name
    assert not tournament.fail(name, "the loss is nan")
    assert tournament.state(name) == "failed"
    assert name not in whole(tournament).values()
    again = Tournament(sweep(max_failures=1), Store("memory://fails"), around())
    assert again.state(name) == "failed"
    assert again.start() is None


def test_a_sweep_of_which_every_trial_fails_says_why() -> None:
    tournament = Tournament(sweep(), Store("memory://all-fail"), around())
    while (name := tournament.start()) is not None:
        tournament.fail(name, f"{name} has no weights")
    with pytest.raises(LastingError, match="all 11 trials failed, the first since trial-000 has"):
        tournament.require_a_trial()


def test_a_trial_stopped_by_hand_stays_stopped() -> None:
    folder = Store("memory://by-hand")
    tournament = Tournament(sweep(), folder, around())
    name = tournament.start()
    assert name
    tournament.report(name, scores(tournament.fields[name], 1))
    tournament.stop(name, "stopped by hand")
    assert tournament.state(name) == "stopped"
    assert Tournament(sweep(), folder, around()).start() != name


def test_a_trial_stopped_by_hand_before_its_scores_stays_stopped_too() -> None:
    """It has not failed, so it is not tried again, and its worker's end is no failure either."""
    settings, folder = sweep(max_failures=2), Store("memory://by-hand-early")
    tournament = Tournament(settings, folder, around())
    name = tournament.start()
    assert name
    tournament.stop(name, "stopped by hand")
    for driver in (tournament, Tournament(settings, folder, around())):
        assert driver.state(name) == "stopped"
        assert driver.report(name, scores(driver.fields[name], 1)) == "stop"
        drive(driver)
    (row,) = [row for row in course(folder)[1] if row["trial"] == name]
    assert (row["decision"], row["reason"]) == ("stop", "stopped by hand")
    again = Tournament(settings, folder, around())
    again.rerun(name)
    assert again.start() == name


def test_a_finalist_stopped_by_hand_is_none() -> None:
    tournament = Tournament(sweep(scheduler="none"), Store("memory://no-finalist"), around())
    best = tournament.start()
    assert best
    tournament.report(best, scores(tournament.fields[best], 5))
    assert best in tournament.finals().values()
    tournament.stop(best, "stopped by hand")
    assert best not in whole(tournament).values()
    assert tournament.state(best) == "stopped"


def test_orders_are_obeyed_once_and_survive_a_restart() -> None:
    folder = Store("memory://orders")
    tournament = Tournament(sweep(), folder, around())
    finals = whole(tournament)
    stopped = next(name for name in tournament.fields if tournament.state(name) == "stopped")
    assert tournament.obey(Order("rerun", stopped)) == f"{stopped} starts again"
    new = {"align.weight": 3.0, "align.sigma": 0.3}
    added = tournament.obey(Order("add", point=new))
    assert added == "added as trial-011"
    assert tournament.obey(Order("add", point=new)) == added
    assert "no trial" in tournament.obey(Order("stop", "trial-999"))
    with pytest.raises(ConfigError, match=r"align\.weight"):
        tournament.obey(Order("add", point={"align.weight": -1.0}))

    again = Tournament(sweep(), folder, around())
    assert {again.start(), again.start()} == {stopped, "trial-011"}
    assert again.start() is None
    assert again.fields["trial-011"] == new
    again = Tournament(sweep(scheduler="none"), folder, around())
    last = again.last(stopped)
    assert last is not None
    drive(again)
    assert again.state(stopped) == "done"
    reports = Counter((r["trial"], r["images_seen"], r["decision"]) for r in course(folder)[1])
    assert max(reports.values()) == 1
    assert finals.keys() == again.finals().keys()


def test_orders_wait_in_the_sweeps_folder() -> None:
    folder = Store("memory://waiting-orders")
    with pytest.raises(ConfigError, match="is no sweep"):
        orders.give(folder, Order("stop", "trial-000"))
    settings = sweep()
    facts = runs.Facts(trials={"trial-000": {}, "trial-001": {}})
    tree = settings.model_dump(mode="json")
    runs.begin_run(folder, "sweep", tree, settings.digest(), facts)
    with pytest.raises(ConfigError, match="has no trial 'trial-7'; it has trial-000 to trial-001"):
        orders.give(folder, Order("rerun", "trial-7"))
    with pytest.raises(ConfigError, match=r"'optim\.lr' is no axis of .*align\.sigma, "):
        orders.give(folder, Order("add", point={"optim.lr": 1}))
    assert orders.pending(folder) == []
    given = [Order("stop", "trial-001"), Order("add", point={"align.weight": 3})]
    for order in given:
        orders.give(folder, order)
    (folder / orders.ORDERS / "junk.json").write_text("[1]")
    assert [order for _, order in orders.pending(folder)] == given


def begun(settings: config.Sweep, name: str) -> Store:
    folder = Store(f"memory://{name}")
    tree = settings.model_dump(mode="json")
    runs.begin_run(folder, "sweep", tree, settings.digest(), runs.Facts())
    return folder


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_search_that_is_raised_goes_on_as_one_that_had_more_trials(method: str) -> None:
    few = sweep(**ADAPTIVE | {"trials": 5, "search": {"method": method, "startup_trials": 3}})
    folder, more = begun(few, f"raised-{method}"), config.override(few, {"trials": 12})
    tournament = Tournament(few, folder, around())
    assert tournament.start() == "trial-000"
    assert tournament.obey(Order("add", trials=12)) == "its search has 12 trials"
    again = Tournament(few, folder, around())  # a driver that knows of it from the records alone
    finals = whole(again)
    assert again.obey(Order("add", trials=9)) == "its search has 12 trials"

    straight = Store(f"memory://straight-{method}")
    assert whole(Tournament(more, straight, around())) == finals
    assert course(folder) == course(straight)


def test_a_finished_grid_that_is_raised_tries_the_rest_of_it() -> None:
    settings = sweep(trials=4)
    folder = begun(settings, "rest-of-a-grid")
    whole(Tournament(settings, folder, around()))
    before = course(folder)
    for order, why in (
        (Order("add", trials=4), "has 4; name more"),
        (Order("add", trials=12), "can have 11; name fewer"),
    ):
        with pytest.raises(ConfigError, match=why):
            orders.give(folder, order)
    orders.give(folder, Order("add", trials=11))
    assert orders.raised(folder, runs.read_manifest(folder)) == 11
    tournament = Tournament(settings, folder, around())
    for file, order in orders.pending(folder):
        tournament.obey(order)
        file.remove()
    finals = whole(tournament)
    trials, rungs = course(folder)
    assert (trials[:4], rungs[: len(before[1])]) == before
    points = [tournament.space.point(row["fields"]) for row in trials]
    assert len({tournament.space.key(point) for point in points}) == len(points) == 11
    assert {row["trial"] for row in rungs} == {row["trial"] for row in trials}
    assert all(tournament.state(name) == "done" for name in finals.values())
    with pytest.raises(ConfigError, match="has all 11 points of its space; add a point"):
        orders.give(folder, Order("add", trials=20))


def test_a_point_that_is_added_takes_no_place_of_the_search() -> None:
    """Neither of another point of the grid, nor its own again."""
    settings = sweep()
    tournament = Tournament(settings, Store("memory://no-place"), around())
    assert tournament.start() == "trial-000"
    outside = tournament.add({"align.weight": 3.0, "align.sigma": 0.3})
    inside = tournament.add(tournament.space.trials()["trial-007"])
    assert (outside, inside) == ("trial-001", "trial-002")
    drive(tournament)
    keys = [tournament.space.key(trial.point) for trial in tournament.told()]
    grid = {tournament.space.key(point) for point in tournament.space.grid()}
    assert len(keys) == len(set(keys)) == 12
    assert grid < set(keys)


def test_repeats_share_all_but_the_training_seed() -> None:
    tournament = Tournament(sweep(), Store("memory://repeats"), around())
    finals = whole(tournament)
    name = tournament.repeat(finals["dra"], 2)
    one, two = tournament.experiment(finals["dra"]), tournament.experiment(name)
    assert (two.seed, two.shared_seed) == (one.seed + 2, one.shared_seed)
    assert two.align == one.align
    assert name not in tournament.finals().values()
    assert tournament.repeat(finals["dra"], 2) == name
    assert len(tournament.told()) == 11


@pytest.mark.slow
def test_five_hundred_trials_with_chaos() -> None:
    """All accounted for, and decisions as a replay of the reports takes them."""
    settings = sweep(space=RANGES, search={"method": "random"}, trials=500)
    folder, draws, kills = Store("memory://chaos"), random.Random(0), 0
    while True:
        left = [draws.randrange(50, 400)]

        def burn(row: RungRow, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed

        tournament = Tournament(settings, folder, around())
        tournament.on_row = burn
        try:
            whole(tournament, slots=50)
        except Killed:
            kills += 1
            continue
        break
    assert kills > 3
    trials, rungs = course(folder)
    assert len(trials) == 500
    assert {row["trial"] for row in rungs} == {row["trial"] for row in trials}
    reports = Counter((row["trial"], row["images_seen"]) for row in rungs)
    assert set(reports.values()) == {1}
    replay, decided = schedulers.of(settings, PER_EPOCH), set()
    for row in runs.read_rows(folder / "rungs.jsonl", RungRow):
        report = schedulers.report(row, EPOCHS * PER_EPOCH)
        assert report is not None
        if replay.decide(report) == "stop":
            decided.add(row.trial)
    stopped = {row["trial"] for row in rungs if row["decision"] == "stop"}
    finals = set(Tournament(settings, folder, around()).finals().values())
    assert stopped == decided - finals


class Counted(MemoryFileSystem):
    """A storage that counts what a real one would charge for."""

    protocol = "counted"
    requests: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counted://", "memory://", 1))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.requests["read" if "r" in mode else "write"] += 1
        return super()._open(path, mode, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.requests["list"] += 1
        return super().ls(path, detail, **options)

    def info(self, path: str, **options: Any) -> Any:
        self.requests["info"] += 1
        return super().info(path, **options)


@pytest.mark.slow
def test_requests_and_memory_of_a_driver_grow_no_faster_than_the_trials() -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    requests, held = {}, {}
    for trials in (125, 250, 500):
        Counted.requests.clear()
        settings = sweep(space=RANGES, search={"method": "random"}, trials=trials)
        tracemalloc.start()
        tournament = Tournament(settings, Store(f"counted://driver-{trials}"), around())
        whole(tournament, slots=50)
        ours = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(False, "*memory.py"), tracemalloc.Filter(False, "*/io.py")]
        )
        tracemalloc.stop()
        held[trials] = sum(trace.size for trace in ours.traces)
        requests[trials] = dict(Counted.requests)
        reports = len(course(Store(f"counted://driver-{trials}"))[1])
        print(
            f"{trials} trials, {reports} reports: {requests[trials]}, {held[trials] / 1e6:.1f} MB"
        )
    for few, many in ((125, 250), (250, 500)):
        assert held[many] < 2.2 * held[few]
        assert sum(requests[many].values()) < 2.2 * sum(requests[few].values())


def test_a_rung_says_which_weights_its_verdicts_are_of() -> None:
    folder = Store("memory://weights-judged")
    tournament = Tournament(sweep(), folder, around())
    name = tournament.start()
    assert name
    raw = dataclasses.replace(scores(tournament.fields[name], 1), weights="raw")
    tournament.report(name, Scores.of(dataclasses.asdict(raw) | {"loss": 1.0}))
    tournament.report(name, scores(tournament.fields[name], 2))
    first, second = (folder / "rungs.jsonl").read_jsonl()
    assert first["weights"] == "raw"
    assert "weights" not in second
    assert first["verdicts"] == raw.verdicts
