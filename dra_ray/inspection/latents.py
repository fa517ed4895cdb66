"""Statistics of an autoencoder's latents on the user's images: `dra teacher latents`."""

from __future__ import annotations

import dataclasses

from dra_ray import config, data
from dra_ray.errors import ConfigError
from dra_ray.inspection.probe import Row, first_images
from dra_ray.storage import Store, torch_from_bytes
from dra_ray.teachers.vae import VAE, VAESizes, measure_stats


# -- latents ---------------------------------------------------------------------------------------
def latent_statistics(
    vae_file: Store,
    settings: config.Data,
    images: int,
    to: Store,
    device: str = "cpu",
    sizes: VAESizes | None = None,
) -> list[Row]:
    """Measure mean and deviation of a published VAE's latents on the first training images, and
    write what `import-dit` takes as STATS.

    Returns a row per channel. Raises `ConfigError` unless `to` ends in .safetensors and the images
    are of the VAE's size, `DataError` and `CheckpointError` for a file that is no VAE.
    """
    if not to.name.endswith(".safetensors"):
        raise ConfigError(
            f"--to {to}: the statistics are written as safetensors; give a file name that ends in "
            ".safetensors"
        )
    published = torch_from_bytes(vae_file.read_bytes(), str(vae_file))
    net = (
        VAE.from_official(published, dataclasses.replace(sizes or VAESizes(), decoder=False))
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    found = data.load(settings)
    if (found.shape.channels, found.shape.resolution) != (3, net.sizes.resolution):
        raise ConfigError(
            f"images are {found.shape.channels}x{found.shape.resolution}x{found.shape.resolution}, "
            "but the autoencoder takes "
            f"3x{net.sizes.resolution}x{net.sizes.resolution}; set "
            f"resolution={net.sizes.resolution}"
        )
    stats = measure_stats(
        net, (part.to(device) for part in first_images(found.train, images).images.split(16))
    )
    to.write_tensors({"mean": stats.mean, "std": stats.std})
    return [
        {"channel": index, "mean": float(m), "std": float(s)}
        for index, (m, s) in enumerate(zip(stats.mean, stats.std, strict=True))
    ]
