"""The folder of a run: what other versions wrote opens, and damage is told in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dra_ray import runs
from dra_ray.errors import CheckpointError, ConfigError, DataError, DraError, RunError
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.sweeps.tournament import Scores

OLD: dict[str, Any] = {  # as the first version wrote it
    "kind": "train",
    "name": "run",
    "created": "2025-11-24T16:00:00+00:00",
    "config": {"optim": {"lr": 0.1}},
    "digest": "d1",
    "versions": {"python": "3.11.9"},
    "seed": 3,
    "world_sizes": [{"step": 0, "workers": 2, "at": "2025-11-24T16:00:01+00:00"}],
    "status": "running",
}
ROW: dict[str, Any] = {
    "step": 9,
    "epoch": 1,
    "images_seen": 1152,
    "loss": 2.5,
    "loss_clean": 2,
    "loss_robust": 0.5,
    "loss_align": 0.0,
    "lr": 0.2,
    "clean_accuracy": 0.5,
    "robust_accuracy": 0.25,
    "elapsed_s": 8.5,
    "at": 1764000000.0,
}


@pytest.fixture
def run(tmp_path) -> Store:
    return Store(str(tmp_path)) / "run"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# -- manifests -------------------------------------------------------------------------------------
def test_an_old_manifest_opens(run: Store) -> None:
    (run / runs.MANIFEST).write_json(OLD)
    manifest = runs.begin_run(run, "train", OLD["config"], "d1")
    assert (manifest.kind, manifest.seed, manifest.is_done) == ("train", 3, False)
    assert manifest.world_sizes[0].workers == 2
    assert manifest.started_at is None


def test_an_update_leaves_the_rest_as_it_was_written(run: Store) -> None:
    """Also keys of a newer version, at any depth, and numbers: 3 does not become 3.0."""
    start = OLD["world_sizes"][0] | {"preempted": True}
    newer = OLD | {"accountant": {"usd": 3}, "elapsed_s": 3, "world_sizes": [start]}
    (run / runs.MANIFEST).write_json(newer)
    before = runs.read_manifest(run)
    assert before is not None
    sizes = [*before.world_sizes, runs.WorldSize(workers=1, step=5)]
    runs.update_manifest(run, runs.Facts(status="done", stopped=None, world_sizes=sizes))
    assert (run / runs.MANIFEST).read_json() == newer | {
        "status": "done",
        "stopped": None,
        "world_sizes": [start, {"workers": 1, "step": 5}],
    }
    assert '"elapsed_s": 3,' in (run / runs.MANIFEST).read_text()


def test_a_manifest_holds_what_the_run_began_with(run: Store) -> None:
    begun = runs.begin_run(run, "sweep", {"a": 1}, "d", runs.Facts(seed=4, trials={"t": {"x": 1}}))
    stored = (run / runs.MANIFEST).read_json()
    keys = {"kind", "name", "created", "config", "digest", "versions", "status", "seed", "trials"}
    assert set(stored) == keys
    assert runs.read_manifest(run) == begun
    assert begun.trials == {"t": {"x": 1}}


def test_counts_are_by_class_however_they_were_written(run: Store) -> None:
    for counts in ([5, 6], {"0": 5, "1": 6}):
        (run / runs.MANIFEST).write_json(OLD | {"counts": counts})
        manifest = runs.read_manifest(run)
        assert manifest
        assert manifest.counts == {"0": 5, "1": 6}


HOSTILE = {
    "kind is a list": (json.dumps(OLD | {"kind": ["train"]}), "kind=['train']: input should be"),
    "config is a number": (json.dumps(OLD | {"config": 3}), "config=3"),
    "a trial is a list": (json.dumps(OLD | {"trials": {"a": [1]}}), "trials.a=[1]"),
    "a stage without seconds": (json.dumps({"stages": [{"name": "a"}]}), "no 'stages.0.seconds'"),
    "workers in words": (json.dumps({"world_sizes": [{"workers": "two"}]}), "workers='two'"),
    "a line break in a key": (json.dumps({"counts": {"a\nb": []}}), r"counts.a\nb=[]"),
    "a list": ("[1, 2]", "[1, 2] instead of an object"),
    "nothing": ("null", "None instead of an object"),
    "nested deeply": ('{"kind": ' + nested(900) + "}", "kind=[["),
    "a config nested deeply": ('{"config": {"a": ' + nested(900) + "}}", "config.a"),
    "an unknown key nested deeply": ('{"b": ' + nested(900) + "}", "b."),
    "nested more deeply than JSON may be": ('{"kind": ' + nested(200_000) + "}", "not valid JSON"),
    "a number of 5,000 digits": ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
    "half a file": ('{"kind": "tra', "not valid JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_one_line(run: Store, name: str) -> None:
    text, words = HOSTILE[name]
    (run / runs.MANIFEST).write_text(text)
    for use in (
        runs.read_manifest,
        checkpoint.load,
        lambda run: runs.begin_run(run, "train", {}, "d"),
        lambda run: runs.update_manifest(run, runs.Facts(status="done")),
    ):
        with pytest.raises((CheckpointError, DataError)) as caught:
            use(run)
        message = str(caught.value)
        assert words in message
        assert f"'{run / runs.MANIFEST}'" in message
        assert "\n" not in message
        assert len(message) < 400
    assert (run / runs.MANIFEST).read_text() == text


def test_a_manifest_that_is_not_text_is_one_line(run: Store) -> None:
    (run / runs.MANIFEST).write_bytes(b'{"kind": "\xff\xfe"}')
    with pytest.raises(DataError, match="not valid JSON"):
        runs.read_manifest(run)


def test_a_kind_with_control_characters_is_shown_escaped(run: Store) -> None:
    (run / runs.MANIFEST).write_json(OLD | {"kind": "a\n\x1b[31m"})
    with pytest.raises(ConfigError) as caught:
        runs.check_run(run, "train", {}, "d1")
    assert r"'a\n\x1b[31m'" in str(caught.value)


# -- logs ------------------------------------------------------------------------------------------
def test_rows_come_back_as_written(run: Store) -> None:
    row = runs.ValidationRow.model_validate(ROW)
    runs.write_rows(run / runs.METRICS, [row, row])
    assert (run / runs.METRICS).read_jsonl() == [ROW, ROW]
    assert runs.read_rows(run / runs.METRICS, runs.ValidationRow) == [row, row]
    assert runs.read_rows(run / runs.STEPS, runs.StepRow) == []


def test_a_log_goes_on_and_leaves_the_lines_that_were_there(run: Store) -> None:
    """Also their unknown keys and the way their numbers are spelt."""
    file = run / runs.RUNGS
    line = '{"trial": "a", "epoch": 1, "images_seen": 10, "clean_accuracy": 1, "robust_accuracy": 0'
    lines = [line + f', "decision": "continue", "new": [{n}]}}\n' for n in range(3)]
    file.write_text("".join(lines))
    log = runs.Log(file, runs.RungRow, keep=lambda row: row.on_disk()["new"] != [1])
    row = runs.RungRow(
        trial="b",
        epoch=2,
        images_seen=20,
        clean_accuracy=0.5,
        robust_accuracy=0.25,
        decision="stop",
        at=1.5,
    )
    log.append(row)
    text = file.read_text()
    assert text.startswith(lines[0] + lines[2])
    assert len(text.splitlines()) == 3
    assert runs.read_rows(file, runs.RungRow) == log.rows
    assert log.rows[-1] == row


def test_a_loss_that_is_not_finite_is_written(run: Store) -> None:
    log = runs.Log(run / runs.METRICS, runs.TeacherRow)
    log.append(runs.TeacherRow(images_seen=1, loss=math.nan, lr=0.1, elapsed_s=1.0, at=2.0))
    stored = (run / runs.METRICS).read_jsonl()[0]
    assert stored["loss"] is None
    assert "validation_accuracy" not in stored  # it was not measured
    assert math.isnan(runs.read_rows(run / runs.METRICS, runs.TeacherRow)[0].loss)


def test_a_log_of_an_earlier_version_with_nan_becomes_json(run: Store) -> None:
    file, row = run / runs.METRICS, {"images_seen": 1, "lr": 0.1, "elapsed_s": 1.0, "at": 2.0}
    text = json.dumps(row | {"loss": math.nan})
    file.write_text(f"{text}\n")
    log = runs.Log(file, runs.TeacherRow)
    assert math.isnan(log.rows[0].loss)
    log.append(log.rows[0])
    for line in file.read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail) == row | {"loss": None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 holds \\[1\\] instead of an object"),
        (json.dumps(ROW | {"epoch": "x"}), "line 2 has epoch='x'"),
        (json.dumps({"step": 1}), "line 2 has no 'epoch'"),
        (nested(200_000), "line 2 is not valid JSON"),
        (json.dumps(ROW | {"more": 0})[:-2] + nested(900) + "}", "line 2 has more"),
    ],
    ids=["half", "list", "words", "missing", "deep", "deep in an unknown key"],
)
def test_a_damaged_line_is_named(run: Store, line: str, words: str) -> None:
    (run / runs.METRICS).write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(DraError, match=words) as caught:
        runs.read_rows(run / runs.METRICS, runs.ValidationRow)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_sweep_reads_fields_that_rows_have() -> None:
    scores = {field.name for field in dataclasses.fields(Scores)}
    for row in (runs.ValidationRow, runs.RungRow):
        assert scores <= set(row.model_fields)


@pytest.mark.parametrize("images", [0, 1, 8, 9, 1000])
def test_verdicts_are_text_and_come_back(images: int) -> None:
    withstood = np.random.default_rng(images).random(images) < 0.3

    text = runs.pack_verdicts(withstood)

    assert len(text) <= images / 6 + 4
    assert np.array_equal(runs.unpack_verdicts(text, images), withstood)


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!"])
def test_verdicts_of_another_length_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="verdicts of 9 images"):
        runs.unpack_verdicts(text, 9)


def test_a_run_for_which_there_is_no_room_leaves_no_folder(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "runs" / "mine"))
    asked = []

    def full() -> None:
        asked.append(1)
        raise RunError("needs 9 CPU, has 2")

    with pytest.raises(RunError, match="needs 9 CPU"):
        runs.begin_run(run, "train", {}, "d", None, full)
    assert not (tmp_path / "runs").exists()
    runs.begin_run(run, "train", {}, "d")
    with pytest.raises(RunError, match="needs 9 CPU"):  # an unfinished one is not begun again
        runs.begin_run(run, "train", {}, "d", None, full)
    runs.update_manifest(run, runs.Facts(status="done"))
    assert runs.begin_run(run, "train", {}, "d", None, full).is_done
    assert len(asked) == 2


def test_a_probe_leaves_the_folders_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (Store(str(tmp_path)) / "runs" / "a" / "b").probe()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [('"elapsed_s": 1e999', "elapsed_s"), (r'"name": "\ud800"', "not valid JSON")],
)
def test_what_no_report_could_show_is_refused_where_it_is_read(
    tmp_path: Path, facts: str, words: str
) -> None:
    run = Store(str(tmp_path))
    runs.begin_run(run, "train", {}, "d")
    text = (run / runs.MANIFEST).read_text().rstrip().removesuffix("}")
    (run / runs.MANIFEST).write_text(f"{text}, {facts}}}")
    with pytest.raises(DraError, match=words) as caught:
        runs.read_manifest(run)
    assert "\n" not in str(caught.value)


def test_finalists_lie_in_their_sweep(tmp_path: Path) -> None:
    sweep = Store(str(tmp_path))
    runs.begin_run(sweep, "sweep", {}, "d")
    runs.update_manifest(sweep, runs.Facts(finals={"dra": "../../elsewhere"}))
    with pytest.raises(ConfigError, match=r"finals\.dra '\.\./\.\./elsewhere': it is a path"):
        runs.finalists(sweep)


def test_metrics_tell_namesakes_apart_and_trials_share_their_sweep(tmp_path: Path) -> None:
    one, two = (Store(str(tmp_path / folder / "sweep")) for folder in ("one", "two"))
    trials = [runs.metric_labels(one / runs.TRIALS / f"trial-00{number}") for number in range(2)]
    assert trials[0]["run"] == trials[1]["run"] == runs.metric_labels(one)["run"]
    assert [labels["trial"] for labels in trials] == ["trial-000", "trial-001"]
    assert runs.metric_labels(one)["trial"] == ""
    labels = {runs.metric_labels(store)["run"] for store in (one, two)}
    assert len(labels) == 2
    assert all(label.startswith("sweep-") and len(label) == len("sweep-") + 6 for label in labels)
    assert runs.metric_labels(Store(f"{one}/")) == runs.metric_labels(one)
    assert runs.metric_labels(Store("s3://bucket/runs/a"))["run"].startswith("a-")
