"""Train a class-conditional EDM teacher, or its control, with Ray Train (arXiv 2206.00364; arXiv
2602.19931, section 5.6).

Step t is a pure function of (configuration, t) and the state before it, and workers take slices of
one global batch; so a run that was killed goes on from its last checkpoint to the same weights, to
the bit on one kind of machine.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import Tensor, nn

from dra_ray import cluster, data, memory, plan, runs
from dra_ray.config import Synthesis, TeacherTraining
from dra_ray.data import augment
from dra_ray.data.batches import BatchPlan, part_of
from dra_ray.data.random import Stream, derive, generator
from dra_ray.errors import ConfigError, LastingError
from dra_ray.runs import TeacherRow
from dra_ray.storage import Lease, Store
from dra_ray.teachers import augment as edm_augment
from dra_ray.teachers import checkpoint, diffusion, pixels
from dra_ray.teachers.edm import UNetEncoder
from dra_ray.teachers.network import Classifier, ImageSampler
from dra_ray.teachers.noisy import noisy_accuracy, noisy_loss
from dra_ray.teachers.sheet import sheet
from dra_ray.training import averaging, workers
from dra_ray.training.losses import LossSums

log = logging.getLogger("dra_ray")
RAY_TRAIN = "ray-train"  # a stable name, so that Ray finds the last checkpoint again
STATE, STATE_FACTS = "state.pt", "state.json"  # of a checkpoint
ROWS_PER_RUN = 100
VALIDATION_IMAGES = 1024
SHEET_CLASSES, SHEET_ROWS, SHEET_STEPS = 10, 8, 12


class Training:
    """Network, average and optimiser after `step` steps, and how to take the next one. No Ray in
    here.

    `images` are the real data; `sigma_data` is measured on its training part.
    """

    def __init__(
        self, config: TeacherTraining, images: data.Images, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        train = data.in_memory(images.train)
        self.images = train.images.to(self.device)
        self.clean = pixels.to_signed(train.images).to(self.device)
        self.labels = train.labels.to(self.device)
        self.sigma_data = round(float(self.clean.double().std(correction=0)), 6)
        self.plan = BatchPlan(config.seed, len(images.train), 0, config.batch, 0.0)
        torch.manual_seed(derive(config.seed, Stream.TEACHER_INIT))
        self.net = network(config, images.shape, self.sigma_data).to(self.device)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, fused=True)
        self.step = 0
        self.losses = LossSums(1, self.device)  # of the steps since the last row
        self.summed = 0
        self.validation = (
            data.in_memory(images.validation[:VALIDATION_IMAGES])
            if len(images.validation)
            else None
        )

    @property
    def steps(self) -> int:
        return -(-self.config.images_seen // self.config.batch)

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch

    @property
    def lr(self) -> float:
        """Learning rate of the next step: a linear rise, then constant or a cosine to 0 at the end
        of the last step.
        """
        config, after = self.config, self.images_seen + self.config.batch
        if after < config.warmup_images or config.schedule == "constant":
            return config.lr * min(1.0, after / max(config.warmup_images, 1))
        part = (self.images_seen - config.warmup_images) / max(
            self.steps * config.batch - config.warmup_images, 1
        )
        return config.lr * (1 + math.cos(math.pi * max(part, 0.0))) / 2

    def advance(self, forward: nn.Module, rank: int = 0, world: int = 1) -> Tensor:
        """One step on this worker's slice of the batch; `forward` is the network or its parallel
        wrapper. Returns the slice's mean loss.
        """
        config = self.config
        mine = part_of(config.batch, rank, world)
        chosen = self.plan.indices(self.step)[mine].to(self.device)
        # for the whole batch, so that the number of workers changes nothing
        draws = generator(config.seed, Stream.TEACHER_TRAINING, self.step)
        sigma = self._sigma(config.batch, draws)[mine].to(self.device)
        noise = torch.randn((config.batch, *self.clean.shape[1:]), generator=draws)[mine].to(
            self.device
        )
        labelled = (torch.rand(config.batch, 1, generator=draws) >= config.net.label_dropout)[
            mine
        ].to(self.device)
        if config.net.dropout:
            torch.manual_seed(derive(config.seed, Stream.TEACHER_DROPOUT, self.step, rank))
        self.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if config.objective == "classify":
            changes = augment.parameters(
                config.batch, config.data, generator(config.seed, Stream.TEACHER_AUGMENT, self.step)
            )[mine]
            seen = pixels.to_signed(augment.apply(self.images[chosen], config.data, changes))
            loss = noisy_loss(forward, seen, sigma, noise, self.labels[chosen]).mean()
        else:
            one_hot = (
                self.net.one_hot(self.labels[chosen]) * labelled if self.net.num_classes else None
            )
            clean, told = self._augmented(self.clean[chosen], mine)
            loss = diffusion.edm_loss(
                forward,
                clean,
                sigma,
                noise,
                one_hot,
                sigma_data=self.sigma_data,
                precondition=config.preconditioning,
                augment=told,
            ).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        decay = diffusion.ema_decay(
            config.batch, self.images_seen, config.ema_halflife_images, config.ema_ramp
        )
        averaging.update(self.average, self.net, decay)
        self.losses.add(loss.detach())
        self.summed += 1
        return loss.detach()

    def mean_loss(self, mine: slice) -> float:
        """Of the steps since this was asked last, over all workers, of which this one has the slice
        `mine` of a batch; `LastingError` if training diverged.
        """
        loss = float(self.losses.mean(self.summed, mine, self.config.batch))
        if not math.isfinite(loss):
            raise LastingError(
                "the teacher's loss is not finite; lower lr or lengthen warmup_images"
            )
        self.losses.clear()
        self.summed = 0
        return loss

    def _augmented(self, clean: Tensor, mine: slice) -> tuple[Tensor, Tensor | None]:
        """This worker's images as the step changes them, and the label that tells the network; (the
        same images, None) without augmentation.
        """
        if not self.config.augment:
            return clean, None
        draws = edm_augment.parameters(
            self.config.batch,
            self.config.augment,
            generator(self.config.seed, Stream.TEACHER_AUGMENT, self.step),
        )[mine]
        return edm_augment.apply(clean, draws), draws.label.to(self.device)

    def _sigma(self, count: int, draws: torch.Generator) -> Tensor:
        if self.config.sigma is not None:
            return torch.full((count,), self.config.sigma)
        return diffusion.draw_sigma(count, draws, self.config.preconditioning)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "losses": self.losses.sums,
            "summed": self.summed,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if "losses" in state:  # not in those of old
            self.losses.sums.copy_(state["losses"])
            self.summed = state["summed"]

    def validation_accuracy(self) -> float | None:
        """Of the control's average, on noisy validation images: always the same noise. None for a
        denoiser, or without such images.
        """
        if not isinstance(self.average, Classifier) or self.validation is None:
            return None
        draws = generator(self.config.seed, Stream.TEACHER_VALIDATION)
        clean = pixels.to_signed(self.validation.images)
        sigma, noise = self._sigma(len(clean), draws), torch.randn(clean.shape, generator=draws)
        clean, sigma, noise, labels = (
            part.to(self.device) for part in (clean, sigma, noise, self.validation.labels)
        )
        return noisy_accuracy(self.average, clean, sigma, noise, labels)

    def samples(self) -> bytes | None:
        """PNG of 8 samples for each of the first classes, a column each, from the average. None for
        the control, which makes no images.
        """
        if not isinstance(self.average, ImageSampler):
            return None
        classes = min(self.net.num_classes, SHEET_CLASSES)
        labels = torch.arange(SHEET_ROWS * classes) % classes
        low, high = self.average.sigma_range
        sampling = Synthesis(
            steps=SHEET_STEPS, sigma_min=max(0.002, low), sigma_max=min(80.0, high), rho=7.0
        )
        return sheet(
            self.average.sample_images(sampling, range(len(labels)), labels), columns=classes
        )

    def card(self) -> dict[str, Any]:
        return {
            "images_seen": self.images_seen,
            "objective": self.config.objective,
            "data": self.config.data.model_dump(mode="json"),
            "config_digest": self.config.digest(),
        }


def network(config: TeacherTraining, shape: data.Shape, sigma_data: float = 0.5) -> UNetEncoder:
    """What `config` trains, with fresh weights. Raises `ConfigError` for sizes that do not
    divide.
    """
    kind = checkpoint.TRAINED[config.objective]
    sizes = (shape.resolution, shape.channels, shape.num_classes, sigma_data)
    return kind(config.net, *sizes, precondition=config.preconditioning, style=config.style)


class Log:
    """`metrics.jsonl`; a resumed run keeps the rows up to its checkpoint."""

    def __init__(self, file: Store, images_seen: int) -> None:
        self.log = runs.Log(file, TeacherRow, keep=lambda row: row.images_seen <= images_seen)
        rows = self.log.rows
        self.started = time.monotonic() - (rows[-1].elapsed_s if rows else 0.0)

    def write(
        self, images_seen: int, loss: float, lr: float, validation_accuracy: float | None = None
    ) -> None:
        row = TeacherRow(
            images_seen=images_seen,
            loss=loss,
            lr=lr,
            validation_accuracy=validation_accuracy,
            elapsed_s=round(time.monotonic() - self.started, 3),
            at=time.time(),
        )
        self.log.append(row)


def fit(
    config: TeacherTraining, store: Store, progress: Callable[[TeacherRow], None] | None = None
) -> runs.Manifest:
    """Train the teacher in `store` and return its manifest; an unfinished run goes on, a finished
    one is returned at once.

    Ray must have been initialised. `progress` gets every new row of `metrics.jsonl`, in a thread.
    Raises `ConfigError` when `store` holds another run, `RunError` when training fails.
    """
    store = store.resolved()
    resources = config.resources
    check(config)
    log.info("loading the data '%s'", config.data.name)
    images = data.load(config.data)

    def require() -> None:
        Training(config, images)  # a network that cannot be built fails here, in one line
        cluster.require(
            resources.workers,
            resources.cpus_per_worker,
            resources.gpus_per_worker,
            f"teacher run '{store.name}'",
        )

    tree, facts = config.model_dump(mode="json"), runs.Facts(data=images.facts(), world_sizes=[])
    manifest = runs.begin_run(store, "teacher", tree, config.digest(), facts, require)
    if manifest.is_done:
        return manifest
    with Lease(store):
        world_sizes = [
            *manifest.world_sizes,
            runs.WorldSize(at_images_seen=_last_seen(store), workers=resources.workers),
        ]
        runs.update_manifest(store, runs.Facts(world_sizes=world_sizes))
        log.info("waiting for %d workers and the first steps", resources.workers)
        with cluster.following(store / runs.METRICS, TeacherRow, progress):
            _train(config, store)
        card = checkpoint.read_card(store)
        last = runs.read_rows(store / runs.METRICS, TeacherRow)[-1]
        return runs.update_manifest(
            store,
            runs.Facts(
                status="done",
                teacher_digest=card["digest"],
                sigma_data=card["architecture"]["sigma_data"],
                images_seen=last.images_seen,
                elapsed_s=last.elapsed_s,
            ),
        )


def check(config: TeacherTraining) -> None:
    """Raise what the config alone can be refused for, its network's sizes included; needs no
    Ray.
    """
    _check_numbers(config)
    plan.plan(config)


def _check_numbers(config: TeacherTraining) -> None:
    if config.batch % config.resources.workers:
        raise ConfigError(
            f"batch={config.batch} is not divisible by "
            f"resources.workers={config.resources.workers}; change one of them"
        )
    told, length = config.net.augment_dim, edm_augment.LABEL_DIM
    if config.objective == "classify" and (config.augment or told):
        raise ConfigError(
            f"augment={config.augment:g} and net.augment_dim={told}, but objective='classify' "
            "augments as `data` says; set both to 0"
        )
    if config.augment and told != length:
        raise ConfigError(
            f"augment={config.augment:g} tells the network {length} numbers, but "
            f"net.augment_dim={told}; set it to {length}"
        )
    if told and not config.augment:
        raise ConfigError(
            f"net.augment_dim={told}, but augment=0 leaves that input untrained; set augment "
            "(published: 0.12) or net.augment_dim=0"
        )


def _last_seen(store: Store) -> int:
    rows = runs.read_rows(store / runs.METRICS, TeacherRow)
    return rows[-1].images_seen if rows else 0


def _train(config: TeacherTraining, store: Store) -> None:
    resources = config.resources
    trainer = cluster.Trainer(
        _work,
        train_loop_config={"config": config.model_dump(mode="json"), "store": store.uri},
        backend_config=cluster.backend(resources),
        scaling_config=cluster.scaling(resources),
        run_config=ray.train.RunConfig(
            name=RAY_TRAIN,
            **(store / runs.CHECKPOINTS).for_ray(),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=cluster.failures(resources),
        ),
    )
    runs.update_manifest(store, runs.Facts(config=config.model_dump(mode="json"), started_at=None))
    cluster.fit(
        trainer,
        store.uri,
        f"teacher run '{store}'",
        resources,
        lambda: bool((manifest := runs.read_manifest(store)) and manifest.started_at),
    )


def _work(settings: dict[str, Any]) -> None:
    """What each Train worker runs."""
    config, store = TeacherTraining(**settings["config"]), Store(settings["store"])
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(config.resources.threads_per_worker)
    memory.keep_freed()
    training = Training(config, data.load(config.data), get_device())
    if last := ray.train.get_checkpoint():
        folder = cluster.checkpoint_folder(last, store / runs.CHECKPOINTS / RAY_TRAIN)
        facts = folder / STATE_FACTS  # older ones have none
        digest = facts.read_json()["sha256"] if facts.exists() else None
        training.load_state((folder / STATE).read_torch(digest))
    # the only buffers are constant filters and frequencies, equal by their seed: nothing to
    # broadcast
    forward = prepare_model(
        training.net,
        parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
    )
    log = None
    if rank == 0:
        log = Log(store / runs.METRICS, training.images_seen)
        runs.update_manifest(store, runs.Facts(started_at=runs.utc_now()))
    row_steps = max(1, training.steps // ROWS_PER_RUN)
    mine = part_of(config.batch, rank, world)
    while training.step < training.steps:
        lr = training.lr
        training.advance(forward, rank, world)
        # the first step at or past a multiple of checkpoint_images, and the last step
        save = (
            training.images_seen % config.checkpoint_images < config.batch
            or training.step == training.steps
        )
        if save or training.step % row_steps == 0:
            loss = training.mean_loss(mine)
            if log:
                accuracy = training.validation_accuracy() if save else None
                log.write(training.images_seen, loss, lr, accuracy)
        stop = workers.agreed(rank == 0 and cluster.is_asked_to_stop(store.uri), get_device())
        if save or stop:
            training.losses.agree(mine, config.batch)
            _save(training, store, rank, sheet=save)
        if stop:
            return
    if rank == 0:
        checkpoint.save(store, training.average, training.card())


def _save(training: Training, store: Store, rank: int, sheet: bool) -> None:
    """Report a checkpoint (every worker must), after rank 0 has drawn its sample `sheet`."""
    if rank:
        ray.train.report({"images_seen": training.images_seen})
        return
    if sheet and (sheet_png := training.samples()):
        (store / f"samples-{training.images_seen}.png").write_bytes(sheet_png)
    with tempfile.TemporaryDirectory() as folder:
        digest = (Store(folder) / STATE).write_torch(training.state())
        (Store(folder) / STATE_FACTS).write_json({"sha256": digest})
        ray.train.report(
            {"images_seen": training.images_seen},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )
