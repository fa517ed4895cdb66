"""What a pool survives: the features are those of the teacher, none is lost, and every one is
counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch

from dra_ray import cluster, config
from dra_ray.errors import PoolError
from dra_ray.pool import client as pool_client
from dra_ray.pool import service
from dra_ray.pool.ledger import Ledger
from dra_ray.pool.sources import PREFIX
from dra_ray.storage import Store
from tests.cluster.small import replica_pids
from tests.support import teachers
from tests.support.requests import request
from tests.support.teachers import ENDLESS, FATAL, Mortal, Sums, expected

teachers.travel()

USUAL = {
    "cpus_per_replica": 0.1,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 3,
    "backlog_s": 1,
    "timeout_s": 90,
}
Client = Callable[..., pool_client.PoolClient]


@contextlib.contextmanager
def serving(name: str, make: Callable[[], Sums], **settings: Any) -> Iterator[Client]:
    """A pool of that teacher, which gives clients."""
    app, pool = f"{PREFIX}{name}", config.Pool(**USUAL | settings)
    service.deploy(app, make, pool, config.Teacher(uri=name))
    with service.held(app):
        yield lambda **more: pool_client.PoolClient(app, pool.model_copy(update=more))
    cluster.wait_until(lambda: app not in service.applications(), 30)


def running(name: str) -> int:
    return service.replicas(f"{PREFIX}{name}").get("RUNNING", 0)


@pytest.mark.slow
def test_all_replicas_at_once(ray_cluster: Any) -> None:
    """And one alone: with requests in flight, and more sent while nobody is there."""
    with serving("killed", functools.partial(Sums, 0.1), min_replicas=2, max_replicas=2) as client:
        source = client(max_inflight=8)
        for round_, victims in enumerate((slice(0, 1), slice(None))):
            assert cluster.wait_until(
                lambda: running("killed") == 2 and len(replica_pids()) == 2, 60
            )
            calls = [source.submit(request(10 * round_ + number, 100)) for number in range(4)]
            time.sleep(0.2)
            for pid in replica_pids()[victims]:
                os.kill(pid, signal.SIGKILL)
            calls += [source.submit(request(10 * round_ + number, 100)) for number in range(4, 6)]
            for number, call in enumerate(calls):
                assert torch.equal(call.result(), expected(10 * round_ + number, 100))
        totals = source.totals
    assert totals.requests == 12
    assert totals.images == 1200
    assert totals.retries > 0


@pytest.mark.slow
def test_a_pool_whose_log_cannot_be_written_stays_up(ray_cluster: Any, tmp_path: Any) -> None:
    """Far longer than a silent driver is waited for."""
    (tmp_path / "run").write_text("a file where the folder should be")
    log = Store(str(tmp_path)) / "run" / "pool.jsonl"
    app, pool = f"{PREFIX}unlogged", config.Pool(**USUAL)
    service.deploy(app, functools.partial(Sums), pool, config.Teacher(uri="unlogged"))
    with service.held(app, log):
        time.sleep(2 * Ledger.DRIVER_S)
        assert app in service.applications()
        with contextlib.closing(pool_client.PoolClient(app, pool)) as client:
            assert torch.equal(client.submit(request(0, 4)).result(), expected(0, 4))
    assert cluster.wait_until(lambda: app not in service.applications(), 30)


@pytest.mark.slow
def test_a_replica_that_hangs_is_replaced(ray_cluster: Any, tmp_path: Any) -> None:
    make = functools.partial(Mortal, once=str(tmp_path / "hung"))
    with serving("hangs", make, min_replicas=1, max_replicas=1, hang_s=1.0) as client:
        source = client()
        calls = [
            source.submit(request(number, 20, label))
            for number, label in enumerate((1, ENDLESS, 2))
        ]
        for number, label in enumerate((1, ENDLESS, 2)):
            assert torch.equal(calls[number].result(), expected(number, 20, label))
        assert source.totals.requests == 3
        assert source.totals.retries > 0
    assert (tmp_path / "hung").exists()


@pytest.mark.slow
def test_scale_down_under_load_loses_nothing(ray_cluster: Any) -> None:
    """Two replicas become one while requests keep coming: what was accepted is answered, nothing is
    sent again.
    """
    with serving(
        "shrinks",
        functools.partial(Sums, 0.15),
        min_replicas=1,
        max_replicas=2,
        target_utilisation=0.9,
    ) as client:
        sources = [client() for _ in range(4)]
        stop, numbers = threading.Event(), iter(range(10_000))

        def load(source: pool_client.PoolClient) -> None:
            while not stop.is_set():
                number = next(numbers)
                assert torch.equal(
                    source.submit(request(number, 16)).result(), expected(number, 16)
                )

        threads = [threading.Thread(target=load, args=(source,)) for source in sources]
        for thread in threads:
            thread.start()
        assert cluster.wait_until(lambda: running("shrinks") == 2, 60)
        stop.set()
        for thread in threads:
            thread.join()
        light = client()
        sent = 0
        while running("shrinks") == 2 or sent < 5:  # a light load all the way down
            assert torch.equal(light.submit(request(sent, 16)).result(), expected(sent, 16))
            sent += 1
            time.sleep(0.2)
            assert sent < 300, "the second replica stayed"
        assert sum(source.totals.retries for source in (*sources, light)) == 0


@ray.remote(num_cpus=0)
class Worker:
    """A client in a process that can be killed."""

    def __init__(self, settings: config.Pool) -> None:
        self._source = pool_client.PoolClient(f"{PREFIX}left", settings)

    def send(self) -> int:
        self._calls = [self._source.submit(request(number, 160)) for number in range(4)]
        return os.getpid()


def test_a_client_that_dies_leaves_the_others_alone(ray_cluster: Any) -> None:
    with serving("left", functools.partial(Sums, 0.05), min_replicas=1, max_replicas=1) as client:
        worker = Worker.remote(config.Pool(**USUAL))  # type: ignore[attr-defined]
        os.kill(ray.get(worker.send.remote()), signal.SIGKILL)
        source = client()
        for number in range(6):
            assert torch.equal(source.submit(request(number, 30)).result(), expected(number, 30))
        assert source.totals.requests == 6
        assert source.totals.retries == 0
        assert running("left") == 1


@pytest.mark.slow
def test_a_request_that_ends_its_replica_is_given_up_and_hurts_nobody_else(
    ray_cluster: Any,
) -> None:
    # six replicas start in turn, which took 96 s on 2 busy cores
    with serving("fatal", Mortal, min_replicas=2, max_replicas=2, timeout_s=300) as client:
        assert cluster.wait_until(lambda: running("fatal") == 2, 60)
        bad, good = client(), client()
        fatal = bad.submit(request(0, 16, FATAL))
        results: list[torch.Tensor] = []

        def others() -> None:
            for number in range(20):
                results.append(good.submit(request(number, 16)).result())
                time.sleep(0.2)

        thread = threading.Thread(target=others)
        thread.start()
        with pytest.raises(
            PoolError, match=r"replicas died with the same 16 images.*lower teacher.micro_batch"
        ):
            fatal.result()
        thread.join()
        assert all(
            torch.equal(features, expected(number, 16)) for number, features in enumerate(results)
        )
        assert len(results) == 20


def test_poisoned_requests_hurt_only_their_sender(ray_cluster: Any) -> None:
    with serving("poison", functools.partial(Sums, 0.05), min_replicas=1, max_replicas=1) as client:
        sources = [client() for _ in range(3)]
        good = request(1, 10)
        colour = good.images.expand(-1, 3, -1, -1)
        calls = [
            sources[0].submit(request(0, 10)),
            sources[1].submit(dataclasses.replace(good, sigma=good.sigma * float("nan"))),
            sources[1].submit(dataclasses.replace(good, images=colour)),
            sources[2].submit(request(2, 10)),
        ]
        for index in (1, 2):
            with pytest.raises(
                PoolError, match="the teacher failed on a request.*not what the teacher takes"
            ):
                calls[index].result()
        assert torch.equal(calls[0].result(), expected(0, 10))
        assert torch.equal(calls[3].result(), expected(2, 10))
        assert [source.totals.retries for source in sources] == [0, 0, 0]


def test_requests_of_trials_in_lock_step_are_computed_once(ray_cluster: Any) -> None:
    """Four trials that send equal requests cost little more than one, and get the same bits."""
    requests, trials = 12, 4
    with serving("shared", functools.partial(Sums, 0.1), min_replicas=2, max_replicas=2) as client:
        assert cluster.wait_until(lambda: running("shared") == 2, 60)
        sources = [client() for _ in range(trials)]
        wrong: list[int] = []

        def follow(source: pool_client.PoolClient) -> None:
            for number in range(requests):
                features = source.submit(request(number, 16)).result()
                if not torch.equal(features, expected(number, 16)):
                    wrong.append(number)

        threads = [threading.Thread(target=follow, args=(source,)) for source in sources]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        hits = sum(source.totals.hits for source in sources)
        assert trials * requests - hits <= 1.3 * requests
        seen = service.status(f"{PREFIX}shared")
    assert seen.replicas == {"RUNNING": 2}


@pytest.mark.slow
def test_from_none_to_one_and_back(ray_cluster: Any) -> None:
    with serving("none", Sums, min_replicas=0, max_replicas=2) as client:
        assert running("none") == 0
        source = client()
        assert torch.equal(source.submit(request(1, 40)).result(), expected(1, 40))
        assert running("none") == 1
        assert cluster.wait_until(lambda: running("none") == 0, 60), (
            "an idle pool keeps its replica"
        )
        assert torch.equal(source.submit(request(2, 40)).result(), expected(2, 40))
