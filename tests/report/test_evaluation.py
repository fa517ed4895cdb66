"""The page of an evaluation: its numbers and pictures against the files, alone and within a run's
page.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from torch import Tensor

from dra_ray import data
from dra_ray.config import Data
from dra_ray.errors import DataError
from dra_ray.evaluation.intervals import wilson
from dra_ray.evaluation.result import Threat
from dra_ray.report import collect, examples, plots, rows, write
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from tests.report.test_html import Page, page
from tests.report.written_runs import (
    CORRUPTIONS,
    IMAGES,
    SPENT,
    corruptions,
    first_failures,
    kept,
    under,
    verdicts,
)

THREAT = Threat(norm="linf", eps_255=8.0)


def alone(run: Store, to: Store) -> Store:
    """A folder with the files of an evaluation and no training run."""
    for name in run.files():
        if name.startswith("evaluation/"):
            (to / name).write_bytes((run / name).read_bytes())
    return to


def pictures(seen: Page) -> list[np.ndarray]:
    return [
        np.array(Image.open(io.BytesIO(base64.b64decode(resource.partition(",")[2]))))
        for resource in seen.resources
    ]


def test_a_training_run_shows_all_of_its_evaluation(attacked: Store) -> None:
    seen = page(attacked)
    sections = [
        "figures",
        "verdict",
        "curve",
        "corruptions",
        "examples",
        "training",
        "evaluation",
        "ran",
        "words",
        "files",
    ]
    assert seen.ids == sections
    assert all(resource.startswith("data:image/png;base64,") for resource in seen.resources)
    assert len(seen.resources) == 3 * examples.SHOWN
    for words in (
        "With 10 classes all is well.",
        "reference: to the bit what AutoAttack gives",
        "images per batch, as asked for",
        "1 batch came from an earlier, interrupted evaluation",
        "2 min 10 s2 tasks",  # square
        "Together 5 min 32 s of work in 1 min 1 s of waiting",
        "From evaluation/autoattack.json.",
        "From evaluation/adversarial.npz, evaluation/per_sample.npz.",
        "pyautoattack",
    ):
        assert words in seen.text, words


def test_the_numbers_of_an_evaluation_name_their_files(attacked: Store) -> None:
    found = collect(attacked).tree()
    final, sources = found["finals"]["run"], found["sources"]
    assert final["curve"] == (attacked / "evaluation/autoattack.json").read_json()["curve"]
    assert final["corruptions"] == corruptions()
    assert final["attack_s"] == SPENT
    assert final["tasks"] == {"clean": 3, "apgd-ce": 3, "apgd-t": 2, "fab-t": 2, "square": 2}
    for number in (
        "curve",
        "corruptions.mean",
        "corruptions.rows",
        "attack_s.square",
        "after_attack.fab-t",
        "batch_asked",
        "resumed_batches",
    ):
        assert sources[f"finals.run.{number}"] == ["evaluation/autoattack.json"], number
    assert sources["finals.run.tasks.square"] == ["evaluation/chunks"]
    assert (
        found["files"]["This run: adversarial images"]
        == (attacked / "evaluation/adversarial.npz").uri
    )


def test_bars_are_in_the_order_of_the_attacks_with_wilsons_intervals(attacked: Store) -> None:
    file = attacked / "evaluation/autoattack.json"
    plus = {
        "apgd-ce": 0.6,
        "apgd-dlr": 0.55,
        "fab": 0.55,
        "square": 0.5,
        "apgd-t": 0.45,
        "fab-t": 0.45,
    }
    file.write_json(file.read_json() | {"version": "plus", "after_attack": plus})
    summary = collect(attacked)
    (bar,) = plots.attacks(summary.evaluated)["data"]
    assert bar["x"] == [
        "no attack",
        "APGD-CE",
        "+ APGD-DLR",
        "+ FAB",
        "+ Square",
        "+ APGD-T",
        "+ FAB-T",
    ]
    low, high = wilson(round(0.5 * IMAGES), IMAGES)
    assert bar["error_y"]["array"][4] == pytest.approx(100 * (high - 0.5), abs=0.01)
    assert bar["error_y"]["arrayminus"][4] == pytest.approx(100 * (0.5 - low), abs=0.01)
    assert "APGD-CE, APGD-DLR, FAB, Square, APGD-T, FAB-T" in page(attacked).text


def test_the_curve_shows_every_radius_and_autoattack(attacked: Store) -> None:
    figure = plots.curve(collect(attacked).evaluated)
    go.Figure(figure)
    pgd, autoattack = figure["data"]
    assert list(zip(pgd["x"], pgd["y"], strict=True)) == [
        (eps, round(100 * kept(eps), 1)) for eps in (2.0, 8.0, 16.0)
    ]
    assert (autoattack["x"], autoattack["y"]) == ([8.0], [round(100 * verdicts(3).mean(), 1)])


def test_corruptions_are_a_table_with_means(attacked: Store) -> None:
    text = page(attacked).text
    for number, name in enumerate(CORRUPTIONS):
        scores = [under(number, severity) for severity in (1, 3, 5)]
        assert (
            name.replace("_", " ")
            + "".join(f"{100 * score:.1f}" for score in [*scores, sum(scores) / 3])
            in text
        )
    assert f"{100 * corruptions()['mean']:.1f}" in text


def test_newer_results_say_themselves_how_many_tasks_there_were(attacked: Store) -> None:
    file = attacked / "evaluation/autoattack.json"
    file.write_json(
        file.read_json()
        | {"tasks": {"clean": 3, "square": 7}, "subject": {"kind": "run", "what": "attacked"}}
    )
    summary = collect(attacked).tree()
    assert summary["finals"]["run"]["tasks"] == {"clean": 3, "square": 7}
    assert summary["sources"]["finals.run.tasks.square"] == ["evaluation/autoattack.json"]
    text = page(attacked).text
    assert "7 tasks" in text
    assert "subject what" in text


def test_examples_are_the_images_of_the_files_and_the_difference_is_to_scale(
    attacked: Store,
) -> None:
    found = examples.find(attacked, attacked / "evaluation", THREAT)
    test = data.in_memory(data.load(Data(test_images=IMAGES)).test)
    stored = (attacked / "evaluation/adversarial.npz").read_npz()["images"]
    student, _ = checkpoint.load(attacked)
    factor = examples.amplification(found)
    assert factor == 15  # 15 times 8/255 is just below one half
    shown = pictures(page(attacked))
    for place, example in enumerate(found):
        assert torch.equal(example.clean, data.to_float(test.images[example.index]))
        assert np.array_equal(example.adversarial.numpy(), stored[example.index])
        assert (example.label, example.attack) == (
            f"class {int(test.labels[example.index])}",
            first_failures()[example.index],
        )
        classes = student(torch.stack([example.clean, example.adversarial])).argmax(1).tolist()
        assert example.predicted == tuple(f"class {label}" for label in classes)
        assert np.array_equal(shown[3 * place], test.images[example.index, 0].numpy())
        change = (stored[example.index, 0] - example.clean[0].numpy()) * 255
        assert np.allclose(shown[3 * place + 2].astype(float), 127.5 + 15 * change, atol=0.51)
    assert len({example.label for example in found}) == examples.SHOWN


def test_examples_are_first_of_their_class_then_further_ones() -> None:
    failures = np.array(["", "clean", "square", "apgd-ce", "apgd-t", "", "square", "fab-t"])
    assert examples.choose(failures, np.array([0, 0, 1, 1, 0, 2, 1, 2])) == [2, 3, 4, 6, 7]
    assert examples.choose(np.array(["square"] * 9), np.arange(9) // 3) == [
        0,
        1,
        2,
        3,
        4,
        6,
    ]  # 0, 3 and 6 of their classes, then from the front
    assert examples.choose(np.array(["", "clean"]), np.array([0, 1])) == []


def test_png_keeps_grey_and_colour_pixels() -> None:
    for channels in (1, 3):
        pixels: Tensor = torch.arange(channels * 16, dtype=torch.float32).view(channels, 4, 4) * 5
        read = np.array(Image.open(io.BytesIO(examples.png(pixels / 255)))).reshape(4, 4, channels)
        assert np.array_equal(read.transpose(2, 0, 1), pixels.numpy())


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run: (run / "evaluation/per_sample.npz").write_npz(robust=verdicts(3)),
            "does not say which attack fooled which image",
        ),
        (
            lambda run: (run / "evaluation/adversarial.npz").write_npz(labels=np.zeros(3)),
            "does not hold the attacked images",
        ),
        (
            lambda run: (run / "evaluation/adversarial.npz").write_npz(
                images=np.zeros((IMAGES, 1, 8, 8), np.float32)
            ),
            "are not those that were attacked",
        ),
        (
            lambda run: (run / "evaluation/per_sample.npz").write_npz(
                first_failure=np.array(first_failures()), labels=np.zeros(IMAGES, np.int64)
            ),
            "are not those that were attacked",
        ),
    ],
)
def test_without_fitting_files_a_sentence_stands_for_the_examples(
    attacked: Store, change, message: str
) -> None:
    change(attacked)
    with pytest.raises(DataError, match=message):
        examples.find(attacked, attacked / "evaluation", THREAT)
    seen = page(attacked)
    assert seen.resources == []
    assert "No examples are shown" in seen.text
    assert message in seen.text


def test_without_weights_there_are_pictures_but_no_predictions(attacked: Store, tmp_path) -> None:
    moved = alone(attacked, Store(str(tmp_path / "moved")))
    (moved / "manifest.json").write_bytes((attacked / "manifest.json").read_bytes())
    seen = page(moved)
    assert len(seen.resources) == 3 * examples.SHOWN
    assert "seen as" not in seen.text
    assert "seen as" in page(attacked).text


def test_an_evaluation_alone_has_a_page(attacked: Store, tmp_path) -> None:
    folder = alone(attacked, Store(str(tmp_path / "only")))
    seen = page(folder)
    assert seen.ids == [
        "figures",
        "verdict",
        "curve",
        "corruptions",
        "examples",
        "evaluation",
        "ran",
        "words",
        "files",
    ]
    assert "is not a training run, so nothing says which images were attacked" in seen.text
    assert seen.resources == []
    summary = (folder / "summary.json").read_json()
    assert (summary["kind"], summary["name"], summary["missing"]) == ("evaluation", "only", [])
    assert summary["elapsed_s"] == 61.25
    assert summary["sources"]["elapsed_s"] == ["evaluation/autoattack.json"]
    assert all((folder / file).exists() for files in summary["sources"].values() for file in files)
    assert all(Store(uri).exists() for uri in summary["files"].values())
    (row,) = rows(folder)
    assert (row["AutoAttack %"], row["images"]) == (round(100 * verdicts(3).mean(), 1), IMAGES)


def test_the_folder_of_an_evaluation_within_its_run_has_a_page_with_its_images(
    attacked: Store,
) -> None:
    other = attacked / "evaluation" / "eps-4.5"
    for name in ("autoattack.json", "per_sample.npz", "adversarial.npz"):
        (other / name).write_bytes((attacked / "evaluation" / name).read_bytes())
    for folder in (attacked / "evaluation", other):
        seen = page(folder)
        assert seen.ids[0] == "figures"
        assert "training" not in seen.ids
        assert len(seen.resources) == 3 * examples.SHOWN
        assert "From autoattack.json." in seen.text
    summary = collect(attacked).tree()
    assert [row["name"] for row in summary["finals"]["run"]["others"]] == ["eps-4.5"]
    assert summary["sources"]["finals.run.others"] == ["evaluation/eps-4.5/autoattack.json"]
    assert "evaluation/eps-4.5" in page(attacked).text


def test_equal_evaluations_give_equal_bytes(attacked: Store) -> None:
    first = write(attacked).read_bytes()
    assert write(attacked).read_bytes() == first
