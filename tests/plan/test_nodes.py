"""Nodes that a config wants of a cluster, by hand and as Ray's own autoscaler would order them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from dra_ray import cluster, plan
from dra_ray.config import Asha, Experiment, Sweep, Synthesis, load, override
from dra_ray.errors import ConfigError
from dra_ray.plan import nodes, speed

CLUSTER = str(Path(__file__).parents[2] / "cluster.yaml")
ON_IT: dict[str, Any] = {
    "resources.gpus_per_worker": 1,
    "resources.cpus_per_worker": 7,
    "pool.gpus_per_replica": 1,
    "pool.cpus_per_replica": 1,
    "pool.max_replicas": 3,
}
HEAD_HOUR, STUDENT_HOUR, TEACHER_HOUR = 0.384, 2.24208, 0.8048  # of gpus.yaml


def experiment(**changes: Any) -> Experiment:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return override(Experiment(), ON_IT | dotted)


def sweep(concurrent: int, **changes: Any) -> Sweep:
    return Sweep(
        space={"align.weight": [0, 1, 2, 3, 4, 5]},
        asha=Asha(grace_epochs=1, max_concurrent=concurrent),
        base=experiment(**changes),
    )


def fitted(config: Experiment | Sweep, needed: float | None = None) -> nodes.Fit:
    """On our own cluster; `needed` replicas keep up with one trial on equal devices."""
    planned = plan.plan(config)
    assert isinstance(planned, plan.RunPlan | plan.SweepPlan)
    trial = planned if isinstance(planned, plan.RunPlan) else planned.largest_trial
    resources = dataclasses.replace(trial.resources, replicas_needed=needed)
    trial = dataclasses.replace(trial, resources=resources)
    if isinstance(planned, plan.SweepPlan):
        return _on_ours(config, dataclasses.replace(planned, largest_trial=trial))
    return _on_ours(config, trial)


def _on_ours(config: Experiment | Sweep, planned: plan.Plan) -> nodes.Fit:
    return nodes.fit(config, planned, nodes.read(CLUSTER), speed.table(), CLUSTER)


def test_four_trials_find_room_on_our_own_cluster() -> None:
    fit = fitted(sweep(4))
    assert fit.remedy is None
    assert fit.idle == {"head": 1}
    assert fit.smallest.nodes == {"head": 1, "student_gpu": 4, "teacher_spot": 1}
    assert fit.largest.nodes == {"head": 1, "student_gpu": 4, "teacher_spot": 3}
    assert fit.after.nodes == {"head": 1, "teacher_spot": 2}  # chunks ask for one CPU
    kept = fitted(sweep(4, resources__custom={"student": 1}))
    assert kept.after.nodes == {"head": 1, "student_gpu": 2}


def test_a_fifth_trial_does_not_and_the_remedy_is_one_line() -> None:
    fit = fitted(sweep(5))
    assert not fit.is_enough
    assert fit.remedy
    assert "room for 4 of the 5 training workers, which need 7 CPU, 1 GPU each" in fit.remedy
    assert (
        "raise max_workers of 'student_gpu' to 5 and the cluster's max_workers to 13" in fit.remedy
    )
    assert "lower asha.max_concurrent so that 4 suffice" in fit.remedy


def test_a_pool_that_cannot_grow_to_its_most_does_not_stop_the_run() -> None:
    fit = fitted(experiment(pool__max_replicas=9, pool__resources={"teacher": 1}))
    assert fit.is_enough
    assert fit.remedy
    assert "room for 8 of the 9 teacher replicas" in fit.remedy
    assert "lower pool.max_replicas so that 8 suffice" in fit.remedy


def test_what_no_node_offers_is_said() -> None:
    for wish in ({"resources__gpus_per_worker": 8}, {"resources__labels": {"pool": "elsewhere"}}):
        remedy = fitted(experiment(**wish)).remedy
        assert remedy
        assert "no type of node offers that" in remedy


def test_the_whole_cluster_is_limited_too(tmp_path: Path) -> None:
    text = Path(CLUSTER).read_text().replace("max_workers: 12", "max_workers: 5")
    (tmp_path / "c.yaml").write_text(text)
    known = nodes.read(str(tmp_path / "c.yaml"))
    packed = nodes.pack(known, nodes.demands(sweep(4), 4)[:2])
    assert packed.nodes == {"head": 1, "student_gpu": 4, "teacher_spot": 1}
    assert packed.left
    assert packed.left.left == 2


def test_prices_by_hand() -> None:
    fit, table = fitted(sweep(4)), speed.table()
    idle = nodes.price(fit.nodes, fit.idle, table)
    assert idle == nodes.Price(HEAD_HOUR, ())
    low = nodes.price(fit.nodes, fit.smallest.nodes, table)
    high = nodes.price(fit.nodes, fit.largest.nodes, table)
    on_demand = HEAD_HOUR + 4 * STUDENT_HOUR
    assert low.money == pytest.approx(on_demand + TEACHER_HOUR * table.spot)
    assert high.money == pytest.approx(on_demand + 3 * TEACHER_HOUR * table.spot)
    own = table.model_copy(
        update={"instances": {"g6.xlarge": speed.Instance(price=2.0, spot=0.25)}}
    )
    assert nodes.price(fit.nodes, {"head": 1, "teacher_spot": 2}, own) == nodes.Price(
        1.0, ("m6i.2xlarge",)
    )


def test_which_role_sets_the_pace() -> None:
    """L40S against L4 in fp32: 91.6 / 30.3 = 3.02 replicas for one on equal devices."""
    slow = fitted(sweep(4), needed=0.5).bottleneck
    assert slow.role == nodes.REPLICAS
    assert slow.needed == pytest.approx(4 * 0.5 * 91.6 / 30.3)
    assert slow.room == 3
    assert fitted(sweep(4), needed=0.2).bottleneck.role == nodes.WORKERS
    assert fitted(experiment()).bottleneck.role is None
    alone = fitted(experiment(align__weight=0)).bottleneck
    assert (alone.role, alone.needed) == (nodes.WORKERS, None)


def test_rows_are_for_people_and_programs() -> None:
    listed = {row.quantity: row for row in nodes.rows(fitted(sweep(4), needed=0.5), speed.table())}
    assert listed["head"].text == "1 head (m6i.2xlarge)"
    assert listed["training workers"].text == "4, each 7 CPU, 1 GPU: 4 on student_gpu (g6e.2xlarge)"
    assert listed["teacher replicas"].text == (
        "1 to 3, each 1 CPU, 1 GPU: 1 to 3 on teacher_spot (g6.xlarge, spot)"
    )
    assert listed["is there room?"].value == "yes"
    value = listed["an hour, largest pool"].value
    assert isinstance(value, dict)
    assert value["money"] == pytest.approx(HEAD_HOUR + 4 * STUDENT_HOUR + 3 * TEACHER_HOUR * 0.5)


def test_demands_are_what_our_code_asks_ray_for() -> None:
    config = experiment(
        resources__custom={"student": 1},
        resources__labels={"pool": "student"},
        resources__workers=4,
    )
    workers, replicas, chunks = nodes.demands(config)
    scaling = cluster.scaling(config.resources)
    assert workers.most == scaling.num_workers
    assert workers.each == scaling.resources_per_worker
    assert workers.labels == scaling.label_selector
    task = cluster.placed(config.resources)
    asked = {"CPU": task["num_cpus"], "GPU": task["num_gpus"], **task["resources"]}
    assert chunks.each == asked
    assert chunks.is_after
    assert (replicas.least, replicas.most) == (1, 3)


def test_tasks_and_the_quickstart() -> None:
    images = Synthesis(images=100, workers=3, gpus_per_worker=1.0)
    assert [demand.most for demand in nodes.demands(images)] == [3]
    with pytest.raises(ConfigError, match="one machine"):
        nodes.demands(load("quickstart"))


@pytest.mark.parametrize(
    ("value", "wish", "matches"),
    [
        ("a", "a", True),
        ("a", "!a", False),
        (None, "!a", True),
        ("b", "in(a, b)", True),
        ("b", "!in(a,b)", False),
        (None, "a", False),
    ],
)
def test_label_selectors(value: str | None, wish: str, matches: bool) -> None:
    assert nodes._matches(value, wish) is matches


def test_files_that_are_not_clusters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="available_node_types"):
        nodes.read(str(tmp_path / "c.yaml"))
    group = "spec: {headGroupSpec: {template: {}}}"
    (tmp_path / "c.yaml").write_text(f"apiVersion: ray.io/v1\nkind: RayCluster\n{group}")
    with pytest.raises(ConfigError, match="group 'head'.*add resources"):
        nodes.read(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("concurrent", [1, 2, 4])
@pytest.mark.parametrize("custom", [{}, {"student": 1}])
def test_rays_autoscaler_would_order_the_same_nodes(
    concurrent: int, custom: dict[str, float]
) -> None:
    """Ray's own scheduler of demands, without a cluster."""
    known = nodes.read(CLUSTER)
    config = sweep(concurrent, resources__custom=custom, pool__resources={"teacher": 1})
    asked = nodes.demands(config, concurrent)[:2]
    requests = [
        ResourceRequestUtil.make(dict(demand.each)) for demand in asked for _ in range(demand.most)
    ]
    kinds = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=kind.max_workers,
            resources=kind.resources,
        )
        for name, kind in known.types.items()
        if name != known.head_node_type
    }
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=kinds,
            max_num_nodes=known.max_workers,
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    ordered = {launch.instance_type: launch.count for launch in reply.to_launch}
    packed = nodes.pack(known, asked)
    assert {name: n for name, n in packed.nodes.items() if name != "head"} == ordered
