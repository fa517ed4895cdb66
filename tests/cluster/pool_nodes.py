"""The pool on clusters of several nodes, each in a process of its own: `python -m
tests.cluster.pool_nodes lost|grown|planned FOLDER`.

`lost`: the node that holds the replicas is killed with requests in flight. `grown`: an autoscaling
cluster of fake nodes gets a sweep. `planned`: one with the node types of our cluster.yaml gets what
a run asks for. All answer with what was seen. Run by test_pool_nodes.py, since a second Ray in
the tests' own process would meet theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster

from dra_ray import cluster, config
from dra_ray.plan import nodes as planned_nodes
from dra_ray.pool import client as pool_client
from dra_ray.pool import service, sources
from dra_ray.storage import Store
from dra_ray.workloads import sweep
from tests.cluster.apart import answer
from tests.cluster.small import experiment
from tests.support import teachers
from tests.support.requests import request
from tests.support.teachers import Sums, expected

ON_TEACHERS = {"resources": {"teacher": 1.0}, "cpus_per_replica": 0.0}
QUICK = {
    "look_back_period_s": 2.0,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 3.0,
    "backlog_s": 1.0,
}


def lost() -> dict[str, Any]:
    """Two teacher nodes, both replicas on them; one node is killed with requests in flight."""
    teachers.travel()
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    workers = [nodes.add_node(num_cpus=1, resources={"teacher": 1}) for _ in range(2)]
    ray.init(nodes.address, log_to_driver=False)
    app, settings = (
        f"{sources.PREFIX}lost",
        config.Pool(min_replicas=2, max_replicas=2, **ON_TEACHERS, **QUICK),
    )
    service.deploy(app, functools.partial(Sums, 0.1), settings, config.Teacher(uri="lost"))
    with service.held(app):
        assert cluster.wait_until(lambda: service.replicas(app).get("RUNNING", 0) == 2, 60)
        client = pool_client.PoolClient(app, settings.model_copy(update={"max_inflight": 8}))
        calls = [client.submit(request(number, 160)) for number in range(6)]
        time.sleep(0.3)
        nodes.remove_node(workers[0], allow_graceful=False)
        calls += [client.submit(request(number, 160)) for number in range(6, 8)]
        wrong = [
            number
            for number, call in enumerate(calls)
            if not torch.equal(call.result(), expected(number, 160))
        ]
        return {"wrong": wrong, **dataclasses.asdict(client.totals), "left": service.replicas(app)}


# -- an autoscaling cluster whose nodes are processes of this machine ------------------------------
KINDS: dict[str, dict[str, Any]] = {
    name: {"resources": {"CPU": 1, name: 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    for name in ("teacher", "student")
}
HEAD = {"CPU": 4, "student": 4}
LISTS = (
    "setup_commands initialization_commands cluster_synced_files head_setup_commands "
    "worker_setup_commands head_start_ray_commands "
    "worker_start_ray_commands rsync_exclude rsync_filter"
)


def autoscaling(
    port: int,
    folder: Path,
    kinds: dict[str, dict[str, Any]],
    head: dict[str, int],
    dashboard: bool,
) -> subprocess.Popen[bytes]:
    """The head of such a cluster, which offers `head` and may order nodes of `kinds`. Ray's own
    class needs a file that its wheel lacks.
    """
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    settings = {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in kinds.values()),
        "provider": provider,
        "available_node_types": kinds
        | {"ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0}},
        "head_node_type": "ray.head.default",  # as Ray's provider of fake nodes calls it
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in LISTS.split()},
    }
    (folder / "autoscaling.json").write_text(json.dumps(settings))
    options = {
        "port": port,
        "ray-client-server-port": _free_port(),  # 10001 may be another's
        "num-cpus": head["CPU"],
        "resources": json.dumps({name: n for name, n in head.items() if name != "CPU"}),
        "object-store-memory": 2**28,
    }
    options |= {
        "autoscaling-config": folder / "autoscaling.json",
        "include-dashboard": str(dashboard).lower(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": 0,
    }
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    more = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
    }
    more |= {
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with (folder / "head.log").open("w") as log:
        return subprocess.Popen(
            command,
            env=os.environ | more,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def grown(root: Path) -> dict[str, Any]:
    """A sweep whose pool wants teacher nodes: which nodes came, when, and when they were gone."""
    return _on(root, KINDS, HEAD, lambda: _sweep(root))


def planned(root: Path) -> dict[str, Any]:
    """What a run of two workers and its pool ask for, on the node types of our cluster.yaml, whose
    GPUs and CPUs are numbers here. Idle nodes go sooner.
    """
    file = str(Path(__file__).parents[2] / "cluster.yaml")
    launcher = yaml.safe_load(Path(file).read_text())
    kinds: dict[str, dict[str, Any]] = launcher["available_node_types"]
    head = kinds.pop(launcher["head_node_type"])["resources"]
    for kind in kinds.values():
        kind |= {"node_config": {}, "idle_timeout_s": 6}
    return _on(root, kinds, head, lambda: _requests(planned_nodes.read(file)), dashboard=False)


def _requests(known: planned_nodes.Nodes) -> dict[str, Any]:
    """Two training workers and two replicas, as our code asks Ray for them."""
    settings = config.Pool(
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=1.0,
        gpus_per_replica=1.0,
        resources={"teacher": 1.0},
        **QUICK,
    )
    resources = config.Resources(workers=2, cpus_per_worker=7.0, gpus_per_worker=1.0)
    run = config.Experiment(pool=settings, resources=resources)
    during = [demand for demand in planned_nodes.demands(run) if not demand.is_after]
    expected = planned_nodes.pack(known, during).nodes
    predicted = {
        name.split("_")[0]: count
        for name, count in expected.items()
        if name != known.head_node_type
    }
    seen: list[tuple[float, dict[str, int]]] = []
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(seen, stop))
    watch.start()
    try:
        came, stayed = _place_and_leave(settings, resources, predicted)
    finally:
        stop.set()
        watch.join()
    most = {kind: max(nodes.get(kind, 0) for _, nodes in seen) for kind in ("student", "teacher")}
    return {"predicted": predicted, "came": came, "most": most, "stayed": stayed}


def _place_and_leave(
    settings: config.Pool, resources: config.Resources, predicted: dict[str, int]
) -> tuple[bool, dict[str, int]]:
    """Whether the predicted nodes came, and which were left when the pool had gone."""
    teachers.travel()
    app = f"{sources.PREFIX}planned"
    place = cluster.placed(resources, resources.cpus_per_worker)
    workers = [ray.remote(_Worker).options(**place).remote() for _ in range(resources.workers)]
    service.deploy(app, functools.partial(Sums, 0.0), settings, config.Teacher(uri="planned"))
    with service.held(app):
        came = cluster.wait_until(lambda: _nodes() == predicted, 240)
        ray.get([worker.ready.remote() for worker in workers], timeout=120)
        came = came and cluster.wait_until(
            lambda: service.replicas(app).get("RUNNING", 0) == settings.min_replicas, 240
        )
    cluster.wait_until(lambda: not _nodes().get("teacher"), 120)
    return came, _nodes()


class _Worker:
    """Holds a training worker's resources."""

    def ready(self) -> bool:
        return True


def _on(
    root: Path,
    kinds: dict[str, dict[str, Any]],
    offered: dict[str, int],
    body: Callable[[], dict[str, Any]],
    dashboard: bool = True,
) -> dict[str, Any]:
    """What `body` saw on an autoscaling cluster, which is gone afterwards."""
    port = _free_port()
    head = autoscaling(port, root, kinds, offered, dashboard)
    try:
        assert cluster.wait_until(
            lambda: "Ray runtime started" in (root / "head.log").read_text(), 240
        ), (root / "head.log").read_text()
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        with cluster.connect():
            return body()
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _sweep(root: Path) -> dict[str, Any]:
    base = experiment(Store(str(root / "teacher")), resources__custom={"student": 1})
    ours = {**ON_TEACHERS, **QUICK, "min_replicas": 0, "max_replicas": 2, "timeout_s": 300.0}
    base = config.override(base, {f"pool.{name}": value for name, value in ours.items()})
    study = config.Sweep(
        base=base,
        space={"align.weight": [0.5, 1.0]},
        asha=config.Asha(grace_epochs=2, max_concurrent=2),
    )
    seen: list[tuple[float, dict[str, int]]] = []
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(seen, stop))
    watch.start()
    begun = time.monotonic()
    manifest = sweep.run(study, Store(str(root / "sweep")))
    ended = time.monotonic()
    gone = cluster.wait_until(lambda: not _nodes().get("teacher"), 60)
    gone_s = time.monotonic() - ended
    stop.set()
    watch.join()
    first = next((at - begun for at, nodes in seen if nodes.get("teacher")), None)
    return {
        "status": manifest.status,
        "kinds": sorted({kind for _, nodes in seen for kind in nodes}),
        "most": max(nodes.get("teacher", 0) for _, nodes in seen),
        "first_teacher_s": first,
        "sweep_s": ended - begun,
        "gone": gone,
        "gone_s": gone_s,
    }


def _watch(seen: list[tuple[float, dict[str, int]]], stop: threading.Event) -> None:
    while not stop.wait(0.5):
        seen.append((time.monotonic(), _nodes()))


def _nodes() -> dict[str, int]:
    """Living nodes by kind, without the head."""
    count: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" not in node["Resources"]:
            kind = "teacher" if "teacher" in node["Resources"] else "student"
            count[kind] = count.get(kind, 0) + 1
    return count


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for name_, value_ in cluster.ENVIRONMENT.items():
        os.environ.setdefault(name_, value_)
    if sys.argv[1] == "lost":
        answer(lost())
    else:
        answer({"grown": grown, "planned": planned}[sys.argv[1]](Path(sys.argv[2])))
