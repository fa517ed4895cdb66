"""Every kind of teacher behind the same doors: checkpoint, LocalTeacher, plan."""

import torch

from dra_ray import plan
from dra_ray.config import Teacher
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, fitting
from dra_ray.teachers.dit import LatentDiT, LightningDiT
from dra_ray.teachers.source import LocalTeacher, Request, noise_of
from tests.teachers.test_dit import TINY, latent_dit


def test_images_through_the_autoencoder(tmp_path):
    store = Store(str(tmp_path))
    checkpoint.save(store, latent_dit(resolution=6), {})
    net = checkpoint.load(store, LatentDiT)
    source = LocalTeacher(net, Teacher(micro_batch=8))
    images = torch.randint(0, 256, (12, 3, 6, 6), dtype=torch.uint8)
    labels, sigma = torch.arange(12) % 10, torch.linspace(0.1, 1, 12)
    request = Request.seeded(images, labels, sigma, 7)
    whole = source.encode(request)
    assert torch.equal(
        whole[5:], source.encode(Request.seeded(images[5:], labels[5:], sigma[5:], 12))
    )
    noisy = net.clean(images) + sigma.reshape(-1, 1, 1, 1) * noise_of(list(range(7, 19)), (5, 4, 4))
    assert torch.allclose(whole, net.features(noisy, sigma, net.one_hot(labels)), atol=1e-5)


def test_the_plan_counts_the_autoencoder(tmp_path):
    store = Store(str(tmp_path))
    checkpoint.save(store, latent_dit(resolution=6), {})
    net = fitting.known(store.uri).net
    assert net is not None
    assert next(net.parameters()).is_meta
    with torch.device("meta"):
        transformer = LightningDiT(TINY)
    behind, alone = plan.feature_macs(net, "blocks.2"), plan.feature_macs(transformer, "blocks.2")
    encoder = plan.macs(
        lambda: net.clean(torch.empty(1, 3, 6, 6, dtype=torch.uint8, device="meta"))
    )
    assert encoder > 0
    assert behind - alone > 0.9 * encoder
