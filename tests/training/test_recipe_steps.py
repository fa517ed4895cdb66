"""Every recipe that trains takes two real steps, made small by the settings a user would pass with
--set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dra_ray import config, data
from dra_ray.data.canonical import shard_name
from dra_ray.data.loader import Batches
from dra_ray.plan import ready
from dra_ray.pool import sources as feature_sources
from dra_ray.storage import Store
from dra_ray.sweeps import spaces
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.training import optimisers, schedule, step

# the smallest of each family of students; those without a small one keep their size and are tested
# as `slow`
SMALL = {"wrn-": "wrn-10-1", "relu-wrn-": "relu-wrn-10-1", "vit-": "vit-t-8"}
LARGE = ("rawrn-", "timm/")
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 4, "digits": 10, "fashion-mnist": 10}
REAL, SYNTHETIC = 48, 32


def experiments() -> dict[str, config.Experiment]:
    """Recipe -> what it trains; of a sweep, its first trial."""
    found: dict[str, config.Experiment] = {}
    for name in config.recipe_names():
        recipe: Any = config.load(name)
        if isinstance(recipe, config.Experiment):
            found[name] = recipe
        elif isinstance(recipe, config.Sweep):
            found[name] = next(iter(spaces.experiments(recipe).values()))
    return found


RECIPES = experiments()


def _large(recipe: config.Experiment) -> bool:
    return recipe.model.name.startswith(LARGE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("recipes")))


def _pixels(count: int, resolution: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 256, (count, resolution, resolution, channels), np.uint8
    )


def _images(name: str, root: Store) -> tuple[dict[str, Any], int, int]:
    """(settings for a small set in the data set's own layout, its resolution, its channels)."""
    classes = CLASSES[name]
    if name == "digits":
        return {}, 8, 1
    if name == "imagenet":  # as a folder: the official one has a thousand classes
        for part in ("train", "val"):
            for number in range(REAL):
                picture = Image.fromarray(_pixels(1, 40, 3, number)[0])
                (
                    root / "folder" / part / f"class-{number % classes}" / f"{number}.png"
                ).write_bytes(_png(picture))
        return (
            {"data.name": "folder", "data.uri": (root / "folder").uri, "data.resolution": 32},
            32,
            3,
        )
    if name == "fashion-mnist":
        for part, count in (("train", REAL), ("t10k", 8)):
            head = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
            (root / name / f"{part}-images-idx3-ubyte").write_bytes(
                head + _pixels(count, 28, 1, 0).tobytes()
            )
            labels = bytes(i % classes for i in range(count))
            (root / name / f"{part}-labels-idx1-ubyte").write_bytes(
                b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + labels
            )
        return {"data.uri": (root / name).uri}, 28, 1
    labels = np.arange(REAL) % classes
    (root / f"{name}.npz").write_npz(
        image=_pixels(REAL, 32, 3, 0),
        label=labels,
        test_image=_pixels(8, 32, 3, 1),
        test_label=labels[:8],
    )
    return {"data.uri": (root / f"{name}.npz").uri}, 32, 3


def _png(picture: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _shrunk(name: str, root: Store) -> config.Experiment:
    recipe = RECIPES[name]
    settings, resolution, channels = _images(recipe.data.name, root)
    classes = CLASSES[recipe.data.name]
    if recipe.align.weight:
        torch.manual_seed(0)
        teacher = root / f"teacher-{recipe.data.name}"
        checkpoint.save(teacher, EDM(config.UNet(), resolution, channels, classes, 0.5), {})
        settings |= {
            "teacher.uri": teacher.uri,
            "teacher.micro_batch": 8,
            "align.hidden": 16,
            "pool.kind": "local",
        }
    if recipe.synthetic.images:
        made = root / f"synthetic-{recipe.data.name}.npz"
        made.write_npz(
            image=_pixels(SYNTHETIC, resolution, channels, 2), label=np.arange(SYNTHETIC) % classes
        )
        settings |= {"synthetic.uri": made.uri, "synthetic.images": SYNTHETIC}
    if recipe.distill.weight:
        made = root / f"canonical-{recipe.data.name}"
        (made / shard_name(0)).write_npz(
            image=_pixels(SYNTHETIC, resolution, channels, 3),
            label=np.arange(SYNTHETIC) % classes,
            feature=np.random.default_rng(4).normal(size=(SYNTHETIC, 6)).astype(np.float32),
            judged=np.full(SYNTHETIC, -1),
        )
        settings |= {"canonical.uri": made.uri, "distill.per_step": 8}
    small = next(
        (student for family, student in SMALL.items() if recipe.model.name.startswith(family)),
        recipe.model.name,
    )
    settings |= {
        "model.name": small,
        # a step of RaWRN-70-16 is 0.5 TFLOP per image and attack step
        "optim.batch": 2 if _large(recipe) else 8,
        "threat.steps": min(recipe.threat.steps, 1 if _large(recipe) else 2),
        "resources.workers": 1,
    }
    settings |= {
        "data.validation_images": 8,
        "resources.min_workers": None,
        "loss.awp_from_epoch": 0,
    }
    return config.override(recipe, settings).with_sources()


def _two_steps(experiment: config.Experiment) -> None:
    images, device = data.load(experiment.data), torch.device("cpu")
    extra = ready.load_synthetic(experiment, images)
    batches = data.batch_plan(experiment, len(images.train), len(extra) if extra else 0)
    everything = slice(0, experiment.optim.batch)
    loader = Batches(images.train, extra, batches, device, everything)
    samples = ready.load_canonical(experiment, images.shape)
    sources = feature_sources.sources(experiment, "cpu", samples=samples)
    feed = step.Feed(experiment, loader.get, everything, sources, batches.steps_per_epoch, samples)
    state, _ = step.initial_state(experiment, images.shape, sources, device)
    before = {
        name: parameter.detach().clone() for name, parameter in state.student.named_parameters()
    }
    for number in range(2):
        optimisers.set_rate(
            state.optimizer, *schedule.at(number, batches.steps_per_epoch, experiment.optim)
        )
        parts = step.step(state, experiment, feed.take(number), everything)
        assert bool(parts.isfinite().all())
        assert float(parts[0]) > 0
        assert bool(float(parts[3]) > 0) == bool(experiment.align.weight)
        assert [float(part) > 0 for part in parts[4:]] == [True] * bool(experiment.distill.weight)
        state.step += 1
    loader.close()
    moved = [
        name
        for name, parameter in state.student.named_parameters()
        if not torch.equal(parameter, before[name])
    ]
    assert len(moved) > len(before) / 2


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not _large(recipe)])
def test_takes_two_steps(name: str, root: Store) -> None:
    _two_steps(_shrunk(name, root))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if _large(recipe)])
def test_takes_two_steps_at_full_width(name: str, root: Store) -> None:
    _two_steps(_shrunk(name, root))
