"""What a submission is made of, without a cluster: id, files, places, and what never travels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dra_ray import config
from dra_ray.errors import ConfigError, DraError
from dra_ray.submission import work as of

HERE, ELSEWHERE = "http://127.0.0.1:8265", "https://ray.example.com"


def work(**changes: Any) -> of.Work:
    tree = of.located(config.load("digits-dm-at"), HERE, "installed")
    return dataclasses.replace(of.Work("train", "s3://bucket/runs", "mine", tree), **changes)


def with_set(*settings: str) -> of.Work:
    settings_of = config.load("digits-dm-at", config.Experiment, list(settings))
    return work(tree=of.located(settings_of, HERE, "installed"))


def test_the_same_work_has_the_same_id_and_other_work_another() -> None:
    ids = [
        work().base_id,
        work(kind="sweep").base_id,
        work(storage="s3://bucket/other").base_id,
        work(name="yours").base_id,
        with_set("optim.epochs=3").base_id,
    ]
    assert len(set(ids)) == len(ids)
    assert work().base_id == work().base_id
    assert ids[0].startswith("train-mine-")
    assert len(ids[0].rpartition("-")[2]) == 12
    odd = work(name="mine & yours/é" * 20).base_id
    assert set(odd) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert len(odd) < 100


def test_what_changes_no_result_changes_no_id_but_is_seen() -> None:
    wider = with_set("resources.cpus_per_worker=3")
    assert wider.base_id == work().base_id
    assert wider.exact != work().exact


def test_a_config_travels_whole(tmp_path: Path) -> None:
    """The job reads what was meant here: a file with what it extends, and --set on top."""
    (tmp_path / "base.yaml").write_text("extends: digits-dm-at\noptim: {epochs: 7}\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {tmp_path}/base.yaml\nseed: 3\n")
    meant = config.load(str(tmp_path / "mine.yaml"), config.Experiment, ["optim.lr=0.3"])
    files = work(tree=of.located(meant, HERE, "tree")).files()
    assert sorted(files) == [of.CONFIG, "train.py"]
    (tmp_path / "sent.yaml").write_bytes(files[of.CONFIG])
    assert config.load(str(tmp_path / "sent.yaml")) == meant
    assert meant.optim.epochs == 7


def test_every_kind_has_its_script() -> None:
    jobs = Path(__file__).parents[2] / "jobs"
    for name, _ in of.KINDS.values():
        assert of.script(name).read_bytes() == (jobs / name).read_bytes()


def test_paths_are_those_of_the_nodes(tmp_path: Path) -> None:
    relative = config.load("digits-dra", None, ["teacher.uri=runs/teacher"])
    sent = of.located(relative, HERE, "installed")
    assert sent["teacher"]["uri"] == str(Path("runs/teacher").absolute())
    for uri in ("s3://bucket/teacher", "file:///mnt/teacher"):
        there = config.load("digits-dra", None, [f"teacher.uri={uri}"])
        assert of.located(there, ELSEWHERE, "installed")["teacher"]["uri"] == uri
        assert of.placed(uri, ELSEWHERE, "--storage") == uri
    assert of.placed("runs", HERE, "--storage") == str(Path("runs").absolute())


@pytest.mark.parametrize(
    ("recipe", "setting", "field"),
    [
        ("digits-dra", "teacher.uri=/data/teacher", "teacher.uri:"),
        ("digits-dm-at", "data.uri=data/digits", "data.uri:"),
        ("digits-dm-at", "model.name=diffusion//data/teacher", "model.name:"),
        ("digits-synthesis", "teacher=runs/teacher", "teacher:"),
        ("digits-sweep", "space.synthetic.uri=[s3://b/x, runs/x]", "space.synthetic.uri:"),
    ],
)
def test_paths_of_this_machine_are_refused_for_another(
    recipe: str, setting: str, field: str
) -> None:
    with pytest.raises(ConfigError, match="path of this machine") as raised:
        of.located(config.load(recipe, None, [setting]), ELSEWHERE, "installed")
    assert str(raised.value).startswith(field)
    assert ELSEWHERE in str(raised.value)


def test_a_teacher_of_the_package_is_the_one_there() -> None:
    settings = config.load("fashion-synthesis")
    sent = of.located(settings, ELSEWHERE, "installed")
    assert sent["teacher"] == "package:fashion-edm"
    with pytest.raises(ConfigError, match="--code installed"):
        of.located(settings, HERE, "tree")


def test_of_an_analysis_the_models_that_are_places_travel_as_such() -> None:
    given = ("runs/a", "timm/resnet18", "my_net:net", "robustbench:c.pt", "package:fashion-edm")
    sent = of.located(config.Analysis(models=given), HERE, "installed")["models"]
    here = [str(Path(name).absolute()) for name in ("runs/a", "c.pt")]
    assert sent == [here[0], *given[1:3], f"robustbench:{here[1]}", given[4]]
    with pytest.raises(ConfigError, match="^models: 'runs/a' is a path of this machine"):
        of.located(config.Analysis(models=given), ELSEWHERE, "installed")


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.8.0.1", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("http://10.0.0.1:8265", False),
        ("https://localhost.example.com", False),
    ],
)
def test_which_addresses_are_this_machine(address: str, here: bool) -> None:
    assert of.is_this_machine(address) is here


def test_nothing_but_two_settings_of_ours_is_in_a_jobs_environment() -> None:
    assert sorted(work().environment()) == [of.SUBMITTED_BY, "RAY_JOB_STOP_WAIT_TIME_S"]
    assert json.loads(json.dumps(work().labels())) == work().labels()


def test_a_storage_with_credentials_is_refused_without_showing_them() -> None:
    with pytest.raises(DraError, match="holds credentials") as raised:
        of.placed("s3://user:hunter2@bucket/runs", ELSEWHERE, "--storage")
    assert "hunter2" not in str(raised.value)
