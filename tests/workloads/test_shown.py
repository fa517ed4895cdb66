"""What Prometheus sees of a sweep, as it goes on."""

from __future__ import annotations

import contextlib

from dra_ray import meters, runs
from dra_ray.storage import Store
from dra_ray.sweeps.tournament import STATES, Tournament
from dra_ray.workloads.sweep import _Shown
from tests.sweeps.test_tournament import around, scores, sweep


def values(gauges: meters.Gauges, name: str, label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for labels, value in gauges.values(name).items()}


def test_a_sweep_shows_states_spending_budget_and_plan() -> None:
    folder = Store("memory://shown/sweep")
    settings = sweep(scheduler="none", budget={"images": 10**9})
    tournament = Tournament(settings, folder, around())
    images = runs.Estimate(expected=500, low=400, high=600)
    planned = runs.Planned(trials=4, images=images)
    with contextlib.closing(_Shown(folder, tournament, settings.budget, planned)) as shown:
        tournament.on_row = shown.decided
        one, two = tournament.start(), tournament.start()
        assert one
        assert two
        report = scores(tournament.fields[one], 1)
        tournament.report(one, report)
        tournament.stop(two, "by hand")
        states = values(shown.gauges, "dra_sweep_trials", "state")
        assert states == dict.fromkeys(STATES, 0) | {"running": 1, "stopped": 1}
        assert values(shown.gauges, "dra_sweep_budget", "what") == {"images": 10**9}
        planned_at_most = {"trials": 4, "images": 600}
        assert values(shown.gauges, "dra_sweep_planned", "what") == planned_at_most
        spent = values(shown.gauges, "dra_sweep_spent", "what")
        assert spent == {"trials": 2, "images": report.images_seen, "gpu_hours": 0}
        (labels, *_) = shown.gauges.values("dra_sweep_spent")
        assert dict(labels)["run"] == runs.metric_labels(folder)["run"]


def test_what_has_ended_is_not_set_again() -> None:
    gauges = meters.Gauges({"run": "a"})
    gauges.set("dra_train_step", 1, trial="")
    gauges.close()
    gauges.set("dra_train_step", 2, trial="")
    assert list(gauges.values("dra_train_step").values()) == [1]
