"""CaDistill's losses by hand, on two workers as on one, and in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data.canonical import CanonicalBatch, CanonicalImages
from dra_ray.data.pictures import Split
from dra_ray.errors import ConfigError, DataError
from dra_ray.pool import sources as feature_sources
from dra_ray.storage import Store
from dra_ray.teachers.source import CanonicalFeatures, Request
from dra_ray.training import distillation, losses, optimisers, step, workers
from tests.training.two_workers import on_two

BATCH = 16


def rows(count: int, seed: int, width: int = 5) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=draws, dtype=torch.float64), dim=1)


def contrast_by_hand(
    anchors: Tensor, labels: Tensor, targets: Tensor, theirs: Tensor, among: bool
) -> Tensor:
    each = []
    for place, (anchor, label) in enumerate(zip(anchors, labels.tolist(), strict=True)):
        others = [at for at in range(len(targets)) if not (among and at == place)]
        scores = {at: (anchor @ targets[at]) / 0.3 for at in others}
        total = torch.stack(list(scores.values())).exp().sum().log()
        own = [total - scores[at] for at in others if int(theirs[at]) == label]
        if own:
            each.append(torch.stack(own).mean())
    return torch.stack(each).mean()


@pytest.mark.parametrize("among", [False, True])
def test_supervised_contrast_and_its_gradient_are_those_of_the_formula(among: bool) -> None:
    labels, theirs = torch.tensor([0, 1, 1, 3, 2, 0]), torch.tensor([1, 0, 0, 2, 1])
    anchors = rows(6, 0).requires_grad_()
    targets = anchors if among else rows(5, 1)
    theirs = labels if among else theirs
    ours = (
        losses.clustering(anchors, labels, 0.3)
        if among
        else losses.supervised_contrast(anchors, labels, targets, theirs, 0.3)
    )
    plain = contrast_by_hand(anchors, labels, targets, theirs, among)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(each, anchors)[0] for each in (ours, plain)))


def test_targets_get_no_gradient_and_none_of_a_class_costs_nothing() -> None:
    anchors, targets = rows(3, 0).requires_grad_(), rows(3, 1).requires_grad_()
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    loss = losses.supervised_contrast(anchors, zeros, targets, ones, 0.1)
    loss.backward()
    assert loss == 0
    assert targets.grad is None
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()
    alone = losses.clustering(anchors, torch.tensor([0, 1, 2]), 0.1)
    assert alone == 0


def _both(rank: int, cut: int) -> list[Tensor]:
    """Both losses and their gradient with the weights that a step gives a worker's slice."""
    labels, theirs = torch.tensor([0, 1, 1, 3, 2, 0]), torch.tensor([1, 0, 0, 2, 1, 2])
    mine = slice(0, cut) if rank == 0 else slice(cut, 6)
    share = (mine.stop - mine.start) * workers.count() / 6
    whole, targets = rows(6, 0), rows(6, 1)
    found = []
    for loss in (
        lambda x: losses.supervised_contrast(x, labels[mine], targets[mine], theirs[mine], 0.3),
        lambda x: losses.clustering(x, labels[mine], 0.3),
    ):
        part = whole[mine].clone().requires_grad_()
        value = loss(part)
        (value * share).backward()
        assert part.grad is not None
        everyone = torch.zeros(6, 5, dtype=torch.float64)
        everyone[mine] = part.grad
        found += [workers.total(value.detach() * share) / workers.count(), everyone]
        found[-1] = workers.total(everyone) / workers.count()
    return found


def test_two_workers_find_the_losses_and_gradients_of_one() -> None:
    whole = _both(0, 6)
    for found in on_two(_both, 4):
        for ours, plain in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, plain)


# -- in a step -------------------------------------------------------------------------------------
def experiment(**changes: Any) -> config.Experiment:
    settings = {
        "model.name": "wrn-10-1",
        "optim.batch": BATCH,
        "loss.name": "plain",
        "loss.label_smoothing": 0.0,
        "align.weight": 0.0,
        "canonical.uri": "unused",
        "distill.weight": 1.0,
        "distill.warmup_epochs": 0,
        "distill.per_step": 40,
    }
    return config.override(
        config.Experiment(),
        settings | {field.replace("__", "."): value for field, value in changes.items()},
    )


def samples(count: int = 60, width: int = 7) -> CanonicalImages:
    train = data.load(config.Data()).train
    pictures, labels = train.take(torch.arange(count))
    draws = torch.Generator().manual_seed(0)
    return CanonicalImages(
        Split(pictures, labels), torch.randn(count, width, generator=draws), rejected=0
    )


def begun(settings: config.Experiment) -> step.State:
    shape = data.load(settings.data).shape
    return step.initial_state(settings, shape, [], torch.device("cpu"))[0]


def real(settings: config.Experiment) -> tuple[Tensor, Tensor]:
    """The real images of the first step, augmented."""
    chosen = data.load(settings.data).train.take(torch.arange(BATCH))
    batch = step.prepare(settings, *chosen, 0, slice(0, BATCH), [])
    return batch.images, batch.labels


def advanced(settings: config.Experiment, state: step.State, steps: int) -> list[Tensor]:
    images, found = data.load(settings.data).train, []
    for _ in range(steps):
        optimisers.set_rate(state.optimizer, 0.05, 0.9)
        chosen = torch.arange(state.step * BATCH, (state.step + 1) * BATCH)
        mine = slice(0, BATCH)
        batch = step.prepare(
            settings, *images.take(chosen), state.step, mine, [], samples=samples()
        )
        found.append(step.step(state, settings, batch, mine))
        state.step += 1
    return found


def test_plain_training_is_cross_entropy_on_clean_images() -> None:
    settings = experiment(distill__weight=0.0)
    state = begun(settings)
    student, (pixels, labels) = begun(settings).student, real(settings)
    (found,) = advanced(settings, state, 1)
    expected = F.cross_entropy(student.train()(data.to_float(pixels)), labels)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected)
    assert found[2] == 0
    assert len(found) == 4


def test_a_step_adds_the_weighted_losses_of_canonical_samples() -> None:
    settings = experiment(distill__samples=0.7, distill__warmup_epochs=4)
    state = begun(settings)
    assert state.distiller
    other = begun(settings)
    student, distiller = other.student, other.distiller
    assert distiller
    (found,) = advanced(settings, state, 1)
    pixels, labels = real(settings)
    batch = distillation.prepare(settings, samples(), 0, slice(0, BATCH))
    _, features = student.train().with_features(data.to_float(pixels))
    logits, taught = student.with_features(data.to_float(batch.images))
    both = F.normalize(distiller.head(torch.cat([features, taught])), dim=1)
    ours, theirs = both[:BATCH], both[BATCH:]
    by_hand = (
        0.5 * losses.supervised_contrast(ours, labels, theirs, batch.labels, 0.1)
        + 0.5 * losses.clustering(theirs, batch.labels, 0.1)
        + losses.cka(taught, batch.features)
        + 0.7 * F.cross_entropy(logits, batch.labels)
    )
    torch.testing.assert_close(found[4], by_hand.detach())
    torch.testing.assert_close(found[0], found[1] + 0.25 * found[4])


def test_running_statistics_are_those_of_real_images() -> None:
    with_samples, without = (begun(experiment(distill__weight=weight)) for weight in (1.0, 0.0))
    advanced(experiment(), with_samples, 1)
    advanced(experiment(distill__weight=0.0), without, 1)
    ours, plain = (dict(state.student.named_buffers()) for state in (with_samples, without))
    assert ours
    assert all(torch.equal(ours[name], plain[name]) for name in plain if "num_batches" not in name)


def test_canonical_samples_are_learnt_and_a_checkpoint_goes_on(tmp_path) -> None:
    settings = experiment(distill__samples=1.0)
    state = begun(settings)
    found = advanced(settings, state, 6)
    assert found[-1][4] < found[0][4]
    again = begun(settings)
    advanced(settings, again, 3)
    folder = Store(str(tmp_path))
    again.save(folder)
    other = begun(settings)
    other.load(folder)
    later = advanced(settings, other, 3)
    assert torch.equal(later[-1], found[-1])
    assert other.distiller
    assert state.distiller
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.distiller.parameters(), state.distiller.parameters(), strict=True)
    )


def test_features_without_variance_teach_nothing_and_break_nothing() -> None:
    settings = experiment(distill__align=0.0, distill__cluster=0.0)
    state = begun(settings)
    assert state.distiller
    constant = CanonicalBatch(
        torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8), torch.ones(8, 7)
    )
    pixels, labels = real(settings)
    _, features = state.student.train().with_features(data.to_float(pixels))
    loss = state.distiller(state.student, features, labels, constant)
    loss.backward()
    grads = [p.grad for p in state.student.parameters() if p.grad is not None]
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_step_s_samples_are_shared_among_workers() -> None:
    settings = experiment()
    whole = distillation.prepare(settings, samples(), 3, slice(0, BATCH))
    parts = [
        distillation.prepare(settings, samples(), 3, part)
        for part in (slice(0, 4), slice(4, BATCH))
    ]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
    other = distillation.prepare(settings, samples(), 4, slice(0, BATCH))
    assert not torch.equal(other.images, whole.images)


# -- the bridge ------------------------------------------------------------------------------------
def test_class_matched_targets_are_pure_functions_of_class_and_seed() -> None:
    known = samples()
    (source,) = feature_sources.sources(
        experiment(align__weight=1.0, align__target="canonical", distill__weight=0.0),
        "cpu",
        samples=known,
    )
    labels = known.pictures.labels[:9]
    request = Request.seeded(torch.zeros(9, 1, 8, 8), labels, torch.ones(9), 4)
    answer = source.submit(request).result()
    assert answer.shape == (9, 7)
    assert source.feature_dim == 7
    for row, label in zip(answer, labels, strict=True):
        places = (known.features == row).all(1).nonzero()[:, 0]
        assert known.pictures.labels[places[0]] == label
    halves = [source.submit(part).result() for part in request.split(4)]
    assert torch.equal(torch.cat(halves), answer)
    later = Request.seeded(torch.zeros(9, 1, 8, 8), labels, torch.ones(9), 900)
    assert not torch.equal(source.submit(later).result(), answer)


def test_a_class_without_samples_is_said() -> None:
    known = samples()
    few = CanonicalImages(known.pictures[slice(3)], known.features[:3], 0)
    request = Request.seeded(torch.zeros(10, 1, 8, 8), torch.arange(10), torch.ones(10), 0)
    with pytest.raises(DataError, match="no canonical sample has class"):
        CanonicalFeatures(few).submit(request)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill__weight": 1.0}, "canonical.uri is not set, but distill.weight=1 needs"),
        (
            {"distill__weight": 0.0, "align__weight": 1.0, "align__target": "canonical"},
            "canonical.uri is not set, but align.target=canonical needs",
        ),
    ],
)
def test_canonical_samples_are_needed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment(canonical__uri=None, **changes).with_sources()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher__tokens": True}, "distill.weight=1 is of pooled features"),
        (
            {"align__target": "canonical", "align__extra_weight": 0.5},
            "align.target=canonical has one feature",
        ),
        (
            {"resources__workers": 16, "distill__per_step": 40},
            "distill.per_step=40 is not divisible",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment(**changes)
