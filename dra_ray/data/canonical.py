"""Canonical samples as files: which training images they are made of, how they are read, and the
batches of them that a training step gets.

A set is a folder of `.npz` shards, which `dra canonical make` writes: `image` uint8 [n,H,W,C] and
`label` int64 [n] as in synthetic sets, `feature` float32 [n,D] of the canonical latents,
`raw_feature` of the latents before projection, `latent` float32 [n,C,h,w], `index` int64 [n] in the
training images, `count` int64 [n] of directions that were taken out, their `gain` float32 [n,v],
`change` float32 [n], and `judged` int64 [n], the class that a judge sees, or -1 without one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from dra_ray.data.pictures import Shape, Split, checked
from dra_ray.data.random import Stream, derive, generator
from dra_ray.errors import DataError
from dra_ray.storage import Store

LEAST_OF_CLASS = 4  # canonical samples of a class in a step's batch
_KEYS = ("image", "label", "feature", "judged")


def shard_name(index: int) -> str:
    return f"canonical-{index:05d}.npz"


def chosen(labels: Tensor, share: float, seed: int) -> Tensor:
    """Positions int64 [n] of a share of every class among `labels` int64 [N], at least one of each,
    drawn by `seed`; classes alternate, so that the first of them are balanced, and a smaller
    share's are among a larger one's.
    """
    orders, takes = [], []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        draws = generator(seed, Stream.CANONICAL, label)
        orders.append(own[torch.randperm(len(own), generator=draws)])
        takes.append(math.ceil(share * len(own) - 1e-9))
    rounds = range(max(takes, default=0))
    return torch.tensor(
        [
            int(order[turn])
            for turn in rounds
            for order, take in zip(orders, takes, strict=True)
            if turn < take
        ],
        dtype=torch.int64,
    )


@dataclasses.dataclass(frozen=True)
class CanonicalImages:
    """Canonical samples that a judge, where there was one, takes for their class.

    Attributes:
        pictures: the samples.
        features: float32 [N,D], of the canonical latents.
        rejected: how many more there were.
    """

    pictures: Split
    features: Tensor
    rejected: int

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def members(self) -> Members:
        """Looked up once: every step draws by them."""
        return members(self.pictures.labels)

    def facts(self) -> dict[str, JsonValue]:
        """What a manifest records; a run goes on only where it finds the same."""
        digest = hashlib.sha256(self.features.numpy().tobytes())
        self.pictures.hash_into(digest)
        return {"images": len(self), "rejected": self.rejected, "sha256": digest.hexdigest()}


def read(store: Store, images: int | None, shape: Shape) -> CanonicalImages:
    """The first `images` samples of a set that a judge accepts, all by default.

    Raises `DataError` where there is no set, fewer samples, or samples that do not fit `shape`.
    """
    names = [name for name in store.names() if name.startswith("canonical-")]
    files = [store / name for name in sorted(names) if name.endswith(".npz")]
    if not files:
        raise DataError(
            f"canonical.uri='{store}' holds no canonical samples; make them with `dra canonical "
            "make`"
        )
    pictures, features, seen = [], [], 0
    for file in files:
        arrays = file.read_npz()
        if missing := [key for key in _KEYS if key not in arrays]:
            raise DataError(
                f"'{file}' lacks {', '.join(missing)}; make the set again with `dra canonical make`"
            )
        whole = checked(arrays["image"].transpose(0, 3, 1, 2), arrays["label"], file, shape)
        judged = torch.from_numpy(arrays["judged"].astype(np.int64))
        good = ((judged < 0) | (judged == whole.labels)).nonzero()[:, 0]
        seen += len(whole)
        pictures.append(whole[good])
        features.append(torch.from_numpy(arrays["feature"].astype(np.float32))[good])
        if images is not None and sum(map(len, features)) >= images:
            break
    together = Split(
        torch.cat([part.images for part in pictures]), torch.cat([part.labels for part in pictures])
    )
    accepted = len(together)
    if accepted < (images or 1):
        raise DataError(
            f"canonical.images={images or 1}, but '{store}' has {accepted} samples that its judge "
            "accepts; lower it or make more"
        )
    taken = slice(images)
    return CanonicalImages(together[taken], torch.cat(features)[taken], seen - accepted)


# -- batches ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class CanonicalBatch:
    """A worker's slice of a step's canonical samples: images uint8 [b,C,H,W], labels int64 [b],
    features float32 [b,D].
    """

    images: Tensor
    labels: Tensor
    features: Tensor


Members = Mapping[int, Tensor]
"""Class -> positions int64 [n] of its samples, ascending; classes ascend too."""


def members(labels: Tensor) -> Members:
    """Of samples with `labels` int64 [N]."""
    return {int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()}


def indices(of: Members, batch: int, seed: int, step: int) -> Tensor:
    """Positions int64 [batch] of the canonical samples of a step, a pure function.

    Equally many of each class in it (up to one), at least four, without repetition where a class
    has enough; of many classes a random choice.
    """
    draws = generator(seed, Stream.CANONICAL_BATCH, step)
    classes = list(of)
    count = max(1, min(len(classes), batch // LEAST_OF_CLASS))
    picked = torch.randperm(len(classes), generator=draws)[:count]
    parts = []
    for place, chosen_class in enumerate(picked.tolist()):
        own = of[classes[chosen_class]]
        wanted = batch // count + (place < batch % count)
        rounds = -(-wanted // len(own))
        order = torch.cat([torch.randperm(len(own), generator=draws) for _ in range(rounds)])
        parts.append(own[order[:wanted]])
    together = torch.cat(parts)
    return together[torch.randperm(len(together), generator=draws)]


def of_class(of: Members, wanted: Tensor, seeds: Tensor) -> Tensor:
    """For each class in `wanted` int64 [b] the position of a sample that has it, drawn by its own
    seed in `seeds` int64 [b]. `DataError` for a class without samples.
    """
    positions = []
    for label, seed in zip(wanted.tolist(), seeds.tolist(), strict=True):
        own = of.get(label)
        if own is None:
            raise DataError(
                f"no canonical sample has class {label}, which images to align have; make samples "
                "of every class, or raise canonical.images"
            )
        positions.append(int(own[derive(seed, Stream.CANONICAL) % len(own)]))
    return torch.tensor(positions, dtype=torch.int64)
