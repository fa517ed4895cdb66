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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dra_ray import data, students
from dra_ray.config import (
    Config,
    Experiment,
    Loss,
    Model,
    Quickstart,
    Sweep,
    Synthesis,
    TeacherTraining,
    Threat,
    flatten,
)
from dra_ray.data import Shape
from dra_ray.storage import Store
from dra_ray.sweeps import rungs
from dra_ray.teachers import checkpoint
from dra_ray.teachers.network import Classifier, ImageSampler, Network, image_sampler
from dra_ray.teachers.sampling import heun_calls
from dra_ray.training import objective
from dra_ray.training.projector import projector

Plan = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Known:
    """What planning may look at besides the config; `tflops` sustained by one GPU, or by one CPU
    thread where no GPU is asked for.
    """

    tflops: float | None = None
    teacher: Network | None = None


def plan(config: Config, tflops: float | None = None) -> Plan:
    """Plain nested data: what `config` would build, compute and occupy; hours only where `tflops`
    is given.

    A teacher's cost is known once its folder exists; until then `notes` says what is missing.
    Raises the errors of reading data and cards.
    """
    return _plan(config, Known(tflops=tflops))


def _plan(config: Config, known: Known) -> Plan:
    if isinstance(config, Experiment):
        return _experiment(config, known)
    if isinstance(config, Sweep):
        return _sweep(config, known)
    if isinstance(config, TeacherTraining):
        return _teacher(config, known)
    if isinstance(config, Synthesis):
        return _synthesis(config, known)
    return _quickstart(config, known)


# -- cost of networks ------------------------------------------------------------------------------
def macs(call: Callable[[], Any]) -> float:
    """Multiply-accumulates of `call()`, which may run on meta tensors: convolutions, matrix
    products and attention.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@functools.cache
def student_cost(settings: Model, shape: Shape) -> tuple[int, float, int]:
    """(parameters, MACs of one image's forward pass, width of the feature) of a student; the errors
    of `models.check`.
    """
    student = students.check(settings, shape).eval()
    forward = macs(
        lambda: student(
            torch.empty(1, shape.channels, shape.resolution, shape.resolution, device="meta")
        )
    )
    return parameters(student), forward, student.feature_dim


def step_units(loss: Loss, threat: Threat, perturbed: bool = False) -> int:
    """Forward passes that one image of a step is worth; `perturbed` where the step also perturbs
    the weights (AWP).

    The attack's k steps are a forward and a gradient of the input each. Then every view that is
    trained on is a forward and a full backward: two views of trades and ikl (k=10: 26), the
    adversarial one of pgd-at and fgsm-rs (k=10: 23). The attack's target is the clean view's own
    forward, unless the attack runs in eval mode or weights change after it. AWP's ascent goes
    through the same views once more.
    """
    views = objective.of(loss).views
    target_apart = views == 2 and (perturbed or threat.mode == "eval")
    return 2 * threat.steps + 3 * views * (2 if perturbed else 1) + target_apart


def mean_step_units(config: Experiment) -> float:
    """`step_units` on average over the run: AWP starts at a later epoch."""
    epochs, loss = config.optim.epochs, config.loss
    perturbed = max(0, epochs - loss.awp_from_epoch) / epochs if loss.awp else 0.0
    return (1 - perturbed) * step_units(loss, config.threat) + perturbed * step_units(
        loss, config.threat, perturbed=True
    )


def _trained(config: TeacherTraining, shape: Shape) -> Network:
    """What `dra teacher train` would make."""
    kind = checkpoint.TRAINED[config.objective]
    with torch.device("meta"):
        return kind(
            config.net, shape.resolution, shape.channels, shape.num_classes, style=config.style
        )


def _teacher_at(uri: str | None) -> Network | None:
    if uri is None:
        return None
    with torch.device("meta"):
        return checkpoint.build(checkpoint.read_card(Store(uri)), uri)


def _forward_macs(net: Network) -> float:
    """Of one image's forward pass, as the teacher's own training and its sampler call it."""
    x, sigma, labels = _noisy_input(net)
    if isinstance(net, Classifier):
        return macs(lambda: net.classify(x, sigma))
    return macs(lambda: net(x.new_empty(1, *net.noise_shape), sigma, labels))


@functools.lru_cache(maxsize=16)  # the trials of a sweep share their teacher
def _feature_macs(net: Network, layer: str | None) -> float:
    return macs(lambda: net.features(*_noisy_input(net), layer))


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
def _experiment(config: Experiment, known: Known) -> Plan:
    images = data.outline(config.data)
    shape = images.shape
    student_params, forward, feature_dim = student_cost(config.model, shape)
    notes = _weights_note(config)
    teacher = _aligned_teacher(config, known, notes)
    feature = _feature_macs(teacher, config.teacher.layer) if teacher else 0.0
    targets = (
        2 if config.align.extra_weight else 1
    )  # features per image; the projector runs once for each
    encode, units = targets * feature, mean_step_units(config)
    step = units * forward
    if teacher:
        step += (
            3
            * targets
            * _projector_macs(
                feature_dim, teacher.feature_dim(config.teacher.layer), config.align.hidden
            )
        )
    batches = data.batch_plan(config, images.train, config.synthetic.images)
    steps = config.optim.epochs * batches.steps_per_epoch
    seen = steps * config.optim.batch
    validations = math.ceil(config.optim.epochs / config.selection.every_epochs)
    # an evaluation step is a forward and a gradient of the input; the clean and the final verdict
    # are a forward each
    checking = validations * images.validation * (2 * config.selection.steps + 2) * forward
    made: Plan = {
        "kind": config.kind,
        "student": {
            "name": config.model.name,
            "params": student_params,
            "forward_gmacs": forward / 1e9,
        },
        "step": {
            "forward_units": units,
            "gflop_per_image": 2 * step / 1e9,
            "teacher_gflop_per_image": 2 * encode / 1e9,
        },
        "run": {
            "epochs": config.optim.epochs,
            "steps": steps,
            "images_seen": seen,
            "real_images": images.train,
            "synthetic_images": config.synthetic.images,
            "synthetic_passes": steps * batches.synthetic_per_batch / config.synthetic.images
            if config.synthetic.images
            else None,
            "checkpoints": validations,
            "student_pflop": 2 * (seen * step + checking) / 1e15,
            "teacher_pflop": 2 * seen * encode / 1e15,
        },
        "resources": _resources(config, encode / step, notes),
    }
    if teacher:
        layer = teacher.check_layer(config.teacher.layer)
        made["teacher"] = {
            "params": parameters(teacher),
            "layer": layer,
            "feature_gmacs": feature / 1e9,
        }
    if known.tflops:
        made["hours"] = _hours(config, made, known.tflops)
    return made | {"notes": sorted(notes)}


def _weights_note(config: Experiment) -> set[str]:
    if config.model.weights or not config.model.name.startswith("timm/"):
        return set()
    return {f"model.weights is not set, so {config.model.name} starts from random weights"}


def _aligned_teacher(config: Experiment, known: Known, notes: set[str]) -> Network | None:
    if not config.align.weight:
        return None
    teacher = known.teacher or _teacher_at(config.teacher.uri)
    if teacher is None:
        notes.add("teacher.uri is not set, so the teacher's work is not counted")
    return teacher


def _projector_macs(wide_in: int, wide_out: int, hidden: int) -> float:
    with torch.device("meta"):
        head = projector(wide_in, wide_out, hidden)
    return macs(lambda: head(torch.empty(1, wide_in, device="meta")))


def _resources(config: Experiment, work_ratio: float, notes: set[str]) -> Plan:
    """What is asked of Ray at the smallest pool; `work_ratio` is teacher work over student work per
    image.
    """
    resources, pool = config.resources, config.pool
    replicas = pool.min_replicas if config.align.weight and pool.kind == "pool" else 0
    asked: Plan = {
        "workers": resources.workers,
        "min_workers": resources.min_workers,
        "cpus": resources.workers * resources.cpus_per_worker + replicas * pool.cpus_per_replica,
        "gpus": resources.workers * resources.gpus_per_worker + replicas * pool.gpus_per_replica,
        "min_replicas": replicas,
        "max_replicas": pool.max_replicas if replicas else 0,
    }
    if not (replicas and work_ratio):
        return asked
    if bool(resources.gpus_per_worker) != bool(pool.gpus_per_replica):
        notes.add(
            "students and teachers are on different kinds of device, so the number of replicas "
            "that keeps up is not known"
        )
        return asked
    needed = (
        work_ratio
        * resources.workers
        * _units(config)[0]
        / _units(config)[1]
        / pool.target_utilisation
    )
    notes |= _too_few("one run needs", needed, pool.max_replicas)
    return asked | {"replicas_needed": needed}


def _units(config: Experiment) -> tuple[float, float]:
    """GPUs of a training worker and of a replica, or their CPU threads where they have no GPU."""
    return (
        config.resources.gpus_per_worker or config.resources.threads_per_worker,
        config.pool.gpus_per_replica or config.pool.threads_per_replica,
    )


def _hours(config: Experiment, made: Plan, tflops: float) -> Plan:
    """Hours of one run: `student` and `teacher` are device hours, `wall` assumes that the slower of
    the two sets the pace.
    """
    per_worker, per_replica = _units(config)
    student, teacher = (
        made["run"][f"{who}_pflop"] * 1e3 / tflops / 3600 for who in ("student", "teacher")
    )
    asked = made["resources"]
    if not asked["max_replicas"]:
        return {
            "student": student,
            "teacher": teacher,
            "wall": (student + teacher) / (asked["workers"] * per_worker),
        }
    replicas = min(
        max(math.ceil(asked.get("replicas_needed", 1)), asked["min_replicas"]),
        asked["max_replicas"],
    )
    return {
        "student": student,
        "teacher": teacher,
        "wall": max(student / (asked["workers"] * per_worker), teacher / (replicas * per_replica)),
    }


def _sweep(config: Sweep, known: Known) -> Plan:
    experiments = config.experiments()
    if "teacher.uri" not in config.space and known.teacher is None:
        known = dataclasses.replace(known, teacher=_teacher_at(config.base.teacher.uri))
    trials = {name: _experiment(experiment, known) for name, experiment in experiments.items()}
    seen = {name: trial["run"]["images_seen"] for name, trial in trials.items()}
    epochs = config.base.optim.epochs
    marks = rungs.of_sweep(config, max(seen.values()) // epochs)
    kept = {name: _expected_share(config, marks, experiments[name].optim.epochs) for name in trials}
    largest = max(
        trials.values(), key=lambda trial: (_pflop(trial), trial["resources"]["max_replicas"])
    )
    concurrent = min(config.asha.max_concurrent, len(trials))
    notes = {note for trial in trials.values() for note in trial["notes"]}
    made: Plan = {
        "kind": config.kind,
        "trials": len(trials),
        "concurrent": concurrent,
        "rung_epochs": marks,
        "worst_images_seen": sum(seen.values()),
        "expected_images_seen": round(sum(seen[name] * kept[name] for name in trials)),
        "worst_pflop": sum(_pflop(trial) for trial in trials.values()),
        "expected_pflop": sum(_pflop(trial) * kept[name] for name, trial in trials.items()),
        "resources": _shared(config, largest["resources"], concurrent, notes),
        "largest_trial": largest,
        "notes": sorted(notes),
    }
    if known.tflops:
        hours = {name: trial["hours"]["wall"] for name, trial in trials.items()}
        made["hours"] = {
            "worst": sum(hours.values()) / concurrent,
            "expected": sum(hours[name] * kept[name] for name in trials) / concurrent,
        }
    return made


def _pflop(trial: Plan) -> float:
    return trial["run"]["student_pflop"] + trial["run"]["teacher_pflop"]


def _shared(config: Sweep, trial: Plan, concurrent: int, notes: set[str]) -> Plan:
    """Resources of `concurrent` trials with the one pool that they share."""
    pool, replicas = config.base.pool, trial["min_replicas"]
    asked = {
        "workers": concurrent * trial["workers"],
        "cpus": concurrent * (trial["cpus"] - replicas * pool.cpus_per_replica)
        + replicas * pool.cpus_per_replica,
        "gpus": concurrent * (trial["gpus"] - replicas * pool.gpus_per_replica)
        + replicas * pool.gpus_per_replica,
        "min_replicas": replicas,
        "max_replicas": trial["max_replicas"],
    }
    if "replicas_needed" in trial:
        asked["replicas_needed"] = concurrent * trial["replicas_needed"]
        notes |= _too_few(
            f"{concurrent} trials at a time need", asked["replicas_needed"], pool.max_replicas
        )
    return asked


def _too_few(who_needs: str, needed: float, most: int) -> set[str]:
    if needed <= most:
        return set()
    return {
        f"{who_needs} about {needed:.1f} teacher replicas, but pool.max_replicas={most}; raise it "
        "or training waits for the teacher"
    }


def _expected_share(config: Sweep, rung_epochs: list[int], epochs: int) -> float:
    """Part of its epochs that a trial runs on average when every rung keeps one in
    `reduction_factor`.
    """
    marks = [mark for mark in rung_epochs if mark < epochs]
    edges = [0, *marks, epochs]
    return (
        sum(
            (edges[i + 1] - edges[i]) / config.asha.reduction_factor**i
            for i in range(len(edges) - 1)
        )
        / epochs
    )


def _teacher(config: TeacherTraining, known: Known) -> Plan:
    net = _trained(config, data.outline(config.data).shape)
    forward, layer = _forward_macs(net), net.check_layer(None)
    steps = math.ceil(config.images_seen / config.batch)
    pflop = 3 * 2 * forward * steps * config.batch / 1e15  # a forward and a full backward pass
    resources = config.resources
    made: Plan = {
        "kind": config.kind,
        "teacher": {
            "params": parameters(net),
            "forward_gmacs": forward / 1e9,
            "layer": layer,
            "feature_gmacs": _feature_macs(net, None) / 1e9,
        },
        "run": {
            "steps": steps,
            "images_seen": steps * config.batch,
            "checkpoints": math.ceil(config.images_seen / config.checkpoint_images),
            "pflop": pflop,
        },
        "resources": {
            "workers": resources.workers,
            "cpus": resources.workers * resources.cpus_per_worker,
            "gpus": resources.workers * resources.gpus_per_worker,
        },
        "notes": [],
    }
    if known.tflops:
        devices = resources.workers * (resources.gpus_per_worker or resources.threads_per_worker)
        made["hours"] = {"wall": pflop * 1e3 / known.tflops / 3600 / devices}
    return made


def _synthesis(config: Synthesis, known: Known) -> Plan:
    net = known.teacher or _teacher_at(config.teacher)
    sampler = None if net is None else image_sampler(net, str(config.teacher))
    candidates = config.images / (config.select.keep if config.select else 1)
    shards = math.ceil(candidates / config.shard_images)
    calls = heun_calls(config.steps) if sampler is None else sampler.calls_per_image(config)
    workers = min(config.workers, shards)
    made: Plan = {
        "kind": config.kind,
        "run": {"images": config.images, "shards": shards, "network_calls_per_image": calls},
        "resources": {
            "workers": workers,
            "cpus": workers * config.cpus_per_worker,
            "gpus": workers * config.gpus_per_worker,
        },
        "notes": [] if net else ["teacher is not set, so the cost of an image is not known"],
    }
    if net and sampler:
        forward, decode = _forward_macs(net), _decode_macs(net, sampler)
        made["teacher"] = {"params": parameters(net), "forward_gmacs": forward / 1e9}
        made["run"] |= {
            "gflop_per_image": 2 * (calls * forward + decode) / 1e9,
            "pflop": 2 * (calls * forward + decode) * candidates / 1e15,
        }
        if known.tflops:
            made["hours"] = {
                "wall": made["run"]["pflop"]
                * 1e3
                / known.tflops
                / 3600
                / (workers * (config.gpus_per_worker or 1))
            }
    return made


def _decode_macs(net: Network, sampler: ImageSampler) -> float:
    """Of turning one image's latents into pixels."""
    decode = sampler.decoding()
    if decode is None:
        return 0.0
    return macs(lambda: decode(torch.empty(1, *net.noise_shape, device="meta")))


def _quickstart(config: Quickstart, known: Known) -> Plan:
    """Its three stages; the later ones use the teacher that the first one would train."""
    known = dataclasses.replace(
        known, teacher=_trained(config.teacher, data.outline(config.teacher.data).shape)
    )
    stages = {
        name: _plan(stage, known)
        for name, stage in (
            ("teacher", config.teacher),
            ("synthesis", config.synthesis),
            ("sweep", config.sweep),
        )
    }
    made: Plan = {
        "kind": config.kind,
        **stages,
        "notes": [f"{name}: {note}" for name, stage in stages.items() for note in stage["notes"]],
    }
    if known.tflops:
        made["hours"] = {
            "wall": sum(
                stage["hours"].get("wall", stage["hours"].get("expected", 0.0))
                for stage in stages.values()
            )
        }
    return made


# -- for people ------------------------------------------------------------------------------------
_SPELLING = {
    "student.name": ("student", "{}"),
    "student.params": ("student parameters", "{:,}"),
    "student.forward_gmacs": ("student forward, GMAC per image", "{:.4g}"),
    "teacher.params": ("teacher parameters", "{:,}"),
    "teacher.forward_gmacs": ("teacher forward, GMAC per image", "{:.4g}"),
    "teacher.layer": ("teacher feature layer", "{}"),
    "teacher.feature_gmacs": ("teacher up to its feature, GMAC per image", "{:.4g}"),
    "step.forward_units": ("forward passes a training image is worth", "{:.4g}"),
    "step.gflop_per_image": ("student training, GFLOP per image", "{:.4g}"),
    "step.teacher_gflop_per_image": ("teacher, GFLOP per training image", "{:.4g}"),
    "trials": ("trials", "{}"),
    "concurrent": ("trials at the same time", "{}"),
    "rung_epochs": ("ASHA compares after epochs", "{}"),
    "worst_images_seen": ("training images if nothing is stopped", "{:,}"),
    "expected_images_seen": ("training images expected with ASHA", "{:,}"),
    "worst_pflop": ("PFLOP if nothing is stopped", "{:.4g}"),
    "expected_pflop": ("PFLOP expected with ASHA", "{:.4g}"),
    "run.epochs": ("epochs", "{}"),
    "run.steps": ("steps", "{:,}"),
    "run.images": ("images to make", "{:,}"),
    "run.images_seen": ("training images", "{:,}"),
    "run.real_images": ("real images to draw from", "{:,}"),
    "run.synthetic_images": ("synthetic images to draw from", "{:,}"),
    "run.synthetic_passes": ("passes over the synthetic images", "{:.2f}"),
    "run.shards": ("shards", "{:,}"),
    "run.network_calls_per_image": ("network calls per image", "{}"),
    "run.gflop_per_image": ("GFLOP per image", "{:.4g}"),
    "run.checkpoints": ("checkpoints", "{:,}"),
    "run.student_pflop": ("student PFLOP, validation included", "{:.4g}"),
    "run.teacher_pflop": ("teacher PFLOP", "{:.4g}"),
    "run.pflop": ("PFLOP", "{:.4g}"),
    "resources.workers": ("workers", "{}"),
    "resources.min_workers": ("workers, at least, while nodes are lost", "{}"),
    "resources.cpus": ("CPUs asked for, smallest pool", "{:g}"),
    "resources.gpus": ("GPUs asked for, smallest pool", "{:g}"),
    "resources.min_replicas": ("teacher replicas, at least", "{}"),
    "resources.max_replicas": ("teacher replicas, at most", "{}"),
    "resources.replicas_needed": ("teacher replicas that keep up", "{:.2f}"),
    "hours.student": ("student device hours", "{:.3g}"),
    "hours.teacher": ("teacher device hours", "{:.3g}"),
    "hours.worst": ("hours if nothing is stopped", "{:.3g}"),
    "hours.expected": ("hours expected with ASHA", "{:.3g}"),
    "hours.wall": ("hours", "{:.3g}"),
}


def rows(made: Plan) -> list[dict[str, str]]:
    """A plan as table rows {"stage", "quantity", "value"}, in reading order; notes come last."""
    listed = [row for stage, part in _stages(made) for row in _stage_rows(stage, part)]
    return listed + [{"stage": "", "quantity": "note", "value": note} for note in made["notes"]]


def _stages(made: Plan) -> list[tuple[str, Plan]]:
    if made["kind"] == "quickstart":
        below = [pair for name in ("teacher", "synthesis", "sweep") for pair in _stages(made[name])]
        return [*below, ("quickstart", {"hours": made["hours"]})] if "hours" in made else below
    if made["kind"] == "sweep":
        return [
            ("sweep", {key: value for key, value in made.items() if key != "largest_trial"}),
            ("largest trial", made["largest_trial"]),
        ]
    return [(made["kind"], made)]


def _stage_rows(stage: str, part: Plan) -> list[dict[str, str]]:
    values = dict(flatten(part))
    return [
        {"stage": stage, "quantity": label, "value": _shown(values[key], shape)}
        for key, (label, shape) in _SPELLING.items()
        if values.get(key) is not None
    ]


def _shown(value: Any, shape: str) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else shape.format(value)
