"""What the evaluation's driver costs: the real loop over real barriers, with batches that wait
instead of attacking.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dra_ray import cluster, config
from dra_ray.config.catalogue import VERSIONS
from dra_ray.evaluation import batches
from dra_ray.evaluation.batches import Arrays, Work
from dra_ray.evaluation.subjects import Subject
from dra_ray.storage import Store, large
from dra_ray.workloads import evaluate

STAGES = 1 + len(VERSIONS["standard"].attacks)  # clean images and the attacks


class Wait(nn.Module):
    """Stands for a classifier where nothing is classified."""


def efficiency(
    folder: Store, workers: Sequence[int] = (1, 2, 4), chunks: int = 8, chunk_s: float = 2.0
) -> list[dict[str, float]]:
    """Rows {"workers", "chunks", "elapsed_s", "ideal_s", "efficiency"}: how busy the driver keeps
    its workers, on the Ray that the caller has joined.

    Every stage has `chunks` batches of `chunk_s` seconds, best a multiple of every number of
    workers, since each ends in a barrier; the ideal is what they would take with no driver at all.
    A short evaluation first starts the processes.

    Args:
        folder: empty, for the results; about as many files as batches are written.
    """
    _timed(folder / "warm", max(workers), 2 * max(workers), 0.05)
    rows = []
    for count in workers:
        elapsed_s = _timed(folder / f"workers-{count}", count, chunks, chunk_s)
        ideal_s = STAGES * -(-chunks // count) * chunk_s
        rows.append(
            {
                "workers": count,
                "chunks": STAGES * chunks,
                "elapsed_s": elapsed_s,
                "ideal_s": ideal_s,
                "efficiency": ideal_s / elapsed_s,
            }
        )
    return rows


def memory(
    folder: Store, images: int = 2000, side: int = 224, batch: int = 250
) -> dict[str, float]:
    """What the driver holds while it evaluates many large images: {"images", "images_gb" as floats,
    "peak_gb" of memory beyond that at the start}, on the Ray that the caller has joined. About six
    times the images are written to `folder`.
    """
    _timed(folder / "warm", 2, 4, 0.01)  # imports what an evaluation needs
    pixels = large.empty((images, 3, side, side)).fill_(0.5)
    with _peak() as peak:
        _evaluate(folder, 2, pixels, batch, 0.01)
    return {
        "images": images,
        "images_gb": pixels.numel() * 4 / 1e9,
        "peak_gb": (peak.bytes - peak.before) / 1e9,
    }


class _Peak:
    """The most memory of its own, without what lies in files, that this process has had."""

    def __init__(self) -> None:
        self.before = self.bytes = large.anonymous_bytes()

    def look(self) -> None:
        self.bytes = max(self.bytes, large.anonymous_bytes())


@contextmanager
def _peak() -> Iterator[_Peak]:
    peak = _Peak()
    with cluster.repeating(peak.look, 0.02):
        yield peak


def _timed(folder: Store, workers: int, chunks: int, chunk_s: float) -> float:
    batch = 4
    return _evaluate(folder, workers, torch.full((chunks * batch, 1, 8, 8), 0.5), batch, chunk_s)


def _evaluate(folder: Store, workers: int, images: Tensor, batch: int, chunk_s: float) -> float:
    """Seconds."""
    experiment = config.Experiment(evaluation=config.Evaluation(batch=batch))
    subject = Subject(
        "wait",
        Wait(),
        images,
        torch.zeros(len(images), dtype=torch.int64),
        experiment,
        folder,
        {"kind": "wait"},
    )
    started = time.monotonic()
    evaluate.evaluate_many([subject], workers, batch=functools.partial(wait, chunk_s))
    return time.monotonic() - started


def wait(seconds: float, student: nn.Module, work: Work, file: Store, digest: str) -> Arrays:
    """As `batches.run`, for a model that nothing fools, in this time and little more."""
    started, n = time.monotonic(), len(work.labels)
    time.sleep(seconds)
    if work.kind == "clean":
        right = np.ones(n, bool)
        outcome = {
            "clean": right,
            "pgd": right.astype(np.float32),
            "pgd_worst": right,
            "classes": np.array(10),
            "flags": np.array([], dtype=str),
            "randomised": np.array(False),
        }
    else:
        outcome = {"broken": np.zeros(n, bool), "adversarial": work.images.numpy()}
    outcome |= {"seconds": np.array(time.monotonic() - started), "digest": np.array(digest)}
    outcome |= {"numerics": np.array(json.dumps(batches.numerics("cpu")))}
    file.write_npz(**outcome)
    return outcome
