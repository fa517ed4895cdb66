"""The summary against the same numbers computed again from the files, and its errors."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dra_ray.errors import CheckpointError, DataError
from dra_ray.evaluation.compare import compare_runs
from dra_ray.report import collect, rows, write
from dra_ray.storage import Store
from tests.report.written_runs import (
    EPOCHS,
    IMAGES,
    SPACE,
    TRAIN_IMAGES,
    chosen,
    clean,
    robust,
    teacher,
    verdicts,
    write_verdicts,
)


def read(path: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(path) / name).read_text().splitlines()]


def numbers(value: Any, key: str = "") -> list[str]:
    """Dotted names of all numbers (and lists, as one) in a summary."""
    if isinstance(value, dict):
        return [
            name
            for part, below in value.items()
            for name in numbers(below, f"{key}.{part}" if key else part)
        ]
    return [key] if isinstance(value, int | float | list) and not isinstance(value, bool) else []


def test_every_trial_has_the_score_of_its_last_rung(quickstart: Store) -> None:
    summary = collect(quickstart).tree()
    reported = read(quickstart.uri, "sweep/rungs.jsonl")
    assert {trial["trial"] for trial in summary["sweep"]} == set(chosen())
    for trial in summary["sweep"]:
        mine = [row for row in reported if row["trial"] == trial["trial"]]
        last = max(mine, key=lambda row: row["epoch"])
        assert trial["fields"] == chosen()[trial["trial"]]
        assert trial["epoch"] == last["epoch"]
        assert trial["images_seen"] == TRAIN_IMAGES * last["epoch"]
        assert trial["robust_accuracy"] == robust(trial["fields"], last["epoch"])
        assert trial["clean_accuracy"] == clean(trial["fields"], last["epoch"])
        assert trial["best_robust_accuracy"] == max(row["robust_accuracy"] for row in mine)
        assert trial["decision"] == ("done" if last["epoch"] == EPOCHS else "stopped")


@pytest.mark.parametrize("validated", [True, False])
def test_a_trial_that_failed_is_told_with_its_reason(quickstart: Store, validated: bool) -> None:
    file = quickstart / "sweep" / "rungs.jsonl"
    finals = collect(quickstart).tree()["finals"].values()
    logged = file.read_jsonl()
    trial = next(
        row["trial"] for row in logged if row["trial"] not in {final["trial"] for final in finals}
    )
    mine = [row for row in logged if row["trial"] == trial][: int(validated)]
    scores = (
        mine[0]
        if mine
        else {"epoch": 0, "images_seen": 0, "robust_accuracy": None, "clean_accuracy": None}
    )
    failure = scores | {
        "trial": trial,
        "decision": "failed",
        "reason": "the loss is nan at step 5",
        "at": 0.0,
    }
    file.write_jsonl([row for row in logged if row["trial"] != trial] + mine + [failure])
    summary = collect(quickstart).tree()
    seen = next(row for row in summary["sweep"] if row["trial"] == trial)
    assert seen["decision"] == "failed"
    assert seen["robust_accuracy"] == scores["robust_accuracy"]
    assert (
        f"{trial}: it failed and is ranked last (the loss is nan at step 5)" in summary["missing"]
    )
    assert "the loss is nan at step 5" in write(quickstart).read_text()


def test_asha_pool_stages_teacher_and_synthetic(quickstart: Store) -> None:
    summary = collect(quickstart).tree()
    asha = summary["asha"]
    assert (asha["trials"], asha["trained_to_the_end"], asha["stopped_early"], asha["rungs"]) == (
        10,
        3,
        7,
        [2, 4, 8],
    )
    assert [(stop["epoch"], stop["rung"], stop["trials"]) for stop in asha["stops"]] == [
        (2, 1, 3),
        (4, 2, 2),
        (8, 3, 2),
    ]
    pool = read(quickstart.uri, "sweep/pool.jsonl")
    assert summary["pool"]["replicas"] == [1, 2, 1]
    assert summary["pool"]["max_running"] == 2
    assert [summary["pool"][key] for key in ("requests", "images", "retries")] == [
        pool[-1][key] for key in ("requests", "images", "retries")
    ]
    assert summary["elapsed_s"] == pytest.approx(
        sum(stage["seconds"] for stage in summary["stages"])
    )
    assert summary["teacher"]["images_seen"] == 200_000
    assert summary["teacher"]["params"] == sum(
        parameter.numel() for parameter in teacher().parameters()
    )
    assert summary["teacher"]["samples"] == "teacher/samples-200000.png"  # by number, not by name
    assert summary["synthetic"]["counts"] == {str(label): 400 for label in range(10)}
    assert summary["synthetic"]["teacher_digest"] == summary["teacher"]["digest"]
    assert summary["status"] == "done"
    assert summary["missing"] == []


def test_the_paired_comparison_counts_images_on_which_the_finalists_differ(
    quickstart: Store,
) -> None:
    summary = collect(quickstart).tree()
    dra, baseline = verdicts(3), verdicts(2)
    only_dra, only_baseline = int((dra & ~baseline).sum()), int((baseline & ~dra).sum())
    paired = summary["paired"]
    assert (paired["only_dra"], paired["only_baseline"], paired["images"]) == (
        only_dra,
        only_baseline,
        IMAGES,
    )
    assert paired["difference"] == pytest.approx((only_dra - only_baseline) / IMAGES)
    assert paired["interval"][0] < paired["difference"] < paired["interval"][1]
    n = only_dra + only_baseline  # McNemar's exact test, written out
    tail = sum(math.comb(n, k) for k in range(min(only_dra, only_baseline) + 1)) / 2**n
    assert paired["p_value"] == pytest.approx(min(1, 2 * tail))
    assert summary["finals"]["dra"]["autoattack_accuracy"] == pytest.approx(dra.mean())
    assert summary["finals"]["baseline"]["fields"]["align.weight"] == 0


def test_every_number_names_files_that_exist(
    quickstart: Store, make_train: Callable[..., Store]
) -> None:
    for run in (quickstart, make_train()):
        summary = collect(run).tree()
        skipped = ("config", "versions", "hardware", "missing", "sources", "files")
        named = [
            name
            for name in numbers(
                {key: value for key, value in summary.items() if key not in skipped}
            )
            if ".fields." not in name
        ]
        uncited = [
            name
            for name in named
            if name not in summary["sources"]
            and not name.endswith(".flags")
            and ".threat." not in name
        ]
        assert uncited == []
        assert all((run / file).exists() for files in summary["sources"].values() for file in files)
        assert all(Store(uri).exists() for uri in summary["files"].values())


def test_the_headline_claims_a_difference_only_when_the_test_and_the_interval_do(
    quickstart: Store,
) -> None:
    dra = quickstart / "sweep" / "trials" / collect(quickstart).tree()["finals"]["dra"]["trial"]
    scores = {}
    for shift, words in ((3, "DRA is ahead"), (1, "the baseline is ahead"), (2, "no difference")):
        write_verdicts(dra, verdicts(shift))
        scores[shift] = collect(quickstart).tree()
        assert words in scores[shift]["headline"]
    assert "more than chance" in scores[3]["headline"]
    assert scores[3]["paired"]["p_value"] < 0.05
    one_better = verdicts(2)
    one_better[(~one_better).argmax()] = True  # a single image is never evidence
    write_verdicts(dra, one_better)
    assert "this run shows no difference" in collect(quickstart).tree()["headline"]


def test_a_resumed_sweep_counts_the_later_report_of_an_epoch(quickstart: Store) -> None:
    file = quickstart / "sweep" / "rungs.jsonl"
    reported = file.read_jsonl()
    repeated = max(
        (row for row in reported if row["trial"] == "trial-000"), key=lambda row: row["epoch"]
    )
    file.write_jsonl([*reported, repeated | {"robust_accuracy": 0.125}])
    summary = collect(quickstart).tree()
    assert summary["sweep"][0]["robust_accuracy"] == 0.125
    assert summary["asha"]["trials"] == 10


def test_rows_are_flat_and_in_percent(quickstart: Store, make_train: Callable[..., Store]) -> None:
    table = rows(quickstart)
    assert len(table) == 10
    assert set(SPACE) <= set(table[0])
    best = next(
        row for row in table if row["trial"] == collect(quickstart).tree()["finals"]["dra"]["trial"]
    )
    assert best["AutoAttack %"] == round(100 * verdicts(3).mean(), 1)
    assert best["robust %"] == round(100 * robust(chosen()[best["trial"]], EPOCHS), 1)
    assert sum(row["AutoAttack %"] is not None for row in table) == 2
    assert [row["trial"] for row in rows(make_train("solo"))] == ["solo"]


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "begun"))
    (run / "manifest.json").write_json(
        {"kind": "quickstart", "name": "begun", "status": "running", "config": {}}
    )
    summary = collect(run).tree()
    text = " ".join(summary["missing"])
    assert summary["status"] == "unfinished"
    assert "running" not in text
    for part in (
        "the run is unfinished",
        "teacher/manifest.json",
        "synthetic/manifest.json",
        "sweep/manifest.json",
    ):
        assert part in text
    assert rows(run) == []


def test_a_sweep_without_reports_or_finalists_yet(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "young"))
    trials = {"trial-000": {"align.weight": 0.0}}
    (run / "manifest.json").write_json(
        {"kind": "sweep", "name": "young", "status": "running", "config": {}, "trials": trials}
    )
    summary = collect(run).tree()
    assert summary["sweep"][0]["decision"] == "not started"
    assert summary["headline"].startswith("1 classifier is to be trained against attacks")
    assert any("rungs.jsonl" in line for line in summary["missing"])
    assert any("finalists" in line for line in summary["missing"])
    assert rows(run)[0]["robust %"] is None


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is not a run: it has no manifest.json; pass a folder written by"
    ) as error:
        collect(Store(str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    (tmp_path / "manifest.json").write_text('{"kind": "cake"}')
    with pytest.raises(DataError, match="'cake', which no report knows"):
        collect(Store(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "sweep/rungs.jsonl",
            lambda text: text.replace('"epoch": 2', '"epoch": 2 2', 1),
            r"rungs.jsonl' line \d+ is not valid JSON",
        ),
        (
            "sweep/rungs.jsonl",
            lambda text: text.replace('"decision"', '"choice"', 1),
            r"rungs.jsonl' line 1 has no 'decision'",
        ),
        ("sweep/pool.jsonl", lambda text: text[:-20], r"pool.jsonl' line 210 is not valid JSON"),
        ("sweep/manifest.json", lambda text: text[:100], "manifest.json' is not valid JSON"),
        (
            "sweep/manifest.json",
            lambda text: "[]",
            "manifest.json' holds \\[\\] instead of an object",
        ),
        (
            "teacher/card.json",
            lambda text: text.replace('"resolution"', '"size"'),
            "card.json' does not describe a network",
        ),
    ],
)
def test_damaged_files_are_named(
    quickstart: Store, name: str, damage: Callable[[str], str], message: str
) -> None:
    file = quickstart / name
    file.write_text(damage(file.read_text()))
    with pytest.raises((DataError, CheckpointError), match=message):
        collect(quickstart).tree()


def test_an_evaluation_without_its_verdict_is_damaged(make_train: Callable[..., Store]) -> None:
    run = make_train()
    file = run / "evaluation" / "autoattack.json"
    file.write_json({key: value for key, value in file.read_json().items() if key != "interval"})
    with pytest.raises(
        DataError, match=r"autoattack.json' has no 'interval'; run the evaluation again"
    ):
        collect(run).tree()


def test_finalists_that_cannot_be_paired_are_not_and_the_page_says_why(quickstart: Store) -> None:
    """The report refuses what `dra compare` refuses: other images, labels or settings."""
    finals = collect(quickstart).tree()["finals"]
    dra, baseline = (quickstart / finals[role]["run"] for role in ("dra", "baseline"))
    file = dra / "evaluation" / "autoattack.json"
    before, verdict = file.read_json(), (dra / "evaluation" / "per_sample.npz").read_npz()
    cases = {
        "they were evaluated on 360 and 100 images": (
            {},
            {"robust": verdicts(3)[:100], "labels": np.arange(100) % 10},
        ),
        "the labels of their test images differ": ({}, verdict | {"labels": np.arange(IMAGES) % 9}),
        "threat is .*8.0.* in one and .*4.0.* in the other": (
            {"threat": {"norm": "linf", "eps_255": 4.0}},
            verdict,
        ),
        "seed is 0 in one and 1 in the other": ({"seed": 1}, verdict),
    }
    for words, (changes, arrays) in cases.items():
        file.write_json(before | changes)
        (dra / "evaluation" / "per_sample.npz").write_npz(**arrays)
        summary = collect(quickstart).tree()
        assert "paired" not in summary
        assert "DRA keeps" in summary["headline"]
        (line,) = [line for line in summary["missing"] if line.startswith("paired comparison")]
        assert re.search(words, line)
        with pytest.raises(DataError, match=words):
            compare_runs(baseline, dra)


def test_the_report_and_the_command_compare_alike(quickstart: Store) -> None:
    summary = collect(quickstart).tree()
    runs = [quickstart / summary["finals"][role]["run"] for role in ("baseline", "dra")]
    row = next(
        row for row in compare_runs(*runs, "autoattack")["rows"] if row["what"] == "AutoAttack"
    )
    for ours, theirs in (
        ("difference", "difference"),
        ("interval", "interval"),
        ("p_value", "p_value"),
        ("only_dra", "only_b"),
        ("images", "images"),
    ):
        assert summary["paired"][ours] == (row[theirs] if ours != "images" else IMAGES)


def test_finalists_of_other_data_amounts_are_no_proof_of_alignment(quickstart: Store) -> None:
    assert collect(quickstart).tree()["paired"]["also_differ"] == {}
    file = quickstart / "sweep" / "manifest.json"
    manifest = file.read_json()
    baseline = manifest["finals"]["baseline"]
    manifest["trials"][baseline]["synthetic.images"] = 0
    manifest["trials"][baseline]["threat.eps_255"] = 8.0
    file.write_json(manifest)
    summary = collect(quickstart).tree()
    assert summary["paired"]["also_differ"] == {
        "synthetic.images": [4000, 0],
        "threat.eps_255": [None, 8.0],
    }
    assert (
        "But the two also differ in synthetic.images (4000 with DRA, 0 without)"
        in summary["headline"]
    )


def test_trials_are_matched_after_an_epoch_that_both_have_reached(quickstart: Store) -> None:
    reported = {
        (row["trial"], row["epoch"]): row["robust_accuracy"]
        for row in read(quickstart.uri, "sweep/rungs.jsonl")
    }
    summary = collect(quickstart).tree()
    assert [match["shared"]["synthetic.images"] for match in summary["equal"]] == [0, 4000]
    for match in summary["equal"]:
        for kind in ("aligned", "baseline"):
            trial = match[kind]
            assert chosen()[trial]["synthetic.images"] == match["shared"]["synthetic.images"]
            assert (chosen()[trial]["align.weight"] > 0) == (kind == "aligned")
            assert match[f"{kind}_accuracy"] == reported[trial, match["epoch"]]


def test_the_headline_counts_what_really_trained(quickstart: Store) -> None:
    summary = collect(quickstart).tree()
    last = {trial["trial"]: trial for trial in summary["sweep"]}
    first = [
        f"{100 * trial['robust_accuracy']:.1f}"
        for trial in last.values()
        if trial["epoch"] == 2 and trial["decision"] == "stopped"
    ]
    assert summary["headline"].startswith(
        "Of 10 classifiers, 3 were trained to the end and 7 were stopped early (3 at rung 1 at "
    )
    assert f"3 at rung 1 at {min(first)} to {max(first)}" in summary["headline"]
    assert "others did better" not in summary["headline"]
    stopped = next(trial for trial in last.values() if trial["epoch"] == 2)
    row = next(row for row in rows(quickstart) if row["trial"] == stopped["trial"])
    assert row["decision"] == f"stopped at rung 1 at {100 * stopped['robust_accuracy']:.1f}\u00a0%"


def test_a_sweep_whose_driver_is_gone_is_unfinished(quickstart: Store) -> None:
    sweep = quickstart / "sweep"
    reported = (sweep / "rungs.jsonl").read_jsonl()
    kept = [
        row
        for row in reported
        if row["epoch"] <= 3 and row["trial"] not in ("trial-000", "trial-001")
    ]
    (sweep / "rungs.jsonl").write_jsonl(
        kept + [kept[-1] | {"trial": "trial-001", "epoch": 1, "decision": "failed"}]
    )
    manifest = (sweep / "manifest.json").read_json()
    (sweep / "manifest.json").write_json(
        {key: value for key, value in manifest.items() if key != "finals"} | {"status": "running"}
    )
    summary = collect(sweep).tree()
    assert summary["status"] == "unfinished"
    assert summary["asha"]["trained_to_the_end"] == 0
    counts = {
        key: summary["asha"][key]
        for key in ("stopped_early", "unfinished", "failed", "not_started")
    }
    assert sum(counts.values()) == 10
    assert (counts["failed"], counts["not_started"]) == (1, 1)
    assert counts["unfinished"] > 0
    assert f"{counts['unfinished']} unfinished, 1 failed and 1 not started" in summary["headline"]
    (line,) = [line for line in summary["missing"] if "unfinished" in line]
    pool = max(row["at"] for row in (sweep / "pool.jsonl").read_jsonl())
    at = max(pool, *(row["at"] for row in kept))
    assert f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC" in line
    assert "resumes it" in line


def test_a_trial_that_its_sweep_stopped_says_so(quickstart: Store) -> None:
    sweep = quickstart / "sweep"
    trials = collect(quickstart).tree()["sweep"]
    trial = next(trial for trial in trials if trial["decision"] == "stopped")
    run = sweep / "trials" / trial["trial"]
    (run / "manifest.json").write_json((run / "manifest.json").read_json() | {"status": "running"})
    summary = collect(run).tree()
    assert summary["status"] == "stopped"
    assert summary["title"] == f"sweep, {trial['trial']}"
    assert f"sweep 'sweep' stopped this trial after epoch {trial['epoch']}" in summary["missing"][0]
    assert (
        f"for {trial['epoch']} of {summary['config']['optim']['epochs']} epochs and then stopped"
        in summary["headline"]
    )


@pytest.mark.parametrize("status", ["running", "done"])
def test_a_run_that_stopped_itself_or_is_done(
    make_train: Callable[..., Store], status: str
) -> None:
    run = make_train("solo", epochs=3)
    (run / "manifest.json").write_json(
        (run / "manifest.json").read_json()
        | {"status": status, "stopped": "the loss is nan at step 5"}
    )
    summary = collect(run).tree()
    if status == "done":  # it went on later, and got there
        assert summary["status"] == "done"
        assert summary["missing"] == []
    else:
        assert summary["status"] == "failed"
        assert "training stopped: the loss is nan at step 5" in summary["missing"]
        assert "and then failed" in summary["headline"]


def test_a_page_is_named_after_what_its_folder_belongs_to(attacked: Store) -> None:
    other = attacked / "evaluation" / "eps-4.5"
    for name in ("autoattack.json", "per_sample.npz"):
        (other / name).write_bytes((attacked / "evaluation" / name).read_bytes())
    titles = [collect(folder).title for folder in (attacked, attacked / "evaluation", other)]
    assert titles == ["attacked", "attacked, evaluation", "attacked, evaluation eps-4.5"]
