"""What Ray Tune is given: it pickles it beside its own state."""

from __future__ import annotations

import threading
import time

import ray

from dra_ray import config
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
    for driver in (
        sweep._Decisions(tournament, sweep._Orders(tournament, folder)),
        sweep._Trials(tournament, folder, "trial-000"),
    ):
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(driver)) is not None
