"""The published LightningDiT and VA-VAE (arXiv 2501.01423) as one teacher's folder, read
weights-only: nothing of theirs is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dra_ray.errors import ConfigError
from dra_ray.storage import Store, sha256, torch_from_bytes
from dra_ray.teachers import checkpoint
from dra_ray.teachers.dit import XL_1, LatentDiT, LightningDiT
from dra_ray.teachers.vae import VAE, VAESizes, read_stats

LICENCE = (
    "LightningDiT's code is MIT-licensed; check the terms under which you were given its weights"
)


def import_dit(
    dit: Store,
    vae: Store,
    stats: Store,
    to: Store,
    *,
    massive: Sequence[int] = XL_1.massive,
    resolution: int | None = None,
    decoder: bool = False,
    sizes: VAESizes | None = None,
) -> dict[str, Any]:
    """Write the teacher `to` and return its card.

    `dit` and `vae` are torch files as published, `stats` the latents_stats.pt; `massive` are the
    transformer's massive channels, `resolution` is that of the images if it is not the
    autoencoder's; `decoder` keeps what only sampling needs; `sizes` are the autoencoder's, by
    default VA-VAE's. Raises `DataError` for files that cannot be read weights-only,
    `CheckpointError` for those of another network, `ConfigError` if the parts do not fit together
    or `to` holds another teacher.
    """
    transformer, dit_sha256 = _read(dit)
    autoencoder, vae_sha256 = _read(vae)
    hashes = {
        "dit": (dit, dit_sha256),
        "vae": (vae, vae_sha256),
        "stats": (stats, sha256(stats.read_bytes())),
    }
    source = {
        name: {"file": file.name, "sha256": digest} for name, (file, digest) in hashes.items()
    }
    _check_free(to, source)
    encoder = VAE.from_official(
        autoencoder, dataclasses.replace(sizes or VAESizes(), decoder=decoder)
    )
    net = LatentDiT(
        LightningDiT.from_official(transformer, massive), encoder, read_stats(stats), resolution
    )
    checkpoint.save(
        to,
        net,
        {
            "source": source,
            "licence": LICENCE,
            "data": {"name": "imagenet", "resolution": net.resolution},
        },
    )
    return checkpoint.read_card(to)


def _read(file: Store) -> tuple[Any, str]:
    data = file.read_bytes()
    return torch_from_bytes(data, str(file)), sha256(data)


def _check_free(to: Store, source: dict[str, Any]) -> None:
    """A folder may hold nothing, or what an earlier import of the same files left."""
    if (to / checkpoint.CARD).exists() and checkpoint.read_card(to).get("source") != source:
        raise ConfigError(f"'{to}' holds another teacher; choose a new folder for this one")
