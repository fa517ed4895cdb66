"""One adversarial training step: the batch with its requested features, the loss, and the state
that a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dra_ray import config, data, runs, students
from dra_ray.attacks import pgd
from dra_ray.data import augment, random
from dra_ray.storage import Store
from dra_ray.students import Student
from dra_ray.teachers.diffusion import draw_sigma
from dra_ray.teachers.source import FeatureSource, Pending, Request
from dra_ray.training import arithmetic, losses, objective, optimisers, syncnorm, workers
from dra_ray.training.projector import projector

PARTS = ("loss", "loss_clean", "loss_robust", "loss_align")


@dataclasses.dataclass
class State:
    """All that a checkpoint holds, and the student as its steps call it."""

    student: Student
    average: nn.Module
    head: nn.Module | None  # the projector; none where lambda is 0
    optimizer: torch.optim.Optimizer
    step: int
    best: float
    sums: Tensor  # loss and its parts since the last validation
    class_means: losses.ClassMeans
    rows: list[runs.ValidationRow]

    def tensors(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "head": self.head.state_dict() if self.head else {},
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "class_means": self.class_means.state_dict(),
        }

    def save(self, folder: Store) -> None:
        (folder / "state.pt").write_torch(self.tensors())
        (folder / "state.json").write_json(
            {"step": self.step, "best": self.best, "rows": [row.on_disk() for row in self.rows]}
        )

    def load(self, folder: Store) -> None:
        tensors, facts = (folder / "state.pt").read_torch(), (folder / "state.json").read_json()
        self.student.load_state_dict(tensors["student"])
        self.average.load_state_dict(tensors["average"])
        if self.head:
            self.head.load_state_dict(tensors["head"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.sums.copy_(tensors["sums"])
        self.class_means.load_state_dict(tensors["class_means"])
        self.step, self.best = facts["step"], facts["best"]
        self.rows = [
            runs.parse(runs.ValidationRow, row, f"'{folder / 'state.json'}'")
            for row in facts["rows"]
        ]

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.student.parameters())


@dataclasses.dataclass(frozen=True)
class Batch:
    """A worker's slice of a batch: augmented images uint8 [b,C,H,W], labels int64 [b], and (weight,
    feature under way) of each alignment.
    """

    images: Tensor
    labels: Tensor
    targets: list[tuple[float, Pending]]


def prepare(
    experiment: config.Experiment,
    images: Tensor,
    labels: Tensor,
    number: int,
    mine: slice,
    source: FeatureSource | None,
) -> Batch:
    """Step `number`'s batch, from images as the data set has them; requests its features."""
    changes = augment.parameters(
        experiment.optim.batch,
        experiment.data,
        random.generator(experiment.shared_seed, random.Stream.AUGMENT, number),
    )
    images = augment.apply(images, experiment.data, changes[mine])
    targets = request_features(source, experiment, images, labels, number, mine) if source else []
    return Batch(images, labels, targets)


class Feed:
    """The batches of coming steps. Requests their features `pool.ahead` steps before the step that
    needs them, so that attacks hide the round trip and a pool that is busy for a while delays
    nobody.

    Args:
        get: step -> (images uint8 [b,C,H,W], labels int64 [b]) of this worker.
        last: number of steps of the whole training.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        get: Callable[[int], tuple[Tensor, Tensor]],
        mine: slice,
        source: FeatureSource | None,
        last: int,
    ) -> None:
        self._experiment, self._get, self._mine, self._source, self._last = (
            experiment,
            get,
            mine,
            source,
            last,
        )
        self._ahead = experiment.pool.ahead if source else 0
        self._ready: dict[int, Batch] = {}

    def take(self, number: int) -> Batch:
        """The batch of step `number`; call with consecutive steps."""
        for coming in range(number, min(number + self._ahead + 1, self._last)):
            if coming not in self._ready:
                self._ready[coming] = prepare(
                    self._experiment, *self._get(coming), coming, self._mine, self._source
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
    state: State, experiment: config.Experiment, batch: Batch, mine: slice, epoch: int = 0
) -> Tensor:
    """One adversarial step on this worker's slice of the batch, gradients averaged over workers.

    Returns float32 [4]: loss and its clean, robust and alignment parts.
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
    student, head = state.student, state.head
    student.train()
    _set_norm_momentum(
        student, 1.0 if state.step == 0 else 0.01
    )  # the first batch sets the running statistics
    threat = pgd.threat_at(experiment.threat, epoch)
    state.optimizer.zero_grad()
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
        ) as attacked,
    ):
        loss_clean, loss_robust, features = attacked.losses()
        loss_align = torch.zeros((), device=x.device)
        for weight, pending in batch.targets:
            assert head is not None
            loss_align = loss_align + weight * losses.alignment(
                head(features), pending.result().to(x.device)
            )
        loss = loss_clean + loss_robust + experiment.align.weight * loss_align
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
    return torch.stack([loss, loss_clean, loss_robust, loss_align]).detach()


def request_features(
    source: FeatureSource,
    experiment: config.Experiment,
    images: Tensor,
    labels: Tensor,
    step: int,
    mine: slice,
) -> list[tuple[float, Pending]]:
    """(weight, feature under way) of every alignment of this step."""
    align, size, seed = experiment.align, experiment.optim.batch, experiment.shared_seed
    # the seed of position p is seed + p: each worker's slice continues the batch's
    noise_seed = random.derive(seed, random.Stream.TEACHER_NOISE, step) // 2 + mine.start
    sigma = torch.full((len(images),), align.sigma)
    targets: list[tuple[float, Pending]] = [
        (1.0, source.submit(Request.seeded(images, labels, sigma, noise_seed)))
    ]
    if align.extra_weight:
        noise_seed = random.derive(seed, random.Stream.EXTRA_NOISE, step) // 2 + mine.start
        sigma = draw_sigma(size, random.generator(seed, random.Stream.EXTRA_SIGMA, step))[mine]
        pending = source.submit(Request.seeded(images, labels, sigma, noise_seed))
        targets.append((align.extra_weight, pending))
    return targets


def initial_state(
    experiment: config.Experiment,
    shape: data.Shape,
    source: FeatureSource | None,
    device: torch.device,
) -> tuple[State, str]:
    """The state before the first step, and a sentence on where the student's weights come from."""
    torch.manual_seed(experiment.seed)  # student first: it starts alike with and without alignment
    student: Any = students.build(experiment.model, shape)
    origin = students.initialise(student, experiment.model)
    head = None
    if source:
        head = projector(
            student.feature_dim,
            source.feature_dim,
            experiment.align.hidden,
            experiment.align.activation,
        ).to(device)
    average = copy.deepcopy(student).requires_grad_(False).to(device)
    if experiment.compute.sync_batchnorm:
        student = syncnorm.synchronised(student)
    student = arithmetic.arranged(student.to(device), experiment.compute)
    if experiment.compute.channels_last:
        average = average.to(memory_format=torch.channels_last)
    optimizer = optimisers.build(student, head, experiment.optim)
    class_means = losses.ClassMeans(shape.num_classes, device)
    return State(
        student, average, head, optimizer, 0, -1.0, torch.zeros(4, device=device), class_means, []
    ), origin


def _mean(values: Tensor, mine: slice, batch: int) -> Tensor:
    """The batch's mean of what each worker has for its slice, the same for all workers."""
    return workers.total(values * ((mine.stop - mine.start) / batch))


def _share(mine: slice, batch: int) -> float:
    """Weight of a slice's mean loss in a plain mean over workers: 1 where the slices are equal."""
    return (mine.stop - mine.start) * workers.count() / batch


def _set_norm_momentum(student: nn.Module, momentum: float) -> None:
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
