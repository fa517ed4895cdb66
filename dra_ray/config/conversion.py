"""Config of a conversion: a set of others, written in rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dra_ray.config.base import Count, Frozen, NonNegativeInt, PositiveFloat, PositiveInt

SHARD_BYTES = 2**25  # a reply of an object store that takes longer than its latency


class Conversion(Frozen):
    """Labelled images of others as a set in rows, shuffled once, so that its first images stand for
    all.
    """

    kind: Literal["conversion"] = Field("conversion", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    source: str = Field(
        description=".npz file, folder of .npz files, or folder with class folders or tar shards"
    )
    resolution: PositiveInt | None = Field(
        None, description="pixels a side of images that are decoded; those of .npz files stay"
    )
    shard_images: PositiveInt | None = Field(
        None, description="images per file; default: as many as have 32 MiB"
    )
    block_images: PositiveInt | None = Field(
        None,
        description="neighbours in the source that are read at once and go into one file; default: "
        "16, fewer where files hold few images",
    )
    seed: NonNegativeInt = Field(0, description="of the order")
    workers: Count = Field(2, description="Ray tasks at a time")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a task")
