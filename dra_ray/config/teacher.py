"""Configs of diffusion teachers: their network, their training and sampling from them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dra_ray.config.base import (
    Batch,
    Count,
    Frozen,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
)
from dra_ray.config.experiment import Data, Resources, TeacherUri

SHARDS = 1_000_000  # files of a synthetic set; each is a task whose arguments are in memory


class UNet(Frozen):
    """EDM's DDPM++ network (Karras et al. 2022); `model_channels` 32, 64 or 128 divide into its
    group norms.
    """

    model_channels: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="channels at the full resolution"
    )
    channel_mult: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(max_length=16)
    ] = Field(
        (1, 2), description="channels at each resolution, as multiples; each halves the sides"
    )
    num_blocks: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="residual blocks per resolution"
    )
    attn_resolutions: Annotated[tuple[int, ...], Field(max_length=64)] = Field(
        (), description="resolutions, in pixels a side, that have self-attention"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="probability of dropout in training"
    )
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="probability that training hides an image's class label"
    )
    augment_dim: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="length of the label of EDM's augmentation: 9 where a denoiser is trained with "
        "`augment`",
    )


class TeacherTraining(Frozen):
    """Train a teacher on real images: a class-conditional EDM (arXiv 2206.00364, table 1 and
    appendix F), or its control.

    The control (arXiv 2602.19931, section 5.6) is the same network up to its feature layer, trained
    to classify the same noisy images; its learning rate's schedule, its noise and its length are
    not in the text we have (UNVERIFIED).
    """

    kind: Literal["teacher"] = Field("teacher", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    seed: NonNegativeInt = Field(0, description="of initial weights, batches and noise")
    data: Data = Data()
    objective: Literal["denoise", "classify"] = Field(
        "denoise",
        description="classify: the control, on images augmented as `data` says; denoise: as "
        "`augment` says",
    )
    net: UNet = UNet()
    style: Literal["ddpmpp", "ncsnpp"] = Field("ddpmpp", description="DDPM++ or NCSN++")
    preconditioning: Literal["edm", "vp", "ve"] = Field(
        "edm",
        description="table 1's column: preconditioning, noise levels in training and their weight",
    )
    sigma: PositiveFloat | None = Field(
        None,
        description="of classify: one noise level for all images; default: drawn as for denoise "
        "(UNVERIFIED)",
    )
    augment: Probability = Field(
        0.0,
        description="of denoise: probability of each change of EDM's augmentation (published: "
        "0.12); needs net.augment_dim=9",
    )
    images_seen: PositiveInt = Field(200_000, description="training length, in images")
    batch: Batch = Field(128, description="global batch")
    lr: PositiveFloat = Field(1e-3, description="learning rate, after the warm-up")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of lr after the warm-up; cosine falls to 0 (DDAE's, for classify)"
    )
    warmup_images: NonNegativeInt = Field(
        10_000, description="images over which lr rises linearly from 0"
    )
    ema_halflife_images: PositiveFloat = Field(
        20_000.0, description="half-life of the averaged weights (EMA), in images"
    )
    ema_ramp: PositiveFloat | None = Field(
        0.05,
        description="the half-life is at most this part of the images seen; null: always the same",
    )
    checkpoint_images: PositiveInt = Field(
        50_000, description="images between checkpoints and sample sheets"
    )
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherTraining:
        if self.resources.validation == "beside":
            raise ValueError(
                "resources.validation='beside' is for students, whose validations are attacks; "
                "leave it out"
            )
        if self.sigma is not None and self.objective == "denoise":
            raise ValueError(
                f"sigma={self.sigma:g}, but objective='denoise' learns every noise level; unset it "
                "or set objective='classify'"
            )
        return self


class Flow(Frozen):
    """How a LightningDiT's velocities are integrated; the defaults are the published ones of XL/1
    after 800 epochs.

    The paper of DRA does not say how its 4 million images were sampled (UNVERIFIED).
    """

    times: Annotated[int, Field(ge=2, le=100_000)] = Field(
        250, description="grid points from noise to image, so one step fewer"
    )
    method: Literal["euler", "heun"] = Field(
        "euler", description="the integrator; heun calls the network twice a step"
    )
    guidance: NonNegativeFloat = Field(6.7, description="classifier-free guidance; 1 for none")
    guided_channels: PositiveInt = Field(
        3, description="the first so many latent channels, on which alone guidance acts"
    )
    guided_from: Probability = Field(0.125, description="time before which there is no guidance")
    shift: PositiveFloat = Field(
        0.3, description="below 1 puts more of the steps near the noise; 1 for equal steps"
    )


class Select(Frozen):
    """Make more images and keep, per class, those that a classifier is surest of (DM-AT's million,
    arXiv 2302.04638).
    """

    run: str = Field(
        description="training run whose student scores the images by the softmax of their own class"
    )
    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of every class's images that is kept"
    )


class Synthesis(Frozen):
    """Sample a class-balanced set with the Heun sampler (EDM, algorithm 1), which is deterministic
    where churn is 0; a LightningDiT by `flow`.
    """

    kind: Literal["synthesis"] = Field("synthesis", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    teacher: TeacherUri = Field(
        None,
        description="folder written by `dra teacher train` or `import`, or package:NAME (see `dra "
        "teacher list`)",
    )
    images: Annotated[int, Field(ge=1, le=10**10)] = Field(
        4000, description="images in the set; with `select`, 1/keep times as many are made"
    )
    steps: Annotated[int, Field(ge=2, le=100_000)] = Field(
        18, description="noise levels of the Heun sampler"
    )
    sigma_min: PositiveFloat = Field(0.002, description="lowest noise level")
    sigma_max: PositiveFloat = Field(80.0, description="highest noise level, where sampling starts")
    rho: PositiveFloat = Field(
        7.0, description="of EDM's schedule: higher puts more steps at low noise"
    )
    churn: NonNegativeFloat = Field(
        0.0,
        description="S_churn: fresh noise over the whole sampling, spread over its steps; 0 for "
        "none",
    )
    churn_min: NonNegativeFloat = Field(
        0.0, description="S_min: no fresh noise below this noise level"
    )
    churn_max: PositiveFloat | None = Field(
        None, description="S_max: no fresh noise above this noise level; default: no limit"
    )
    churn_noise: PositiveFloat = Field(1.0, description="S_noise: deviation of the fresh noise")
    flow: Flow = Flow()
    select: Select | None = Field(
        None, description="make more images and keep the surest; default: keep all"
    )
    seed: NonNegativeInt = Field(0, description="image i is made from seed + i, whoever makes it")
    batch: Batch = Field(
        250, description="images per network call; part of what makes the bytes reproducible"
    )
    shard_images: PositiveInt = Field(1000, description="images per file; one Ray task each")
    workers: Count = Field(2, description="Ray tasks at a time")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a task")
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for a task")

    @model_validator(mode="after")
    def _shards(self) -> Synthesis:
        if self.shard_images % self.batch:
            raise ValueError(
                f"shard_images={self.shard_images} is not a multiple of batch={self.batch}; change "
                "either"
            )
        files = math.ceil(
            self.images / (self.select.keep if self.select else 1) / self.shard_images
        )
        if files > SHARDS:
            raise ValueError(
                f"images={self.images} in files of shard_images={self.shard_images} are {files:,} "
                f"files; raise shard_images until there are at most {SHARDS:,}"
            )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}"
            )
        return self
