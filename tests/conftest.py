"""Settings of every test process, the one Ray cluster that the tests in tests/cluster share, and an
S3 server.
"""

from __future__ import annotations

import contextlib
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


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket of a real S3 server on the loopback interface; the environment says where, as a
    user's would.
    """
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()  # another module's server is gone
    with contextlib.suppress(FileExistsError):  # the servers of a process share their buckets
        s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    server.stop()
