"""A diffusion encoder as a student."""

import pytest
import torch

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.dit import DiTSizes, LightningDiT
from dra_ray.teachers.edm import EDM

SHAPE = Shape(5, 1, 8, (0.3,), (0.2,))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    torch.manual_seed(0)
    net = EDM(config.UNet(model_channels=16, augment_dim=9), 8, 1, 5)
    checkpoint.save(store, net, {})
    return store.uri


def begun(name: str, **fields: object) -> tuple[students.Student, str]:
    settings = config.Model.model_validate({"name": name} | fields)
    student = students.build(settings, SHAPE)
    return student, students.initialise(student, settings)


def test_its_features_are_the_teacher_s(teacher: str) -> None:
    student, origin = begun(f"diffusion/{teacher}", sigma=0.2)
    net = checkpoint.load(Store(teacher))
    x = torch.rand(3, 1, 8, 8)
    sigma = torch.full((3,), 0.2)
    logits, features = student.with_features(x)
    torch.testing.assert_close(features, net.features(2 * x - 1, sigma))
    torch.testing.assert_close(logits, student.head(features))
    _, maps = student.with_map(x)
    torch.testing.assert_close(maps, net.features(2 * x - 1, sigma, pooled=False))
    assert logits.shape == (3, 5)
    assert "diffusion encoder" in origin
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in net.parameters())


def test_it_is_trained_end_to_end(teacher: str) -> None:
    student, _ = begun(f"diffusion/{teacher}", layer="dec.8x8_block0")
    assert student.feature_dim == 16
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    torch.nn.functional.cross_entropy(student(x), torch.arange(4)).backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "net.model.enc.8x8_conv.weight" in trained
    assert "head.weight" in trained
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_it_comes_back_from_its_own_weights(teacher: str, tmp_path) -> None:
    student, _ = begun(f"diffusion/{teacher}")
    with torch.no_grad():
        student.net.model.enc["8x8_conv"].weight.add_(1)
    file = Store(str(tmp_path)) / "model.safetensors"
    file.write_tensors(student.state_dict())
    again, _ = begun(f"diffusion/{teacher}", weights=file.uri)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), student(x))


def test_what_cannot_be_a_student_is_said(teacher: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no teacher at"):
        begun(f"diffusion/{tmp_path}")
    with pytest.raises(ConfigError, match="model.layer=.*did you mean 'dec.8x8_block1'"):
        begun(f"diffusion/{teacher}", layer="dec.8x8_block7")
    settings = config.Model(name=f"diffusion/{teacher}")
    with pytest.raises(ConfigError, match=r"images of \(1, 8, 8\), but the data has images of"):
        students.build(settings, Shape(5, 1, 10, (0.3,), (0.2,)))
    with pytest.raises(ConfigError, match="model.name='diffusion/': is not known"):
        config.override(config.Experiment(), {"model.name": "diffusion/"})


def test_a_transformer_over_pixels_may_be_one(tmp_path) -> None:
    sizes = DiTSizes(
        resolution=8, channels=1, patch=2, hidden=24, mlp_hidden=32, depth=2, heads=2, num_classes=5
    )
    checkpoint.save(Store(str(tmp_path)), LightningDiT(sizes), {})
    student, _ = begun(f"diffusion/{tmp_path}")
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 5)


def test_a_run_names_it_in_full(teacher: str) -> None:
    experiment = config.override(
        config.Experiment(),
        {"model.name": "diffusion/package:fashion-edm", "align.weight": 0.0},
    ).with_sources()
    assert experiment.model.name.startswith("diffusion/file:") or "/fashion-edm" in (
        experiment.model.name
    )
    assert "package:" not in experiment.model.name
