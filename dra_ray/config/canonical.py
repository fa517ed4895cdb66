"""Config of canonical samples: what CLARID makes of real images (arXiv 2506.09955)."""

from __future__ import annotations

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
)
from dra_ray.config.experiment import Data, TeacherUri

ENERGY_VECTORS = 50


class Canonical(Frozen):
    """Canonical samples and features of real images, from a class-conditional diffusion model. The
    method is the paper's; its values were not to be had, so all defaults are UNVERIFIED.
    """

    kind: Literal["canonical"] = Field("canonical", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    teacher: TeacherUri = Field(
        None,
        description="folder written by `dra teacher train` or `import`, or package:NAME; it must "
        "know the classes",
    )
    data: Data = Field(
        Data(), description="whose training images are made canonical; augmentation is not applied"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1,
        description="of the training images of every class, drawn by `seed`; a smaller share's are "
        "among a larger one's",
    )
    sigma: PositiveFloat = Field(
        3.3,
        description="noise level to which images are inverted: low keeps context, high loses "
        "identity; a flow's time t is sigma = (1-t)/t (UNVERIFIED)",
    )
    layer: str | None = Field(
        None,
        description="whose unpooled feature map's Jacobian gives the directions, and whose pooled "
        "feature is kept; default: the teacher's (UNVERIFIED)",
    )
    count: Annotated[int, Field(ge=0, le=4096)] | Literal["energy"] = Field(
        10,
        description="directions that are taken out; 0 for none, the control; energy: by `energy` "
        "(UNVERIFIED)",
    )
    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="of count=energy: as many directions as hold this share of the squared "
        f"gains of the first {ENERGY_VECTORS}",
    )
    energy_most: Annotated[int, Field(ge=1, le=ENERGY_VECTORS)] = Field(
        20, description="of count=energy: at most so many"
    )
    directions: Literal["top", "random", "bottom"] = Field(
        "top",
        description="those along which the feature changes most (CLARID); the controls: random "
        "ones, or those along which it changes least",
    )
    iterations: Count = Field(
        20, description="of subspace iteration at most; each takes about 4 network calls a vector"
    )
    tolerance: PositiveFloat = Field(
        1e-3,
        description="of subspace iteration: it ends where 1 - cosine of the largest angle between "
        "two estimates is below",
    )
    oversample: Annotated[int, Field(ge=0, le=4096)] = Field(
        4, description="further vectors, which speed subspace iteration up"
    )
    steps: Annotated[int, Field(ge=2, le=100_000)] = Field(
        18, description="noise levels from sigma_min to sigma, up and down (Heun)"
    )
    sigma_min: PositiveFloat = Field(0.002, description="noise level that clean images stand for")
    rho: PositiveFloat = Field(
        7.0, description="of EDM's schedule: higher puts more steps at low noise"
    )
    guidance: NonNegativeFloat = Field(
        1.0,
        description="classifier-free, of decoding; 1 for none. Needs a teacher whose training hid "
        "labels (net.label_dropout)",
    )
    rescale: bool = Field(
        False, description="give the projected latent its old norm back (UNVERIFIED)"
    )
    judge: str | None = Field(
        None,
        description="training run whose student looks at canonical samples: those that it takes "
        "for another class are not taught; default: all are",
    )
    seed: NonNegativeInt = Field(
        0, description="of the choice of images and of where subspace iteration starts"
    )
    batch: Batch = Field(
        50, description="images per network call; part of what makes the bytes reproducible"
    )
    shard_images: PositiveInt = Field(500, description="images per file; one Ray task each")
    workers: Count = Field(2, description="Ray tasks at a time")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a task")
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for a task")

    @property
    def vectors(self) -> int:
        """Directions that are looked for."""
        return ENERGY_VECTORS if self.count == "energy" else int(self.count)

    @property
    def calls_per_image(self) -> int:
        """Network calls of one image at most; those up to the layer count whole, and a derivative
        as two.
        """
        flow = 2 * (2 * (self.steps - 1)) + (1 if self.guidance == 1 else 2)
        if not self.vectors:
            return flow
        wide = self.vectors + self.oversample
        once = 2 * wide  # the products with the Jacobian that give the gains
        return (
            flow + 3 + (once if self.directions == "random" else once + 4 * wide * self.iterations)
        )

    @model_validator(mode="after")
    def _fits(self) -> Canonical:
        if self.shard_images % self.batch:
            raise ValueError(
                f"shard_images={self.shard_images} is not a multiple of batch={self.batch}; change "
                "either"
            )
        if self.sigma_min >= self.sigma:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma={self.sigma:g}")
        return self
