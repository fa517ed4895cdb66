"""A head node with a token, nodes that join it, and `dra` as a user calls it there: processes of
their own, which a test may kill.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray  # noqa: F401  # brings psutil along
import requests

import psutil  # isort: skip

from dra_ray import cluster
from dra_ray.submission import work
from tests.cluster.apart import environment

START_S, JOB_S = 180, 900  # of a busy machine
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
# actors of the cluster, not of a run
LASTING = {"ServeController", "JobSupervisor", "_AutoscalingCoordinatorActor"}
SCRIPTS = {script for script, _ in work.KINDS.values()}
HEAD_PORTS = ("port", "dashboard-port")
NODE_PORTS = ("dashboard-agent-listen-port", "metrics-export-port")


class Head:
    """A head node with a token in a session folder of its own."""

    def __init__(self, folder: Path, cpus: int = 4, more: Mapping[str, str] | None = None) -> None:
        """`more`: variables of every process of the cluster."""
        self.token, self.folder = secrets.token_hex(16), folder
        self.nodes: list[subprocess.Popen[bytes]] = []
        ports = _free_ports(HEAD_PORTS)
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.gcs = f"127.0.0.1:{ports['port']}"
        plain = environment()
        plain.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
        plain |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.outside = plain | {"RAY_AUTH_TOKEN_PATH": str(folder / "none")}
        self.inside = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self._cluster = self.inside | cluster.ENVIRONMENT | dict(more or {})
        given: dict[str, object] = {"num-cpus": cpus, "temp-dir": str(folder)}
        given |= {"dashboard-host": "127.0.0.1", "node-ip-address": "127.0.0.1", **ports}
        self.process = self._start(["--head"], given)

    def node(self, **options: object) -> subprocess.Popen[bytes]:
        """A node that joins; `options` of `ray start`, with `_` for `-`. Its session is its own, as
        on a machine of its own: a node that goes takes its session's working directories along.
        """
        given = {name.replace("_", "-"): value for name, value in options.items()}
        session = tempfile.mkdtemp(prefix="n", dir=self.folder)
        node = self._start([], {"address": self.gcs, "temp-dir": session} | given)
        self.nodes.append(node)
        return node

    def _start(self, kind: list[str], options: Mapping[str, object]) -> subprocess.Popen[bytes]:
        given = _free_ports(NODE_PORTS) | dict(options)
        command = [str(BIN / "ray"), "start", *kind, "--block"]
        return subprocess.Popen(
            command + [f"--{name}={value}" for name, value in given.items()],
            env=self._cluster,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def get(self, path: str) -> Any:
        header = {"Authorization": f"Bearer {self.token}"}
        return requests.get(self.address + path, headers=header, timeout=60)

    def answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return bool(self.get("/api/jobs/").status_code == 200)
        except requests.RequestException:
            return False

    def dra(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            env=self.inside | environment,
            capture_output=True,
            text=True,
            timeout=JOB_S,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command(arguments),
            env=self.inside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "dra_ray", *arguments, "--address", self.address]

    def living(self) -> list[str]:
        """Classes of the actors that live and are not the cluster's own."""
        listed = self.get("/api/v0/actors?limit=1000").json()["data"]["result"]["result"]
        return [
            actor["class_name"]
            for actor in listed
            if actor["state"] != "DEAD" and actor["class_name"] not in LASTING
        ]


@contextmanager
def started(cpus: int = 4, more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """A head that answers; it and all that joined it are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dra-head-", dir="/tmp"))  # sockets' paths are short
    head = Head(folder, cpus, more)
    try:
        until(head.answers, START_S, "the head")
        yield head
    finally:
        for node in head.nodes:
            if node.poll() is None:
                lose(node)  # asked to end, it would wait for its work
        if head.process.poll() is None:  # nobody has lost it
            os.killpg(head.process.pid, signal.SIGTERM)
            try:
                head.process.wait(60)
            except subprocess.TimeoutExpired:
                lose(head.process)
        shutil.rmtree(folder, ignore_errors=True)


def lose(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a node and every process on it, as when a machine goes."""
    family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    node.wait()


def drivers(name: str) -> list[int]:
    """Process ids of the drivers of the run's jobs, which Ray starts through a shell."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if name in words and SCRIPTS & set(words):
            found.append(int(process.pid))
    return found


def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    assert cluster.wait_until(lambda: bool(condition()), timeout_s), f"waited in vain for {what}"


def _free_ports(names: tuple[str, ...]) -> dict[str, int]:
    sockets = [socket.socket() for _ in names]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(names, ports, strict=True))
