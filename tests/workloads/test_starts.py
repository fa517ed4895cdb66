"""What a run's start does without: imports that take seconds."""

from __future__ import annotations

import pytest

from dra_ray import config, plan
from dra_ray.errors import ConfigError
from tests.support.imports import without


@pytest.mark.seconds
def test_trains_controller_imports_no_torch_with_our_callbacks() -> None:
    without("torch", "import dra_ray.cluster")


@pytest.mark.seconds
def test_a_run_without_a_teacher_is_checked_without_torchs_compiler() -> None:
    code = "from dra_ray import config\nfrom dra_ray.plan import ready\n"
    code += "ready.of_experiment(config.load('digits-dm-at', config.Experiment))"
    without("torch._dynamo", code)


@pytest.mark.parametrize(
    ("student", "problems"), [("vit-t-3", 1), ("timm/none", 1), ("wrn-10-1", 0)]
)
def test_a_check_raises_what_a_plan_raises(student: str, problems: int) -> None:
    experiment = config.load("digits-dm-at", config.Experiment)
    experiment = config.override(experiment, {"model.name": student})
    said = []
    for look in (plan.check, plan.plan):
        try:
            look(experiment)
        except ConfigError as error:
            said.append(str(error))
    assert (len(said), len(set(said))) == (2 * problems, problems)
