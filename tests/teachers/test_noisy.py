import dataclasses
import math

import pytest
import torch

from dra_ray.config import Teacher, UNet
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.noisy import NoisyClassifier, noisy_accuracy, noisy_loss
from dra_ray.teachers.source import LocalTeacher, Request

SMALL = UNet(model_channels=16, attn_resolutions=(4,), augment_dim=9)


def control(**options) -> NoisyClassifier:
    torch.manual_seed(0)
    return NoisyClassifier(SMALL, 8, 1, 10, 0.7, **options).eval()


@pytest.mark.parametrize("layer", ["enc.4x4_block0", "dec.4x4_in1", "dec.8x8_block0"])
def test_it_is_the_encoder_of_an_unconditional_teacher(layer):
    """With the same weights, the same noisy input gives the same feature, at the layer where it was
    cut and before.
    """
    torch.manual_seed(1)
    teacher = EDM(SMALL.model_copy(update={"augment_dim": 0}), 8, 1, 0, 0.7).eval()
    net = control(layer=layer)
    weights = teacher.state_dict()
    own = {name for name in net.state_dict() if name.startswith("model.")}
    assert own < weights.keys()
    net.load_state_dict({name: weights[name] for name in own}, strict=False)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.06, 0.5, 2.0])
    assert net.check_layer(None) == layer
    assert torch.equal(net.features(x, sigma), teacher.features(x, sigma, layer=layer))
    assert torch.equal(
        net.features(x, sigma, layer="enc.8x8_conv"),
        teacher.features(x, sigma, layer="enc.8x8_conv"),
    )
    assert torch.equal(net(x, sigma), net.head(teacher.features(x, sigma, layer=layer)))


def test_every_weight_is_trained():
    """No part is there for nothing: distributed training would wait for its gradient."""
    net = control().train()
    clean, noise = torch.randn(2, 4, 1, 8, 8).unbind(0)
    noisy_loss(net, clean, torch.full((4,), 0.5), noise, torch.arange(4)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_labels_are_never_an_input():
    net = control()
    assert net.num_classes == 0
    assert net.model.map_label is None
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    one_hot = torch.eye(10)[:4]
    assert torch.equal(net.features(x, sigma, one_hot), net.features(x, sigma))


def test_loss_is_cross_entropy_of_the_noisy_image():
    net = control()
    clean, noise = torch.randn(2, 4, 1, 8, 8).unbind(0)
    sigma, labels = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 2, 3, 4])
    loss = noisy_loss(net, clean, sigma, noise, labels)
    noisy = torch.stack([clean[i] + float(sigma[i]) * noise[i] for i in range(4)])
    assert torch.allclose(loss, -net(noisy, sigma).log_softmax(1)[range(4), labels])
    with torch.no_grad():
        net.head.weight.zero_()
    assert torch.allclose(
        noisy_loss(net, clean, sigma, noise, labels, 0.1), torch.full((4,), math.log(10))
    )


def test_it_learns_and_its_accuracy_is_counted():
    """Two classes that differ in brightness, under noise."""
    torch.manual_seed(0)
    net = NoisyClassifier(UNet(model_channels=16, channel_mult=(1,)), 4, 1, 2)
    labels = torch.arange(64) % 2
    clean = (labels.float() - 0.5).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    sigma, noise = torch.full((64,), 0.3), torch.randn(64, 1, 4, 4)
    for _ in range(20):
        loss = noisy_loss(net, clean, sigma, torch.randn(64, 1, 4, 4), labels).mean()
        with torch.no_grad():
            for parameter, slope in zip(
                net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
            ):
                parameter -= 0.1 * slope
    net.eval()
    assert noisy_accuracy(net, clean, sigma, noise, labels, batch=25) == 1.0
    assert noisy_accuracy(net, clean, sigma, noise, 1 - labels) == 0.0


def test_it_serves_as_a_teacher(tmp_path):
    """Saved, loaded, and asked as any teacher is; the labels of the request change nothing."""
    net, store = control(), Store(str(tmp_path / "control"))
    checkpoint.save(store, net, {"images_seen": 5})
    source = LocalTeacher(checkpoint.load(store), Teacher(micro_batch=4))
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    request = Request.seeded(images, torch.arange(6), torch.full((6,), 0.06), 3)
    features = source.encode(request)
    assert features.shape == (6, net.feature_dim()) == (6, 32)
    others = dataclasses.replace(request, labels=torch.zeros(6, dtype=torch.int64))
    assert torch.equal(features, source.encode(others))
    again = checkpoint.load(store, NoisyClassifier)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(again(x, sigma), net(x, sigma))
    assert again.architecture == net.architecture
    assert net.architecture["kind"] == "noisy-classifier"


def test_layers_beyond_the_cut_are_unknown():
    with pytest.raises(ConfigError, match=r"teacher.layer='dec.8x8_up'"):
        control().check_layer("dec.8x8_up")
    with pytest.raises(ConfigError, match=r"did you mean 'dec.4x4_in1'"):
        control(layer="dec.4x4_in2")
