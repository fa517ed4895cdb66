"""The slot of every trial that is stopped is free again soon, as the cluster itself sees it: trials
of known learning curves, which train nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from dra_ray import config
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.workloads import sweep

STOPS, AT_ONCE, EPOCHS, FREE_WITHIN_S = 100, 10, 3, 10.0
SLOT_CPUS = 0.1
RATES = [round(0.01 * (place + 1), 2) for place in range(AT_ONCE)]  # one trial each


def settings() -> config.Sweep:
    base = config.override(
        config.Experiment(),
        {
            "model.name": "wrn-10-1",
            "optim.epochs": EPOCHS,
            "align.weight": 0.0,
            "resources.cpus_per_worker": SLOT_CPUS,
        },
    )
    return config.Sweep(
        base=base,
        space={"optim.lr": RATES},
        scheduler="asha",
        asha=config.Asha(grace_epochs=1, reduction_factor=2, max_concurrent=AT_ONCE),
    )


def curves() -> sweep.Trainer:
    """Whoever reports later is worse, so that all but the first are stopped, a while apart."""
    rates, epochs = RATES, EPOCHS

    def follow(experiment: config.Experiment, run: Store) -> None:
        from ray import tune

        place = rates.index(experiment.optim.lr)
        for epoch in range(1, epochs + 1):
            time.sleep(0.2 * (place + 1))
            score = 0.9 - 0.05 * place
            tune.report(
                {
                    "epoch": epoch,
                    "images_seen": 1280 * epoch,
                    "clean_accuracy": score,
                    "robust_accuracy": score,
                    "elapsed_s": 0.2 * (place + 1) * epoch,
                }
            )

    return follow


@contextmanager
def watched(seen: list[tuple[float, float]]) -> Iterator[None]:
    """Free CPUs as the cluster says, over time."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            seen.append((time.monotonic(), ray.available_resources().get("CPU", 0.0)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_the_slot_of_every_one_of_a_hundred_stops_is_free_soon(
    ray_cluster: Any, tmp_path: Any
) -> None:
    """In a sweep of which all trials start at once nobody takes a slot that is free again, so after
    the k-th end k slots must be.
    """
    delays_s: list[float] = []
    for number in itertools.count():
        if len(delays_s) >= STOPS:
            break
        free = ray.available_resources()["CPU"]
        ends: list[tuple[float, str]] = []
        seen: list[tuple[float, float]] = []

        def ended(row: RungRow, ends: list[tuple[float, str]] = ends) -> None:
            if row.decision != "continue":
                ends.append((time.monotonic(), row.decision))

        with watched(seen):
            sweep.run(settings(), Store(str(tmp_path)) / f"sweep-{number}", ended, curves())
            deadline = time.monotonic() + FREE_WITHIN_S
            while time.monotonic() < deadline and (not seen or seen[-1][1] < free - 1e-6):
                time.sleep(0.05)
        assert len(ends) == AT_ONCE
        for count, (at, decision) in enumerate(ends, 1):
            used = SLOT_CPUS * (AT_ONCE - count)
            free_at = [when for when, cpus in seen if when >= at and cpus >= free - used - 1e-6]
            assert free_at, f"after {decision} number {count}: {seen[-1]}"
            if decision == "stop":
                delays_s.append(free_at[0] - at)
    print(f"{len(delays_s)} stops, slot free after at most {max(delays_s):.2f} s")
    assert max(delays_s) < FREE_WITHIN_S
