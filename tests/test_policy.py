"""The scaling policy as plain arithmetic."""

from __future__ import annotations

import pytest

from dra_ray.pool import DemandPolicy


@pytest.mark.parametrize(
    ("current", "busy", "waiting", "service_s", "wanted"),
    [
        (1, 0.0, 0, 0.0, 1),  # idle: never below one; Serve's own bounds come on top
        (1, 0.69, 0, 0.1, 1),
        (1, 0.71, 0, 0.1, 2),
        (1, 1.0, 600, 0.1, 16),  # saturated, 10 s of work per look-back second waiting: it jumps, it does not creep
        (2, 0.69, 0, 0.1, 2),  # hysteresis: one replica would be at its limit
        (2, 0.50, 0, 0.1, 1),
        (8, 0.0, 0, 0.0, 1),
    ],
)
def test_replicas_follow_the_measured_work(current: int, busy: float, waiting: int, service_s: float, wanted: int) -> None:
    assert DemandPolicy(target_utilisation=0.7, look_back_period_s=6).replicas(current, busy, waiting, service_s) == wanted


def test_a_constant_demand_settles() -> None:
    policy = DemandPolicy(0.7, 6)
    for demand in (0.1, 0.69, 0.71, 1.5, 3.3, 10.0):
        size = 1
        for _ in range(10):
            size = policy.replicas(size, min(demand, size), 100 if demand > size else 0, 0.1)
        settled = [size := policy.replicas(size, min(demand, size), 0, 0.1) for _ in range(5)]
        assert len(set(settled)) == 1
        assert settled[0] * 0.7 >= demand * 0.99
