"""One adversarial training step: the batch with its requested features, the loss, and the state
that a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dra_ray import config, data, runs, students
from dra_ray.attacks import pgd
from dra_ray.attacks.pgd import Climb
from dra_ray.data import augment, random
from dra_ray.data.canonical import CanonicalBatch, CanonicalImages
from dra_ray.storage import Store
from dra_ray.students import Student
from dra_ray.teachers.source import FeatureSource, Pending
from dra_ray.training import (
    alignment,
    arithmetic,
    distillation,
    losses,
    objective,
    optimisers,
    syncnorm,
    workers,
)
from dra_ray.training.clock import Clock

PARTS = ("loss", "loss_clean", "loss_robust", "loss_align")


@dataclasses.dataclass(frozen=True)
class Unjudged:
    """A validation that waits for its verdicts: its row without them, and copies on the CPU of the
    weights that are judged.
    """

    facts: dict[str, Any]
    weights: dict[runs.Weights, dict[str, Tensor]]


@dataclasses.dataclass
class State:
    """All that a checkpoint holds, and the student as its steps call it."""

    student: Student
    average: nn.Module
    aligner: alignment.Aligner | None  # none where lambda is 0
    distiller: distillation.Distiller | None  # none without canonical samples
    optimizer: torch.optim.Optimizer
    step: int
    best: float
    sums: losses.LossSums
    class_means: losses.ClassMeans
    rows: list[runs.ValidationRow]
    unjudged: Unjudged | None = None  # the newest validation, where it is under way

    def tensors(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "head": self.aligner.projectors[0].state_dict() if self.aligner else {},
            "more_heads": self.aligner.projectors[1:].state_dict() if self.aligner else {},
            "transforms": self.aligner.transforms.state_dict() if self.aligner else {},
            "distiller": self.distiller.state_dict() if self.distiller else {},
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums.sums,
            "class_means": self.class_means.state_dict(),
        } | ({"unjudged": self.unjudged.weights} if self.unjudged else {})

    def save(self, folder: Store) -> None:
        digest = (folder / "state.pt").write_torch(self.tensors())
        rows = [row.on_disk() for row in self.rows]
        facts = {"step": self.step, "best": self.best, "rows": rows, "sha256": digest}
        unjudged = {"unjudged": self.unjudged.facts} if self.unjudged else {}
        (folder / "state.json").write_json(facts | unjudged)

    def load(self, folder: Store) -> None:
        facts = (folder / "state.json").read_json()
        tensors = (folder / "state.pt").read_torch(facts.get("sha256"))  # older ones have none
        self.student.load_state_dict(tensors["student"])
        self.average.load_state_dict(tensors["average"])
        if self.aligner:
            self.aligner.projectors[0].load_state_dict(tensors["head"])
            self.aligner.projectors[1:].load_state_dict(tensors.get("more_heads", {}))
            self.aligner.transforms.load_state_dict(tensors.get("transforms", {}))
        if self.distiller:
            self.distiller.load_state_dict(tensors["distiller"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.sums.sums.copy_(tensors["sums"])
        self.class_means.load_state_dict(tensors["class_means"])
        self.step, self.best = facts["step"], facts["best"]
        if "unjudged" in facts:
            self.unjudged = Unjudged(facts["unjudged"], tensors["unjudged"])
        self.rows = [
            runs.parse(runs.ValidationRow, row, f"'{folder / 'state.json'}'")
            for row in facts["rows"]
        ]

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.student.parameters())


@dataclasses.dataclass(frozen=True)
class Batch:
    """A worker's slice of a batch: augmented images uint8 [b,C,H,W], labels int64 [b], the features
    under way, one for each term of the alignment, and canonical samples where they teach.
    """

    images: Tensor
    labels: Tensor
    targets: list[Pending]
    canonical: CanonicalBatch | None = None


def prepare(
    experiment: config.Experiment,
    images: Tensor,
    labels: Tensor,
    number: int,
    mine: slice,
    sources: Sequence[FeatureSource],
    *,
    samples: CanonicalImages | None = None,
) -> Batch:
    """Step `number`'s batch, from images as the data set has them; requests its features from the
    source of each term, where there are any. `samples` are those that distillation draws from.
    """
    changes = augment.parameters(
        experiment.optim.batch,
        experiment.data,
        random.generator(experiment.shared_seed, random.Stream.AUGMENT, number),
    )
    images = augment.apply(images, experiment.data, changes[mine])
    requests = alignment.requests(experiment, images, labels, number, mine) if sources else []
    pending = [source.submit(each) for source, each in zip(sources, requests, strict=True)]
    canonical = (
        distillation.prepare(experiment, samples, number, mine)
        if samples and experiment.distill.weight
        else None
    )
    return Batch(images, labels, pending, canonical)


class Feed:
    """The batches of coming steps. Requests their features `pool.ahead` steps before the step that
    needs them, so that attacks hide the round trip and a pool that is busy for a while delays
    nobody.

    Args:
        get: step -> (images uint8 [b,C,H,W], labels int64 [b]) of this worker.
        last: number of steps of the whole training.
        samples: canonical ones, of which each batch gets some where they teach.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        get: Callable[[int], tuple[Tensor, Tensor]],
        mine: slice,
        sources: Sequence[FeatureSource],
        last: int,
        samples: CanonicalImages | None = None,
    ) -> None:
        self._experiment, self._get, self._mine, self._sources, self._last = (
            experiment,
            get,
            mine,
            sources,
            last,
        )
        self._samples = samples
        self._ahead = experiment.pool.ahead if sources else 0
        self._ready: dict[int, Batch] = {}

    def take(self, number: int) -> Batch:
        """The batch of step `number`; call with consecutive steps."""
        for coming in range(number, min(number + self._ahead + 1, self._last)):
            if coming not in self._ready:
                self._ready[coming] = prepare(
                    self._experiment,
                    *self._get(coming),
                    coming,
                    self._mine,
                    self._sources,
                    samples=self._samples,
                )
        return self._ready.pop(number)


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """What a network draws from torch's global generators, such as dropout, is a function of
    `seed`; they go on as before.

    Checkpoints hold no generator's state, so this is what lets such a network resume to the bit.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def step(
    state: State,
    experiment: config.Experiment,
    batch: Batch,
    mine: slice,
    epoch: int = 0,
    clock: Clock | None = None,
    *,
    climb: Climb | None = None,
) -> Tensor:
    """One adversarial step on this worker's slice of the batch, gradients averaged over workers.
    The `clock` gets the time of its attack, whose steps `climb` takes; default: as
    `compute.compile` says.

    Returns float32 [4]: loss and its clean, robust and alignment parts; [5] with that of
    distillation where there is any.
    """
    size, seed = experiment.optim.batch, experiment.seed
    images, labels = batch.images, batch.labels
    noise = pgd.noise_like(
        (size, *images.shape[1:]),
        experiment.threat,
        random.generator(seed, random.Stream.ATTACK, state.step),
    )[mine]

    memory = torch.channels_last if experiment.compute.channels_last else torch.contiguous_format
    x = data.to_float(images).contiguous(memory_format=memory)
    student = state.student
    student.train()
    sets_statistics = state.step == 0 and experiment.optim.norm_first_batch
    _set_norm_momentum(student, 1.0 if sets_statistics else experiment.optim.norm_momentum)
    threat = pgd.threat_at(experiment.threat, epoch)
    state.optimizer.zero_grad()
    arithmetic.begin_step(experiment.compute)
    with (
        drawing(random.derive(seed, random.Stream.STUDENT, state.step, mine.start), x.device),
        objective.attacked(
            student,
            x,
            labels,
            noise,
            loss=experiment.loss,
            threat=threat,
            class_means=state.class_means,
            epoch=epoch,
            average=state.average,
            done=epoch / experiment.optim.epochs,
            clock=clock,
            climb=climb or arithmetic.climb(experiment.compute),
        ) as attacked,
    ):
        loss_clean, loss_robust, features = attacked.losses(maps=experiment.teacher.tokens)
        loss_align = torch.zeros((), device=x.device)
        if batch.targets:
            assert state.aligner is not None
            loss_align = state.aligner(features, batch.targets)
        weight = alignment.weight_at(experiment.align, epoch, experiment.optim.epochs)
        loss = loss_clean + loss_robust + weight * loss_align
        parts = [loss_clean, loss_robust, loss_align]
        if state.distiller:
            assert batch.canonical is not None
            parts.append(state.distiller(student, features, labels, batch.canonical))
            loss = loss + distillation.weight_at(experiment.distill, epoch) * parts[-1]
        (loss * _share(mine, size)).backward()
    # in one message: the attack is nine tenths of a step, so there is nothing to overlap it with
    workers.average_(
        [
            p.grad
            for group in state.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
    )
    optimisers.clip(state.optimizer, experiment.optim.clip_norm)
    state.optimizer.step()
    # everyone takes over worker 0's BatchNorm statistics, which checkpoints hold: a run goes on
    # alike after a restart
    workers.share_([buffer for buffer in student.buffers() if buffer.is_floating_point()])
    return torch.stack([loss, *parts]).detach()


def initial_state(
    experiment: config.Experiment,
    shape: data.Shape,
    sources: Sequence[FeatureSource],
    device: torch.device,
) -> tuple[State, str]:
    """The state before the first step, and a sentence on where the student's weights come from."""
    torch.manual_seed(experiment.seed)  # student first: it starts alike with and without alignment
    student: Any = students.build(experiment.model, shape)
    origin = students.initialise(student, experiment.model)
    aligner = None
    if sources:
        widths = [source.feature_dim for source in sources]
        aligner = alignment.Aligner(experiment.align, student.feature_dim, widths).to(device)
    distiller = None
    if experiment.distill.weight:
        distiller = distillation.Distiller(experiment.distill, student.feature_dim).to(device)
    average = copy.deepcopy(student).requires_grad_(False).to(device)
    if experiment.compute.sync_batchnorm:
        student = syncnorm.synchronised(student)
    student = arithmetic.arranged(student.to(device), experiment.compute, shape.resolution)
    if experiment.compute.channels_last:
        average = average.to(memory_format=torch.channels_last)
    optimizer = optimisers.build(student, aligner, experiment.optim, experiment.align, distiller)
    class_means = losses.ClassMeans(shape.num_classes, device)
    return State(
        student,
        average,
        aligner,
        distiller,
        optimizer,
        0,
        -1.0,
        losses.LossSums(len(PARTS) + bool(distiller), device),
        class_means,
        [],
    ), origin


def _share(mine: slice, batch: int) -> float:
    """Weight of a slice's mean loss in a plain mean over workers: 1 where the slices are equal."""
    return (mine.stop - mine.start) * workers.count() / batch


def _set_norm_momentum(student: nn.Module, momentum: float) -> None:
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
