"""The main job, trained and attacked on a cluster in which something is killed every two minutes:
`python -m tests.cluster.chaos MINUTES EVERY_S [others]`; `others`: synthetic images and a sweep.

A head, two nodes, an S3 server. In turn and in a drawn order: a replica of the teacher, a worker
(that trains, attacks, makes images, or is a trial), the driver of the job, a whole node, and the
storage for half a minute. A driver that died is followed by the same `dra submit`, a node by a new
one. Answers with what was killed and when, and with what the disturbed runs have otherwise than an
undisturbed one.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray  # noqa: F401  # brings psutil along

import psutil  # isort: skip

from dra_ray import config, runs
from dra_ray.storage import Store
from tests.cluster.apart import answer
from tests.cluster.head import ROOT, Head, drivers, lose, started
from tests.support.rows import without_times
from tests.support.s3 import Proxy, faulty_store

BUCKET, OUTAGE_S, LOOK_S = "chaos", 30.0, 3.0
JOB_S = 3600.0  # of a job that nobody disturbs, at most
NODE = {"num_cpus": 2, "resources": '{"student": 2}'}
# in titles; a task of an attack has its run's
WORKERS = ("RayTrainWorker", "_make", "ImplicitFunc")


def main(minutes: float, every_s: float, others: bool = False) -> dict[str, Any]:
    with faulty_store(BUCKET) as proxy, started(cpus=2) as head:
        root = Store(f"s3://{BUCKET}/runs")
        play = Play(head, proxy, root, works_of_others() if others else works(minutes))
        began = time.monotonic()
        play.to_the_end("calm", None)
        calm_s = time.monotonic() - began
        disturbed: list[str] = []
        chaos = play.chaos(every_s)
        began = time.monotonic()
        while not disturbed or time.monotonic() - began < 60 * minutes:
            name = f"disturbed-{len(disturbed) + 1}"
            play.to_the_end(name, chaos, until_s=began + 60 * minutes)
            disturbed.append(name)
        return {
            "minutes": (time.monotonic() - began) / 60,
            "calm_minutes": calm_s / 60,
            "runs": disturbed,
            "kills": [{**kill, "at_s": round(kill["at_s"] - began)} for kill in play.kills],
            "submissions": play.submissions,
            "differences": {name: differences(root / "calm", root / name) for name in disturbed},
            "result": {} if others else scores(root / "calm"),
        }


Work = tuple[str, config.Frozen | None, str]  # kind, config, what the run's name ends in


def works(minutes: float) -> list[Work]:
    return [("train", job(minutes), ""), ("evaluate", None, "")]


def works_of_others() -> list[Work]:
    """Some minutes each, undisturbed."""
    images = {"teacher": "package:fashion-edm-10", "images": 20_000, "steps": 10}
    made = config.Synthesis.model_validate(images | {"shard_images": 1000})
    alone = {"resources.workers": 1, "resources.validation": "workers", "optim.epochs": 4}
    base = config.override(job(0), alone)
    space = {"align.weight": [0, 1, 2, 4]}
    tried = config.Sweep.model_validate({"base": base, "space": space, "scheduler": "none"})
    return [("synthesize", made, SYNTHETIC), ("sweep", tried, SWEEP)]


SYNTHETIC, SWEEP = "-synthetic", "-sweep"


def job(minutes: float) -> config.Experiment:
    """The study's student, by two workers and a pool of one or two; some minutes, undisturbed."""
    long = minutes >= 30
    settings = {
        "data.train_images": 20_000 if long else 4_000,
        "data.test_images": 500,
        "align.weight": 2.0,
        "align.sigma": 0.2,
        "align.transform": "standardise",
        "teacher.layer": "dec.5x5_block0",
        "pool.kind": "pool",
        "pool.max_replicas": 2,
        "pool.cpus_per_replica": 0.1,
        "optim.epochs": 6 if long else 2,
        "selection.every_epochs": 1,
        "evaluation.level": "screen",
        "evaluation.batch": 100,
        "resources.workers": 2,
        "resources.custom": "{student: 1}",
        "resources.checkpoint_steps": 25,
        "resources.validation": "beside",
        "resources.max_failures": 1000,
    }
    changes = [f"{field}={value}" for field, value in settings.items()]
    return config.load(str(ROOT / "docs/study/base.yaml"), config.Experiment, changes)


class Play:
    """The cluster, what was killed on it, and the jobs that were submitted."""

    def __init__(self, head: Head, proxy: Proxy, root: Store, works: list[Work]) -> None:
        self.head, self.proxy, self.root, self.works = head, proxy, root, works
        self.nodes = [head.node(**NODE) for _ in range(2)]
        self.kills: list[dict[str, Any]] = []
        self.submissions = 0
        self._due = ""  # what is to be killed
        self._calm_again = 0.0  # when the storage answers again

    def to_the_end(self, name: str, chaos: Iterator[str] | None, until_s: float = 0.0) -> None:
        """Train and attack the run `name`, killing something whenever `chaos` says what."""
        for kind, settings, ending in self.works:
            file = Path(self.head.folder) / f"{kind}.yaml"
            if settings:
                file.write_text(config.to_yaml(settings))
            command = [kind, *([str(file)] if settings else [])]
            command += ["--storage", self.root.uri, "--name", name + ending]
            deadline = time.monotonic() + JOB_S + max(0.0, until_s - time.monotonic())
            while (status := self._submit(command)) != "SUCCEEDED":
                assert time.monotonic() < deadline, (command, status, self._log())
                time.sleep(LOOK_S)
                self._mend()
                if chaos is not None and time.monotonic() < until_s:
                    self._due = next(chaos) or self._due
                    self._kill(name + ending)

    def chaos(self, every_s: float) -> Iterator[str]:
        """What is to be killed from now on, "" between two kills."""
        drawn, last = random.Random(0), time.monotonic()
        while True:
            kinds = ["replica", "worker", "driver", "node", "storage"]
            drawn.shuffle(kinds)
            for kind in kinds:
                while time.monotonic() - last < every_s:
                    yield ""
                last = time.monotonic()
                yield kind

    # -- the job -----------------------------------------------------------------------------------
    def _submit(self, command: list[str]) -> str:
        """The state of the job of that work, which is submitted where none runs."""
        runs_now = [job for job in self._jobs() if job["status"] in ("PENDING", "RUNNING")]
        if runs_now:
            return str(runs_now[0]["status"])
        done = self.head.dra("submit", *command, "--no-follow")
        if done.returncode and self.proxy.refusal:
            return "REFUSED"  # by the storage, as it is told to
        assert done.returncode == 0, (done.stdout, done.stderr)
        if "has succeeded" in done.stderr:
            return "SUCCEEDED"
        self.submissions += 1
        return "PENDING"

    def _jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.head.get("/api/jobs/").json()  # the head is never killed
        return found

    def _log(self) -> str:
        last = max(self._jobs(), key=lambda job: job["start_time"])["submission_id"]
        return self.head.dra("jobs", "logs", last).stdout[-4000:]

    # -- what happens to it ------------------------------------------------------------------------
    def _mend(self) -> None:
        """A new node for one that was lost, and a storage that answers again."""
        self.nodes = [
            node if node.poll() is None else self.head.node(**NODE) for node in self.nodes
        ]
        if self.proxy.refusal and time.monotonic() > self._calm_again:
            self.proxy.refusal = None

    def _kill(self, name: str) -> None:
        """Strike as is due, once there is a victim."""
        if not self._due:
            return
        victims: dict[str, Callable[[str], object]] = {
            "replica": lambda _: _kill_one(self._titled("ServeReplica:teacher")),
            "worker": lambda name: _kill_one(self._titled(*WORKERS, f"{name}:")),
            "driver": lambda name: _kill_one(drivers(name)),
            "node": self._lose_a_node,
            "storage": self._refuse,
        }
        hit = victims[self._due](name)
        if hit is None:
            return
        kill = {"at_s": time.monotonic(), "kind": self._due, "hit": hit, "run": name}
        self.kills.append(kill)
        self._due = ""
        print(time.strftime("%H:%M:%S"), kill, file=sys.stderr, flush=True)

    def _titled(self, *parts: str) -> list[int]:
        """Processes of this cluster's, of which there may be others here, whose title has one of
        the parts.
        """
        roots = [self.head.process.pid, *(node.pid for node in self.nodes)]
        found = []
        for pid in (pid for root in roots for pid in _family(root)):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(psutil.Process(pid).cmdline())
                if title.startswith("ray::") and any(part in title for part in parts):
                    found.append(pid)
        return found

    def _lose_a_node(self, _: str) -> object:
        """The one with the most of our processes."""
        node = max(self.nodes, key=lambda each: len(_family(each.pid)))
        pids = len(_family(node.pid))
        lose(node)
        return f"{pids} processes"

    def _refuse(self, _: str) -> object:
        self.proxy.refusal = (503, "SlowDown")
        self._calm_again = time.monotonic() + OUTAGE_S
        return f"{OUTAGE_S:g} s"


def _family(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_one(pids: list[int]) -> int | None:
    """Who was killed; `None` where nobody is there."""
    if not pids:
        return None
    victim = random.Random(sum(pids)).choice(pids)
    os.kill(victim, signal.SIGKILL)
    return victim


# -- what is compared ------------------------------------------------------------------------------
def differences(one: Store, two: Store) -> list[str]:
    """Files of two runs of one config that are not the same, but for times."""
    if (Store(one.uri + SYNTHETIC) / runs.MANIFEST).exists():
        return _differences_of_others(one, two)
    found = []
    if (one / runs.MODEL).read_bytes() != (two / runs.MODEL).read_bytes():
        found.append(runs.MODEL)
    kinds: dict[str, type[runs.Record]] = {
        runs.METRICS: runs.ValidationRow,
        runs.STEPS: runs.StepRow,
    }
    found += [
        name for name, kind in kinds.items() if _rows(one / name, kind) != _rows(two / name, kind)
    ]
    one_attacked, two_attacked = _verdicts(one), _verdicts(two)
    if one_attacked.keys() != two_attacked.keys() or not all(
        np.array_equal(one_attacked[key], two_attacked[key]) for key in one_attacked
    ):
        found.append(runs.VERDICTS)
    return found


def _differences_of_others(one: Store, two: Store) -> list[str]:
    """The digests of the images, and what the trials reported, in no order."""
    made = [runs.read_manifest(Store(run.uri + SYNTHETIC)) for run in (one, two)]
    told = [_rows(Store(run.uri + SWEEP) / runs.RUNGS, runs.RungRow) for run in (one, two)]
    reports = [sorted(map(repr, rows)) for rows in told]
    assert made[0]
    assert made[1]
    found = ["images"] if made[0].shards != made[1].shards else []
    return found + (["trials"] if reports[0] != reports[1] else [])


def scores(run: Store) -> dict[str, float]:
    """The share of the verdicts of each kind that are good."""
    found = _verdicts(run).items()
    return {key: float(array.mean()) for key, array in found if array.dtype.kind in "bf"}


def _verdicts(run: Store) -> dict[str, np.ndarray]:
    (file,) = [file for file in run.files() if file.endswith(runs.VERDICTS)]
    with np.load(io.BytesIO((run / file).read_bytes())) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _rows(file: Store, kind: type[runs.Record]) -> list[dict[str, Any]]:
    return without_times(row.on_disk() for row in runs.read_rows(file, kind))


if __name__ == "__main__":
    answer(main(float(sys.argv[1]), float(sys.argv[2]), "others" in sys.argv))
