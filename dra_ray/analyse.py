"""Look at teachers and synthetic sets: `dra teacher probe` and `dra teacher quality`. In this process, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dra_ray import config, data
from dra_ray.analysis import quality
from dra_ray.data import synthetic
from dra_ray.errors import ConfigError
from dra_ray.models import checkpoint as student_checkpoint
from dra_ray.storage import Store, torch_from_bytes
from dra_ray.teachers import checkpoint, massive, probe
from dra_ray.teachers.diffusion import seeded_noise
from dra_ray.teachers.dit import LatentDiT, LightningDiT
from dra_ray.teachers.network import Network
from dra_ray.teachers.vae import VAE, VAESizes, measure_stats

SIGMAS = (0.02, 0.06, 0.14, 0.3)  # around DDAE's best for EDM on CIFAR-10 (arXiv 2303.09769)
Row = dict[str, Any]


# -- probes ----------------------------------------------------------------------------------------------------------
def data_of(card: Mapping[str, Any], settings: Sequence[str]) -> config.Data:
    """The data that a teacher's card names, with `settings` such as "uri=/data/cifar.tar.gz"; `ConfigError` if neither names any."""
    named = card.get("data") or {}
    tree = {field: value for field, value in named.items() if field in config.Data.model_fields and value is not None}
    changes = config.parse_settings(list(settings))
    if "name" not in tree | changes:
        raise ConfigError("the teacher's card does not say what it was trained on; pass --set name=cifar10 and the like")
    if changes.get("name", tree.get("name")) != tree.get("name"):
        tree = {}
    return config.validate(config.Data, tree | changes, "data")


def probe_teacher(
    teacher: Store,
    settings: Sequence[str] = (),
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),
    images: int = 2000,
    label: str = "null",
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
) -> Iterator[Row]:
    """A row per layer and noise level: {"layer", "sigma", "width", "accuracy"}, as it is found.

    A linear probe (`teachers.probe`) on features of `images` training images, tested on as many of the held-out training images
    (the test images are for evaluation alone). `layers` are by default every one that can be a feature. With `label` "true" the
    teacher is given the class, which leaks the answer: a bound on what its label says, no measure of the feature.
    """
    settled = config.validate(config.Teacher, {"label": label}, "probe")
    net = checkpoint.load(teacher)
    found = data.load(data_of(checkpoint.read_card(teacher), settings))
    _check_fits(net, found)
    chosen = [net.check_layer(layer) for layer in layers] or list(net.layers())
    for sigma in sigmas:
        net.check_sigma(torch.tensor([sigma]))
    train, test = _some(found.train, images), _some(found.validation, images)
    for layer in chosen:
        for sigma in sigmas:
            features = [probe.encode(net, settled, part, layer, sigma, seed, threads, device) for part in (train, test)]
            accuracy = probe.probe(features[0], train.labels, features[1], test.labels)
            yield {"layer": layer, "sigma": sigma, "width": net.feature_dim(layer), "accuracy": accuracy}


def _check_fits(net: Network, found: data.Images) -> None:
    net.check_classes(found.num_classes)
    if (net.channels, net.resolution) != (found.channels, found.resolution):
        raise ConfigError(
            f"the teacher sees {net.channels}x{net.resolution}x{net.resolution} images, but '{found.name}' has "
            f"{found.channels}x{found.resolution}x{found.resolution}; pass --set name=... or --set resolution=..."
        )
    if not len(found.validation):
        raise ConfigError("data.validation_images=0, but a probe is tested on held-out images; raise it")


def _some(pictures: data.Pictures, count: int) -> data.Split:
    return data.in_memory(pictures[: min(count, len(pictures))])


# -- quality of a synthetic set --------------------------------------------------------------------------------------
def synthetic_quality(
    store: Store,
    settings: config.Data,
    images: int = 2000,
    steps: int = 400,
    run: Store | None = None,
    seed: int = 0,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What can be said of a synthetic set without networks from elsewhere, on its first `images` images.

    How well it teaches: test accuracy of a small student after `steps` steps on it, beside the same student on as many real
    images. Whether it copies: distances from its images to the nearest training image, beside those of held-out real images.
    What a given student (`run`) makes of its labels.
    """
    found = data.load(settings)
    whole = data.in_memory(found.train)
    made = data.in_memory(synthetic.read(store, images, found))
    real, test = whole[: len(made)], data.in_memory(found.test)
    report: dict[str, Any] = {"images": len(made), "test_images": len(test), "steps": steps}
    for name, part in (("synthetic", made), ("real", real)):
        say(f"training a small student on {len(part):,} {name} images")
        report[f"trained_on_{name}_accuracy"] = quality.taught(part, test, found.shape, steps, seed, device)
    held_out = _some(found.validation, len(made)) if len(found.validation) else test[: len(made)]
    say(f"distances to {len(whole):,} training images")
    report["nearest"] = quality.memorised(made.images, held_out.images, whole.images, device)
    if run:
        judge, _ = student_checkpoint.load(run)
        report["judge_accuracy"] = quality.agreement(judge.to(device), made)
    return report


def quality_rows(report: Mapping[str, Any]) -> list[Row]:
    """`synthetic_quality` as a table."""
    nearest = report["nearest"]
    rows: list[Row] = [
        {"figure": "test accuracy of a student of the synthetic images", "value": f"{report['trained_on_synthetic_accuracy']:.2%}"},
        {"figure": "the same of a student of as many real images", "value": f"{report['trained_on_real_accuracy']:.2%}"},
        {"figure": "median distance to the nearest training image, synthetic", "value": f"{nearest['synthetic_median']:.4f}"},
        {"figure": "the same of held-out real images", "value": f"{nearest['held_out_median']:.4f}"},
        {"figure": "synthetic images nearer than 99 % of the held-out ones", "value": f"{nearest['suspicious_share']:.2%}"},
        {"figure": "copies, to the byte", "value": str(nearest["copies"])},
    ]
    if "judge_accuracy" in report:
        rows.append({"figure": "labels that the given student agrees with", "value": f"{report['judge_accuracy']:.2%}"})
    return rows


def massive_channels(teacher: Store, settings: Sequence[str], sigma: float, layer: str | None, images: int) -> tuple[int, ...]:
    """Massive channels of the stream that enters `layer` of a transformer, on training images; `ConfigError` for other networks."""
    net = checkpoint.load(teacher)
    if not isinstance(net, LightningDiT | LatentDiT):
        raise ConfigError(f"'{teacher}' is of kind '{net.kind}', which has no residual stream of tokens; give a LightningDiT")
    found = data.load(data_of(checkpoint.read_card(teacher), settings))
    _check_fits(net, found)
    clean: Tensor = torch.cat([net.clean(part) for part in _some(found.train, images).images.split(32)])
    noise = seeded_noise(range(len(clean)), net.noise_shape).to(torch.float32)
    return massive.find_massive(net, clean, sigma, noise, None, layer)


# -- latents -----------------------------------------------------------------------------------------------------------
def latent_statistics(
    vae_file: Store, settings: config.Data, images: int, to: Store, device: str = "cpu", sizes: VAESizes | None = None
) -> list[Row]:
    """Measure mean and deviation of a published VAE's latents on the first training images, and write what `import-dit` takes as STATS.

    Returns a row per channel. Raises `ConfigError` unless `to` ends in .safetensors and the images are of the VAE's size,
    `DataError` and `CheckpointError` for a file that is no VAE.
    """
    if not to.name.endswith(".safetensors"):
        raise ConfigError(f"--to {to}: the statistics are written as safetensors; give a file name that ends in .safetensors")
    published = torch_from_bytes(vae_file.read_bytes(), str(vae_file))
    net = VAE.from_official(published, dataclasses.replace(sizes or VAESizes(), decoder=False)).to(device).eval().requires_grad_(False)
    found = data.load(settings)
    if (found.shape.channels, found.shape.resolution) != (3, net.sizes.resolution):
        raise ConfigError(
            f"images are {found.shape.channels}x{found.shape.resolution}x{found.shape.resolution}, but the autoencoder takes "
            f"3x{net.sizes.resolution}x{net.sizes.resolution}; set resolution={net.sizes.resolution}"
        )
    stats = measure_stats(net, (part.to(device) for part in _some(found.train, images).images.split(16)))
    to.write_tensors({"mean": stats.mean, "std": stats.std})
    return [{"channel": index, "mean": float(m), "std": float(s)} for index, (m, s) in enumerate(zip(stats.mean, stats.std, strict=True))]
