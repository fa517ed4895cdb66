import math

import pytest
import torch

from dra_ray.config import UNet
from dra_ray.errors import ConfigError, DataError
from dra_ray.teachers.edm import EDM, PRECONDITIONS, Conv, vp_sigma

OFFICIAL = UNet(
    model_channels=128,
    channel_mult=(2, 2, 2),
    num_blocks=4,
    attn_resolutions=(16,),
    dropout=0.13,
    label_dropout=0,
    augment_dim=9,
)


def tiny(**changes) -> EDM:
    torch.manual_seed(0)
    return EDM(
        UNet(model_channels=16, **changes), resolution=8, channels=1, num_classes=10, sigma_data=0.7
    )


@pytest.mark.parametrize(
    ("num_classes", "parameters"), [(10, 55_735_299), (100, 55_746_819), (0, 55_733_891)]
)
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
    """Without noise the denoiser returns its input; a fresh network (output gain 1e-5) shrinks by
    c_skip.
    """
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
            if name.endswith(
                "conv1.weight"
            ):  # as if trained: a fresh network hardly hears its embedding
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


# -- preconditioning -------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [0.02, 0.06, 1.0, 40.0])
def test_preconditionings_are_the_published_ones(sigma):
    """Table 1 of arXiv 2206.00364, worked out in plain numbers: skip, out, 1 / in, noise level."""
    sd = 0.7
    time = (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9
    wanted = {
        "edm": (
            sd**2 / (sigma**2 + sd**2),
            sigma * sd / math.sqrt(sigma**2 + sd**2),
            math.sqrt(sigma**2 + sd**2),
            math.log(sigma) / 4,
        ),
        "vp": (1, -sigma, math.sqrt(sigma**2 + 1), 999 * time),
        "ve": (1, sigma, 1, math.log(sigma / 2)),
    }
    for name, values in wanted.items():
        found = PRECONDITIONS[name].scaling(torch.tensor(sigma), sd)
        assert [float(value) for value in found] == pytest.approx(values, rel=1e-3, abs=1e-7), name
    assert vp_sigma(time) == pytest.approx(sigma)


@pytest.mark.parametrize(
    ("precondition", "x_of_silence"), [("edm", 1 / (1 + 4 / 0.49)), ("vp", 1.0), ("ve", 1.0)]
)
def test_a_silent_network_leaves_the_skip(precondition, x_of_silence):
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7, precondition=precondition).eval()
    with torch.no_grad():
        net.model.dec["8x8_aux_conv"].weight.zero_()
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(net(x, torch.full((2,), 2.0)), x * x_of_silence)


def test_official_ncsnpp_size():
    with torch.device("meta"):
        net = EDM(OFFICIAL, 32, 3, 10, style="ncsnpp")
    weights = net.state_dict()
    assert weights["model.map_noise.freqs"].shape == (128 // 2 * 2,)
    assert weights["model.map_layer0.weight"].shape == (512, 256)
    assert weights["model.enc.16x16_aux_residual.weight"].shape == (128 * 2, 3, 3, 3)
    assert weights["model.enc.8x8_aux_residual.weight"].shape == (256, 256, 3, 3)
    assert weights["model.dec.16x16_up.conv0.resample_filter"].shape == (1, 1, 4, 4)
    assert "model.dec.32x32_aux_up.resample_filter" not in weights


@pytest.mark.parametrize("style", ["ddpmpp", "ncsnpp"])
def test_a_feature_costs_a_third_of_the_network(style):
    """Convolutions of the published shape at a quarter of its width.

    At full width torch's FLOP counter finds 7.05 of 21.19 GMAC, 7.25 of 21.40 for NCSN++.
    """
    net = EDM(OFFICIAL.model_copy(update={"model_channels": 32}), 32, 3, 10, style=style).eval()
    done = []
    for part in net.modules():
        if isinstance(part, Conv):
            part.register_forward_hook(
                lambda conv, _, out: done.append(conv.weight.numel() * out.shape[2] * out.shape[3])
            )
    counts = {}
    x, sigma, first = torch.zeros(1, 3, 32, 32), torch.ones(1), "enc.32x32_conv"
    for name, call in {
        "all": lambda: net(x, sigma),
        "usual": lambda: net.features(x, sigma),
        "first": lambda: net.features(x, sigma, layer=first),
    }.items():
        done.clear()
        call()
        counts[name] = sum(done)
    assert counts["usual"] / counts["all"] == pytest.approx(1 / 3, abs=0.015)
    assert counts["first"] == 32 * 3 * 9 * 32 * 32


# -- features --------------------------------------------------------------------------------------
def test_whole_features_have_their_average():
    net = tiny().eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])
    for layer, side in (("enc.8x8_block0", 8), (None, 4), ("dec.8x8_block1", 8)):
        whole = net.features(x, sigma, layer=layer, pooled=False)
        assert whole.shape[2:] == (side, side)
        assert torch.equal(whole.mean((2, 3)), net.features(x, sigma, layer=layer))


def test_every_image_has_its_own_sigma():
    net = tiny().eval()
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.5, 5.0])
    together = net.features(x, sigma)
    for i in range(3):
        assert torch.allclose(
            net.features(x[i : i + 1], sigma[i : i + 1]), together[i : i + 1], atol=1e-5
        )


def test_labels_of_other_classes_are_refused():
    net = tiny()
    with pytest.raises(DataError, match=r"labels are \[2, 9\], but the teacher takes 10 classes"):
        net.features(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2, 9))
    net.check_classes(10)
    with pytest.raises(
        ConfigError, match=r"teacher.uri: the teacher knows 10 classes, but the data has 100"
    ):
        net.check_classes(100)
    EDM(UNet(model_channels=16), 8, 1, 0).check_classes(100)


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, [1e-4, 1e4], [0.0, -1.0, math.inf, math.nan]),
        ({"precondition": "vp"}, [0.00101, 152.0], [0.0009, 153.0]),
        ({"precondition": "ve"}, [0.02, 100.0], [0.0199, 100.1]),
        ({"precondition": "ve", "sigma_range": (0.01, 50.0)}, [0.01, 50.0], [0.009, 51.0]),
    ],
)
def test_sigma_outside_of_what_the_teacher_knows(options, good, bad):
    net = EDM(UNet(model_channels=16), 8, 1, 0, **options)
    net.check_sigma(torch.tensor(good))
    net.check_sigma(torch.empty(0))
    for value in bad:
        with pytest.raises(ConfigError, match=r"sigma=.* is outside of what the teacher knows"):
            net.check_sigma(torch.tensor([good[0], value]))


def test_unknown_kinds_name_the_nearest():
    with pytest.raises(ConfigError, match=r"precondition='vpp' .*did you mean 'vp'"):
        EDM(UNet(model_channels=16), 8, 1, 0, precondition="vpp")
    with pytest.raises(ConfigError, match=r"style='ncsn' .*did you mean 'ncsnpp'"):
        EDM(UNet(model_channels=16), 8, 1, 0, style="ncsn")


def test_usual_values_are_left_out_of_the_architecture():
    """So that teachers keep their digests."""
    plain = tiny().architecture
    assert not {"kind", "precondition", "style", "sigma_range"} & plain.keys()
    net = EDM(
        UNet(model_channels=16),
        8,
        1,
        0,
        precondition="ve",
        style="ncsnpp",
        sigma_range=(0.01, 50.0),
    )
    again = EDM.from_architecture(net.architecture)
    assert again.architecture == net.architecture
    assert again.sigma_range == (0.01, 50.0)
    again.load_state_dict(net.state_dict())
