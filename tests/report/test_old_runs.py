"""A run folder that an earlier version wrote still opens: its page, its comparison and its weights.

`old_runs/` holds a sweep of two evaluated trials, and the manifests of its teacher and synthetic
set. Its paths start with /root-of-the-runs. Checkpoints, images and the teacher's weights are left
out, and so are the weights of all students but one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dra_ray.evaluation import compare, subjects
from dra_ray.report import collect, rows, write
from dra_ray.storage import Store

FOLDER = Path(__file__).with_name("old_runs")
TRIALS = ("trial-000", "trial-001")


@pytest.fixture
def old(tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(FOLDER, tmp_path / "runs")))


def test_an_old_sweep_gives_its_page_and_its_numbers(old: Store) -> None:
    sweep = old / "sweep"
    summary = collect(sweep).tree()
    assert summary["status"] == "done"
    assert len(summary["sweep"]) == 2
    last = {row["trial"]: row for row in (sweep / "rungs.jsonl").read_jsonl()}
    scores = {trial["trial"]: trial["robust_accuracy"] for trial in summary["sweep"]}
    assert scores == {trial: last[trial]["robust_accuracy"] for trial in TRIALS}
    page = write(sweep).read_text()
    assert all(trial in page for trial in TRIALS)
    assert [row["trial"] for row in rows(sweep)] == list(TRIALS)


@pytest.mark.parametrize("run", ["teacher", "images", *(f"sweep/trials/{name}" for name in TRIALS)])
def test_every_other_old_run_has_a_page(old: Store, run: str) -> None:
    assert "</html>" in write(old / run).read_text()


def test_old_evaluations_are_compared(old: Store) -> None:
    a, b = (old / "sweep" / "trials" / trial for trial in TRIALS)
    report = compare.compare_runs(a, b)
    verdicts = [(run / "evaluation" / "per_sample.npz").read_npz()["robust"] for run in (a, b)]
    autoattack = next(row for row in report["rows"] if row["what"].startswith("AutoAttack"))
    assert report["images"] == len(verdicts[0])
    assert autoattack["accuracy_a"] == verdicts[0].mean()
    assert autoattack["accuracy_b"] == verdicts[1].mean()
    assert report["notes"] == []


@torch.no_grad()
def test_old_weights_give_the_verdicts_that_they_gave(old: Store) -> None:
    run = old / "sweep" / "trials" / TRIALS[0]
    subject = subjects.read(str(run))
    recorded = (run / "evaluation" / "per_sample.npz").read_npz()
    attacked = torch.from_numpy((run / "evaluation" / "adversarial.npz").read_npz()["images"])
    for images, verdicts in ((subject.images, "clean_correct"), (attacked, "robust")):
        correct = subject.student(images).argmax(1) == subject.labels
        assert correct.tolist() == recorded[verdicts].tolist(), verdicts
