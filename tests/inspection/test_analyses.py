"""Probes and quality on real digits and clothes, with teachers that come with the package."""

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.errors import ConfigError
from dra_ray.inspection import diagnosis, massive, probe, quality
from dra_ray.report import probes
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.workloads.train_teacher import Training
from tests.teachers.test_dit import latent_dit


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    checkpoint.save(
        store, EDM(config.UNet(model_channels=16), 8, 1, 10, 0.7), {"data": {"name": "digits"}}
    )
    return store


def test_a_grid_of_probes_and_its_page(untrained, tmp_path):
    rows = list(
        diagnosis.probe_teacher(untrained, (), (0.05, 3.0), ("enc.8x8_conv", "dec.4x4_in1"), 200)
    )
    assert [(row["layer"], row["sigma"]) for row in rows] == [
        ("enc.8x8_conv", 0.05),
        ("enc.8x8_conv", 3.0),
        ("dec.4x4_in1", 0.05),
        ("dec.4x4_in1", 3.0),
    ]
    assert rows[0]["accuracy"] > rows[1]["accuracy"]  # noise hides the class
    page = Store(str(tmp_path)) / "probe.html"
    probes.write(page, "a <teacher>", {"images": 200}, rows)
    text = page.read_text()
    assert "a &lt;teacher&gt;" in text
    assert "dec.4x4_in1" in text
    assert "src=" not in text.split("<script>")[0]
    assert [len(trace["x"]) for trace in probes.figure(rows)["data"]] == [2, 2, 2]


@pytest.mark.seconds
def test_a_probe_looks_at_a_few_layers_unless_told_otherwise(untrained):
    net = checkpoint.load(untrained)
    names, some = list(net.layers()), probe.some_layers(net)
    assert len(names) > probe.FEW >= len(some)
    assert {
        names[0],
        names[-1],
        net.check_layer(None),
    } <= set(some)
    assert some == [name for name in names if name in some]
    steps: list[tuple[int, int]] = []
    rows = list(
        diagnosis.probe_teacher(
            untrained, (), (0.1, 0.3), (), 60, progress=lambda done, of: steps.append((done, of))
        )
    )
    assert list(dict.fromkeys(row["layer"] for row in rows)) == some
    assert steps == [(done, 2 * len(some)) for done in range(2 * len(some) + 1)]
    first = next(
        diagnosis.probe_teacher(
            untrained, (), (0.1,), ("all",), 60, progress=lambda done, of: steps.append((done, of))
        )
    )
    assert steps[-1] == (1, len(names))
    assert first["layer"] == names[0]


@pytest.mark.seconds
def test_the_control_is_probed_as_a_denoiser_is(untrained, tmp_path):
    """Also at a resolution below the data set's own; it takes no labels, so it can leak none."""
    settings = config.load(
        "digits-edm",
        config.TeacherTraining,
        ["objective=classify", "data.resolution=4", "net.channel_mult=[1,2]"]
        + ["images_seen=12800"],
    )
    control = Training(settings, data.load(settings.data))
    rows = {}
    for name in ("begun", "trained"):
        checkpoint.save(Store(str(tmp_path / name)), control.average, control.card())
        (rows[name],) = diagnosis.probe_teacher(
            Store(str(tmp_path / name)), (), (0.3,), ("dec.2x2_in1",), 600, label="true"
        )
        while control.step < control.steps:
            control.advance(control.net)
    (denoiser,) = diagnosis.probe_teacher(untrained, (), (0.3,), ("dec.4x4_in1",), 60)
    assert rows["trained"].keys() == denoiser.keys()
    assert "leak" not in rows["trained"]
    assert rows["trained"]["accuracy"] > rows["begun"]["accuracy"]
    assert rows["trained"]["within_cosine"] - rows["trained"]["between_cosine"] > (
        rows["begun"]["within_cosine"] - rows["begun"]["between_cosine"]
    )


def test_what_a_probe_cannot_do_is_refused(untrained):
    with pytest.raises(ConfigError, match="dec.4x4_in0|did you mean"):
        list(diagnosis.probe_teacher(untrained, (), (0.1,), ("dec.4x4_in9",), 50))
    with pytest.raises(ConfigError, match="validation_images"):
        list(diagnosis.probe_teacher(untrained, ("validation_images=0",), (0.1,), (), 50))
    with pytest.raises(ConfigError, match="label='maybe'"):
        list(diagnosis.probe_teacher(untrained, (), (0.1,), (), 50, label="maybe"))
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        probe.data_of({}, ())
    with pytest.raises(ConfigError, match="no residual stream"):
        massive.teacher_massive_channels(untrained, (), 0.3, None, 8)


def test_data_of_a_card():
    card = {"data": {"name": "fashion-mnist", "crop_pad": 2, "uri": None}}
    assert probe.data_of(card, ["train_images=7"]).train_images == 7
    assert probe.data_of(card, ["name=cifar10"]).crop_pad == 4


@pytest.mark.seconds
def test_quality_of_a_set(tmp_path):
    settings = config.Data()
    images = data.load(settings)
    held_out = images.validation
    store = Store(str(tmp_path)) / "set.npz"
    store.write_npz(
        image=held_out.images.permute(0, 2, 3, 1).numpy(), label=held_out.labels.numpy()
    )
    report = quality.synthetic_quality(store, settings, images=200, steps=40)
    assert report["nearest"]["copies"] == 0
    assert report["trained_on_synthetic_accuracy"] > 0.4
    assert len(quality.quality_rows(report)) == 6


def test_the_teacher_in_the_package():
    uri = config.Teacher(uri="package:fashion-edm").uri
    net = checkpoint.load(Store(uri), EDM)
    assert checkpoint.digest(Store(uri)).startswith("e25e7a0070b52d1d")
    assert (net.num_classes, net.resolution, net.sigma_data) == (10, 28, 0.706025)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert config.Synthesis(teacher="package:fashion-edm").teacher == uri
    with pytest.raises(ConfigError, match="package:fashion-edn.*fashion-edm"):
        config.validate(config.Teacher, {"uri": "package:fashion-edn"}, "here")


def test_massive_channels_are_found(tmp_path):
    net = latent_dit()
    with torch.no_grad():
        net.dit.x_embedder.proj.bias[7] = 1e4
    checkpoint.save(Store(str(tmp_path / "t")), net, {"data": {"name": "folder", "resolution": 8}})
    from PIL import Image

    for part in ("train", "val"):
        for label in range(10):
            folder = tmp_path / part / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng(label).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    found = massive.teacher_massive_channels(
        Store(str(tmp_path / "t")), (f"uri={tmp_path}", "validation_images=5"), 0.3, "blocks.1", 16
    )
    assert found == (7,)
