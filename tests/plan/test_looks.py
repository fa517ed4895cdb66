"""What analyses would cost: attacks by passes, the rest by a small case and how its work grows."""

import json

import pytest

from dra_ray import config, data, plan
from dra_ray.errors import ConfigError
from dra_ray.inspection.models import How
from dra_ray.inspection.similarity import _ROWS
from dra_ray.plan import looks
from dra_ray.plan.timing import Basis
from tests.support.command import dra

EXPERIMENT = config.override(config.Experiment(), {"model.name": "wrn-10-1", "align.weight": 0.0})
BASIS = Basis(None, 0.05, "said")


def by_part(images: int, **how: int) -> dict[str, looks.Look]:
    return {each.part: each for each in looks.of(EXPERIMENT, images, BASIS, How(**how))}


def test_attacks_are_counted_by_their_passes() -> None:
    shape = data.outline(EXPERIMENT.data).shape
    _, forward, _ = plan.student_cost(EXPERIMENT.model, shape)
    for steps in (5, 20):
        attacks = next(iter(by_part(1000, steps=steps).values()))
        gflop = 2 * forward * (2 * steps + 4) * 1000 / 1e9
        assert attacks.seconds == pytest.approx(gflop / (0.05 * 1e3))
    unknown = looks.of(EXPERIMENT, 1000, Basis(None, None, "said"))
    assert unknown[0].seconds is None


def test_each_analysis_grows_as_its_work_does() -> None:
    small, large = by_part(1000), by_part(4000)
    for name, power in looks.GROWTH.items():
        ours, theirs = small[name].seconds, large[name].seconds
        assert ours is not None
        assert ours > 0
        assert theirs == pytest.approx(4**power * ours)
        assert large[name].memory_gb > small[name].memory_gb
    assert set(small) - set(looks.GROWTH) == {next(iter(small))}
    assert looks.KERNEL_ROWS == _ROWS


def test_longer_autoencoders_take_longer() -> None:
    one, two = (by_part(1000, sae_steps=steps)["sae"].seconds for steps in (100, 200))
    assert one is not None
    assert two is not None
    assert two > one


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="--analyses 12: 10 classes need at least 20 images"):
        looks.of(EXPERIMENT, 12, BASIS)


@pytest.mark.seconds
def test_the_command_prints_them(tmp_path) -> None:
    words = ["plan", "digits-dm-at", "--set", "synthetic.images=0", "--tflops", "0.05"]
    done = dra(tmp_path, *words, "--analyses", "500", "--json", "plan.json")
    assert done.returncode == 0, done.stderr
    assert "dra analyse, 500 images" in done.stdout
    rows = json.loads((tmp_path / "plan.json").read_text())
    found = {row["quantity"]: row["value"] for row in rows if "analyse" in row["stage"]}
    assert found["frequency"]["seconds"] > 0
    refused = dra(tmp_path, "plan", "digits-edm", "--tflops", "0.05", "--analyses", "500")
    assert refused.returncode == 2
    assert "give a recipe that trains one" in refused.stderr.replace("\n", " ")
