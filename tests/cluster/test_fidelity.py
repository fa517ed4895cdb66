"""Late verdicts of a small sweep, beside its training and at its end: to the bit those of one
process that attacks the same weights, and made once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dra_ray import config, data, runs, students
from dra_ray.attacks import autoattack
from dra_ray.attacks.plan import Settings
from dra_ray.config.catalogue import STANDARD, Effort
from dra_ray.runs import FidelityRow, RungRow
from dra_ray.storage import Store
from dra_ray.workloads import sweep

STEPS, FEW = 3, 8  # of APGD, and its images
SWEEP = config.Sweep(
    base=config.override(
        config.Experiment(),
        {
            "model.name": "wrn-10-1",
            "optim.epochs": 3,
            "optim.batch": 256,
            "threat.eps_255": 24,
            "threat.steps": 1,
            "selection.steps": 1,
            "selection.every_epochs": 1,
            "align.weight": 0.0,
            "data.validation_images": 16,
            "evaluation.level": "fast",
            "evaluation.pgd_steps": 1,
            "resources.cpus_per_worker": 0.5,
        },
    ),
    space={"optim.lr": [0.05, 0.2]},
    scheduler="none",
    asha=config.Asha(grace_epochs=1, max_concurrent=1),
    fidelity=config.Fidelity(
        apgd_from=0.6, apgd_images=FEW, apgd_steps=STEPS, finalists="standard", best=1
    ),
)


def locally(run: Store, row: FidelityRow) -> str:
    """The verdicts that one process finds for the checkpoint of a row."""
    tree = (run / runs.MANIFEST).read_json()["config"]
    experiment = config.Experiment.model_validate(tree)
    folder = run / runs.CHECKPOINTS / run.name
    states = [folder / name for name in folder.names() if name.endswith(f"{row.step:09d}")]
    images = data.load(experiment.data)
    student = students.build(experiment.model, images.shape)
    student.load_state_dict((states[0] / "state.pt").read_torch()["average"])
    few = data.in_memory(images.validation[: row.images])
    screen = row.attack == "apgd"
    settings = Settings(
        threat=experiment.threat,
        seed=experiment.evaluation.seed,
        effort=Effort(apgd_steps=STEPS) if screen else STANDARD,
        level="screen" if screen else "fast",
    )
    student.eval().requires_grad_(False)
    pixels, batch = data.to_float(few.images), experiment.evaluation.batch
    plan = autoattack.single_process(student, pixels, few.labels, settings, batch=batch)
    return runs.pack_verdicts(plan.alive.numpy())


@pytest.mark.slow
def test_late_verdicts_are_those_of_one_process_and_are_made_once(
    ray_cluster: Any, tmp_path: Path
) -> None:
    folder = Store(str(tmp_path)) / "run"
    manifest = sweep.run(SWEEP, folder)
    assert manifest.is_done
    rows = runs.read_rows(folder / runs.FIDELITY, FidelityRow)
    assert sorted((row.trial, row.epoch) for row in rows if row.attack == "apgd") == [
        (trial, epoch) for trial in ("trial-000", "trial-001") for epoch in (2, 3)
    ]
    (final,) = [row for row in rows if row.attack == "autoattack"]
    assert (final.epoch, final.images) == (3, 16)
    assert not (folder / runs.JUDGING).exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task does
    try:
        for row in rows:
            assert row.verdicts == locally(folder / runs.TRIALS / row.trial, row), row
    finally:
        torch.set_num_threads(threads)

    # as a driver that was killed before the last verdict would leave it
    rungs = runs.read_rows(folder / runs.RUNGS, RungRow)
    others = [row for row in rows if row != final]
    runs.write_rows(folder / runs.FIDELITY, others)
    runs.update_manifest(folder, runs.Facts(status="running"))
    assert sweep.run(SWEEP, folder).is_done
    again = runs.read_rows(folder / runs.FIDELITY, FidelityRow)
    assert again[: len(others)] == others
    assert (again[-1].verdicts, again[-1].digest) == (final.verdicts, final.digest)
    assert len(again) == len(rows)
    assert runs.read_rows(folder / runs.RUNGS, RungRow) == rungs
