"""Prometheus and Grafana for the metrics of `config.metrics`: scrape configuration, alert rules and
dashboards, and a Prometheus for the clusters of this machine.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import yaml

from dra_ray import cluster
from dra_ray.errors import ConfigError, DraError, RunError
from dra_ray.storage import Store

FOLDER = "dra_ray.dashboards"
CONFIG, RULES = "prometheus.yml", "rules/alerts.yml"
PORT = 9090
TARGETS = "prom_metrics_service_discovery.json"  # Ray's, in the folder of each session
EVERYWHERE = ("44217", "44227")  # ports that every cluster names, whoever has them
LOOK_S, READY_S, ANSWER_S = 5.0, 120.0, 0.5


class Server:
    """A Prometheus that runs."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Store) -> None:
        self._process, self.url, self._log = process, url, log

    def wait(self) -> None:
        """Until it ends, which it does not by itself: then `RunError`."""
        self._process.wait()
        raise self.ended()

    def is_ready(self) -> bool:
        """Raises `RunError` where it has ended."""
        if self._process.poll() is not None:
            raise self.ended()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as reply:
                return int(reply.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def ended(self) -> RunError:
        lines = self._log.read_text().strip().splitlines() or ["it said nothing"]
        return RunError(f"Prometheus ended ({lines[-1]}); mend that, or give another --port")


@contextlib.contextmanager
def prometheus(
    port: int = PORT, binary: str | None = None, ray_folders: Sequence[str] | None = None
) -> Iterator[Server]:
    """A Prometheus on the loopback interface for the length of a `with` block, with our rules; it
    scrapes every Ray cluster of this machine, also those that start later, and leaves no file.

    Args:
        port: where it answers.
        binary: path of Prometheus; default: the one on the PATH.
        ray_folders: where clusters keep their sessions; default: Ray's folder and our own.

    Raises `ConfigError` where there is no Prometheus or the port is taken, `RunError` where it
    does not start.
    """
    binary = _found(binary)
    _require_free(port)
    folders = cluster.ray_folders() if ray_folders is None else ray_folders
    with tempfile.TemporaryDirectory(prefix="dra-prometheus-") as folder:
        there = Store(folder)
        _write_config(there)
        with _looking_for_clusters(there / "targets.json", folders):
            log = there / "prometheus.log"
            log.write_text("")
            with _running(
                [
                    binary,
                    f"--config.file={folder}/{CONFIG}",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
                log,
            ) as process:
                server = Server(process, f"http://127.0.0.1:{port}", log)
                if not cluster.wait_until(server.is_ready, READY_S):
                    raise RunError(
                        f"Prometheus is not ready after {READY_S:g} s; start it again when the "
                        "machine is less busy"
                    )
                yield server


def _found(binary: str | None) -> str:
    path = shutil.which(binary or "prometheus")
    if path is None and binary:
        raise ConfigError(f"--prometheus {binary}: is no program; give the path of Prometheus")
    if path is None:
        raise ConfigError(
            "there is no Prometheus on the PATH; install one (Debian: apt-get install prometheus) "
            "or give its path by --prometheus"
        )
    return path


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(
                f"--port {port}: another program listens there; give a free port"
            ) from None


def text(name: str) -> str:
    """A file of this folder."""
    return resources.files(FOLDER).joinpath(name).read_text()


def _write_config(folder: Store) -> None:
    """Our configuration, with targets and rules in this folder."""
    settings: dict[str, Any] = yaml.safe_load(text(CONFIG))
    settings["rule_files"] = [f"{folder}/{RULES}"]
    for part in settings["scrape_configs"]:
        part["file_sd_configs"] = [
            {"files": [f"{folder}/targets.json"], "refresh_interval": f"{LOOK_S:g}s"}
        ]
    (folder / CONFIG).write_text(yaml.safe_dump(settings))
    (folder / RULES).write_text(text(RULES))


@contextlib.contextmanager
def _running(command: list[str], log: Store) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C reaches us alone, and we end it."""
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" > "$0" 2>&1', log.uri, *command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- which clusters there are ----------------------------------------------------------------------
def targets(ray_folders: Sequence[str]) -> list[str]:
    """host:port of everything to scrape: of each session of Ray whose processes answer, what its
    service discovery names. The folders also keep the sessions that have ended.
    """
    found: set[str] = set()
    for folder in map(Store, ray_folders):
        for name in folder.names():
            if not name.startswith("session_2"):  # session_latest is one of the others
                continue
            with contextlib.suppress(DraError, KeyError, TypeError):  # one that comes or goes
                parts = (folder / name / TARGETS).read_json()
                named = [target for part in parts for target in part["targets"]]
                own = [one for one in named if not one.endswith(EVERYWHERE)]
                if any(map(_answers, own)):
                    found.update(named)
    return sorted(found)


def _answers(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), ANSWER_S):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _looking_for_clusters(file: Store, ray_folders: Sequence[str]) -> Iterator[None]:
    """Meanwhile, keep `file` up to date."""

    def look() -> None:
        file.write_json([{"targets": targets(ray_folders)}])

    def look_again() -> None:
        with contextlib.suppress(DraError):
            look()

    look()
    with cluster.repeating(look_again, LOOK_S):
        yield
