"""Whether the nodes of a Ray cluster launcher file have room for a run (`dra plan --cluster`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pydantic import Field

from dra_ray.config import Experiment, Frozen, Sweep, validate
from dra_ray.config.text import parse
from dra_ray.errors import ConfigError
from dra_ray.storage import Store


class NodeType(Frozen):
    """Of `available_node_types`: what one node offers, and how many there may be."""

    resources: dict[str, float] = Field(default_factory=dict)
    max_workers: int = Field(0, ge=0)


class Nodes(Frozen):
    """What a launcher file says of its nodes; all else in it is Ray's."""

    head_node_type: str
    max_workers: int = Field(2, ge=0)
    available_node_types: dict[str, NodeType]


@dataclasses.dataclass(frozen=True)
class Demand:
    """`count` workers or replicas that each need `each`, on one node."""

    role: str
    count: int
    each: Mapping[str, float]
    remedy: str


def read(file: str) -> Nodes:
    """The nodes of a launcher file; `ConfigError` names what is missing."""
    tree = parse(Store(file).read_text(), file).value
    if not isinstance(tree, dict) or not isinstance(tree.get("available_node_types"), dict):
        raise ConfigError(f"{file}: has no available_node_types; give a Ray cluster launcher file")
    types = {
        str(name): {key: kind[key] for key in NodeType.model_fields if key in kind}
        for name, kind in tree["available_node_types"].items()
        if isinstance(kind, dict)
    }
    known = {key: tree[key] for key in Nodes.model_fields if key in tree}
    return validate(Nodes, known | {"available_node_types": types}, file)


def demands(config: Sweep | Experiment, concurrent: int = 1) -> list[Demand]:
    """What runs at the same time: the workers of `concurrent` trials, and the smallest pool."""
    experiment = config.base if isinstance(config, Sweep) else config
    resources, pool = experiment.resources, experiment.pool
    worker = {
        "CPU": resources.cpus_per_worker,
        "GPU": resources.gpus_per_worker,
        **resources.custom,
    }
    fewer = "asha.max_concurrent" if isinstance(config, Sweep) else "resources.workers"
    asked = [Demand("training workers", concurrent * resources.workers, worker, fewer)]
    if (experiment.align.weight and pool.kind == "pool") or isinstance(config, Sweep):
        replica = {"CPU": pool.cpus_per_replica, "GPU": pool.gpus_per_replica, **pool.resources}
        if pool.kind == "pool":
            asked.append(
                Demand("teacher replicas", pool.min_replicas, replica, "pool.min_replicas")
            )
    return asked


def require_room(nodes: Nodes, asked: Sequence[Demand], file: str) -> list[str]:
    """A sentence per role that says where it goes; `ConfigError` with the remedy where there is no
    room.

    Each goes to the type of node that offers least besides what it needs; Ray may pack otherwise.
    """
    free: dict[str, list[dict[str, float]]] = {}
    for name, kind in nodes.available_node_types.items():
        count = 1 if name == nodes.head_node_type else min(kind.max_workers, nodes.max_workers)
        free[name] = [dict(kind.resources) for _ in range(count)]
    said = []
    for demand in asked:
        each = {name: need for name, need in demand.each.items() if need}
        placed: dict[str, int] = {}
        for number in range(demand.count):
            place = _place(each, free, nodes)
            if place is None:
                raise ConfigError(_no_room(nodes, demand, each, number, file))
            placed[place] = placed.get(place, 0) + 1
        where = ", ".join(f"{count} on {name}" for name, count in placed.items())
        said.append(f"{demand.role}: {where}")
    return said


def _place(
    each: Mapping[str, float], free: Mapping[str, list[dict[str, float]]], nodes: Nodes
) -> str | None:
    sizes = {n: sum(kind.resources.values()) for n, kind in nodes.available_node_types.items()}
    for name in sorted(free, key=lambda n: sizes[n]):
        for node in free[name]:
            if all(node.get(kind, 0.0) + 1e-9 >= need for kind, need in each.items()):
                for kind, need in each.items():
                    node[kind] -= need
                return name
    return None


def _no_room(
    nodes: Nodes, demand: Demand, each: Mapping[str, float], number: int, file: str
) -> str:
    wish = ", ".join(f"{need:g} {name}" for name, need in each.items())
    fitting = [
        name
        for name, kind in nodes.available_node_types.items()
        if all(kind.resources.get(r, 0.0) >= need for r, need in each.items())
    ]
    complaint = (
        f"{file} has room for {number} of the {demand.count} {demand.role}, which need {wish} each"
    )
    if not fitting:
        return f"{complaint}: no type of node offers that; lower what each needs, or add a type"
    return f"{complaint}; raise max_workers of '{fitting[-1]}', or lower {demand.remedy}" + (
        f" so that {number} suffice" if number else ""
    )
