"""Room on the nodes of a launcher file, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dra_ray.bench import nodes
from dra_ray.config import Asha, Experiment, Sweep, override
from dra_ray.errors import ConfigError

CLUSTER = str(Path(__file__).parents[2] / "cluster.yaml")
ON_IT = {
    "resources.gpus_per_worker": 1,
    "resources.cpus_per_worker": 7,
    "pool.gpus_per_replica": 1,
    "pool.cpus_per_replica": 1,
}


def sweep(concurrent: int) -> Sweep:
    return Sweep(
        space={"align.weight": [0, 1]},
        asha=Asha(grace_epochs=1, max_concurrent=concurrent),
        base=override(Experiment(), ON_IT),
    )


def test_our_own_cluster_takes_four_trials_and_not_five() -> None:
    known = nodes.read(CLUSTER)
    said = nodes.require_room(known, nodes.demands(sweep(4), 4), CLUSTER)
    assert said == ["training workers: 4 on student_gpu", "teacher replicas: 1 on teacher_spot"]
    with pytest.raises(ConfigError) as refused:
        nodes.require_room(known, nodes.demands(sweep(5), 5), CLUSTER)
    assert "room for 4 of the 5 training workers" in str(refused.value)
    assert "max_workers of 'student_gpu'" in str(refused.value)
    assert "asha.max_concurrent" in str(refused.value)


def test_what_no_node_offers_is_said() -> None:
    wide = override(Experiment(), ON_IT | {"resources.gpus_per_worker": 8})
    with pytest.raises(ConfigError, match="no type of node offers that"):
        nodes.require_room(nodes.read(CLUSTER), nodes.demands(wide), CLUSTER)


def test_a_file_without_nodes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="available_node_types"):
        nodes.read(str(tmp_path / "c.yaml"))
