"""The alignment of a run: its requests, its loss, and what a checkpoint keeps of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dra_ray import config, data, students
from dra_ray.errors import ConfigError
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
        made.fit(targets.measured(sources[0], request, settings.align))
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


@pytest.mark.parametrize("transform", ["none", "whiten"])
def test_tokens_of_a_map_of_one_position_are_pooled_features(transform: str) -> None:
    """Targets of one position: the student's map is averaged, and both losses are one."""
    settings = experiment(align__transform=transform, align__whiten_dim=4)
    state, _ = begun(settings)
    assert state.aligner is not None
    maps, answers = torch.randn(6, 64, 5, 5), torch.randn(6, 32)
    pooled = state.aligner(maps.mean((2, 3)), [Ready(answers)])
    tokens = state.aligner(maps, [Ready(answers[:, :, None, None])])
    assert torch.allclose(pooled, tokens, atol=1e-6)


def test_the_loss_of_tokens_is_the_mean_over_positions() -> None:
    state, _ = begun(experiment())
    assert state.aligner is not None
    maps, answers = torch.randn(3, 64, 4, 4), torch.randn(3, 32, 2, 2)
    loss = state.aligner(maps, [Ready(answers)])
    cosines = [
        F.cosine_similarity(
            state.aligner.projector(maps[i, :, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2].mean((1, 2))),
            answers[i, :, a, b],
            dim=0,
        ).item()
        for i in range(3)
        for a in range(2)
        for b in range(2)
    ]
    assert loss.item() == pytest.approx(1 - sum(cosines) / 12, abs=1e-6)


def test_a_map_with_fewer_positions_is_interpolated() -> None:
    ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
    grown = alignment.resampled(ramp, torch.zeros(1, 3, 4, 4))
    assert grown.shape == (1, 1, 4, 4)
    assert grown.mean() == ramp.mean()
    assert torch.equal(alignment.resampled(ramp, torch.zeros(1, 3, 2, 2)), ramp)


@pytest.mark.parametrize(
    "name", ["wrn-10-1", "relu-wrn-10-1", "resnet-18", "vit-t-2", "timm/convnext_atto"]
)
def test_students_map_and_feature_belong_together(name: str) -> None:
    """The same logits, and a map whose mean is the feature where nothing stands between."""
    resolution = 32 if name.startswith("timm") else 8
    shape = data.Shape(10, 1, resolution, (0.5,), (0.5,))
    torch.manual_seed(0)
    student = students.build(config.Model(name=name), shape).eval()
    x = torch.rand(2, 1, resolution, resolution)
    with torch.no_grad():
        logits, features = student.with_features(x)
        same, maps = student.with_map(x)
    assert torch.equal(logits, same)
    assert maps.shape[:2] == (2, student.feature_dim)
    if "wrn" in name or name == "resnet-18":
        assert torch.equal(maps.mean((2, 3)), features)


def test_a_student_without_a_map_is_refused() -> None:
    student = students.build(
        config.Model(name="timm/mobilenetv3_small_050"),
        data.Shape(10, 3, 32, (0.5,) * 3, (1.0,) * 3),
    )
    with pytest.raises(ConfigError, match="teacher.tokens=true needs a feature map"):
        student.eval().with_map(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("spatial_norm", [False, True])
def test_steps_towards_tokens_move_the_student(spatial_norm: bool) -> None:
    settings = experiment(
        teacher__tokens=True, align__spatial_norm=spatial_norm, align__transform="standardise"
    )
    state, sources = begun(settings)
    other, _ = begun(settings)
    parts = trained(settings, state, sources, 2)
    trained(config.override(settings, {"align.weight": 2.0}), other, sources, 2)
    assert 0 < parts[3] < 2
    weights, others = state.student.state_dict(), other.student.state_dict()
    assert any(not torch.equal(weights[key], others[key]) for key in weights)


def test_spatial_normalisation_needs_tokens() -> None:
    with pytest.raises(ConfigError, match="align.spatial_norm=true is over the positions"):
        experiment(align__spatial_norm=True)
