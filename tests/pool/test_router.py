"""A process spreads its requests evenly over the replicas, whatever order their ends come in."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from dra_ray.pool.router import LeastOutstanding


def router() -> LeastOutstanding:
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    return LeastOutstanding(
        deployment_id=DeploymentID(name="teacher"), handle_source=DeploymentHandleSource.UNKNOWN
    )


def request(number: int) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(internal_request_id=str(number)))


REPLICAS: Any = [SimpleNamespace(replica_id=name) for name in "abc"]


def choose(spread: LeastOutstanding, number: int) -> Any:
    order = asyncio.run(spread.choose_replicas(REPLICAS, request(number)))
    assert sorted(replica.replica_id for [replica] in order) == ["a", "b", "c"]
    return order[0][0].replica_id


def test_what_is_sent_at_once_is_spread_evenly() -> None:
    for _ in range(20):
        spread = router()
        assert set(Counter(choose(spread, number) for number in range(12)).values()) == {4}


def test_the_replica_that_answers_gets_the_next() -> None:
    spread = router()
    replicas = {number: choose(spread, number) for number in range(6)}
    for number, replica in replicas.items():
        spread.on_request_routed(request(number), replica, None)
    for number in range(6):
        spread.on_request_completed(replicas[number], str(number))
        assert choose(spread, 100 + number) == replicas[number]


def test_a_request_that_ended_before_it_was_entered_does_not_count() -> None:
    spread = router()
    for number in range(30):
        replica = choose(spread, number)
        spread.on_request_completed(replica, str(number))
        spread.on_request_routed(request(number), replica, None)
    assert set(Counter(choose(spread, 100 + number) for number in range(6)).values()) == {2}


def test_a_request_counts_where_it_went() -> None:
    spread = router()
    for number in range(3):
        choose(spread, number)
        spread.on_request_routed(request(number), "a", None)  # the others had refused it
    assert Counter(choose(spread, 10 + number) for number in range(6)) == {"b": 3, "c": 3}
