import dataclasses
import io
import json

import pytest
import torch
from PIL import Image

from dra_ray import data
from dra_ray.config import Data
from dra_ray.errors import CheckpointError, ConfigError, DataError, StorageError
from dra_ray.inspection.latents import latent_statistics
from dra_ray.storage import Store
from dra_ray.teachers import vae
from dra_ray.teachers.pixels import to_signed, to_uint8
from dra_ray.teachers.vae import VAE, LatentStats, VAESizes, measure_stats, read_stats

TINY = VAESizes(
    resolution=16,
    width=32,
    width_mult=(1, 1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    latent_channels=4,
)


def tiny(**changes) -> VAE:
    torch.manual_seed(0)
    return VAE(dataclasses.replace(TINY, **changes)).eval().requires_grad_(False)


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


def test_official_size_and_names():
    with torch.device("meta"):
        net = VAE(VAESizes())
    assert (net.sizes.factor, net.sizes.latent_resolution) == (16, 16)
    assert sum(p.numel() for p in net.parameters()) == 69_836_067
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(shapes) == 342
    assert shapes["encoder.conv_out.weight"] == [64, 512, 3, 3]
    assert shapes["encoder.down.4.attn.1.proj_out.weight"] == [512, 512, 1, 1]
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == [256, 128, 1, 1]
    assert shapes["decoder.up.4.attn.2.q.weight"] == [512, 512, 1, 1]
    assert shapes["decoder.up.1.upsample.conv.weight"] == [128, 128, 3, 3]
    assert shapes["quant_conv.weight"] == [64, 64, 1, 1]
    assert shapes["post_quant_conv.weight"] == [32, 32, 1, 1]
    assert not any(
        name.startswith(
            ("encoder.down.4.downsample", "decoder.up.0.upsample", "encoder.down.3.attn")
        )
        for name in shapes
    )


def test_shapes_and_the_posterior():
    net = tiny()
    mean, std = net.posterior(to_signed(images()))
    assert mean.shape == std.shape == (3, 4, 4, 4)
    assert (std > 0).all()
    assert torch.equal(net.encode(images()), mean)
    noise = torch.randn(3, 4, 4, 4)
    assert torch.allclose(net.encode(images(), noise), mean + std * noise)
    assert net.decode(mean).shape == (3, 3, 16, 16)
    assert torch.equal(net.decode_uint8(mean), to_uint8(net.decode(mean)))


def test_the_log_variance_is_limited():
    net = tiny()
    net.quant_conv.bias[4:] = torch.tensor([-200.0, -100.0, 100.0, 200.0])
    _, std = net.posterior(to_signed(images()))
    assert std[:, :2].max() == pytest.approx(3.06e-7, rel=1e-2)
    assert std[:, 2:].min() == pytest.approx(22026.5, rel=1e-4)


def test_each_image_alone():
    net = tiny()
    whole = net.encode(images())
    assert torch.allclose(whole[1:2], net.encode(images()[1:2]), atol=1e-5)


def test_without_decoder():
    whole, net = tiny(), tiny(decoder=False)
    with pytest.raises(ConfigError, match="vae.decoder=False"):
        net.decode(torch.zeros(1, 4, 4, 4))
    again = VAE.from_official(whole.state_dict(), net.sizes)
    assert torch.equal(again.encode(images()), whole.encode(images()))
    assert {
        name for name in whole.state_dict() if not name.startswith(("decoder.", "post_quant_conv."))
    } == set(net.state_dict())


def test_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match="vae.resolution=18"):
        dataclasses.replace(TINY, resolution=18)
    with pytest.raises(ConfigError, match="vae.width=48"):
        dataclasses.replace(TINY, width=48)


def test_architecture_round_trip():
    net = tiny()
    again = VAE.from_architecture(json.loads(json.dumps(net.architecture)))
    assert again.sizes == net.sizes
    assert again.architecture == net.architecture


def test_official_checkpoint(tmp_path):
    """A training checkpoint holds more than the autoencoder, under `state_dict`."""
    net = tiny()
    more = {
        "loss.logvar": torch.ones(()),
        "foundation_model.model.cls_token": torch.ones(1),
        "linear_proj.weight": torch.ones(1),
    }
    file = Store(str(tmp_path)) / "vavae.pt"
    file.write_torch({"state_dict": dict(net.state_dict()) | more, "global_step": 3})
    again = VAE.from_official(file.read_torch(), TINY)
    assert torch.equal(again.encode(images()), net.encode(images()))
    with pytest.raises(CheckpointError, match=r"not of this VA-VAE: decoder.*; and \d+ more"):
        VAE.from_official(file.read_torch(), dataclasses.replace(TINY, width=64))
    with pytest.raises(CheckpointError, match="missing decoder"):
        VAE.from_official(
            {
                name: tensor
                for name, tensor in net.state_dict().items()
                if not name.startswith("decoder")
            },
            TINY,
        )
    with pytest.raises(CheckpointError, match="is a list"):
        vae.official_keys([torch.ones(1)])


def test_statistics_are_those_of_samples():
    net = tiny()
    net.quant_conv.bias[4:] += 1  # so that the posterior's own spread counts
    given = images(8)
    stats = measure_stats(net, given.split(3))
    generator = torch.Generator().manual_seed(2)
    samples = torch.cat(
        [net.encode(given, torch.randn(8, 4, 4, 4, generator=generator)) for _ in range(16)]
    )
    assert torch.allclose(stats.mean, samples.mean(dim=(0, 2, 3)), atol=0.1)
    assert torch.allclose(stats.std, samples.std(dim=(0, 2, 3)), rtol=0.05)
    with pytest.raises(DataError, match="no images"):
        measure_stats(net, [])


def test_statistics_are_read(tmp_path):
    folder = Store(str(tmp_path))
    mean, std = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.1
    (folder / "latents_stats.pt").write_torch({"mean": mean, "std": std})
    (folder / "stats.safetensors").write_tensors({"mean": mean.flatten(), "std": std.flatten()})
    for name in ("latents_stats.pt", "stats.safetensors"):
        stats = read_stats(folder / name)
        assert torch.equal(stats.mean, mean.flatten())
        assert torch.equal(stats.std, std.flatten())
    (folder / "other.pt").write_torch({"mean": mean})
    with pytest.raises(DataError, match=r"other.pt' lacks the tensors 'mean' and 'std'"):
        read_stats(folder / "other.pt")
    with pytest.raises(StorageError, match="does not exist"):
        read_stats(folder / "nowhere.pt")
    with pytest.raises(DataError, match="above 0"):
        LatentStats(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(DataError, match=r"\[2\] and \[3\]"):
        LatentStats(torch.zeros(2), torch.ones(3))


def test_the_command_measures_what_an_import_takes(tmp_path):
    """On a folder of pictures: the same statistics as over its images by hand, read back from the
    file.
    """
    folder = Store(str(tmp_path))
    net = tiny()
    (folder / "vae.pt").write_torch({"state_dict": net.state_dict()})
    given = images(12)
    for split in ("train", "val"):
        for index, image in enumerate(given):
            picture = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture, "PNG")
            (folder / "pictures" / split / f"class-{index % 2}" / f"{index}.png").write_bytes(
                picture.getvalue()
            )
    settings = Data(
        name="folder", uri=(folder / "pictures").uri, resolution=16, validation_images=0
    )
    rows = latent_statistics(
        folder / "vae.pt", settings, 100, folder / "stats.safetensors", sizes=TINY
    )
    seen = data.in_memory(data.load(settings).train).images  # as the data set cuts and scales them
    by_hand, written = measure_stats(net, [seen]), read_stats(folder / "stats.safetensors")
    assert len(seen) == 12
    assert torch.allclose(written.mean, by_hand.mean, atol=1e-5)
    assert torch.allclose(written.std, by_hand.std, rtol=1e-4)
    assert [row["channel"] for row in rows] == [0, 1, 2, 3]
    with pytest.raises(
        ConfigError, match="images are 3x8x8, but the autoencoder takes 3x16x16; set resolution=16"
    ):
        latent_statistics(
            folder / "vae.pt",
            settings.model_copy(update={"resolution": 8}),
            100,
            folder / "stats.safetensors",
            sizes=TINY,
        )
    with pytest.raises(ConfigError, match="ends in .safetensors"):
        latent_statistics(folder / "vae.pt", settings, 100, folder / "stats.pt", sizes=TINY)
