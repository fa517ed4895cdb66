"""Three clients, and a replica killed every half minute: `python -m tests.cluster.soak MINUTES`.

Answers with requests sent and answered, answers that differ, retries, kills, and the
memory of Ray's processes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch

from dra_ray import cluster, config
from dra_ray.pool import client as pool_client
from dra_ray.pool import service, sources
from tests.cluster.apart import answer
from tests.cluster.small import replica_pids
from tests.support import teachers
from tests.support.requests import request
from tests.support.teachers import Sums, expected

KILL_EVERY_S = 30.0
SETTINGS = config.Pool(
    min_replicas=2,
    max_replicas=3,
    cpus_per_replica=0.1,
    look_back_period_s=2,
    upscale_delay_s=0,
    downscale_delay_s=5,
    backlog_s=1,
)


def main(minutes: float) -> dict[str, Any]:
    teachers.travel()
    app = f"{sources.PREFIX}soak"
    with cluster.connect(num_cpus=4):
        service.deploy(app, functools.partial(Sums, 0.02), SETTINGS, config.Teacher(uri="soak"))
        with service.held(app):
            return _play(app, minutes)


def _play(app: str, minutes: float) -> dict[str, Any]:
    assert cluster.wait_until(lambda: service.replicas(app).get("RUNNING", 0) == 2, 60)
    clients = [pool_client.PoolClient(app, SETTINGS, f"trial-{number}") for number in range(3)]
    sent, mismatches, errors = [0, 0, 0], [0, 0, 0], []
    end_s = time.monotonic() + 60 * minutes

    def send(index: int) -> None:
        sizes = itertools.cycle((16, 40, 200, 64))
        try:
            for number, size in zip(itertools.count(index, 3), sizes, strict=False):
                if time.monotonic() > end_s:
                    return
                sent[index] += 1
                mismatches[index] += not torch.equal(
                    clients[index].submit(request(number, size)).result(), expected(number, size)
                )
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=send, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(min(60.0, 10 * minutes))  # caches are warm
    memory, kills = [_memory_mb()], 0
    while time.monotonic() < end_s - 5:
        time.sleep(min(KILL_EVERY_S, max(0.0, end_s - 5 - time.monotonic())))
        for pid in replica_pids()[:1]:
            os.kill(pid, signal.SIGKILL)
            kills += 1
        memory.append(_memory_mb())
    for thread in threads:
        thread.join()
    memory.append(_memory_mb())
    totals = [client.totals for client in clients]
    return {
        "minutes": minutes,
        "sent": sum(sent),
        "answered": sum(int(part.requests) for part in totals),
        "mismatches": sum(mismatches),
        "errors": errors,
        "retries": sum(int(part.retries) for part in totals),
        "kills": kills,
        "memory_mb_start": memory[0],
        "memory_mb_most": max(memory),
        "memory_mb_end": memory[-1],
        "object_store_mb": _object_store_mb(),
    }


def _memory_mb() -> float:
    """Memory of this process and of all below it that is not shared, which Ray's are."""
    parents = {
        int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()
    }
    family = {os.getpid()}
    for _ in range(10):  # generations
        family |= {pid for pid, parent in parents.items() if parent in family}
    return round(sum(map(_private_bytes, family)) / 2**20, 1)


def _parent(entry: Path) -> int:
    with contextlib.suppress(OSError):
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def _private_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _object_store_mb() -> float:
    have, free = ray.cluster_resources(), ray.available_resources()
    return round((have["object_store_memory"] - free.get("object_store_memory", 0.0)) / 2**20, 1)


if __name__ == "__main__":
    answer(main(float(sys.argv[1])))
