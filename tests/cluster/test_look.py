"""Analyses by Ray tasks: the same as in one process, resumed from what was kept."""

import os

import pytest
import torch

from dra_ray import config, data, runs, students
from dra_ray.errors import ConfigError
from dra_ray.evaluation.subjects import Options
from dra_ray.inspection import analyses, models
from dra_ray.inspection.kept import Kept
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.workloads import look
from tests.support.command import dra

# more than a batch, and no whole number of them
HOW = models.How(images=models.BATCH + 30, steps=2)


def trained(folder: Store, seed: int) -> str:
    """A run whose student is as it was initialised."""
    experiment = config.override(config.Experiment(), {"model.name": "wrn-10-1", "seed": seed})
    experiment = experiment.model_copy(update={"align": config.Align(weight=0.0)})
    runs.begin_run(folder, "train", experiment.model_dump(mode="json"), experiment.digest())
    torch.manual_seed(seed)
    student = students.build(experiment.model, data.load(experiment.data).shape)
    checkpoint.save(folder, student.state_dict())
    return folder.uri


def test_tasks_see_what_one_process_sees_and_a_stopped_analysis_goes_on(
    ray_cluster, tmp_path
) -> None:
    root = Store(str(tmp_path))
    given = [trained(root / f"run-{seed}", seed) for seed in (1, 2)]
    alone, _ = analyses.analyse("geometry", given, Options(), HOW, kept=Kept(root / "alone"))

    planned, seen = look.plan("geometry", given, Options(), HOW), []
    assert planned.batches == (2, 2)
    assert set(planned.widths) == {64}
    look.run(planned, root / "shared", 2, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    shared, _ = analyses.analyse("geometry", given, Options(), HOW, kept=Kept(root / "shared"))
    assert shared[0].rows == alone[0].rows
    ours, theirs = (
        {name: (root / folder / f"seen-{planned.keys[0]}" / name).read_bytes() for name in names}
        for folder in ("alone", "shared")
        for names in [sorted((root / folder / f"seen-{planned.keys[0]}").names())]
    )
    assert ours == theirs

    # two batches are lost, one of them half: the rest is not made again
    folder = root / "shared" / f"seen-{planned.keys[1]}"
    os.unlink((folder / "batch-00000.safetensors").uri)
    untouched = os.stat((folder / "batch-00001.safetensors").uri).st_mtime_ns
    seen.clear()
    look.run(planned, root / "shared", 1, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    assert os.stat((folder / "batch-00001.safetensors").uri).st_mtime_ns == untouched
    again, _ = analyses.analyse("frequency", given, Options(), HOW, kept=Kept(root / "shared"))
    assert [row["model"] for row in again[0].rows] == [row["model"] for row in alone[0].rows]
    assert look.plan("frequency", given, Options(), HOW).keys == planned.keys  # and shares it all

    other = models.How(images=HOW.images, steps=3)
    assert look.plan("geometry", given, Options(), other).keys != planned.keys


def test_the_job_makes_the_page_and_its_autoencoders_in_tasks(ray_cluster, tmp_path) -> None:
    """And the numbers of the command, which trains them in its own process."""
    root = Store(str(tmp_path))
    given = tuple(trained(root / f"run-{seed}", seed) for seed in (1, 2))
    asked = config.Analysis(what="sae", models=given, images=60, steps=2, sae_steps=3)
    seen: list[tuple[int, int]] = []
    told = look.analyse(asked, root / "page", lambda row: seen.append((row.done, row.total)))
    assert seen[-1] == (10, 10), "two models, each with a batch and four sizes of autoencoder"
    how = models.How(images=60, steps=2, sae_steps=3)
    alone, _ = analyses.analyse("sae", given, Options(), how)
    found = (root / "page" / look.FOUND).read_json()["sae"]
    assert found["rows"] == alone[0].rows
    assert told == {"sae": alone[0].here}
    assert alone[0].here in (root / "page" / runs.REPORT).read_text()
    seen.clear()
    look.analyse(asked, root / "page", lambda row: seen.append((row.done, row.total)))
    assert not seen, "nothing is made again"
    with pytest.raises(ConfigError, match="exists with another config"):
        look.analyse(config.override(asked, {"seed": 1}), root / "page")


def test_a_teacher_s_head_is_attacked_in_tasks_too(ray_cluster, teacher, tmp_path) -> None:
    """With the numbers of one process, and each radius kept on its own."""
    given = (teacher.uri, trained(Store(str(tmp_path)) / "run", 1))
    how = models.How(images=12, steps=1, sigma=0.3, head_images=40)
    planned, made = look.plan("probe", given, Options(), how), []
    shared = Store(str(tmp_path)) / "shared"
    look.run(planned, shared, 2, lambda done, total: made.append((done, total)))
    names = sorted(shared.names())
    radii = [name for name in names if name.startswith("radius-")]
    assert len(radii) == 7 * 5, "four heads and a model"
    assert made[-1] == (36, 36), "and a batch of the model"
    kept, _ = analyses.analyse("probe", given, Options(), how, kept=Kept(shared))
    alone, _ = analyses.analyse("probe", given, Options(), how)
    assert kept[0].rows == alone[0].rows
    assert sorted(shared.names()) == names, "nothing was made anew"


def test_code_of_this_machine_stays_here(tmp_path) -> None:
    (tmp_path / "my_net.py").write_text(
        "import torch\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    words = ["analyse", "geometry", "my_net:net", "--workers", "2", "--set", "name=digits"]
    words += ["--set", "test_images=300", "--eps-255", "8", "--norm", "linf"]
    done = dra(tmp_path, *words)
    assert done.returncode == 2
    assert "code of this machine; leave --workers out" in done.stderr.replace("\n", " ")
