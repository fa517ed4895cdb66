"""The alignment of a run: its requests, its loss, and what a checkpoint keeps of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dra_ray import config, data, students
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import targets
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Ready, Request
from dra_ray.training import alignment, losses, optimisers, step, workers
from tests.training.two_workers import on_two

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


def begun(settings: config.Experiment) -> tuple[step.State, list[LocalTeacher]]:
    """The state before the first step, and its sources."""
    torch.manual_seed(0)
    net = EDM(config.UNet(model_channels=16), 8, 1, 10)
    sources = [LocalTeacher(net, each) for each in settings.teachers]
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
    projected = state.aligner.projectors[0](features)
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
            state.aligner.projectors[0](
                maps[i, :, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2].mean((1, 2))
            ),
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


TWO_LAYERS = [
    {"sigma": 0.1, "share": 0.25},
    {"sigma": 0.5, "share": 0.25},
    {"sigma": 0.3, "layer": "enc.8x8_conv", "share": 0.5},
]


def test_the_loss_of_several_terms_is_their_mean_by_shares() -> None:
    """Terms of one layer share a projector; each is what a run with that term alone would have."""
    settings = experiment(align__terms=TWO_LAYERS)
    state, sources = begun(settings)
    assert state.aligner is not None
    assert [source.layer for source in sources] == ["dec.4x4_in1"] * 2 + ["enc.8x8_conv"]
    assert len(state.aligner.projectors) == 2
    features = torch.randn(6, 64)
    answers = [torch.randn(6, source.feature_dim) for source in sources]
    heads = [state.aligner.projectors[place] for place in (0, 0, 1)]
    alone = [
        losses.alignment(head(features), answer).item()
        for head, answer in zip(heads, answers, strict=True)
    ]
    loss = state.aligner(features, [Ready(answer) for answer in answers])
    wanted = 0.25 * alone[0] + 0.25 * alone[1] + 0.5 * alone[2]
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_lambda_keeps_its_meaning_with_a_second_feature() -> None:
    """Equal answers to both requests give the loss of one of them."""
    for extra in (0.5, 1.0, 3.0):
        state, _ = begun(experiment(align__extra_weight=extra))
        one, _ = begun(experiment())
        assert state.aligner is not None
        assert one.aligner is not None
        features, answer = torch.randn(6, 64), Ready(torch.randn(6, 32))
        loss = state.aligner(features, [answer, answer])
        assert loss.item() == pytest.approx(one.aligner(features, [answer]).item(), abs=1e-6)


def test_two_terms_are_the_second_feature_and_equal_terms_are_one(tmp_path) -> None:
    second = experiment(align__extra_weight=1.0)
    terms = experiment(align__terms=[{"sigma": 0.06, "share": 0.5}, {"share": 0.5}])
    states = [begun(settings) for settings in (second, terms)]
    for settings, (state, sources) in zip((second, terms), states, strict=True):
        trained(settings, state, sources, 2)
    weights, same = (state.student.state_dict() for state, _ in states)
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    states[0][0].save(Store(str(tmp_path)))
    fresh, _ = begun(second)
    fresh.load(Store(str(tmp_path)))
    assert fresh.aligner is not None
    assert states[0][0].aligner is not None
    head, saved = (x.projectors.state_dict() for x in (fresh.aligner, states[0][0].aligner))
    assert all(torch.equal(head[key], saved[key]) for key in head)


def test_terms_of_several_layers_resume_to_the_bit(tmp_path) -> None:
    settings = experiment(align__terms=TWO_LAYERS)
    whole, sources = begun(settings)
    trained(settings, whole, sources, 1)
    whole.save(Store(str(tmp_path)))
    trained(settings, whole, sources, 1)
    second, _ = begun(settings)
    second.load(Store(str(tmp_path)))
    trained(settings, second, sources, 1)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[key]), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"align__terms": [{"share": 0.4}, {"share": 0.4}]}, "shares that sum to 0.8"),
        ({"align__terms": [{}], "align__extra_weight": 1.0}, "extra_weight=1 is a term of its own"),
        ({"align__terms": [{"share": 2.0}]}, "align.terms.0.share=2.0"),
    ],
)
def test_terms_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        experiment(**changes)


def test_each_term_draws_its_own_noise_and_levels() -> None:
    settings = experiment(align__terms=[{"share": 0.25}] * 4)
    images = torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    requests = alignment.requests(settings, images, labels, 3, slice(0, BATCH))
    assert len({int(request.noise_seeds[0]) for request in requests}) == 4
    assert len({float(request.sigma[0]) for request in requests}) == 4


def test_info_nce_is_numpys() -> None:
    draws = torch.Generator().manual_seed(0)
    one, two = torch.randn(7, 5, generator=draws), torch.randn(7, 5, generator=draws)
    x, y = (rows.double().numpy() for rows in (one, two))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    scores = x @ y.T / 0.2
    wanted = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores))
    assert losses.info_nce(one, two, 0.2).item() == pytest.approx(wanted, rel=1e-5)


def test_cka_is_numpys_and_ignores_rotations_and_scale() -> None:
    draws = torch.Generator().manual_seed(0)
    one, two = torch.randn(9, 4, generator=draws) + 2, torch.randn(9, 6, generator=draws)
    x, y = (rows.double().numpy() - rows.double().numpy().mean(0) for rows in (one, two))
    across, own, theirs = (np.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
    assert losses.cka(one, two).item() == pytest.approx(1 - across**2 / own / theirs, rel=1e-4)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=draws))
    assert losses.cka(one, 3 * one @ turn + 1).item() == pytest.approx(0, abs=1e-5)


LOSSES = {"infonce": lambda a, b: losses.info_nce(a, b, 0.2), "cka": losses.cka}


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(10, 4, generator=draws), torch.randn(10, 6, generator=draws)[:, :4]


def _part(rank: int, name: str) -> tuple[float, torch.Tensor]:
    """(this worker's share of the loss, mean over workers of the gradient of a scale)."""
    mine = (slice(0, 6), slice(6, 10))[rank]
    one, two = (rows[mine] for rows in _rows())
    scale = torch.ones(4, requires_grad=True)
    loss = LOSSES[name](one * scale, two)
    share = (mine.stop - mine.start) / 10
    (loss * share * workers.count()).backward()
    assert scale.grad is not None
    workers.average_([scale.grad])
    return loss.item() * share, scale.grad


@pytest.mark.parametrize("name", LOSSES)
def test_losses_over_a_batch_do_not_depend_on_how_workers_share_it(name: str) -> None:
    one, two = _rows()
    scale = torch.ones(4, requires_grad=True)
    whole = LOSSES[name](one * scale, two)
    whole.backward()
    parts = on_two(_part, name)
    assert sum(part[0] for part in parts) == pytest.approx(whole.item(), abs=1e-5)
    assert scale.grad is not None
    assert torch.allclose(parts[0][1], scale.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["infonce", "cka"])
def test_other_losses_train(loss: str) -> None:
    settings = experiment(align__loss=loss, align__transform="centre")
    state, sources = begun(settings)
    parts = trained(settings, state, sources, 2)
    assert parts.isfinite().all()
    assert parts[3] > 0
    with pytest.raises(ConfigError, match=f"align.loss='{loss}' compares images"):
        experiment(align__loss=loss, teacher__tokens=True)


def test_lambda_rises_and_falls() -> None:
    def weights(**changes: Any) -> list[float]:
        align = config.Align(weight=2.0, **changes)
        return [alignment.weight_at(align, epoch, 4) for epoch in range(4)]

    assert weights() == [2.0] * 4
    assert weights(warmup_epochs=2) == [1.0, 2.0, 2.0, 2.0]
    assert weights(decay="linear") == [2.0, 1.5, 1.0, 0.5]
    assert weights(decay="cosine") == pytest.approx(1 + np.cos(np.pi * np.arange(4) / 4))


def test_the_projector_has_its_own_rate_and_decay() -> None:
    settings = experiment(
        align__projector_lr=0.4, align__projector_weight_decay=0.25, optim__lr=0.2
    )
    state, _ = begun(settings)
    assert state.aligner is not None
    optimisers.set_rate(state.optimizer, 0.1, 0.9)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {found[id(p)] for p in state.aligner.parameters()} == {(0.2, 0.25)}
    assert {found[id(p)] for p in state.student.parameters()} == {(0.1, 5e-4), (0.1, 0.0)}
    assert len(begun(experiment())[0].optimizer.param_groups) == 2, "as it was"
