"""Churn, selection and flows, without Ray."""

import math

import numpy as np
import pytest
import torch

from dra_ray import config as configs
from dra_ray import data, runs, students
from dra_ray.config import Synthesis, UNet
from dra_ray.data import rows, synthetic
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students import checkpoint as student_checkpoint
from dra_ray.teachers import checkpoint, dit, network, sampling
from dra_ray.teachers.edm import EDM
from dra_ray.workloads import synthesize
from tests.teachers.test_diffusion import Gaussian
from tests.teachers.test_dit import latent_dit


def test_churn_is_per_image_and_keeps_the_distribution():
    """On data N(0, v) with its exact denoiser, Heun with churn must still arrive at N(0, v)."""
    levels = sampling.noise_levels(40, 0.002, 80.0, 7.0)
    seeds = list(range(2000))
    net = Gaussian(0.0, 0.5)
    noise = sampling.seeded_noise(seeds, (1, 1, 1))
    churned = sampling.heun(net, noise, None, levels, sampling.Churn(20.0, 0.05, 50.0, 1.0), seeds)
    plain = sampling.heun(net, noise, None, levels)
    assert float(churned.var()) == pytest.approx(0.25, rel=0.1)
    assert (
        abs(float(torch.corrcoef(torch.stack([churned.flatten(), plain.flatten()]))[0, 1])) < 0.99
    )
    alone = sampling.heun(
        net, noise[5:6], None, levels, sampling.Churn(20.0, 0.05, 50.0, 1.0), seeds[5:6]
    )
    assert torch.allclose(alone, churned[5:6])
    assert torch.equal(sampling.heun(net, noise, None, levels, sampling.Churn(0.0), seeds), plain)


def test_churn_raises_the_level_as_algorithm_2_says():
    churn = sampling.Churn(8.0, 0.1, 10.0)
    assert float(churn.raised(torch.tensor(1.0), 80)) == pytest.approx(1.1)
    assert float(churn.raised(torch.tensor(1.0), 4)) == pytest.approx(math.sqrt(2))
    assert [float(churn.raised(torch.tensor(level), 4)) for level in (0.05, 20.0)] == pytest.approx(
        [0.05, 20.0]
    )


def test_the_surest_of_every_class_are_kept():
    scores = np.array(
        [0.1, 0.9, 0.3, 0.2, 0.8, 0.9, 0.7, 0.9, 0.0, 0.5], dtype=np.float32
    )  # classes 0, 1, 0, 1, ...
    kept = synthesize.best(scores, 2, 5)
    assert kept.tolist() == [2, 1, 4, 5, 6]
    assert synthesize.best(np.ones(6, np.float32), 2, 4).tolist() == [
        0,
        1,
        2,
        3,
    ]  # of equal scores the first


def test_how_many_candidates():
    assert synthesize._made(Synthesis(images=100), 10) == 100
    chosen = Synthesis(images=95, select=configs.Select(run="somewhere", keep=0.3))
    assert synthesize._made(chosen, 10) == 10 * math.ceil(10 / 0.3)


def test_what_makes_no_images_is_refused(tmp_path):
    net = latent_dit()
    network.image_sampler(net, "there").check_sampling(Synthesis())
    net.vae.decoder = None
    with pytest.raises(ConfigError, match="--decoder"):
        network.image_sampler(net, "there").check_sampling(Synthesis())
    store = Store(str(tmp_path))
    checkpoint.save(store, EDM(UNet(model_channels=16), 8, 1, 0), {})
    with pytest.raises(ConfigError, match="knows no classes"):
        synthesize.check(Synthesis(teacher=store.uri))


def test_a_flow_makes_images_of_the_students_size():
    net = latent_dit(resolution=6)
    config = Synthesis(images=3, batch=2, shard_images=2, flow=configs.Flow(times=3))
    made = synthesize._sample(config, net, None, range(2))["image"]
    assert made.shape == (2, 6, 6, 3)
    assert made.dtype == np.uint8
    short = synthesize._sample(config, net, None, range(2, 3))["image"]
    assert np.array_equal(short, synthesize._sample(config, net, None, range(2, 4))["image"][:1])
    with pytest.raises(ConfigError, match="sampling.times"):
        dit.Sampling(times=1)
    assert {field: getattr(configs.Flow(), field) for field in configs.Flow.model_fields} == vars(
        dit.Sampling()
    )


def test_the_set_is_what_is_kept_of_the_candidates(tmp_path):
    """The tasks' own function, called here instead of by Ray."""
    root, experiment = Store(str(tmp_path)), configs.Experiment()
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7)
    checkpoint.save(root / "teacher", net, {})
    runs.begin_run(root / "run", "train", experiment.model_dump(mode="json"), experiment.digest())
    student = students.build(experiment.model, data.outline(experiment.data).shape)
    student_checkpoint.save(root / "run", student.state_dict())
    select = configs.Select(run=(root / "run").uri, keep=0.5)
    config = Synthesis(images=25, steps=2, batch=10, shard_images=20, churn=1.0, select=select)

    parts = synthesize._parts(config, root / "set", 10)
    assert parts == [range(20), range(20, 40), range(40, 60)]

    def make(index: int) -> synthesize.Made:
        settings, uris = (
            config.model_dump(mode="json"),
            ((root / "set").uri, (root / "teacher").uri),
        )
        return synthesize._make(settings, *uris, index, parts[index])

    made = [make(index) for index in range(3)]
    scores = np.concatenate([found for _, found in made])
    assert len(scores) == synthesize._made(config, 10) == 60
    assert ((scores > 0) & (scores < 1)).all()
    shards = synthesize._keep(config, root / "set", 10, scores)
    assert synthesize._keep(config, root / "set", 10, scores) == shards
    assert make(1)[0] == made[1][0]
    counts = np.bincount(np.arange(25) % 10)
    rows.write_index(root / "set", shards, (8, 8, 1), counts, {})

    kept = synthesize.best(scores, 10, 25)
    split = data.in_memory(synthetic.read(root / "set", 25, data.load(experiment.data)))
    assert torch.equal(split.labels, torch.arange(25) % 10)
    shard = (root / "set" / "candidates" / rows.shard_name(0)).read_npy()
    for position, at in enumerate(kept):
        if at < 20:
            assert np.array_equal(
                split.images[position].permute(1, 2, 0).numpy(), shard["image"][at]
            )
    assert "score" in (root / "set" / rows.shard_name(1)).read_npy().dtype.names

    before = synthesize._digest(config, "teacher", net)
    student_checkpoint.save(
        root / "run", {name: 2 * tensor for name, tensor in student.state_dict().items()}
    )
    assert synthesize._digest(config, "teacher", net) != before
