"""A cluster of three nodes in a process of its own, and what happens to a run when one of them
goes: `python -m tests.cluster.nodes FOLDER`.

Answers with what was seen. Run by test_nodes.py, since a second Ray in the tests' own
process would meet theirs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from dra_ray import cluster, runs
from dra_ray.storage import Store
from tests.cluster.apart import answer

# port None: any that is free; 8265 may be that of the cluster which other tests share
HEAD = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}
NODE = {"num_cpus": 1, "resources": {"student": 1}}


def main(root: Store) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    for name, value in cluster.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    nodes = Cluster(initialize_head=True, head_node_args=HEAD)
    workers = [nodes.add_node(**NODE), nodes.add_node(**NODE)]
    ray.init(nodes.address, log_to_driver=False)
    command = [
        sys.executable,
        "-m",
        "dra_ray",
        "train",
        (root / "experiment.json").uri,
        "--storage",
        root.uri,
        "--name",
        "run",
    ]
    driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": nodes.address})
    run = root / "run"
    _until(lambda: len(_rows(run / "steps.jsonl")) >= 3, 120)
    node = _node_of_a_worker(workers)
    notice = [
        "drain-node",
        "--address",
        nodes.address,
        "--node-id",
        node.node_id,
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
    ]
    before = _starts(run)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            *notice,
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            "20",
        ],
        check=True,
    )
    _until(lambda: bool(_between(run)), 30)
    checkpoints = _between(run)
    nodes.remove_node(node, allow_graceful=False)
    _until(lambda: len(_starts(run)) > len(before), 120)
    driver.send_signal(signal.SIGTERM)
    answer({"checkpoints": checkpoints, "rc": driver.wait(120), "starts": _starts(run)})


def _starts(run: Store) -> list[dict[str, Any]]:
    manifest = runs.read_manifest(run)
    return [start.on_disk() for start in manifest.world_sizes] if manifest else []


def _rows(file: Store) -> list[dict[str, Any]]:
    return file.read_jsonl() if file.exists() else []


def _between(run: Store) -> list[int]:
    """Steps of the checkpoints that lie between validations."""
    folder = run / "checkpoints" / run.name
    names = (
        [name for name in folder.names() if name.startswith("checkpoint_2")]
        if folder.exists()
        else []
    )
    states = [folder / name / "state.json" for name in names]
    steps = [state.read_json() for state in states if state.exists()]
    validated = {row["step"] for state in steps for row in state["rows"]}
    return [state["step"] for state in steps if state["step"] not in validated]


def _node_of_a_worker(workers: list[Any]) -> Any:
    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    used = {actor.node_id for actor in actors if actor.class_name == "RayTrainWorker"}
    return next(node for node in workers if node.node_id in used)


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    if not cluster.wait_until(condition, timeout_s):
        raise SystemExit(f"waited {timeout_s:g} s in vain")


if __name__ == "__main__":
    main(Store(sys.argv[1]))
