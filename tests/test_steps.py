"""A training step on its own, without Ray: two workers with SyncBN are one worker; other objectives; other arithmetic."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from dra_ray import config, data, train
from dra_ray.robust import optimisers

BATCH, STEPS = 32, 3


def small(**changes: Any) -> config.Experiment:
    """Digits, no augmentation, a step in seconds; `changes` are dotted fields with `__` for the dot."""
    settings = {
        "model.name": "wrn-10-1",
        "optim.batch": BATCH,
        "optim.lr": 0.05,
        "threat.eps_255": 32,
        "threat.step_255": 16,
        "threat.steps": 2,
        "align.weight": 0.0,
    }
    return config.override(config.Experiment(), settings | {field.replace("__", "."): value for field, value in changes.items()})


def run(experiment: config.Experiment, rank: int = 0, workers: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(state dict, losses) after a few steps of one worker."""
    images = data.load(experiment.data)
    state, _ = train.initial_state(experiment, images.shape, None, torch.device("cpu"))
    mine = slice(rank * BATCH // workers, (rank + 1) * BATCH // workers)
    losses = []
    for number in range(STEPS):
        optimisers.set_rate(state.optimizer, experiment.optim.lr, 0.9)
        chosen = torch.arange(number * BATCH, (number + 1) * BATCH)[mine]
        parts = train.step(state, experiment, *images.train.take(chosen), mine, None)
        losses.append(train._mean(parts, mine, BATCH))
        state.step += 1
    return state.student.state_dict(), torch.stack(losses)


def _worker(rank: int, port: int, experiment: config.Experiment, out: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = run(experiment, rank, 2)
    if rank == 0:
        buffer = io.BytesIO()
        torch.save(found, buffer)
        out.put(buffer.getvalue())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def two_workers(experiment: config.Experiment) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    torch.multiprocessing.spawn(_worker, (port, experiment, out), nprocs=2, join=False)
    return torch.load(io.BytesIO(out.get()), weights_only=True)


def test_two_workers_with_synchronised_norms_are_one_worker() -> None:
    """2 x B/2 with SyncBN equals 1 x B up to rounding, over three steps: losses, weights and running statistics."""
    experiment = small(compute__sync_batchnorm=True)
    (one, losses), (two, losses_two) = run(experiment), two_workers(experiment)
    assert torch.allclose(losses, losses_two, rtol=1e-4, atol=1e-6)
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-3, atol=1e-4), name


def test_without_them_they_are_not() -> None:
    """Per-worker statistics are another model: the check above can fail."""
    experiment = small()
    assert not torch.allclose(run(experiment)[1], two_workers(experiment)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "pgd-at"},
        {"loss__name": "fgsm-rs", "threat__steps": 1},
        {"loss__name": "ikl", "loss__awp": 0.005, "loss__awp_from_epoch": 0, "threat__ramp_epochs": 20, "optim__schedule": "cosine"},
        {"threat__mode": "eval", "threat__start": "normal"},
        {"threat__norm": "l2", "threat__eps_255": 128, "threat__step_255": 64, "threat__start": "normal"},
        {"optim__name": "lion", "optim__lr": 1e-4, "optim__decayed": "weights", "optim__clip_norm": 1.0},
        {"optim__name": "adamw", "optim__lr": 1e-3},
        {"compute__channels_last": False},
        {"compute__precision": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_objective_takes_steps(changes: dict[str, Any]) -> None:
    weights, losses = run(small(**changes))
    start = train.initial_state(small(**changes), data.load(config.Data()).shape, None, torch.device("cpu"))[0].student.state_dict()
    assert bool(losses.isfinite().all()) and bool((losses[:, 0] > 0).all())
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


def test_arithmetic_changes_rounding_only() -> None:
    """Contiguous and channels-last steps agree to rounding; bf16 is near, and is not equal."""
    reference = run(small())[1]
    assert torch.allclose(run(small(compute__channels_last=False))[1], reference, rtol=1e-3)
    bf16 = run(small(compute__precision="bf16"))[1]
    assert torch.allclose(bf16[0], reference[0], rtol=0.1) and not torch.equal(bf16, reference)
