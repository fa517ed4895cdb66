"""Times what an experiment will do, here and now: steps of its own student, loss and attack,
validation by its own attack, and its teacher's encoding. Images are random, of the data set's
shape, and weights are not read: neither changes what an operation costs.

What is timed is as large as a few seconds allow by arithmetic, at most a worker's part of the batch
and a chunk of validation. A smaller sample is scaled by its number of images; networks that large
cost alike per image. torch.compile is left out: compiling takes longer than a plan may.

What others do on the machine meanwhile is not part of a pace: one CPU thread is timed by the
seconds that it computes, and so is the start of a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dra_ray import config, data, plan
from dra_ray.config import Experiment
from dra_ray.data import Shape
from dra_ray.data.batches import part_of
from dra_ray.errors import DraError, RunError
from dra_ray.plan import speed
from dra_ray.plan.pace import Pace
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import LocalTeacher, Ready
from dra_ray.training import alignment, arithmetic, averaging, step, validation
from dra_ray.training.step import State

SAMPLE_S = 0.2  # of one round of a sample, by arithmetic at a matrix product's speed
LIMIT_S = 2.0  # the same of the smallest sample; a larger student is not timed
ENOUGH_S, ROUNDS = 1.0, 8  # rounds end at the first of both
SMALLEST = 2  # images: BatchNorm needs more than one value of a channel


@dataclasses.dataclass(frozen=True)
class Basis:
    """What a plan's hours go by, and the same in words; neither where nothing is known."""

    pace: Pace | None
    tflops: float | None
    said: str


def basis(
    experiment: Experiment, worker: str, otherwise: Callable[[], speed.Speed | None]
) -> Basis:
    """The measured pace; where that cannot be had, arithmetic by the speed `otherwise`."""
    try:
        known = pace(experiment, worker)
    except DraError as error:
        return by_arithmetic(otherwise(), f"; not measured: {error}")
    return Basis(known, None, known.what)


def by_arithmetic(known: speed.Speed | None, why: str = "") -> Basis:
    """FLOPs at a speed; `why` it is no more than that."""
    if known is None:
        return Basis(None, None, "not known: no such GPU is here; add --gpu h100 or --tflops N")
    said = f"arithmetic at {known.tflops:.3g} TFLOP/s, {known.source}"
    missing = "start-up is not counted, and small networks reach a fraction of it"
    return Basis(None, known.tflops, f"{said}{why}; {missing}")


class NotTimed(DraError):
    """Timing needs what is not here, or would take too long; hours are then by arithmetic."""


def pace(experiment: Experiment, worker: str) -> Pace:
    """Of the machine that this runs on; the process's threads, generators and precision are
    afterwards as they were.

    Args:
        worker: the module that a training process imports.

    Raises `NotTimed` where the devices are not here, or would take too long; the errors of reading
    the data's shape, and a teacher.
    """
    device = _device(experiment.resources.gpus_per_worker)
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if experiment.compute.precision == "bf16" and emulated:
        raise NotTimed("this CPU emulates bfloat16, which takes minutes a step")
    sample = _sample(experiment)
    planned = plan.plan(sample)
    assert isinstance(planned, plan.RunPlan)
    threads = experiment.resources.threads_per_worker if device.type == "cpu" else 1
    with _as_a_worker(sample, device):
        limits = _Limits(1e12 * speed.measured(device.type, 0.3).tflops * threads)
        return _timed(sample, planned, limits, device, worker)


def _device(gpus: float) -> torch.device:
    """What a training worker, or a replica, runs on."""
    if not gpus:
        return torch.device("cpu")
    if gpus < 1:
        raise NotTimed("a part of a GPU is shared with others")
    if not torch.cuda.is_available():
        raise NotTimed("no GPU is here")
    return torch.device("cuda")


def of_sweep(sweep: config.Sweep, experiments: Sequence[Experiment]) -> Experiment:
    """What of a sweep is timed: its base, or its first aligned trial where the base has no
    teacher.
    """
    if _teacher_of(sweep.base):
        return sweep.base
    return next(filter(_teacher_of, experiments), sweep.base)


def _teacher_of(experiment: Experiment) -> str | None:
    return experiment.teacher.uri if experiment.teachers else None


def _sample(experiment: Experiment) -> Experiment:
    """Of a run as it is when all that costs time has set in, by one worker, from random weights."""
    changes: dict[str, dict[str, object]] = {
        "model": {"weights": None},
        "compute": {"compile": "off"},
        "loss": {"awp_from_epoch": 0},
        "resources": {"workers": 1, "min_workers": None},
    }
    if not _teacher_of(experiment):
        changes["align"] = {"weight": 0.0}
    parts = {
        name: getattr(experiment, name).model_copy(update=fields)
        for name, fields in changes.items()
    }
    mine = part_of(experiment.optim.batch, 0, experiment.resources.workers)
    return _of_batch(experiment.model_copy(update=parts), mine.stop)


def _of_batch(experiment: Experiment, images: int) -> Experiment:
    optim = experiment.optim.model_copy(update={"batch": images})
    return experiment.model_copy(update={"optim": optim})


@dataclasses.dataclass(frozen=True)
class _Limits:
    """How many images a sample may have, where a device does `flops` per second."""

    flops: float

    def images(self, most: int, gflop: float, what: str) -> int:
        """At most `most`; `NotTimed` where even the smallest sample takes too long."""
        each_s = gflop * 1e9 / self.flops
        smallest = min(most, SMALLEST)
        if smallest * each_s > LIMIT_S:
            raise NotTimed(
                f"{what} of {smallest} images would take {smallest * each_s:.0f} s, more than "
                f"{LIMIT_S:g} s"
            )
        return max(smallest, min(most, int(SAMPLE_S / max(each_s, 1e-12))))


@contextlib.contextmanager
def _as_a_worker(experiment: Experiment, device: torch.device) -> Iterator[None]:
    """This process computes as a worker would."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with step.drawing(0, device):
        arithmetic.prepare(experiment.compute, experiment.resources.threads_per_worker)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _timed(
    sample: Experiment, planned: plan.RunPlan, limits: _Limits, device: torch.device, worker: str
) -> Pace:
    student, teacher = planned.step.gflop_per_image, planned.step.teacher_gflop_per_image
    batch = sample.optim.batch
    trained = limits.images(batch, student, "a step")
    checked = limits.images(validation.CHUNK, _checking_gflop(sample, planned), "validation")
    encoded = limits.images(batch, teacher, "encoding") if teacher else 0
    shape = data.outline(sample.data).shape
    sources = _teachers(sample, encoded, device) if encoded else []
    features, encoding_s = _encoding(sample, shape, sources, encoded) if encoded else ([], 0.0)
    state, step_s = _training(_of_batch(sample, trained), shape, sources, features, device)
    checking_s = _checking(state, sample, shape, checked, device)
    process_s = process_start_s(worker)
    said = [
        f"{step_s:.3g} s a step of {trained} images",
        f"{checking_s:.3g} s a validation of {checked}",
        *([f"{encoding_s:.3g} s of the teacher for {encoded}"] if encoded else []),
        f"{process_s:.2g} s a start of a process",
    ]
    threads, cores = sample.resources.threads_per_worker, _cores()
    each = "1 thread" if threads == 1 else f"{threads} threads"
    return Pace(
        training=step_s / trained / student * 1e6,
        validation=checking_s / checked / _checking_gflop(sample, planned) * 1e6,
        encoding=encoding_s / encoded / teacher * 1e6 if encoded else None,
        process_s=process_s,
        cores=cores if device.type == "cpu" else 0,
        what=f"measured on this machine: {', '.join(said)}; {each} a worker, {cores} cores",
    )


def _checking_gflop(sample: Experiment, planned: plan.RunPlan) -> float:
    """Of one validation of an image."""
    return 2 * plan.judging_units(sample) * planned.student.forward_gmacs


def _teachers(sample: Experiment, images: int, device: torch.device) -> list[LocalTeacher]:
    """The source of each term, for requests of `images`."""
    pool, micro = sample.pool, sample.teacher.micro_batch
    if images < sample.optim.batch:  # what may be timed; a replica pads to its micro-batch
        micro = min(micro, images)
    on = _device(pool.gpus_per_replica) if pool.kind == "pool" else device
    assert sample.teacher.uri
    net = checkpoint.load(Store(sample.teacher.uri))
    settings = [each.model_copy(update={"micro_batch": micro}) for each in sample.teachers]
    return [LocalTeacher(net, each, pool.threads_per_replica, str(on)) for each in settings]


def _encoding(
    sample: Experiment, shape: Shape, sources: Sequence[LocalTeacher], images: int
) -> tuple[list[Tensor], float]:
    """The features of each term for a request of `images`, and seconds for all of them."""
    pixels, labels = _random(shape, images)
    sized = _of_batch(sample, images)
    requests = alignment.requests(sized, pixels, labels, 0, slice(0, images))
    pairs = list(zip(sources, requests, strict=True))

    def encode() -> list[Tensor]:
        return [source.encode(request).float() for source, request in pairs]

    on, threads = torch.device(sources[0].device), sources[0].threads
    return encode(), seconds(encode, on, threads)


def _training(
    sample: Experiment,
    shape: Shape,
    sources: Sequence[LocalTeacher],
    features: Sequence[Tensor],
    device: torch.device,
) -> tuple[State, float]:
    """A student after a few steps, and seconds of a step; features of fewer images are repeated."""
    size = sample.optim.batch
    mine = slice(0, size)
    pixels, labels = (each.to(device) for each in _random(shape, size))
    ready = [Ready(each[torch.arange(size) % len(each)]) for each in features]
    state, _ = step.initial_state(sample, shape, sources, device)

    def take() -> None:
        batch = step.prepare(sample, pixels, labels, state.step, mine, ())
        step.step(state, sample, dataclasses.replace(batch, targets=list(ready)), mine)
        state.step += 1
        if sample.optim.averaging == "step":
            averaging.update(state.average, state.student, sample.optim.averaging_decay)

    return state, seconds(take, device, sample.resources.threads_per_worker)


def _checking(
    state: State, sample: Experiment, shape: Shape, images: int, device: torch.device
) -> float:
    """Seconds of a validation."""
    pixels, labels = _random(shape, images)
    state.average.eval()

    def check() -> None:
        validation.judge_chunk(state.average, sample, pixels, labels, 0, device)

    return seconds(check, device, sample.resources.threads_per_worker)


def _random(shape: Shape, images: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,C,H,W] of the data's shape, and labels."""
    drawn = torch.Generator().manual_seed(0)
    size = (images, shape.channels, shape.resolution, shape.resolution)
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=drawn)
    return pixels, torch.randint(shape.num_classes, (images,), generator=drawn)


def seconds(call: Callable[[], object], device: torch.device, threads: int) -> float:
    """The median of a few rounds, after one that only warms up; of one CPU thread those that it
    computes.
    """
    alone = device.type == "cpu" and threads == 1
    clock = time.thread_time if alone else time.perf_counter
    spent: list[float] = []
    call()
    while not spent or (len(spent) < ROUNDS and sum(spent) < ENOUGH_S):
        _wait(device)
        began = clock()
        call()
        _wait(device)
        spent.append(clock() - began)
    return statistics.median(spent)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_start_s(module: str) -> float:
    """Seconds that a new Python process computes until it has imported `module`."""
    began = os.times()
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, check=False
    )
    if done.returncode:
        raise RunError(f"a Python process could not import {module}")
    ended = os.times()
    computed = ended.children_user + ended.children_system
    return computed - began.children_user - began.children_system


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
