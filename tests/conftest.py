"""Settings of every test process, and the one Ray cluster that the tests in tests/cluster share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from dra_ray.cluster import ENVIRONMENT

# before ray is imported: its processes inherit these
os.environ.update(ENVIRONMENT)
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A local Ray with four CPU slots and its dashboard; gives what `ray.init` returned."""
    import ray

    context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False, logging_level="ERROR")
    yield context
    ray.shutdown()
