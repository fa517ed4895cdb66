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


def test_statistics_of_parts_are_those_of_the_whole_and_positions_count_as_rows() -> None:
    rows = features()
    whole, parts = targets.Statistics.of(rows), targets.Statistics.of(*rows.split(70))
    assert torch.allclose(whole.mean, parts.mean, atol=1e-12)
    assert torch.allclose(whole.covariance, parts.covariance, atol=1e-10)
    assert np.allclose(whole.covariance.numpy(), np.cov(rows.double().numpy().T, bias=True))
    tokens = targets.Statistics.of(rows.reshape(30, 10, 8))
    assert torch.allclose(whole.covariance, tokens.covariance, atol=1e-10)


def test_spatial_normalisation_is_over_each_images_positions() -> None:
    maps = torch.randn(5, 8, 4, 3, generator=torch.Generator().manual_seed(0)) * 7 + 2
    tokens = targets.untransformed(maps, Align(spatial_norm=True))
    x = maps.double().numpy().reshape(5, 8, 12).transpose(0, 2, 1)
    wanted = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    assert np.allclose(tokens.numpy(), wanted, atol=1e-5)
    assert torch.equal(targets.untransformed(maps, Align())[1, 4], maps[1, :, 1, 1])


def test_tokens_are_what_pooling_takes_the_mean_of_and_the_pools_to_the_bit() -> None:
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10)
    images = data.load(config.Data()).train
    request = targets.request(images, 0.3, 40, seed=1)
    pooled = LocalTeacher(net, Teacher(micro_batch=16)).encode(request)
    local = LocalTeacher(net, Teacher(micro_batch=16, tokens=True))
    maps = local.encode(request)
    assert maps.shape == (40, 32, 4, 4)
    assert torch.allclose(maps.mean((2, 3)), pooled, atol=1e-6)
    pool = FromEncoder(local)
    assert torch.equal(pool.submit(request).result(), maps)
    pool.close()


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
    plain = Align()
    ours, theirs = (targets.measured(source, request, plain) for source in (local, pool))
    pool.close()
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.covariance, theirs.covariance)
    align = Align(transform="whiten", whiten_dim=4)
    one, two = targets.Transform(align, 32).fit(ours), targets.Transform(align, 32).fit(theirs)
    assert torch.equal(one.factor, two.factor)
