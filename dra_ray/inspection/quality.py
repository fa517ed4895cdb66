"""What can be said of synthetic images without networks from elsewhere: how well they teach, and
whether they are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data import Shape, Split, synthetic, to_float
from dra_ray.data.batches import BatchPlan
from dra_ray.data.random import Stream, derive
from dra_ray.errors import DataError
from dra_ray.inspection.probe import Row, first_images
from dra_ray.storage import Store
from dra_ray.students import checkpoint as student_checkpoint

WIDTH, BATCH, LR = 32, 128, 2e-3  # of the small student: fixed, so that its accuracies compare


def small_student(shape: Shape) -> nn.Module:
    """Three strided convolutions and a linear layer: enough to rank sets of images, and seconds to
    train.
    """
    layers: list[nn.Module] = []
    channels = shape.channels
    for level in range(3):
        width = WIDTH * 2**level
        layers += [
            nn.Conv2d(channels, width, 3, stride=1 if level == 0 else 2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, shape.num_classes)
    )


def taught(
    train: Split, test: Split, shape: Shape, steps: int, seed: int = 0, device: str = "cpu"
) -> float:
    """Accuracy on `test` of the small student after `steps` steps of cross-entropy on `train`; a
    pure function of its arguments.
    """
    if not len(train) or not len(test):
        raise DataError(
            f"{len(train)} images to train on and {len(test)} to test on; give some of both"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, Stream.PROBE_STUDENT))
        student = small_student(shape).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(steps, 1))
    plan = BatchPlan(seed, len(train), 0, min(BATCH, len(train)), 0.0)
    for step in range(steps):
        images, labels = train.take(plan.indices(step))
        loss = F.cross_entropy(student(_standard(images.to(device), shape)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _accuracy(student.eval(), test, device, shape)


def _standard(images: Tensor, shape: Shape) -> Tensor:
    mean, std = (
        torch.tensor(value, device=images.device).reshape(1, -1, 1, 1)
        for value in (shape.mean, shape.std)
    )
    return (to_float(images) - mean) / std


@torch.no_grad()
def _accuracy(student: nn.Module, test: Split, device: str, shape: Shape) -> float:
    right = 0
    for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
        right += int((student(_standard(images.to(device), shape)).argmax(1).cpu() == labels).sum())
    return right / len(test)


@torch.no_grad()
def agreement(judge: nn.Module, images: Split) -> float:
    """Part of the images whose label `judge`, which takes float images in [0,1], agrees with."""
    device = next(judge.parameters()).device
    right = [judge(to_float(part.to(device))).argmax(1).cpu() for part in images.images.split(500)]
    return float((torch.cat(right) == images.labels).double().mean())


@torch.no_grad()
def nearest(images: Tensor, among: Tensor, batch: int = 500, device: str = "cpu") -> Tensor:
    """Distance from each of `images` uint8 [N,C,H,W] to the nearest of `among` [M,C,H,W]: root mean
    square over pixels in [0,1], float32 [N].

    By |a|^2 + |b|^2 - 2ab in float64: its rounding is far below a pixel step, and equal images have
    distance 0.
    """
    if images.shape[1:] != among.shape[1:] or not len(among):
        raise DataError(
            f"images are {list(images.shape)} and those to compare with {list(among.shape)}; give "
            "some of one size"
        )
    # whole numbers below 2^53, so that every sum is exact
    found = torch.full((len(images),), torch.inf, dtype=torch.float64)
    for first in among.split(8 * batch):
        others = first.flatten(1).to(device, torch.float64)
        squares = (others**2).sum(1)
        for start in range(0, len(images), batch):
            part = images[start : start + batch].flatten(1).to(device, torch.float64)
            closest = (squares - 2 * part @ others.T).min(1).values + (part**2).sum(1)
            found[start : start + batch] = found[start : start + batch].minimum(closest.cpu())
    return (found / images[0].numel()).sqrt().div(255).to(torch.float32)


def memorised(
    synthetic: Tensor, held_out: Tensor, train: Tensor, device: str = "cpu"
) -> dict[str, Any]:
    """Distances to the nearest training image of synthetic and of held-out real images; all uint8
    [N,C,H,W].

    A generator that memorises makes images nearer to the training set than new real ones are:
    `suspicious_share` is the part that is nearer than 99 % of the held-out ones (so about 1 % where
    nothing was memorised), `copies` how many are equal to one.
    """
    ours, theirs = nearest(synthetic, train, device=device), nearest(held_out, train, device=device)
    limit = torch.quantile(theirs, 0.01)
    return {
        "synthetic_median": float(ours.median()),
        "held_out_median": float(theirs.median()),
        "synthetic_smallest": float(ours.min()),
        "held_out_smallest": float(theirs.min()),
        "suspicious_share": float((ours < limit).double().mean()),
        "copies": int((ours == 0).sum()),
    }


# -- quality of a synthetic set --------------------------------------------------------------------
def synthetic_quality(
    store: Store,
    settings: config.Data,
    *,
    images: int = 2000,
    steps: int = 400,
    run: Store | None = None,
    seed: int = 0,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What can be said of a synthetic set without networks from elsewhere, on its first `images`
    images.

    How well it teaches: test accuracy of a small student after `steps` steps on it, beside the same
    student on as many real images. Whether it copies: distances from its images to the nearest
    training image, beside those of held-out real images. What a given student (`run`) makes of its
    labels.
    """
    found = data.load(settings)
    whole = data.in_memory(found.train)
    made = data.in_memory(synthetic.read(store, images, found))
    real, test = whole[: len(made)], data.in_memory(found.test)
    report: dict[str, Any] = {"images": len(made), "test_images": len(test), "steps": steps}
    for name, part in (("synthetic", made), ("real", real)):
        say(f"training a small student on {len(part):,} {name} images")
        report[f"trained_on_{name}_accuracy"] = taught(part, test, found.shape, steps, seed, device)
    held_out = (
        first_images(found.validation, len(made)) if len(found.validation) else test[: len(made)]
    )
    say(f"distances to {len(whole):,} training images")
    report["nearest"] = memorised(made.images, held_out.images, whole.images, device)
    if run:
        judge, _ = student_checkpoint.load(run)
        report["judge_accuracy"] = agreement(judge.to(device), made)
    return report


def quality_rows(report: Mapping[str, Any]) -> list[Row]:
    """`synthetic_quality` as a table."""
    nearest = report["nearest"]
    rows: list[Row] = [
        {
            "figure": "test accuracy of a student of the synthetic images",
            "value": f"{report['trained_on_synthetic_accuracy']:.2%}",
        },
        {
            "figure": "the same of a student of as many real images",
            "value": f"{report['trained_on_real_accuracy']:.2%}",
        },
        {
            "figure": "median distance to the nearest training image, synthetic",
            "value": f"{nearest['synthetic_median']:.4f}",
        },
        {
            "figure": "the same of held-out real images",
            "value": f"{nearest['held_out_median']:.4f}",
        },
        {
            "figure": "synthetic images nearer than 99 % of the held-out ones",
            "value": f"{nearest['suspicious_share']:.2%}",
        },
        {"figure": "copies, to the byte", "value": str(nearest["copies"])},
    ]
    if "judge_accuracy" in report:
        rows.append(
            {
                "figure": "labels that the given student agrees with",
                "value": f"{report['judge_accuracy']:.2%}",
            }
        )
    return rows
