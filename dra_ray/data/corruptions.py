"""Images under common corruptions: files in CIFAR-10-C's layout, or a few kinds made here from the
test images.

CIFAR-10-C (Hendrycks & Dietterich, arXiv 1903.12261) is a folder with `labels.npy` and one
`<name>.npy` for each corruption: uint8 [5N,H,W,C], the N test images at severity 1, then at
severity 2, to 5. What is made here is defined in our own words for any resolution and number of
channels, with constants that are our own choice: its accuracies compare models with each other, and
nothing with published CIFAR-10-C numbers.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dra_ray.errors import ConfigError, DataError, nearest
from dra_ray.storage import Store

SEVERITIES = (1, 2, 3, 4, 5)
MADE = "generated"
# the 15 that count in published means; the archive holds 4 more, kept apart for validation
COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
PART = 256  # images that are corrupted at once

Set = tuple[str, int, Tensor, Tensor]
"""Name, severity, images uint8 [N,C,H,W], labels int64 [N]."""


def sets(source: str, images: Tensor, labels: Tensor, seed: int) -> Iterator[Set]:
    """Every corruption at every severity, one after the other.

    Args:
        source: "generated", or the URI of a folder in CIFAR-10-C's layout.
        images: the clean test images, uint8 [N,C,H,W]; labels: int64 [N].
        seed: of the generated kind.

    A folder gives as many of its images as there are test images. Raises `DataError` where it does
    not fit these, or is damaged.
    """
    if source == MADE:
        return (
            (name, severity, generated(images, name, severity, seed), labels)
            for name in GENERATED
            for severity in SEVERITIES
        )
    return (_fitting(source, found, images, labels) for found in read(source))


def _fitting(source: str, found: Set, images: Tensor, labels: Tensor) -> Set:
    name, severity, theirs, their_labels = found
    if theirs.shape[1:] != images.shape[1:]:
        raise DataError(
            f"'{source}/{name}.npy' has images {list(theirs.shape[1:])}, but the test images are "
            f"{list(images.shape[1:])}; set another folder"
        )
    n = min(len(theirs), len(images))
    if not torch.equal(their_labels[:n], labels[:n].cpu()):
        raise DataError(
            f"'{source}/labels.npy' has other labels than the test images, so it was made from "
            "others; set evaluation.corruptions to their set"
        )
    return name, severity, theirs[:n], their_labels[:n]


# -- files -----------------------------------------------------------------------------------------
def read(uri: str) -> Iterator[Set]:
    """The corruptions of a folder in CIFAR-10-C's layout, one file in memory at a time: the common
    15 if it has any of them, else all.

    Raises `DataError` when files are missing, damaged or of another shape.
    """
    store = Store(uri)
    names = {name.removesuffix(".npy") for name in store.names() if name.endswith(".npy")}
    if "labels" not in names or len(names) < 2:
        raise DataError(
            f"'{uri}' is not in CIFAR-10-C's layout; give a folder with labels.npy and one .npy "
            f"for each corruption, or '{MADE}'"
        )
    labels = (store / "labels.npy").read_npy()
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise DataError(
            f"'{store}/labels.npy' holds {labels.dtype} {list(labels.shape)}, expected one integer "
            "for each image; fetch it again"
        )
    chosen = [name for name in COMMON if name in names] or sorted(names - {"labels"})
    return (found for name in chosen for found in _severities(store, name, labels.astype(np.int64)))


def _severities(store: Store, name: str, labels: np.ndarray) -> Iterator[Set]:
    stacked = (store / f"{name}.npy").read_npy()
    per_severity, rest = divmod(len(stacked) if stacked.ndim else 0, len(SEVERITIES))
    if stacked.dtype != np.uint8 or stacked.ndim != 4 or rest or not per_severity:
        raise DataError(
            f"'{store}/{name}.npy' holds {stacked.dtype} {list(stacked.shape)}, expected uint8 "
            "[5N, H, W, C]; fetch it again"
        )
    if len(labels) not in (per_severity, len(stacked)):
        raise DataError(
            f"'{store}/{name}.npy' has {len(stacked)} images, but labels.npy {len(labels)}; "
            "expected as many labels, or a fifth; fetch both again"
        )
    for severity in SEVERITIES:
        rows = slice((severity - 1) * per_severity, severity * per_severity)
        images = torch.from_numpy(np.ascontiguousarray(stacked[rows].transpose(0, 3, 1, 2)))
        yield (
            name,
            severity,
            images,
            torch.from_numpy(labels[rows] if len(labels) == len(stacked) else labels),
        )


# -- made here -------------------------------------------------------------------------------------
def generated(images: Tensor, name: str, severity: int, seed: int, first: int = 0) -> Tensor:
    """Corrupt images uint8 [n,C,H,W], the n from number `first` on of a data set; gives uint8
    [n,C,H,W].

    Chance depends on seed, name, severity and the image's number alone. Raises `ConfigError` for a
    name or severity that is not known.
    """
    if name not in GENERATED:
        raise ConfigError(f"corruption '{name}' is not made here; {nearest(name, GENERATED)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity={severity}: give one of 1 to 5")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [N, C, H, W]; convert "
            "them"
        )
    corrupt, amounts = GENERATED[name]
    key = int.from_bytes(
        hashlib.sha256(f"{seed} {name} {severity}".encode()).digest()[:16], "little"
    )
    made = torch.empty_like(images)
    for start in range(0, len(images), PART):
        part = images[start : start + PART]
        chances = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, first + start + i]))
            for i in range(len(part))
        ]
        changed = corrupt(part.float() / 255, amounts[severity - 1], chances)
        made[start : start + PART] = changed.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return made


Chances = Sequence[np.random.Generator]
"""One source of random numbers for each image."""


def _gaussian_noise(x: Tensor, deviation: float, chances: Chances) -> Tensor:
    return x + deviation * _each(
        chances, lambda chance: chance.standard_normal(x.shape[1:], np.float32)
    )


def _shot_noise(x: Tensor, photons: float, chances: Chances) -> Tensor:
    """White is `photons` photons on average."""
    counts = [
        chance.poisson(image * photons) for chance, image in zip(chances, x.numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(counts)).to(x) / photons


def _impulse_noise(x: Tensor, share: float, chances: Chances) -> Tensor:
    """A share of the values becomes black or white, as often the one as the other."""
    chance = _each(chances, lambda one: one.random(x.shape[1:], np.float32))
    return torch.where(chance < share, (chance < share / 2).to(x), x)


def _defocus_blur(x: Tensor, radius: float, _: Chances) -> Tensor:
    """The mean over a disc whose radius is half a pixel and this part of the shorter side."""
    kernel = disc(0.5 + radius * min(x.shape[2:]))
    reach, channels = len(kernel) // 2, x.shape[1]
    return F.conv2d(
        F.pad(x, (reach,) * 4, mode="replicate"),
        kernel.expand(channels, 1, -1, -1),
        groups=channels,
    )


def disc(radius: float) -> Tensor:
    """float [k,k], k odd: the share of each pixel that a disc of `radius` pixels covers, summing to
    1.
    """
    reach, fine = math.ceil(radius - 0.5), 16
    side = 2 * reach + 1
    place = (torch.arange(side * fine) + 0.5) / fine - side / 2
    inside = (place[:, None].square() + place.square() <= radius**2).float()
    covered = F.avg_pool2d(inside[None, None], fine)[0, 0]
    return covered / covered.sum()


def _brightness(x: Tensor, more: float, _: Chances) -> Tensor:
    return x + more


def _contrast(x: Tensor, kept: float, _: Chances) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + kept * (x - mean)


def _pixelate(x: Tensor, kept: float, _: Chances) -> Tensor:
    """A mosaic with this part of the pixels a side: each cell has the mean of its pixels."""
    down, right = (_cells(side, max(1, round(kept * side))) for side in x.shape[2:])
    return down @ x @ right.T


def _cells(side: int, count: int) -> Tensor:
    """float [side,side]: takes the mean over each of `count` runs of pixels."""
    cell = torch.arange(side) * count // side
    same = (cell[:, None] == cell).float()
    return same / same.sum(1, keepdim=True)


def _jpeg(x: Tensor, quality: float, _: Chances) -> Tensor:
    """Pillow's JPEG at this quality; images of neither 1 nor 3 channels have each channel stored by
    itself.
    """
    colour = x.shape[1] == 3
    planes = x.permute(0, 2, 3, 1) if colour else x.flatten(0, 1)
    pixels = planes.mul(255).round().to(torch.uint8).numpy()
    stored = (
        torch.from_numpy(np.stack([_through_jpeg(one, int(quality)) for one in pixels])).to(x) / 255
    )
    return stored.permute(0, 3, 1, 2) if colour else stored.view_as(x)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _translate(x: Tensor, distance: float, chances: Chances) -> Tensor:
    """Shifted by this part of the shorter side, rounded up to pixels, in any direction; border
    pixels fill what is left open.
    """
    length = math.ceil(distance * min(x.shape[2:]))
    padded = F.pad(x, (length,) * 4, mode="replicate")
    height, width = x.shape[2:]
    moved = []
    for chance, image in zip(chances, padded, strict=True):
        angle = 2 * math.pi * chance.random()
        top, left = (
            length + round(length * math.sin(angle)),
            length + round(length * math.cos(angle)),
        )
        moved.append(image[:, top : top + height, left : left + width])
    return torch.stack(moved)


def _each(chances: Chances, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([draw(chance) for chance in chances]))


# kind -> how, and its amount at severities 1 to 5. UNVERIFIED: our own choice, from visible to
# hard; no published constants
GENERATED: dict[str, tuple[Callable[[Tensor, float, Chances], Tensor], tuple[float, ...]]] = {
    "gaussian-noise": (_gaussian_noise, (0.03, 0.06, 0.09, 0.13, 0.18)),
    "shot-noise": (_shot_noise, (200.0, 80.0, 40.0, 20.0, 10.0)),
    "impulse-noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.10, 0.16)),
    "defocus-blur": (_defocus_blur, (0.01, 0.02, 0.03, 0.045, 0.06)),
    "brightness": (_brightness, (0.06, 0.12, 0.18, 0.26, 0.35)),
    "contrast": (_contrast, (0.75, 0.6, 0.45, 0.3, 0.18)),
    "pixelate": (_pixelate, (0.7, 0.5, 0.35, 0.25, 0.18)),
    "jpeg": (_jpeg, (60.0, 40.0, 25.0, 15.0, 8.0)),
    "translate": (_translate, (0.03, 0.06, 0.10, 0.14, 0.18)),
}


# -- accuracies ------------------------------------------------------------------------------------
def summary(
    rows: Iterable[tuple[str, int, float]], baseline: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Of rows (name, severity, accuracy in 0..1), as plain JSON values:

    `corruption_accuracy`, the mean over all rows; `by_corruption`: name -> its mean; `by_severity`:
    name -> [accuracy, ...] by rising severity; `published_sets`, whether these are the 15 x 5 of
    published means; and `mce` where `baseline` gives another model's mean error (0..1) under each
    name: the mean ratio of errors (Hendrycks & Dietterich, section 4). Raises `DataError`.
    """
    found = {(name, severity): float(accuracy) for name, severity, accuracy in rows}
    if not found:
        raise DataError("there is no accuracy under any corruption; check evaluation.corruptions")
    names = list(dict.fromkeys(name for name, _ in found))
    by_severity = {name: [found[key] for key in sorted(found) if key[0] == name] for name in names}
    means = {name: sum(scores) / len(scores) for name, scores in by_severity.items()}
    result = {
        "corruption_accuracy": sum(found.values()) / len(found),
        "by_corruption": means,
        "by_severity": by_severity,
        "published_sets": set(found)
        == {(name, severity) for name in COMMON for severity in SEVERITIES},
    }
    return result if baseline is None else result | {"mce": _mean_ratio(means, baseline)}


def _mean_ratio(means: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    bad = [name for name in means if not 0 < baseline.get(name, 0) <= 1]
    if bad:
        raise DataError(
            f"the baseline has no error rate above 0 for '{bad[0]}'; add it, as a fraction"
        )
    return sum((1 - mean) / baseline[name] for name, mean in means.items()) / len(means)
