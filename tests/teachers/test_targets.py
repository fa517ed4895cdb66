"""Target transforms, against numpy; their statistics, a pure function, the same from the pool."""

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.config import Align, Teacher, UNet
from dra_ray.errors import ConfigError
from dra_ray.pool.rows import Encoder
from dra_ray.teachers import targets
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Ready, Request


def features(count: int = 300) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=draws) * torch.linspace(2, 0.1, 8)
    return torch.randn(count, 8, generator=draws) @ mixing.T + 3


def fitted(name: str, rows: torch.Tensor, whiten_dim: int = 3) -> torch.Tensor:
    align = Align(transform=name, whiten_dim=whiten_dim)  # type: ignore[arg-type]
    made = targets.transform(align, rows.shape[1])
    assert isinstance(made, targets.Transform)
    return made.fit(targets.Statistics.of(rows))(rows)


def test_centring_and_standardising_are_numpys() -> None:
    rows = features()
    x = rows.double().numpy()
    centred = x - x.mean(0)
    assert np.allclose(fitted("centre", rows).numpy(), centred, atol=1e-5)
    assert np.allclose(fitted("standardise", rows).numpy(), centred / x.std(0), atol=1e-5)


def test_whitening_is_pca_with_equal_variances() -> None:
    rows = features()
    white = fitted("whiten", rows).double().numpy()
    assert white.shape == (300, 3)
    assert np.allclose(np.cov(white.T, bias=True), np.eye(3), atol=1e-4)
    x = rows.double().numpy()
    left, _, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    ours = np.abs(left[:, :3].T @ white) / np.sqrt(300)
    assert np.allclose(ours, np.eye(3), atol=1e-4), "the directions of largest variance, in order"


def test_a_feature_that_never_changes_says_nothing() -> None:
    rows = torch.cat([features(), torch.full((300, 1), 5.0)], 1)
    assert bool((fitted("standardise", rows)[:, -1] == 0).all())
    assert fitted("whiten", rows, 8).isfinite().all()
    with pytest.raises(ConfigError, match=r"align.whiten_dim=9, but .* along 8 directions only"):
        fitted("whiten", rows, 9)
    with pytest.raises(ConfigError, match="align.whiten_dim=10 is above the feature's width 9"):
        fitted("whiten", rows, 10)


def test_tokens_are_transformed_one_by_one() -> None:
    rows = features()
    made = targets.transform(Align(transform="whiten", whiten_dim=3), 8)
    assert isinstance(made, targets.Transform)
    made.fit(targets.Statistics.of(rows))
    assert torch.allclose(made(rows.reshape(30, 10, 8)), made(rows).reshape(30, 10, 3), atol=1e-6)


class FromEncoder:
    """A replica's encoder as a source, without Ray."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self.encoder, self.feature_dim = Encoder(teacher), teacher.feature_dim

    def submit(self, request: Request) -> Ready:
        return Ready(self.encoder.submit("trial", request).result().features)

    def close(self) -> None:
        self.encoder.close()


def test_statistics_are_a_pure_function_and_those_of_the_pool_to_the_bit() -> None:
    images = data.load(config.Data()).train
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10)
    local = LocalTeacher(net, Teacher(micro_batch=32))
    request = targets.request(images, 0.3, 100, seed=5)
    again = targets.request(images, 0.3, 100, seed=5)
    assert request.digest() == again.digest()
    assert request.digest() != targets.request(images, 0.3, 100, seed=6).digest()
    assert len(request) == 100
    assert len(targets.request(images, None, 10**6, seed=5)) == len(images)
    drawn = targets.request(images, None, 100, seed=5).sigma
    assert len(drawn.unique()) == 100
    pool = FromEncoder(local)
    ours, theirs = (targets.measured(source, request) for source in (local, pool))
    pool.close()
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.covariance, theirs.covariance)
    align = Align(transform="whiten", whiten_dim=4)
    one, two = targets.Transform(align, 32).fit(ours), targets.Transform(align, 32).fit(theirs)
    assert torch.equal(one.factor, two.factor)
