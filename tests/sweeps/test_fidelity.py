"""Which late verdicts a sweep is to have, which are missing, and who wins by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dra_ray import config, runs
from dra_ray.report.answers import paragraph
from dra_ray.report.findings import answered
from dra_ray.runs import FidelityRow, LateAttack, pack_verdicts
from dra_ray.storage import Store
from dra_ray.sweeps import fidelity
from dra_ray.sweeps.answer import Answer, answer
from tests.sweeps.logged import IMAGES, ended, first, row

TRIALS = {f"trial-{n}": {"align.weight": float(n)} for n in range(4)}
PGD = {"trial-0": first(350), "trial-1": first(500), "trial-2": first(480), "trial-3": first(300)}


def late(
    trial: str, robust: np.ndarray | None, attack: LateAttack = "autoattack", epoch: int = 4
) -> FidelityRow:
    """A verdict after the epoch of `logged.ended`, or one that there will not be."""
    if robust is None:
        scored = {"reason": "its checkpoint is gone"}
    else:
        scored = {
            "images": len(robust),
            "clean_accuracy": 0.7,
            "robust_accuracy": float(robust.mean()),
            "verdicts": pack_verdicts(robust),
        }
    return FidelityRow(
        trial=trial, epoch=epoch, images_seen=100 * epoch, step=epoch, attack=attack, **scored
    )


def the_answer(rows: list[FidelityRow], best: int = 2) -> Answer:
    found = answer(TRIALS, ended(PGD), IMAGES, rows, best)
    assert isinstance(found, Answer)
    return found


def test_off_by_default_and_no_part_of_the_digest() -> None:
    tree = {"space": {"seed": [1, 2]}}
    plain = config.Sweep.model_validate(tree)
    off = config.Sweep.model_validate(tree | {"fidelity": {"finalists": "none"}})
    on = config.Sweep.model_validate(tree | {"fidelity": {"finalists": "standard"}})
    wide = config.override(on, {"fidelity.workers": 4, "fidelity.gpus_per_worker": 0.5})
    assert not plain.fidelity.is_on
    assert "fidelity" not in plain._without_added()
    assert plain.digest() == off.digest() != on.digest() == wide.digest()


def test_apgd_judges_from_a_share_of_each_trial_on() -> None:
    """Trials of 4 and of 8 epochs: from 3 and from 6 on; what failed has no validation."""
    settings = config.Fidelity(apgd_from=0.75)
    rows = [row("a", epoch, 0.5) for epoch in (1, 2, 3, 4)]
    rows += [row("b", epoch, 0.5) for epoch in (2, 5, 6)]
    rows += [row("b", 6, 0.5, decision="stop"), row("c", 4, 0.5, decision="failed")]
    keys = fidelity.due(settings, rows, {"a": 4, "b": 8, "c": 4})
    assert keys == [("a", 300, "apgd"), ("a", 400, "apgd"), ("b", 600, "apgd")]
    assert fidelity.due(config.Fidelity(), rows, {"a": 4, "b": 8, "c": 4}) == []


def test_a_killed_driver_finds_the_verdicts_that_are_missing() -> None:
    """What has a row, even one that says why there is no verdict, is not made again."""
    settings = config.Fidelity(finalists="standard", best=2)
    keys = fidelity.due_of_finalists(settings, TRIALS, ended(PGD))
    assert keys == [(name, 400, "autoattack") for name in ("trial-1", "trial-2", "trial-0")]
    there = [late("trial-1", first(1)), late("trial-2", None), late("trial-0", first(1), "apgd")]
    assert fidelity.missing(keys, there) == [("trial-0", 400, "autoattack")]
    assert fidelity.missing(keys, []) == keys
    assert fidelity.due_of_finalists(config.Fidelity(), TRIALS, ended(PGD)) == []
    unfinished = [row("trial-1", 2, 0.5)]
    assert fidelity.due_of_finalists(settings, TRIALS, unfinished) == []


def test_repeats_of_a_finalist_are_judged_too() -> None:
    trials = {f"a-{n}": {"align.weight": 1.0, "seed": n} for n in range(2)}
    trials["b"] = {"align.weight": 2.0, "seed": 0}
    rows = ended({"a-0": first(500), "a-1": first(510), "b": first(300)})
    settings = config.Fidelity(finalists="standard", best=1)
    keys = fidelity.due_of_finalists(settings, trials, rows)
    assert [name for name, _, _ in keys] == ["a-0", "a-1"]


def test_the_strongest_attack_that_judged_all_finalists_names_the_winner() -> None:
    """Trial 1 leads by PGD and by APGD, trial 2 by AutoAttack."""
    names = ("trial-0", "trial-1", "trial-2")
    by_apgd = [late(name, first(n), "apgd") for name, n in zip(names, (300, 450, 440), strict=True)]
    by_aa = [late(name, first(n)) for name, n in zip(names, (290, 400, 430), strict=True)]
    found = the_answer(by_apgd + by_aa)
    assert (found.trial, found.attack, found.robust_accuracy) == ("trial-2", "autoattack", 0.43)
    assert found.finalists == ("trial-2", "trial-1", "trial-0")
    assert found.by_pgd == ("trial-1", "trial-2", "trial-0")
    assert found.baseline == "trial-0"
    assert found.over_baseline is not None
    assert found.over_baseline.value == pytest.approx(0.14)
    assert found.clean_accuracy == 0.7
    assert (found.competitors, found.trials) == (4, 4)
    text = paragraph(found)
    assert "withstands AutoAttack on 43" in text
    assert (
        "PGD and AutoAttack disagree about their order, which is trial-1, trial-2, trial-0 by PGD "
        "and trial-2, trial-1, trial-0 by AutoAttack, best first." in text
    )
    incomplete = the_answer([*by_apgd, *by_aa[:2], late("trial-2", None)])
    assert (incomplete.trial, incomplete.attack) == ("trial-1", "apgd")
    assert incomplete.by_pgd == ()
    assert "disagree" not in paragraph(incomplete)
    assert the_answer(by_apgd[:2]) == the_answer([])
    assert the_answer([]).attack == "pgd"


def test_a_verdict_on_another_validation_counts_nothing() -> None:
    """APGD judged earlier checkpoints of all finalists, but not those that are compared."""
    earlier = [late(name, first(1), "apgd", epoch=3) for name in TRIALS]
    assert the_answer(earlier).attack == "pgd"


def test_the_end_of_a_sweep_reads_the_late_verdicts(tmp_path: Path) -> None:
    sweep = config.Sweep(
        space={"align.weight": [0.0, 1.0, 2.0, 3.0]},
        fidelity=config.Fidelity(finalists="standard", best=2),
    )
    folder = Store(str(tmp_path)) / "run"
    tree = sweep.model_dump(mode="json")
    runs.begin_run(folder, "sweep", tree, sweep.digest(), runs.Facts(trials=TRIALS))
    runs.write_rows(folder / runs.RUNGS, ended(PGD))
    text, recipe = answered(folder, sweep)
    assert "The best is trial-1" in text
    names = ("trial-0", "trial-1", "trial-2")
    rows = [late(name, first(n)) for name, n in zip(names, (290, 400, 430), strict=True)]
    runs.write_rows(folder / runs.FIDELITY, rows)
    text, recipe = answered(folder, sweep)
    assert "The best is trial-2" in text
    assert recipe is not None
    assert "weight: 2.0" in recipe.read_text()
