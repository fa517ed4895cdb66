"""The page of a large sweep: what it found, how large it is, and sweeps side by side."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from dra_ray import config, runs
from dra_ray.errors import DataError
from dra_ray.report import answered, collect, planned, versus, write
from dra_ray.report.findings import find
from dra_ray.report.page import findings_of
from dra_ray.report.summary import Trial
from dra_ray.report.sweep_plots import parallel
from dra_ray.runs import Manifest, Planned, RungRow, pack_verdicts
from dra_ray.storage import Store
from dra_ray.sweeps.answer import Answer
from tests.report.test_html import Page
from tests.report.written_runs import manifest

IMAGES, PER_EPOCH = 512, 1000


def write_large(run: Store, count: int, shift: float = 0.0, seed: int = 0, **more: Any) -> Store:
    """A sweep of drawn lambda, sigma and scale under successive halving: lambda is best at 2, more
    synthetic images help, sigma does nothing.
    """
    generator = np.random.default_rng(seed)
    hard = generator.random(IMAGES)
    trials: dict[str, dict[str, Any]] = {}
    rows = []
    for number in range(count):
        fields = {
            "align.weight": 0.0 if number % 10 == 0 else float(generator.uniform(0.1, 6)),
            "synthetic.images": int(generator.choice([1000, 4000, 16000, 64000])),
        }
        if fields["align.weight"]:
            fields["align.sigma"] = float(generator.uniform(0.05, 1))
        name = f"trial-{number:03d}"
        trials[name] = fields
        top = 0.40 + shift - 0.01 * (fields["align.weight"] - 2) ** 2
        top += 0.03 * math.log10(fields["synthetic.images"] / 1000)
        last = 9 if number % 9 in (0, 4) else 3 if number % 3 == 0 else 1
        for epoch in (1, 3, 9):
            if epoch <= last:
                level = top * (1 - math.exp(-epoch / 2)) + 0.05 * generator.normal(size=IMAGES)
                flags = hard < level
                row = {
                    "trial": name,
                    "epoch": epoch,
                    "images_seen": PER_EPOCH * epoch,
                    "clean_accuracy": round(0.9 - 0.02 * fields["align.weight"], 4),
                    "robust_accuracy": float(flags.mean()),
                    "images": IMAGES,
                    "verdicts": pack_verdicts(flags),
                    "decision": "done" if epoch == 9 else "stop" if epoch == last else "continue",
                    "at": float(1000 * epoch + number),
                }
                rows.append(row)
    (run / "rungs.jsonl").write_jsonl(rows)
    base = config.Experiment(
        optim=config.Optim(epochs=9), data=config.Data(validation_images=IMAGES)
    )
    space: dict[str, list[Any]] = {"align.weight": [0.0, 1.0]}
    sweep = config.Sweep(base=base, space=space)
    manifest(run, "sweep", sweep.model_dump(mode="json"), trials=trials, **more)
    return run


@pytest.mark.seconds
def test_a_page_of_500_trials_stays_small_and_quick(tmp_path: Path) -> None:
    """Beyond plotly's own script, which every page with a plot carries."""
    run = write_large(Store(str(tmp_path)) / "large", 500)
    started = time.process_time()
    text = write(run).read_text()
    assert time.process_time() - started < 30  # about 6 s on a quiet core
    assert len(text) - len(get_plotlyjs()) < 1_000_000
    seen = Page(text)
    assert {"answer", "axes", "front", "more", "sweep"} <= set(seen.ids)
    assert seen.tags.count("details") >= 2  # the table of trials among them
    assert "500 trials" in seen.text
    for figure in seen.figures():
        go.Figure(figure)
        assert len(figure["data"]) <= 60


@pytest.mark.seconds
def test_the_page_says_what_is_true_of_the_sweep(tmp_path: Path) -> None:
    run = write_large(Store(str(tmp_path)) / "large", 120)
    found = findings_of(run)
    assert found is not None
    assert isinstance(found.answer, Answer)
    rows = [RungRow.model_validate(row) for row in (run / "rungs.jsonl").read_jsonl()]
    done = {row.trial: row.robust_accuracy or 0 for row in rows if row.decision == "done"}
    assert done[found.answer.trial] == max(done.values())
    weighed = {axis.field: axis for axis in found.importance.axes}  # type: ignore[union-attr]
    assert max(weighed, key=lambda field: weighed[field].share) != "align.sigma"
    (curve,) = found.effects["synthetic.images"]
    assert [level.centre for level in curve.levels] == [1000, 4000, 16000, 64000]
    write(run)
    tree = (run / "summary.json").read_json()["findings"]
    assert tree["answer"]["trial"] == found.answer.trial
    assert found.answer.trial in tree["paragraph"]


def test_a_plan_stands_beside_what_was_spent(tmp_path: Path) -> None:
    plan = {
        "trials": 24,
        "images": {"expected": 100_000, "low": 80_000, "high": 130_000},
        "seconds": {"expected": 60.0, "low": 50.0, "high": 80.0},
    }
    run = write_large(Store(str(tmp_path)) / "planned", 20, plan=plan, elapsed_s=45.0)
    spent = collect(run).tree()["spent"]
    last = {row["trial"]: row["images_seen"] for row in (run / "rungs.jsonl").read_jsonl()}
    assert spent == {"trials": 20, "images": sum(last.values()), "seconds": 45.0}
    page = Page(write(run).read_text())
    assert "plan" in page.ids
    assert "Planned and taken, of 24 and 20 trials: " in page.text
    assert "1 min 0 s of arithmetic and 45 s in all" in page.text
    assert "% of the plan" in page.text
    rows = {row.what: row for row in planned.compare(Planned.model_validate(plan), spent)}
    assert (rows["seconds"].share, rows["seconds"].inside) == (0.75, False)
    assert "money" not in rows
    measured = Planned.model_validate(plan | {"measured": True})
    said = planned.sentence(measured, planned.compare(measured, spent))
    assert "1 min 0 s (50 s to 1 min 20 s) and 45 s, 75% of the plan" in said
    assert "arithmetic at the speed" in page.text
    runs.update_manifest(run, runs.Facts(plan=measured))
    page = Page(write(run).read_text())
    assert "timed on the machine" in page.text
    assert "arithmetic" not in page.text


def test_verdicts_of_stronger_attacks_stand_beside_pgds(tmp_path: Path) -> None:
    run = write_large(Store(str(tmp_path)) / "late", 20)
    plain = Page(write(run).read_text())
    assert "late" not in plain.ids
    rows = (run / "rungs.jsonl").read_jsonl()
    done = [row for row in rows if row["decision"] == "done"]
    late = [
        {key: row[key] for key in ("trial", "epoch", "images_seen", "images", "clean_accuracy")}
        | {"step": 1, "attack": "apgd", "robust_accuracy": 0.125, "verdicts": None}
        for row in done
    ]
    late[-1] |= {"robust_accuracy": None, "reason": "its checkpoint is gone"}
    (run / "fidelity.jsonl").write_jsonl(late)
    found = findings_of(run)
    assert found is not None
    assert len(found.late) == len(done)
    assert {verdict.by_pgd for verdict in found.late} == {row["robust_accuracy"] for row in done}
    page = Page(write(run).read_text())
    assert "late" in page.ids
    assert "12.5" in page.text
    assert "its checkpoint is gone" in page.text
    tree = (run / "summary.json").read_json()["findings"]
    assert len(tree["late"]) == len(done)


def test_few_trials_are_told_why_there_is_no_more(tmp_path: Path) -> None:
    run = write_large(Store(str(tmp_path)) / "few", 5)
    text = Page(write(run).read_text()).text
    assert "it takes 10" in text
    assert "No fit of robust accuracy over images_seen: 3 distinct scales" in text


def test_a_sweep_without_reports_has_no_findings(tmp_path: Path) -> None:
    run = write_large(Store(str(tmp_path)) / "new", 3)
    (run / "rungs.jsonl").write_text("")
    assert findings_of(run) is None
    assert "</html>" in write(run).read_text()
    assert isinstance(find(Manifest(), []).effects, dict)


def test_parallel_coordinates_place_every_value() -> None:
    trials = [
        Trial(
            trial=name,
            fields=fields,
            epoch=1,
            images_seen=1,
            clean_accuracy=None,
            robust_accuracy=robust,
            best_robust_accuracy=robust,
            decision="done",
            rung=None,
        )
        for name, robust, fields in (
            ("a", 0.1, {"x": 1, "y": "p"}),
            ("b", 0.2, {"x": 3, "y": "q"}),
            ("c", 0.3, {"x": 2}),
        )
    ]
    figure = parallel(trials, ["x", "y"])
    assert figure is not None
    lines = [trace["y"] for trace in figure["data"]]
    assert sorted(lines, key=str) == sorted(
        [[0.0, 0.0, 0.0, None], [1.0, 1.0, 0.5, None], [0.5, None, 1.0, None]], key=str
    )
    assert parallel(trials[:1], ["x"]) is None


def test_dra_sweep_ends_in_words_and_a_recipe(tmp_path: Path) -> None:
    run = write_large(Store(str(tmp_path)) / "large", 30)
    sweep = config.validate(config.Sweep, (run / "manifest.json").read_json()["config"], "sweep")
    text, file = answered(run, sweep)
    assert file is not None
    winner = config.load(str(file), config.Experiment)
    fields = (run / "manifest.json").read_json()["trials"]
    (name,) = (trial for trial in fields if f"The best is {trial} " in text)
    assert winner.align.weight == fields[name]["align.weight"]
    assert winner.optim.epochs == 9


def test_sweeps_are_compared_on_one_page(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    sweeps = [write_large(root / "one", 20), write_large(root / "two", 30, shift=0.2)]
    table = versus.write(sweeps, root / "comparison.html")
    assert [row["sweep"] for row in table] == ["one", "two"]
    assert table[0]["to the first, points"] is None
    assert "clear" in table[1]["to the first, points"]
    assert table[1]["images"] == collect(sweeps[1]).tree()["spent"]["images"]
    seen = Page((root / "comparison.html").read_text())
    assert seen.ids == ["sweeps", "answers"]
    (figure,) = seen.figures()
    go.Figure(figure)
    assert all(trace["y"] == sorted(trace["y"]) for trace in figure["data"])


def test_sweeps_of_other_attacks_are_not_compared(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    one, two = write_large(root / "one", 12), write_large(root / "two", 12)
    changed = (two / "manifest.json").read_json()
    changed["config"]["base"]["threat"]["eps_255"] = 4.0
    (two / "manifest.json").write_json(changed)
    told = versus.rows([versus.read(one), versus.read(two)])[1]["to the first, points"]
    assert told == "another threat.eps_255: 4.0 against 8.0"
    with pytest.raises(DataError, match="is not a sweep"):
        versus.read(root / "missing")
