"""Which replica gets a client's next request: the one with the fewest of its requests."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)


class LeastOutstanding(RequestRouter):
    """Spreads what this process has under way evenly over the replicas.

    Ray Serve's own router draws two replicas and compares their queues as last reported. A training
    worker sends a few large requests at once and waits for the last of them, before any report can
    tell of the others: drawn like that, four of them end as three and one every second time. Even
    as one criterion among two, reports did harm: that of a replica that nobody sends to grows old,
    up to ten seconds, in which both parts of each request went to the other replica.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._under_way: dict[str, ReplicaID] = {}  # replica by request, from its choice on

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        assert pending_request
        request = pending_request.metadata.internal_request_id
        self._under_way.pop(request, None)  # an earlier choice, made in vain
        load = Counter(self._under_way.values())
        order = sorted(
            candidate_replicas, key=lambda replica: (load[replica.replica_id], random.random())
        )
        if order:
            self._under_way[request] = order[0].replica_id
        return [[replica] for replica in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        # An answer that was there at once may have completed the request before this call: then it
        # must not be entered again.
        request = pending_request.metadata.internal_request_id
        if request in self._under_way:
            self._under_way[request] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._under_way.pop(internal_request_id, None)
