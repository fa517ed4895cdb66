"""Students: sizes and names of the released checkpoints, features, normalisation; projector; weight averaging."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dra_ray import config, data, models, storage
from dra_ray.errors import CheckpointError, ConfigError
from dra_ray.models import averaging, checkpoint
from dra_ray.models.projector import projector
from dra_ray.models.wrn import WideResNet
from dra_ray.storage import Store

CIFAR10 = ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])


@pytest.mark.parametrize(("depth", "width", "millions", "features"), [(28, 10, 36.48, 640), (34, 10, 46.16, 640), (70, 16, 266.80, 1024)])
def test_parameter_counts_are_published(depth: int, width: int, millions: float, features: int) -> None:
    with torch.device("meta"):
        student = WideResNet(depth, width, 10, *CIFAR10)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert student.feature_dim == features


def test_state_dict_names_are_those_of_released_checkpoints() -> None:
    with torch.device("meta"):
        names = WideResNet(28, 10, 10, *CIFAR10).state_dict().keys()
    blocks = [f"layer.{g}.block.{b}." for g in range(3) for b in range(4)]
    norms = [
        f"{n}.{part}" for n in ("batchnorm_0", "batchnorm_1") for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    wanted = {b + n for b in blocks for n in [*norms, "conv_0.weight", "conv_1.weight"]}
    wanted |= {f"layer.{g}.block.0.shortcut.weight" for g in range(3)}
    wanted |= {"init_conv.weight", "logits.weight", "logits.bias"} | {n.replace("batchnorm_0", "batchnorm") for n in norms[:5]}
    assert set(names) == wanted


def test_a_block_is_its_formula() -> None:
    """BN, SiLU, 3x3 (stride 2: right and bottom padding), BN, SiLU, 3x3, plus the 1x1 of the activated input."""
    torch.manual_seed(0)
    student = WideResNet(10, 1, 10, [0.0], [1.0]).eval()
    block = student.layer[1].block[0]
    x = torch.randn(2, 16, 8, 8)
    active = F.silu(block.batchnorm_0(x))
    padded = torch.zeros(2, 16, 9, 9)
    padded[:, :, :8, :8] = active
    hidden = F.silu(block.batchnorm_1(F.conv2d(padded, block.conv_0.weight, stride=2)))
    shortcut = torch.einsum("bchw,oc->bohw", active[:, :, ::2, ::2], block.shortcut.weight[:, :, 0, 0])
    expected = F.conv2d(hidden, block.conv_1.weight, padding=1) + shortcut
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_logits_come_from_the_features_of_normalised_images() -> None:
    torch.manual_seed(0)
    images = data.load(config.Data())
    student = models.build(config.Model(name="wrn-10-1"), images).eval()
    x = data.to_float(images.train.images[:4])
    logits, features = student.with_features(x)
    assert features.shape == (4, student.feature_dim)
    torch.testing.assert_close(logits, student.logits(features))
    torch.testing.assert_close(student(x), logits)
    plain = models.build(config.Model(name="wrn-10-1", normalise=False), images).eval()
    plain.load_state_dict(student.state_dict())
    mean, std = models.normalisation(images.train.images)
    torch.testing.assert_close(plain((x - mean[0]) / std[0]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wrn-28", "wrn-27-10", "resnet", "wrn-4-1"])
def test_an_unknown_student_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name='{name}'"):
        models.build(config.Model(name=name), data.load(config.Data()))


def test_the_projector_has_three_layers() -> None:
    head = projector(640, 256, 2048)
    assert [type(m) for m in head] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert head(torch.zeros(3, 640)).shape == (3, 256)
    assert all((m.bias == 0).all() for m in head if isinstance(m, nn.Linear))
    bound = (6 / (640 + 2048)) ** 0.5
    assert head[0].weight.abs().max() <= bound and head[0].weight.abs().max() > 0.95 * bound


def test_averaging_decay_follows_dm_at() -> None:
    """0 during the warm-up; 0.1 at its end; (1+d)/(10+d) later; 0.995 from d of about 1790."""
    assert averaging.decay(9, 10, 0.995) == 0
    assert averaging.decay(10, 10, 0.995) == pytest.approx(0.1)
    assert averaging.decay(100, 10, 0.995) == pytest.approx(91 / 100)
    assert averaging.decay(10 + 1789, 10, 0.995) < 0.995 <= averaging.decay(10 + 1791, 10, 0.995)


def test_averaging_moves_parameters_only() -> None:
    model, average = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        average.weight.fill_(1.0)
        model.running_mean.fill_(7.0)
    averaging.update(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [0, 0]
    averaging.copy_buffers(average, model)
    assert average.running_mean.tolist() == [7, 7]


def test_a_checkpoint_of_another_architecture_says_which_keys_differ(tmp_path) -> None:
    run = Store(str(tmp_path))
    images = data.load(config.Data())
    experiment = config.Experiment(model=config.Model(name="wrn-10-1"))
    storage.begin_run(run, "train", experiment.model_dump(mode="json"), experiment.digest())
    with pytest.raises(CheckpointError, match="no trained weights yet"):
        checkpoint.load(run)
    checkpoint.save(run, models.build(config.Model(name="wrn-16-1"), images).state_dict())
    with pytest.raises(CheckpointError, match=r"does not fit model.name='wrn-10-1'.*layer"):
        checkpoint.load(run)
    student = models.build(experiment.model, images)
    checkpoint.save(run, student.state_dict())
    loaded, again = checkpoint.load(run)
    assert again == experiment and not loaded.training
    x = data.to_float(images.test.images[:3])
    assert torch.equal(loaded(x), student.eval()(x))
