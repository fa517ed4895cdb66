"""Sizes before contents: what would fill memory or count for hours is one line at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dra_ray import config
from dra_ray.errors import ConfigError
from dra_ray.sweeps import spaces

SECONDS, MEGABYTES = 3, 200


class Ended(NamedTuple):
    code: int
    said: str
    cpu_s: float
    megabytes: float


# a child's peak begins with that of the process that starts it, so a small one stands between
MEASURE = """
import os, sys
child = os.posix_spawn(sys.executable, [sys.executable, "-m", "dra_ray", *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
"""


def dra(*arguments: str) -> Ended:
    """A command to its end, with the processor time and the memory that it alone has taken: on a
    busy machine a clock on the wall says nothing.
    """
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=120
    )
    code, cpu_s, megabytes = ended.stdout.splitlines()[-1].split()
    return Ended(int(code), ended.stderr, float(cpu_s), float(megabytes))


def laughs(levels: int = 9, width: int = 9) -> str:
    """Each line is a list of `width` aliases of the line before (width ** levels in all)."""
    lines = ["l0: &l0 [lol]"]
    lines += [
        f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * width)}]"
        for level in range(1, levels + 1)
    ]
    return "\n".join(lines)


SPACE = "kind: sweep\nbase: digits-dm-at\nspace:\n" + "\n".join(
    f"  {field}: [{', '.join(f'0.{digit}' for digit in range(1, 11))}]"
    for field in (
        "align.weight", "align.sigma", "optim.lr", "loss.beta", "loss.alpha", "optim.lr_end", "seed"
    )
)  # fmt: skip

TEXTS: dict[str, tuple[str, str]] = {
    "laughs": (laughs(), "more than 1,000,000 characters"),
    "laughs of mappings": (
        "a0: &a0 {k: lol}\n"
        + "\n".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 25)),
        "more than 1,000,000 characters",
    ),
    "laughs of merges": (
        "a0: &a0 {k0: lol}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}" for i in range(1, 30)),
        "more than 1,000,000 characters",
    ),
    "long text, often": (
        f"a: &a {'x' * 50_000}\nspace: {{align.weight: [{', '.join(['*a'] * 9_000)}]}}",
        "more than 1,000,000 characters",
    ),
    "alias of itself": ("a: &a [*a]", "stands for itself"),
    "large": ("seed: 1\n" + "# nothing\n" * 3_000_000, "more than 100,000 bytes"),
    "deep lists": ("a: " + "[" * 40_000, "nested more than 32 deep"),
    "deep mappings": ("{a: " * 20_000, "nested more than 32 deep"),
    "deep blocks": ("- " * 40_000, "nested more than 32 deep"),
    "deep keys": ("? " * 40_000, "nested more than 32 deep"),
    "long integer": (f"seed: {'9' * 90_000}", "90,000 characters"),
    "long integer in base 60": (f"seed: 1{':59' * 30_000}", "characters"),
    "long integer, quoted": (f"seed: '{'9' * 90_000}'", "seed='999"),
    "long hexadecimal": (f"seed: 0x{'f' * 90_000}", "characters"),
    "long float": (f"optim: {{lr: 1.{'9' * 90_000}}}", "characters"),
    "long name": (f"{'x' * 1_000}: 1", "unknown field 'xxx"),
    "long value": (f"optim: {{lr: {'x' * 90_000}}}", "optim.lr='xxx"),
    "wide list": (f"optim: {{lr: [{'1,' * 40_000}1]}}", "optim.lr=[1, 1"),
    "long kind": (f"kind: {'x' * 90_000}", "unknown kind"),
    "long parent": (f"extends: {'x' * 90_000}", "unknown recipe"),
    "large space": (SPACE, "10,000,000 combinations"),
    "epochs": ("optim: {epochs: 1000000000000}", "optim.epochs=1000000000000"),
    "resolution": (
        "data: {name: folder, uri: x, resolution: 1000000000}",
        "data.resolution=1000000000",
    ),
    "workers": ("optim: {batch: 1048576}\nresources: {workers: 1048576}", "resources.workers"),
    "batch": ("optim: {batch: 1000000000000}", "optim.batch=1000000000000"),
    "replicas": ("pool: {max_replicas: 1000000000000}", "pool.max_replicas"),
    "seconds": ("pool: {timeout_s: 1.0e+300}", "pool.timeout_s=1e+300"),
    "seed": ("seed: 100000000000000000000000", "seed=1000"),
    "network": ("model: {name: wrn-100000-1}", "model.name='wrn-100000-1': depth 100000 is above"),
    "wide network": ("model: {name: wrn-28-100000}", "model.name='wrn-28-100000': has 3.6e+15"),
    "both": ("model: {name: relu-wrn-1000-9999}", "parameters, and at most 1e+10"),
    "wider network": ("model: {name: wrn-10-999999999}", "parameters, and at most 1e+10"),
    "name of a network": (f"model: {{name: {'w' * 90_000}}}", "is not known; write wrn-DEPTH"),
    "files": ("kind: synthesis\nimages: 10000000000\n", "10,000,000 files"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_would_not_end_is_refused(what: str, tmp_path: Path) -> None:
    text, words = TEXTS[what]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(str(file))
    message = str(caught.value)
    assert words in message
    assert len(message) < 1500
    assert message.isprintable()


@pytest.mark.parametrize(
    "what",
    [
        "laughs",
        "long text, often",
        "large",
        "deep lists",
        "long integer",
        "large space",
        "network",
    ],
)
def test_a_command_refuses_it_in_seconds_and_megabytes(what: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXTS[what][0])
    ended = dra("plan", str(file))
    assert ended.code == 2, ended
    assert ended.said.count("\n") == 1, ended
    assert TEXTS[what][1] in ended.said
    assert ended.cpu_s < SECONDS
    assert ended.megabytes < MEGABYTES


@pytest.mark.parametrize("what", ["laughs", "deep lists", "long integer", "long text, often"])
def test_an_option_refuses_it_in_seconds_and_megabytes(what: str) -> None:
    text, words = TEXTS[what]
    flow = text if "\n" not in text else f"{{{', '.join(text.splitlines())}}}"
    ended = dra("train", "digits-dm-at", "--set", f"align={flow}")
    assert ended.code == 2, ended
    assert ended.said.count("\n") == 1, ended
    assert words in ended.said or "not valid YAML" in ended.said
    assert len(ended.said) < 1000
    assert ended.cpu_s < SECONDS
    assert ended.megabytes < MEGABYTES


def test_files_that_fan_out_are_refused(tmp_path: Path) -> None:
    """2 parts a file, 2 ** 7 files deep down, or 40 in a row."""
    for level in range(8):
        below = str(tmp_path / f"f{level + 1}.yaml")
        (tmp_path / f"f{level}.yaml").write_text(f"extends: {below}\n")
    (tmp_path / "f8.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="at most 32, of which 8 in a row"):
        config.load(str(tmp_path / "f0.yaml"))
    assert config.load(str(tmp_path / "f3.yaml"), config.Experiment).seed == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["seed=4611686018427387904"],
        ["optim.epochs=100000"],
        ["pool.timeout_s=100000000"],
        ["evaluation.seed=-1"],
    ],
)
def test_what_a_patient_user_sets_is_taken(settings: list[str]) -> None:
    config.load("digits-dm-at", config.Experiment, settings)


def test_anchors_and_merge_keys_of_honest_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "kind: sweep\nbase:\n  data: {name: digits, test_images: 300}\n"
        "  pool: &capacity {cpus_per_replica: 2, resources: {teacher: 1}}\n"
        "  resources: {custom: {<<: {student: 1, spot: 2}, spot: 3}}\n"
        "space: {align.weight: &weights [0, 1], loss.beta: *weights}\n"
    )
    sweep = config.load(str(file), config.Sweep)
    assert sweep.space == {"align.weight": [0, 1], "loss.beta": [0, 1]}
    assert sweep.base.resources.custom == {"student": 1, "spot": 3}


def test_large_spaces_that_fit_are_expanded() -> None:
    sweep = config.validate(
        config.Sweep, {"space": {"seed": list(range(1000))}, "trials": 3}, "test"
    )
    assert len(spaces.experiments(sweep)) == 3


def test_text_of_any_length_is_shown_without_its_secrets_at_once(tmp_path: Path) -> None:
    """Texts that a search would begin again at every letter, in a config and in a manifest."""
    letters, signs = "a" * 45_000, "s3://b?" + "%3F" * 15_000
    file = tmp_path / "mine.yaml"
    file.write_text(f"description: '{letters}'\nmodel: {{weights: '{signs}'}}\n")
    ended = dra("config", str(file))
    assert ended.code == 0, ended.said[:500]
    assert ended.cpu_s < SECONDS
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(
        json.dumps({"kind": "train", "status": "done", "name": letters * 9, "stopped": signs * 9})
    )
    ended = dra("status", str(run))
    assert ended.code == 0, ended.said[:500]
    assert ended.cpu_s < SECONDS
    assert ended.megabytes < MEGABYTES


@pytest.mark.parametrize("size", [2**24, 2**34])
@pytest.mark.parametrize("command", ["status", "report", "train"])
def test_a_manifest_of_any_size_is_refused_at_once(command: str, size: int, tmp_path: Path) -> None:
    run = tmp_path / "digits-dm-at"
    run.mkdir()
    with open(run / "manifest.json", "wb") as file:
        file.truncate(size)  # takes no room on the disk
    where = ["digits-dm-at", "--storage", str(tmp_path)] if command == "train" else [str(run)]
    ended = dra(command, *where)
    assert ended.code == 2, ended
    assert ended.said.count("\n") == 1, ended
    assert f"has {size:,} bytes, and at most 8,388,608 are read" in ended.said
    assert ended.cpu_s < SECONDS
    assert ended.megabytes < MEGABYTES
