"""Config of analyses that run as a job: what `dra analyse` takes on its command line, as a file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from dra_ray.config.base import Count, Frozen, NonNegativeInt, PositiveFloat, PositiveInt
from dra_ray.config.catalogue import ANALYSES
from dra_ray.errors import nearest


class Analysis(Frozen):
    """What the paper looked at, for a set of models, with a page: `dra submit analyse FILE`."""

    kind: Literal["analysis"] = Field("analysis", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    what: str = Field(
        "all", description="one of the analyses of `dra analyse`; or all, in the order of the paper"
    )
    models: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)] = Field(
        description="what `dra evaluate` takes: runs, checkpoints, timm/NAME; also one teacher, "
        "which the others are compared with",
    )
    settings: dict[str, JsonValue] = Field(
        {},
        description="fields of data, evaluation, model, resources and threat that differ from the "
        "models' own, such as data.test_images",
    )
    eps_255: Annotated[float, Field(ge=0, le=255)] | None = Field(
        None, description="radius, in pixel steps of 1/255; default: the models' own"
    )
    norm: Literal["linf", "l2"] | None = Field(None, description="default: the models' own")
    weights: str | None = Field(None, description="of timm/NAME")
    architecture: str | None = Field(None, description="of robustbench:URI")
    images: Annotated[int, Field(ge=4, le=10**7)] = Field(
        1000, description="the first so many test images"
    )
    steps: Annotated[int, Field(ge=1, le=10**5)] = Field(
        20, description="of PGD on the cross-entropy"
    )
    sigma: PositiveFloat = Field(0.06, description="noise level at which a teacher looks")
    layer: str | None = Field(None, description="of a teacher; default: its usual one")
    neighbours: Annotated[int, Field(ge=2, le=10**6)] = Field(10, description="of CKNNA")
    sae_steps: PositiveInt = Field(1000, description="of a sparse autoencoder's training")
    autoattack: NonNegativeInt = Field(
        0,
        description="also AutoAttack, and its version for randomised networks, on heads on the "
        "teacher, on the first so many images; 0 for none",
    )
    seed: NonNegativeInt = Field(0, description="of the attack's start and of a teacher's noise")
    workers: Count = Field(2, description="Ray tasks at a time; changes no result")

    @model_validator(mode="after")
    def _known(self) -> Analysis:
        if self.what not in (*ANALYSES, "all"):
            raise ValueError(f"what='{self.what}': {nearest(self.what, [*ANALYSES, 'all'])}")
        return self
