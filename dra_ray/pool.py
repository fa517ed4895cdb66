"""The elastic teacher pool: Ray Serve replicas of a frozen teacher, shared by every trial, and the client of a step.

Ray Serve starts, replaces, drains and removes the replicas. What is added here: a policy that follows the measured
work, retries of requests that died with their replica (Serve loses them), a deadline, a bound on requests in flight,
and the pool's own numbers. One application per teacher; the noise level travels with each request, so one serves all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, RaySystemError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException
from ray.util import metrics
from torch import Tensor

from dra_ray import config
from dra_ray.errors import PoolError
from dra_ray.policy import DemandPolicy
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import FeatureSource, LocalTeacher

# What Prometheus shows, each with the prefix `ray_` (and `_total` behind a counter).
METRICS = {
    "dra_teacher_requests": "requests answered by replicas",
    "dra_teacher_images": "images encoded by replicas",
    "dra_teacher_retries": "requests sent again after a replica died or refused",
    "dra_teacher_service_seconds": "time a replica spent on a request",
    "dra_teacher_wait_seconds": "time a training step waited for its feature",
    "dra_teacher_replicas_running": "replicas that answer",
    "dra_teacher_replicas_target": "replicas that are wanted",
    "dra_teacher_demand": "work that is asked for, in replicas",
    "dra_teacher_clients": "training workers that asked lately",
}
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
DEPLOYMENT = "teacher"
# a request that ended so never ran to its end; RayTaskError, which says that it ran and failed, is not among them
_LOST = (RayActorError, RaySystemError, ObjectLostError, NodeDiedError, RayServeException, grpc.RpcError)


class TeacherReplica:
    """One replica: a frozen teacher in its own process, answering one request at a time."""

    def __init__(self, uri: str, teacher: dict[str, Any], threads: int, gpu: bool) -> None:
        settings = config.Teacher.model_validate(teacher)
        self.teacher = LocalTeacher(checkpoint.load(Store(uri)), settings, threads, "cuda" if gpu else "cpu")
        self._spans: deque[tuple[float, float]] = deque(maxlen=10_000)
        self._asked = time.monotonic()
        self._requests = metrics.Counter("dra_teacher_requests", METRICS["dra_teacher_requests"])
        self._images = metrics.Counter("dra_teacher_images", METRICS["dra_teacher_images"])
        self._service = metrics.Histogram("dra_teacher_service_seconds", METRICS["dra_teacher_service_seconds"], boundaries=_SECONDS)

    def encode(self, images: np.ndarray, labels: np.ndarray, sigma: np.ndarray, noise_seed: int) -> tuple[np.ndarray, float]:
        """(features float32 [B,D], service time in s) of one request, as `LocalTeacher.encode` gives them."""
        start = time.monotonic()
        pixels, classes, levels = (
            torch.from_numpy(np.array(part)) for part in (images, labels, sigma)
        )  # own copies: what Ray hands over is read-only
        features = self.teacher.encode(pixels, classes, levels, noise_seed).numpy()
        service_s = time.monotonic() - start
        self._spans.append((start, service_s))
        self._requests.inc()
        self._images.inc(len(images))
        self._service.observe(service_s)
        return features, service_s

    def feature_dim(self) -> int:
        return self.teacher.feature_dim

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every so often: the busy share since the last call, and the mean service time of that span."""
        now, since = time.monotonic(), self._asked
        self._asked = now
        spans = []
        while self._spans:
            spans.append(self._spans.popleft())
        busy_s = sum(service_s for _, service_s in spans)
        return {"busy": min(1.0, busy_s / max(now - since, 1e-6)), "service_s": busy_s / len(spans) if spans else 0.0}


@ray.remote(num_cpus=0, max_restarts=-1)
class Ledger:
    """Adds up what the clients of one pool report, so that anyone can read the pool's totals. Off the path of requests."""

    FRESH_S = 3.0

    def __init__(self) -> None:
        self._clients: dict[str, tuple[float, dict[str, float]]] = {}

    def record(self, client: str, totals: dict[str, float]) -> None:
        self._clients[client] = (time.monotonic(), totals)

    def totals(self) -> dict[str, float]:
        summed = {"requests": 0.0, "images": 0.0, "retries": 0.0, "service_s": 0.0}
        for _, totals in self._clients.values():
            for key in summed:
                summed[key] += totals[key]
        now = time.monotonic()
        return {**summed, "clients": sum(now - at < self.FRESH_S for at, _ in self._clients.values())}


# -- bringing it up and down ---------------------------------------------------------------------------------------
def app_name(teacher: config.Teacher) -> str:
    """The Serve application for this teacher: equal weights, layer, label use and micro-batch share one."""
    assert teacher.uri
    parts = [checkpoint.digest(Store(teacher.uri)), teacher.layer, teacher.label, teacher.micro_batch]
    return "teacher-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _ledger(app: str) -> Any:
    return Ledger.options(name=f"{app}-ledger", namespace="dra_ray", lifetime="detached", get_if_exists=True).remote()  # type: ignore[attr-defined]


def up(teacher: config.Teacher, pool: config.Pool) -> str:
    """Start the pool if it is not there, wait until a replica answers, and return the application's name."""
    app = app_name(teacher)
    serve.start(proxy_location="Disabled")
    if app in applications():
        return app
    autoscaling = AutoscalingConfig(
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        initial_replicas=pool.min_replicas,
        look_back_period_s=pool.look_back_period_s,
        metrics_interval_s=min(1.0, pool.look_back_period_s / 2),
        upscale_delay_s=0.0,  # the policy has its own delays
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=f"{DemandPolicy.__module__}:{DemandPolicy.__name__}",
            policy_kwargs=pool.model_dump(
                include={
                    "min_replicas",
                    "max_replicas",
                    "target_utilisation",
                    "look_back_period_s",
                    "upscale_delay_s",
                    "downscale_delay_s",
                    "backlog_s",
                }
            ),
        ),
    )
    deployment = serve.deployment(
        name=DEPLOYMENT,
        autoscaling_config=autoscaling,
        max_ongoing_requests=8,
        # a replica on its way out finishes what it has accepted: no request may take longer than this
        graceful_shutdown_timeout_s=pool.timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": pool.cpus_per_replica, "num_gpus": pool.gpus_per_replica, "resources": pool.resources},
    )(TeacherReplica)
    bound = deployment.bind(teacher.uri, teacher.model_dump(), pool.threads_per_replica, pool.gpus_per_replica > 0)
    try:
        serve.run(bound, name=app, route_prefix=None)
    except RuntimeError as error:
        raise PoolError(
            f"the teacher pool did not start ({str(error).splitlines()[0]}); check teacher.uri='{teacher.uri}' and pool resources"
        ) from None
    return app


def replicas(app: str) -> dict[str, int]:
    """Number of replicas by state (RUNNING, STARTING, STOPPING, ...); raises `KeyError` while the pool is not up."""
    states = serve.status().applications[app].deployments[DEPLOYMENT].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items()}


def down(app: str) -> None:
    """Stop the application and its ledger."""
    with contextlib.suppress(RayError, RayServeException):
        serve.delete(app)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(f"{app}-ledger", namespace="dra_ray"))


@contextmanager
def serving(teacher: config.Teacher, pool: config.Pool, log: Store | None = None) -> Iterator[str]:
    """The pool for the length of a `with` block; gives the application's name.

    A pool that was up before stays up after, and its log belongs to whoever brought it up; otherwise `log` receives
    pool.jsonl rows.
    """
    found = app_name(teacher) in applications()
    app = up(teacher, pool)
    if found:
        yield app
        return
    try:
        with Watch(app, log) if log is not None else contextlib.nullcontext():
            yield app
    finally:
        down(app)


def applications() -> set[str]:
    """Names of the pools (and other Serve applications) of this cluster."""
    try:
        return set(serve.status().applications)
    except (RayServeException, RayError, RuntimeError):  # no Serve here yet
        return set()


class Watch:
    """Writes what the pool does to a `.jsonl` file, a row whenever something changed and every few seconds."""

    PERIOD_S, EVERY_S = 0.5, 2.0

    def __init__(self, app: str, log: Store) -> None:
        self._app, self._log = app, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._rows: list[dict[str, Any]] = log.read_jsonl() if log.exists() else []
        self._before = {key: self._rows[-1][key] if self._rows else 0 for key in ("requests", "images", "retries")}
        self._service: deque[tuple[float, float]] = deque(maxlen=64)
        self._gauges = {
            name: metrics.Gauge(f"dra_teacher_{name}", METRICS[f"dra_teacher_{name}"])
            for name in ("replicas_running", "replicas_target", "demand", "clients")
        }

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RayError, RayServeException):
            self._rows.append(self.sample())
        self._log.write_jsonl(self._rows)

    def sample(self) -> dict[str, Any]:
        """One row: replicas, demand over the last seconds, and totals since the log began."""
        counts = replicas(self._app)
        totals = ray.get(_ledger(self._app).totals.remote())
        now = time.time()
        self._service.append((now, totals["service_s"]))
        first_at, first_s = next((row for row in self._service if now - row[0] <= 6.0), (now, totals["service_s"]))
        demand = (totals["service_s"] - first_s) / (now - first_at) if now > first_at else 0.0
        running = counts.get("RUNNING", 0)
        row = {
            "at": now,
            "running": running,
            "target": running + counts.get("STARTING", 0) + counts.get("PENDING_ALLOCATION", 0),
            "demand": round(demand, 3),
            "clients": int(totals["clients"]),
            **{key: int(self._before[key] + totals[key]) for key in self._before},
        }
        for name, key in (("replicas_running", "running"), ("replicas_target", "target"), ("demand", "demand"), ("clients", "clients")):
            self._gauges[name].set(row[key])
        return row

    def _loop(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            try:
                row = self.sample()
            except (RayError, RayServeException, KeyError):
                continue  # the pool is going up or down: the next sample tells
            last = self._rows[-1] if self._rows else None
            if last is None or row["at"] - last["at"] >= self.EVERY_S or any(row[k] != last[k] for k in ("running", "target", "clients")):
                self._rows.append(row)
                self._log.write_jsonl(self._rows)


# -- the client of a training step -----------------------------------------------------------------------------------
class PoolClient:
    """A `FeatureSource` whose features come from the pool, equal to those of `LocalTeacher` to the bit.

    Args:
        app: name of the application, as `up` gave it.
        settings: bounds and deadline.
    """

    REPORT_S = 1.0

    def __init__(self, app: str, settings: config.Pool) -> None:
        self._handle = serve.get_app_handle(app).options(_by_reference=False)
        self._settings = settings
        self._ledger = _ledger(app)
        self._name = uuid.uuid4().hex
        self._inflight: deque[Call] = deque()
        self._totals = {"requests": 0.0, "images": 0.0, "retries": 0.0, "service_s": 0.0}
        self._reported = 0.0
        self._wait = metrics.Histogram("dra_teacher_wait_seconds", METRICS["dra_teacher_wait_seconds"], boundaries=_SECONDS)
        self._retries = metrics.Counter("dra_teacher_retries", METRICS["dra_teacher_retries"])
        self.feature_dim: int = self._handle.feature_dim.remote().result(timeout_s=settings.timeout_s)

    def submit(self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seed: int) -> Call:
        """Send a request; waits first for the oldest one where `pool.max_inflight` are under way."""
        while len(self._inflight) >= self._settings.max_inflight:
            self._inflight[0].result()
        call = Call(self, tuple(part.cpu().numpy() for part in (images, labels, sigma)), noise_seed)
        self._inflight.append(call)
        return call

    def close(self) -> None:
        self._report(force=True)

    def _report(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._reported >= self.REPORT_S:
            self._reported = now
            self._ledger.record.remote(self._name, dict(self._totals))


class Call:
    """One request to the pool; `result` may be called again and gives the same."""

    def __init__(self, client: PoolClient, arrays: tuple[np.ndarray, ...], noise_seed: int) -> None:
        self._client, self._arrays, self._noise_seed = client, arrays, noise_seed
        self._features: Tensor | None = None
        self._response = self._send()

    def _send(self) -> Any:
        return self._client._handle.encode.remote(*self._arrays, self._noise_seed)

    def result(self, timeout_s: float | None = None) -> Tensor:
        """Features float32 [B,D]. A request that died with its replica is sent again until the deadline: it is a pure
        function of its arguments, so the answer is the same. Raises `PoolError` when the time is over."""
        if self._features is not None:
            return self._features
        client, start, pause_s = self._client, time.monotonic(), 0.05
        limit_s = client._settings.timeout_s if timeout_s is None else timeout_s
        while True:
            try:
                remaining_s = limit_s - (time.monotonic() - start)
                if remaining_s <= 0:
                    raise TimeoutError
                features, service_s = self._response.result(timeout_s=remaining_s)
                break
            except TimeoutError:
                raise PoolError(
                    f"the teacher pool did not answer within pool.timeout_s={limit_s:g}; see `serve status`, raise pool.max_replicas or timeout_s, "
                    "and start the run again: it resumes from its last checkpoint"
                ) from None
            except _LOST:
                client._totals["retries"] += 1
                client._retries.inc()
                time.sleep(min(pause_s, max(0.0, limit_s - (time.monotonic() - start))))
                pause_s = min(2 * pause_s, 2.0)
                self._response = self._send()
            except Exception as error:  # the teacher itself refused: sending it again changes nothing
                reason = str(getattr(error, "cause", error)).splitlines()[0]
                raise PoolError(f"the teacher failed on a request ({reason}); check teacher.uri and data.name") from error
        client._inflight.remove(self)
        client._wait.observe(time.monotonic() - start)
        for key, value in (("requests", 1), ("images", len(features)), ("service_s", service_s)):
            client._totals[key] += value
        client._report()
        self._features = torch.from_numpy(np.array(features))
        return self._features


def reserved(experiment: config.Experiment) -> tuple[float, float]:
    """(CPUs, GPUs) that the pool of this experiment may take on a machine that it shares with training workers."""
    if not experiment.align.weight or experiment.pool.kind == "local":
        return 0.0, 0.0
    return experiment.pool.max_replicas * experiment.pool.cpus_per_replica, experiment.pool.max_replicas * experiment.pool.gpus_per_replica


def source(experiment: config.Experiment, device: str) -> FeatureSource:
    """The teacher as one training worker sees it: the pool's client, or the teacher itself where `pool.kind` is local."""
    if experiment.pool.kind == "pool":
        return PoolClient(app_name(experiment.teacher), experiment.pool)
    assert experiment.teacher.uri
    return LocalTeacher(checkpoint.load(Store(experiment.teacher.uri)), experiment.teacher, experiment.pool.threads_per_replica, device)
