"""Names of the pool's metrics: what Prometheus shows has the prefix `ray_`, and `_total` behind a
counter.
"""

from __future__ import annotations

METRICS = {
    "dra_teacher_requests": "requests answered by replicas, by teacher and trial",
    "dra_teacher_images": "images answered by replicas, by teacher and trial",
    "dra_teacher_hits": "requests answered with what another one had computed, by teacher and "
    "trial",
    "dra_teacher_retries": "requests sent again after a replica died or refused, by teacher and "
    "trial",
    "dra_teacher_service_seconds": "time a replica spent on a request",
    "dra_teacher_queue_seconds": "time a request waited in a replica",
    "dra_teacher_queue_length": "requests that wait in a replica",
    "dra_teacher_encoded": "images that the teacher has encoded, padding not counted",
    "dra_teacher_batches": "micro-batches that the teacher has run",
    "dra_teacher_wait_seconds": "time a training step waited for its feature",
    "dra_teacher_replicas_running": "replicas that answer",
    "dra_teacher_replicas_target": "replicas that there are to be",
    "dra_teacher_demand": "work of the last seconds, in replicas",
    "dra_teacher_clients": "training workers that sent requests lately",
}
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
