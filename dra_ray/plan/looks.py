"""What `dra analyse` would cost for a student: attacks by the passes of the network, and each
analysis from a small case that is timed here and scaled by how its work grows with the images.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from dra_ray import data, plan
from dra_ray.config import Experiment
from dra_ray.errors import ConfigError
from dra_ray.inspection import analyses, models
from dra_ray.inspection.models import How, Seen
from dra_ray.inspection.sae import Settings
from dra_ray.plan.timing import Basis

SMALL = 400  # images of the timed case
SAE_STEPS = 2  # of its autoencoders
KERNEL_ROWS = 1024  # rows of a kernel that similarity holds at a time
FLOAT, DOUBLE, COMPLEX = 4, 8, 16  # bytes
# how the work grows: with pairs of images, with images, or not at all
GROWTH = {"geometry": 2, "similarity": 2, "dimension": 1, "sae": 0, "frequency": 1}


@dataclasses.dataclass(frozen=True)
class Look:
    """Of one model.

    Attributes:
        part: an analysis, or what all share: attacks, gradients and features.
        seconds: of one thread or GPU; None where the speed is not known.
        memory_gb: that it holds beside the model.
    """

    part: str
    seconds: float | None
    memory_gb: float


def of(experiment: Experiment, images: int, basis: Basis, how: How | None = None) -> list[Look]:
    """Of the student of `experiment` on so many images; `basis` is what the plan's hours go by.

    Raises the errors of reading the data's shape, and `ConfigError` for fewer images than classes.
    """
    how = how or How()
    shape = data.outline(experiment.data).shape
    if images < 2 * shape.num_classes:
        raise ConfigError(
            f"--analyses {images}: {shape.num_classes} classes need at least "
            f"{2 * shape.num_classes} images"
        )
    _, forward, width = plan.student_cost(experiment.model, shape)
    pixels = shape.channels * shape.resolution**2
    # each step is a forward pass and a gradient of the input; then clean and adversarial features,
    # and the gradient on clean images
    passes = 2 * how.steps + 2 + 2
    pflop = 2 * forward * passes * images / 1e15
    seconds = None
    if basis.pace:
        seconds = basis.pace.validation * pflop
    elif basis.tflops:
        seconds = pflop * 1e3 / basis.tflops
    seen = FLOAT * images * 2 * (width + pixels) / 1e9
    batch = FLOAT * models.BATCH * plan.activations(experiment.model, shape) / 1e9
    timed = _timed(width, shape, how)
    working = _working_gb(images, width, pixels)
    return [
        Look("attacks, gradients and features, once for all", seconds, seen + batch),
        *(
            Look(name, timed[name] * (images / SMALL) ** GROWTH[name], seen + working[name])
            for name in GROWTH
        ),
    ]


def _working_gb(images: int, width: int, pixels: int) -> dict[str, float]:
    """What an analysis holds beside what was seen."""
    rows = DOUBLE * images * width
    widest = Settings(64, analyses.WIDER * width)
    weights = FLOAT * 2 * width * widest.width
    found = {
        "geometry": 2 * rows,
        "similarity": 4 * rows + DOUBLE * KERNEL_ROWS * images,
        "dimension": 3 * rows + DOUBLE * width**2,
        "sae": rows + 4 * weights + FLOAT * 3 * widest.batch * widest.width,
        "frequency": 2 * COMPLEX * images * pixels,
    }
    return {name: bytes_ / 1e9 for name, bytes_ in found.items()}


@functools.lru_cache(maxsize=4)
def _timed(width: int, shape: data.Shape, how: How) -> dict[str, float]:
    """Seconds of each analysis of `SMALL` random images; of autoencoders as many steps as `how`
    has.
    """
    draws = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draws)

    maps = (SMALL, shape.channels, shape.resolution, shape.resolution)
    labels = torch.arange(SMALL) % shape.num_classes
    features = random(SMALL, width)
    right = torch.ones(SMALL, dtype=torch.bool)
    one = Seen(
        "one",
        features,
        features + 0.1 * random(SMALL, width),
        random(*maps),
        random(*maps),
        right,
        right,
        labels,
        random(shape.num_classes, width),
        random(shape.num_classes),
    )
    other = dataclasses.replace(one, name="other", features=random(SMALL, width))
    calls: dict[str, Callable[[], object]] = {
        "geometry": lambda: analyses.of_geometry([one]),
        "similarity": lambda: analyses.of_similarity([one], other),
        "dimension": lambda: analyses.of_dimension([one]),
        "sae": lambda: analyses.of_sae([one], None, SAE_STEPS),
        "frequency": lambda: analyses.of_frequency([one]),
    }
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for name, call in calls.items():
            if name != "sae":
                call()  # warms up
            began = time.thread_time()
            call()
            found[name] = time.thread_time() - began
    finally:
        torch.set_num_threads(threads)
    found["sae"] *= how.sae_steps / SAE_STEPS
    return found
