"""Bringing a pool up and down, its status and its log."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from dra_ray import config, meters, runs
from dra_ray.errors import PoolError, StorageError
from dra_ray.pool import replica
from dra_ray.pool.exchange import NAMESPACE, open_exchange
from dra_ray.pool.ledger import find_ledger, open_ledger
from dra_ray.pool.policy import DemandPolicy
from dra_ray.pool.records import Books, LogRow, Status
from dra_ray.pool.replica import TeacherReplica
from dra_ray.pool.router import LeastOutstanding
from dra_ray.pool.rows import BatchedTeacher
from dra_ray.pool.sources import app_name
from dra_ray.storage import Store

logger = logging.getLogger("dra_ray")
DEPLOYMENT = "teacher"
START_S = 30.0  # within which Serve that another driver starts can be found
# what a question to a pool raises that is going up or down: the next one tells
_BETWEEN = (RayError, RayServeException, KeyError, ValueError)
POLICY = {
    "min_replicas",
    "max_replicas",
    "target_utilisation",
    "look_back_period_s",
    "upscale_delay_s",
    "downscale_delay_s",
    "backlog_s",
}


def log_name(number: int) -> str:
    """Of the pools of a run or a sweep, the file that the log of one goes to."""
    return f"pool-{number}.jsonl" if number else runs.POOL


def up(teacher: config.Teacher, pool: config.Pool, change: bool = False) -> str:
    """Start the pool if it is not up, wait until a replica answers, and return the application's
    name.

    A pool that is up keeps the settings of whoever brought it up, unless they are to `change`.
    Raises `PoolError` when it does not start.
    """
    make = functools.partial(
        replica.load, teacher, pool.threads_per_replica, pool.gpus_per_replica > 0
    )
    app = app_name(teacher)
    if change or app not in applications():
        deploy(app, make, pool, teacher)
    return app


def deploy(
    app: str, make: Callable[[], BatchedTeacher], pool: config.Pool, teacher: config.Teacher
) -> None:
    """Start, or change the settings of, a pool of whatever teacher `make` gives in a replica;
    `teacher` describes it to people.
    """
    autoscaling = AutoscalingConfig(
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        initial_replicas=pool.min_replicas,
        look_back_period_s=pool.look_back_period_s,
        metrics_interval_s=min(0.5, pool.look_back_period_s / 2),
        upscale_delay_s=0.0,  # the policy has its own delays
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(  # Ray's has no annotations
            policy_function=_path(DemandPolicy),
            policy_kwargs=pool.model_dump(include=POLICY),
        ),
    )
    place: dict[str, Any] = {
        "num_cpus": pool.cpus_per_replica,
        "num_gpus": pool.gpus_per_replica,
        "resources": pool.resources,
    }
    if pool.labels:
        place["label_selector"] = pool.labels
    deployment = serve.deployment(
        name=DEPLOYMENT,
        autoscaling_config=autoscaling,
        # Ray annotates these keyword arguments as dictionaries
        request_router_config=RequestRouterConfig(
            request_router_class=_path(LeastOutstanding)  # type: ignore[arg-type]
        ),
        # requests wait inside a replica, which takes them in turns and sees equal ones, and not
        # before it
        max_ongoing_requests=256,
        # a replica on its way out finishes what it has accepted; what takes longer is sent again
        # elsewhere, within the client's deadline
        graceful_shutdown_timeout_s=pool.timeout_s / 3,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,  # three in a row, and a replica counts as dead
        ray_actor_options=place,
    )(TeacherReplica)
    _start_serve()
    ledger = open_ledger(app, teacher, pool.keep)
    ledger.keep.remote(pool.keep)
    open_exchange(app, pool.window_bytes)
    try:
        serve.run(deployment.bind(make, pool), name=app, route_prefix=None)
    except RuntimeError as error:
        ray.kill(ledger)
        reason = str(error).splitlines()[0]
        raise PoolError(
            f"the teacher pool did not start ({reason}); check teacher.uri='{teacher.uri}' "
            "and pool resources"
        ) from None


def _start_serve() -> None:
    """Ray Serve, unless it runs; of several drivers that begin at the same moment one starts it,
    and the others find it there.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            serve.start(proxy_location="Disabled")  # nothing speaks HTTP here
            return
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _path(cls: type) -> str:
    """As Ray Serve imports it."""
    return f"{cls.__module__}:{cls.__name__}"


def down(app: str) -> None:
    """Stop the application and its actors."""
    with contextlib.suppress(RayError, RayServeException):
        serve.delete(app)
    for actor in ("ledger", "exchange"):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(f"{app}-{actor}", namespace=NAMESPACE))


def applications() -> set[str]:
    """Names of the pools (and other Serve applications) of this cluster."""
    try:
        return set(serve.status().applications)
    except (RayServeException, RayError, RuntimeError):  # no Serve here yet
        return set()


def replicas(app: str) -> dict[str, int]:
    """Number of replicas by state (RUNNING, STARTING, STOPPING, ...); raises `KeyError` while the
    pool is not up.
    """
    states = serve.status().applications[app].deployments[DEPLOYMENT].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items()}


def status(app: str) -> Status:
    """What `dra pool status` shows of a pool."""
    try:
        books = ray.get(find_ledger(app).books.remote())
    except ValueError:
        books = None
    return Status(app, replicas(app), books)


@contextmanager
def serving(teacher: config.Teacher, pool: config.Pool, log: Store | None = None) -> Iterator[str]:
    """The pool for the length of a `with` block; gives the application's name.

    Every driver that names the same teacher uses the same pool; the last one takes it down, unless
    `pool.keep`. The driver that brought it up writes its log: rows of pool.jsonl go to `log`.
    Raises `PoolError` when it does not come up.
    """
    logger.info("starting the teacher pool")
    was_up, driver = app_name(teacher) in applications(), uuid.uuid4().hex
    app = up(teacher, pool)
    deadline_s = time.monotonic() + pool.timeout_s
    while not _acquire(app, driver):  # another driver is taking it down at this moment
        if time.monotonic() > deadline_s:
            raise PoolError(
                f"the pool '{app}' is going down and does not end; run `dra pool down {app}` and "
                "start again"
            )
        time.sleep(0.5)
        was_up, app = False, up(teacher, pool)
    with held(app, None if was_up else log, driver):
        yield app


@contextmanager
def held(app: str, log: Store | None = None, driver: str | None = None) -> Iterator[None]:
    """Needs a pool that is up for the length of a `with` block; the last driver to leave takes it
    down, unless it is kept.
    """
    driver = driver or uuid.uuid4().hex
    try:
        with Watch(app, log, driver):
            yield
    finally:
        if _release(app, driver):
            down(app)


def _acquire(app: str, driver: str) -> bool:
    try:
        return bool(ray.get(find_ledger(app).acquire.remote(driver)))
    except (ValueError, RayError):
        return False  # it went down in between


def _release(app: str, driver: str) -> bool:
    try:
        return bool(ray.get(find_ledger(app).release.remote(driver)))
    except (ValueError, RayError):
        return False  # it is down already


class Watch:
    """Tells the ledger that this driver needs the pool, and logs the pool to a `.jsonl` file: a row
    at every change and every few seconds.

    Each has a thread of its own: the pool stays up for its drivers when the log's store is slow or
    away.
    """

    PERIOD_S, DEMAND_S = 0.5, 6.0
    EVERY_S, EVERY_AT_STORE_S = 2.0, 20.0

    def __init__(self, app: str, log: Store | None = None, driver: str | None = None) -> None:
        self._app, self._driver = app, driver
        self._stop = threading.Event()
        duties = [self._renew] * bool(driver) + [self._record] * (log is not None)
        self._threads = [
            threading.Thread(target=self._repeat, args=(duty,), daemon=True) for duty in duties
        ]
        self._unwritten = False
        self._rows = runs.Log(log, LogRow) if log is not None else None
        rows = self._rows.rows if self._rows else []
        self._before = rows[-1] if rows else LogRow(at=0.0, running=0)
        self._every_s = self.EVERY_S if log is None or log.is_local else self.EVERY_AT_STORE_S
        self._service: deque[tuple[float, float]] = deque(maxlen=64)
        self._gauges: meters.Gauges | None = None

    def __enter__(self) -> Watch:
        if self._driver:
            ray.get(find_ledger(self._app).acquire.remote(self._driver))
        # a driver without a log outlives the one that brought the pool up
        look = self._look if self._rows is None else None
        self._gauges = meters.Gauges({"teacher": self._app}, look)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._rows is not None:
            with contextlib.suppress(*_BETWEEN):
                self.log(self.sample())
        if self._gauges is not None:
            self._gauges.close()

    def sample(self) -> LogRow:
        """The pool now; demand is that of the last seconds, totals those since the log began."""
        counts = replicas(self._app)
        books: Books = ray.get(find_ledger(self._app).books.remote())
        totals, before, now = books.totals, self._before, time.time()
        self._service.append((now, totals.service_s))
        first_at, first_s = next(
            (at, service_s) for at, service_s in self._service if now - at <= self.DEMAND_S
        )
        demand = (totals.service_s - first_s) / (now - first_at) if now > first_at else 0.0
        running = counts.get("RUNNING", 0)
        target = running + counts.get("STARTING", 0) + counts.get("PENDING_ALLOCATION", 0)
        self._set_gauges(running, target, demand, books.clients)
        return LogRow(
            at=now,
            running=running,
            target=target,
            demand=round(demand, 3),
            clients=books.clients,
            requests=int(before.requests + totals.requests),
            images=int(before.images + totals.images),
            hits=int(before.hits + totals.hits),
            retries=int(before.retries + totals.retries),
        )

    def _set_gauges(self, running: int, target: int, demand: float, clients: int) -> None:
        if self._gauges is None:
            return
        self._gauges.set("dra_teacher_replicas_running", running)
        self._gauges.set("dra_teacher_replicas_target", target)
        self._gauges.set("dra_teacher_demand", round(demand, 3))
        self._gauges.set("dra_teacher_clients", clients)

    def _look(self, gauges: meters.Gauges) -> None:
        with contextlib.suppress(*_BETWEEN):
            self.sample()

    def _repeat(self, duty: Callable[[], None]) -> None:
        while not self._stop.wait(self.PERIOD_S):
            with contextlib.suppress(*_BETWEEN):
                duty()

    def _renew(self) -> None:
        find_ledger(self._app).acquire.remote(self._driver)

    def _record(self) -> None:
        assert self._rows is not None
        row = self.sample()
        last = self._rows.rows[-1] if self._rows.rows else None
        if (
            last is None
            or row.at - last.at >= self._every_s
            or (row.running, row.target, row.clients) != (last.running, last.target, last.clients)
        ):
            self.log(row)

    def log(self, row: LogRow) -> None:
        """Log a row; one warning for a store that is away, since the next success brings every
        row.
        """
        assert self._rows is not None
        try:
            self._rows.append(row)
            self._unwritten = False
        except StorageError as error:
            if not self._unwritten:
                logger.warning(
                    "%s; the pool goes on without its log until that can be written", error
                )
            self._unwritten = True
