"""Settings of every test process, and the one Ray cluster that the tests in tests/cluster share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # every report waits for it

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A local Ray with four CPU slots, as every command starts one; gives what `ray.init`
    returned.
    """
    from dra_ray import cluster

    with cluster.connect(num_cpus=4) as context:
        yield context
