"""What Ray Tune is given: it pickles it beside its own state."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time

import ray

from dra_ray import config, runs
from dra_ray.plan import speed, timing
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.sweeps.tournament import Circumstances, Tournament
from dra_ray.workloads import sweep

SWEEP = config.load("digits-sweep", config.Sweep)


def test_ray_tune_can_pickle_what_drives_it(tmp_path) -> None:
    folder = Store(str(tmp_path))
    around = Circumstances(images_per_epoch=lambda experiment: 1280, at=time.time)
    tournament, bar = Tournament(SWEEP, folder, around), threading.RLock()

    def on_row(row: RungRow) -> None:
        bar.acquire()

    tournament.on_row = on_row
    pools = sweep._Pools(contextlib.ExitStack(), folder)
    for driver in (
        sweep._Decisions(tournament, sweep._Orders(tournament, folder)),
        sweep._Trials(tournament, folder, pools, "trial-000"),
    ):
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(driver)) is not None


def test_a_plan_is_made_once_until_trials_or_budget_are_raised() -> None:
    given = timing.by_arithmetic(speed.Speed(0.01, "given"))
    by = sweep._Expecting(None, 3, lambda: given)
    first = sweep._planned(SWEEP, None, None, by)
    images = first.images
    assert 0 < images.low <= images.expected <= images.high
    assert first.seconds
    assert not first.measured
    assert first.seconds.low <= first.seconds.expected <= first.seconds.high
    assert first.money is None  # no prices
    assert sweep._planned(SWEEP, first, None, by) is first
    few = config.override(SWEEP, {"trials": 4})
    kept = sweep._planned(few, None, None, by)
    assert kept.trials == 4
    raised = sweep._planned(few, kept, 8, by)
    assert raised.trials == 8
    assert raised.images.expected > kept.images.expected
    bounded = config.override(SWEEP, {"budget.images": 2000})
    assert sweep._planned(bounded, first, None, by).images.high == 2000


def test_the_time_of_drivers_adds_up_with_that_of_one_that_was_killed() -> None:
    def reported(at: float) -> RungRow:
        return RungRow(
            trial="trial-000",
            epoch=1,
            images_seen=10,
            clean_accuracy=0.5,
            robust_accuracy=0.5,
            decision="continue",
            at=at,
        )

    began = 1_764_000_000.0
    started_at = datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat()
    rows = [reported(began - 500), reported(began + 70), reported(began + 60)]
    killed = runs.Manifest(status="running", started_at=started_at, elapsed_s=30.0)
    assert sweep._elapsed_s(killed, rows) == 100.0
    assert sweep._elapsed_s(killed, rows[:1]) == 30.0
    paused = killed.model_copy(update={"status": "paused"})
    assert sweep._elapsed_s(paused, rows) == 30.0
    assert sweep._elapsed_s(runs.Manifest(status="running"), []) == 0.0
