"""A cluster of our own is for its own processes: no door without the token, no secret in files or
on the dashboard.
"""

from __future__ import annotations

import base64
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from dra_ray import cluster, config, report, runs
from dra_ray.config.catalogue import Effort
from dra_ray.storage import Store
from dra_ray.workloads import evaluate, sweep, synthesize, train
from tests.cluster.small import experiment, processes, submitted

SECRETS = {
    "AWS_ACCESS_KEY_ID": "PLANTEDKEYID" + "0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-" + "0123456789",
    "AWS_SESSION_TOKEN": "planted-session-" + "0123456789",
    "AWS_SECURITY_TOKEN": "planted-security-" + "0123456789",
    "HF_TOKEN": "hf_planted" + "0123456789",
    "WANDB_API_KEY": "planted-wandb-" + "0123456789",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-" + "0123456789",
    "GOOGLE_APPLICATION_CREDENTIALS_JSON": "planted-google-" + "0123456789",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=planted" + "0123456789",
    "RAY_STRANGERS_SECRET": "planted-ray-" + "0123456789",
    "DATABASE_PASSWORD": "planted-database-" + "0123456789",
}
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("inside", ray.get(ray.remote(lambda: 40 + 2).remote()), ray.nodes())
"""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # where the cluster is; not a secret
# the dashboard's page itself is a static file, for anyone; all that it shows comes from the rest
PATHS = (
    "/api/version",
    "/nodes?view=summary",
    "/api/v0/actors?detail=1",
    "/api/jobs/",
    "/logs",
    "/get_or_create_runtime_env",
    "/metrics",
)


# -- doors -----------------------------------------------------------------------------------------
def listening() -> dict[int, str]:
    """Port -> address, as /proc/net shows it, of every TCP socket on which one of our processes
    listens.
    """
    sockets: dict[str, tuple[int, str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = (int(port, 16), address)
    ours = {}
    for pid in processes():
        try:
            links = [os.readlink(link) for link in Path("/proc", str(pid), "fd").iterdir()]
        except OSError:
            continue
        ours |= {sockets[link][0]: sockets[link][1] for link in links if link in sockets}
    return ours


@pytest.fixture
def served(ray_cluster: Any) -> Any:
    """The cluster with Serve's processes up, as a pool needs them."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    return ray_cluster


def test_every_socket_is_bound_to_loopback(served: Any) -> None:
    doors = listening()
    assert len(doors) >= 8  # store, raylet, dashboard, agents, metrics, workers
    # 127.0.0.1 as tcp, or mapped or ::1 as tcp6
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    assert {port: address for port, address in doors.items() if address not in loopback} == {}


STRANGERS = (
    {},
    ON_LOOPBACK,
    ON_LOOPBACK | {"RAY_AUTH_MODE": "disabled"},
    ON_LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
)


def test_a_stranger_runs_nothing(ray_cluster: Any, tmp_path: Path) -> None:
    """With an empty environment, knowing where the cluster is, without a token, with a wrong one;
    all at the same time.
    """
    known = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-c", STRANGER, ray_cluster.address_info["address"]]
    strangers = [
        subprocess.Popen(
            command, env=known | more, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for more in STRANGERS
    ]
    for stranger in strangers:
        try:
            said, _ = stranger.communicate(timeout=20)
            assert stranger.returncode != 0
        except subprocess.TimeoutExpired:  # it asks again and again
            stranger.kill()
            said, _ = stranger.communicate()
        assert "inside" not in said
    assert not (tmp_path / ".ray").exists()


def test_no_port_tells_a_stranger_anything_but_metrics(served: Any) -> None:
    for port in listening():
        for path in PATHS:
            for headers in ({}, {"Authorization": "Bearer " + "f" * 64}):
                status, body = get(port, path, headers)
                numbers_only = body.startswith(b"#") or not body
                assert status != 200 or numbers_only, (port, path, body[:200])


def test_the_token_is_known_to_nobody_else(ray_cluster: Any) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    assert (
        get(dashboard(ray_cluster), "/api/version", {"Authorization": f"Bearer {token}"})[0] == 200
    )
    assert not [path for path in files(session(ray_cluster)) if token.encode() in content(path)]
    command_lines = [Path("/proc", str(pid), "cmdline") for pid in processes()]
    assert not [
        line for line in command_lines if line.exists() and token.encode() in line.read_bytes()
    ]
    folders = session(ray_cluster).parents
    assert any(
        folder.stat().st_mode & 0o077 == 0 and folder.stat().st_uid == os.getuid()
        for folder in folders
    ), "the session is open to other users"


def get(port: int, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """(status, first bytes) of a GET; status 0 where it is not HTTP."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=3
        ) as reply:
            return reply.status, reply.read(2**22)
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (
        OSError,
        ValueError,
        urllib.error.URLError,
        Exception,
    ) as error:  # gRPC answers in its own protocol
        return 0, repr(error).encode()


def dashboard(context: Any) -> int:
    return int(context.dashboard_url.rpartition(":")[2])


def session(context: Any) -> Path:
    return Path(context.address_info["session_dir"])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def content(path: Path) -> bytes:
    """What a file holds; nothing where it went away since it was listed."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def forms(value: str) -> list[bytes]:
    """A text as it is, as URIs have it, and as it lies in base64, whatever comes before it."""
    raw = value.encode()
    coded = [
        base64.b64encode(bytes(shift) + raw)[(8 * shift + 5) // 6 : 8 * (shift + len(raw)) // 6]
        for shift in range(3)
    ]
    return [raw, urllib.parse.quote(value, safe="").encode(), *coded]


def temporary(session: Path) -> Path:
    """The folder for temporary files of this process's cluster."""
    return session.parents[1] / f"tmp-{os.getpid()}"


# -- secrets ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def keys(ray_cluster: Any) -> Iterator[None]:
    """A user who has keys in the environment."""
    with pytest.MonkeyPatch.context() as user:
        for name, value in SECRETS.items():
            user.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def swept(keys: None, teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep, and so two training runs, one of which diverges."""
    small = {"optim__epochs": 2, "resources__metrics_steps": 5, "data__test_images": 40}
    base = experiment(teacher, threat__steps=1, selection__steps=1, **small)
    asha = config.Asha(grace_epochs=1, reduction_factor=2, max_concurrent=2)
    space = {"align.weight": [0.0], "optim.lr": [0.1, 1e12]}
    run = Store(str(tmp_path_factory.mktemp("swept"))) / "sweep"
    sweep.run(config.Sweep(base=base, space=space, asha=asha), run)
    return run


@pytest.fixture(scope="module")
def trained(keys: None, teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of its own with a pool, whose driver and workers Ray Train starts, and its report."""
    small = {"optim__epochs": 1, "data__test_images": 40}
    settings = experiment(teacher, threat__steps=1, selection__steps=1, **small)
    run = Store(str(tmp_path_factory.mktemp("trained"))) / "run"
    train.fit(settings, run)
    report.write(run)
    return run


@pytest.fixture(scope="module")
def evaluated(swept: Store) -> Store:
    """An evaluation of the trial that has weights, and the sweep's report."""
    manifest = runs.read_manifest(swept)
    assert manifest
    run = swept / "trials" / manifest.finals["baseline"]
    evaluate.evaluate(run, effort=Effort(apgd_steps=1, fab_steps=1, square_queries=2))
    report.write(swept)
    return swept


@pytest.fixture(scope="module")
def synthesized(keys: None, teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    settings = config.Synthesis(teacher=teacher.uri, images=40, steps=2, batch=20, shard_images=20)
    images = Store(str(tmp_path_factory.mktemp("synthesized"))) / "images"
    synthesize.run(settings, images)
    return images


@pytest.fixture(scope="module")
def jobs_run(ray_cluster: Any, teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Images that a Ray job made, whose entry point takes the keys from a file of the user's."""
    folder = tmp_path_factory.mktemp("job")
    exports = [f"export {name}={value}" for name, value in SECRETS.items()]
    (folder / "keys").write_text("\n".join(exports))
    (folder / "mine.yaml").write_text(
        "kind: synthesis\nimages: 40\nshard_images: 20\nbatch: 20\nsteps: 2\n"
        f"teacher: {teacher.uri}\n"
    )
    run = Store(str(folder / "runs")) / "images"
    script = str(Path(__file__).parents[2] / "jobs" / "synthesize.py")
    arguments = [script, str(folder / "mine.yaml"), "--storage", f"{folder}/runs", "--name"]
    command = shlex.join([sys.executable, *arguments, "images"])
    where = f"export RAY_ADDRESS={ray_cluster.address_info['gcs_address']}"
    client = JobSubmissionClient(f"http://{ray_cluster.dashboard_url}")
    entrypoint = f"{where}; . {folder}/keys; {command}"
    job = submitted(client, entrypoint)
    assert cluster.wait_until(lambda: client.get_job_status(job).is_terminal(), 120)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    return run


LOGIN = SECRETS["AWS_SECRET_ACCESS_KEY"]
NOWHERE = "s3://nowhere/runs"
FAILING = (
    f"train digits-dm-at --storage s3://me:{LOGIN}@bucket/runs",
    f"train digits-dm-at --set data.uri=https://me:{LOGIN}@host/images.npz",
    f"report s3://bucket/run?secret={LOGIN}",
    f"submit train digits-dm-at --address http://me:{LOGIN}@127.0.0.1:1",
    "submit train digits-dm-at --address http://127.0.0.1:1",
    f"train digits-dm-at --storage {NOWHERE}",
    f"runs {NOWHERE}",
)


@pytest.fixture(scope="module")
def told(trained: Store) -> Store:
    """What a run is packed into, and what commands say that fail, also for want of a store."""
    folder = Path(trained.uri) / "told"
    folder.mkdir()
    closed = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "RAY_ADDRESS": ""}
    packing = f"bundle {trained.uri} --to {folder}/run.tar"
    for number, words in enumerate((packing, "plan digits-dm-at", *FAILING)):
        done = subprocess.run(
            [sys.executable, "-m", "dra_ray", *shlex.split(words)],
            env=os.environ | closed,
            cwd=folder,
            capture_output=True,
            check=False,
        )
        assert (done.returncode == 0) == (words not in FAILING), (words, done.stderr)
        (folder / f"{number}.txt").write_bytes(done.stdout + done.stderr)
    assert (folder / "run.tar").stat().st_size > 10_000
    return trained


@pytest.mark.parametrize(
    "work",
    [
        "trained",
        "swept",
        "evaluated",
        "synthesized",
        "jobs_run",
        pytest.param("told", marks=pytest.mark.slow),
    ],
)
def test_no_key_of_the_environment_is_in_a_file_or_on_the_dashboard(
    ray_cluster: Any, work: str, request: pytest.FixtureRequest
) -> None:
    run: Store = request.getfixturevalue(work)
    values = [form for value in SECRETS.values() for form in forms(value)]
    folder = session(ray_cluster)
    written = files(folder) + files(temporary(folder)) + files(Path(run.uri))
    assert len(written) > 20
    assert not [path for path in written if any(value in content(path) for value in values)]
    command_lines = [content(Path("/proc", str(pid), "cmdline")) for pid in processes()]
    assert not [line for line in command_lines if any(value in line for value in values)]
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    for table in (
        "actors",
        "tasks",
        "runtime_envs",
        "workers",
        "jobs",
        "nodes",
        "placement_groups",
    ):
        status, body = get(dashboard(ray_cluster), f"/api/v0/{table}?detail=1&limit=10000", headers)
        assert status == 200, table
        assert not [value for value in values if value in body], table
    for path in ("/api/jobs/", "/logical/actors", "/nodes?view=summary"):
        _, body = get(dashboard(ray_cluster), path, headers)
        assert body, path
        assert not [value for value in values if value in body], path


def test_a_trial_that_diverges_ends_as_failed_and_the_sweep_goes_on(swept: Store) -> None:
    manifest = (swept / "manifest.json").read_json()
    rates = {trial: fields["optim.lr"] for trial, fields in manifest["trials"].items()}
    sound, diverged = (
        next(trial for trial, rate in rates.items() if rate == value) for value in (0.1, 1e12)
    )
    assert manifest["status"] == "done"
    assert manifest["finals"] == {"baseline": sound}
    last = {row["trial"]: row for row in (swept / "rungs.jsonl").read_jsonl()}
    assert last[sound]["decision"] == "done"
    assert last[diverged]["decision"] == "failed"
    assert "the loss is" in last[diverged]["reason"]
    assert "start the same command again" not in last[diverged]["reason"]
    assert ray.is_initialized()
