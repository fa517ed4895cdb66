"""A small teacher with random weights: what the pool and training need, without training one."""

from __future__ import annotations

import pytest
import torch

from dra_ray import config
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    torch.manual_seed(0)
    net = EDM(config.UNet(), resolution=8, channels=1, num_classes=10, sigma_data=0.8)
    checkpoint.save(store, net, {})
    return store
