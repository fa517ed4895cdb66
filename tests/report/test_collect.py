"""The summary against the same numbers computed again from the files, and its errors."""

from __future__ import annotations

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
from dra_ray.report import collect, rows
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
    summary = collect(quickstart)
    reported = read(quickstart.uri, "sweep/rungs.jsonl")
    assert {trial["trial"] for trial in summary["sweep"]} == set(chosen())
    for trial in summary["sweep"]:
        mine = [row for row in reported if row["trial"] == trial["trial"]]
        last = max(mine, key=lambda row: row["epoch"])
        assert trial["fields"] == chosen()[trial["trial"]]
        assert (
            trial["epoch"] == last["epoch"] and trial["images_seen"] == TRAIN_IMAGES * last["epoch"]
        )
        assert trial["robust_accuracy"] == robust(trial["fields"], last["epoch"])
        assert trial["clean_accuracy"] == clean(trial["fields"], last["epoch"])
        assert trial["best_robust_accuracy"] == max(row["robust_accuracy"] for row in mine)
        assert trial["decision"] == ("done" if last["epoch"] == EPOCHS else "stopped")


def test_asha_pool_stages_teacher_and_synthetic(quickstart: Store) -> None:
    summary = collect(quickstart)
    assert summary["asha"] == {"trials": 10, "stopped_early": 7, "rungs": [2, 4, 8]}
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
    assert summary["status"] == "done" and summary["missing"] == []


def test_the_paired_comparison_counts_images_on_which_the_finalists_differ(
    quickstart: Store,
) -> None:
    summary = collect(quickstart)
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
        summary = collect(run)
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
    dra = quickstart / "sweep" / "trials" / collect(quickstart)["finals"]["dra"]["trial"]
    scores = {}
    for shift, words in ((3, "DRA is ahead"), (1, "the baseline is ahead"), (2, "no difference")):
        write_verdicts(dra, verdicts(shift))
        scores[shift] = collect(quickstart)
        assert words in scores[shift]["headline"]
    assert "more than chance" in scores[3]["headline"] and scores[3]["paired"]["p_value"] < 0.05
    one_better = verdicts(2)
    one_better[(~one_better).argmax()] = True  # a single image is never evidence
    write_verdicts(dra, one_better)
    assert "this run shows no difference" in collect(quickstart)["headline"]


def test_a_resumed_sweep_counts_the_later_report_of_an_epoch(quickstart: Store) -> None:
    file = quickstart / "sweep" / "rungs.jsonl"
    reported = file.read_jsonl()
    repeated = max(
        (row for row in reported if row["trial"] == "trial-000"), key=lambda row: row["epoch"]
    )
    file.write_jsonl([*reported, repeated | {"robust_accuracy": 0.125}])
    summary = collect(quickstart)
    assert summary["sweep"][0]["robust_accuracy"] == 0.125
    assert summary["asha"]["trials"] == 10


def test_rows_are_flat_and_in_percent(quickstart: Store, make_train: Callable[..., Store]) -> None:
    table = rows(quickstart)
    assert len(table) == 10 and set(SPACE) <= set(table[0])
    best = next(
        row for row in table if row["trial"] == collect(quickstart)["finals"]["dra"]["trial"]
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
    summary = collect(run)
    text = " ".join(summary["missing"])
    for part in (
        "'running'",
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
    summary = collect(run)
    assert summary["sweep"][0]["decision"] == "waiting"
    assert any("rungs.jsonl" in line for line in summary["missing"]) and any(
        "finalists" in line for line in summary["missing"]
    )
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
        ("sweep/manifest.json", lambda text: "[]", "manifest.json' holds a list"),
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
        collect(quickstart)


def test_an_evaluation_without_its_verdict_is_damaged(make_train: Callable[..., Store]) -> None:
    run = make_train()
    file = run / "evaluation" / "autoattack.json"
    file.write_json({key: value for key, value in file.read_json().items() if key != "interval"})
    with pytest.raises(
        DataError, match=r"autoattack.json' has no 'interval'; run the evaluation again"
    ):
        collect(run)


def test_finalists_that_cannot_be_paired_are_not_and_the_page_says_why(quickstart: Store) -> None:
    """The report refuses what `dra compare` refuses: other images, labels or settings."""
    finals = collect(quickstart)["finals"]
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
        summary = collect(quickstart)
        assert "paired" not in summary and "DRA keeps" in summary["headline"]
        (line,) = [line for line in summary["missing"] if line.startswith("paired comparison")]
        assert re.search(words, line)
        with pytest.raises(DataError, match=words):
            compare_runs(baseline, dra)


def test_the_report_and_the_command_compare_alike(quickstart: Store) -> None:
    summary = collect(quickstart)
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
    assert collect(quickstart)["paired"]["also_differ"] == {}
    file = quickstart / "sweep" / "manifest.json"
    manifest = file.read_json()
    baseline = manifest["finals"]["baseline"]
    manifest["trials"][baseline]["synthetic.images"] = 0
    manifest["trials"][baseline]["threat.eps_255"] = 8.0
    file.write_json(manifest)
    summary = collect(quickstart)
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
    summary = collect(quickstart)
    assert [match["shared"]["synthetic.images"] for match in summary["equal"]] == [0, 4000]
    for match in summary["equal"]:
        for kind in ("aligned", "baseline"):
            trial = match[kind]
            assert chosen()[trial]["synthetic.images"] == match["shared"]["synthetic.images"]
            assert (chosen()[trial]["align.weight"] > 0) == (kind == "aligned")
            assert match[f"{kind}_accuracy"] == reported[trial, match["epoch"]]
