"""A head on a frozen teacher is a classifier like any other: its logits by hand, PGD as of any
student, and randomness that only averaged gradients see through.
"""

from __future__ import annotations

import pytest
import torch

from dra_ray import config, data
from dra_ray.attacks import checks
from dra_ray.attacks.pgd import evaluate_pgd, noise_like
from dra_ray.attacks.randomised import eot_pgd
from dra_ray.data.random import Stream, generator
from dra_ray.errors import ConfigError, DataError
from dra_ray.inspection import frozen
from dra_ray.inspection.probe import fitted, probe
from dra_ray.teachers.edm import EDM
from tests.teachers.test_dit import latent_dit

THREAT = config.Threat(eps_255=8.0)


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.load(config.Data())


@pytest.fixture(scope="module")
def net() -> EDM:
    torch.manual_seed(0)
    return EDM(config.UNet(model_channels=16), 8, 1, 10, 0.7)


@pytest.fixture(scope="module")
def test_set(images: data.Images) -> tuple[torch.Tensor, torch.Tensor]:
    part = data.in_memory(images.test[:60])
    return data.to_float(part.images), part.labels


def test_its_logits_are_the_heads_of_the_same_noise(net, images, test_set) -> None:
    train, (x, y) = data.in_memory(images.train[:300]), test_set
    student = frozen.train(net, train, 0.2, "dec.4x4_in1")
    noise = student.noise
    assert noise is not None

    def features(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            noisy = rows + 0.2 * noise
            return net.features(noisy, torch.full((len(rows),), 0.2), None, "dec.4x4_in1")

    ours, theirs = features(net.clean(train.images)), features(2 * x - 1)
    head = fitted(ours, train.labels)
    by_hand = (theirs - head.mean) / head.scale @ head.weight.T + head.bias
    assert torch.allclose(student(x), by_hand, atol=1e-3)
    accuracy = float((student(x).argmax(1) == y).double().mean())
    assert accuracy == pytest.approx(probe(ours, train.labels, theirs, y), abs=1 / 60 + 1e-9)
    assert accuracy > 0.3
    assert torch.equal(student(x), student(x))
    assert not checks.is_randomised(student, x, y)
    again = frozen.train(net, train, 0.2, "dec.4x4_in1", seed=1)
    assert not torch.equal(again(x), student(x))


def test_accuracy_by_radius_is_that_of_pgd(net, images, test_set) -> None:
    student = frozen.train(net, data.in_memory(images.train[:300]), 0.2)
    x, y = test_set
    found = frozen.by_radius(student, x, y, THREAT, (0.0, 1.0, 8.0), steps=5)
    assert found[0] == pytest.approx(float((student(x).argmax(1) == y).double().mean()))
    noise = noise_like(x.shape, THREAT, generator(0, Stream.ANALYSIS, 2))
    withstood = evaluate_pgd(student, x, y, THREAT, noise, 5)
    assert found[2] == pytest.approx(float(withstood.double().mean()))
    assert found[0] >= found[1] >= found[2]
    assert found[0] > found[2]


def test_fresh_noise_is_randomised_and_attacked_by_averaged_gradients(
    net, images, test_set
) -> None:
    student = frozen.train(net, data.in_memory(images.train[:300]), 0.5, fresh=True)
    x, y = test_set
    assert student.noise is None
    assert checks.is_randomised(student, x, y)
    noise = noise_like(x.shape, THREAT, generator(0, Stream.ANALYSIS, 2))
    torch.manual_seed(0)
    found = frozen.by_radius(student, x, y, THREAT, (8.0,), steps=5, eot=3)
    torch.manual_seed(0)
    score = eot_pgd(
        student, x, y, THREAT.model_copy(update={"step_255": 2.0}), noise[None], 5, eot=3
    )
    assert found == [pytest.approx(float(score.mean.mean()))]


def test_what_cannot_be_attacked_or_fitted_is_refused(images) -> None:
    latents = latent_dit()
    with pytest.raises(ConfigError, match="sees latents"):
        frozen.train(latents, data.in_memory(images.train[:30]), 0.2)
    features, labels = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(DataError, match="each class from 0 on, at least three"):
        fitted(features, labels)
    with pytest.raises(DataError, match="each class from 0 on"):
        fitted(features, torch.arange(20) % 3 + 1)
