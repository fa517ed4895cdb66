import dataclasses
import json

import pytest
import torch

from dra_ray.config import Flow, Synthesis, Teacher
from dra_ray.errors import CheckpointError, ConfigError, DataError
from dra_ray.inspection.massive import channel_ratios, find_massive, massive_channels
from dra_ray.storage import Store
from dra_ray.teachers import dit
from dra_ray.teachers.dit import XL_1, DiTSizes, LatentDiT, LightningDiT, Sampling
from dra_ray.teachers.sampling import seeded_noise
from dra_ray.teachers.source import LocalTeacher, Request, noise_of
from dra_ray.teachers.vae import VAE, LatentStats, VAESizes

TINY = DiTSizes(4, 5, 1, 32, 85, depth=4, heads=2, num_classes=10)
PIXELS = DiTSizes(8, 1, 2, 32, 85, depth=2, heads=2, num_classes=10)
VAE_TINY = VAESizes(
    resolution=8,
    width=32,
    width_mult=(1, 1),
    num_blocks=1,
    attn_resolutions=(4,),
    latent_channels=5,
)


def trained(sizes: DiTSizes = TINY, seed: int = 0, **changes) -> LightningDiT:
    """As if trained: a fresh network outputs zeros."""
    torch.manual_seed(seed)
    net = LightningDiT(dataclasses.replace(sizes, **changes)).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return net


def request(
    count: int = 3, sizes: DiTSizes = TINY
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, sizes.channels, sizes.resolution, sizes.resolution, generator=generator)
    labels = torch.nn.functional.one_hot(torch.arange(count) % 10, 10).float()
    return x, torch.linspace(0.1, 2, count), labels


def latent_dit(**changes) -> LatentDiT:
    net = trained()
    vae = VAE(VAE_TINY).eval().requires_grad_(False)
    return LatentDiT(
        net, vae, LatentStats(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)), **changes
    ).eval()


# -- the network -----------------------------------------------------------------------------------
def test_official_sizes_and_names():
    with torch.device("meta"):
        net = LightningDiT(XL_1)
    assert sum(p.numel() for p in net.parameters()) == 674_961_824
    assert net.check_layer(None) == "blocks.14"
    assert net.feature_dim() == 1152
    assert net.noise_shape == (32, 16, 16)
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(shapes) == 351
    assert shapes["x_embedder.proj.weight"] == [1152, 32, 1, 1]
    assert shapes["pos_embed"] == [1, 256, 1152]
    assert shapes["feat_rope.freqs_cos"] == [256, 72]
    assert shapes["t_embedder.mlp.0.weight"] == [1152, 256]
    assert shapes["y_embedder.embedding_table.weight"] == [1001, 1152]
    assert shapes["blocks.27.attn.qkv.weight"] == [3456, 1152]
    assert shapes["blocks.0.mlp.w12.weight"] == [6144, 1152]
    assert shapes["blocks.0.mlp.w3.weight"] == [1152, 3072]
    assert shapes["blocks.0.adaLN_modulation.1.bias"] == [6912]
    assert shapes["final_layer.adaLN_modulation.1.weight"] == [2304, 1152]
    assert shapes["final_layer.linear.weight"] == [32, 1152]
    assert "blocks.0.attn.q_norm.weight" not in shapes


def test_a_fresh_network_is_as_if_absent():
    net = LightningDiT(TINY)
    x, sigma, labels = request()
    assert not net.velocity(x, dit.to_time(sigma), labels).any()
    embedded = net.stream(x, sigma, labels, "blocks.0")
    assert torch.equal(net.stream(x, sigma, labels, "final_layer"), embedded)
    assert torch.allclose(net(x, sigma, labels), x / (1 + sigma.reshape(-1, 1, 1, 1)))


def test_denoising_follows_the_linear_path():
    """clean = x_t + (1-t) * velocity, with x_t = t * (clean + sigma * noise)."""
    net = trained()
    x, sigma, labels = request()
    t = dit.to_time(sigma)
    assert torch.allclose((1 - t) / t, sigma)
    wide = t.reshape(-1, 1, 1, 1)
    assert torch.allclose(
        net(x, sigma, labels), wide * x + (1 - wide) * net.velocity(wide * x, t, labels), atol=1e-6
    )


def test_every_row_has_its_own_time_and_label():
    net = trained()
    x, sigma, labels = request()
    labels[1] = 0
    whole = net.features(x, sigma, labels)
    for row in range(3):
        alone = net.features(
            x[row : row + 1], sigma[row : row + 1], None if row == 1 else labels[row : row + 1]
        )
        assert torch.allclose(whole[row], alone[0], atol=1e-5)
    assert not torch.allclose(whole[0], net.features(x, sigma)[0], atol=1e-3)
    assert not torch.allclose(whole[0], net.features(x, sigma + 0.5, labels)[0], atol=1e-3)


def test_without_classes():
    net = trained(num_classes=0)
    x, sigma, _ = request()
    assert net.features(x, sigma).shape == (3, 32)


# -- features --------------------------------------------------------------------------------------
def test_features_stop_at_their_layer():
    net = trained()
    called = []
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    net.final_layer.register_forward_hook(lambda *_: called.append("final"))
    x, sigma, labels = request()
    assert net.features(x, sigma, labels).shape == (3, 32)
    assert called == [0, 1]
    called.clear()
    net.features(x, sigma, labels, "blocks.0")
    assert called == []


def test_pooled_features_are_the_average_of_the_map():
    net = trained()
    x, sigma, labels = request()
    for layer, width in net.layers().items():
        whole = net.features(x, sigma, labels, layer, pooled=False)
        assert whole.shape == (3, width, 4, 4)
        assert torch.allclose(whole.mean((2, 3)), net.features(x, sigma, labels, layer), atol=1e-6)


def test_a_feature_map_lies_as_the_latents_do():
    """Before the first block, what one latent changes is at its own place."""
    net = trained()
    x, sigma, labels = request(1)
    other = x.clone()
    other[0, :, 1, 2] += 1
    change = net.features(other, sigma, labels, "blocks.0", pooled=False) - net.features(
        x, sigma, labels, "blocks.0", pooled=False
    )
    assert change.abs().amax((0, 1)).nonzero().tolist() == [[1, 2]]


def test_massive_channels_are_zeroed_before_the_norm():
    """In a network whose blocks do nothing, a constant in channel 3 must not reach a feature that
    goes without channel 3.
    """
    x, sigma, labels = request()
    found = {}
    for massive in ((), (3,)):
        for inflated in (0.0, 1000.0):
            torch.manual_seed(0)
            net = (
                LightningDiT(dataclasses.replace(TINY, massive=massive))
                .eval()
                .requires_grad_(False)
            )
            net.x_embedder.proj.bias[3] += inflated
            found[massive, inflated] = (
                net.features(x, sigma, labels, "blocks.2"),
                net.features(x, sigma, labels, "blocks.2.stream"),
            )
    assert torch.equal(found[(3,), 0.0][0], found[(3,), 1000.0][0])
    assert not found[(3,), 1000.0][0][:, 3].any()
    assert not found[(3,), 1000.0][1][:, 3].any()
    others = found[(), 1000.0][0].abs()
    assert (
        others[:, :3].max() < 0.05 < others[:, 3].min()
    )  # what the norm does to the others otherwise
    # the mean square counts the zeroed channel, so the rest is what the plain norm gives for that
    # stream
    stream = net.stream(x, sigma, labels, "blocks.2").index_fill(2, torch.tensor([3]), 0)
    assert torch.allclose(
        found[(3,), 0.0][0],
        (stream / (stream**2).mean(2, keepdim=True).add(1e-6).sqrt()).mean(1),
        atol=1e-5,
    )


def test_unknown_layer_names_the_nearest():
    with pytest.raises(ConfigError, match=r"teacher.layer='blocks.9'.*did you mean 'blocks"):
        trained().check_layer("blocks.9")


def test_noise_levels_and_classes_are_checked():
    for net in (trained(), latent_dit()):
        net.check_sigma(torch.tensor([1e-3, 80.0]))
        for wrong in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match="sigma="):
                net.check_sigma(torch.tensor([wrong]))
        net.check_classes(10)
        with pytest.raises(ConfigError, match="knows 10 classes, but the data has 100"):
            net.check_classes(100)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"patch": 3}, "net.patch=3"),
        ({"heads": 3}, "net.hidden=32"),
        ({"massive": (32,)}, "channel 32"),
        ({"depth": 0}, "net.depth=0"),
    ],
)
def test_sizes_that_do_not_fit(changes, field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(TINY, **changes)


# -- checkpoints -----------------------------------------------------------------------------------
def test_architecture_round_trip():
    net = trained(massive=(1, 7))
    again = LightningDiT.from_architecture(json.loads(json.dumps(net.architecture)))
    assert again.architecture == net.architecture
    again.load_state_dict(net.state_dict())
    x, sigma, labels = request()
    assert torch.equal(again.eval().features(x, sigma, labels), net.features(x, sigma, labels))


@pytest.mark.parametrize(
    "sizes", [TINY, dataclasses.replace(PIXELS, channels=3, heads=4, qk_norm=True)]
)
def test_official_checkpoint(tmp_path, sizes):
    """As the official training writes it; the averaged weights win over the last ones."""
    net, other = trained(sizes), trained(sizes, seed=1)
    file = Store(str(tmp_path)) / "0800000.pt"
    averaged = {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    file.write_torch(
        {
            "model": other.state_dict(),
            "ema": averaged,
            "opt": {"state": {}},
            "config": {"train": {"max_steps": 1}},
        }
    )
    again = LightningDiT.from_official(file.read_torch(), massive=(4,))
    assert again.sizes == dataclasses.replace(sizes, massive=(4,))
    assert all(
        torch.equal(tensor, net.state_dict()[name]) for name, tensor in again.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert dit.official_keys(net.half().state_dict())["pos_embed"].dtype == torch.float32


def test_another_checkpoint_is_refused():
    weights = trained().state_dict()
    with pytest.raises(CheckpointError, match="not a LightningDiT"):
        LightningDiT.from_official({"model.enc.conv": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds no weights"):
        LightningDiT.from_official({"ema": {"a": 1}})
    with pytest.raises(CheckpointError, match=r"missing blocks.2.norm1.weight; unknown extra"):
        LightningDiT.from_official(
            {name: tensor for name, tensor in weights.items() if name != "blocks.2.norm1.weight"}
            | {"extra": torch.ones(1)},
            (),
        )


# -- sampling --------------------------------------------------------------------------------------
def test_grid():
    assert torch.allclose(
        Sampling(times=5, shift=1).grid(), torch.linspace(0, 1, 5, dtype=torch.float64)
    )
    shifted = Sampling().grid()
    assert len(shifted) == 250
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert float(shifted[125]) == pytest.approx(0.3 * (125 / 249) / (1 - 0.7 * 125 / 249))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_constant_velocity_is_followed_exactly(method):
    net = LightningDiT(TINY).eval().requires_grad_(False)
    net.final_layer.linear.bias.copy_(torch.arange(5) / 4)
    noise = seeded_noise([1, 2], net.noise_shape)
    moved = dit.integrate(net, noise, None, Sampling(times=4, method=method))
    assert torch.allclose(moved, noise + (torch.arange(5) / 4).reshape(1, 5, 1, 1))


def test_heun_is_of_higher_order():
    net = trained()
    noise = seeded_noise([1], net.noise_shape)
    exact = dit.integrate(net, noise, None, Sampling(times=33, method="heun"))
    error = {
        method: (dit.integrate(net, noise, None, Sampling(times=9, method=method)) - exact)
        .abs()
        .max()
        for method in ("euler", "heun")
    }
    assert error["heun"] < error["euler"] / 4


def test_guidance():
    net = trained()
    x, _, labels = request()
    t = torch.tensor(0.5)
    conditional, null = (net.velocity(x, t.expand(3), given) for given in (labels, None))
    guided = dit.guided_velocity(net, x, t, labels, Sampling(guidance=4, guided_channels=2))
    assert torch.allclose(guided[:, :2], (null + 4 * (conditional - null))[:, :2], atol=1e-4)
    assert torch.allclose(guided[:, 2:], conditional[:, 2:], atol=1e-5)
    for sampling in (Sampling(guidance=1), Sampling(guided_from=0.6)):
        assert torch.equal(dit.guided_velocity(net, x, t, labels, sampling), conditional)
    assert torch.equal(dit.guided_velocity(net, x, t, None, Sampling()), null)


def test_samples_belong_to_their_seeds():
    net = trained()
    labels = torch.tensor([3, 1, 4])
    whole = dit.sample(net, [5, 6, 7], labels, Sampling(times=5))
    assert whole.dtype == torch.float64
    assert torch.equal(whole, dit.sample(net, [5, 6, 7], labels, Sampling(times=5)))
    assert torch.allclose(
        whole[1:], dit.sample(net, [6, 7], labels[1:], Sampling(times=5)), atol=1e-4
    )
    assert not torch.allclose(
        whole, dit.sample(net, [5, 6, 8], labels, Sampling(times=5)), atol=1e-2
    )


def test_sampling_that_makes_no_sense():
    for changes, field in (
        ({"times": 1}, "sampling.times=1"),
        ({"shift": 0}, "sampling.shift=0"),
        ({"method": "dopri"}, "known: euler, heun"),
    ):
        with pytest.raises(ConfigError, match=field):
            Sampling(**changes)


# -- as a teacher ----------------------------------------------------------------------------------
def test_a_pixel_network_teaches():
    """`LocalTeacher` takes it as it takes EDM."""
    net = trained(PIXELS, massive=(2,))
    source = LocalTeacher(net, Teacher(micro_batch=8))
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels, sigma = torch.arange(12) % 10, torch.linspace(0.1, 1, 12)
    request = Request.seeded(images, labels, sigma, 7)
    whole = source.encode(request)
    assert whole.shape == (12, source.feature_dim)
    assert torch.equal(
        whole[5:], source.encode(Request.seeded(images[5:], labels[5:], sigma[5:], 12))
    )
    noisy = net.clean(images) + sigma.reshape(-1, 1, 1, 1) * noise_of(list(range(7, 19)), (1, 8, 8))
    assert torch.allclose(whole, net.features(noisy, sigma, net.one_hot(labels)), atol=1e-5)
    null = LocalTeacher(net, Teacher(micro_batch=8, label="null", layer="blocks.1.stream")).encode(
        request
    )
    assert torch.allclose(null, net.features(noisy, sigma, None, "blocks.1.stream"), atol=1e-5)


def test_behind_an_autoencoder():
    net = latent_dit()
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    clean = net.clean(images)
    assert clean.shape == (3, *net.noise_shape) == (3, 5, 4, 4)
    raw = clean * torch.linspace(0.5, 2, 5).reshape(1, 5, 1, 1) + torch.linspace(-1, 1, 5).reshape(
        1, 5, 1, 1
    )
    assert torch.allclose(raw, net.vae.encode(images), atol=1e-5)
    assert torch.equal(
        net.decode(clean), net.vae.decode_uint8(clean * net.latent_std + net.latent_mean)
    )
    assert torch.equal(net.clean(clean), clean)  # latents made before
    sigma, labels = torch.ones(3), net.one_hot(torch.arange(3))
    noisy = clean + seeded_noise([1, 2, 3], net.noise_shape).float()
    assert torch.equal(net.features(noisy, sigma, labels), net.dit.features(noisy, sigma, labels))
    assert net.feature_dim() == net.features(noisy, sigma, labels).shape[1]
    assert torch.equal(net(noisy, sigma, labels), net.dit(noisy, sigma, labels))


def test_images_of_another_resolution_are_resized():
    net = latent_dit(resolution=6)
    assert (net.resolution, net.channels) == (6, 3)
    plain = torch.full((2, 3, 6, 6), 51, dtype=torch.uint8)
    assert torch.allclose(
        net.clean(plain),
        latent_dit().clean(torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)),
        atol=1e-4,
    )


def test_images_are_sampled():
    net = latent_dit()
    made = net.sample_images(Synthesis(flow=Flow(times=3)), [5, 6], torch.tensor([3, 1]))
    assert made.dtype == torch.uint8
    assert made.shape == (2, 3, 8, 8)
    assert torch.equal(
        made, net.decode(dit.sample(net.dit, [5, 6], torch.tensor([3, 1]), Sampling(times=3)))
    )


def test_latent_architecture_round_trip():
    net = latent_dit(resolution=6)
    again = LatentDiT.from_architecture(json.loads(json.dumps(net.architecture))).eval()
    assert again.architecture == net.architecture
    again.load_state_dict(net.state_dict())
    images = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(again.clean(images), net.clean(images))


def test_parts_that_do_not_belong_together():
    stats = LatentStats(torch.zeros(5), torch.ones(5))
    with pytest.raises(ConfigError, match=r"makes latents \[5, 4, 4\].*takes \[1, 8, 8\]"):
        LatentDiT(trained(PIXELS), VAE(VAE_TINY), stats)
    with pytest.raises(ConfigError, match="of 3 channels"):
        LatentDiT(trained(), VAE(VAE_TINY), LatentStats(torch.zeros(3), torch.ones(3)))


# -- massive channels ------------------------------------------------------------------------------
def activations(images: int = 12, width: int = 40) -> torch.Tensor:
    return torch.randn(images, 9, width, generator=torch.Generator().manual_seed(5))


def test_massive_channels_are_found():
    given = activations()
    assert massive_channels(given) == ()
    given[:, :, 7] += 60
    given[:, :, 21] -= 900
    assert massive_channels(given) == (21, 7)
    assert massive_channels(given.split(5)) == (21, 7)
    assert massive_channels(given * 1e-6) == (21, 7)  # a ratio has no scale
    assert massive_channels(given, ratio=200) == (21,)


def test_a_channel_must_be_massive_in_most_images():
    given = activations()
    given[:6, :, 7] += 60
    given[:7, :, 8] += 60
    assert massive_channels(given) == (8,)
    assert sorted(massive_channels(given, share=0.4)) == [7, 8]


def test_images_count_alike_however_loud():
    """One image a thousand times louder than the rest must not decide."""
    given = activations()
    given[0, :, 3] *= 1000
    given[0] *= 1000
    assert massive_channels(given) == ()


def test_many_massive_channels_do_not_hide_each_other():
    given = activations()
    given[:, :, :15] += 100
    assert sorted(massive_channels(given)) == list(range(15))


def test_silent_channels():
    assert channel_ratios(torch.zeros(2, 3, 4)).tolist() == [[0.0] * 4] * 2
    given = torch.zeros(2, 3, 4)
    given[:, :, 1] = 1
    assert massive_channels(given) == (1,)


def test_activations_of_another_shape():
    with pytest.raises(DataError, match=r"\[2, 3\]; give \[images, tokens, channels\]"):
        massive_channels(torch.zeros(2, 3))
    with pytest.raises(DataError, match="one or more batches of one layer"):
        massive_channels([torch.ones(1, 2, 3), torch.ones(1, 2, 4)])
    with pytest.raises(DataError, match="one or more batches"):
        massive_channels([])


@pytest.mark.parametrize("behind_an_autoencoder", [False, True])
def test_massive_channels_of_a_network(behind_an_autoencoder):
    net = latent_dit() if behind_an_autoencoder else trained()
    inner = net.dit if behind_an_autoencoder else net
    clean, _, labels = request(10)
    noise = seeded_noise(range(10), inner.noise_shape).float()
    assert find_massive(net, clean, 0.5, noise, labels, batch=4) == ()
    inner.blocks[0].attn.proj.bias[11] = 3000  # written by a block, through its gate
    inner.x_embedder.proj.bias[23] = -400
    assert set(find_massive(net, clean, 0.5, noise, labels, batch=4)) == {11, 23}
    assert find_massive(net, clean, 0.5, noise, layer="blocks.0", batch=4) == (23,)
