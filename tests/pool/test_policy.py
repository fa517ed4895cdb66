"""The scaling policy as plain arithmetic: no Ray runs here, but the last test calls Ray Serve's own
code around it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dra_ray.errors import ConfigError
from dra_ray.pool.policy import DemandPolicy, Observation

SERVICE_S = 0.2


def policy(**knobs: Any) -> DemandPolicy:
    return DemandPolicy(
        **{"min_replicas": 0, "max_replicas": 100, "downscale_delay_s": 60, **knobs}
    )


def load(
    demand: float,
    running: int,
    waiting: float = 0,
    starting: int = 0,
    look_back_period_s: float = 6,
) -> Observation:
    """Work of `demand` replicas as `running` ones show it: all that is more than they can do waits
    elsewhere.
    """
    share = min(1.0, demand / running) if running else 0.0
    return Observation(
        running=running,
        starting=starting,
        busy_s=[share * look_back_period_s] * running,
        waiting=waiting,
        in_flight=share * running,
        service_s_per_image=SERVICE_S,
    )


def targets(
    scaled: DemandPolicy, observations: Iterable[Observation], start_s: float = 0.0
) -> list[int]:
    """Decisions at ticks of 1 s."""
    return [scaled.decide(start_s + tick, seen) for tick, seen in enumerate(observations)]


def follow(scaled: DemandPolicy, demand: Callable[[int], float], seconds: int) -> list[int]:
    """Decisions where replicas start at once and what they cannot do waits: requests of 0.2 s,
    ticks of 1 s.
    """
    found, backlog_s = [], 0.0
    for tick in range(seconds):
        offered = demand(tick) + backlog_s
        backlog_s = max(0.0, offered - scaled.target)
        found.append(
            scaled.decide(tick, load(offered, scaled.target, waiting=backlog_s / SERVICE_S))
        )
    return found


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_whatever_is_seen(seed: int) -> None:
    draws = random.Random(seed)
    scaled = policy(min_replicas=2, max_replicas=7, downscale_delay_s=3)
    seen = [
        load(
            draws.uniform(0, 20),
            draws.randint(0, 9),
            draws.choice([0, draws.uniform(0, 1e6)]),
            draws.randint(0, 3),
        )
        for _ in range(500)
    ]
    found = targets(scaled, seen)
    assert {2, 7} <= set(found)
    assert min(found) == 2
    assert max(found) == 7


@pytest.mark.parametrize("start", [0, 12])
def test_more_demand_never_means_fewer_replicas(start: int) -> None:
    """From equal beginnings, upward and downward, by busy replicas, by waiting requests and by
    arrivals.
    """

    def settled(seen: Observation) -> int:
        scaled = policy()
        scaled.target = start
        return targets(scaled, [seen] * 70)[-1]

    levels = [0.0, 0.01, 0.3, 0.7, 0.71, 1.4, 2.8, 5.6, 8.0, 8.4, 9.1]
    busy = [settled(load(level, 12)) for level in levels]
    waiting = [settled(load(1, 1, waiting=30 * level)) for level in levels]
    arriving = [
        settled(Observation(1, arriving_images_per_s=5 * level, service_s_per_image=SERVICE_S))
        for level in levels
    ]
    for found in (busy, waiting, arriving):
        assert found == sorted(found)
        assert found[0] < found[-1]


@pytest.mark.parametrize("demand", [0.1, 0.69, 0.71, 1.5, 3.3, 10.0])
def test_a_constant_demand_settles_where_replicas_are_busy_as_wanted(demand: float) -> None:
    found = follow(policy(), lambda _: demand, 300)
    assert len(set(found[100:])) == 1
    assert demand / 0.7 <= found[-1] * 1.0001 <= demand / 0.7 / 0.8 + 2


@pytest.mark.parametrize("demand", [0.5, 1.39, 3.2, 8.0])
def test_noise_does_not_make_it_flap(demand: float) -> None:
    draws = random.Random(0)
    found = follow(policy(), lambda _: demand * draws.uniform(0.92, 1.08), 2000)
    assert len(set(found[200:])) == 1


def test_a_step_of_load_is_answered_within_2_s_and_in_one_jump() -> None:
    scaled = policy(min_replicas=1)
    targets(scaled, [load(0.5, 1)] * 100)
    found = targets(
        scaled, [load(8.0, 1, waiting=140)] * 3, start_s=100
    )  # busy all the time, 28 s of work waits
    assert found[1] == found[2] == 1 + 28 / 4
    assert set(found) == {1, 8}


def test_a_spike_shorter_than_the_delay_orders_nothing() -> None:
    scaled = policy(min_replicas=1, upscale_delay_s=5)
    assert set(
        targets(scaled, [load(0.5, 1)] * 20 + [load(1, 1, waiting=1000)] * 4 + [load(0.5, 1)] * 20)
    ) == {1}


def test_the_order_clears_the_backlog_in_the_stated_time() -> None:
    for backlog_s in (1.0, 4.0, 30.0):
        scaled = policy(min_replicas=2, backlog_s=backlog_s)
        found = targets(scaled, [load(1.5, 2, waiting=200)] * 3)[-1]
        assert (
            found - 1.5
        ) * backlog_s >= 200 * SERVICE_S  # what is left of them after the work that comes
        assert (found - 1 - 1.5) * backlog_s < 200 * SERVICE_S or found == 3


def test_a_request_finds_a_replica_ordered_at_once() -> None:
    scaled = policy(upscale_delay_s=30)
    assert targets(scaled, [load(0, 0)] * 5) == [0] * 5
    assert scaled.decide(5.0, load(0, 0, waiting=1)) == 1
    assert policy().decide(0.0, Observation(0, waiting=0.01)) == 1, (
        "also before anything has been measured"
    )


def test_zero_is_reached_after_the_delay_and_only_without_work() -> None:
    scaled = policy(downscale_delay_s=60)
    assert targets(scaled, [load(1.2, 2, waiting=3)] * 10)[-1] == 2
    found = targets(scaled, [load(0, 2)] * 100, start_s=10)
    assert found[58] == 2
    assert set(found[60:]) == {0}
    trickle = load(0.001, 1)
    assert targets(scaled, [trickle] * 300, start_s=110)[-1] == 1


def test_a_pause_shorter_than_the_delay_costs_no_replica() -> None:
    scaled = policy(downscale_delay_s=60)
    pauses = ([load(3, 5)] * 20 + [load(0, 5)] * 55) * 5
    assert set(targets(scaled, [load(3, 3, waiting=30)] * 5 + pauses)[5:]) == {5}


def test_lost_replicas_are_replaced_at_once_and_not_more_than_those() -> None:
    scaled = policy()
    assert targets(scaled, [load(3.2, 4, waiting=1)] * 10)[-1] == 5
    lost_some = [load(3.2, 4, starting=1)] * 300  # longer than the delay of scaling down
    assert set(targets(scaled, lost_some, start_s=10)) == {5}
    lost_all = [load(0, 0, waiting=64, starting=5)] * 300  # clients wait: no new requests
    found = targets(scaled, lost_all, start_s=310)
    assert set(found[:60]) == {5}, "12.8 s of work waits, to be done in 4 s"
    assert set(found[60:]) == {4}, "12.8 s of work waits, to be done in 4 s"


def test_replicas_that_start_for_minutes_are_not_ordered_again() -> None:
    # clients that wait: what waits stays as it is
    scaled = policy()
    found = targets(
        scaled,
        [load(0, 0, waiting=64, starting=scaled.target if tick else 0) for tick in range(300)],
    )
    assert found[-1] == 4
    assert set(found[3:]) == {4}

    # clients that go on asking: what waits piles up, by 3.2 replicas' worth of work every second
    scaled, found = policy(), []
    for tick in range(300):
        waiting = 3.2 * tick / SERVICE_S
        seen = Observation(
            0,
            scaled.target,
            waiting=waiting,
            arriving_images_per_s=3.2 / SERVICE_S,
            service_s_per_image=SERVICE_S,
        )
        found.append(scaled.decide(tick, seen))
    assert set(found[3:]) == {5}, "3.2 / 0.7, whatever waits"

    # but clients that come in addition meanwhile are reason to order more
    assert (
        scaled.decide(
            300,
            Observation(0, 5, arriving_images_per_s=6.3 / SERVICE_S, service_s_per_image=SERVICE_S),
        )
        == 5
    )
    assert (
        scaled.decide(
            301,
            Observation(0, 5, arriving_images_per_s=6.3 / SERVICE_S, service_s_per_image=SERVICE_S),
        )
        == 9
    )


def test_the_first_decision_shrinks_nothing() -> None:
    """A pool that is taken over, by a controller that was started again, is left alone for the
    delay.
    """
    scaled = policy(downscale_delay_s=60)
    scaled.target = 5
    found = targets(scaled, [Observation(5)] * 70)
    assert set(found[:60]) == {5}
    assert found[-1] == 0


def test_equal_observations_give_equal_decisions() -> None:
    draws = random.Random(1)
    seen = [
        load(draws.uniform(0, 5), draws.randint(0, 6), draws.uniform(0, 50), draws.randint(0, 2))
        for _ in range(300)
    ]
    assert targets(policy(), seen) == targets(policy(), seen)


@pytest.mark.parametrize(
    "knobs",
    [
        {"min_replicas": 3, "max_replicas": 2},
        {"min_replicas": -1},
        {"target_utilisation": 0},
        {"backlog_s": 0},
    ],
)
def test_wrong_knobs_are_named(knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        policy(**knobs)


def test_ray_serve_applies_the_decision_as_it_is() -> None:
    """Through Serve's own wrapper, with the context that its controller passes."""
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    settings = AutoscalingConfig(
        min_replicas=1,
        max_replicas=100,
        look_back_period_s=6,
        upscale_delay_s=0,
        downscale_delay_s=0,
    )
    apply = _apply_autoscaling_config(policy(min_replicas=1))
    target, state = 1, {}

    def tick(now_s: float, share: float, requests: float) -> int:
        nonlocal target, state
        names = {f"replica-{index}": share for index in range(target)}
        facts = {
            "deployment_id": None,
            "deployment_name": "teacher",
            "app_name": "x",
            "running_replicas": list(names),
            "raw_metrics": None,
        }
        bounds = {
            "capacity_adjusted_min_replicas": 1,
            "capacity_adjusted_max_replicas": 100,
            "policy_state": state,
            "config": settings,
        }
        times = {"last_scale_up_time": None, "last_scale_down_time": None, "current_time": now_s}
        waiting = max(0.0, requests - target * share)  # in the replicas, in equal parts
        metrics = {
            "busy": names,
            "service_s": dict.fromkeys(names, SERVICE_S),
            "waiting": dict.fromkeys(names, waiting / target),
        }
        sizes = {
            "current_num_replicas": target,
            "target_num_replicas": target,
            "total_num_requests": requests,
            "total_queued_requests": 0.0,
        }
        target, state = apply(
            AutoscalingContext(**facts, **bounds, **times, **sizes, aggregated_metrics=metrics)
        )
        return target

    assert [tick(at_s, 0.6, 1) for at_s in range(20)] == [1] * 20
    assert [tick(at_s, 1.0, 61) for at_s in (20, 21)] == [
        1,
        4,
    ]  # 12 s of work waits beside the one that works
    assert [tick(at_s, 0.75, 3) for at_s in range(22, 25)] == [4, 5, 5]
    assert [tick(at_s, 0.0, 0) for at_s in range(25, 100)][-1] == 1
