"""What a config would run, before anything starts: sizes, arithmetic, images, replicas and hours.
Needs no Ray.

Costs are measured by torch's FLOP counter on meta tensors, in multiply-accumulates (a MAC is 2
FLOP). The work of a step is counted in forward passes: a gradient of the input is worth about one
more, a full backward pass about two (see `step_units`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dra_ray import data, runs, students
from dra_ray.config import (
    Analysis,
    Canonical,
    Config,
    Data,
    Experiment,
    Loss,
    Model,
    Quickstart,
    Sweep,
    Synthesis,
    TeacherTraining,
    Threat,
    catalogue,
    networks,
)
from dra_ray.config.sweep import Budget
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.plan import pace as pacing
from dra_ray.plan.pace import Pace
from dra_ray.sweeps import forecast, rungs, spaces
from dra_ray.teachers import checkpoint, fitting
from dra_ray.teachers.network import Classifier, ImageSampler, Network, image_sampler
from dra_ray.teachers.sampling import heun_calls
from dra_ray.training import objective
from dra_ray.training.projector import projector


@dataclasses.dataclass(frozen=True)
class Shown:
    """How the printed plan calls a field, and the format of its value; None is not printed."""

    label: str
    shape: str = "{}"


class Range(typing.NamedTuple):
    """What 95 % of the draws of a sweep's course lie between (`sweeps.forecast`)."""

    low: float
    high: float

    def __format__(self, shape: str) -> str:
        return f"{self.low:{shape}} to {self.high:{shape}}"


@dataclasses.dataclass(frozen=True)
class Student:
    name: Annotated[str, Shown("student")]
    params: Annotated[int, Shown("student parameters", "{:,}")]
    forward_gmacs: Annotated[float, Shown("student forward, GMAC per image", "{:.4g}")]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Of a training run: up to its feature; of its own training: both; of sampling: all of it."""

    params: Annotated[int, Shown("teacher parameters", "{:,}")]
    forward_gmacs: Annotated[float | None, Shown("teacher forward, GMAC per image", "{:.4g}")] = (
        None
    )
    layer: Annotated[str | None, Shown("teacher feature layer")] = None
    feature_gmacs: Annotated[
        float | None, Shown("teacher up to its feature, GMAC per image", "{:.4g}")
    ] = None


@dataclasses.dataclass(frozen=True)
class Step:
    """Of training a student."""

    forward_units: Annotated[float, Shown("forward passes a training image is worth", "{:.4g}")]
    gflop_per_image: Annotated[float, Shown("student training, GFLOP per image", "{:.4g}")]
    teacher_gflop_per_image: Annotated[float, Shown("teacher, GFLOP per training image", "{:.4g}")]


@dataclasses.dataclass(frozen=True)
class Training:
    """A student's whole run."""

    epochs: Annotated[int, Shown("epochs")]
    steps: Annotated[int, Shown("steps", "{:,}")]
    images_seen: Annotated[int, Shown("training images", "{:,}")]
    real_images: Annotated[int, Shown("real images to draw from", "{:,}")]
    synthetic_images: Annotated[int, Shown("synthetic images to draw from", "{:,}")]
    synthetic_passes: Annotated[float | None, Shown("passes over the synthetic images", "{:.2f}")]
    checkpoints: Annotated[int, Shown("checkpoints", "{:,}")]
    student_pflop: Annotated[float, Shown("student PFLOP, validation included", "{:.4g}")]
    validation_pflop: Annotated[float, Shown("of it validation, PFLOP", "{:.4g}")]
    teacher_pflop: Annotated[float, Shown("teacher PFLOP", "{:.4g}")]

    @property
    def pflop(self) -> float:
        return self.student_pflop + self.teacher_pflop


@dataclasses.dataclass(frozen=True)
class TrainingOfTeacher:
    steps: Annotated[int, Shown("steps", "{:,}")]
    images_seen: Annotated[int, Shown("training images", "{:,}")]
    checkpoints: Annotated[int, Shown("checkpoints", "{:,}")]
    pflop: Annotated[float, Shown("PFLOP", "{:.4g}")]


@dataclasses.dataclass(frozen=True)
class Sampling:
    images: Annotated[int, Shown("images to make", "{:,}")]
    shards: Annotated[int, Shown("shards", "{:,}")]
    network_calls_per_image: Annotated[int, Shown("network calls per image")]
    gflop_per_image: Annotated[float | None, Shown("GFLOP per image", "{:.4g}")] = None
    pflop: Annotated[float | None, Shown("PFLOP", "{:.4g}")] = None


@dataclasses.dataclass(frozen=True)
class Resources:
    """What is asked of Ray at the smallest pool."""

    workers: Annotated[int, Shown("workers")]
    min_workers: Annotated[int | None, Shown("workers, at least, while nodes are lost")] = None
    cpus: Annotated[float, Shown("CPUs asked for, smallest pool", "{:g}")] = 0
    gpus: Annotated[float, Shown("GPUs asked for, smallest pool", "{:g}")] = 0
    min_replicas: Annotated[int | None, Shown("teacher replicas, at least")] = None
    max_replicas: Annotated[int | None, Shown("teacher replicas, at most")] = None
    replicas_needed: Annotated[float | None, Shown("teacher replicas that keep up", "{:.2f}")] = (
        None
    )


@dataclasses.dataclass(frozen=True)
class Hours:
    """`student` and `teacher` are hours of GPUs, or of CPU threads where no GPU is asked for; of a
    sweep, these and `expected` are with what is expected to be stopped. `validation` and `start`
    are parts of `student`; arithmetic knows no start. `wall` of a sweep's trial is of it alone.
    `verdicts` are of a sweep's stronger attacks, and part of `worst` and `expected` as far as they
    come after the training.
    """

    student: Annotated[float | None, Shown("student device hours", "{:.3g}")] = None
    validation: Annotated[float | None, Shown("of them validation", "{:.3g}")] = None
    start: Annotated[float | None, Shown("of them start-up", "{:.3g}")] = None
    teacher: Annotated[float | None, Shown("teacher device hours", "{:.3g}")] = None
    verdicts: Annotated[float | None, Shown("device hours of late verdicts, at most", "{:.3g}")] = (
        None
    )
    worst: Annotated[float | None, Shown("hours if nothing is stopped", "{:.3g}")] = None
    expected: Annotated[float | None, Shown("hours expected", "{:.3g}")] = None
    expected_range: Annotated[Range | None, Shown("hours expected, 95 %", "{:.3g}")] = None
    wall: Annotated[float | None, Shown("hours", "{:.3g}")] = None


@dataclasses.dataclass(frozen=True)
class Needs:
    """Estimates of what a run takes besides arithmetic; GB are 10^9 bytes.

    Memory: weights, gradient, momentum and average in float32, and the activations of one backward
    pass over a worker's part of the batch; allocators and workspaces come on top. Disk: three
    checkpoints, since a new one is written before the oldest of two goes, the selected weights and
    the evaluation. AutoAttack: as if every test image withstood, which is the most that it takes.
    """

    memory_gb: Annotated[float, Shown("memory of a worker, GB (estimate)", "{:.3g}")]
    disk_gb: Annotated[float, Shown("disk, GB (estimate)", "{:.3g}")]
    autoattack_pflop: Annotated[float, Shown("AutoAttack PFLOP, at most", "{:.4g}")]
    autoattack_share: Annotated[float, Shown("AutoAttack's share of all, at most", "{:.0%}")]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The price of all device hours; of a sweep, with what early stopping is expected to save."""

    money: Annotated[float, Shown("price, by the example table or --prices", "{:,.2f}")]
    currency: Annotated[str, Shown("currency")]
    money_range: Annotated[Range | None, Shown("price, 95 %", "{:,.2f}")] = None


@dataclasses.dataclass(frozen=True)
class Prices:
    """Of an hour of a student's and of a teacher's device."""

    student: float
    teacher: float
    currency: str

    def of(self, hours: Hours) -> Cost:
        """Of the device hours of both; verdicts take devices as students do."""
        student = (hours.student or 0.0) + (hours.verdicts or 0.0)
        money = student * self.student + (hours.teacher or 0.0) * self.teacher
        return Cost(money, self.currency)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """Training one student."""

    kind: str
    student: Student
    teacher: Teacher | None  # None where there is none, or none that is known yet
    step: Step
    run: Training
    needs: Needs
    resources: Resources
    hours: Hours | None
    cost: Cost | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Of stronger attacks on the held-out images (`sweeps.fidelity`), as if every image withstood
    all of them, which is the most that they take.
    """

    validations: Annotated[float, Shown("validations that APGD judges, expected", "{:.4g}")]
    finalists: Annotated[int, Shown("runs that AutoAttack judges, at most")]
    beside_pflop: Annotated[float, Shown("PFLOP of APGD beside the training, at most", "{:.4g}")]
    after_pflop: Annotated[float, Shown("PFLOP of AutoAttack after it, at most", "{:.4g}")]


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    kind: str
    trials: Annotated[int, Shown("trials")]
    concurrent: Annotated[int, Shown("trials at the same time")]
    scheduler: Annotated[str, Shown("early stopping by")]
    rung_epochs: Annotated[tuple[int, ...], Shown("rungs after epochs")]
    worst_images_seen: Annotated[int, Shown("training images if nothing is stopped", "{:,}")]
    expected_images_seen: Annotated[int, Shown("training images expected", "{:,}")]
    images_range: Annotated[Range, Shown("training images expected, 95 %", "{:,.0f}")]
    saved: Annotated[float, Shown("images saved, expected", "{:.0%}")]
    saved_range: Annotated[Range, Shown("images saved, 95 %", "{:.0%}")]
    worst_pflop: Annotated[float, Shown("PFLOP if nothing is stopped", "{:.4g}")]
    expected_pflop: Annotated[float, Shown("PFLOP expected", "{:.4g}")]
    resources: Resources
    student_gpus: Annotated[float, Shown("GPUs of students", "{:g}")]
    teacher_gpus: Annotated[float, Shown("GPUs of the teacher, smallest pool", "{:g}")]
    verdicts: Verdicts | None
    hours: Hours | None
    cost: Cost | None
    largest_trial: RunPlan
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TeacherPlan:
    kind: str
    teacher: Teacher
    run: TrainingOfTeacher
    resources: Resources
    hours: Hours | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SynthesisPlan:
    kind: str
    teacher: Teacher | None
    run: Sampling
    resources: Resources
    hours: Hours | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class QuickstartPlan:
    kind: str
    teacher: TeacherPlan
    synthesis: SynthesisPlan
    sweep: SweepPlan
    hours: Hours | None
    notes: tuple[str, ...]


Plan = RunPlan | SweepPlan | TeacherPlan | SynthesisPlan | QuickstartPlan


@dataclasses.dataclass(frozen=True)
class Known:
    """What planning may look at besides the config; `tflops` sustained by one GPU, or by one CPU
    thread where no GPU is asked for; `pace` goes before it; `slots` of trials at the same time,
    where they are known. `outlines` are those of the data that was looked at, `teachers` those at
    the URIs that were; `teacher` is one that no folder holds yet.
    """

    tflops: float | None = None
    pace: Pace | None = None
    slots: int | None = None
    in_sweep: bool = False
    teacher: fitting.Known | None = None
    prices: Prices | None = None
    raised: int | None = None
    outlines: dict[Data, data.Outline] = dataclasses.field(default_factory=dict)
    teachers: dict[str, fitting.Known] = dataclasses.field(default_factory=dict)

    def outline(self, settings: Data) -> data.Outline:
        """Digits and folders are read or listed for it: once, and not for each trial."""
        if settings not in self.outlines:
            self.outlines[settings] = data.outline(settings)
        return self.outlines[settings]

    def teacher_at(self, uri: str | None) -> fitting.Known | None:
        """The same for trials that share it."""
        if uri is not None and uri not in self.teachers:
            self.teachers[uri] = fitting.known(uri)
        return None if uri is None else self.teachers[uri]


def plan(
    config: Config,
    tflops: float | None = None,
    prices: Prices | None = None,
    raised: int | None = None,
    pace: Pace | None = None,
    slots: int | None = None,
) -> Plan:
    """What `config` would build, compute and occupy; hours only where `tflops` or `pace` is given,
    and money only where `prices` are too; `raised` as `Space.trials` has it.

    A pace is of experiments: hours of a teacher's own training and of sampling need `tflops`. A
    teacher's cost is known once its folder exists; until then `notes` says what is missing.
    Raises the errors of reading data and cards.
    """
    return _plan(config, Known(tflops=tflops, prices=prices, raised=raised, pace=pace, slots=slots))


def check(config: Experiment) -> None:
    """Raise what `plan` raises. A network of ours that fits its images needs no costs for that; to
    count them, torch would import its compiler, which takes a second.
    """
    name = config.model.name
    if config.teachers or not (networks.wide(name) or name in networks.PLAIN):
        plan(config)
        return
    images = data.outline(config.data)
    student(config.model, images.shape)
    data.batch_plan(config, images.train, config.synthetic.images)


def _plan(config: Config, known: Known) -> Plan:
    if isinstance(config, Experiment):
        return _experiment(config, known)
    if isinstance(config, Sweep):
        return _sweep(config, known)
    if isinstance(config, TeacherTraining):
        return _teacher(config, known)
    if isinstance(config, Synthesis):
        return _synthesis(config, known)
    if isinstance(config, Canonical):
        return _canonical(config, known)
    if isinstance(config, Analysis):
        raise ConfigError(
            "a file of analyses has no plan of its own; `dra plan RECIPE --analyses IMAGES` tells "
            "what they cost for a recipe's student"
        )
    return _quickstart(config, known)


# -- cost of networks ------------------------------------------------------------------------------
def macs(call: Callable[[], object]) -> float:
    """Multiply-accumulates of `call()`, which may run on meta tensors: convolutions, matrix
    products and attention.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    flop: int = counter.get_total_flops()
    return flop / 2


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@functools.lru_cache(maxsize=16)
def student(settings: Model, shape: Shape) -> students.Student:
    """Its shapes; the errors of `students.check`."""
    return students.check(settings, shape).eval()


@functools.cache
def student_cost(settings: Model, shape: Shape) -> tuple[int, float, int]:
    """(parameters, MACs of one image's forward pass, width of the feature) of a student; the errors
    of `students.check`.
    """
    net = student(settings, shape)
    forward = macs(
        lambda: net(
            torch.empty(1, shape.channels, shape.resolution, shape.resolution, device="meta")
        )
    )
    return parameters(net), forward, net.feature_dim


def step_units(loss: Loss, threat: Threat, perturbed: bool = False) -> int:
    """Forward passes that one image of a step is worth; `perturbed` where the step also perturbs
    the weights (AWP).

    The attack's k steps are a forward and a gradient of the input each. Then every view that is
    trained on is a forward and a full backward: two views of trades and ikl (k=10: 26), the
    adversarial one of pgd-at and fgsm-rs (k=10: 23). The attack's target is the clean view's own
    forward, unless the attack runs in eval mode or weights change after it. AWP's ascent goes
    through the same views once more. The averaged weights of adr see the batch too.
    """
    of = objective.of(loss)
    views, steps = of.views, threat.steps if of.attacks else 0
    target_apart = views == 2 and (perturbed or threat.mode == "eval")
    return 2 * steps + 3 * views * (2 if perturbed else 1) + target_apart + of.asks_average


def judging_units(config: Experiment) -> int:
    """Forward passes that one validation of an image is worth: each step of its attack is a forward
    and a gradient of the input; the clean and the final verdict are a forward each.
    """
    return 2 * config.selection.steps + 2


def mean_step_units(config: Experiment) -> float:
    """`step_units` on average over the run: AWP starts at a later epoch. Canonical samples take a
    forward and a full backward.
    """
    epochs, loss = config.optim.epochs, config.loss
    perturbed = max(0, epochs - loss.awp_from_epoch) / epochs if loss.awp else 0.0
    taught = 3 * config.distill.per_step / config.optim.batch if config.distill.weight else 0.0
    return (
        (1 - perturbed) * step_units(loss, config.threat)
        + perturbed * step_units(loss, config.threat, perturbed=True)
        + taught
    )


def _trained(config: TeacherTraining, shape: Shape) -> Network:
    """What `dra teacher train` would make."""
    kind = checkpoint.TRAINED[config.objective]
    with torch.device("meta"):
        return kind(
            config.net, shape.resolution, shape.channels, shape.num_classes, style=config.style
        )


def _forward_macs(net: Network) -> float:
    """Of one image's forward pass, as the teacher's own training and its sampler call it."""
    x, sigma, labels = _noisy_input(net)
    if isinstance(net, Classifier):
        return macs(lambda: net.classify(x, sigma))
    return macs(lambda: net(x.new_empty(1, *net.noise_shape), sigma, labels))


@functools.lru_cache(maxsize=16)  # the trials of a sweep share their teacher
def feature_macs(net: Network, layer: str | None) -> float:
    """Of one image up to its feature; `net` has shapes only (torch.device("meta"))."""
    return macs(lambda: net.features(*_noisy_input(net), layer))


@functools.lru_cache(maxsize=16)
def _positions(net: Network, layer: str | None) -> int:
    """Of the layer's feature map."""
    features = net.features(*_noisy_input(net), layer, pooled=False)
    return features.shape[2] * features.shape[3]


def _noisy_input(net: Network) -> tuple[Tensor, Tensor, Tensor | None]:
    """An image, its noise level and its label, as meta tensors."""
    images = torch.empty(
        1, net.channels, net.resolution, net.resolution, dtype=torch.uint8, device="meta"
    )
    return (
        net.clean(images),
        torch.ones(1, device="meta"),
        torch.zeros(1, net.num_classes, device="meta") if net.num_classes else None,
    )


# -- one plan per kind of config -------------------------------------------------------------------
def _experiment(config: Experiment, known: Known) -> RunPlan:
    images = known.outline(config.data)
    shape = images.shape
    student_params, forward, feature_dim = student_cost(config.model, shape)
    notes = _weights_note(config)
    teacher = _aligned_teacher(config, known, shape, notes)
    feature = feature_macs(teacher, config.teacher.layer) if teacher else 0.0
    layers = [each.layer for each in config.teachers] if teacher else []  # of an image's features
    encode = sum(feature_macs(teacher, layer) for layer in layers) if teacher else 0.0
    units = mean_step_units(config)
    step = units * forward
    if teacher:
        step += sum(_aligning_macs(config, teacher, layer, feature_dim) for layer in layers)
    batches = data.batch_plan(config, images.train, config.synthetic.images)
    steps = config.optim.epochs * batches.steps_per_epoch
    seen = steps * config.optim.batch
    validations = math.ceil(config.optim.epochs / config.selection.every_epochs)
    judged = 2 if config.selection.weights == "better" else 1
    checking = judged * validations * images.validation * judging_units(config) * forward
    run = Training(
        epochs=config.optim.epochs,
        steps=steps,
        images_seen=seen,
        real_images=images.train,
        synthetic_images=config.synthetic.images,
        synthetic_passes=steps * batches.synthetic_per_batch / config.synthetic.images
        if config.synthetic.images
        else None,
        checkpoints=validations,
        student_pflop=2 * (seen * step + checking) / 1e15,
        validation_pflop=2 * checking / 1e15,
        teacher_pflop=2 * seen * encode / 1e15,
    )
    resources = _resources(config, encode / step, notes)
    hours = _hours(config, run, resources, known)
    return RunPlan(
        kind=config.kind,
        student=Student(config.model.name, student_params, forward / 1e9),
        teacher=Teacher(
            params=parameters(teacher),
            layer=teacher.check_layer(config.teacher.layer),
            feature_gmacs=feature / 1e9,
        )
        if teacher
        else None,
        step=Step(
            forward_units=units,
            gflop_per_image=2 * step / 1e9,
            teacher_gflop_per_image=2 * encode / 1e9,
        ),
        run=run,
        needs=_needs(config, images, run, forward),
        resources=resources,
        hours=hours,
        cost=known.prices.of(hours) if known.prices and hours else None,
        notes=tuple(sorted(notes)),
    )


@functools.cache
def activations(settings: Model, shape: Shape) -> int:
    """Elements of all outputs of a student's layers for one image: what a backward pass keeps, up
    to what is recomputed or shared.
    """
    net, kept = student(settings, shape), 0

    def count(module: torch.nn.Module, given: object, output: object) -> None:
        nonlocal kept
        kept += output.numel() if isinstance(output, Tensor) else 0

    leaves = [module for module in net.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    with torch.no_grad():
        net(torch.empty(1, shape.channels, shape.resolution, shape.resolution, device="meta"))
    for hook in hooks:
        hook.remove()
    return kept


COPIES = 4  # of the weights in memory and in a checkpoint: themselves, gradient, momentum, average
CHECKPOINTS = 3  # two are kept while the next is written
_FLOAT = 4  # bytes


def _needs(config: Experiment, images: data.Outline, run: Training, forward: float) -> Needs:
    params, _, _ = student_cost(config.model, images.shape)
    mine = math.ceil(config.optim.batch / config.resources.workers)
    views = objective.of(config.loss).views
    taught = math.ceil(config.distill.per_step / config.resources.workers)
    rows = mine * views + (taught if config.distill.weight else 0)
    kept = activations(config.model, images.shape) * rows
    shape, tested = images.shape, images.test
    adversarial = tested * shape.channels * shape.resolution**2
    evaluation = config.evaluation
    attacks = catalogue.attacks(shape.num_classes, evaluation.version, evaluation.level)
    passes = catalogue.CLEAN.passes + _passes(attacks)
    attacked = 2 * forward * passes * tested / 1e15
    return Needs(
        memory_gb=_FLOAT * (COPIES * params + kept) / 1e9,
        disk_gb=_FLOAT * ((CHECKPOINTS * COPIES + 1) * params + 2 * adversarial) / 1e9,
        autoattack_pflop=attacked,
        autoattack_share=attacked / (attacked + run.pflop),
    )


def _weights_note(config: Experiment) -> set[str]:
    if config.model.weights or not config.model.name.startswith(networks.TIMM):
        return set()
    return {f"model.weights is not set, so {config.model.name} starts from random weights"}


def _aligned_teacher(
    config: Experiment, known: Known, shape: Shape, notes: set[str]
) -> Network | None:
    if not config.teachers:
        return None
    teacher = known.teacher or known.teacher_at(config.teacher.uri)
    if teacher is None:
        notes.add("teacher.uri is not set, so the teacher's work is not counted")
        return None
    fitting.check(config, teacher, shape)
    return teacher.net


def _aligning_macs(
    config: Experiment, teacher: Network, layer: str | None, feature_dim: int
) -> float:
    """Of one term's projector, forward and backward."""
    width = config.align.target_width(teacher.feature_dim(layer))
    positions = _positions(teacher, layer) if config.teacher.tokens else 1
    return 3 * positions * _projector_macs(feature_dim, width, config.align.hidden)


def _projector_macs(wide_in: int, wide_out: int, hidden: int) -> float:
    with torch.device("meta"):
        head = projector(wide_in, wide_out, hidden)
    return macs(lambda: head(torch.empty(1, wide_in, device="meta")))


def _resources(config: Experiment, work_ratio: float, notes: set[str]) -> Resources:
    """`work_ratio` is teacher work over student work per image."""
    resources, pool = config.resources, config.pool
    pools = len(set(config.teachers)) if pool.kind == "pool" else 0
    replicas = pools * pool.min_replicas
    request = Resources(
        workers=resources.workers,
        min_workers=resources.min_workers,
        cpus=resources.workers * resources.cpus_per_worker + replicas * pool.cpus_per_replica,
        gpus=resources.workers * resources.gpus_per_worker + replicas * pool.gpus_per_replica,
        min_replicas=replicas,
        max_replicas=pools * pool.max_replicas,
    )
    if not (pools and work_ratio):
        return request
    if bool(resources.gpus_per_worker) != bool(pool.gpus_per_replica):
        notes.add(
            "students and teachers are on different kinds of device, so the number of replicas "
            "that keeps up is not known"
        )
        return request
    needed = (
        work_ratio
        * resources.workers
        * _units(config)[0]
        / _units(config)[1]
        / pool.target_utilisation
    )
    notes |= _too_few("one run needs", needed, pool.max_replicas)
    return dataclasses.replace(request, replicas_needed=needed)


def _units(config: Experiment) -> tuple[float, float]:
    """GPUs of a training worker and of a replica, or their CPU threads where they have no GPU."""
    return (
        config.resources.gpus_per_worker or config.resources.threads_per_worker,
        config.pool.gpus_per_replica or config.pool.threads_per_replica,
    )


def _replicas(resources: Resources) -> int:
    """How many a pool comes to; 0 where the teacher works within the training workers."""
    if not resources.max_replicas:
        return 0
    needed = 1 if resources.replicas_needed is None else resources.replicas_needed
    least = max(1, resources.min_replicas or 0)
    return min(max(math.ceil(needed), least), resources.max_replicas)


def _hours(config: Experiment, run: Training, resources: Resources, known: Known) -> Hours | None:
    """Hours of one run, as measured or by arithmetic; `wall` assumes that the slower of student and
    teacher sets the pace.
    """
    if known.pace:
        return _measured_hours(config, run, resources, known.pace, known.in_sweep)
    if not known.tflops:
        return None
    per_worker, per_replica = _units(config)
    student, validation, teacher = (
        pflop * 1e3 / known.tflops / 3600
        for pflop in (run.student_pflop, run.validation_pflop, run.teacher_pflop)
    )
    replicas = _replicas(resources)
    wall = student / (resources.workers * per_worker)
    if replicas:
        wall = max(wall, teacher / (replicas * per_replica))
    else:
        wall += teacher / (resources.workers * per_worker)
    return Hours(student=student, validation=validation, teacher=teacher, wall=wall)


def _measured_hours(
    config: Experiment, run: Training, resources: Resources, pace: Pace, in_sweep: bool
) -> Hours:
    """A trial's are of it alone, its slot and the pool up; a run's are with its pool's start."""
    per_worker, per_replica = _units(config)
    workers, replicas = resources.workers, resources.max_replicas or 0  # a pool grows on demand
    training = (run.student_pflop - run.validation_pflop) * pace.training / workers / 3600
    validation = run.validation_pflop * pace.validation / workers / 3600
    encoding = pace.training if pace.encoding is None else pace.encoding
    teacher = run.teacher_pflop * encoding / 3600
    warm = in_sweep and config.resources.is_single
    start = pace.process_s / 3600
    start *= pacing.PROCESSES_OF_WARM_TRIAL if warm else pacing.PROCESSES_OF_TRAIN
    steps = max(training, teacher / replicas) if replicas else training + teacher / workers
    held = workers * per_worker  # devices, from its start on
    hours = Hours(
        student=held * (training + validation + start),
        validation=held * validation,
        start=held * start,
        teacher=per_replica * teacher,
        wall=steps + validation + start,
    )
    if in_sweep:
        return hours
    before = pacing.PROCESSES_OF_POOL * pace.process_s / 3600 if replicas else 0.0
    assert hours.wall is not None
    return dataclasses.replace(hours, wall=before + hours.wall * pace.factor(_busy([hours])))


def _busy(trials: Iterable[Hours]) -> float:
    """Devices that one of `trials` keeps busy on average, workers and teacher together."""
    busy, wall = 0.0, 0.0
    for hours in trials:
        busy += (hours.student or 0.0) + (hours.teacher or 0.0)
        wall += hours.wall or 0.0
    return busy / wall if wall else 0.0


def _sweep(config: Sweep, known: Known) -> SweepPlan:
    experiments = spaces.experiments(config, known.raised)
    known = dataclasses.replace(known, in_sweep=True)
    trials = {name: _experiment(experiment, known) for name, experiment in experiments.items()}
    course = _course(config, known, trials, experiments)
    images = course.of(lambda trial: trial.run.images_seen)
    pflop = course.of(lambda trial: trial.run.pflop)
    largest = max(
        trials.values(), key=lambda trial: (trial.run.pflop, trial.resources.max_replicas or 0)
    )
    concurrent = _at_once(config, known, largest.resources, len(trials))
    notes = {note for trial in trials.values() for note in trial.notes}
    notes |= _first_rung_note(config, known, course.images_per_epoch)
    shared = _shared(config, largest.resources, concurrent, notes)
    teacher_gpus = (shared.min_replicas or 0) * config.base.pool.gpus_per_replica
    verdicts = _verdicts(config, known, course, experiments) if config.fidelity.is_on else None
    hours = _hours_of_sweep(config, course, concurrent, known, verdicts)
    cost = _cost_of_sweep(course, known.prices, hours) if known.prices and hours else None
    return SweepPlan(
        kind=config.kind,
        trials=len(trials),
        concurrent=concurrent,
        scheduler=config.scheduler,
        rung_epochs=tuple(rungs.of_sweep(config, course.images_per_epoch)),
        worst_images_seen=round(images.worst),
        expected_images_seen=round(images.expected),
        images_range=images.range,
        saved=course.saved.expected,
        saved_range=course.saved.range,
        worst_pflop=pflop.worst,
        expected_pflop=pflop.expected,
        resources=shared,
        student_gpus=shared.gpus - teacher_gpus,
        teacher_gpus=teacher_gpus,
        verdicts=verdicts,
        hours=hours,
        cost=cost,
        largest_trial=largest,
        notes=tuple(sorted(notes)),
    )


def _first_rung_note(config: Sweep, known: Known, images_per_epoch: int) -> set[str]:
    """Whether the first rung comes before BatchNorm's running statistics, by which it judges."""
    optim, epochs = config.base.optim, rungs.of_sweep(config, images_per_epoch)
    if config.scheduler == "none" or not epochs:
        return set()
    steps = epochs[0] * images_per_epoch // optim.batch
    first = (1 - optim.norm_momentum) ** steps
    if first <= 0.5:
        return set()
    if not _has_batchnorm(student(config.base.model, known.outline(config.base.data).shape)):
        return set()
    return {
        f"the first rung comes after {steps} steps, when {first:.0%} of BatchNorm's running "
        f"statistics are still those of the first batches (optim.norm_momentum="
        f"{optim.norm_momentum:g}): trials may be at chance there; set optim.norm_momentum to 0.1 "
        "or raise asha.grace_epochs"
    }


def _has_batchnorm(net: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())


@dataclasses.dataclass(frozen=True)
class _Total:
    """Of a quantity over all trials: where nothing is stopped, and in every draw."""

    worst: float
    drawn: NDArray[np.float64]

    @property
    def expected(self) -> float:
        return float(self.drawn.mean())

    @property
    def range(self) -> Range:
        return Range(*forecast.interval(self.drawn))


@dataclasses.dataclass(frozen=True)
class _Course:
    """What of its run each trial is expected to train: `shares` [draws, trials] with early stopping
    and the budget, `worst` [trials] without.

    Attributes:
        saved: the share of the images that early stopping alone saves.
        images_per_epoch: of the base trial.
    """

    trials: tuple[RunPlan, ...]
    shares: NDArray[np.float64]
    worst: NDArray[np.float64]
    saved: _Total
    images_per_epoch: int

    def of(self, quantity: Callable[[RunPlan], float]) -> _Total:
        each = np.array([quantity(trial) for trial in self.trials], dtype=float)
        return _Total(float(self.worst @ each), self.shares @ each)


def _course(
    config: Sweep,
    known: Known,
    trials: Mapping[str, RunPlan],
    experiments: Mapping[str, Experiment],
) -> _Course:
    planned = [
        forecast.Planned(trial.run.images_seen, experiments[name].align.weight > 0)
        for name, trial in trials.items()
    ]
    images_per_epoch = data.images_per_epoch(config.base)
    shares = forecast.shares(config, planned, images_per_epoch)
    whole = forecast.to_the_end(config, planned)
    images = np.array([trial.images for trial in planned], dtype=float)
    saved = _Total(0.0, 1 - shares @ images / (whole @ images))
    free = _Course(tuple(trials.values()), shares, whole, saved, images_per_epoch)
    return dataclasses.replace(free, shares=free.shares * _affordable(config, known, free)[:, None])


def _affordable(config: Sweep, known: Known, course: _Course) -> NDArray[np.float64]:
    """The part of each draw [draws] that the budget has room for."""
    budget, prices = config.budget, known.prices
    has_gpus = config.base.resources.gpus_per_worker or config.base.pool.gpus_per_replica
    limits: list[tuple[float | None, Callable[[RunPlan], float]]] = [
        (budget.images, lambda trial: trial.run.images_seen),
        (budget.gpu_hours if has_gpus else None, lambda trial: _device_hours(trial.hours)),
        (budget.money if prices else None, lambda trial: _price(trial.hours, prices)),
    ]
    part = np.ones(len(course.shares))
    for limit, quantity in limits:
        if limit is not None:
            part = np.minimum(part, limit / np.maximum(course.of(quantity).drawn, 1e-12))
    return part


def _device_hours(hours: Hours | None) -> float:
    return (hours.student or 0.0) + (hours.teacher or 0.0) if hours else 0.0


def _price(hours: Hours | None, prices: Prices | None) -> float:
    return prices.of(hours).money if hours and prices else 0.0


def _at_once(config: Sweep, known: Known, trial: Resources, trials: int) -> int:
    """Trials that run at the same time: as many as are known to fit, or as fit on the cores of the
    machine that was measured beside the largest pool, since Ray gives out no more.
    """
    most = min(config.asha.max_concurrent, trials)
    if known.slots is not None:
        return max(1, min(most, known.slots))
    if known.pace is None or not known.pace.cores:
        return most
    each, pool = config.base.resources, config.base.pool
    kept = (trial.max_replicas or 0) * pool.cpus_per_replica
    if config.fidelity.apgd_from is not None:  # beside the training
        kept += config.fidelity.workers
    cpus = each.workers * each.cpus_per_worker
    return max(1, min(most, int((known.pace.cores - kept + 1e-6) / cpus)))


def _verdicts(
    config: Sweep, known: Known, course: _Course, experiments: Mapping[str, Experiment]
) -> Verdicts:
    late, base = config.fidelity, config.base
    held_out = base.data.validation_images
    classes = known.outline(base.data).shape.num_classes
    forward = max(2e9 * trial.student.forward_gmacs for trial in course.trials)  # FLOP
    validations = 0.0
    if late.apgd_from is not None:
        for number, experiment in enumerate(experiments.values()):
            validations += float(_late(experiment, late.apgd_from, course.shares[:, number]).mean())
    judged = min(late.best + 1, len(course.trials)) if late.finalists != "none" else 0
    finalists = judged * config.repeats.seeds
    screened = _passes(catalogue.attacks(classes, level="screen"))
    apgd = catalogue.CLEAN.passes + screened * late.apgd_steps / catalogue.STANDARD.apgd_steps
    standard = catalogue.attacks(classes, late.finalists if judged else "standard")
    strongest = catalogue.CLEAN.passes + _passes(standard)
    images = validations * min(late.apgd_images or held_out, held_out)
    return Verdicts(
        validations=validations,
        finalists=finalists,
        beside_pflop=images * apgd * forward / 1e15,
        after_pflop=finalists * held_out * strongest * forward / 1e15,
    )


def _late(experiment: Experiment, since: float, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many validations from share `since` of its epochs on a trial comes to [draws], that is
    trained to `shares` [draws] of its run; above 1 are repeats.
    """
    epochs, every = experiment.optim.epochs, experiment.selection.every_epochs
    at = np.array([*range(every, epochs, every), epochs]) / epochs
    at = at[at >= since - 1e-9]
    whole = np.floor(shares)
    return len(at) * whole.astype(np.int64) + np.searchsorted(at, shares - whole + 1e-9, "right")


def _passes(attacks: Iterable[str]) -> int:
    return sum(catalogue.STAGES[name].passes for name in attacks)


def _hours_of_verdicts(
    config: Sweep, verdicts: Verdicts | None, known: Known
) -> tuple[float, float]:
    """(device hours of all, hours of those after the training); a task of theirs has one device."""
    if verdicts is None:
        return 0.0, 0.0
    seconds = 1e3 / known.tflops if known.tflops else 0.0  # per PFLOP on one device
    if known.pace:
        seconds = known.pace.validation * _units(config.base)[0]
    after = verdicts.after_pflop * seconds / 3600
    return after + verdicts.beside_pflop * seconds / 3600, after / config.fidelity.workers


def _hours_of_sweep(
    config: Sweep, course: _Course, concurrent: int, known: Known, verdicts: Verdicts | None
) -> Hours | None:
    def total(quantity: Callable[[Hours], float | None]) -> _Total:
        return course.of(lambda trial: (quantity(trial.hours) or 0.0) if trial.hours else 0.0)

    if not (known.pace or known.tflops):
        return None
    if known.pace:
        wall = _wall_side_by_side(config, course, concurrent, known.pace)
    else:
        wall = total(lambda hours: (hours.wall or 0.0) / concurrent)
    judging, after = _hours_of_verdicts(config, verdicts, known)
    hours = Hours(
        student=total(lambda hours: hours.student).expected,
        validation=total(lambda hours: hours.validation).expected,
        teacher=total(lambda hours: hours.teacher).expected,
        verdicts=judging or None,
        worst=wall.worst + after,
        expected=wall.expected + after,
        expected_range=Range(wall.range.low, wall.range.high + after),
    )
    if not known.pace:
        return hours
    start = total(lambda hours: hours.start).expected
    devices = concurrent * _units(config.base)[0] * config.base.resources.is_single
    return _with_slots(hours, start, devices, known.pace)


def _with_slots(hours: Hours, start: float, devices: float, pace: Pace) -> Hours:
    """With the start of the slots' processes, which hold `devices`."""
    slots = devices * pacing.PROCESSES_OF_SLOT * pace.process_s / 3600
    return dataclasses.replace(hours, student=(hours.student or 0.0) + slots, start=start + slots)


def _wall_side_by_side(config: Sweep, course: _Course, concurrent: int, pace: Pace) -> _Total:
    """Hours from the sweep's start: its pool's, its slots' processes, then its trials, which slow
    each other where they keep more threads busy than there are cores, or the pool's replicas.
    """
    alone = [trial.hours for trial in course.trials if trial.hours]
    walls = np.array([hours.wall or 0.0 for hours in alone])
    busy = _busy(alone)
    replicas = max(trial.resources.max_replicas or 0 for trial in course.trials)
    teacher = sum(hours.teacher or 0.0 for hours in alone) / max(walls.sum(), 1e-12)
    teacher /= _units(config.base)[1]  # replicas that a trial keeps busy

    def factor(running: int) -> float:
        return max(pace.factor(running * busy), running * teacher / replicas if replicas else 0.0)

    process = pace.process_s / 3600
    before = pacing.PROCESSES_OF_SLOT * process * pace.factor(concurrent)
    before += pacing.PROCESSES_OF_POOL * process if replicas else 0.0

    def hours(shares: NDArray[np.float64]) -> float:
        return before + pacing.makespan(_whole(shares, walls), concurrent, factor)

    return _Total(hours(course.worst), np.array([hours(row) for row in course.shares]))


def _whole(shares: NDArray[np.float64], walls: NDArray[np.float64]) -> list[float]:
    """A duration per run: a share above 1 is of repeats, which are runs of their own."""
    return [
        part * wall
        for share, wall in zip(shares.tolist(), walls.tolist(), strict=True)
        for part in (*[1.0] * int(share), share - int(share))
    ]


def _cost_of_sweep(course: _Course, prices: Prices, hours: Hours) -> Cost:
    """Of the trials in every draw, and of what else `hours` has: the start of slots, and late
    verdicts, which may cost nearly nothing.
    """
    money = course.of(lambda trial: _price(trial.hours, prices))
    expected = prices.of(hours).money
    rest = max(0.0, expected - money.expected)
    low, high = money.range
    verdicts = (hours.verdicts or 0.0) * prices.student
    return Cost(expected, prices.currency, Range(low + rest - verdicts, high + rest))


def recorded(planned: SweepPlan, budget: Budget, measured: bool = False) -> runs.Planned:
    """What a sweep's manifest keeps of its plan; `measured` where its hours are of a pace."""

    def estimate(expected: float, spread: Range, unit: float = 1.0) -> runs.Estimate:
        values = (round(unit * value, 4) for value in (expected, spread.low, spread.high))
        return runs.Estimate(**dict(zip(("expected", "low", "high"), values, strict=True)))

    hours, cost = planned.hours, planned.cost
    known: dict[str, Any] = {}
    if hours and hours.expected is not None and hours.expected_range:
        known["seconds"] = estimate(hours.expected, hours.expected_range, 3600)
        known["measured"] = measured
    if cost and cost.money_range:
        known |= {"money": estimate(cost.money, cost.money_range), "currency": cost.currency}
    return runs.Planned(
        trials=planned.trials,
        images=estimate(planned.expected_images_seen, planned.images_range),
        budget=budget.model_dump(mode="json", exclude_none=True),
        **known,
    )


def _shared(config: Sweep, trial: Resources, concurrent: int, notes: set[str]) -> Resources:
    """Resources of `concurrent` trials with the one pool that they share."""
    pool, replicas = config.base.pool, trial.min_replicas or 0
    pool_cpus, pool_gpus = replicas * pool.cpus_per_replica, replicas * pool.gpus_per_replica
    needed = None
    if trial.replicas_needed is not None:
        needed = concurrent * trial.replicas_needed
        notes |= _too_few(f"{concurrent} trials at a time need", needed, pool.max_replicas)
    return Resources(
        workers=concurrent * trial.workers,
        cpus=concurrent * (trial.cpus - pool_cpus) + pool_cpus,
        gpus=concurrent * (trial.gpus - pool_gpus) + pool_gpus,
        min_replicas=replicas,
        max_replicas=trial.max_replicas,
        replicas_needed=needed,
    )


def _too_few(who_needs: str, needed: float, most: int) -> set[str]:
    if needed <= most:
        return set()
    return {
        f"{who_needs} about {needed:.1f} teacher replicas, but pool.max_replicas={most}; raise it "
        "or training waits for the teacher"
    }


def _teacher(config: TeacherTraining, known: Known) -> TeacherPlan:
    net = _trained(config, known.outline(config.data).shape)
    forward, layer = _forward_macs(net), net.check_layer(None)
    steps = math.ceil(config.images_seen / config.batch)
    pflop = 3 * 2 * forward * steps * config.batch / 1e15  # a forward and a full backward pass
    resources = config.resources
    devices = resources.workers * (resources.gpus_per_worker or resources.threads_per_worker)
    return TeacherPlan(
        kind=config.kind,
        teacher=Teacher(
            params=parameters(net),
            forward_gmacs=forward / 1e9,
            layer=layer,
            feature_gmacs=feature_macs(net, None) / 1e9,
        ),
        run=TrainingOfTeacher(
            steps=steps,
            images_seen=steps * config.batch,
            checkpoints=math.ceil(config.images_seen / config.checkpoint_images),
            pflop=pflop,
        ),
        resources=Resources(
            workers=resources.workers,
            cpus=resources.workers * resources.cpus_per_worker,
            gpus=resources.workers * resources.gpus_per_worker,
        ),
        hours=Hours(wall=pflop * 1e3 / known.tflops / 3600 / devices) if known.tflops else None,
        notes=(),
    )


def _synthesis(config: Synthesis, known: Known) -> SynthesisPlan:
    found = known.teacher or known.teacher_at(config.teacher)
    net = found.net if found else None
    sampler = None if net is None else image_sampler(net, str(config.teacher))
    candidates = config.images / (config.select.keep if config.select else 1)
    shards = math.ceil(candidates / config.shard_images)
    calls = heun_calls(config.steps) if sampler is None else sampler.calls_per_image(config)
    return _sampled(
        config, known, net, Sampling(config.images, shards, calls), math.ceil(candidates)
    )


def _canonical(config: Canonical, known: Known) -> SynthesisPlan:
    found = known.teacher or known.teacher_at(config.teacher)
    train = known.outline(config.data).train
    images = math.ceil(config.share * train)
    shards = math.ceil(images / config.shard_images)
    run = Sampling(images, shards, config.calls_per_image)
    plan = _sampled(config, known, found.net if found else None, run, images)
    most = "the cost is the most that it may be: subspace iteration ends when it has converged"
    iterated = config.vectors and config.directions != "random"
    return dataclasses.replace(plan, notes=(*plan.notes, most) if iterated else plan.notes)


def _sampled(
    config: Synthesis | Canonical, known: Known, net: Network | None, run: Sampling, made: int
) -> SynthesisPlan:
    """The plan of what a teacher makes of `made` images, with what is known of the teacher."""
    workers = min(config.workers, run.shards)
    teacher, hours = None, None
    if net:
        forward = _forward_macs(net)
        decode = _decode_macs(net, image_sampler(net, str(config.teacher)))
        macs_per_image = run.network_calls_per_image * forward + decode
        pflop = 2 * macs_per_image * made / 1e15
        teacher = Teacher(params=parameters(net), forward_gmacs=forward / 1e9)
        run = dataclasses.replace(run, gflop_per_image=2 * macs_per_image / 1e9, pflop=pflop)
        if known.tflops:
            devices = workers * (config.gpus_per_worker or 1)
            hours = Hours(wall=pflop * 1e3 / known.tflops / 3600 / devices)
    return SynthesisPlan(
        kind=config.kind,
        teacher=teacher,
        run=run,
        resources=Resources(
            workers=workers,
            cpus=workers * config.cpus_per_worker,
            gpus=workers * config.gpus_per_worker,
        ),
        hours=hours,
        notes=() if net else ("teacher is not set, so the cost of an image is not known",),
    )


def _decode_macs(net: Network, sampler: ImageSampler) -> float:
    """Of turning one image's latents into pixels."""
    decode = sampler.decoding()
    if decode is None:
        return 0.0
    return macs(lambda: decode(torch.empty(1, *net.noise_shape, device="meta")))


def _quickstart(config: Quickstart, known: Known) -> QuickstartPlan:
    """Its three stages; the later ones use the teacher that the first one would train."""
    net = _trained(config.teacher, known.outline(config.teacher.data).shape)
    known = dataclasses.replace(known, teacher=fitting.Known(net, {}))
    teacher = _teacher(config.teacher, known)
    synthesis = _synthesis(config.synthesis, known)
    sweep = _sweep(config.sweep, known)
    stages: dict[str, TeacherPlan | SynthesisPlan | SweepPlan] = {
        "teacher": teacher,
        "synthesis": synthesis,
        "sweep": sweep,
    }
    hours = (
        teacher.hours and teacher.hours.wall,
        synthesis.hours and synthesis.hours.wall,
        sweep.hours and sweep.hours.expected,
    )
    return QuickstartPlan(
        kind=config.kind,
        teacher=teacher,
        synthesis=synthesis,
        sweep=sweep,
        hours=Hours(wall=sum(part or 0.0 for part in hours)) if known.tflops else None,
        notes=tuple(f"{name}: {note}" for name, stage in stages.items() for note in stage.notes),
    )


# -- for people ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class PlannedRow:
    """A line of the printed plan: `value` as it was counted, `text` as people write it."""

    stage: str
    quantity: str
    value: object
    text: str


def rows(planned: Plan) -> list[PlannedRow]:
    """A plan in reading order, stage by stage; notes come last, with an empty stage."""
    listed = [
        PlannedRow(stage, label, value, text)
        for stage, part in _stages(planned)
        for label, value, text in _values(part)
    ]
    return listed + [PlannedRow("", "note", note, note) for note in planned.notes]


def summary(planned: Plan) -> str:
    """One line: what runs, how much of it, how long and for how much, as far as that is known."""
    if isinstance(planned, QuickstartPlan):
        parts = ["a teacher, synthetic images and", f"{planned.sweep.trials} trials"]
        return " ".join(parts) + _so_long(planned.hours.wall if planned.hours else None)
    if isinstance(planned, SweepPlan):
        said = (
            f"{planned.trials} trials, {planned.concurrent} at a time, "
            f"{planned.expected_pflop:,.3g} PFLOP expected of {planned.worst_pflop:,.3g} "
            f"({planned.scheduler} saves {planned.saved_range:.0%} of the images)"
        )
        said += _so_long(planned.hours.expected if planned.hours else None)
        return said + _so_much(planned.cost)
    if isinstance(planned, RunPlan):
        said = f"{planned.run.steps:,} steps, {planned.run.pflop:,.3g} PFLOP"
        said += _so_long(planned.hours.wall if planned.hours else None) + _so_much(planned.cost)
        return said + f", {planned.needs.memory_gb:.2g} GB for a worker"
    if isinstance(planned, TeacherPlan):
        said = f"{planned.run.steps:,} steps, {planned.run.pflop:,.3g} PFLOP"
    else:
        said = f"{planned.run.images:,} images"
    return said + _so_long(planned.hours.wall if planned.hours else None)


def _so_long(hours: float | None) -> str:
    if hours is None:
        return ""
    return f", about {hours:,.1f} hours" if hours >= 1 else f", about {60 * hours:.1f} minutes"


def _so_much(cost: Cost | None) -> str:
    return "" if cost is None else f", about {cost.money:,.2f} {cost.currency}"


def _stages(planned: Plan) -> list[tuple[str, Plan | Hours]]:
    if isinstance(planned, QuickstartPlan):
        parts: list[Plan] = [planned.teacher, planned.synthesis, planned.sweep]
        below = [pair for part in parts for pair in _stages(part)]
        return below + ([("quickstart", planned.hours)] if planned.hours else [])
    if isinstance(planned, SweepPlan):
        return [("sweep", planned), ("largest trial", planned.largest_trial)]
    return [(planned.kind, planned)]


def _values(part: object) -> Iterator[tuple[str, object, str]]:
    """(label, value, text) of every field that is to be shown, also of records within; another
    plan within is a stage of its own.
    """
    for name, hint in typing.get_type_hints(type(part), include_extras=True).items():
        value = getattr(part, name)
        if value is not None and typing.get_origin(hint) is Annotated:
            how: Shown = typing.get_args(hint)[1]
            yield how.label, value, _text(value, how.shape)
        elif dataclasses.is_dataclass(value) and not isinstance(value, Plan):
            yield from _values(value)


def _text(value: object, shape: str) -> str:
    return ", ".join(map(str, value)) if type(value) is tuple else shape.format(value)
