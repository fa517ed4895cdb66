"""ASHA with our records: a scheduler that was fed recorded scores decides as the one that saw them
happen.
"""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import ray

from dra_ray import config
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import spaces
from dra_ray.workloads import sweep

EPOCHS = 16
SWEEP = config.override(
    config.load("digits-sweep", config.Sweep),
    {"asha.grace_epochs": 2, "asha.reduction_factor": 3, "asha.max_concurrent": 3},
)


def result(epoch: int, score: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "images_seen": epoch * 1280,
        "robust_accuracy": score,
        "clean_accuracy": 0.9,
    }


def reports(seed: int, trials: int = 12) -> list[tuple[str, int, float]]:
    """Epochs of twelve trials in the order of some run with three at a time."""
    rng = random.Random(seed)
    quality = {f"trial-{k:03d}": rng.random() for k in range(trials)}
    waiting, running, order = sorted(quality), {}, []
    while waiting or running:
        while waiting and len(running) < 3:
            running[waiting.pop(0)] = 0
        name = rng.choice(sorted(running))
        running[name] += 1
        order.append((name, running[name], quality[name] * running[name] / EPOCHS))
        if running[name] == EPOCHS:
            del running[name]
    return order


def drive(
    scheduler: Any, order: list[tuple[str, int, float]], stopped: set[str]
) -> list[tuple[str, int, str]]:
    decisions, added = [], set()
    for name, epoch, score in order:
        trial = SimpleNamespace(trial_id=f"ray-{random.random()}", config={"trial": name})
        if name in stopped:
            continue
        if name not in added:
            scheduler.on_trial_add(None, trial)
            added.add(name)
        decision = scheduler.on_trial_result(None, trial, result(epoch, score))
        decisions.append((name, epoch, decision))
        if decision == "STOP":
            stopped.add(name)
    return decisions


def test_a_killed_sweep_goes_on_with_its_rungs(tmp_path) -> None:
    for seed in range(5):
        order = reports(seed)
        whole = drive(
            sweep.Rungs(SWEEP, Store(str(tmp_path)) / f"{seed}-whole.jsonl", None).scheduler(),
            order,
            set(),
        )
        assert sum(decision == "STOP" for *_, decision in whole) >= 3
        for cut in (1, 20, 57, len(order) // 2):
            file = Store(str(tmp_path)) / f"{seed}-{cut}.jsonl"
            stopped: set[str] = set()
            before = drive(sweep.Rungs(SWEEP, file, None).scheduler(), order[:cut], stopped)
            after = drive(sweep.Rungs(SWEEP, file, None).scheduler(), order[cut:], stopped)
            assert before + after == whole


def test_a_repeated_epoch_is_recorded_once_and_decided_alike(tmp_path) -> None:
    file = Store(str(tmp_path)) / "rungs.jsonl"
    order = [("trial-000", e, 0.1 * e) for e in range(1, 6)] + [
        ("trial-001", e, 0.01) for e in range(1, 3)
    ]
    drive(sweep.Rungs(SWEEP, file, None).scheduler(), order, set())
    rungs = sweep.Rungs(SWEEP, file, None)
    drive(rungs.scheduler(), [("trial-000", 5, 0.5), ("trial-000", 6, 0.6)], set())
    rows = [(row["trial"], row["epoch"], row["decision"]) for row in file.read_jsonl()]
    assert rows == [("trial-000", e, "continue") for e in range(1, 6)] + [
        ("trial-001", 1, "continue"),
        ("trial-001", 2, "stop"),
        ("trial-000", 6, "continue"),
    ]
    assert rungs.unfinished(["trial-000", "trial-001", "trial-002"]) == ["trial-000", "trial-002"]


def test_the_last_epoch_is_never_stopped(tmp_path) -> None:
    rungs = sweep.Rungs(SWEEP, Store(str(tmp_path)) / "rungs.jsonl", None)
    order = [("trial-000", EPOCHS, 0.9), ("trial-001", EPOCHS, 0.1)]
    assert [decision for *_, decision in drive(rungs.scheduler(), order, set())] == [
        "CONTINUE",
        "CONTINUE",
    ]
    assert {row.decision for row in rungs.rows} == {"done"}


def test_finalists_are_the_best_that_got_furthest() -> None:
    experiments = spaces.experiments(SWEEP)
    dra = [name for name, e in experiments.items() if e.align.weight > 0]
    baseline = [name for name, e in experiments.items() if e.align.weight == 0]
    rows = [
        # the best score, but stopped early: another rung, not comparable
        RungRow(trial=dra[0], decision="stop", **result(2, 0.9)),
        RungRow(trial=dra[1], decision="continue", **result(18, 0.5)),
        RungRow(trial=dra[2], decision="continue", **result(18, 0.6)),
        RungRow(trial=baseline[0], decision="stop", **result(6, 0.4)),
        RungRow(trial=baseline[1], decision="stop", **result(6, 0.3)),
    ]
    assert sweep.finalists(experiments, rows) == {"dra": dra[2], "baseline": baseline[0]}
    assert sweep.finalists(experiments, rows[3:]) == {"baseline": baseline[0]}


def test_ray_tune_can_pickle_the_scheduler(tmp_path) -> None:
    bar = threading.RLock()
    rungs = sweep.Rungs(SWEEP, Store(str(tmp_path)) / "rungs.jsonl", lambda row: bar.acquire())
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(rungs.scheduler()))._record.rows == []
