"""What is handed to a cluster: a job's id, files and command, from what was asked for. No Ray here.

The config is resolved where it is submitted and travels as one file, so that a local YAML and what
it extends need not be on the cluster. Nothing of the environment travels: nodes have their own
credentials.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import os
import re
import sysconfig
import urllib.parse
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any, Literal

from dra_ray import __version__, config
from dra_ray.config import networks
from dra_ray.errors import ConfigError, StorageError, nearest
from dra_ray.storage import Store

Code = Literal["installed", "tree"]
# kind -> its script in jobs/ and the config that it reads; None where it reads none
KINDS: Mapping[str, tuple[str, type[config.Frozen] | None]] = {
    "train": ("train.py", config.Experiment),
    "sweep": ("sweep.py", config.Sweep),
    "evaluate": ("evaluate.py", None),
    "synthesize": ("synthesize.py", config.Synthesis),
    "canonical": ("canonical.py", config.Canonical),
    "analyse": ("analyse.py", config.Analysis),
    "train-teacher": ("train_teacher.py", config.TeacherTraining),
}
CONFIG = "config.yaml"
SHARED = os.path.join("share", "dra-ray", "jobs")  # where an installed package has the scripts
# read by the job: which version submitted it
SUBMITTED_BY = "DRA_RAY_SUBMITTED_BY"
# from SIGTERM to SIGKILL, of a job that is stopped: the step under way, its checkpoint and the pool
# have to end; Ray's own is 3 s
STOP_WAIT_S = 90
_PATHS = (
    "teacher",
    "teacher.uri",
    "data.uri",
    "synthetic.uri",
    "canonical.uri",
    "model.weights",
    "evaluation.corruptions",
    "judge",
    "search.warm_start",
    "prices",
)
_NO_PATHS = ("generated",)  # of evaluation.corruptions
_ID_CHARACTERS = 40  # of a run's name in a job's id


@dataclasses.dataclass(frozen=True)
class Work:
    """One workload for one run's folder.

    Attributes:
        storage, name: the run's folder, as nodes reach it.
        tree: its whole config as plain data, URIs as nodes reach them; None for kinds that read
            none.
    """

    kind: str
    storage: str
    name: str
    tree: Mapping[str, Any] | None

    @property
    def run(self) -> Store:
        return Store(self.storage) / self.name

    @property
    def base_id(self) -> str:
        """The same for whoever submits the same work: kind, name, and a digest of the kind, of what
        the result depends on, and of the run's folder.
        """
        digest = config.digest_of(self.tree) if self.tree else ""
        parts = _sha256([self.kind, digest, self.run.uri])
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.name)[:_ID_CHARACTERS]
        return f"{self.kind}-{name}-{parts[:12]}"

    @property
    def exact(self) -> str:
        """As `base_id`, but of every field, also of those that change no result, such as a
        budget.
        """
        return _sha256(dict(self.tree or {}))

    def files(self) -> dict[str, bytes]:
        """The job's working directory."""
        name = KINDS[self.kind][0]
        found = {name: script(name).read_bytes()}
        return found | ({CONFIG: config.to_yaml(self.tree).encode()} if self.tree else {})

    def command(self) -> list[str]:
        given = [CONFIG] if self.tree else []
        where = ["--storage", self.storage, "--name", self.name]
        return ["python", KINDS[self.kind][0], *given, *where]

    def environment(self) -> dict[str, str]:
        """All that a job gets of it; the dashboard shows it to whoever may look there."""
        return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), SUBMITTED_BY: __version__}

    def labels(self) -> dict[str, str]:
        """A job's metadata."""
        return {
            "dra_kind": self.kind,
            "dra_name": self.name,
            "dra_run": self.run.uri,
            "dra_exact": self.exact,
            "dra_version": __version__,
        }


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"KIND '{kind[:40]}': {nearest(kind[:40], KINDS)}")


def script(name: str) -> Store:
    """An entry point of jobs/: beside the package in a checkout, else where the installation put
    it; `StorageError` where neither has it.
    """
    beside = Store(str(resources.files("dra_ray"))).resolved().uri
    places = [os.path.join(os.path.dirname(beside), "jobs", name)]
    ending = os.path.join(SHARED, name)
    try:
        listed = metadata.files("dra-ray") or []
        places += [str(file.locate()) for file in listed if str(file).endswith(ending)]
    except metadata.PackageNotFoundError:
        pass
    places.append(os.path.join(sysconfig.get_path("data"), ending))
    for place in places:
        if os.path.exists(place):
            return Store(place)
    raise StorageError(
        f"the script jobs/{name} is neither beside the package nor installed with it; install "
        "dra-ray again"
    )


# -- places ----------------------------------------------------------------------------------------
def is_this_machine(address: str) -> bool:
    """Whether a URL leads to the loopback interface."""
    host = urllib.parse.urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def placed(uri: str, address: str, what: str) -> str:
    """A URI as the nodes of the cluster at `address` reach it; `ConfigError`, which names it as
    `what`, for a path of this machine where the cluster is elsewhere.
    """
    if not Store(uri).is_local:
        return uri
    if is_this_machine(address):
        return Store(uri).resolved().uri
    if uri.startswith("file:///"):
        return uri
    raise ConfigError(
        f"{what} '{uri}' is a path of this machine, which the nodes of '{address}' do not reach; "
        "give a URI such as s3://bucket/runs, or file:///mnt/... for a disk that all of them mount"
    )


def located(settings: config.Frozen, address: str, code: Code) -> dict[str, Any]:
    """A config as plain data, with its paths as nodes reach them. A teacher of the package is named
    as such: its folder is another one there.

    Raises:
        ConfigError: a field holds a path of this machine; or, with the working tree, a teacher of
            the package, which lies in another folder in every upload, so that its runs could not be
            resumed.
    """
    tree: dict[str, Any] = _located("", settings.model_dump(mode="json"), address, code)
    return tree


def _located(field: str, value: Any, address: str, code: Code) -> Any:
    if isinstance(value, Mapping):
        inner = ((key, f"{field}.{key}" if field else key) for key in value)
        return {key: _located(path, value[key], address, code) for key, path in inner}
    if isinstance(value, list):  # an axis of a sweep, or points of its search
        return [_located(field, each, address, code) for each in value]
    if not isinstance(value, str) or value in _NO_PATHS:
        return value
    if field == "models":  # of an analysis
        if value.startswith(networks.ROBUSTBENCH):
            place = value.removeprefix(networks.ROBUSTBENCH)
            return networks.ROBUSTBENCH + _path(field, place, address, code)
        return _path(field, value, address, code) if networks.is_place(value) else value
    if _is_one_of(field, ("model.name",)):
        encoder = networks.teacher_of(value)
        return networks.DIFFUSION + _path(field, encoder, address, code) if encoder else value
    is_path = field == "weights" or _is_one_of(field, _PATHS)  # of an analysis
    return _path(field, value, address, code) if is_path else value


def _is_one_of(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.endswith(f".{name}") for name in names)


def _path(field: str, uri: str, address: str, code: Code) -> str:
    folder = str(resources.files("dra_ray.recipes") / "teachers") + os.sep
    if not uri.startswith(("package:", folder)):
        return placed(uri, address, f"{field}:")
    name = uri.removeprefix("package:").removeprefix(folder)
    if code == "tree":
        raise ConfigError(
            f"{field}=package:{name} lies inside the code, which is unpacked to another folder for "
            "every upload; copy that teacher's folder to your storage and give its URI, or use "
            "--code installed"
        )
    return f"package:{name}"
