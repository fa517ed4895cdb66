"""No secret inside a URI is stored or shown, and no name leaves its storage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dra_ray import config, runs
from dra_ray.errors import ConfigError, DraError, StorageError
from dra_ray.report.collect import _read_object
from dra_ray.storage import Store, folder_name, masked

SECRET = "SeCrEt9"
PLANTED = [
    f"s3://AKIA:{SECRET}@bucket/x",
    f"s3://AKIA:{SECRET}/a+b@bucket/x",
    f"s3://AKIA:{SECRET} 2@bucket/x",
    f"S3://AKIA:{SECRET}@bucket",
    f"s3:/AKIA:{SECRET}@bucket/x",
    f"https://user:{SECRET}@host/x",
    f"https://user:a@{SECRET}@host/x",
    f"https://{SECRET}@host/x",
    f"https://:{SECRET}@host",
    f"simplecache::https://user:{SECRET}@host/x",
    f"https://host/x.npz?X-Amz-Signature={SECRET}",
    f"https://host/x.npz?X%2DAmz%2DSecurity-Token={SECRET}",
    f"https://host/x.npz?AWSAccessKeyId={SECRET}&Expires=3",
    f"https://host/x.npz?a=1&Signature={SECRET}",
    f"https://host/x.npz?X-Goog-Credential={SECRET}",
    f"https://host/x.npz?sp=r&sig=a%2B{SECRET}",
    f"https://host/x.npz?token={SECRET}",
    f"https://host/x.npz?api_key={SECRET}",
    f"https://host/x.npz#access_token={SECRET}",
    f"abfs://container@account.dfs.core.windows.net/x?sig={SECRET}",
    f"https://host/x?pass={SECRET}",
    f"https://host/x?st=1&hmac={SECRET}",
    f"https://host/x?sas={SECRET}",
    f"https://host/x?ak=1&sk={SECRET}",
    f"https://host/x%3Fa=1%26sig%3D{SECRET}",
    f"https://host/x?token%3D{SECRET}",
]
PLAIN = [
    "s3://bucket/a@2x",
    "s3://bucket/a:b@c",
    "http://localhost:9000/a@b",
    "abfs://container@account.dfs.core.windows.net/x",
    "sftp://me@host/x",
    "/a:b@c",
    "a?token=b",
    "https://host/x?download=true",
    "https://host/x?pages=3&mask=1&task=2&keypoints=4",
    "https://host/a%3Db%20c",
    "memory://x?y",
    "https://***@host/x?sig=***",
]
FIELDS = {
    "data.uri": config.Experiment,
    "synthetic.uri": config.Experiment,
    "teacher.uri": config.Experiment,
    "model.weights": config.Experiment,
    "base.data.uri": config.Sweep,
    "teacher": config.Synthesis,
}
TREES = {config.Sweep: {"space": {"align.weight": [0, 1]}}}


@pytest.mark.parametrize("uri", PLANTED)
def test_credentials_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(StorageError, match="holds credentials.*environment") as caught:
        Store(uri)
    lines = [str(caught.value)]
    for field, kind in FIELDS.items():
        whole = config.validate(kind, TREES.get(kind, {}), "test")
        with pytest.raises(ConfigError, match=f"{field}.*holds credentials") as refused:
            config.override(whole, {field: uri})
        lines.append(str(refused.value))
    for space in ({"data.uri": [None, uri]}, {uri: [1]}):
        with pytest.raises(ConfigError, match="space.*holds credentials") as refused:
            config.validate(config.Sweep, {"space": space}, "test")
        lines.append(str(refused.value))
    assert not [line for line in lines if SECRET in line or "\n" in line]
    assert " " in uri or SECRET not in masked(f"a text with '{uri}' in it, and more")
    assert masked(masked(uri)) == masked(uri)


@pytest.mark.parametrize("uri", ["", " ", "\n"])
def test_an_empty_uri_is_no_folder(uri: str) -> None:
    """`/NAME` would be below it."""
    with pytest.raises(StorageError, match="is empty; give a folder"):
        Store(uri)


@pytest.mark.parametrize("uri", PLAIN)
def test_other_uris_stay_as_they_are(uri: str) -> None:
    assert str(Store(uri)) == masked(uri) == uri
    assert config.validate(config.Data, {"uri": uri}, "test").uri == uri


def test_a_wrong_type_does_not_show_them() -> None:
    with pytest.raises(ConfigError, match=r"data\.uri") as caught:
        config.override(config.Experiment(), {"data.uri": [PLANTED[0]]})
    assert SECRET not in str(caught.value)


def test_a_manifest_of_an_earlier_version_is_masked(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    manifest = {"kind": "train", "config": {"data": {"uri": PLANTED[0]}}, "notes": [PLANTED[10]]}
    (run / "manifest.json").write_json(manifest)
    manifest_record = runs.read_manifest(run)
    assert manifest_record
    for read in (manifest_record.on_disk(), _read_object(run / "manifest.json")):
        assert SECRET not in json.dumps(read)
        assert read["config"]["data"]["uri"] == "s3://***@bucket/x"
    runs.update_manifest(run, runs.Facts(status="done"))
    assert SECRET not in (run / "manifest.json").read_text()


def _commands(secret_uri: str, folder: str) -> list[list[str]]:
    sets = [["--set", f"{field}={secret_uri}"] for field in FIELDS if "." in field]
    commands = [["train", "digits-dm-at", *part] for part in sets if "base." not in part[1]]
    commands += [
        [command, secret_uri] for command in ("train", "evaluate", "report", "sweep", "plan")
    ]
    commands += [
        ["train", "digits-dm-at", "--storage", secret_uri],
        ["sweep", "digits-sweep", "--set", f"base.data.uri={secret_uri}"],
        ["synthesize", "digits-synthetic", "--set", f"teacher={secret_uri}"],
        ["teacher", "train", "digits-edm", "--set", f"data.uri={secret_uri}"],
        ["teacher", "probe", secret_uri],
        ["plan", "digits-dm-at", "--set", f"model.weights={secret_uri}"],
        ["evaluate", "timm/resnet18", "--weights", secret_uri, "--to", "out"],
        ["recipes", "--json", secret_uri],
    ]
    return commands


# all in one process, since each start takes seconds
COMMAND = {"module": "main", "call": "main.main()"}
JOB = {"module": "job", "call": "job.main(None, lambda run, progress: {})"}
ONE_PROCESS = """
import json, sys
from dra_ray.cli import {module}
for arguments in json.load(sys.stdin):
    sys.argv = ["dra", *arguments]
    try:
        {call}
    except SystemExit as end:
        print(end.code, arguments[0], flush=True)
"""


@pytest.mark.parametrize("uri", [PLANTED[1], PLANTED[10]])
def test_no_command_shows_or_keeps_them(tmp_path: Path, uri: str) -> None:
    commands = _commands(uri, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS.format(**COMMAND)],
        input=json.dumps(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    codes = [line.split()[0] for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ", "2 ")]
    assert codes == ["2"] * len(commands), done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not [file for file in tmp_path.rglob("*") if SECRET in file.name]
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in kept if SECRET.encode() in file.read_bytes()]


def test_a_job_refuses_them_too() -> None:
    given = {
        "holds credentials": ["--storage", PLANTED[0], "--name", "a"],
        "it is a path": ["--storage", "/tmp", "--name", "../a"],
        "leaves the storage": ["--storage", "/tmp", "--name", ".."],
    }
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS.format(**JOB)],
        input=json.dumps(list(given.values())),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["2"] * len(given)
    for words, line in zip(given, done.stderr.splitlines(), strict=True):
        assert words in line
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["a", "digits-dra", "Lauf 2", "größe", "a.b", "..a", "x:y", "n" * 200]
)
def test_names_of_folders(name: str) -> None:
    assert folder_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "...", "../a", "a/../b", "a/b", "/etc/x", "a\\b", "a\nb", "a\x00b",
        "a\x1b[31m", "a\u202eb", "a\u200bb", " a", "a ", "a?b", "a#b", "a*", "a::b", "s3://b/x",
        "%2e%2e", "n" * 201, "ü" * 101, "a\udcffb", "n" * 100_000,
    ],
)  # fmt: skip
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name") as caught:
        folder_name(name)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 250
    assert isinstance(caught.value, DraError)
    line.encode()  # lone surrogates could not be printed


@pytest.mark.parametrize("beside", range(0, 100, 7))
def test_what_is_cut_was_masked_before(beside: int) -> None:
    """A login whose '@' lies beyond what is shown could not be told as one any more."""
    uri = f"s3://AKIA:{SECRET}{'x' * beside}{SECRET}@bucket"
    for value in (uri, [uri], {uri: uri}):
        with pytest.raises(ConfigError) as caught:
            config.override(config.Experiment(), {"seed": value})
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        config.override(config.Experiment(), {f"pool.labels.{uri}": 5})
    assert SECRET not in str(caught.value)
