"""cluster.yaml: what Ray's own validation accepts, and what it does not look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from dra_ray import cluster as ray_cluster
from dra_ray.config import Experiment, override, parse_settings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def node_types() -> dict[str, dict[str, Any]]:
    return cluster()["available_node_types"]


def test_ray_accepts_it():
    validate_config(prepare_config(cluster()))


def test_ray_rejects_what_it_should():
    """The validation that accepts our file does look: an unknown key and a fractional resource are
    refused.
    """
    wrong = cluster()
    wrong["available_node_types"]["student_gpu"]["resourses"] = {}
    with pytest.raises(Exception, match="resourses"):
        validate_config(prepare_config(wrong))
    wrong = cluster()
    wrong["available_node_types"]["student_gpu"]["resources"]["GPU"] = 0.5
    with pytest.raises(Exception, match=r"0\.5"):
        validate_config(prepare_config(wrong))


def test_every_node_says_what_to_rent():
    assert re.fullmatch(r"[a-z]{2}-[a-z]+-\d", cluster()["provider"]["region"])
    for name, node in node_types().items():
        assert {"InstanceType", "ImageId", "IamInstanceProfile"} <= node["node_config"].keys(), name
        assert node["labels"]["pool"], name
        assert all(type(amount) is int for amount in node["resources"].values()), name
    assert re.match(
        r"m\d", node_types()["head"]["node_config"]["InstanceType"]
    )  # no GPU is paid for on the head


def test_only_teachers_are_on_spot():
    spot = {
        name
        for name, node in node_types().items()
        if node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    }
    assert (
        spot
        == {name for name, node in node_types().items() if "teacher" in node["resources"]}
        == {"teacher_spot"}
    )


def test_workers_scale_from_none_and_back():
    workers = {
        name: node for name, node in node_types().items() if name != cluster()["head_node_type"]
    }
    for name, node in workers.items():
        assert node["min_workers"] == 0 < node["max_workers"], name
        assert 0 < node["idle_timeout_s"] <= 600, name
    assert node_types()["head"]["max_workers"] == 0
    assert cluster()["max_workers"] == sum(node["max_workers"] for node in workers.values())


def test_a_worker_and_a_replica_fit_their_nodes():
    """The settings that the comments in the file name ask for no more than one node offers."""
    settings = re.findall(r"((?:resources|pool)\.\w+=(?:\{[^}]*\}|\d+))", TEXT)
    asked = override(Experiment(), parse_settings(settings))
    assert len(settings) == 4
    student, teacher = (
        node_types()["student_gpu"]["resources"],
        node_types()["teacher_spot"]["resources"],
    )
    assert teacher["CPU"] < asked.resources.cpus_per_worker <= student["CPU"]
    assert 0 < asked.resources.gpus_per_worker <= student["GPU"]
    assert asked.pool.cpus_per_replica == teacher["CPU"]
    assert asked.pool.gpus_per_replica == teacher["GPU"]
    assert all(amount <= teacher[name] for name, amount in asked.pool.resources.items())


def test_every_node_needs_the_token():
    config = cluster()
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for role in ("head", "worker"):
        start = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert len(start) == 1
        assert "export RAY_AUTH_MODE=token" in start[0]
        assert "--metrics-export-port=8080" in start[0]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_ray_processes_inherit_the_pace_of_reports_and_metrics():
    """What the driver sets for a cluster of its own must be exported here: the processes of this
    one are started first.
    """
    paced = {name for name in ray_cluster.ENVIRONMENT if name.endswith("INTERVAL_S")}
    assert len(paced) >= 3
    for role in ("head", "worker"):
        start = next(
            line for line in cluster()[f"{role}_start_ray_commands"] if "ray start" in line
        )
        assert paced <= set(re.findall(r"\b([A-Z_]+)=[\d.]+", start.partition("ray start")[0]))


def test_no_secret_is_in_the_file():
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|aws_secret|RAY_AUTH_TOKEN=|\b[0-9a-f]{64}\b|\b\d{12}\b",
        TEXT,
        re.IGNORECASE,
    )


def test_mounts_are_files_of_the_repository_and_versions_agree():
    mounts = [local for local in cluster()["file_mounts"].values() if not local.startswith("~")]
    assert [local for local in mounts if not (ROOT / local).exists()] == []
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert cluster()["docker"]["image"].startswith(f"rayproject/ray:{pins['ray']}-py311")
    assert pins["boto3"] == pins["botocore"]


def test_what_a_user_edits_stands_in_one_block():
    """Every value of the block is taken by name further down, where no such value is written."""
    block, _, rest = TEXT.partition("# -- how it hangs together")
    names = re.findall(r"&(\w+)", block)
    assert len(names) >= 10
    assert [name for name in names if not re.search(rf"\*{name}\b", rest)] == []
    values = re.findall(r"&\w+ ([\w./:-]{6,})", block)
    assert len(values) >= 5
    code = "\n".join(line.partition("#")[0] for line in rest.splitlines())
    assert [value for value in values if re.search(rf": {re.escape(value)}$", code, re.M)] == []
