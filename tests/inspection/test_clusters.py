"""Agreement of clusters and classes, where it is known."""

import pytest
import torch

from dra_ray.errors import DataError
from dra_ray.inspection.clusters import agreement


def test_separate_classes_agree_and_noise_does_not() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 16, generator=draws)
    apart = agreement(noise * 0.05 + torch.eye(4, 16)[labels], labels)
    assert apart.mean == pytest.approx(1.0)
    assert apart.deviation == pytest.approx(0.0)
    assert agreement(noise, labels).mean < 0.1
    between = agreement(noise * 0.45 + torch.eye(4, 16)[labels], labels)
    assert 0.1 < between.mean < 1.0


def test_only_directions_count() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(60, 8, generator=draws)
    scaled = rows * torch.rand(60, 1, generator=draws).add(0.1)
    assert agreement(rows, labels).mean == pytest.approx(agreement(scaled, labels).mean)


def test_what_has_no_clusters_is_said() -> None:
    labels = torch.arange(6) % 3
    with pytest.raises(DataError, match="all features are the same"):
        agreement(torch.ones(6, 4), labels)
    with pytest.raises(DataError, match="not finite"):
        agreement(torch.full((6, 4), torch.nan), labels)
    with pytest.raises(DataError, match="too few"):
        agreement(torch.randn(5, 4), torch.arange(5))
