"""What a config wants of a cluster's nodes, whether they have room, and what an hour of them costs
(`dra plan --cluster`).

A cluster is what a Ray launcher file or a KubeRay manifest says of its node types. Requests are
placed one by one as Ray's autoscaler would: on a node that is up, else on a new one of the type
that the request fills best. Ray may pack mixed requests otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from dra_ray.config import (
    Analysis,
    Canonical,
    Config,
    Experiment,
    Frozen,
    Quickstart,
    Sweep,
    Synthesis,
    validate,
)
from dra_ray.config.text import parse
from dra_ray.errors import ConfigError
from dra_ray.plan import Plan, PlannedRow, RunPlan, SweepPlan
from dra_ray.plan.speed import Table
from dra_ray.storage import Store
from dra_ray.sweeps import spaces

HEAD = "head"
WORKERS, REPLICAS = "training workers", "teacher replicas"
_TINY = 1e-9


class NodeType(Frozen):
    """What one node offers, how many there may be, and what is rented for it."""

    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    min_workers: int = Field(0, ge=0)
    max_workers: int = Field(0, ge=0)
    instance: str | None = None
    is_spot: bool = False


class Nodes(Frozen):
    """Of a cluster; the head is a node of these types as well."""

    head_node_type: str
    max_workers: int = Field(2, ge=0)
    available_node_types: dict[str, NodeType]

    @property
    def types(self) -> dict[str, NodeType]:
        return self.available_node_types

    def most(self, name: str) -> int:
        """Nodes of a type that there may be."""
        if name == self.head_node_type:
            return 1
        return min(self.types[name].max_workers, self.max_workers)


@dataclasses.dataclass(frozen=True)
class Demand:
    """`least` to `most` workers, replicas or tasks at the same time that each need `each`, on one
    node with `labels`; tasks take turns where there is room for one.

    Attributes:
        remedy: the config's field that says how many.
        is_after: they run when the training has ended.
    """

    role: str
    least: int
    most: int
    each: Mapping[str, float]
    labels: Mapping[str, str]
    remedy: str
    is_after: bool = False


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the requests of one role go: how many to which type of node, and for how many there is
    no room.
    """

    demand: Demand
    on: Mapping[str, int]
    left: int


@dataclasses.dataclass(frozen=True)
class Packed:
    """A placement of everything that runs at the same time, and the nodes that are up for it."""

    placed: tuple[Placed, ...]
    nodes: Mapping[str, int]

    @property
    def left(self) -> Placed | None:
        """The first role that lacks room."""
        return next((placed for placed in self.placed if placed.left), None)


@dataclasses.dataclass(frozen=True)
class Price:
    """Of an hour of nodes, in the table's currency; `unknown` are instances that it does not
    have, which are not counted.
    """

    money: float
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """`role` sets the pace; None where the arithmetic does not know.

    Attributes:
        needed: replicas that keep up with the training workers.
        room: replicas that the pool may grow to on these nodes.
    """

    role: str | None
    why: str
    needed: float | None = None
    room: int | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a config finds on a cluster.

    Attributes:
        smallest: the training with the smallest pool; `largest` with the largest.
        first_after: one task of what runs after it; `after` is all of it.
        idle: the nodes that are always up.
        remedy: one line, where something lacks room.
    """

    nodes: Nodes
    smallest: Packed
    largest: Packed
    first_after: Packed
    after: Packed
    idle: Mapping[str, int]
    bottleneck: Bottleneck
    remedy: str | None

    @property
    def is_enough(self) -> bool:
        """Whether the run can start and go on to its end, if only with a smaller pool."""
        return not (self.smallest.left or self.first_after.left)


# -- reading ---------------------------------------------------------------------------------------
def read(file: str) -> Nodes:
    """The nodes of a launcher file, a RayCluster or a RayJob; `ConfigError` names what is
    missing.
    """
    tree = parse(Store(file).read_text(), file).value
    if isinstance(tree, dict) and isinstance(tree.get("available_node_types"), dict):
        return validate(Nodes, _launcher(tree), file)
    if isinstance(tree, dict) and str(tree.get("apiVersion")).startswith("ray.io/"):
        spec = tree.get("spec")
        for name in ("jobTemplate", "rayClusterSpec"):
            spec = spec.get(name, spec) if isinstance(spec, dict) else None
        if isinstance(spec, dict) and isinstance(spec.get("headGroupSpec"), dict):
            return validate(Nodes, _kuberay(spec, file), file)
    raise ConfigError(
        f"{file}: has no available_node_types and no headGroupSpec; give a Ray cluster launcher "
        "file, or a RayCluster or RayJob that makes its own cluster"
    )


def _launcher(tree: Mapping[str, Any]) -> dict[str, Any]:
    types = {}
    for name, kind in tree["available_node_types"].items():
        kind = kind if isinstance(kind, dict) else {}
        rented = kind.get("node_config") or {}
        market = rented.get("InstanceMarketOptions") or {}
        known = {
            key: kind[key]
            for key in ("resources", "labels", "min_workers", "max_workers")
            if key in kind
        }
        instance = rented.get("InstanceType") or rented.get("machineType")
        is_spot = market.get("MarketType") == "spot"
        types[name] = known | {"instance": instance, "is_spot": is_spot}
    known = {key: tree[key] for key in ("head_node_type", "max_workers") if key in tree}
    return known | {"available_node_types": types}


# labels of Kubernetes nodes; the second are Karpenter's and EKS's
_INSTANCE = "node.kubernetes.io/instance-type"
_SPOT = {"karpenter.sh/capacity-type": "spot", "eks.amazonaws.com/capacityType": "SPOT"}


def _kuberay(spec: Mapping[str, Any], file: str) -> dict[str, Any]:
    head = _group(spec["headGroupSpec"], HEAD, file)
    types = {HEAD: head}
    most = 0
    for group in spec.get("workerGroupSpecs") or ():
        name, limit = str(group.get("groupName")), group.get("maxReplicas", 0)
        least = group.get("minReplicas", 0)
        types[name] = _group(group, name, file) | {"min_workers": least, "max_workers": limit}
        most += limit if type(limit) is int else 0
    return {"head_node_type": HEAD, "max_workers": most, "available_node_types": types}


def _group(group: Mapping[str, Any], name: str, file: str) -> dict[str, Any]:
    pod = (group.get("template") or {}).get("spec") or {}
    chosen = pod.get("nodeSelector") or {}
    offered = group.get("resources")
    if not isinstance(offered, dict) or "CPU" not in offered:
        raise ConfigError(
            f"{file}: group '{name}' does not say what Ray may use of a node; add resources such "
            "as {CPU: '8', GPU: '1'}"
        )
    return {
        # others, such as memory: 8Gi, nothing of ours asks for
        "resources": {k: n for k, n in offered.items() if re.fullmatch(r"[\d.]+", str(n))},
        "labels": group.get("labels") or {},
        "instance": chosen.get(_INSTANCE),
        "is_spot": any(chosen.get(label) == value for label, value in _SPOT.items()),
    }


# -- what is asked for -----------------------------------------------------------------------------
def demands(config: Config, concurrent: int = 1) -> list[Demand]:
    """What runs at the same time, the training of `concurrent` trials first, then what comes after
    it. `ConfigError` for the quickstart, whose stages are made for one machine.
    """
    if isinstance(config, Quickstart):
        raise ConfigError(
            "--cluster: the quickstart runs on one machine; plan its sweep or another recipe"
        )
    if isinstance(config, Analysis):
        return [Demand("tasks", 1, config.workers, _each(1.0, 0.0), {}, "workers")]
    if isinstance(config, Synthesis | Canonical):
        each = _each(config.cpus_per_worker, config.gpus_per_worker)
        return [Demand("tasks", 1, config.workers, each, {}, "workers")]
    if isinstance(config, Experiment | Sweep):
        return _of_training(config, concurrent)
    resources = config.resources
    each = _each(resources.cpus_per_worker, resources.gpus_per_worker, resources.custom)
    count = resources.workers
    return [Demand(WORKERS, count, count, each, resources.labels, "resources.workers")]


def _of_training(config: Experiment | Sweep, concurrent: int) -> list[Demand]:
    base = config.base if isinstance(config, Sweep) else config
    trials = [base]
    if isinstance(config, Sweep):
        trials = list(spaces.experiments(config).values())
    resources, pool = base.resources, base.pool
    fewer = "asha.max_concurrent" if isinstance(config, Sweep) else "resources.workers"
    each = _each(resources.cpus_per_worker, resources.gpus_per_worker, resources.custom)
    least = concurrent * (resources.min_workers or resources.workers)
    most = concurrent * resources.workers
    asked = [Demand(WORKERS, least, most, each, resources.labels, fewer)]
    late = config.fidelity if isinstance(config, Sweep) else None
    if late and late.apgd_from is not None:
        verdict = _each(1.0, late.gpus_per_worker)
        asked.append(Demand("late verdicts", 1, late.workers, verdict, {}, "fidelity.workers"))
    if pools := _pools(trials, concurrent):
        replica = _each(pool.cpus_per_replica, pool.gpus_per_replica, pool.resources)
        least, most = pools * pool.min_replicas, pools * pool.max_replicas
        asked.append(Demand(REPLICAS, least, most, replica, pool.labels, "pool.max_replicas"))
    chunk = _each(1.0, resources.gpus_per_worker, resources.custom)
    attacks = Demand(
        role="AutoAttack chunks",
        least=1,
        most=base.evaluation.workers,
        each=chunk,
        labels=resources.labels,
        remedy="evaluation.workers",
        is_after=True,
    )
    return [*asked, attacks]


def _pools(trials: Sequence[Experiment], concurrent: int) -> int:
    """Teachers that are served at the same time, each by a pool of its own."""
    pooled = [set(trial.teachers) for trial in trials if trial.pool.kind == "pool"]
    if not any(pooled):
        return 0
    different = {teacher for teachers in pooled for teacher in teachers}
    return min(len(different), concurrent * max(map(len, pooled)))


def _each(cpus: float, gpus: float, custom: Mapping[str, float] | None = None) -> dict[str, float]:
    named = {"CPU": cpus, "GPU": gpus, **(custom or {})}
    return {name: amount for name, amount in named.items() if amount}


# -- placing ---------------------------------------------------------------------------------------
def fit(config: Config, planned: Plan, nodes: Nodes, table: Table, file: str) -> Fit:
    """Whether `nodes` have room for a planned config, and which role sets its pace."""
    concurrent = _concurrent(config, planned)
    asked = demands(config, concurrent)
    during = [demand for demand in asked if not demand.is_after]
    smallest = pack(nodes, during, smallest=True)
    largest = pack(nodes, during)
    late = [demand for demand in asked if demand.is_after]
    first_after, after = pack(nodes, late, smallest=True), pack(nodes, late)
    lacking = next((p.left for p in (smallest, first_after, largest, after) if p.left), None)
    return Fit(
        nodes=nodes,
        smallest=smallest,
        largest=largest,
        first_after=first_after,
        after=after,
        idle=dict(_up(nodes)),
        bottleneck=_bottleneck(config, planned, (nodes, largest), concurrent, table),
        remedy=_remedy(nodes, lacking, file) if lacking else None,
    )


def _concurrent(config: Config, planned: Plan) -> int:
    """Trials at the same time where nodes may come: the plan's own number is of this machine."""
    if isinstance(config, Sweep) and isinstance(planned, SweepPlan):
        return min(config.asha.max_concurrent, planned.trials)
    return 1


def _up(nodes: Nodes) -> Iterator[tuple[str, int]]:
    """Nodes that are up whatever runs."""
    for name, kind in nodes.types.items():
        always = 1 if name == nodes.head_node_type else kind.min_workers
        if always:
            yield name, always


def pack(nodes: Nodes, asked: Sequence[Demand], smallest: bool = False) -> Packed:
    """Place the most, or the least, of every demand, in their order."""
    up = [(name, dict(nodes.types[name].resources)) for name, n in _up(nodes) for _ in range(n)]
    placed = []
    for demand in asked:
        count = demand.least if smallest else demand.most
        on: dict[str, int] = {}
        for _ in range(count):
            name = _place(demand, nodes, up)
            if name is None:
                break
            on[name] = on.get(name, 0) + 1
        placed.append(Placed(demand, on, count - sum(on.values())))
    counts: dict[str, int] = {}
    for name, _ in up:
        counts[name] = counts.get(name, 0) + 1
    return Packed(tuple(placed), counts)


def _place(demand: Demand, nodes: Nodes, up: list[tuple[str, dict[str, float]]]) -> str | None:
    """Take one request's share of a node that is up, or of a new one, which is added to `up`."""
    here = [(name, free) for name, free in up if _takes(nodes.types[name], free, demand)]
    if here:
        name, free = max(here, key=lambda node: _fill(nodes.types[node[0]], node[1], demand))
    else:
        running = [name for name, _ in up]
        workers = sum(name != nodes.head_node_type for name in running)
        new = [
            (name, dict(kind.resources))
            for name, kind in nodes.types.items()
            if running.count(name) < nodes.most(name)
            and workers < nodes.max_workers
            and _takes(kind, kind.resources, demand)
        ]
        if not new:
            return None
        name, free = max(new, key=lambda node: _fill(nodes.types[node[0]], node[1], demand))
        up.append((name, free))
    for resource, amount in demand.each.items():
        free[resource] -= amount
    return name


def _takes(kind: NodeType, free: Mapping[str, float], demand: Demand) -> bool:
    has_room = all(free.get(name, 0.0) + _TINY >= need for name, need in demand.each.items())
    return has_room and all(
        _matches(kind.labels.get(label), wish) for label, wish in demand.labels.items()
    )


def _matches(value: str | None, wish: str) -> bool:
    """Ray's label selectors: 'a', '!a', 'in(a, b)' and '!in(a, b)'."""
    negated, wish = wish.startswith("!"), wish.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", wish)
    accepted = [item.strip() for item in listed[1].split(",")] if listed else [wish]
    return (value in accepted) != negated


_Fill = tuple[bool, int, float, float]


def _fill(kind: NodeType, free: Mapping[str, float], demand: Demand) -> _Fill:
    """How well a request suits a node, as Ray's autoscaler compares them: no GPU is kept from those
    who need one, then by the kinds of resources in common, then by how full the node gets.
    """
    spares = not kind.resources.get("GPU") or "GPU" in demand.each
    shares = [
        total * ((total - free[name] + demand.each.get(name, 0.0)) / total) ** 3
        for name, total in kind.resources.items()
        if total
    ]
    common = len(set(demand.each) & set(kind.resources))
    if not shares:
        return spares, common, 0.0, 0.0
    return spares, common, min(shares), sum(shares) / len(shares)


def _remedy(nodes: Nodes, placed: Placed, file: str) -> str:
    demand, count = placed.demand, sum(placed.on.values())
    wish = ", ".join(f"{need:g} {name}" for name, need in demand.each.items())
    wish += "".join(f", {label}={value}" for label, value in demand.labels.items())
    complaint = (
        f"{file} has room for {count} of the {count + placed.left} {demand.role}, which need "
        f"{wish} each"
    )
    able = [name for name, kind in nodes.types.items() if _takes(kind, kind.resources, demand)]
    workers = [name for name in able if name != nodes.head_node_type]
    if not able:
        return f"{complaint}: no type of node offers that; lower what each needs, or add a type"
    lower = f"lower {demand.remedy}" + (f" so that {count} suffice" if count else "")
    if not workers:
        return f"{complaint}, and only the head offers that; add a type of node, or {lower}"
    types = nodes.types
    name = max(workers, key=lambda name: _fill(types[name], types[name].resources, demand))
    more = math.ceil(placed.left / _per_node(nodes.types[name], demand))
    kind = nodes.types[name]
    raised = [f"max_workers of '{name}' to {kind.max_workers + more}"]
    total = sum(other.max_workers for other in nodes.types.values()) + more
    if total > nodes.max_workers:
        raised.append(f"the cluster's max_workers to {total}")
    return f"{complaint}; raise {' and '.join(raised)}, or {lower}"


def _per_node(kind: NodeType, demand: Demand) -> int:
    each = (int((kind.resources[name] + _TINY) / need) for name, need in demand.each.items())
    return min(each, default=1)


# -- pace and money --------------------------------------------------------------------------------
def _bottleneck(
    config: Config, planned: Plan, on_nodes: tuple[Nodes, Packed], concurrent: int, table: Table
) -> Bottleneck:
    """Replicas that keep up by the plan's arithmetic, against those that have room."""
    nodes, largest = on_nodes
    trial = planned.largest_trial if isinstance(planned, SweepPlan) else planned
    if not (isinstance(config, Experiment | Sweep) and isinstance(trial, RunPlan)):
        return Bottleneck(largest.placed[0].demand.role, "nothing else runs beside them")
    on = {placed.demand.role: placed.on for placed in largest.placed}
    if REPLICAS not in on:
        return Bottleneck(WORKERS, "no pool runs beside them")
    room, alike = sum(on[REPLICAS].values()), trial.resources.replicas_needed
    if alike is None:
        why = "the plan does not know the teacher's work; set teacher.uri"
        if trial.teacher:
            why = "students and teachers are on different kinds of device"
        return Bottleneck(None, why, None, room)
    base = config.base if isinstance(config, Sweep) else config
    ratio, said = 1.0, "devices of both taken as equally fast"
    if base.resources.gpus_per_worker:
        ratio, said = _faster(nodes, on[WORKERS], on[REPLICAS], table, base.compute.precision)
    needed = concurrent * alike * ratio
    why = f"{needed:.3g} replicas would keep up with the workers, {room} have room ({said})"
    return Bottleneck(REPLICAS if needed > room else WORKERS, why, needed, room)


def _faster(
    nodes: Nodes, workers: Mapping[str, int], replicas: Mapping[str, int], table: Table, peak: str
) -> tuple[float, str]:
    """How much faster the workers' devices are than the replicas', and by what."""
    cards = [_card(nodes, on, table) for on in (workers, replicas)]
    if not (cards[0] and cards[1]):
        return 1.0, "devices of both taken as equally fast"
    speeds = [getattr(table.gpus[card], peak) for card in cards if card]
    return speeds[0] / speeds[1], f"by the {peak} peaks of {cards[0]} and {cards[1]}"


def _card(nodes: Nodes, on: Mapping[str, int], table: Table) -> str | None:
    """The GPU of all nodes that a role is on; None where it is not one, or not known."""
    rented = {nodes.types[name].instance for name in on}
    cards = {table.instances[name].gpu if name in table.instances else None for name in rented}
    return cards.pop() if len(cards) == 1 else None


def price(nodes: Nodes, up: Mapping[str, int], table: Table) -> Price:
    """Of an hour of `up`; a spot node costs its own share of its list price, or the table's."""
    money = 0.0
    unknown: list[str] = []
    for name, count in up.items():
        kind = nodes.types[name]
        rented = table.instances.get(kind.instance or "")
        if rented is None:
            unknown.append(kind.instance or f"the instance of '{name}'")
        else:
            share = (rented.spot or table.spot) if kind.is_spot else 1.0
            money += count * rented.price * share
    return Price(money, tuple(dict.fromkeys(unknown)))


def _dearest(nodes: Nodes, table: Table) -> dict[str, int]:
    """As many nodes as the cluster allows, the dear ones first."""
    left = nodes.max_workers
    up = {nodes.head_node_type: 1}
    workers = [name for name in nodes.types if name != nodes.head_node_type]
    for name in sorted(workers, key=lambda name: -price(nodes, {name: 1}, table).money):
        if count := min(nodes.most(name), left):
            up[name] = count
            left -= count
    return up


# -- for people ------------------------------------------------------------------------------------
def rows(fit: Fit, table: Table) -> list[PlannedRow]:
    """The lines of the printed plan: a line per role, whether there is room, prices, the pace."""
    nodes, head = fit.nodes, fit.nodes.head_node_type
    lines: list[tuple[str, object, str]] = [(HEAD, {head: 1}, f"1 {_called(nodes, head)}")]
    least = (*fit.smallest.placed, *fit.first_after.placed)
    most = (*fit.largest.placed, *fit.after.placed)
    lines += [_line(nodes, low, high) for low, high in zip(least, most, strict=True)]
    verdict = "yes" if not fit.remedy else "for the least of it" if fit.is_enough else "no"
    lines.append(("is there room?", verdict, verdict))
    for what, up in (
        ("with nothing running", fit.idle),
        ("smallest pool", fit.smallest.nodes),
        ("largest pool", fit.largest.nodes),
        ("after the training", fit.after.nodes),
        ("all nodes that there may be", _dearest(nodes, table)),
    ):
        if what != "after the training" or fit.after.placed:
            cost = price(nodes, up, table)
            said = f"{cost.money:.2f} {table.currency}"
            said += "".join(f", and {name}, whose price is not known" for name in cost.unknown)
            value = dataclasses.asdict(cost) | {"currency": table.currency, "nodes": dict(up)}
            lines.append((f"an hour, {what}", value, said))
    slow = fit.bottleneck
    said = f"{slow.role or 'not known'}: {slow.why}"
    lines.append(("sets the pace", dataclasses.asdict(slow), said))
    return [PlannedRow("cluster", label, value, text) for label, value, text in lines]


def _line(nodes: Nodes, low: Placed, high: Placed) -> tuple[str, object, str]:
    demand = high.demand
    names = list(dict.fromkeys([*low.on, *high.on]))
    where = " and ".join(
        f"{_span(low.on.get(name, 0), high.on.get(name, 0))} on {_called(nodes, name)}"
        for name in names
    )
    asked = (sum(low.on.values()) + low.left, sum(high.on.values()) + high.left)
    each = ", ".join(f"{need:g} {name}" for name, need in demand.each.items())
    label = f"{demand.role}, after the training" if demand.is_after else demand.role
    text = f"{_span(*asked)}, each {each or 'nothing'}: {where or 'no room'}"
    if high.left and where:
        text += f", no room for {high.left}"
    value = {
        "least": asked[0],
        "most": asked[1],
        "each": dict(demand.each),
        "labels": dict(demand.labels),
        "on_least": dict(low.on),
        "on_most": dict(high.on),
        "without_room": high.left,
    }
    return label, value, text


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _called(nodes: Nodes, name: str) -> str:
    kind = nodes.types[name]
    rented = [kind.instance] if kind.instance else []
    rented += ["spot"] if kind.is_spot else []
    return f"{name} ({', '.join(rented)})" if rented else name
