"""A run's validations: by its workers between two epochs, or in a task beside the training.

What a validation finds is a function of the weights and the images alone, so both ways give the
same rows.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dra_ray import cluster, config, runs
from dra_ray.data import Pictures
from dra_ray.data.pictures import Split
from dra_ray.runs import ValidationRow
from dra_ray.training import arithmetic, workers
from dra_ray.training.step import State
from dra_ray.training.validation import CHUNK, judge_chunk
from dra_ray.workloads.session import Place

logger = logging.getLogger("dra_ray")
Verdicts = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # [N] correct, and [N] also under PGD-k
RETRIES = 3  # of a task whose node is lost


def candidates(state: State, experiment: config.Experiment) -> dict[runs.Weights, nn.Module]:
    """The weights that a validation judges: the average's, and with `selection.weights=better` the
    raw ones too.
    """
    if experiment.selection.weights == "average" or experiment.optim.averaging == "none":
        return {"average": state.average}
    return {"average": state.average, "raw": state.student}


@dataclasses.dataclass(frozen=True)
class Judged:
    """A validation's verdicts, bool [N] each, and the weights that they are of."""

    weights: runs.Weights
    clean: NDArray[np.bool_]
    withstood: NDArray[np.bool_]


def judge(
    students: Mapping[runs.Weights, nn.Module],
    experiment: config.Experiment,
    validation: Pictures,
    place: Place,
) -> Judged:
    """Those of `students` that withstand more on held-out images; the average where both withstand
    equally many.
    """
    return better(
        {name: validate(each, experiment, validation, place) for name, each in students.items()}
    )


def better(found: Mapping[runs.Weights, Verdicts]) -> Judged:
    weights: runs.Weights = "average"
    if "raw" in found and found["raw"][1].sum() > found["average"][1].sum():
        weights = "raw"
    return Judged(weights, *found[weights])


def validate(
    student: nn.Module, experiment: config.Experiment, split: Pictures, place: Place
) -> Verdicts:
    """Verdicts of `student` on held-out images, shared among the workers.

    Every image's noise is its own and chunks are the same for any number of workers.
    """
    device = place.device
    correct = torch.zeros(2, len(split), device=device)
    student.eval()
    for number, chunk in enumerate(torch.arange(len(split)).split(CHUNK)):
        if number % place.world != place.rank:
            continue
        pixels, classes = split.take(chunk)
        judged = judge_chunk(student, experiment, pixels, classes, number, device)
        correct[:, chunk.to(device)] = torch.stack(judged).float()
    clean, robust = workers.total(correct).bool().cpu().numpy()
    return clean, robust


def row_of(
    facts: Mapping[str, Any], judged: Judged, experiment: config.Experiment, took_s: float
) -> ValidationRow:
    """The row of metrics.jsonl of `facts`, which are all but what the verdicts say."""
    further: dict[str, Any] = {}
    if experiment.selection.weights == "better":
        further["weights"] = judged.weights
    return ValidationRow(
        clean_accuracy=accuracy(judged.clean),
        robust_accuracy=accuracy(judged.withstood),
        images=len(judged.withstood),
        verdicts=runs.pack_verdicts(judged.withstood),
        validation_s=round(took_s, 3),
        at=time.time(),
        **facts,
        **further,
    )


def accuracy(verdicts: NDArray[np.bool_]) -> float:
    """The share of verdicts that are true; 0 without images. Divided in float32, as PyTorch
    would."""
    return float(np.float32(verdicts.sum()) / np.float32(max(1, len(verdicts))))


class Beside:
    """`resources.validation=beside`: a task judges the weights of one validation while training
    goes on to the next. All workers call alike; worker 0 has the task.

    Where the cluster has no room, the workers judge themselves; from a task on that fails, or that
    is not done in twice the time between two validations, they always do.
    """

    # that workers wait for a task: the first starts a process, which imports torch, and
    # torch.distributed gives up after thirty minutes
    LEAST_S, MOST_S = 60.0, 600.0

    def __init__(
        self, experiment: config.Experiment, name: str, place: Place, split: Pictures
    ) -> None:
        self._experiment, self._name, self._place, self._split = experiment, name, place, split
        self._task: ray.ObjectRef[Any] | None = None
        self._given: tuple[ray.ObjectRef[Any], ...] = ()  # what all tasks share
        self._begun, self._failed = 0.0, False

    def has_room(self) -> bool:
        """Whether the run wants a task, and there is room for one."""
        resources = self._experiment.resources
        return resources.validation == "beside" and self._agreed(
            lambda: not self._failed and cluster.has_room(resources)
        )

    def begin(self, state: State) -> None:
        """Hand `state.unjudged` to a task."""
        assert state.unjudged is not None
        resources = self._experiment.resources
        self._begun = time.monotonic()
        if self._place.rank == 0:
            if not self._given:
                template = copy.deepcopy(state.average).cpu()
                images = Split(*self._split.take(torch.arange(len(self._split))))
                self._given = (ray.put(template), ray.put(images))
            task = ray.remote(_judge).options(
                max_retries=RETRIES,
                **cluster.placed(resources, resources.cpus_per_worker),
                name=f"{self._name}:validation",
                scheduling_strategy="DEFAULT",  # not in the place that is kept for the workers
            )
            self._task = task.remote(self._experiment, state.unjudged.weights, *self._given)

    def end(self, state: State) -> tuple[Judged, float]:
        """The verdicts on `state.unjudged`, and the seconds that they took."""
        assert state.unjudged is not None
        names, began = list(state.unjudged.weights), time.monotonic()
        found, took_s = self._found()
        if self._agreed(lambda: found is not None):
            shape = (len(names), 2, len(self._split))
            verdicts = torch.zeros(shape, device=self._place.device)
            if found is not None:
                verdicts.copy_(torch.tensor(found))
            workers.share_([verdicts])
            each = verdicts.bool().cpu().numpy()
            return better({name: (each[i][0], each[i][1]) for i, name in enumerate(names)}), took_s
        width = self._split.picture_shape[-1]
        students = rebuilt(
            state.unjudged.weights, state.average, self._experiment, width, self._place.device
        )
        judged = judge(students, self._experiment, self._split, self._place)
        return judged, time.monotonic() - began

    def close(self) -> None:
        if self._task is not None:
            ray.cancel(self._task, force=True)
            self._task = None

    def _agreed(self, ask: Callable[[], bool]) -> bool:
        """Worker 0's answer."""
        place = self._place
        return workers.agreed(place.rank == 0 and ask(), place.device)

    def _found(self) -> tuple[NDArray[np.uint8] | None, float]:
        """Of worker 0, which has asked: uint8 [weights,2,N] and seconds; none where it did not come
        in time.
        """
        if self._task is None:
            return None, 0.0
        patience = min(self.MOST_S, max(self.LEAST_S, time.monotonic() - self._begun))
        try:
            found, took_s = ray.get(self._task, timeout=patience)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning(
                "a validation beside training did not come (%s); from now on the workers do it",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            self.close()
            self._failed = True
            return None, 0.0
        self._task = None
        return found, took_s


def copied(students: Mapping[runs.Weights, nn.Module]) -> dict[runs.Weights, dict[str, Tensor]]:
    """Their weights, on the CPU, which training does not change any more."""
    return {
        name: {key: value.detach().to("cpu", copy=True) for key, value in each.state_dict().items()}
        for name, each in students.items()
    }


def rebuilt(
    weights: Mapping[runs.Weights, Mapping[str, Tensor]],
    template: nn.Module,
    experiment: config.Experiment,
    width: int,
    device: torch.device,
) -> dict[runs.Weights, Any]:
    """Copies of `template`, an average, with each of these weights, which compute on images of that
    width as training's own do.
    """
    students: dict[runs.Weights, Any] = {}
    for name, each in weights.items():
        students[name] = copy.deepcopy(template).to(device)
        students[name].load_state_dict(each)
        if name == "raw":
            students[name] = arithmetic.arranged(students[name], experiment.compute, width)
    return students


def _judge(
    experiment: config.Experiment,
    weights: Mapping[runs.Weights, Mapping[str, Tensor]],
    template: nn.Module,
    split: Pictures,
) -> tuple[NDArray[np.uint8], float]:
    """Ray task: uint8 [weights,2,N], whether each image is correct, and whether also under PGD-k;
    and the seconds that it took.
    """
    began = time.monotonic()
    arithmetic.prepare(experiment.compute, experiment.resources.threads_per_worker)
    device = torch.device("cuda:0" if ray.get_gpu_ids() else "cpu")
    alone = Place(0, 1, slice(0, experiment.optim.batch), device)
    students = rebuilt(weights, template, experiment, split.picture_shape[-1], device)
    found = [np.stack(validate(each, experiment, split, alone)) for each in students.values()]
    return np.stack(found).astype(np.uint8), time.monotonic() - began
