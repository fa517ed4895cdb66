"""Our EDM network against outputs of the official implementation (NVlabs/edm, commit 008a4e5) at
the same weights.

The weights are not stored: `weights.fill` makes them from a seed. `edm_golden.npz` holds outputs
only: what the official `EDMPrecond(16, 3, label_dim=10, sigma_data=0.5, model_type="SongUNet",
model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], augment_dim=9,
dropout=0)` gives in eval mode for `inputs()`, with forward hooks on its blocks.

`edm_variants_golden.npz` holds the same for the other kinds of network: "edm-ncsnpp" and
"ve-ncsnpp" are `EDMPrecond` and `VEPrecond` with embedding_type="fourier", encoder_type="residual",
channel_mult_noise=2, resample_filter=[1, 3, 3, 1], and "vp-ddpmpp" is `VPPrecond`; all else is as
above. An `aux_residual` there is what goes into the block after it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dra_ray.config import UNet
from dra_ray.teachers import sampling
from dra_ray.teachers.edm import EDM
from tests.parity.weights import fill

NET = UNet(
    model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), augment_dim=9
)


def inputs() -> dict[str, torch.Tensor]:
    generator = np.random.Generator(np.random.PCG64(7))
    x = generator.standard_normal((4, 3, 16, 16)).astype(np.float32)
    augment = generator.standard_normal((4, 9)).astype(np.float32)
    sigma = torch.tensor([0.003, 0.06, 1.0, 60.0])
    labels = torch.nn.functional.one_hot(torch.tensor([3, 0, 9, 5]), 10).float()
    return {
        "x": torch.from_numpy(x) * (1 + sigma.reshape(-1, 1, 1, 1)),
        "sigma": sigma,
        "labels": labels,
        "augment": torch.from_numpy(augment),
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("edm_golden.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def net() -> EDM:
    net = (
        EDM(NET, resolution=16, channels=3, num_classes=10, sigma_data=0.5)
        .eval()
        .requires_grad_(False)
    )
    fill(net, seed=11)
    return net


def close(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Within 1e-4 of the largest value of each image's output."""
    theirs = torch.from_numpy(theirs)
    scale = theirs.flatten(1).abs().amax(1).reshape(-1, *[1] * (theirs.ndim - 1))
    return bool(((ours - theirs).abs() <= 1e-4 * scale).all())


def test_names_are_the_official_ones(net, golden):
    assert sorted(net.state_dict()) == golden["names"].tolist()


def test_denoised(net, golden):
    given = inputs()
    assert close(net(given["x"], given["sigma"], given["labels"]), golden["conditional"])
    assert close(net(given["x"], given["sigma"]), golden["null"])
    assert close(
        net(given["x"], given["sigma"], given["labels"], given["augment"]), golden["augmented"]
    )
    assert not close(
        net(given["x"], given["sigma"]), golden["conditional"]
    )  # so the bound can fail


def test_features_of_every_layer(net, golden):
    given = inputs()
    for layer in net.model.layers():
        assert close(
            net.features(given["x"], given["sigma"], given["labels"], layer), golden[layer]
        ), layer


def test_sampler(net, golden):
    """8 steps of the official deterministic sampler, in float64, from noise of numpy's
    generator.
    """
    noise = torch.from_numpy(
        np.random.Generator(np.random.PCG64(9)).standard_normal((4, 3, 16, 16))
    )
    levels = sampling.noise_levels(8, 0.002, 80.0, 7.0)
    assert close(sampling.heun(net, noise, inputs()["labels"], levels), golden["sampled"])


@pytest.fixture(scope="module")
def variants() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("edm_variants_golden.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


def variant(name: str) -> EDM:
    precondition, style = name.split("-")
    net = EDM(NET, 16, 3, 10, precondition=precondition, style=style).eval().requires_grad_(False)
    fill(net, seed=11)
    return net


@pytest.mark.parametrize("name", ["edm-ncsnpp", "ve-ncsnpp", "vp-ddpmpp"])
def test_other_networks_denoise(name, variants):
    given = inputs()
    assert close(
        variant(name)(given["x"], given["sigma"], given["labels"]), variants[f"{name}/conditional"]
    )


@pytest.mark.parametrize("name", ["edm-ncsnpp", "vp-ddpmpp"])
def test_other_networks_features(name, variants):
    net, given = variant(name), inputs()
    assert f"{name}/enc.8x8_aux_residual" in variants or name == "vp-ddpmpp"
    for layer in net.model.layers():
        assert close(
            net.features(given["x"], given["sigma"], given["labels"], layer),
            variants[f"{name}/{layer}"],
        ), layer


def test_ncsnpp_names_and_whole_features(variants):
    net, given = variant("edm-ncsnpp"), inputs()
    assert sorted(net.state_dict()) == variants["edm-ncsnpp/names"].tolist()
    whole = net.features(given["x"][1:2], given["sigma"][1:2], given["labels"][1:2], pooled=False)
    assert close(whole, variants["edm-ncsnpp/whole"])
