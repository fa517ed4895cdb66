"""What features can teach, against numpy by the definitions; a teacher's diagnosis in the cases
whose answer is known.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.config import Teacher, UNet
from dra_ray.data.pictures import Split
from dra_ray.inspection import diagnosis, geometry
from dra_ray.report import probes
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, targets
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Request
from dra_ray.training import losses


def features(count: int = 60, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=draws)
    rows = torch.randn(count, width, generator=draws) * torch.linspace(0.1, 3, width) + 1
    return rows + F.one_hot(labels, width), labels


def test_cosines_and_uniformity_are_means_over_pairs() -> None:
    rows, labels = features()
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    cosines = unit @ unit.T
    same = labels.numpy()[:, None] == labels.numpy()[None]
    pair = ~np.eye(len(rows), dtype=bool)
    within, between = geometry.mean_cosines(rows, labels)
    assert within == pytest.approx(cosines[same & pair].mean(), rel=1e-9)
    assert between == pytest.approx(cosines[~same].mean(), rel=1e-9)
    squares = ((unit[:, None] - unit[None]) ** 2).sum(-1)[pair]
    assert geometry.uniformity(rows) == pytest.approx(np.log(np.exp(-2 * squares).mean()))


@pytest.mark.parametrize("shape", [(60, 7), (10, 30)])
def test_dimensions_are_participation_ratios_of_the_spectrum(shape: tuple[int, int]) -> None:
    rows, _ = features(*shape)
    x = rows.double().numpy()
    for centred in (False, True):
        spectrum = np.linalg.svd(x - x.mean(0) * centred, compute_uv=False) ** 2
        ratio = spectrum.sum() ** 2 / (spectrum**2).sum()
        assert geometry.effective_dimension(rows, centred) == pytest.approx(ratio, rel=1e-9)
    line = torch.arange(1.0, 9.0)[:, None] * torch.ones(1, 5)
    assert geometry.effective_dimension(line) == pytest.approx(1)
    assert geometry.effective_dimension(torch.eye(5)) == pytest.approx(5)


def test_the_best_constants_cannot_be_improved() -> None:
    """The losses are those of the constants that gradient descent on the alignment loss gives."""
    rows, labels = features()
    constants = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for chosen, closed in (
        (torch.zeros_like(labels), geometry.constant_loss(rows)),
        (labels, geometry.class_constant_loss(rows, labels)),
    ):
        optimiser = torch.optim.LBFGS([constants], max_iter=200)

        def loss(chosen=chosen, optimiser=optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            value = losses.alignment(constants[chosen], rows)
            value.backward()
            return value

        optimiser.step(loss)
        assert closed == pytest.approx(loss().item(), abs=1e-5)


def a_teacher(label: str) -> LocalTeacher:
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7)
    for name, weight in net.named_parameters():  # blocks start as nothing, and act after training
        if "conv1.weight" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "map_label.weight" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return LocalTeacher(net, Teacher(label=label))  # type: ignore[arg-type]


def test_a_label_that_is_given_is_found_and_one_that_is_not_is_not() -> None:
    images = data.load(config.Data())
    train, test = data.in_memory(images.train)[:300], data.in_memory(images.validation)[:100]
    told, untold = (diagnosis.diagnose(a_teacher(x), train, test, 1.0) for x in ("true", "null"))
    assert told.leak is not None
    assert told.leak > 0.6
    assert untold.leak is None
    assert any("tells the label" in line for line in told.warnings(0.5, 10))
    assert not any("tells the label" in line for line in untold.warnings(0.5, 10))


def test_warnings_name_what_is_missing() -> None:
    good = diagnosis.Diagnosis("mid", 0.1, 64, 0.9, 0.5, 0.1, -3.0, 20.0, 25.0, 0.8, 0.5)
    assert good.warnings(0.8, 10) == []
    poor = diagnosis.Diagnosis("mid", 0.1, 64, 0.78, 0.93, 0.77, -0.7, 1.6, 2.2, 0.12, 0.04)
    said = " ".join(poor.warnings(0.82, 10))
    assert all(part in said for part in ("78.0%", "82.0%", "2.2 of 64", "0.120", "align.transform"))


def test_what_is_whitened_to_few_directions_is_not_to_be_whitened() -> None:
    white = diagnosis.Diagnosis("mid", 0.1, 3, 0.9, 0.5, 0.1, -3.0, 3.0, 3.0, 0.9, 0.5)
    assert white.warnings(0.8, 10) == []


def test_too_few_images_of_a_class_give_no_probe() -> None:
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    few = Split(images, torch.arange(30) % 10)
    found = diagnosis.diagnose(a_teacher("null"), few, few, 1.0)
    assert found.accuracy is None
    assert "accuracy" not in found.row(None)


def test_a_run_is_checked_with_its_own_teacher_and_noise_level(tmp_path) -> None:
    checkpoint.save(Store(str(tmp_path)), a_teacher("null").net, {})
    experiment = config.override(
        config.Experiment(),
        {"teacher.uri": str(tmp_path), "teacher.label": "null", "align.sigma": 0.5},
    )
    baseline = config.override(experiment, {"align.weight": 0.0})
    again = config.override(experiment, {"align.weight": 2.0})  # the same target
    found = diagnosis.check([baseline, experiment, again])
    assert diagnosis.check([baseline]) == diagnosis.Check([], [])
    images = data.load(experiment.data)
    parts = [data.in_memory(part)[:400] for part in (images.train, images.validation)]
    expected = diagnosis.diagnose(a_teacher("null"), parts[0], parts[1], 0.5)
    assert found.rows == [expected.row(diagnosis.pixels_accuracy(*parts))]
    said = expected.warnings(found.rows[0]["pixels_accuracy"], 10)
    assert found.warnings == [f"dec.4x4_in1 at sigma 0.5: {line}" for line in said]


def test_a_log_is_told_of_each_target_and_each_warning(tmp_path) -> None:
    checkpoint.save(Store(str(tmp_path)), a_teacher("null").net, {})
    experiment = config.override(
        config.Experiment(), {"teacher.uri": str(tmp_path), "teacher.label": "null"}
    )
    assert diagnosis.told([config.override(experiment, {"align.weight": 0.0})]) == []
    found = diagnosis.check([experiment])
    target, *warnings = diagnosis.told([experiment])
    assert f"dec.4x4_in1 at sigma 0.06: probe {found.rows[0]['accuracy']:.2%}" in target
    assert f"raw pixels {found.rows[0]['pixels_accuracy']:.2%}" in target
    assert warnings == [f"warning: targets: {line}" for line in found.warnings]


def test_the_page_has_the_floor_and_every_column(tmp_path) -> None:
    rows = [
        {"layer": "mid", "sigma": sigma, "width": 64, "accuracy": 0.7 + sigma, "dimension": 2.0,
         "centred_dimension": 3.0, "within_cosine": 0.9, "between_cosine": 0.7,
         "uniformity": -0.6, "constant_loss": 0.1, "class_constant_loss": 0.05,
         "pixels_accuracy": 0.824}
        for sigma in (0.1, 0.2)
    ]  # fmt: skip
    page = Store(str(tmp_path)) / "probe.html"
    probes.write(page, "package:x", {"images": 2}, rows)
    text = page.read_text()
    assert "Best: mid at sigma = 0.2, 90.0 %; raw pixels 82.4 %" in text
    assert all(name in text for key, name in probes.COLUMNS.items() if key != "leak")
    floor = probes.figure(rows)["data"][-1]
    assert (floor["name"], floor["y"]) == ("raw pixels", [82.4, 82.4])


def test_statistics_are_those_that_a_run_measures(tmp_path) -> None:
    store = Store(str(tmp_path))
    net = a_teacher("null").net
    checkpoint.save(store, net, {"data": {"name": "digits"}})
    options = Teacher(label="null")
    align = config.Align(sigma=0.5, whiten_dim=3, statistics_images=300)
    variance, rows = diagnosis.teacher_statistics(store, (), options, align, seed=4)
    request = targets.request(data.load(config.Data()).train, 0.5, 300, seed=4)
    source = LocalTeacher(checkpoint.load(store), options)
    features = source.encode(request)
    assert [row["transform"] for row in rows] == ["none", "centre", "standardise", "whiten"]
    assert rows[3]["width"] == 3
    assert rows[3]["centred_dimension"] == pytest.approx(3, rel=1e-3)
    assert rows[0]["constant_loss"] == pytest.approx(geometry.constant_loss(features))
    x = features.double().numpy()
    spectrum = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    wanted = np.cumsum(spectrum) / spectrum.sum()
    for row in variance:
        assert row["variance"] == pytest.approx(wanted[row["directions"] - 1], rel=1e-6)


def test_tokens_are_diagnosed_position_by_position() -> None:
    images = data.load(config.Data())
    train, test = data.in_memory(images.train)[:60], data.in_memory(images.validation)[:60]
    pooled = a_teacher("null")
    tokens = LocalTeacher(pooled.net, Teacher(label="null", tokens=True))
    found = diagnosis.diagnose(tokens, train, test, 0.5)
    assert found.width == 32
    assert found.accuracy == diagnosis.diagnose(pooled, train, test, 0.5).accuracy
    maps = tokens.encode(Request.seeded(train.images, train.labels, torch.full((60,), 0.5), 0))
    rows = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    assert len(rows) == 60 * 16
    assert found.constant_loss == pytest.approx(geometry.constant_loss(rows))
