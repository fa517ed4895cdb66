"""Joining Ray: the cluster named by RAY_ADDRESS, or one of our own on this machine that leaves with
us.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import auto_init_hook, ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.experimental import internal_kv
from ray.train import UserCallback
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from dra_ray import meters, runs
from dra_ray.config import Resources
from dra_ray.errors import ConfigError, DraError, LastingError, RunError, is_lasting
from dra_ray.runs import R
from dra_ray.storage import Store, cache

log = logging.getLogger("dra_ray")

# Read by Ray when a process starts. Metrics of the pool are pushed often, so that it scales within
# seconds; Train waits for its controller's poll at every report, so that poll is short.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    # ten times a second takes a sixth of a laptop's core
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "OMP_NUM_THREADS": "1",  # every workload sets its own number of threads
    "PYTHONWARNINGS": "ignore",
}


# set where the cluster is one that we started on this machine, for every process of it
_OURS = "DRA_RAY_LOCAL"
_LOOPBACK = "127.0.0.1"
_NAMESPACE = "dra_ray"  # of our keys on the head node
_SERVE = ("SERVE_CONTROLLER_ACTOR", "serve")  # Ray's name and namespace
_ANSWER_S, _END_OF_SERVE_S = 10.0, 30.0  # for an answer of one of Ray's own actors, and its end
_TEMPORARY = "tmp-"  # and the process that started the cluster


@contextmanager
def connect(num_cpus: int | None = None) -> Iterator[Any]:
    """Ray for the length of a `with` block; gives what `ray.init` returned.

    With RAY_ADDRESS set (every Ray job has it) we join that cluster, with the user's own
    authentication, and leave it running; otherwise we start one on this machine, dashboard included
    (Ray Train frees the slots of a stopped trial through it), and stop it at the end. Nobody else
    gets into that one: it listens on the loopback interface only and wants a token that lives in
    the environment of its processes, and nobody else reads its logs.

    Args:
        num_cpus: slots of a cluster that we start; default: the cores of the machine.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        log.info("joining the Ray cluster at %s", os.environ["RAY_ADDRESS"])
        with ray.init(address="auto", **quiet) as context, meters.of_stores():
            yield context
        return
    log.info("starting Ray on this machine")
    with _private(), _temporary_folder() as folder, _started(num_cpus, folder, quiet) as context:
        try:
            with meters.of_stores():
                yield context
        finally:
            # only where a pool has brought it in
            if "ray.serve" in sys.modules:
                _end_serve()


@contextmanager
def connect_to_running() -> Iterator[Any]:
    """As `connect`, but only where RAY_ADDRESS names a cluster: `ConfigError` otherwise."""
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS is not set; a pool lives in a running cluster, so set it to the cluster's "
            "address, such as auto on its head"
        )
    with connect() as context:
        yield context


def _started(num_cpus: int | None, temporary: str, quiet: dict[str, Any]) -> Any:
    """What `ray.init` returns; the cluster's processes inherit the environment of this moment."""
    # copies of remote files outlive the cluster
    with _environment({"TMPDIR": temporary, "DRA_CACHE": cache().uri}):
        return ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host=_LOOPBACK,
            _temp_dir=os.path.join(_closed_folder(), "ray"),
            **quiet,
        )


def _end_serve() -> None:
    """End Serve before the cluster ends: its threads in this process would outlive that, and call
    for another.

    As `serve.shutdown()`, which asks the controller to end and waits for an answer that cannot
    come; Ray then prints that the call failed and is tried again for ever.
    """
    from ray.serve import context

    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(client._controller.graceful_shutdown.remote(False), timeout=_ANSWER_S)
        wait_until(lambda: not _is_named(*_SERVE), _END_OF_SERVE_S)
    context._disconnect()


def _is_named(name: str, namespace: str) -> bool:
    try:
        ray.get_actor(name, namespace)
    except ValueError:
        return False
    return True


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder for temporary files of the cluster's processes, which goes with it: Ray ends its
    processes by SIGKILL, which leaves behind what they would have removed, such as the `pymp-*`
    folder of its dashboard.
    """
    closed = _closed_folder()
    for name in os.listdir(closed):  # of drivers that were killed themselves
        owner = name.removeprefix(_TEMPORARY)
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}") and os.path.exists("/proc/1"):
            shutil.rmtree(os.path.join(closed, name), ignore_errors=True)
    folder = os.path.join(closed, f"{_TEMPORARY}{os.getpid()}")
    os.makedirs(folder, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _private() -> Iterator[None]:
    """The settings under which this process starts a cluster of its own, for the length of a `with`
    block.

    Ray binds every service to the loopback interface where that is the node's address, and takes it
    as the node's address where it does not expect other nodes. Other processes read that switch
    from the environment; this one has read it when it imported Ray, perhaps before us.
    """
    expects_nodes = ray_constants.ENABLE_RAY_CLUSTER
    try:
        with _environment(of_our_own()):
            ray_constants.ENABLE_RAY_CLUSTER = False
            _read_authentication()
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = expects_nodes
        _read_authentication()


def _read_authentication() -> None:
    """Ray keeps what it once read of mode and token; the next cluster of this process may have
    others.
    """
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _closed_folder() -> str:
    """Where our clusters keep their sessions: logs and sockets are for their owner.

    Ray opens its own folders to everybody, at the start and again whenever a process joins, so one
    above them is closed. A umask would do too, but workers would write runs with it.
    """
    closed = os.path.join(tempfile.gettempdir(), f"dra-ray-{os.getuid()}")
    os.makedirs(closed, mode=0o700, exist_ok=True)
    facts = os.stat(closed, follow_symlinks=False)
    if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode):  # somebody was there first
        closed = tempfile.mkdtemp(prefix="dra-ray-")
    os.chmod(closed, 0o700)
    return closed


def ray_folders() -> list[str]:
    """Where clusters of this machine keep their sessions: those that Ray's own commands start, and
    ours.
    """
    return [get_default_ray_temp_dir(), os.path.join(_closed_folder(), "ray")]


def of_our_own() -> dict[str, str]:
    """Environment of a cluster on this machine.

    Its processes find each other by RAY_ADDRESS: Ray Train's clean-up after a stopped trial looks
    the cluster up anew, and where a second one runs on the machine it would find either both or the
    wrong one, and free nothing.
    """
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = probe.getsockname()[1]
    return {
        "RAY_GCS_SERVER_PORT": str(port),
        "RAY_ADDRESS": f"{_LOOPBACK}:{port}",
        # other users of this machine reach the loopback interface as well: a token for this run
        # alone, which goes on by environment; in token mode without one, Ray would write its own
        # into the home directory
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        # nobody takes this machine away; saves a process per run
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        _OURS: "1",
    }


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Trainer(DataParallelTrainer):
    """Ray Train without the actors that no run of ours uses, each a process that starts beside the
    workers: the one that shares out Ray's data sets, and, on a cluster that ends with its driver,
    the one that frees the room of a run whose driver was killed.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused: tuple[type[RayTrainCallback], ...] = (DatasetsCallback,)
        if _OURS in os.environ:
            unused += (PlacementGroupCleanerCallback,)
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, unused)
        ]


def scaling(resources: Resources) -> ScalingConfig:
    """The workers of a training run: a fixed number, or, with `min_workers`, as many as there is
    room for.
    """
    count: Any = (
        (resources.min_workers, resources.workers) if resources.min_workers else resources.workers
    )
    return ScalingConfig(
        num_workers=count,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=_each(resources),
        label_selector=resources.labels or None,
    )


def backend(resources: Resources) -> BackendConfig:
    """What Ray Train is to set up between the workers: a process group, or nothing for a single one
    on a CPU, whose run then starts 3 s sooner: its controller then needs no torch.
    """
    if resources.workers == 1 and not resources.gpus_per_worker:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo")


def least_workers(resources: Resources) -> int:
    """Workers that a run cannot do without."""
    return resources.min_workers or resources.workers


def placed(resources: Resources, cpus: float = 1.0) -> dict[str, Any]:
    """Options of a Ray task that belongs on the nodes of training workers, such as a batch of an
    evaluation.
    """
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": resources.gpus_per_worker,
        "resources": dict(resources.custom),
    }
    return options | ({"label_selector": dict(resources.labels)} if resources.labels else {})


def checkpoint_folder(checkpoint: ray.train.Checkpoint, experiment: Store) -> Store:
    """A checkpoint where it lies, in the folder that Ray Train has of its run, to be read by
    ourselves: of what a store sends Ray checks nothing, and torch no checksum either.
    """
    return experiment / checkpoint.path.rstrip("/").rpartition("/")[2]


def failures(resources: Resources) -> FailureConfig:
    """Restarts after a worker died; lost spot nodes are not counted. Where nodes may still come, a
    start is tried for longer.
    """
    tries = (
        1
        if _OURS in os.environ
        else math.ceil(resources.start_deadline_s / resources.start_timeout_s)
    )
    return FailureConfig(max_failures=resources.max_failures, controller_failure_limit=tries)


def fit(
    trainer: Trainer,
    run: str,
    what: str,
    resources: Resources,
    started: Callable[[], bool],
) -> None:
    """Run a trainer to its end. A start that stalls is told, with what is missing, before a minute
    is over.

    Args:
        run: URI of the run, by which its workers know that they are asked to stop.
        what: the run, for messages.
        started: whether a worker of this very start has begun; asked every few seconds until it
            has.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers have ended their step and written a
            checkpoint, or had 30 s for it.
        LastingError: its own code failed, at every restart alike.
        RunError: workers were lost too often, or there is no room for them; the same command
            resumes it.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(
        resources.start_timeout_s
    )  # read by Train's controller
    if resources.min_workers:
        _release_room()
    if _OURS in os.environ:
        get_or_create_autoscaling_coordinator()  # which Train's controller would wait for
    callbacks = [*(trainer.run_config.callbacks or []), _Failures(run)]
    trainer.run_config.callbacks = callbacks  # type: ignore[assignment]  # mypy sees Train V1's
    done = threading.Event()
    watches = [
        threading.Thread(target=_watch_start, args=(what, resources, started, done), daemon=True),
        threading.Thread(target=_tell_failures, args=(run, what, resources, done), daemon=True),
    ]
    for watch in watches:
        watch.start()
    try:
        _run(trainer, run)
    except TrainingFailedError as error:
        reason = f"{what} failed ({_cause(error, resources)})"
        if _repeats(error):
            raise LastingError(
                f"{reason}; it fails alike when it is started again, so change its config or mend "
                "that first"
            ) from error
        raise RunError(
            f"{reason}; start the same command again to resume from its last checkpoint"
        ) from error
    finally:
        done.set()
        for watch in watches:
            watch.join()


class _Failures(UserCallback):
    """In Train's controller: notes why workers failed, for the driver to tell. It would say nothing
    until every restart has failed as well, which takes minutes.
    """

    def __init__(self, run: str) -> None:
        self._run, self._count = run, 0

    def after_exception(
        self, run_context: Any, worker_exceptions: Mapping[int, BaseException]
    ) -> None:
        self._count += 1
        rank, error = min(worker_exceptions.items(), key=lambda item: item[0])
        text = f"{self._count} worker {rank}: {_last_line(error)}"
        internal_kv._internal_kv_put(
            f"failure {self._run}", text.encode(), overwrite=True, namespace=_NAMESPACE
        )


def _tell_failures(run: str, what: str, resources: Resources, done: threading.Event) -> None:
    """Warn of every failure that a restart follows."""
    key = f"failure {run}"
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    told = b""
    while not done.wait(1.0):
        text = internal_kv._internal_kv_get(key, namespace=_NAMESPACE) or b""
        if text == told:
            continue
        told = text
        count, _, reason = text.decode().partition(" ")
        if int(count) <= resources.max_failures:
            log.warning(
                "%s: %s; it starts again from its last checkpoint, %s of at most %d times",
                what,
                reason,
                count,
                resources.max_failures,
            )


def _watch_start(
    what: str, resources: Resources, started: Callable[[], bool], done: threading.Event
) -> None:
    """Say when the first worker begins, and warn once if none has after half of the time that a
    start may take.
    """
    deadline = time.monotonic() + min(45.0, resources.start_timeout_s / 2)

    def begun() -> bool:
        try:
            return started()
        except DraError:
            # the store is away for a moment: this thread has no other duty than to look again
            return False

    workers = least_workers(resources)
    log.info("waiting for %d worker%s of %s", workers, "s" * (workers > 1), what)
    while not done.wait(2.0):
        if begun():
            log.info("%s: its first steps", what)
            return
        if time.monotonic() > deadline:
            deadline = math.inf
            _warn_of_stall(what, resources)


def _warn_of_stall(what: str, resources: Resources) -> None:
    """Workers that are placed and import torch are no stall."""
    if _no_room(resources):
        log.warning(
            "%s has not started: %s; it starts by itself once there is room",
            what,
            _missing(resources),
        )
    elif resources.min_workers:
        # of a run that was killed before its first worker began, or that is not ours
        log.warning(
            "%s has not started: Ray keeps the room of an elastic run that was killed for 180 s; "
            "it starts by itself then",
            what,
        )


def _cause(error: TrainingFailedError, resources: Resources) -> str:
    if (
        isinstance(error, ControllerError)
        and "WorkerGroupStartupTimeout" in f"{type(error.controller_failure).__name__} {error}"
    ):
        return (
            "its workers found no room within "
            f"resources.start_timeout_s={resources.start_timeout_s:g}: {_missing(resources)}"
        )
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = next(iter(error.worker_failures.items()))
        return f"worker {rank}: {_last_line(failure)}"
    return _last_line(error)


def _repeats(error: TrainingFailedError) -> bool:
    """Whether every worker that failed did so by an exception of our own code, which no lost fellow
    explains.
    """
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return False
    causes = [getattr(failure, "_base_exc", None) for failure in error.worker_failures.values()]
    return all(
        cause is not None and not _of_a_fellow(cause) and is_lasting(cause) for cause in causes
    )


def _of_a_fellow(error: BaseException) -> bool:
    """A collective that broke since another worker went away, or a call of Ray that did."""
    network = ("gloo", "nccl", "connection", "timed out", "peer")
    return isinstance(error, ray.exceptions.RayError) or any(
        word in str(error).lower() for word in network
    )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _no_room(resources: Resources) -> bool:
    free = ray.available_resources()
    return any(
        free.get(name, 0.0) < least_workers(resources) * each
        for name, each in _each(resources).items()
    )


def has_room(resources: Resources) -> bool:
    """Whether some node has now what one more worker needs."""
    labels, each = resources.labels.items(), _each(resources).items()
    nodes = {
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and labels <= (node.get("Labels") or {}).items()
    }
    return any(
        node in nodes and all(free.get(name, 0.0) >= amount for name, amount in each)
        for node, free in ray._private.state.available_resources_per_node().items()
    )


def _each(resources: Resources) -> dict[str, float]:
    """Ray resources of one worker."""
    usual = (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker))
    return {name: each for name, each in (*usual, *resources.custom.items()) if each}


def _missing(resources: Resources) -> str:
    """What is asked for and what the cluster has of it, as words."""
    have, free, workers = (
        ray.cluster_resources(),
        ray.available_resources(),
        least_workers(resources),
    )
    parts = [
        f"{workers} workers need {workers * each:g} {name}, the cluster has "
        f"{have.get(name, 0.0):g}, of which {free.get(name, 0.0):g} free"
        for name, each in _each(resources).items()
    ]
    return "; ".join(parts)


# -- room that Ray keeps for elastic runs ----------------------------------------------------------
_COORDINATOR = "AutoscalingCoordinator"  # Ray's, both name and namespace


def claim_room() -> None:
    """Called by a worker of an elastic run: note for whom Ray reserves the room of all its workers.

    A run that ends gives it back. One whose driver is killed cannot, and Ray keeps it for 180 s, in
    which no other elastic run starts (AUTOSCALING_REQUESTS_EXPIRE_TIME_S, ray 2.60).
    """
    requester = f"train-{get_train_context().train_run_context.run_id}"
    job = ray.get_runtime_context().get_job_id()
    internal_kv._internal_kv_put(f"room {requester}", job.encode(), namespace=_NAMESPACE)


def _release_room() -> None:
    """Give back what Ray still reserves for elastic runs whose drivers have ended."""
    ended = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
    for key in internal_kv._internal_kv_list("room ", namespace=_NAMESPACE):
        job = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if not job or job.decode() not in ended:
            continue
        # no coordinator: nothing is reserved
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
            requester = key.decode().removeprefix("room ")
            ray.get(coordinator.cancel_request.remote(requester), timeout=_ANSWER_S)
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


# -- stopping --------------------------------------------------------------------------------------
_STOP_S = 30.0  # for the end of a step and its checkpoint; a second Ctrl-C ends the wait


def ask_to_stop(run: str, stop: bool = True) -> None:
    """Ask the workers of a run to end after their step, with a checkpoint, or take that back."""
    internal_kv._internal_kv_put(
        f"stop {run}", b"1" if stop else b"", overwrite=True, namespace=_NAMESPACE
    )


def is_asked_to_stop(run: str) -> bool:
    """Whether somebody has called `ask_to_stop`; a question to the head node, of about a
    millisecond.
    """
    return bool(internal_kv._internal_kv_get(f"stop {run}", namespace=_NAMESPACE))


def end_if_stopped(run: str) -> None:
    """Raise `RunError` where the run is asked to stop: its workers have ended before the run's end,
    or must not begin.
    """
    if is_asked_to_stop(run):
        raise RunError(f"'{run}' was stopped; the same command resumes it")


@contextmanager
def training(run: str) -> Iterator[None]:
    """Marks a run of a trial as under way, which a stop waits for."""
    key = f"training {run}"
    internal_kv._internal_kv_put(key, b"1", overwrite=True, namespace=_NAMESPACE)
    try:
        yield
    finally:
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def is_training(run: str) -> bool:
    return internal_kv._internal_kv_exists(f"training {run}", namespace=_NAMESPACE)


def _run(trainer: Trainer, run: str) -> None:
    """`trainer.fit()`; Ctrl-C and SIGTERM, which a job's stop and a lost spot node send, let the
    workers write a checkpoint first.

    Ray Train's own handler of SIGINT, which it sets in the main thread only, would end them in the
    middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():  # a trial: its sweep is asked
        with training(run):
            end_if_stopped(run)
            trainer.fit()
            end_if_stopped(run)
        return
    stoppable(trainer.fit, [run])


def stoppable(
    work: Callable[[], object],
    runs: Sequence[str],
    ended: Callable[[], bool] = lambda: False,
) -> None:
    """Do the work of training runs in another thread, such that Ctrl-C and SIGTERM let their
    workers end the step and write a checkpoint. Outside of the main thread, which alone gets
    signals, just do it.

    Args:
        ended: whether, after a signal, nothing is worth waiting for though `work` goes on.

    Raises:
        KeyboardInterrupt: after a signal, once `work` has ended, or `ended`, or after 30 s.
        BaseException: whatever `work` raises.
    """
    for run in runs:
        ask_to_stop(run, False)
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with _signals() as stopping:
        thread.start()
        while thread.is_alive() and not stopping.is_set():
            thread.join(0.1)
        if stopping.is_set():
            log.warning("stopping, the checkpoint is kept")
            for run in runs:
                ask_to_stop(run)
            wait_until(lambda: not thread.is_alive() or ended(), _STOP_S, 0.1)
            # a thread that is left would start another cluster once this one is gone
            auto_init_hook.enable_auto_connect = False
            raise KeyboardInterrupt
    if errors:
        raise errors[0]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second is a KeyboardInterrupt at once."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require(
    workers: int,
    cpus: float,
    gpus: float,
    what: str,
    beside: tuple[float, float] = (0.0, 0.0),
    others: str = "the teacher pool",
) -> int | None:
    """How many groups of `workers` such workers fit on this machine at once; `RunError` where not
    even one does.

    None where there is no such bound: on an autoscaling cluster pending workers are what makes it
    grow, and workers that need nothing always fit.

    Args:
        beside: (CPUs, GPUs) that `others` keep.
        what, others: who asks and who keeps, for the message.
    """
    if _OURS not in os.environ:
        return None
    have, fitting = ray.cluster_resources(), []
    for name, each, kept in (("CPU", cpus, beside[0]), ("GPU", gpus, beside[1])):
        if not each:
            continue
        free = have.get(name, 0.0) - kept
        fitting.append(int((free + 1e-6) / (workers * each)))
        if not fitting[-1]:
            raise RunError(
                f"{what} needs {workers * each:g} {name} for {workers} workers, but this machine "
                f"has {max(free, 0.0):g}"
                f"{f' beside the {kept:g} of {others}' if kept else ''}; lower resources "
                "or pool, or join a cluster (RAY_ADDRESS)"
            )
    return min(fitting, default=None)


def joined_cpus() -> int:
    """CPUs of all nodes of a cluster that was joined; 0 where Ray is on this machine alone."""
    return 0 if _OURS in os.environ else int(ray.cluster_resources().get("CPU", 0))


LOOK_S, LOOK_AT_STORE_S = 0.5, 5.0  # a request to an object store costs money


@contextmanager
def following(file: Store, kind: type[R], on_row: Callable[[R], None] | None) -> Iterator[None]:
    """Meanwhile, hand every new row of a growing `.jsonl` log, a record of `kind`, to `on_row`, in
    a thread of this process: twice a second from a disk, every 5 s from an object store.
    """
    if on_row is None:
        yield
        return
    tail = runs.Tail(file, kind)
    _new(tail)

    def poll() -> None:
        for row in _new(tail):
            on_row(row)

    try:
        with repeating(poll, LOOK_S if file.is_local else LOOK_AT_STORE_S):
            yield
    finally:
        poll()


@contextmanager
def repeating(act: Callable[[], None], period_s: float) -> Iterator[None]:
    """Meanwhile, call `act` every `period_s`, in a thread of this process, which has ended when the
    block has.
    """
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(period_s):
            act()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _new(tail: runs.Tail[R]) -> list[R]:
    try:
        return tail.new()
    except DraError:  # the store is away, or a row half there: the next look tells
        return []


def wait_until(condition: Callable[[], bool], timeout_s: float, period_s: float = 0.25) -> bool:
    """Poll `condition` until it holds or the time is over; returns whether it held."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(period_s)
    return True


def accelerators() -> list[str]:
    """What the cluster's nodes call their GPUs, such as H100; none where Ray does not know."""
    prefix = "accelerator_type:"
    return [
        name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)
    ]
