"""jobs/kubernetes/ and jobs/skypilot/: what the operators would accept, and what they do not look
at.

Three checks stand for the one that needs a cluster: fields and types against a table of facts from
the published definitions, Ray's own reading of a RayCluster, and the definitions themselves where
DRA_CRDS names a folder of them.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from dra_ray.plan import nodes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "jobs" / "kubernetes"
FILES = ("account", "kueue", "nightly-evaluation", "raycluster", "rayjob")
FIELDS = yaml.safe_load((Path(__file__).parent / "kubernetes_fields.yaml").read_text())
METADATA = {"name*": "text", "labels": "strings", "annotations": "strings"}
LEAVES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "quantity": {"type": ["string", "integer"]},
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantities": {"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    return spec.get("jobTemplate", spec).get("rayClusterSpec", spec)


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def schema(fields: Any) -> dict[str, Any]:
    """A JSON schema of the notation in kubernetes_fields.yaml."""
    if isinstance(fields, list):
        return {"type": "array", "items": schema(fields[0])}
    if isinstance(fields, dict):
        return {
            "type": "object",
            "properties": {name.rstrip("*"): schema(below) for name, below in fields.items()},
            "required": [name[:-1] for name in fields if name.endswith("*")],
            "additionalProperties": False,
        }
    return LEAVES.get(fields) or {"enum": fields.split("|")}


def problems(document: dict[str, Any]) -> list[str]:
    kind = f"{document['apiVersion']}/{document['kind']}"
    whole = {"apiVersion*": "text", "kind*": "text", "metadata*": METADATA} | FIELDS[kind]
    found = jsonschema.Draft202012Validator(schema(whole)).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("name", FILES)
def test_fields_are_known_and_of_their_types(name: str) -> None:
    assert [problem for each in documents(name) for problem in problems(each)] == []


def test_every_file_is_looked_at() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(FILES)


def test_a_misspelt_or_missing_field_or_wrong_type_fails() -> None:
    wrong = copy.deepcopy(documents("raycluster")[0])
    wrong["spec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    assert any("maxReplica'" in problem for problem in problems(wrong))
    wrong = copy.deepcopy(documents("rayjob")[0])
    del wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["groupName"]
    assert any("groupName" in problem for problem in problems(wrong))
    wrong = copy.deepcopy(documents("nightly-evaluation")[0])
    wrong["spec"]["jobTemplate"]["rayClusterSpec"]["authOptions"]["mode"] = "Token"
    assert any("Token" in problem for problem in problems(wrong))
    wrong = copy.deepcopy(documents("kueue")[3])
    wrong["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["nominalQuota"] = [1]
    assert problems(wrong)


def strict(tree: Any) -> Any:
    """A published definition with what the API server adds: unknown fields are refused, and a
    quantity may be a number.
    """
    if isinstance(tree, list):
        return [strict(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    below = {name: strict(value) for name, value in tree.items()}
    if tree.get("x-kubernetes-int-or-string"):
        below.pop("type", None)
    is_closed = "properties" in tree and "additionalProperties" not in tree
    if tree.get("type") == "object" and is_closed:
        open_ended = tree.get("x-kubernetes-preserve-unknown-fields", False)
        below["additionalProperties"] = bool(open_ended)
    return below


@pytest.mark.skipif("DRA_CRDS" not in os.environ, reason="DRA_CRDS names no folder of definitions")
@pytest.mark.parametrize("name", [name for name in FILES if name != "account"])
def test_the_published_definitions_accept_it(name: str) -> None:
    published: dict[tuple[str, str], Any] = {}
    for file in Path(os.environ["DRA_CRDS"]).glob("*.yaml"):
        spec = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            published[key] = version["schema"]["openAPIV3Schema"]
    for document in documents(name):
        definition = copy.deepcopy(published[document["apiVersion"], document["kind"]])
        definition["properties"]["metadata"] = {}
        jsonschema.Draft202012Validator(strict(definition)).validate(document)


def test_ray_reads_the_nodes_of_cluster_yaml_from_it() -> None:
    """Ray's autoscaler derives from the RayCluster the types of node that cluster.yaml has."""
    document = documents("raycluster")[0]
    document["metadata"]["namespace"] = "default"
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(document)
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    here = derived["available_node_types"]
    names = {"head": "headgroup", "student_gpu": "student-gpu", "teacher_spot": "teacher-spot"}
    assert set(here) == set(names.values())
    for name, kind in launcher["available_node_types"].items():
        there = here[names[name]]
        offered = {key: value for key, value in there["resources"].items() if key != "memory"}
        assert offered == kind["resources"], name
        assert there["labels"] == kind["labels"]
        assert there["max_workers"] == kind["max_workers"]
        if name != launcher["head_node_type"]:
            assert there["idle_timeout_s"] == kind["idle_timeout_s"]
            assert there["min_workers"] == kind["min_workers"]
    assert derived["max_workers"] == launcher["max_workers"]
    assert derived["idle_timeout_minutes"] == launcher["idle_timeout_minutes"]


def test_the_plan_reads_the_same_nodes_from_both() -> None:
    ours = nodes.read(str(ROOT / "cluster.yaml"))
    for name in ("raycluster", "rayjob"):
        theirs = nodes.read(str(FOLDER / f"{name}.yaml"))
        assert theirs.max_workers == ours.max_workers
        for there, here in (("student-gpu", "student_gpu"), ("teacher-spot", "teacher_spot")):
            assert theirs.types[there] == ours.types[here]


def test_jobs_have_the_cluster_that_stays() -> None:
    cluster = cluster_spec("raycluster")
    assert cluster_spec("rayjob") == cluster
    nightly = cluster_spec("nightly-evaluation")
    students = [group for group in cluster["workerGroupSpecs"] if "student" in group["resources"]]
    assert nightly == cluster | {"workerGroupSpecs": students}  # AutoAttack needs no teacher


@pytest.mark.parametrize("name", ["nightly-evaluation", "raycluster", "rayjob"])
def test_every_pod_needs_the_token_and_brings_no_key(name: str) -> None:
    spec = cluster_spec(name)
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    paced = dict(re.findall(r"\b([A-Z_]+_S)=([\d.]+)", str(launcher["head_start_ray_commands"])))
    assert len(paced) == 4
    assert spec["authOptions"] == {"mode": "token"}
    pins = (ROOT / "constraints.txt").read_text()
    assert f"ray=={spec['rayVersion']}\n" in pins
    account = documents("account")[0]["metadata"]["name"]
    for pod in pods(spec):
        assert pod["serviceAccountName"] == account
        container = pod["containers"][0]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == paced
        assert "cpu" not in container["resources"]["limits"]  # no throttling
    text = (FOLDER / f"{name}.yaml").read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{64}\b|\b\d{12}\b|kind: Secret", text
    )


def test_the_quota_is_what_the_groups_may_come_to() -> None:
    spec, queue = cluster_spec("raycluster"), documents("kueue")[3]
    assert queue["kind"] == "ClusterQueue"
    flavors = {flavor["name"]: flavor for flavor in queue["spec"]["resourceGroups"][0]["flavors"]}
    declared = {each["metadata"]["name"]: each for each in documents("kueue")[:3]}
    assert set(declared) == set(flavors)
    for group in spec["workerGroupSpecs"]:
        name = group["labels"]["pool"]
        pod = group["template"]["spec"]
        for label, value in declared[name]["spec"]["nodeLabels"].items():
            assert pod["nodeSelector"][label] == value
        quota = {each["name"]: each["nominalQuota"] for each in flavors[name]["resources"]}
        for resource, request in pod["containers"][0]["resources"]["requests"].items():
            each, unit = re.fullmatch(r"(\d+)(\D*)", request).groups()  # type: ignore[union-attr]
            assert quota[resource] == f"{int(each) * group['maxReplicas']}{unit}", (name, resource)
    local = documents("kueue")[4]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    asked = documents("rayjob")[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert asked == local["metadata"]["name"] == "default"


def test_the_image_has_what_the_manifests_start() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert f"FROM {launcher['docker']['image']}\n" in text
    mounted = [local for local in launcher["file_mounts"].values() if not local.startswith("~")]
    assert all(re.search(rf"COPY .*\b{re.escape(local)}\b", text) for local in mounted)
    scripts = re.findall(r"/home/ray/jobs/(\w+\.py)", (FOLDER / "rayjob.yaml").read_text())
    assert scripts
    assert all((ROOT / "jobs" / script).exists() for script in scripts)


def test_the_skypilot_task_is_of_known_fields_and_brings_no_token() -> None:
    """Field names of SkyPilot's YAML reference; its nodes pace Ray as cluster.yaml's do."""
    text = (ROOT / "jobs" / "skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    known = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run"}
    assert set(task) <= known
    assert set(task["resources"]) <= {"accelerators", "cpus", "memory", "disk_size", "use_spot"}
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert task["envs"]["RAY_AUTH_MODE"] == "token"
    paces = {entry["name"] for entry in next(pods(cluster_spec("rayjob")))["containers"][0]["env"]}
    assert paces <= set(task["envs"])
    assert "ray stop" not in task["run"]  # SkyPilot has a Ray of its own
    assert not re.search(r"\b[0-9a-f]{64}\b|AKIA[0-9A-Z]{16}", text)
