"""The pool answers what the teacher would answer in process, to the bit, whatever happens to its
replicas.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from dra_ray import cluster, config
from dra_ray.errors import PoolError
from dra_ray.pool import client as pool_client
from dra_ray.pool import service
from dra_ray.pool.ledger import open_ledger
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import LocalTeacher, Request
from tests.cluster.small import replica_pids
from tests.support import requests

SETTINGS = config.Pool(
    min_replicas=1,
    max_replicas=2,
    cpus_per_replica=0.1,
    target_utilisation=0.3,
    look_back_period_s=2,
    upscale_delay_s=0.5,
    downscale_delay_s=2,
    timeout_s=60,
)


def request(index: int, count: int = 96) -> Request:
    return requests.request(index, count, resolution=8)


@pytest.fixture(scope="module")
def settings(teacher: Store) -> config.Teacher:
    return config.Teacher(uri=teacher.uri, micro_batch=64)


@pytest.fixture(scope="module")
def app(ray_cluster: Any, settings: config.Teacher) -> Iterator[str]:
    with service.serving(settings, SETTINGS) as name:
        yield name


@pytest.fixture(scope="module")
def local(settings: config.Teacher) -> LocalTeacher:
    assert settings.uri
    return LocalTeacher(checkpoint.load(Store(settings.uri)), settings, threads=1)


def test_pool_equals_local_to_the_bit(app: str, local: LocalTeacher) -> None:
    client = pool_client.PoolClient(app, SETTINGS)
    assert client.feature_dim == local.feature_dim
    for index, count in enumerate((1, 63, 64, 65, 200)):
        assert torch.equal(
            client.submit(request(index, count)).result(), local.encode(request(index, count))
        )


def test_maps_in_float16_are_the_same_to_the_bit_from_the_pool_and_half_as_long(
    ray_cluster: Any, settings: config.Teacher, local: LocalTeacher
) -> None:
    halved = settings.model_copy(update={"wire": "float16", "tokens": True})
    source = LocalTeacher(local.net, halved, threads=1)
    with service.serving(halved, SETTINGS) as app:
        assert app != service.app_name(settings.model_copy(update={"tokens": True}))
        client = pool_client.PoolClient(app, SETTINGS)
        for count in (1, 65):
            asked = request(9, count)
            answer = client.submit(asked).result()
            assert answer.dtype == torch.float32
            assert torch.equal(answer, source.submit(asked).result())
        sent, _ = client._handle.encode.remote(asked, "").result()
        assert 2 * sent.nbytes == answer.numpy().nbytes


def test_a_slice_with_its_offset_equals_the_slice_of_the_whole(
    app: str, local: LocalTeacher
) -> None:
    whole = local.encode(request(7, 100))
    part = pool_client.PoolClient(app, SETTINGS).submit(request(7, 100)[40:]).result()
    torch.testing.assert_close(part, whole[40:], rtol=1e-5, atol=1e-6)


def test_in_flight_requests_are_bounded_and_answered_in_any_order(
    app: str, local: LocalTeacher
) -> None:
    client = pool_client.PoolClient(
        app, config.Pool(**{**SETTINGS.model_dump(), "max_inflight": 2})
    )
    calls = []
    for index in range(6):
        calls.append(client.submit(request(index)))
        assert len(client._inflight) <= 2
    for index in reversed(range(6)):
        assert torch.equal(calls[index].result(), local.encode(request(index)))
        assert torch.equal(calls[index].result(), calls[index].result())


def test_killed_replicas_lose_nothing(app: str, local: LocalTeacher) -> None:
    client = pool_client.PoolClient(app, SETTINGS)
    client.submit(request(0)).result()
    victims = replica_pids()
    calls = [client.submit(request(index, 4000)) for index in range(3)]
    time.sleep(0.3)  # the first of them is being encoded now
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    calls.append(client.submit(request(3, 4000)))
    for index, call in enumerate(calls):
        assert torch.equal(call.result(), local.encode(request(index, 4000)))
    assert client.totals.retries > 0, "nothing was in flight when the replica died"
    assert client.totals.requests == 5


def test_a_refused_request_is_not_sent_again(app: str) -> None:
    client = pool_client.PoolClient(app, SETTINGS)
    grey = request(0)
    colour = dataclasses.replace(grey, images=grey.images.expand(-1, 3, -1, -1))
    with pytest.raises(PoolError, match=r"the teacher failed.*\[96, 3, 8, 8\]"):
        client.submit(colour).result()
    assert client.totals.retries == 0


def test_no_answer_in_time_is_an_error_with_the_remedy(app: str) -> None:
    call = pool_client.PoolClient(app, SETTINGS).submit(request(0, 2000))
    with pytest.raises(PoolError, match=r"pool.timeout_s=0.001.*resumes"):
        call.result(timeout_s=0.001)


@pytest.mark.slow
def test_the_pool_grows_under_load_and_shrinks_after(app: str, tmp_path) -> None:
    log = Store(str(tmp_path)) / "pool.jsonl"
    running = lambda: service.replicas(app).get("RUNNING", 0)  # noqa: E731
    assert cluster.wait_until(lambda: running() == 1, 30)
    stop = threading.Event()

    def load(start: int) -> None:
        client = pool_client.PoolClient(app, SETTINGS)
        index = start
        while not stop.is_set():
            client.submit(request(index, 256)).result()
            index += 1
        client.close()

    with service.Watch(app, log):
        threads = [threading.Thread(target=load, args=(100 * k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        try:
            assert cluster.wait_until(lambda: running() == 2, 60), "no second replica under load"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert cluster.wait_until(lambda: running() == 1, 60), "the second replica stayed"
        cluster.wait_until(lambda: False, 2)
    rows = log.read_jsonl()
    sizes = [row["running"] for row in rows]
    assert [
        size for size, before in zip(sizes, [None, *sizes], strict=False) if size != before
    ] == [1, 2, 1]
    assert max(row["demand"] for row in rows) > SETTINGS.target_utilisation
    assert rows[-1]["requests"] > rows[0]["requests"]


def test_one_teacher_has_one_pool(app: str, settings: config.Teacher) -> None:
    assert service.up(settings, SETTINGS) == app
    with service.serving(settings, SETTINGS) as again:
        assert again == app
    assert app in ray.serve.status().applications, "a pool that was there before stays"
    assert service.app_name(config.Teacher(uri=settings.uri, micro_batch=32)) != app


def test_nobody_relies_on_a_pool_that_the_last_driver_is_taking_down(ray_cluster: Any) -> None:
    books = open_ledger("unused", config.Teacher(), keep=False)
    assert ray.get([books.acquire.remote("one"), books.acquire.remote("two")]) == [True, True]
    assert ray.get(books.release.remote("one")) is False, "another driver holds it"
    assert ray.get(books.release.remote("two")) is True
    assert ray.get(books.acquire.remote("three")) is False
    ray.kill(books)


@pytest.mark.slow
def test_a_pool_brought_up_by_hand_outlives_the_runs_that_use_it(
    ray_cluster: Any, settings: config.Teacher, tmp_path
) -> None:
    own = settings.model_copy(update={"micro_batch": 16})  # another teacher, so another pool
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}

    def dra(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "dra_ray", "pool", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return Store(str(tmp_path / "status.json")).read_json() if "--json" in arguments else None

    small = [
        "--set",
        "pool.cpus_per_replica=0.1",
        "--set",
        "teacher.micro_batch=16",
        "--set",
        f"teacher.uri={own.uri}",
    ]
    (brought_up,) = dra("up", "digits-dra", *small, "--json", "status.json")
    name = service.app_name(own)
    assert brought_up["pool"] == name
    assert brought_up["kept"]
    assert brought_up["replicas"] == "1 running"
    with service.serving(own, SETTINGS) as app:
        assert app == name
        client = pool_client.PoolClient(app, SETTINGS, "trial-7")
        client.submit(request(1)).result()
        client.close()
    rows = {row["pool"]: row for row in dra("status", "--json", "status.json")}
    assert rows[name]["trials"]["trial-7"]["requests"] == 1
    assert rows[name]["replicas"] == {"RUNNING": 1}
    dra("down", name)
    assert cluster.wait_until(lambda: name not in service.applications(), 30)
