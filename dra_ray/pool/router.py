"""Which replica gets a client's next request: the one with the least to do."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)


class LeastOutstanding(FIFOMixin, RequestRouter):
    """Ray Serve's router by queue length, which also counts the requests that are on their way.

    Serve's own draws two replicas and asks how long their queues are. A training worker sends a few
    large requests at once, before any answer can tell of the others: drawn like that, four of them
    end as three and one every second time, and the step waits for the three.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: Counter[ReplicaID] = Counter()  # of this client, not yet answered
        self._chosen: deque[ReplicaID] = deque()  # chosen, but not yet sent

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        order = sorted(
            candidate_replicas, key=lambda replica: (self._load(replica), random.random())
        )
        if order:
            self._chosen.append(order[0].replica_id)
        return [[replica] for replica in order]

    def _load(self, replica: RunningReplica) -> int:
        ours = self._sent[replica.replica_id] + self._chosen.count(replica.replica_id)
        return max(ours, self.replica_queue_len_cache.get(replica.replica_id) or 0)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        self._sent[replica_id] += 1
        if self._chosen:
            self._chosen.popleft()
        if not self.num_pending_requests:  # what was chosen in vain counts no longer
            self._chosen.clear()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._sent[replica_id] -= 1
        if self._sent[replica_id] <= 0:
            del self._sent[replica_id]
