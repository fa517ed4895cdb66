"""A small teacher with random weights: what the pool and training need, without training one."""

from __future__ import annotations

from typing import Any

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


def experiment(teacher: Store, **changes: Any) -> config.Experiment:
    """A digits experiment of seconds, with alignment; `changes` are dotted fields with `__` for the dot."""
    small = {
        "teacher.uri": teacher.uri,
        "model.name": "wrn-10-1",
        "optim.epochs": 2,
        "optim.batch": 128,
        "threat.eps_255": 32,
        "threat.step_255": 16,
        "threat.steps": 3,
        "selection.steps": 3,
        "selection.every_epochs": 1,
        "align.hidden": 32,
        "pool.cpus_per_replica": 0.1,
        "resources.cpus_per_worker": 0.5,
    }
    return config.override(config.Experiment(), small | {field.replace("__", "."): value for field, value in changes.items()})
