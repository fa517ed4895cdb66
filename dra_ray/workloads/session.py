"""What a training loop needs of whoever runs it: its place among the workers, its last checkpoint,
and somebody to report to.

`OnRayTrain` is a worker of Ray Train. `InProcess` is a run of a single worker in the process that
it is called in, such as a trial of a sweep: it saves Ray Train's controller and its actors, which
cost more than a small trial's training. Both keep checkpoints in the same files, so each goes on
where the other stopped.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from dra_ray import cluster, runs
from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Store
from dra_ray.training.step import State

KEPT = 2  # checkpoints of a run
SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclasses.dataclass(frozen=True)
class Place:
    """A worker among its fellows: `mine` is its slice of every batch."""

    rank: int
    world: int
    mine: slice
    device: torch.device


class Session(Protocol):
    """Whoever runs a worker's training loop."""

    rank: int
    world: int
    device: torch.device

    def restore(self, state: State) -> None:
        """Load the newest checkpoint of the run, if it has one."""

    def report(self, state: State, row: Mapping[str, Any], at_once: bool = False) -> None:
        """Hand over a row, with a checkpoint of the state; called by all workers alike.

        Args:
            row: with the key "step"; a `ValidationRow` on disk after a validation.
            at_once: the checkpoint is committed before this returns.
        """

    def leaving(self) -> frozenset[str]:
        """The nodes of this run that were said to be taken away."""


class OnRayTrain:
    """A worker of Ray Train; its controller uploads checkpoints beside the training."""

    def __init__(self, run: Store) -> None:
        context = ray.train.get_context()
        self._folder = checkpoints(run)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._leaving: frozenset[str] = frozenset()

    def restore(self, state: State) -> None:
        if checkpoint := ray.train.get_checkpoint():
            state.load(cluster.checkpoint_folder(checkpoint, self._folder))

    def report(self, state: State, row: Mapping[str, Any], at_once: bool = False) -> None:
        """A barrier over the workers; rank 0 hands its checkpoint over and, unless `at_once`, goes
        on while it is uploaded.
        """
        folder = None
        if self.rank == 0:
            folder = tempfile.mkdtemp(prefix="dra-")
            state.save(Store(folder))
        mode = CheckpointUploadMode.SYNC if at_once else CheckpointUploadMode.ASYNC
        ray.train.report(
            dict(row),
            checkpoint=Checkpoint.from_directory(folder) if folder else None,
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )

    def leaving(self) -> frozenset[str]:
        watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
        if watched and (info := ray.train.get_preemption_info()):
            self._leaving = frozenset(info.preempted_node_ids)
        return self._leaving


class InProcess:
    """The only worker of a run, in this process.

    Args:
        on_row: gets the row of every validation once its checkpoint is committed; it may end the
            training by raising.
    """

    rank, world = 0, 1

    def __init__(self, run: Store, on_row: Callable[[Mapping[str, Any]], None]) -> None:
        self._run, self._on_row = run, on_row
        self._folder = checkpoints(run)
        self.device = torch.device("cuda:0" if ray.get_gpu_ids() else "cpu")
        self._snapshot = read_snapshot(run)

    def restore(self, state: State) -> None:
        if latest := self._snapshot.get("latest_checkpoint_result"):
            state.load(self._folder / latest["checkpoint_dir_name"])

    def report(self, state: State, row: Mapping[str, Any], at_once: bool = False) -> None:
        name = f"checkpoint_step-{state.step:09d}"
        state.save(self._folder / name)
        self._commit(name, row)
        if "robust_accuracy" in row:
            self._on_row(row)

    def leaving(self) -> frozenset[str]:
        return frozenset()

    def _commit(self, name: str, row: Mapping[str, Any]) -> None:
        """Make a checkpoint that is written the one to go on from, then drop those that are too
        old.
        """
        new = {"version": 0, "checkpoint_dir_name": name, "metrics": dict(row)}
        before = self._snapshot.get("checkpoint_results", [])
        results = [result for result in before if result["checkpoint_dir_name"] != name] + [new]
        index = self._snapshot.get("current_report_index", 0) + 1
        kept, dropped = results[-KEPT:], results[:-KEPT]
        self._snapshot = {  # as Ray Train 2.60 writes it
            "ray_version": ray.__version__,
            "checkpoint_results": kept,
            "checkpoint_report_indices": list(range(index - len(kept), index)),
            "latest_checkpoint_result": new,
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": index,
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
        (self._folder / SNAPSHOT).write_json(self._snapshot)
        for result in dropped:
            (self._folder / result["checkpoint_dir_name"]).remove()


def checkpoints(run: Store) -> Store:
    """The folder of a run's checkpoints, which is that of an experiment of Ray Train."""
    return run / runs.CHECKPOINTS / run.name


def read_snapshot(run: Store) -> dict[str, Any]:
    """The list of a run's checkpoints as Ray Train keeps it; empty where there are none yet, or
    where it is being written at this moment.
    """
    file = checkpoints(run) / SNAPSHOT
    try:
        snapshot: dict[str, Any] = file.read_json() if file.exists() else {}
    except (StorageError, DataError):
        return {}
    return snapshot
