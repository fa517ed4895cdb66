"""Our LightningDiT and VA-VAE against outputs of the official implementations (hustvl/LightningDiT,
commit 2725fed) at the same weights.

The weights are not stored: `weights.fill` makes them from a seed. `dit_golden.npz` holds outputs
only, in eval mode for the inputs made here:
- of `LightningDiT(input_size=SIZES[name].resolution, ..., use_swiglu, use_rope, use_rmsnorm=True)`,
  its blocks' inputs caught by hooks, their channels of `MASSIVE` zeroed, then through the block's
  own norm1 and the shift and scale of its adaLN_modulation, token mean;
- of its `forward_with_cfg` under the official Euler `ode` with 9 times, shift 0.3, scale 6.7,
  interval from 0.125;
- of `AutoencoderKL` with `Encoder(**VAE)` and `Decoder(**VAE)` of tokenizer/autoencoder.py.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dra_ray.teachers.dit import DiTSizes, LightningDiT, Sampling, integrate
from dra_ray.teachers.vae import VAE, VAESizes
from tests.parity.weights import fill

MASSIVE = (5, 17)
SIZES = {
    "patch1": DiTSizes(4, 6, 1, 32, 85, depth=3, heads=2, num_classes=5, massive=MASSIVE),
    "patch2": DiTSizes(
        8, 4, 2, 48, 128, depth=2, heads=3, num_classes=3, qk_norm=True, massive=MASSIVE
    ),
}
VAE_SIZES = VAESizes(
    resolution=16,
    width=32,
    width_mult=(1, 2, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    latent_channels=4,
)


def inputs(sizes: DiTSizes) -> dict[str, torch.Tensor]:
    """Three noisy latents at times from pure noise to clean, and labels of which the last is the
    null class.
    """
    generator = np.random.Generator(np.random.PCG64(7))
    x = generator.standard_normal((3, sizes.channels, sizes.resolution, sizes.resolution)).astype(
        np.float32
    )
    return {
        "x": torch.from_numpy(x),
        "t": torch.tensor([0.0, 0.75, 1.0]),
        "labels": torch.tensor([2, 0, sizes.num_classes]),
    }


def vae_inputs() -> dict[str, torch.Tensor]:
    generator = np.random.Generator(np.random.PCG64(8))
    images = generator.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    return {
        "images": torch.from_numpy(images),
        "latents": torch.from_numpy(generator.standard_normal((2, 4, 4, 4)).astype(np.float32)),
    }


def one_hot(labels: torch.Tensor, sizes: DiTSizes) -> torch.Tensor:
    """Our form of labels: the null class is a row of zeros."""
    return torch.nn.functional.one_hot(labels, sizes.num_classes + 1)[:, :-1].float()


def close(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Within 1e-4 of the largest value of each image's output."""
    wanted = torch.from_numpy(theirs)
    scale = wanted.flatten(1).abs().amax(1).reshape(-1, *[1] * (wanted.ndim - 1))
    return ours.shape == wanted.shape and bool(((ours - wanted).abs() <= 1e-4 * scale).all())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("dit_golden.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=SIZES)
def case(request) -> tuple[str, LightningDiT]:
    net = LightningDiT(SIZES[request.param]).eval().requires_grad_(False)
    fill(net, seed=11)
    return request.param, net


def test_names_and_fixed_positions(case, golden):
    name, net = case
    assert sorted(net.state_dict()) == golden[f"{name}.names"].tolist()
    for fixed in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        assert np.allclose(net.state_dict()[fixed].numpy(), golden[f"{name}.{fixed}"], atol=1e-6), (
            fixed
        )


def test_velocity(case, golden):
    name, net = case
    given = inputs(net.sizes)
    labels = one_hot(given["labels"], net.sizes)
    assert close(net.velocity(given["x"], given["t"], labels), golden[f"{name}.velocity"])
    assert not close(
        net.velocity(given["x"], given["t"]), golden[f"{name}.velocity"]
    )  # so the bound can fail
    last = slice(2, 3)
    assert close(net.velocity(given["x"][last], given["t"][last]), golden[f"{name}.velocity"][last])


def test_features_of_every_layer(case, golden):
    name, net = case
    given = inputs(net.sizes)
    rows = slice(1, 3)  # t = 0 has no finite sigma
    t = given["t"][rows]
    noisy = given["x"][rows] / t.reshape(-1, 1, 1, 1)
    labels = one_hot(given["labels"], net.sizes)[rows]
    for layer in net.layers():
        found = net.features(noisy, (1 - t) / t, labels, layer)
        assert close(found, golden[f"{name}.{layer}"]), layer
    kept = LightningDiT(dataclasses.replace(SIZES[name], massive=()))
    kept.load_state_dict(net.state_dict())
    assert not close(
        kept.features(noisy, (1 - t) / t, labels, "blocks.1"), golden[f"{name}.blocks.1"]
    )


def test_guided_sampler(case, golden):
    name, net = case
    given = inputs(net.sizes)
    labels = one_hot(torch.tensor([2, 0, 1]), net.sizes)
    sampling = Sampling(times=9)
    assert np.allclose(sampling.grid().numpy(), golden[f"{name}.times"], atol=1e-6)
    assert close(integrate(net, given["x"], labels, sampling), golden[f"{name}.sampled"])


def test_autoencoder(golden):
    net = VAE(VAE_SIZES).eval().requires_grad_(False)
    assert sorted(net.state_dict()) == golden["vae.names"].tolist()
    fill(net, seed=12)
    given = vae_inputs()
    mean, std = net.posterior(given["images"] / 127.5 - 1)
    assert close(mean, golden["vae.mean"])
    assert close(std, golden["vae.std"])
    assert torch.equal(net.encode(given["images"]), mean)
    assert close(net.decode(given["latents"]), golden["vae.decoded"])
    theirs = torch.from_numpy(golden["vae.uint8"]).int()
    assert (net.decode_uint8(given["latents"]).int() - theirs).abs().max() <= 1
