"""What a late verdict is made of: the weights that the validation judged, kept in time, or a row
that says why there is none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dra_ray import config, runs
from dra_ray.errors import LeaseError
from dra_ray.runs import FidelityRow, RungRow
from dra_ray.storage import Store
from dra_ray.workloads.fidelity import Late
from dra_ray.workloads.session import SNAPSHOT

SWEEP = config.Sweep(
    base=config.override(config.Experiment(), {"optim.epochs": 4, "optim.batch": 100}),
    space={"optim.lr": [0.1, 0.2]},
    fidelity=config.Fidelity(apgd_from=0.5),
)
TRIALS: dict[str, dict[str, object]] = {"trial-000": {"optim.lr": 0.1}}


def experiment(trial: str) -> config.Experiment:
    return config.override(SWEEP.base, TRIALS[trial])


def row(epoch: int, weights: runs.Weights) -> RungRow:
    """Of a trial of 2 steps an epoch."""
    return RungRow(
        trial="trial-000",
        epoch=epoch,
        images_seen=200 * epoch,
        clean_accuracy=0.5,
        robust_accuracy=0.25,
        weights=weights,
        decision="continue",
    )


def checkpointed(sweep: Store, epochs: list[int]) -> None:
    """A trial that has kept its checkpoints after these epochs."""
    folder = sweep / runs.TRIALS / "trial-000" / runs.CHECKPOINTS / "trial-000"
    results = []
    for epoch in epochs:
        name = f"checkpoint_{epoch}"
        state = {"student": {"w": torch.tensor([1.0 * epoch])}, "average": {"w": torch.zeros(1)}}
        (folder / name / "state.pt").write_torch(state)
        results.append({"checkpoint_dir_name": name, "metrics": {"step": 2 * epoch}})
    snapshot = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    (folder / SNAPSHOT).write_json(snapshot)


@pytest.mark.parametrize(("weights", "value"), [("raw", 3.0), ("average", 0.0)])
def test_the_weights_that_were_judged_are_kept_before_the_checkpoint_goes(
    tmp_path: Path, weights: runs.Weights, value: float
) -> None:
    """Nothing is kept of a validation before the share of a trial that APGD judges."""
    folder = Store(str(tmp_path))
    checkpointed(folder, [1, 3])
    Late(SWEEP, folder, lambda: None).begin(TRIALS, experiment, [row(1, weights), row(3, weights)])
    (name,) = (folder / runs.JUDGING).names()
    kept = (folder / runs.JUDGING / name / runs.MODEL).read_tensors()
    assert kept["w"].tolist() == [value]
    assert not (folder / runs.FIDELITY).exists()


def test_a_verdict_without_its_checkpoint_says_so_and_is_not_tried_again(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    checkpointed(folder, [3, 4])
    with Late(SWEEP, folder, lambda: None) as late:
        late.begin(TRIALS, experiment, [row(2, "average")])
        late.finish([row(2, "average")], finals=False)
    (written,) = runs.read_rows(folder / runs.FIDELITY, FidelityRow)
    assert (written.step, written.attack, written.robust_accuracy) == (4, "apgd", None)
    assert written.reason == "its checkpoint is gone"
    with Late(SWEEP, folder, lambda: None) as late:
        late.begin(TRIALS, experiment, [row(2, "average")])
        late.finish([row(2, "average")], finals=False)
    assert len(runs.read_rows(folder / runs.FIDELITY, FidelityRow)) == 1


def test_a_driver_that_lost_the_sweep_records_nothing(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    checkpointed(folder, [3, 4])

    def guard() -> None:
        raise LeaseError("another driver has the sweep")

    with Late(SWEEP, folder, guard) as late:
        late.begin(TRIALS, experiment, [row(2, "average")])
        with pytest.raises(LeaseError, match="another driver"):
            late.finish([], finals=False)
    assert not (folder / runs.FIDELITY).exists()
