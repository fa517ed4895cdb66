"""Configs of many runs: a sweep under ASHA, and the quickstart."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dra_ray.config.base import Count, Frozen, NonNegativeInt, PositiveInt, override, shown_value
from dra_ray.config.experiment import Experiment
from dra_ray.config.teacher import Synthesis, TeacherTraining

COMBINATIONS = 10_000  # each becomes an experiment, in memory and on every worker


class Asha(Frozen):
    """Asynchronous successive halving (Li et al. 2020) on robust validation accuracy over
    `images_seen`.
    """

    grace_epochs: Count = Field(2, description="no trial is stopped before")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="one trial in so many goes on to the next rung, so many times as long"
    )
    max_concurrent: Count = Field(2, description="trials that train at the same time")


class Sweep(Frozen):
    """Many runs: every combination of `space`, or `trials` of them drawn without replacement."""

    kind: Literal["sweep"] = Field("sweep", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    base: Experiment = Experiment()
    space: dict[str, list[Any]] = Field(
        default_factory=dict, description="values per field, such as align.weight: [0, 1]"
    )
    trials: PositiveInt | None = Field(
        None, description="how many to draw; default: every combination"
    )
    seed: NonNegativeInt = Field(0, description="of the draw of trials")
    asha: Asha = Asha()

    @model_validator(mode="after")
    def _checked(self) -> Sweep:
        if not self.space:
            raise ValueError(
                "space is empty; name at least one field, such as align.weight: [0, 1]"
            )
        for field, values in self.space.items():
            if not values:
                raise ValueError(f"space.{shown_value(field)} has no values")
        combinations = math.prod(len(values) for values in self.space.values())
        if combinations > COMBINATIONS:
            raise ValueError(
                f"space has {combinations:,} combinations; take fields or values out until there "
                f"are at most {COMBINATIONS:,}"
            )
        if self.asha.grace_epochs > self.base.optim.epochs:
            raise ValueError(
                f"asha.grace_epochs={self.asha.grace_epochs} is beyond "
                f"base.optim.epochs={self.base.optim.epochs}; lower it"
            )
        return self

    def experiments(self) -> dict[str, Experiment]:
        """Trial name -> experiment, the same for the same sweep. Raises `ConfigError` for a value
        out of range.

        Combinations that differ only in `align.sigma` where `align.weight` is 0 are one trial:
        sigma has no effect there.
        """
        axes = sorted(self.space)
        combinations: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*(self.space[axis] for axis in axes)):
            chosen = dict(zip(axes, values, strict=True))
            experiment = override(self.base, chosen)
            if experiment.align.weight == 0 and "align.sigma" in chosen:
                chosen["align.sigma"] = self.space["align.sigma"][0]
            combinations.setdefault(json.dumps(chosen, sort_keys=True), chosen)
        picked = list(combinations.values())
        if self.trials is not None and self.trials < len(picked):
            baseline = [c for c in picked if c.get("align.weight") == 0][
                :1
            ]  # a sweep without its baseline proves nothing
            rest = [c for c in picked if c not in baseline]
            picked = baseline + random.Random(self.seed).sample(rest, self.trials - len(baseline))
            picked.sort(key=lambda c: json.dumps(c, sort_keys=True))
        return {
            f"trial-{index:03d}": override(self.base, chosen) for index, chosen in enumerate(picked)
        }


class Quickstart(Frozen):
    """Teacher, synthetic images and sweep in one file: `dra quickstart`."""

    kind: Literal["quickstart"] = Field("quickstart", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    teacher: TeacherTraining = TeacherTraining()
    synthesis: Synthesis = Synthesis()
    sweep: Sweep
