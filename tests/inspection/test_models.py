"""What analyses see of a model equals what the model gives by hand; `dra analyse` from a classifier
to its page.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess

import pytest
import torch
from torch import nn

from dra_ray import config, data, students
from dra_ray.attacks.pgd import evaluate_pgd, noise_like
from dra_ray.config.catalogue import Effort
from dra_ray.data.random import Stream, generator
from dra_ray.errors import ConfigError, DataError
from dra_ray.evaluation.subjects import Subject
from dra_ray.inspection import analyses, models
from dra_ray.report import analyses as page
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Request
from tests.support.command import dra

HOW = models.How(images=40, steps=3)


def a_subject(seed: int, eps_255: float = 20.0, student: nn.Module | None = None) -> Subject:
    experiment = config.override(
        config.Experiment(), {"model.name": "wrn-10-1", "threat.eps_255": eps_255}
    )
    images = data.load(experiment.data)
    torch.manual_seed(seed)
    net = student or students.build(experiment.model, images.shape)
    test = data.in_memory(images.test[:40])
    return Subject(
        f"net-{seed}",
        net.eval(),
        data.to_float(test.images),
        test.labels,
        experiment,
        Store("unused"),
        {},
    )


def test_a_classifier_is_seen_as_it_is() -> None:
    subject = a_subject(0)
    done: list[int] = []
    seen = models.look(subject, HOW, done.append)
    student, x, y = subject.student, subject.images, subject.labels
    assert isinstance(student, students.Student)
    with torch.no_grad():
        logits, features = student.with_features(x)
    assert torch.equal(seen.features, features)
    assert seen.weight is not None
    assert torch.allclose(seen.features @ seen.weight.T + seen.bias, logits, atol=1e-5)
    assert torch.equal(seen.correct, logits.argmax(1) == y)
    noise = noise_like(x.shape, subject.experiment.threat, generator(0, Stream.ANALYSIS))
    withstood = evaluate_pgd(student, x, y, subject.experiment.threat, noise, 3)
    assert torch.equal(seen.withstood, withstood)
    assert seen.perturbation is not None
    assert 0 < seen.perturbation.abs().max() <= 20 / 255 + 1e-6
    with torch.no_grad():
        assert torch.equal(seen.adversarial, student.with_features(x + seen.perturbation)[1])
    inputs = x.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(student(inputs), y, reduction="sum").backward()
    assert torch.equal(seen.gradient, inputs.grad)
    assert done == [40]
    assert all(p.requires_grad for p in student.parameters()), "the student is left as it was"
    assert not any(module._forward_pre_hooks for module in student.modules())


class Tokens(nn.Module):
    """Its last linear layer sees every row of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x[:, 0]).mean(1)


def test_what_has_no_feature_is_refused() -> None:
    convolutions = a_subject(0, student=nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()))
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        models.look(convolutions, HOW)
    tokens = a_subject(0, student=Tokens())
    with pytest.raises(ConfigError, match="does not see one feature per image"):
        models.look(tokens, HOW)


def test_models_are_seen_on_the_same_images_within_the_same_ball() -> None:
    one = a_subject(0)
    models.require_alike([one, a_subject(1)])
    with pytest.raises(
        ConfigError, match=r"net-0' is attacked within 20/255 .*net-1' within 8/255"
    ):
        models.require_alike([one, a_subject(1, eps_255=8.0)])
    fewer = dataclasses.replace(a_subject(1), images=one.images.flip(0))
    with pytest.raises(ConfigError, match="have other test images"):
        models.require_alike([one, fewer])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Store:
    torch.manual_seed(0)
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    checkpoint.save(store, EDM(config.UNet(model_channels=16), 8, 1, 10, 0.7), {})
    return store


def test_a_teacher_is_seen_as_a_pool_would_answer(teacher: Store) -> None:
    subject = a_subject(0)
    assert models.is_teacher(teacher.uri)
    assert models.is_teacher("package:fashion-edm")
    assert not any(
        map(models.is_teacher, ("timm/resnet18", "robustbench:x.pt", "a.b:c", "nowhere"))
    )
    seen = models.look_at_teacher(teacher.uri, subject.images, HOW)
    pixels = data.in_memory(data.load(subject.experiment.data).test[:40]).images
    settings = config.Teacher(uri=teacher.uri, label="null")
    source = LocalTeacher(checkpoint.load(teacher), settings)
    sigma = torch.full((40,), HOW.sigma)
    expected = source.encode(Request.seeded(pixels, torch.zeros(40).long(), sigma, 0))
    assert torch.equal(seen.features, expected)
    with pytest.raises(DataError, match="the teacher encodes"):
        models.look_at_teacher(teacher.uri, torch.zeros(4, 1, 9, 9), HOW)


def test_each_analysis_has_rows_a_sentence_and_a_section(teacher: Store, tmp_path) -> None:
    seen = [models.look(a_subject(seed), HOW) for seed in range(3)]
    reference = models.look_at_teacher(teacher.uri, a_subject(0).images, HOW)
    found = [
        each(seen, reference, **({"steps": 3} if name == "sae" else {}))
        for name, each in analyses.OF_MODELS.items()
    ]
    how = models.How(images=40, steps=2, head_images=100)
    chosen = [a_subject(0)]
    numbers = range(models.curve_count(chosen))
    found.append(analyses.of_probe([models.curve(teacher.uri, chosen, how, n) for n in numbers]))
    small = dataclasses.replace(how, autoattack_images=12, effort=Effort(3, 2, 5))
    verdicts = models.heads_under_autoattack(teacher.uri, a_subject(0), small)
    found.append(analyses.of_heads(verdicts))
    assert [each.name for each in found] == list(page.FIGURES)
    geometry, similarity, dimension, sae, frequency, probe, under = found
    assert [row["version"] for row in under.rows] == ["standard", "standard", "rand"]
    assert ["fresh noise" in row["model"] for row in under.rows] == [False, True, True]
    assert all(row["robust_accuracy"] <= row["clean_accuracy"] for row in under.rows)
    assert all(row["images"] == 12 for row in under.rows)
    assert [row["k"] for row in sae.rows] == 3 * [4, 8, 16, 32]
    assert all(row["error"] > 0 for row in sae.rows)
    assert [row["model"].removeprefix(f"head on {teacher.uri}") for row in probe.rows] == [
        "",
        ", fresh noise, EOT 1",
        ", fresh noise, EOT 5",
        ", fresh noise, EOT 20",
        "net-0",
    ]
    clean = models.look(a_subject(0), how).accuracies["clean_accuracy"]
    assert probe.rows[-1]["eps_0"] == pytest.approx(clean)
    assert [row["model"] for row in geometry.rows] == [teacher.uri, "net-0", "net-1", "net-2"]
    assert "alignment" not in geometry.rows[0]
    assert [row["model"] for row in similarity.rows] == ["net-0", "net-1", "net-2"]
    assert "rank correlation" in similarity.here or "Too few" in similarity.here
    assert len(dimension.curves["net-0"]["clean"]) == dimension.rows[0]["width"]
    assert len(frequency.curves["net-0"]["gradient"]) == 5
    ours, theirs = (
        torch.tensor(frequency.curves[name]["gradient_2d"]) for name in ("net-0", "net-1")
    )
    ratio = torch.tensor(frequency.curves["net-1"]["gradient_over_first"])
    assert torch.allclose(ratio, (theirs / ours).log2(), atol=1e-4)
    assert "gradient_over_first" not in frequency.curves["net-0"]
    for row in frequency.rows:
        bands = [row[f"gradient_{band}"] for band in ("low", "mid", "high")]
        assert sum(bands) == pytest.approx(1)
    same = analyses.of_geometry([seen[0], dataclasses.replace(seen[0], name="twin")])
    assert "Several models have the same uniformity" in same.here
    place = Store(str(tmp_path)) / "page.html"
    page.write(place, "a <model>", {"images": 40}, found)
    text = place.read_text()
    assert "a &lt;model&gt;" in text
    assert text.count('"type": "heatmap"') + text.count('"type":"heatmap"') == 4
    for each in found:
        assert each.title.replace("'", "&#39;") in text


@pytest.mark.seconds
def test_the_command(teacher: Store, tmp_path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def make(seed):\n"
        "    torch.manual_seed(seed)\n"
        "    layers = torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU()\n"
        "    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 10))\n"
        "def one(): return make(1)\n"
        "def two(): return make(2)\n"
    )

    def analyse(*arguments: str) -> subprocess.CompletedProcess[str]:
        data_set = "--set", "name=digits", "--set", "test_images=300"
        short = "--images", "24", "--steps", "2", "--sae-steps", "5"
        return dra(tmp_path, "analyse", *arguments, *data_set, *short, timeout_s=400)

    files = "--json", "out.json", "--out", "page.html"
    done = analyse("all", teacher.uri, "nets:one", "nets:two", *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The paper: ") == done.stdout.count("Here: ") == 6
    found = json.loads((tmp_path / "out.json").read_text())
    assert sorted(found) == ["dimension", "frequency", "geometry", "probe", "sae", "similarity"]
    assert "plotly" in (tmp_path / "page.html").read_text()
    for arguments, words in (
        (("geometri", "nets:one"), "did you mean 'geometry'"),
        (("geometry", teacher.uri), "give a classifier beside it"),
        (("similarity", "nets:one"), "give a teacher or a second model"),
        (("geometry", teacher.uri, "package:fashion-edm", "nets:one"), "is a second teacher"),
        (
            ("similarity", "nets:one", "nets:two", "--neighbours", "24"),
            "neighbours=24 of 24 images",
        ),
    ):
        done = analyse(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert words in done.stderr
