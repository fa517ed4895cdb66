"""What `dra teacher train` can train, without Ray."""

import math

import pytest
import torch

from dra_ray import data
from dra_ray.config import Data, TeacherTraining, UNet
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, diffusion
from dra_ray.teachers.edm import EDM, PRECONDITIONS, vp_sigma
from dra_ray.teachers.noisy import NoisyClassifier
from dra_ray.workloads import train_teacher

CONTROL = TeacherTraining(
    objective="classify",
    net=UNet(model_channels=16),
    images_seen=1280,
    batch=32,
    warmup_images=64,
    schedule="cosine",
    sigma=0.3,
    lr=3e-3,
)


def trained(config: TeacherTraining, steps: int | None = None) -> train_teacher.Training:
    training = train_teacher.Training(config, data.load(config.data))
    while training.step < (steps or training.steps):
        training.advance(training.net)
    return training


@pytest.mark.seconds
def test_the_control_learns_and_is_a_teacher(tmp_path):
    training = trained(CONTROL)
    assert isinstance(training.average, NoisyClassifier)
    assert training.samples() is None
    assert training.validation_accuracy() == training.validation_accuracy() > 0.3
    assert training.lr == pytest.approx(0, abs=1e-6)
    checkpoint.save(Store(str(tmp_path)), training.average, training.card())
    assert checkpoint.load(Store(str(tmp_path)), NoisyClassifier).num_classes == 0


def test_a_resumed_control_is_the_same():
    whole, half, rest = (
        trained(CONTROL, 6),
        trained(CONTROL, 3),
        train_teacher.Training(CONTROL, data.load(CONTROL.data)),
    )
    rest.load_state(half.state())
    while rest.step < 6:
        rest.advance(rest.net)
    for a, b in zip(whole.average.parameters(), rest.average.parameters(), strict=True):
        assert torch.equal(a, b)
    batch = slice(0, CONTROL.batch)
    assert rest.mean_loss(batch) == whole.mean_loss(batch)  # of all six steps


@pytest.mark.seconds
@pytest.mark.parametrize(("preconditioning", "style"), [("vp", "ddpmpp"), ("ve", "ncsnpp")])
def test_the_other_columns_of_table_1(preconditioning, style):
    config = TeacherTraining(
        net=UNet(model_channels=16),
        images_seen=96,
        batch=32,
        warmup_images=0,
        preconditioning=preconditioning,
        style=style,
        ema_ramp=None,
    )
    training = trained(config)
    assert isinstance(training.net, EDM)
    assert (training.net.precondition, training.net.style) == (preconditioning, style)
    low, high = PRECONDITIONS[preconditioning].sigma_range
    drawn = diffusion.draw_sigma(4000, torch.Generator().manual_seed(0), preconditioning)
    training.net.check_sigma(drawn)
    middle = {"vp": vp_sigma(0.5), "ve": math.sqrt(low * high)}[preconditioning]
    assert float(drawn.median()) == pytest.approx(middle, rel=0.2)
    assert training.samples()


def test_the_average_without_a_ramp():
    assert diffusion.ema_decay(10, 10, 10.0, None) == 0.5
    assert diffusion.ema_decay(10, 10, 10.0) < 1e-5


def test_digits_teacher_without_validation_images():
    config = CONTROL.model_copy(update={"data": Data(validation_images=0)})
    assert train_teacher.Training(config, data.load(config.data)).validation_accuracy() is None
