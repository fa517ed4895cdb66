"""A training step on its own, without Ray: two workers with SyncBN are one worker; other
objectives; other arithmetic.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dra_ray import config, data, students
from dra_ray.attacks import pgd
from dra_ray.attacks.pgd import Climb
from dra_ray.data import batches
from dra_ray.errors import ConfigError, StorageError
from dra_ray.plan import ready
from dra_ray.storage import Store
from dra_ray.students.backbone import Backbone
from dra_ray.students.student import Normalise
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import Ready, Request
from dra_ray.training import losses, optimisers, step
from dra_ray.training.losses import of_batch
from dra_ray.workloads import train
from tests.support.s3 import faulty_store
from tests.training.two_workers import on_two

BATCH, STEPS = 32, 3


def small(**changes: Any) -> config.Experiment:
    """Digits, no augmentation, a step in seconds; `changes` are dotted fields with `__` for the
    dot.
    """
    settings = {
        "model.name": "wrn-10-1",
        "optim.batch": BATCH,
        "optim.lr": 0.05,
        "threat.eps_255": 32,
        "threat.step_255": 16,
        "threat.steps": 2,
        "align.weight": 0.0,
    }
    return config.override(
        config.Experiment(),
        settings | {field.replace("__", "."): value for field, value in changes.items()},
    )


def run(
    experiment: config.Experiment,
    rank: int = 0,
    workers: int = 1,
    climb: Climb | None = None,
    resumed: Store | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(state dict, losses) after a few steps of one worker; `resumed`: where its state is kept
    before the last one, which another state takes over.
    """
    images = data.load(experiment.data)
    state, _ = step.initial_state(experiment, images.shape, (), torch.device("cpu"))
    mine = batches.part_of(BATCH, rank, workers)
    losses = []
    for number in range(STEPS):
        if resumed and number == STEPS - 1:
            state.save(resumed)
            state, _ = step.initial_state(experiment, images.shape, (), torch.device("cpu"))
            state.load(resumed)
        optimisers.set_rate(state.optimizer, experiment.optim.lr, 0.9)
        chosen = torch.arange(number * BATCH, (number + 1) * BATCH)[mine]
        parts = step.step(
            state,
            experiment,
            step.prepare(experiment, *images.train.take(chosen), state.step, mine, ()),
            mine,
            epoch=number,
            climb=climb,
        )
        losses.append(of_batch(parts, mine, BATCH))
        state.step += 1
    return state.student.state_dict(), torch.stack(losses)


SYNCHRONISED, APART = small(compute__sync_batchnorm=True), small()


L2 = {"threat__norm": "l2", "threat__start": "normal", "threat__eps_255": 128}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "trades"},
        {"loss__name": "trades", **L2},
        {"loss__name": "pgd-at"},
        {"loss__name": "pgd-at", **L2},
        {"loss__name": "ikl", "threat__ramp_epochs": 3, "threat__mode": "eval"},
    ],
    ids=str,
)
def test_an_attack_as_one_graph_trains_the_same_student_also_after_a_resume(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    wanted = small(**changes)
    weights, parts = run(wanted)
    torch._dynamo.utils.counters.clear()
    found, ours = run(wanted, climb=pgd.graph("aot_eager"), resumed=Store(str(tmp_path)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "of both students"
    assert torch.equal(ours, parts)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_the_compiled_attack_trains_as_compiled_forwards_do() -> None:
    """Up to rounding, which the compiler places as it likes."""
    _, parts = run(small(compute__compile="attack"))
    for other in ("forward", "off"):
        torch.testing.assert_close(
            run(small(compute__compile=other))[1], parts, rtol=1e-3, atol=1e-4
        )


def _halves(rank: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    return [run(experiment, rank, 2) for experiment in (SYNCHRONISED, APART)]


@pytest.fixture(scope="module")
def halves() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What the first of two workers has, with synchronised norms and without."""
    return on_two(_halves)[0]


def test_two_workers_with_synchronised_norms_are_one_worker(halves) -> None:
    """2 x B/2 with SyncBN equals 1 x B up to rounding, over three steps: losses, weights and
    running statistics.
    """
    (one, losses), (two, losses_two) = run(SYNCHRONISED), halves[0]
    assert torch.allclose(losses, losses_two, rtol=1e-4, atol=1e-6)
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-3, atol=1e-4), name


def test_without_them_they_are_not(halves) -> None:
    """Per-worker statistics are another model: the check above can fail."""
    assert not torch.allclose(run(APART)[1], halves[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "pgd-at"},
        {"loss__name": "fgsm-rs", "threat__steps": 1},
        {"loss__name": "adr", "loss__label_smoothing": 0.0},
        {
            "loss__name": "ikl",
            "loss__awp": 0.005,
            "loss__awp_from_epoch": 0,
            "threat__ramp_epochs": 20,
            "optim__schedule": "cosine",
        },
        {"threat__mode": "eval", "threat__start": "normal"},
        {
            "threat__norm": "l2",
            "threat__eps_255": 128,
            "threat__step_255": 64,
            "threat__start": "normal",
        },
        {
            "optim__name": "lion",
            "optim__lr": 1e-4,
            "optim__decayed": "weights",
            "optim__clip_norm": 1.0,
        },
        {"optim__name": "adamw", "optim__lr": 1e-3},
        {"compute__channels_last": False},
        {"compute__precision": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_objective_takes_steps(changes: dict[str, Any]) -> None:
    weights, losses = run(small(**changes))
    start = step.initial_state(
        small(**changes), data.load(config.Data()).shape, (), torch.device("cpu")
    )[0].student.state_dict()
    assert bool(losses.isfinite().all())
    assert bool((losses[:, 0] > 0).all())
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    assert all(
        bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point()
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("momentum", "sets"), [(0.01, True), (0.1, False)])
@pytest.mark.parametrize("first", ["clean", "adversarial"])
def test_running_statistics_remember_batches_in_their_order(
    mode: str, momentum: float, sets: bool, first: str
) -> None:
    """Of the first norm: r = (1-m) r + m x for one batch, then the other; m = 1 where the first
    step's batches set them.
    """
    experiment = small(
        threat__mode=mode, threat__eps_255=64, threat__step_255=64, loss__first=first,
        optim__norm_momentum=momentum, optim__norm_first_batch=sets,
    )  # fmt: skip
    images = data.load(experiment.data)
    state, _ = step.initial_state(experiment, images.shape, (), torch.device("cpu"))
    seen: list[Tensor] = []
    (norm, *_) = (m for m in state.student.modules() if isinstance(m, nn.BatchNorm2d))

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            seen.append(inputs[0].detach().mean((0, 2, 3)))

    norm.register_forward_pre_hook(note)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    mine = slice(0, BATCH)
    chosen = images.train.take(torch.arange(BATCH))
    batch = step.prepare(experiment, *chosen, 0, mine, ())
    clean = data.to_float(batch.images)
    with torch.no_grad():
        convolution: Any = state.student.init_conv
        plain = convolution(state.student.normalise(clean)).mean((0, 2, 3))
    step.step(state, experiment, batch, mine)
    trained = [seen[0], seen[-1]]
    weight = 1.0 if sets else momentum
    wanted = before
    for mean in trained:
        wanted = (1 - weight) * wanted + weight * mean
    assert torch.allclose(norm.running_mean, wanted, atol=1e-5)  # type: ignore[arg-type]
    place = 0 if first == "clean" else 1
    assert torch.allclose(trained[place], plain, atol=1e-4)
    assert not torch.allclose(trained[1 - place], plain, atol=1e-4)


def aligned(folder: Store, net: EDM, **changes: Any) -> config.Experiment:
    """An experiment with `net` as its teacher, which says nothing of its data."""
    checkpoint.save(folder, net, {})
    return small(align__weight=1.0, teacher__uri=folder.uri, **changes)


@pytest.mark.parametrize(
    ("classes", "preconditioning", "changes", "words"),
    [
        (7, "edm", {}, r"teacher.uri: the teacher knows 7 classes, but the data has 10"),
        (
            10,
            "ve",
            {"align__sigma": 0.01},
            r"sigma=0.01 is outside of what the teacher knows, 0.02 to 100",
        ),
        (
            10,
            "ve",
            {"align__extra_weight": 1.0},
            r"align.extra_weight=1 draws noise levels of any size, but the teacher knows only 0.02 "
            r"to 100",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    tmp_path, classes: int, preconditioning: str, changes: dict[str, Any], words: str
) -> None:
    root = Store(str(tmp_path))
    net = EDM(config.UNet(model_channels=16), 8, 1, classes, precondition=preconditioning)
    with pytest.raises(ConfigError, match=words):
        train.fit(aligned(root / "teacher", net, **changes), root / "run")
    assert not (root / "run").exists()


@pytest.mark.parametrize(("classes", "label"), [(10, "true"), (7, "null"), (0, "true")])
def test_a_teacher_that_fits_is_not(tmp_path, classes: int, label: str) -> None:
    net = EDM(config.UNet(model_channels=16), 8, 1, classes)
    ready.of_experiment(
        aligned(Store(str(tmp_path)), net, teacher__label=label, align__extra_weight=1.0)
    )


def test_arithmetic_changes_rounding_only() -> None:
    """Contiguous and channels-last steps agree to rounding; bf16 is near, and is not equal."""
    reference = run(small())[1]
    assert torch.allclose(run(small(compute__channels_last=False))[1], reference, rtol=1e-3)
    bf16 = run(small(compute__precision="bf16"))[1]
    assert torch.allclose(bf16[0], reference[0], rtol=0.1)
    assert not torch.equal(bf16, reference)


class Notes:
    """A `FeatureSource` that notes which request came when."""

    feature_dim = 4

    def __init__(self) -> None:
        self.noise_seeds: list[int] = []

    def submit(self, request: Request) -> Ready:
        self.noise_seeds.append(int(request.noise_seeds[0]))
        return Ready(torch.zeros(len(request), 4))

    def close(self) -> None: ...


def test_features_are_requested_ahead_and_once() -> None:
    wanted = config.override(
        config.Experiment(), {"optim.batch": 8, "pool.ahead": 2, "teacher.uri": "unused"}
    )
    images = torch.arange(80, dtype=torch.uint8).repeat_interleave(64).reshape(10, 8, 1, 8, 8)

    def get(number: int) -> tuple[Tensor, Tensor]:
        return images[number], torch.full((8,), number)

    source, plain = Notes(), Notes()
    feed = step.Feed(wanted, get, slice(0, 8), [source], last=6)
    counts = []
    for number in range(6):
        taken = feed.take(number)
        counts.append(len(source.noise_seeds))
        alone = step.prepare(wanted, *get(number), number, slice(0, 8), [plain])
        assert torch.equal(taken.images, alone.images)
        assert taken.labels.tolist() == [number] * 8
    assert counts == [3, 4, 5, 6, 6, 6], "two steps ahead, and nothing beyond the last"
    assert source.noise_seeds == plain.noise_seeds
    assert len(set(source.noise_seeds)) == 6


class Dropping(students.Student):
    """A linear classifier of pixels, half of which it drops."""

    classifier = "last."

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise((0.0,), (1.0,))
        self.feature_dim = 64
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(64, 10)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.drop(x.flatten(1))
        return self.last(features), features


def _fresh(experiment: config.Experiment, name: str) -> step.State:
    """The state before the first step, of a student that draws random numbers."""
    shape = data.outline(experiment.data).shape
    torch.manual_seed(0)
    net: students.Student
    if name == "dropout":
        net = Dropping()
    else:
        options = {"drop_path_rate": 0.5} if name == "convnext_atto" else {"drop_rate": 0.5}
        network = timm.create_model(name, in_chans=1, num_classes=10, **options)
        net = Backbone(network, (0.0,), (1.0,))
    optimizer = optimisers.build(net, None, experiment.optim)
    means = losses.ClassMeans(shape.num_classes, torch.device("cpu"))
    return step.State(
        net, copy.deepcopy(net), None, None, optimizer, 0, -1.0, losses.LossSums(4), means, []
    )


def _steps(state: step.State, experiment: config.Experiment, number: int) -> None:
    images = data.load(experiment.data)
    for _ in range(number):
        optimisers.set_rate(state.optimizer, experiment.optim.lr, 0.9)
        pixels, labels = images.train.take(torch.arange(state.step * 8, state.step * 8 + 8))
        pixels = (
            pixels
            if isinstance(state.student, Dropping)
            else pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
        )
        step.step(state, experiment, step.Batch(pixels, labels, []), slice(0, 8))
        state.step += 1


@pytest.mark.parametrize(
    "name",
    ["dropout", pytest.param("ghostnet_050", marks=pytest.mark.slow), "convnext_atto"],
)
def test_a_student_that_draws_resumes_to_the_bit(tmp_path, name: str) -> None:
    """Two steps, a checkpoint, a process that has drawn otherwise since, two steps: the weights of
    four steps.
    """
    experiment = small(optim__batch=8, threat__steps=1)
    whole, first, second = (_fresh(experiment, name) for _ in range(3))
    _steps(whole, experiment, 4)
    _steps(first, experiment, 2)
    first.save(Store(str(tmp_path)))
    torch.manual_seed(1234)
    second.load(Store(str(tmp_path)))
    _steps(second, experiment, 2)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[key]), key


def test_a_checkpoint_is_what_was_written_or_is_refused() -> None:
    """A bit that a store flips is in no weight: neither torch nor Ray looks at a checksum."""
    experiment = small()
    whole, other = (_fresh(experiment, "dropout") for _ in range(2))
    with torch.no_grad():
        for parameter in whole.student.parameters():
            parameter.add_(1.0)
    with faulty_store("states") as server:
        folder = Store("s3://states/one")
        whole.save(folder)
        for kind in ("flipped", "another", "short"):
            server.will(kind, 1)
            other.load(folder)
            for key, value in whole.student.state_dict().items():
                assert torch.equal(value, other.student.state_dict()[key]), (kind, key)
        kept = (folder / "state.pt").read_bytes()
        middle = len(kept) // 2
        (folder / "state.pt").write_bytes(
            kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :]
        )
        with pytest.raises(StorageError, match="another SHA-256"):
            other.load(folder)


def test_a_step_leaves_the_global_generator_as_it_was_and_draws_anew() -> None:
    before = torch.random.get_rng_state()
    draws = []
    for seed in (1, 2, 1):
        with step.drawing(seed, torch.device("cpu")):
            draws.append(torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.seconds
def test_more_students_than_torchs_limit_of_graphs_are_compiled_in_one_process() -> None:
    """As by the trials of a sweep, which a process trains one after another."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for seed in range(4):
            run(small(seed=seed, compute__compile="forward"))
