import pytest
import torch

from dra_ray.config import UNet
from dra_ray.errors import ConfigError
from dra_ray.teachers.edm import EDM

OFFICIAL = UNet(model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.13, label_dropout=0, augment_dim=9)


def tiny(**changes) -> EDM:
    torch.manual_seed(0)
    return EDM(UNet(model_channels=16, **changes), resolution=8, channels=1, num_classes=10, sigma_data=0.7)


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 55_735_299), (100, 55_746_819), (0, 55_733_891)])
def test_official_sizes(num_classes, parameters):
    with torch.device("meta"):
        net = EDM(OFFICIAL, 32, 3, num_classes)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == (427 if num_classes else 425)
    assert net.check_layer(None) == "dec.8x8_in1"
    assert net.feature_dim() == 256
    assert net.model.layers()["dec.16x16_block1"] == 256


def test_official_names():
    with torch.device("meta"):
        names = EDM(OFFICIAL, 32, 3, 10).state_dict()
    assert names["model.map_label.weight"].shape == (128, 10)
    assert names["model.map_augment.weight"].shape == (128, 9)
    assert names["model.enc.16x16_block0.qkv.weight"].shape == (768, 256, 1, 1)
    assert names["model.dec.32x32_block4.skip.weight"].shape == (256, 384, 1, 1)
    assert names["model.enc.16x16_down.skip.resample_filter"].shape == (1, 1, 2, 2)
    assert "model.dec.32x32_block4.qkv.weight" not in names


def test_preconditioning_limits():
    """Without noise the denoiser returns its input; a fresh network (output gain 1e-5) shrinks by c_skip."""
    net = tiny().eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(net(x, torch.full((3,), 1e-6)), x, atol=1e-5)
    sigma = torch.full((3,), 2.0)
    assert torch.allclose(net(x, sigma), x * 0.49 / (4 + 0.49), atol=1e-3)


def test_features_stop_at_their_layer():
    net = tiny().eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.full((2,), 0.1)
    called = []
    for name, part in net.model.dec.items():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    assert net.features(x, sigma).shape == (2, net.feature_dim()) == (2, 32)
    assert called == ["4x4_in0", "4x4_in1"]
    called.clear()
    net.features(x, sigma, layer="enc.4x4_block0")
    assert called == []


def test_every_layer_gives_its_width():
    net = tiny(attn_resolutions=(4,)).eval()
    for layer, width in net.model.layers().items():
        assert net.features(torch.randn(2, 1, 8, 8), torch.ones(2), layer=layer).shape == (2, width)


def test_labels_matter_and_none_means_zeros():
    net = tiny().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("conv1.weight"):  # as if trained: a fresh network hardly hears its embedding
                parameter.normal_(std=0.1)
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    null = net.features(x, sigma)
    assert torch.allclose(null, net.features(x, sigma, torch.zeros(4, 10)), atol=1e-6)
    assert not torch.allclose(null, net.features(x, sigma, net.one_hot(torch.arange(4))), atol=1e-3)


def test_unknown_layer_names_the_nearest():
    with pytest.raises(ConfigError, match=r"teacher.layer='dec.4x4_in2'.*did you mean 'dec.4x4_in"):
        tiny().check_layer("dec.4x4_in2")


def test_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"net\.model_channels"):
        EDM(UNet(model_channels=48, channel_mult=(1, 2)), 32, 3, 10)
    with pytest.raises(ConfigError, match=r"net\.channel_mult"):
        EDM(UNet(channel_mult=(1, 1, 1, 1, 1)), 8, 1, 10)


def test_architecture_round_trip():
    net = tiny(augment_dim=9)
    again = EDM.from_architecture(net.architecture)
    assert again.architecture == net.architecture
    again.load_state_dict(net.state_dict())
