"""The simulator against what must hold: work is conserved, known cases come out as computed by
hand, equal seeds equal results.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from dra_ray.bench import policy
from dra_ray.bench.policy import Fixed, FixedWhileUsed, InServe, ServeDefault, Workload
from dra_ray.errors import ConfigError
from dra_ray.pool.policy import Observation
from dra_ray.storage import Store

# two sweeps of 12 short trials on 8 GPUs, in half an hour; nodes start within a minute
SMALL = Workload(
    gpus=8,
    sweeps_at_h=(0.01, 0.25),
    trials=12,
    rung_epochs=(1, 3),
    images_per_epoch=12 * 1024,
    teacher_gflop_per_image=60,
    hours=0.5,
    node_start_s=40,
)
REQUESTS = 2 * (8 * 12 + 4 * 36)  # 12 batches an epoch; 4 of 12 trials reach the second rung
POLICIES: dict[str, policy.Policy] = {
    "demand": policy.suited(SMALL),
    "in Serve": InServe(policy.suited(SMALL)),
    "Serve": ServeDefault(0, 6),
    "fixed": Fixed(2),
    "while used": FixedWhileUsed(2),
}


def changed(**fields: Any) -> Workload:
    return dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("inflight", [1, 3])
def test_every_request_is_answered_once_whatever_is_lost(name: str, inflight: int) -> None:
    workload = changed(losses_per_replica_hour=40, inflight=inflight, jitter=0)
    [row] = policy.run(workload, {name: POLICIES[name]})
    assert row.requests == REQUESTS
    assert row.retries > 0
    assert row.lost_work_s > 0
    assert row.busy_share * row.replica_hours * 3600 == pytest.approx(
        REQUESTS * workload.service_s, rel=2e-3
    ), "lost work is not counted"


def test_asha_stops_most_trials_at_the_first_rung() -> None:
    steps = Workload().trial_steps(random.Random(0))
    assert [steps.count(count * 50_000 // 1024) for count in (2, 6, 18, 54)] == [134, 44, 15, 7]
    assert len(steps) == 200
    assert steps != sorted(steps)


def test_nobody_waits_where_there_is_a_replica_for_each() -> None:
    [row] = policy.run(changed(losses_per_replica_hour=0), {"a replica per GPU": Fixed(SMALL.gpus)})
    assert row.mean_wait_s == row.p95_wait_s == row.wait_share == 0
    assert row.replica_hours == pytest.approx(SMALL.gpus * SMALL.hours)


def test_one_replica_is_as_busy_as_the_load_that_is_offered() -> None:
    """8 GPUs from the first second to the last, each asking for a twentieth of a replica."""
    workload = changed(
        trials=8,
        sweeps_at_h=(0.0,),
        rung_epochs=(40,),
        trial_start_s=0,
        hours=0.1,
        jitter=0,
        losses_per_replica_hour=0,
        teacher_gflop_per_image=14,
    )
    [row] = policy.run(workload, {"one": Fixed(1)})
    offered = 8 * workload.service_s / workload.step_s
    assert 0.3 < offered < 1
    assert row.busy_share == pytest.approx(offered, rel=0.02)
    assert row.wait_share == 0


def test_a_saturated_pool_slows_training_down_as_much_as_it_lacks() -> None:
    workload = changed(
        trials=8,
        sweeps_at_h=(0.0,),
        rung_epochs=(40,),
        trial_start_s=0,
        hours=0.1,
        jitter=0,
        losses_per_replica_hour=0,
    )
    assert workload.gpus * workload.service_s / workload.step_s == pytest.approx(1.696, abs=1e-3)
    [row] = policy.run(workload, {"one": Fixed(1)})
    assert row.busy_share == pytest.approx(1, abs=0.01)
    assert row.finished_h * 3600 == pytest.approx(row.requests * workload.service_s, rel=0.01)
    assert row.wait_share == pytest.approx(1 - 1 / 1.696, abs=0.01)


def test_a_larger_fixed_pool_waits_less() -> None:
    rows = policy.run(
        changed(losses_per_replica_hour=0), {str(size): Fixed(size) for size in (1, 2, 3, 4)}
    )
    waits = [row.mean_wait_s for row in rows]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 1 > waits[-1]


def test_equal_seeds_give_equal_results_and_leave_the_policies_alone() -> None:
    workload = changed(losses_per_replica_hour=5)
    first = policy.run(workload, POLICIES)
    assert policy.run(workload, POLICIES) == first
    assert policy.run(changed(losses_per_replica_hour=5, seed=1), POLICIES) != first


def test_the_pool_follows_the_sweeps() -> None:
    history = policy.play(SMALL, "demand", policy.suited(SMALL)).history
    at_rest = {row.target for row in history if row.at < 0.01 * 3600}
    early = [row for row in history if 0.01 * 3600 + 30 <= row.at < 0.01 * 3600 + 90]
    assert at_rest == {0}
    assert history[-1].target == 0
    assert max(row.target for row in history) >= 3, "1.7 replicas of work at 70 %"
    assert max(row.demand for row in early) > 1.5


def test_nodes_are_paid_for_from_the_order_until_they_are_gone() -> None:
    """One burst of 100 s: a pool that comes up with it and goes after a minute."""
    workload = changed(
        sweeps_at_h=(0.05,),
        trials=1,
        rung_epochs=(2,),
        trial_start_s=0,
        jitter=0,
        losses_per_replica_hour=0,
    )
    [row] = policy.run(workload, {"used": FixedWhileUsed(1, idle_s=60)})
    start_s = workload.node_start_s + workload.load_s
    first_wait_s = start_s + workload.service_s - workload.attack_share * workload.step_s
    used_s = 24 * workload.step_s + first_wait_s
    assert row.mean_wait_s == pytest.approx(first_wait_s / 24, rel=0.01)
    assert row.replica_hours * 3600 == pytest.approx(used_s + 60 + workload.node_idle_s, abs=8)


def test_serve_orders_one_and_no_more_while_none_runs() -> None:
    alone, inside = (
        policy.play(changed(node_start_s=300), "", POLICIES[name])
        for name in ("demand", "in Serve")
    )
    before = [
        max(row.target for row in outcome.history if not row.running and row.at < 300)
        for outcome in (alone, inside)
    ]
    assert before[0] > 1 == before[1]
    assert inside.row.mean_wait_s > alone.row.mean_wait_s


def test_serves_default_decides_as_ray_does() -> None:
    """Against the functions of the installed Ray, on a random walk of ongoing requests with losses
    and pauses.
    """
    from ray.serve import autoscaling_policy as rays
    from ray.serve.config import AutoscalingConfig

    draws, bounds = random.Random(3), {"min_replicas": 0, "max_replicas": 12}
    settings = AutoscalingConfig(**bounds)
    ours, target, state, ongoing, running, found = ServeDefault(**bounds), 0, {}, 0.0, 0, []
    for second in range(20_000):
        if draws.random() < 1 / 500:
            ongoing = draws.choice([0.0, 0.0, draws.uniform(0, 4), draws.uniform(0, 30)])
        running = 0 if draws.random() < 0.01 else min(target, running + (draws.random() < 0.1))
        ctx: Any = SimpleNamespace(
            current_num_replicas=running,
            target_num_replicas=target,
            total_num_requests=ongoing,
            config=settings,
        )
        cold = rays._get_cold_start_scale_up_replicas(ctx)
        if cold is not None:
            target = cold
        else:
            wanted = rays._apply_scaling_factors(
                rays._core_replica_queue_length_policy(ctx)[0], running, settings
            )
            if running or not wanted:
                wanted, state = rays._apply_delay_logic(
                    max(0, wanted), target, settings, state, _now=float(second)
                )
            target = wanted
        target = min(12, max(0, math.ceil(target)))
        assert ours.decide(float(second), Observation(running, waiting=ongoing)) == target
        found.append(target)
    assert {0, 1, 12} <= set(found)


def test_the_comparison_names_the_fixed_pool_that_waits_as_long() -> None:
    workload = changed(losses_per_replica_hour=0, node_start_s=4, load_s=1)
    rows = {
        outcome.name: outcome.row for outcome in policy.compare(workload, policy.suited(workload))
    }
    assert {
        "demand",
        "demand, inside Serve",
        "Serve's default",
        "fixed 2 while used",
        "fixed 1",
        "fixed 2",
        "fixed 3",
    } == set(rows)
    row = rows["demand"]
    assert row.of_fixed == pytest.approx(row.replica_hours / row.fixed_hours, rel=0.01)
    assert rows["fixed 1"].replica_hours < row.fixed_hours < rows["fixed 2"].replica_hours
    assert rows["fixed 1"].mean_wait_s > row.mean_wait_s > rows["fixed 2"].mean_wait_s


def test_the_page_holds_its_data(tmp_path: Any) -> None:
    outcomes = [
        policy.play(SMALL, "a <b>", Fixed(1)),
        policy.play(SMALL, "c", policy.suited(SMALL)),
    ]
    outcomes[1] = policy.Outcome(
        dataclasses.replace(outcomes[1].row, of_fixed=0.5), outcomes[1].history
    )
    page = Store(str(tmp_path)) / "page.html"
    policy.write(page, SMALL, outcomes)
    text = page.read_text()
    assert "a &lt;b&gt;" in text
    assert "<b>" not in text.split("<script>")[0]
    figures = [
        json.loads(part.split("</script>")[0])
        for part in text.split('<script type="application/json">')[1:]
    ]
    assert figures == list(json.loads(json.dumps(policy.plot(outcomes))).values())
    assert len(figures) == 2


@pytest.mark.parametrize(
    "fields", [{"gpus": 0}, {"tick_s": 0.0}, {"reduction": 1}, {"rung_epochs": (4, 2)}]
)
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        changed(**fields)


@pytest.mark.slow
def test_half_the_replica_hours_at_equal_waiting_on_the_default_day() -> None:
    workload = Workload()
    rows = {
        outcome.name: outcome.row for outcome in policy.compare(workload, policy.suited(workload))
    }
    assert rows["demand"].of_fixed <= 0.5 < rows["Serve's default"].of_fixed


def test_policies_that_lie_close_together_are_named_in_the_legend() -> None:
    outcomes = [
        policy.play(SMALL, f"near {number}", policy.suited(SMALL)) for number in range(3)
    ] + [policy.play(SMALL, "fixed 1", Fixed(1))]
    outcomes[:3] = [
        dataclasses.replace(outcome, row=dataclasses.replace(outcome.row, of_fixed=0.5))
        for outcome in outcomes[:3]
    ]
    fixed, *near = policy.plot(outcomes)[policy.COST]["data"]
    assert [(trace["mode"], trace["name"]) for trace in near] == [
        ("markers", f"near {number}") for number in range(3)
    ]
    assert len({(trace["marker"]["symbol"], trace["marker"]["color"]) for trace in near}) == 3
    assert "text" in fixed["mode"]
