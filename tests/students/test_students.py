"""Students: sizes and names of the released checkpoints, features, normalisation; projector."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dra_ray import config, data, runs, students
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, ConfigError
from dra_ray.storage import Store
from dra_ray.students import checkpoint, wrn
from dra_ray.students.student import Normalise
from dra_ray.students.wrn import WideResNet
from dra_ray.training.projector import projector

SHAPE = Shape(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR10 = ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])


def test_state_dict_names_are_those_of_released_checkpoints() -> None:
    with torch.device("meta"):
        names = WideResNet(28, 10, 10, *CIFAR10).state_dict().keys()
    blocks = [f"layer.{g}.block.{b}." for g in range(3) for b in range(4)]
    norms = [
        f"{n}.{part}"
        for n in ("batchnorm_0", "batchnorm_1")
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    wanted = {b + n for b in blocks for n in [*norms, "conv_0.weight", "conv_1.weight"]}
    wanted |= {f"layer.{g}.block.0.shortcut.weight" for g in range(3)}
    wanted |= {"init_conv.weight", "logits.weight", "logits.bias"} | {
        n.replace("batchnorm_0", "batchnorm") for n in norms[:5]
    }
    assert set(names) == wanted


def test_a_block_is_its_formula() -> None:
    """BN, SiLU, 3x3 (stride 2: right and bottom padding), BN, SiLU, 3x3, plus the 1x1 of the
    activated input.
    """
    torch.manual_seed(0)
    student = WideResNet(10, 1, 10, [0.0], [1.0]).eval()
    block = student.layer[1].block[0]
    x = torch.randn(2, 16, 8, 8)
    active = F.silu(block.batchnorm_0(x))
    padded = torch.zeros(2, 16, 9, 9)
    padded[:, :, :8, :8] = active
    hidden = F.silu(block.batchnorm_1(F.conv2d(padded, block.conv_0.weight, stride=2)))
    shortcut = torch.einsum(
        "bchw,oc->bohw", active[:, :, ::2, ::2], block.shortcut.weight[:, :, 0, 0]
    )
    expected = F.conv2d(hidden, block.conv_1.weight, padding=1) + shortcut
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_logits_come_from_the_features_of_normalised_images() -> None:
    torch.manual_seed(0)
    images = data.load(config.Data())
    student = students.build(config.Model(name="wrn-10-1"), images.shape).eval()
    x = data.to_float(images.train.images[:4])
    logits, features = student.with_features(x)
    assert features.shape == (4, student.feature_dim)
    torch.testing.assert_close(logits, student.logits(features))
    torch.testing.assert_close(student(x), logits)
    plain = students.build(config.Model(name="wrn-10-1", normalise=False), images.shape).eval()
    plain.load_state_dict(student.state_dict())
    mean, std = images.shape.mean, images.shape.std
    torch.testing.assert_close(plain((x - mean[0]) / std[0]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "wrn-28",
        "wrn-27-10",
        "resnet",
        "wrn-4-1",
        "relu-wrn-12-1",
        "rawrn-34-10",
        "vit-x-2",
        "vit-b-3",
        "timm/nothing",
    ],
)
def test_an_unknown_student_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name='{name}'"):
        students.build(config.override(config.Experiment(), {"model.name": name}).model, SHAPE)


def test_normalisation_needs_a_value_for_every_channel() -> None:
    with pytest.raises(ConfigError, match=r"model.mean has 3 values, but images have 1 channels"):
        students.build(
            config.Model(name="wrn-10-1", mean=(0.5, 0.5, 0.5)), Shape(10, 1, 8, (0.3,), (0.4,))
        )


GREY, COLOUR = Shape(7, 1, 28, (0.29,), (0.35,)), Shape(3, 3, 64, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in ("wrn-10-1", "relu-wrn-10-1", "resnet-18")
        for shape in (GREY, COLOUR)
    ]
    + [
        ("vit-t-4", GREY),
        ("vit-t-16", COLOUR),
        ("timm/resnet10t", GREY),
        ("timm/convnext_atto", COLOUR),
        ("timm/vit_tiny_patch16_224", COLOUR),
    ],
)
def test_every_student_has_features_and_an_input_gradient(name: str, shape: Shape) -> None:
    torch.manual_seed(0)
    student = students.build(config.Model(name=name), shape).eval()
    x = torch.rand(2, shape.channels, shape.resolution, shape.resolution, requires_grad=True)
    logits, features = student.with_features(x)
    assert logits.shape == (2, shape.num_classes)
    assert features.shape == (2, student.feature_dim)
    torch.testing.assert_close(student(x), logits)
    last = student.get_submodule(student.classifier.removesuffix("."))
    torch.testing.assert_close(last(features), logits)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["wrn-10-1", "relu-wrn-10-1", "resnet-18"])
@pytest.mark.parametrize("side", [1, 7, 14, 30])
def test_a_side_that_does_not_halve_evenly_is_no_obstacle(name: str, side: int) -> None:
    student = students.build(
        config.Model(name=name), dataclasses.replace(GREY, resolution=side)
    ).eval()
    logits, features = student.with_features(torch.rand(2, 1, side, side))
    assert logits.shape == (2, 7)
    assert features.shape == (2, student.feature_dim)


@pytest.mark.seconds
@pytest.mark.parametrize(
    "name", ["wrn-10-1", "relu-wrn-10-1", "resnet-18", "vit-t-8", "timm/convnext_atto"]
)
def test_normalisation_happens_inside_and_is_no_weight(name: str) -> None:
    torch.manual_seed(0)
    inside = students.build(
        config.Model(name=name, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)), SHAPE
    ).eval()
    raw = students.build(config.Model(name=name, normalise=False), SHAPE).eval()
    raw.load_state_dict(inside.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
        torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1),
    )
    torch.testing.assert_close(raw((x - mean) / std), inside(x), rtol=1e-4, atol=1e-5)


def test_a_backbone_that_images_are_too_small_for_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model.name='timm/convnext_atto' cannot take 1x28x28 images \(.*\); choose another "
        r"model or data.resolution",
    ):
        students.build(config.Model(name="timm/convnext_atto"), GREY)


def test_equal_seeds_give_equal_students() -> None:
    first, second = (_seeded("wrn-10-1").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_vit_starts_as_jax_starts_it() -> None:
    """Truncated normal of deviation 0.02, cut at 0.04, and LayerScale 1e-4."""
    net = _seeded("vit-t-4").net
    for tensor in (
        net.cls_token,
        net.pos_embed,
        net.patch_embed.proj.weight,
        net.blocks[3].attn.qkv.weight,
        net.head.weight,
    ):
        assert tensor.abs().max() <= 0.04
    # a normal cut at two deviations keeps 0.8796 of its deviation
    assert net.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert all(
        (p == 0).all()
        for key, p in net.named_parameters()
        if key.endswith(".bias") and "norm" not in key
    )
    assert all(
        (block.ls1.gamma == 1e-4).all() and (block.ls2.gamma == 1e-4).all() for block in net.blocks
    )
    assert net.pos_embed.shape == (1, 64, 192)


def _seeded(name: str) -> students.Student:
    torch.manual_seed(0)
    return students.build(config.Model(name=name), SHAPE)


def test_the_projector_has_three_layers() -> None:
    head = projector(640, 256, 2048)
    assert [type(m) for m in head] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert head(torch.zeros(3, 640)).shape == (3, 256)
    assert all((m.bias == 0).all() for m in head if isinstance(m, nn.Linear))
    bound = (6 / (640 + 2048)) ** 0.5
    assert head[0].weight.abs().max() <= bound
    assert head[0].weight.abs().max() > 0.95 * bound


@pytest.mark.parametrize(
    ("activation", "kind"), [("silu", nn.SiLU), ("relu", nn.ReLU), ("gelu", nn.GELU)]
)
def test_the_projector_has_the_activation_that_is_asked_for(activation, kind) -> None:
    assert [type(m) for m in projector(4, 3, 5, activation)] == [
        nn.Linear,
        kind,
        nn.Linear,
        kind,
        nn.Linear,
    ]


def test_a_checkpoint_of_another_architecture_says_which_keys_differ(tmp_path) -> None:
    run = Store(str(tmp_path))
    images = data.load(config.Data())
    experiment = config.Experiment(model=config.Model(name="wrn-10-1"))
    runs.begin_run(run, "train", experiment.model_dump(mode="json"), experiment.digest())
    with pytest.raises(CheckpointError, match="no trained weights yet"):
        checkpoint.load(run)
    checkpoint.save(run, students.build(config.Model(name="wrn-16-1"), images.shape).state_dict())
    with pytest.raises(CheckpointError, match=r"does not fit model.name='wrn-10-1'.*layer"):
        checkpoint.load(run)
    student = students.build(experiment.model, images.shape)
    checkpoint.save(run, student.state_dict())
    loaded, again = checkpoint.load(run)
    assert again == experiment
    assert not loaded.training
    x = data.to_float(images.test.images[:3])
    assert torch.equal(loaded(x), student.eval()(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_constants_in_rows_give_the_same_bits(channels: int) -> None:
    x = torch.rand(2, channels, 6, 5).contiguous(memory_format=torch.channels_last)
    normalise = Normalise([0.4, 0.5, 0.6][:channels], [0.3, 0.2, 0.1][:channels])
    plain, constants = normalise(x), normalise.constants
    normalise.in_rows(5)
    assert torch.equal(normalise(x), plain)
    normalise.in_rows(5)  # again, as where a student is arranged twice
    assert torch.equal(normalise(x), plain)
    assert (normalise.constants, normalise.state_dict()) == (constants, {})


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 7), (4, 5)])
def test_strided_blocks_pad_as_torch_does(height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    plain = F.pad(images, (width % 2, 1, height % 2, 1))
    assert torch.equal(wrn._fitted(images), plain)
    assert torch.autograd.gradcheck(wrn._fitted, images)
    assert torch.autograd.gradgradcheck(wrn._fitted, images)
