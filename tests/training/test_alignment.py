"""The alignment of a run: its requests, its loss, and what a checkpoint keeps of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.storage import Store
from dra_ray.teachers import targets
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Ready, Request
from dra_ray.training import alignment, optimisers, step

BATCH = 16


def experiment(**changes: Any) -> config.Experiment:
    settings = {
        "model.name": "wrn-10-1",
        "optim.batch": BATCH,
        "threat.steps": 1,
        "align.hidden": 32,
        "align.statistics_images": 64,
        "teacher.uri": "unused",
        "teacher.micro_batch": 16,
    }
    return config.override(
        config.Experiment(),
        settings | {field.replace("__", "."): value for field, value in changes.items()},
    )


def teacher(settings: config.Experiment) -> LocalTeacher:
    torch.manual_seed(0)
    return LocalTeacher(EDM(config.UNet(model_channels=16), 8, 1, 10), settings.teacher)


def begun(settings: config.Experiment) -> tuple[step.State, list[LocalTeacher]]:
    """The state before the first step, and its sources."""
    sources = [teacher(settings)] * len(settings.align.targets)
    images = data.load(settings.data)
    state, _ = step.initial_state(settings, images.shape, sources, torch.device("cpu"))
    assert state.aligner is not None
    state.aligner.measure(sources, images.train, settings.shared_seed)
    return state, sources


def trained(
    settings: config.Experiment, state: step.State, sources: list[LocalTeacher], steps: int
) -> torch.Tensor:
    """The last losses after so many steps."""
    images, parts = data.load(settings.data).train, torch.zeros(4)
    for _ in range(steps):
        optimisers.set_rate(state.optimizer, 0.05, 0.9)
        chosen = torch.arange(state.step * BATCH, (state.step + 1) * BATCH)
        batch = step.prepare(settings, *images.take(chosen), state.step, slice(0, BATCH), sources)
        parts = step.step(state, settings, batch, slice(0, BATCH))
        state.step += 1
    return parts


@pytest.mark.parametrize("transform", ["none", "centre", "standardise", "whiten"])
def test_the_loss_is_that_of_the_transformed_target(transform: str) -> None:
    settings = experiment(align__transform=transform, align__whiten_dim=4)
    state, sources = begun(settings)
    assert state.aligner is not None
    features, answers = torch.randn(6, 64), torch.randn(6, 32)
    loss = state.aligner(features, [Ready(answers)])
    made = targets.transform(settings.align, 32)
    if isinstance(made, targets.Transform):
        images = data.load(settings.data).train
        request = targets.request(images, settings.align.sigma, 64, settings.shared_seed)
        made.fit(targets.measured(sources[0], request))
    target = made(answers)
    projected = state.aligner.projector(features)
    assert projected.shape == target.shape
    assert loss.item() == pytest.approx(
        1 - F.cosine_similarity(projected, target).mean().item(), abs=1e-6
    )


def test_a_run_with_a_transform_resumes_to_the_bit(tmp_path) -> None:
    settings = experiment(align__transform="whiten", align__whiten_dim=4)
    whole, sources = begun(settings)
    trained(settings, whole, sources, 3)
    first, _ = begun(settings)
    trained(settings, first, sources, 2)
    first.save(Store(str(tmp_path)))
    images = data.load(settings.data)
    second, _ = step.initial_state(settings, images.shape, sources, torch.device("cpu"))
    second.load(Store(str(tmp_path)))  # its statistics too: they are not measured again
    trained(settings, second, sources, 1)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[key]), key


def test_transforms_change_the_digest_and_their_defaults_do_not() -> None:
    plain = experiment()
    assert plain.digest() == experiment(align__transform="none").digest()
    digests = {
        experiment(align__transform="whiten", align__whiten_dim=dim).digest() for dim in (4, 8)
    }
    assert len({plain.digest(), *digests, experiment(align__transform="centre").digest()}) == 4


def test_requests_of_slices_are_slices_of_the_batchs() -> None:
    settings = experiment(align__extra_weight=1.0)
    images = torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    whole = alignment.requests(settings, images, labels, 3, slice(0, BATCH))
    for mine in (slice(0, 5), slice(5, BATCH)):
        parts = alignment.requests(settings, images[mine], labels[mine], 3, mine)
        for part, all_of_it in zip(parts, whole, strict=True):
            assert part.digest() == all_of_it[mine].digest()
    assert len({request.digest() for request in whole}) == 2
    assert isinstance(whole[0], Request)
