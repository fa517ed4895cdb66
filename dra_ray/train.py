"""Train one student with TRADES and Diffusion Representation Alignment on Ray Train.

`fit` is what a user calls; `train_worker` is the loop that every Ray Train worker runs. A worker's step is a pure
function of (config, step, weights): batches, crops, attack noise and teacher noise are drawn from (seed, step) for
the whole batch, and each worker takes its slice. So a run that lost a worker repeats a step to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointUploadMode, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.util import metrics
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import cluster, config, data, models, pool, storage
from dra_ray.data import Images, Split, augment, plan, synthetic
from dra_ray.errors import ConfigError, RunError
from dra_ray.models import averaging, checkpoint
from dra_ray.models.projector import projector
from dra_ray.robust import attacks, losses, schedule
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint as teacher_checkpoint
from dra_ray.teachers.source import FeatureSource

METRICS = {
    "dra_train_images": "training images seen, over all workers",
    "dra_train_robust_accuracy": "robust accuracy on the validation images",
}
# what a purpose's random numbers are drawn from, beside (seed, step)
_AUGMENT, _ATTACK, _TEACHER, _VALIDATION = 3, 4, 5, 6


def fit(
    experiment: config.Experiment, run: Store, progress: Callable[[dict[str, Any]], None] | None = None, callbacks: list[Any] | None = None
) -> dict[str, Any]:
    """Train `experiment` into the run directory, or go on where it stopped; returns the last row of its metrics.

    Args:
        progress: receives every new row of metrics.jsonl.
        callbacks: of Ray Train, such as Tune's.

    Raises:
        ConfigError: the directory holds another config, or the experiment lacks a teacher or images.
        RunError: training failed; the run can be resumed by the same call.
    """
    experiment = experiment.with_sources()
    run = run.resolved()
    images = data.load(experiment.data)
    load_synthetic(experiment, images)  # a missing or wrong set is found here, before Ray Train starts
    check_teacher(experiment)
    manifest = storage.begin_run(run, "train", experiment.model_dump(mode="json"), experiment.digest(), data=images.facts(), seed=experiment.seed)
    if manifest["status"] == "done":
        return (run / "metrics.jsonl").read_jsonl()[-1]
    if experiment.align.weight and experiment.pool.kind == "pool":
        with pool.serving(experiment.teacher, experiment.pool, log=None if callbacks else run / "pool.jsonl"):
            return _fit(experiment, run, progress, callbacks or [])
    return _fit(experiment, run, progress, callbacks or [])


def _fit(experiment: config.Experiment, run: Store, progress: Callable[[dict[str, Any]], None] | None, callbacks: list[Any]) -> dict[str, Any]:
    resources = experiment.resources
    cluster.require(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, f"training '{run.name}'", pool.reserved(experiment))
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s)  # read by Train's controller
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"experiment": experiment.model_dump(mode="json"), "run": run.uri},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})},
        ),
        run_config=RunConfig(
            name=run.name,  # a stable name is what lets Ray Train find the run's checkpoints again
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=callbacks,
            **(run / "checkpoints").for_ray(),
        ),
    )
    try:
        with cluster.following(run / "metrics.jsonl", progress), cluster.interruptible():
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunError(f"training '{run}' failed ({_cause(error)}); start the same command again to resume from its last checkpoint") from error
    storage.update_manifest(run, status="done")
    return (run / "metrics.jsonl").read_jsonl()[-1]


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def check_teacher(experiment: config.Experiment) -> None:
    """Raise `CheckpointError` where there is no teacher, `ConfigError` where it was trained on another split of the same data.

    Such a teacher may have been trained on our test images.
    """
    if not experiment.align.weight:
        return
    assert experiment.teacher.uri
    theirs = teacher_checkpoint.read_card(Store(experiment.teacher.uri)).get("data", {})
    if theirs.get("name") != experiment.data.name:
        return
    for field in ("split_seed", "test_images", "validation_images"):
        ours = getattr(experiment.data, field)
        if theirs.get(field) != ours:
            raise ConfigError(
                f"data.{field}={ours}, but the teacher '{experiment.teacher.uri}' was trained with {theirs.get(field)}, so it may have seen your "
                f"test images; set data.{field}={theirs.get(field)} or train another teacher"
            )


def load_synthetic(experiment: config.Experiment, images: Images) -> Split | None:
    if not experiment.synthetic.images:
        return None
    assert experiment.synthetic.uri
    return synthetic.read(Store(experiment.synthetic.uri), experiment.synthetic.images, images)


# -- inside a worker ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class State:
    """All that a checkpoint holds."""

    student: nn.Module
    average: nn.Module
    head: nn.Module | None  # the projector; none where lambda is 0
    optimizer: torch.optim.Optimizer
    step: int
    best: float
    rows: list[dict[str, Any]]

    def tensors(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "head": self.head.state_dict() if self.head else {},
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self, folder: Store) -> None:
        (folder / "state.pt").write_torch(self.tensors())
        (folder / "state.json").write_json({"step": self.step, "best": self.best, "rows": self.rows})

    def load(self, folder: Store) -> None:
        tensors, facts = (folder / "state.pt").read_torch(), (folder / "state.json").read_json()
        self.student.load_state_dict(tensors["student"])
        self.average.load_state_dict(tensors["average"])
        if self.head:
            self.head.load_state_dict(tensors["head"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.step, self.best, self.rows = facts["step"], facts["best"], facts["rows"]


def train_worker(job: dict[str, Any]) -> None:
    """The training loop of one Ray Train worker (DM-AT, arXiv 2302.04638; alignment: arXiv 2602.19931, section 4.2)."""
    experiment, run = config.Experiment.model_validate(job["experiment"]), Store(job["run"])
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(experiment.resources.threads_per_worker)
    device = ray.train.torch.get_device()
    images = data.load(experiment.data)
    pixels, labels, batches = _training_set(experiment, images, device)
    source = pool.source(experiment, str(device)) if experiment.align.weight else None
    state = _initial_state(experiment, images, source, device)
    if found := ray.train.get_checkpoint():
        with found.as_directory() as folder:
            state.load(Store(folder))
    if rank == 0:
        _record_world_size(run, state.step, workers)
    gauge = metrics.Gauge("dra_train_robust_accuracy", METRICS["dra_train_robust_accuracy"])
    counter = metrics.Counter("dra_train_images", METRICS["dra_train_images"])

    optim = experiment.optim
    mine = slice(rank * optim.batch // workers, (rank + 1) * optim.batch // workers)
    total_steps = optim.epochs * batches.steps_per_epoch
    start, already_s = time.monotonic(), state.rows[-1]["elapsed_s"] if state.rows else 0.0
    sums = torch.zeros(4, device=device)
    while state.step < total_steps:
        epoch = state.step // batches.steps_per_epoch
        rate, momentum = schedule.one_cycle(epoch, optim)
        for group in state.optimizer.param_groups:
            group["lr"], group["momentum"] = rate, momentum

        chosen = batches.indices(state.step)[mine]
        parts = step(state, experiment, pixels[chosen.to(device)], labels[chosen.to(device)], mine, source)
        sums += parts
        state.step += 1
        averaging.update(state.average, state.student, averaging.decay(state.step, optim.averaging_warmup * total_steps, optim.averaging_decay))
        counter.inc(len(chosen))

        if state.step % batches.steps_per_epoch:
            continue
        averaging.copy_buffers(state.average, state.student)
        if (epoch + 1) % experiment.selection.every_epochs and epoch + 1 < optim.epochs:
            continue
        losses_mean = (sums / (experiment.selection.every_epochs * batches.steps_per_epoch)).tolist()
        if not all(map(math.isfinite, losses_mean)):
            raise RunError(
                f"the loss is {losses_mean[0]} at step {state.step}; the last good checkpoint is in '{run / 'checkpoints'}'; lower optim.lr"
            )
        sums.zero_()
        clean, robust = validate(state.average, experiment, images.validation, rank, workers, device)
        row = {
            "step": state.step,
            "epoch": epoch + 1,
            "images_seen": state.step * optim.batch,
            **dict(zip(("loss", "loss_clean", "loss_robust", "loss_align"), losses_mean, strict=True)),
            "lr": rate,
            "clean_accuracy": clean,
            "robust_accuracy": robust,
            "elapsed_s": round(already_s + time.monotonic() - start, 3),
            "at": time.time(),
        }
        state.rows.append(row)
        if rank == 0 and robust >= state.best:
            checkpoint.save(run, state.average.state_dict())
        state.best = max(state.best, robust)
        gauge.set(robust)
        if rank == 0:
            (run / "metrics.jsonl").write_jsonl(state.rows)
        _report(state, row, rank)
    if source:
        source.close()


def step(state: State, experiment: config.Experiment, images: Tensor, labels: Tensor, mine: slice, source: FeatureSource | None) -> Tensor:
    """One TRADES+DRA step on this worker's slice of the batch, gradients averaged over workers.

    images uint8 [b,C,H,W], labels int64 [b]. Returns float32 [4]: loss and its clean, robust and alignment parts.
    """
    batch, seed = experiment.optim.batch, experiment.seed
    corners, flips = augment.parameters(batch, experiment.data, plan.generator(seed, _AUGMENT, state.step))
    images = augment.apply(images, experiment.data, corners[mine], flips[mine])
    noise = torch.rand((batch, *images.shape[1:]), generator=plan.generator(seed, _ATTACK, state.step))[mine]
    pending = None
    if source is not None:  # sent before the attack, so that the attack hides the round trip
        sigma = torch.full((len(images),), experiment.align.sigma)
        # the seed of position p is seed + p: each worker's slice continues the batch's
        pending = source.submit(images, labels, sigma, plan.derive(seed, _TEACHER, state.step) // 2 + mine.start)

    memory = torch.channels_last if experiment.model.channels_last else torch.contiguous_format
    x = data.to_float(images).contiguous(memory_format=memory)
    student = state.student
    student.train()
    _set_norm_momentum(student, 1.0 if state.step == 0 else 0.01)  # the first batch sets the running statistics
    # the target of the attack is this very forward: same weights, mode and batch give the same logits
    clean = student(x)
    adversarial = attacks.trades(student, x, F.softmax(clean.detach(), 1), experiment.threat, noise.to(x.device))
    logits, features = student.with_features(adversarial)  # type: ignore[operator]
    loss_clean, loss_robust = losses.trades(clean, logits, labels, experiment.loss.beta, experiment.loss.label_smoothing)
    loss_align = torch.zeros((), device=x.device)
    if pending is not None:
        assert state.head is not None
        loss_align = losses.alignment(state.head(features), pending.result().to(x.device))
    loss = loss_clean + loss_robust + experiment.align.weight * loss_align
    state.optimizer.zero_grad()
    loss.backward()
    _average_gradients(state.optimizer)
    state.optimizer.step()
    return torch.stack([loss, loss_clean, loss_robust, loss_align]).detach()


def validate(student: nn.Module, experiment: config.Experiment, split: Split, rank: int, workers: int, device: torch.device) -> tuple[float, float]:
    """(clean, PGD-k) accuracy of the averaged weights on held-out images, shared among the workers."""
    noise = torch.rand(split.images.shape, generator=plan.generator(experiment.seed, _VALIDATION))
    correct = torch.zeros(2, device=device)
    student.eval()
    for chunk in torch.arange(len(split))[rank::workers].split(256):
        x = data.to_float(split.images[chunk].to(device))
        labels = split.labels[chunk].to(device)
        with torch.no_grad():
            correct[0] += (student(x).argmax(1) == labels).sum()
        correct[1] += attacks.evaluate_pgd(student, x, labels, experiment.threat, experiment.selection.steps, noise[chunk].to(device)).sum()
    if workers > 1:
        torch.distributed.all_reduce(correct)
    clean, robust = (correct / max(1, len(split))).tolist()
    return clean, robust


def _training_set(experiment: config.Experiment, images: Images, device: torch.device) -> tuple[Tensor, Tensor, plan.BatchPlan]:
    """Real images with the synthetic ones behind them, as uint8 on the device, and the plan that indexes them."""
    extra = load_synthetic(experiment, images)
    parts = [images.train] + ([extra] if extra else [])
    batches = plan.BatchPlan(experiment.seed, len(images.train), len(extra) if extra else 0, experiment.optim.batch, experiment.synthetic.fraction)
    return torch.cat([p.images for p in parts]).to(device), torch.cat([p.labels for p in parts]).to(device), batches


def _initial_state(experiment: config.Experiment, images: Images, source: FeatureSource | None, device: torch.device) -> State:
    torch.manual_seed(experiment.seed)  # student first: it starts alike with and without alignment
    student = models.build(experiment.model, images).to(device)
    head = projector(student.feature_dim, source.feature_dim, experiment.align.hidden).to(device) if source else None
    decayed = [p for name, p in student.named_parameters() if "batchnorm" not in name]
    plain = [p for name, p in student.named_parameters() if "batchnorm" in name]
    groups: list[dict[str, Any]] = [{"params": decayed + (list(head.parameters()) if head else [])}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=experiment.optim.lr, momentum=0.9, nesterov=True, weight_decay=experiment.optim.weight_decay)
    return State(student, copy.deepcopy(student).requires_grad_(False), head, optimizer, step=0, best=-1.0, rows=[])


def _set_norm_momentum(student: nn.Module, momentum: float) -> None:
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def _average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Mean over workers, in one message. The attack is nine tenths of a step, so there is nothing to overlap it with."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def _record_world_size(run: Store, at_step: int, workers: int) -> None:
    """BatchNorm sees the per-worker batch, so the number of workers is part of what a run did."""
    manifest = storage.read_manifest(run)
    if manifest is None:
        raise ConfigError(f"'{run}' has no manifest.json; start the run with `dra train`")
    history = manifest.get("world_sizes", [])
    if not history or history[-1]["workers"] != workers:
        storage.update_manifest(run, world_sizes=[*history, {"step": at_step, "workers": workers, "at": storage.utc_now()}])


def _report(state: State, row: dict[str, Any], rank: int) -> None:
    """A barrier over the workers; rank 0 hands its checkpoint over and goes on while it is uploaded."""
    folder = None
    if rank == 0:
        folder = tempfile.mkdtemp(prefix="dra-")
        state.save(Store(folder))
    ray.train.report(
        row,
        checkpoint=Checkpoint.from_directory(folder) if folder else None,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
