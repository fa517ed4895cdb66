"""`dra bench pool`: one stream of requests through a teacher in process, plain Ray actors and the
pool, and what a step pays.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor

from dra_ray import cluster, config, data
from dra_ray.errors import RunError
from dra_ray.pool import client as pool_client
from dra_ray.pool import service
from dra_ray.pool.rows import BatchedTeacher
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Pending, Ready, Request
from dra_ray.training import arithmetic, step

CHANNELS, RESOLUTION, CLASSES, FEATURES = 3, 32, 10, 256
IN_FLIGHT = 4
MICRO_BATCH = 64
TURNS = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One way to a teacher, with requests of `batch` images."""

    teacher: str
    way: str
    batch: int
    images_per_s: float  # with IN_FLIGHT requests under way
    p50_ms: float  # of a request alone
    p99_ms: float
    vs_actors: float | None = None  # a pool's throughput over that of as many plain actors

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class StepCost:
    """What a training step pays for alignment through the pool."""

    step_overhead: float  # time of a step over that of one without alignment
    step_s: float  # without
    service_s: float  # of the teacher, per step
    step_waited_s: float


@dataclass(frozen=True)
class Figures:
    """All that `dra bench pool` measures."""

    step: StepCost
    throughput_vs_actors: float
    noop_p50_ms: float
    lockstep_teacher_work: float
    scale_up_s: float
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        facts = vars(self) | {"rows": [row.as_json() for row in self.rows]}
        del facts["step"]
        return vars(self.step) | facts


class Source(Protocol):
    def submit(self, request: Request) -> Pending: ...


# -- teachers --------------------------------------------------------------------------------------
class Waiting:
    """A teacher that takes a fixed time for a micro-batch by waiting: hardware of its own, as the
    students see it.

    With no time at all it does nothing, and what is left is the way there and back.
    """

    def __init__(self, service_s: float = 0.0, micro_batch: int = MICRO_BATCH) -> None:
        self._service_s, self.micro_batch, self.feature_dim = service_s, micro_batch, FEATURES

    def check(self, request: Request) -> None:
        """Takes anything."""

    def encode(self, request: Request) -> Tensor:
        if self._service_s:
            time.sleep(self._service_s)
        return torch.zeros(len(request), self.feature_dim)

    def sample(self) -> Request:
        images = torch.zeros(1, CHANNELS, 1, 1, dtype=torch.uint8)
        return Request.seeded(images, torch.zeros(1, dtype=torch.int64), torch.ones(1), 0)


def small() -> LocalTeacher:
    """A real network, an EDM of CPU size with random weights, on one thread."""
    torch.manual_seed(0)
    net = EDM(
        config.UNet(model_channels=32, channel_mult=(1, 2)),
        RESOLUTION,
        CHANNELS,
        CLASSES,
        sigma_data=0.5,
    )
    return LocalTeacher(net, config.Teacher(micro_batch=MICRO_BATCH), threads=1)


TEACHERS: dict[str, Callable[[], BatchedTeacher]] = {
    "real": small,
    "no-op": functools.partial(Waiting, 0.0, 512),
}


# -- ways to a teacher -----------------------------------------------------------------------------
class InProcess:
    def __init__(self, teacher: BatchedTeacher) -> None:
        self._teacher = teacher

    def submit(self, request: Request) -> Ready:
        return Ready(_encode(self._teacher, request))


def _encode(teacher: BatchedTeacher, request: Request) -> Tensor:
    return torch.cat([teacher.encode(part) for part in request.split(teacher.micro_batch)])


@ray.remote(num_cpus=0)
class PlainActor:
    def __init__(self, make: Callable[[], BatchedTeacher]) -> None:
        self._teacher = make()

    def encode(self, request: Request) -> np.ndarray:
        return _encode(self._teacher, request).numpy()


class Actors:
    """A fixed number of plain actors, the one with the fewest requests first."""

    def __init__(self, make: Callable[[], BatchedTeacher], count: int) -> None:
        self._actors = [PlainActor.remote(make) for _ in range(count)]  # type: ignore[attr-defined]
        self._under_way: list[list[Any]] = [[] for _ in self._actors]

    def submit(self, request: Request) -> _ActorCall:
        for queue in self._under_way:
            queue[:] = ray.wait(queue, num_returns=len(queue), timeout=0)[1] if queue else []
        number = min(range(len(self._actors)), key=lambda index: len(self._under_way[index]))
        ref = self._actors[number].encode.remote(request)
        self._under_way[number].append(ref)
        return _ActorCall(ref)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _ActorCall:
    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def result(self, timeout_s: float | None = None) -> Tensor:
        return torch.from_numpy(np.array(ray.get(self._ref)))


def _settings(low: int, high: int) -> config.Pool:
    return config.Pool(
        min_replicas=low,
        max_replicas=high,
        cpus_per_replica=0.0,
        look_back_period_s=2,
        upscale_delay_s=0,
        downscale_delay_s=5,
        backlog_s=1,
    )


@contextlib.contextmanager
def _pool(
    name: str, make: Callable[[], BatchedTeacher], low: int, high: int
) -> Iterator[Callable[[str], pool_client.PoolClient]]:
    """A pool of that teacher; gives what makes a client of it."""
    app, settings = f"teacher-bench-{name}", _settings(low, high)
    service.deploy(app, make, settings, config.Teacher(uri=name))
    with service.held(app):
        if not cluster.wait_until(lambda: service.replicas(app).get("RUNNING", 0) >= low, 60):
            raise RunError(
                f"the pool of {low} replicas did not start within 60 s; see `ray status`"
            )
        yield lambda trial: pool_client.PoolClient(app, settings, trial)
    cluster.wait_until(lambda: app not in service.applications(), 30)


# -- measurements ----------------------------------------------------------------------------------
def compare(rounds: int, student: str, batch: int, steps: int, say: Say) -> Figures:
    """Ray must have been initialised.

    `throughput_vs_actors` is the least, over batch sizes and one or two replicas, of the pool's
    throughput over that of as many plain actors, with the real teacher.
    """
    rows = []
    for name, make in TEACHERS.items():
        for size in (64, 512):
            count = rounds * TURNS * (64 if name == "no-op" else max(4, 512 // size))
            say(f"{name} teacher, {count} requests of {size} images each way")
            rows += _ways(name, make, size, count)
    vs_actors = min(row.vs_actors for row in rows if row.teacher == "real" and row.vs_actors)
    noop = next(
        row for row in rows if (row.teacher, row.way, row.batch) == ("no-op", "pool of 1", 512)
    )
    say("four trials in lock-step")
    lockstep = lockstep_work()
    say("a load step")
    scale_up_s = scale_up()
    say(f"training steps of {student}, batch {batch}")
    cost = step_overhead(student, batch, steps)
    return Figures(cost, vs_actors, noop.p50_ms, lockstep, scale_up_s, rows)


def _ways(name: str, make: Callable[[], BatchedTeacher], size: int, count: int) -> list[Row]:
    """Rows of one teacher and batch size. Actors and pool of a size are up together and take turns,
    so that a slow moment of the machine hits both; their ratio is the median over the turns.
    """
    stream = [_request(size, number) for number in range(8)]
    rows = [_row(name, "in process", size, *_measured([InProcess(make())], stream, count)[0])]
    for number in (1, 2):
        actors = Actors(make, number)
        with _pool(f"{name}-{size}-{number}", make, number, number) as client:
            plain, pooled = _measured([actors, client("bench")], stream, count)
        actors.close()
        ratio = statistics.median(
            theirs / ours for theirs, ours in zip(plain[0], pooled[0], strict=True)
        )
        rows += [
            _row(name, f"{number} plain actor{'s' * (number - 1)}", size, *plain),
            replace(_row(name, f"pool of {number}", size, *pooled), vs_actors=ratio),
        ]
    return rows


Measured = tuple[list[float], list[float]]  # seconds per image of each turn, latencies in ms


def _measured(sources: list[Source], stream: list[Request], count: int) -> list[Measured]:
    """`TURNS` turns of each source, of `count` requests in all with `IN_FLIGHT` under way, and then
    as many one by one.
    """
    for source in sources:
        for call in [
            source.submit(request) for request in stream[:IN_FLIGHT]
        ]:  # all replicas are warm
            call.result()
    each = max(1, count // TURNS)
    measured: list[Measured] = [([], []) for _ in sources]
    for _ in range(TURNS):
        for source, (spent, latencies) in zip(sources, measured, strict=True):
            begun_s = time.perf_counter()
            under_way: deque[Pending] = deque()
            for number in range(each):
                if len(under_way) == IN_FLIGHT:
                    under_way.popleft().result()
                under_way.append(source.submit(stream[number % len(stream)]))
            while under_way:
                under_way.popleft().result()
            spent.append((time.perf_counter() - begun_s) / (each * len(stream[0])))
            for number in range(max(2, each // 4)):
                begun_s = time.perf_counter()
                source.submit(stream[number % len(stream)]).result()
                latencies.append(1000 * (time.perf_counter() - begun_s))
    return measured


def _row(teacher: str, way: str, size: int, spent: list[float], latencies: list[float]) -> Row:
    low, high = np.percentile(latencies, [50, 99])
    return Row(teacher, way, size, 1 / statistics.median(spent), float(low), float(high))


def _request(size: int, number: int) -> Request:
    draws = torch.Generator().manual_seed(number)
    images = torch.randint(
        256, (size, CHANNELS, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=draws
    )
    labels = torch.randint(CLASSES, (size,), generator=draws)
    return Request.seeded(images, labels, torch.full((size,), 0.06), 1000 * number)


def lockstep_work(trials: int = 4, requests: int = 30, service_s: float = 0.05) -> float:
    """Teacher time of `trials` clients with equal requests, over that of one; two replicas."""

    def follow(client: pool_client.PoolClient, seed: int) -> None:
        for number in range(requests):
            client.submit(_request(MICRO_BATCH, seed + number)).result()
            time.sleep(0.02)

    with _pool("lockstep", functools.partial(Waiting, service_s), 2, 2) as make:
        alone = make("alone")
        follow(alone, 10_000)
        clients = [make(f"trial-{number}") for number in range(trials)]
        threads = [threading.Thread(target=follow, args=(client, 0)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(client.totals.service_s for client in clients) / alone.totals.service_s


def scale_up(clients: int = 4, service_s: float = 0.2) -> float:
    """Seconds from the first request of a load that needs two replicas to the decision for the
    second.
    """
    stop = threading.Event()

    def load(client: pool_client.PoolClient, seed: int) -> None:
        number = seed
        while not stop.is_set():
            client.submit(_request(MICRO_BATCH, number)).result()
            number += 1

    with _pool("load", functools.partial(Waiting, service_s), 1, 2) as make:
        sources = [make(f"trial-{number}") for number in range(clients)]
        time.sleep(5)  # an idle pool
        threads = [
            threading.Thread(target=load, args=(source, 1000 * number))
            for number, source in enumerate(sources)
        ]
        begun_s = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            decided = cluster.wait_until(
                lambda: sum(service.replicas("teacher-bench-load").values()) > 1, 30, 0.05
            )
            taken_s = time.monotonic() - begun_s
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    if not decided:
        raise RunError("the pool did not grow within 30 s of a load step")
    return taken_s


def step_overhead(student: str, batch: int, steps: int) -> StepCost:
    """Time of a TRADES-10 step with alignment through the pool over one without, in turn; the
    teacher takes half a step and no core.

    What is left is the projector's arithmetic, sending, receiving, and waiting if there is any.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    shape = data.Shape(
        CLASSES, CHANNELS, RESOLUTION, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    )
    plain = config.Experiment(
        model=config.Model(name=student),
        data=config.Data(crop_pad=0, flip=False),
        align=config.Align(weight=0.0),
        optim=config.Optim(batch=batch, lr=0.01),
    )
    aligned = config.override(plain, {"align.weight": 1.0, "teacher.uri": "bench"})
    device, mine = torch.device("cpu"), slice(0, batch)
    arithmetic.prepare(plain.compute, torch.get_num_threads())
    request = _request(batch, 0)
    images, labels = request.images, request.labels
    without, _ = step.initial_state(plain, shape, (), device)
    bare = step.Feed(plain, lambda number: (images, labels), mine, (), 2 + steps)
    first_s = [_timed(without, plain, bare, mine) for _ in range(2)]
    service_s = first_s[1] / 2 / -(-batch // MICRO_BATCH)
    with _pool("step", functools.partial(Waiting, service_s), 1, 1) as make:
        client = make("bench")
        state, _ = step.initial_state(aligned, shape, [client], device)
        feed = step.Feed(aligned, lambda number: (images, labels), mine, [client], 1 + steps)
        _timed(state, aligned, feed, mine)
        pairs = [
            (_timed(state, aligned, feed, mine), _timed(without, plain, bare, mine))
            for _ in range(steps)
        ]
        waited_s = client.totals.wait_s / (1 + steps)
    return StepCost(
        step_overhead=statistics.median(with_s / without_s for with_s, without_s in pairs),
        step_s=statistics.median(without_s for _, without_s in pairs),
        service_s=service_s * -(-batch // MICRO_BATCH),
        step_waited_s=waited_s,
    )


def _timed(state: step.State, experiment: config.Experiment, feed: step.Feed, mine: slice) -> float:
    begun_s = time.perf_counter()
    step.step(state, experiment, feed.take(state.step), mine)
    state.step += 1
    return time.perf_counter() - begun_s
