"""Sharded over Ray tasks, interrupted or not: the verdicts and images of one AutoAttack process, to
the bit.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from ray.util.state import list_tasks
from torch.nn import functional as F

from dra_ray import data, students
from dra_ray import runs as run_folder
from dra_ray.attacks.pgd import evaluate_pgd
from dra_ray.bench import driver
from dra_ray.config import Data, Evaluation, Experiment, Model, Threat
from dra_ray.config.catalogue import Effort, attacks
from dra_ray.data import corruptions
from dra_ray.errors import ConfigError, DataError, RunError
from dra_ray.evaluation import subjects
from dra_ray.evaluation.intervals import wilson
from dra_ray.evaluation.result import read
from dra_ray.evaluation.subjects import Options
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.workloads.evaluate import evaluate, evaluate_many, table
from tests.cluster.small import ASK, go_on, next_row, running

EFFORT = Effort(apgd_steps=8, fab_steps=3, square_queries=60)
EXPERIMENT = Experiment(
    data=Data(test_images=44, validation_images=8),
    model=Model(name="wrn-10-1"),
    threat=Threat(eps_255=20, step_255=5),
    evaluation=Evaluation(batch=12, seed=5, pgd_steps=6),
)


@pytest.fixture(scope="module")
def images():
    return data.load(EXPERIMENT.data)


@pytest.fixture(scope="module")
def weights(images):
    return trained(EXPERIMENT, images, 80)


def trained(experiment, images, steps):
    """Weights after a few seconds of one-step adversarial training."""
    torch.manual_seed(0)
    student = students.build(experiment.model, images.shape)
    optim = torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(steps):
        index = torch.randint(
            len(images.train), (128,), generator=torch.Generator().manual_seed(step)
        )
        x, y = (
            data.to_float(images.train.images[index]).requires_grad_(True),
            images.train.labels[index],
        )
        (gradient,) = torch.autograd.grad(F.cross_entropy(student(x), y), x)
        optim.zero_grad()
        F.cross_entropy(
            student((x + experiment.threat.eps * gradient.sign()).clamp(0, 1).detach()), y
        ).backward()
        optim.step()
    return student.state_dict()


@pytest.fixture
def run(tmp_path, weights):
    return trained_run(tmp_path / "run", weights)


def trained_run(path, weights, experiment=EXPERIMENT):
    run = Store(str(path))
    run_folder.begin_run(run, "train", experiment.model_dump(mode="json"), experiment.digest())
    checkpoint.save(run, weights)
    return run


@pytest.fixture(scope="module")
def single(images, weights):
    """What one process of the package finds: clean and PGD verdicts, adversarial images, robust
    flags.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student = students.build(EXPERIMENT.model, images.shape).eval()
    student.load_state_dict(weights)
    x, y = data.to_float(images.test.images), images.test.labels
    seed, threat, batch = EXPERIMENT.evaluation.seed, EXPERIMENT.threat, EXPERIMENT.evaluation.batch
    adversarial, robust = stock(student, x, y, threat.eps_255, seed, batch, EFFORT)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    pgd = evaluate_pgd(student, x, y, threat, noise, EXPERIMENT.evaluation.pgd_steps)
    with torch.no_grad():
        clean = student(x).argmax(1) == y
    torch.set_num_threads(threads)
    return {
        "clean": clean.numpy(),
        "pgd": pgd.numpy(),
        "adversarial": adversarial,
        "robust": robust,
    }


def stock(student, x, y, eps_255, seed, batch, effort):
    """pyautoattack alone, in this process and on one thread: adversarial images, robust flags."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    eps = eps_255 / 255
    run = AutoAttack(student, norm="Linf", eps=eps, seed=seed, version="standard")
    common = {
        "n_iter": effort.apgd_steps,
        "eps": eps,
        "norm": "Linf",
        "n_restarts": 1,
        "seed": seed,
        "device": "cpu",
        "logger": run.logger,
    }
    run.apgd, run.apgd_targeted = (
        APGDAttack(student, **common),
        APGDAttack_targeted(student, n_target_classes=9, **common),
    )
    run.fab.n_iter, run.square.n_queries = effort.fab_steps, effort.square_queries
    adversarial, predicted = run.run_standard_evaluation(x, y, batch_size=batch)
    torch.set_num_threads(threads)
    return adversarial.numpy(), (predicted == y).numpy()


def check_against(single, run, result):
    sample = (run / "evaluation" / "per_sample.npz").read_npz()
    assert np.array_equal(
        (run / "evaluation" / "adversarial.npz").read_npz()["images"], single["adversarial"]
    )
    assert np.array_equal(sample["robust"], single["robust"])
    assert np.array_equal(sample["clean_correct"], single["clean"])
    assert np.array_equal(sample["pgd_correct"], single["pgd"])
    assert np.array_equal(sample["first_failure"] == "", single["robust"])
    assert np.array_equal(sample["first_failure"] == "clean", ~single["clean"])
    assert result.autoattack_accuracy == single["robust"].mean()
    assert result.clean_accuracy == single["clean"].mean()


def same_but_for_time(one, other):
    changing = {"elapsed_s", "attack_s", "resumed_batches", "tasks_run", "subject"}
    return one.model_dump(exclude=changing) == other.model_dump(exclude=changing)


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_sharded_is_single(ray_cluster, run, single, workers):
    rows = []
    result = evaluate(run, workers=workers, progress=rows.append, effort=EFFORT)
    check_against(single, run, result)
    assert 0.05 < result.autoattack_accuracy < single["clean"].mean() - 0.1, (
        "the net must be worth attacking"
    )
    assert result.tree() == (run / "evaluation" / "autoattack.json").read_json()
    assert result == read(run / "evaluation")
    assert result.interval == pytest.approx(wilson(int(single["robust"].sum()), 44))
    assert list(result.after_attack) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert "not standard AutoAttack" in result.flags[0]
    assert (result.version, result.level, result.streams, result.batch) == (
        "standard",
        "reference",
        "batch",
        12,
    )
    assert result.score == "autoattack_accuracy"
    assert not result.randomised
    assert result.numerics["threads"] == 1
    assert (result.threat.norm, result.threat.eps_255) == ("linf", 20.0)
    assert [row.attack for row in rows[:4]] == ["clean"] * 4
    assert rows[-1].attack == "square"
    assert rows[-1].done == rows[-1].of
    assert rows[-1].robust == single["robust"].sum()
    assert result.tasks_run == len(rows) == sum(result.tasks.values())
    assert result.resumed_batches == 0
    sample = (run / "evaluation" / "per_sample.npz").read_npz()
    assert {
        attack: sample[f"after_{attack}"].mean() for attack in result.after_attack
    } == result.after_attack
    assert np.array_equal(sample["after_square"], sample["robust"])
    again = []
    assert evaluate(run, workers=2, progress=again.append, effort=EFFORT) == result
    assert again == [], "a finished evaluation is not run again"


def test_an_interrupted_evaluation_goes_on(ray_cluster, run, single):
    def interrupt(row):
        if row.attack == "apgd-t":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, workers=1, progress=interrupt, effort=EFFORT)
    assert not (run / "evaluation" / "autoattack.json").exists()
    finished = [
        name
        for name in (run / "evaluation" / "chunks").names()
        if name.startswith(("clean", "apgd-ce"))
    ]
    rows = []
    result = evaluate(run, workers=1, progress=rows.append, effort=EFFORT)
    check_against(single, run, result)
    assert result.resumed_batches >= len(finished)
    assert {row.attack for row in rows} <= {
        "apgd-t",
        "fab-t",
        "square",
    }


def test_lost_damaged_and_foreign_batches_are_made_again(
    ray_cluster, run, single, tmp_path, weights
):
    first = evaluate(run, effort=EFFORT)
    chunks = run / "evaluation" / "chunks"
    os.remove(f"{run}/evaluation/autoattack.json")
    os.remove(f"{chunks}/apgd-t-00000.npz")
    (chunks / "fab-t-00000.npz").write_bytes((chunks / "fab-t-00000.npz").read_bytes()[:100])
    stale = (chunks / "square-00000.npz").read_npz()
    (chunks / "square-00000.npz").write_npz(
        **{**stale, "broken": ~stale["broken"], "digest": np.array("of another model")}
    )
    rows = []
    second = evaluate(run, progress=rows.append, effort=EFFORT)
    check_against(single, run, second)
    assert same_but_for_time(first, second)
    assert [(row.attack, row.done) for row in rows] == [
        ("apgd-t", rows[0].of),
        ("fab-t", rows[1].of),
        ("square", rows[2].of),
    ]


def test_other_weights_or_settings_are_evaluated_anew(ray_cluster, run, weights):
    first = evaluate(run, effort=Effort(2, 1, 4))
    checkpoint.save(
        run,
        {
            name: tensor * (0.5 if name == "logits.weight" else 1)
            for name, tensor in weights.items()
        },
    )
    second = evaluate(run, effort=Effort(2, 1, 4))
    assert second.digest != first.digest
    assert second.resumed_batches == 0
    third = evaluate(run, effort=Effort(2, 1, 5))
    assert third.digest != second.digest
    assert third.effort["square_queries"] == 5


@pytest.mark.slow
def test_two_models_share_the_workers(ray_cluster, tmp_path, weights, single):
    other = {
        name: tensor * (0.9 if name == "logits.weight" else 1) for name, tensor in weights.items()
    }
    runs = [trained_run(tmp_path / "one", weights), trained_run(tmp_path / "two", other)]
    rows = []
    results = evaluate_many(runs, workers=2, progress=rows.append, effort=EFFORT)
    check_against(single, runs[0], results[0])
    alone = evaluate(trained_run(tmp_path / "three", other), effort=EFFORT)
    assert same_but_for_time(alone, results[1])
    names = [row.run for row in rows]
    assert names != sorted(names), "batches of both are interleaved"


def test_a_killed_worker_changes_nothing(ray_cluster, run, single):
    killed = []

    def kill(row):
        for task in list_tasks(
            ray_cluster.address_info["gcs_address"],
            filters=[("state", "=", "RUNNING")],
            detail=True,
        ):
            if not killed and task.worker_pid and task.func_or_class_name.endswith("_attack"):
                os.kill(task.worker_pid, signal.SIGKILL)
                killed.append(task.worker_pid)

    result = evaluate(run, workers=2, progress=kill, effort=EFFORT)
    assert killed
    check_against(single, run, result)


def test_a_table_for_people(ray_cluster, run, single):
    result = evaluate(run, effort=Effort(2, 1, 4))
    rows = table(result)
    assert [row["what"] for row in rows] == [
        "Clean",
        "PGD-6",
        "after apgd-ce",
        "after apgd-t",
        "after fab-t",
        "AutoAttack",
    ]
    assert rows[-1]["interval"] == pytest.approx(list(result.interval))
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)


def test_what_cannot_be_evaluated_is_said(ray_cluster, tmp_path, run, weights):
    with pytest.raises(DataError, match="nothing' does not exist"):
        evaluate(Store(str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="workers=0"):
        evaluate(run, workers=0)
    diverged = {
        name: tensor * (float("nan") if name == "logits.weight" else 1)
        for name, tensor in weights.items()
    }
    with pytest.raises(DataError, match="12 of 12 images have logits that are NaN"):
        evaluate(trained_run(tmp_path / "diverged", diverged), effort=EFFORT)


# -- beside AutoAttack -----------------------------------------------------------------------------
MORE = {"curve_255": (0.0, 10.0, 40.0), "corruptions": "generated", "pgd_restarts": 2}


@pytest.mark.slow
def test_further_radii_and_corruptions(ray_cluster, run, images, weights, single):
    plain = evaluate(run, effort=EFFORT)
    settings = {f"evaluation.{field}": value for field, value in MORE.items()}
    subject = subjects.read(run.uri, Options(settings))
    result = evaluate(subject, workers=3, effort=EFFORT)
    assert result.resumed_batches == sum(plain.tasks.values()) - plain.tasks["clean"], (
        "AutoAttack's batches are the run's own"
    )
    assert result.tasks_run == 4 + 3 * 4 + 45
    assert read(run / "evaluation") == plain
    assert result.autoattack_accuracy == plain.autoattack_accuracy
    assert result.pgd_accuracy <= plain.pgd_accuracy

    student = students.build(EXPERIMENT.model, images.shape).eval()
    student.load_state_dict(weights)
    x, y = data.to_float(images.test.images), images.test.labels
    points = {point.eps_255: point for point in result.curve}
    assert list(points) == [0.0, 10.0, 40.0]
    assert points[0.0].accuracy == single["clean"].mean() > points[40.0].accuracy
    assert all(
        point.interval[0] <= point.accuracy <= point.interval[1] for point in points.values()
    )
    noise, threat = (
        torch.rand((2, *x.shape), generator=torch.Generator().manual_seed(5)),
        Threat(eps_255=10, step_255=2.5),
    )
    withstood = [
        evaluate_pgd(student, x, y, threat, start, EXPERIMENT.evaluation.pgd_steps)
        for start in noise
    ]
    assert points[10.0].accuracy == pytest.approx(
        (withstood[0] & withstood[1]).float().mean().item()
    )

    found = {(row.name, row.severity): row.accuracy for row in result.corruptions.rows}
    fog = data.to_float(
        corruptions.generated(images.test.images, "contrast", 5, EXPERIMENT.evaluation.seed)
    )
    with torch.no_grad():
        assert found["contrast", 5] == pytest.approx(
            (student(fog).argmax(1) == y).float().mean().item()
        )
    assert len(found) == 45
    assert result.corruptions.mean == pytest.approx(np.mean(list(found.values())))
    assert [row["what"] for row in table(result)][-4:] == [
        "PGD-6 at 0/255",
        "PGD-6 at 10/255",
        "PGD-6 at 40/255",
        "corruptions",
    ]

    (subject.folder / "autoattack.json").write_json({})
    again = evaluate(subject, effort=EFFORT)
    assert same_but_for_time(result, again), "nothing finished is done again"
    assert again.tasks_run == 0, "nothing finished is done again"


@pytest.mark.parametrize(
    ("version", "level", "streams"),
    [("plus", "fast", "sample"), ("standard", "screen", "batch"), ("rand", "reference", "batch")],
)
def test_other_versions_levels_and_streams(ray_cluster, run, version, level, streams):
    subject = subjects.read(
        run.uri, Options({"test_images": 16}, version=version, level=level, streams=streams)
    )
    result = evaluate(subject, workers=2, effort=Effort(2, 1, 4))
    assert (result.version, result.level, result.streams) == (version, level, streams)
    assert list(result.after_attack) == list(attacks(10, version, level))
    assert result.flags
    assert not (run / "evaluation" / "autoattack.json").exists()


# -- what is not ours ------------------------------------------------------------------------------
MODULE = """
import torch

class Net(torch.nn.Linear):
    most, noisy, scale = 10**6, False, 1.0

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        logits = super().forward(x.flatten(1)) * self.scale
        return logits + 0.5 * torch.randn_like(logits) if self.noisy else logits

def make(**settings):
    torch.manual_seed(0)
    net = Net(64, 10).eval()
    for name, value in settings.items():
        setattr(net, name, value)
    return net

def net():
    return make()

def large():
    return make(most=6)

def noisy():
    return make(noisy=True)

def training():
    return net().train()

def probabilities():
    return torch.nn.Sequential(net(), torch.nn.Softmax(1)).eval()

def sums():
    return torch.nn.Sequential(net(), torch.nn.Flatten(0)).eval()

def nothing():
    return make(scale=float("nan"))

class Overflows(Net):
    def forward(self, x):
        return super().forward(x) * (float("nan") if len(x) > 4 else 1.0)

def later():
    return Overflows(64, 10).eval()

def few():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()
"""


@pytest.fixture
def user(tmp_path):
    """The options of someone with a module of their own in the current directory, and images in a
    file.
    """
    before, path = os.getcwd(), list(sys.path)
    (tmp_path / "my_nets.py").write_text(MODULE)
    drawn = np.random.default_rng(0)
    (Store(str(tmp_path)) / "mine.npz").write_npz(
        image=drawn.integers(0, 256, (30, 8, 8, 1), np.uint8), label=drawn.integers(0, 10, 30)
    )
    os.chdir(tmp_path)

    def options(to="results", **settings):
        chosen = {"evaluation.batch": 12, "evaluation.pgd_steps": 3} | {
            field.replace("__", "."): value for field, value in settings.items()
        }
        return Options(chosen, eps_255=16, images="mine.npz", to=Store(to))

    yield options
    os.chdir(before)
    sys.path[:] = path
    sys.modules.pop("my_nets", None)


def test_a_function_of_the_users(ray_cluster, user):
    subject = subjects.read("my_nets:net", user())
    result = evaluate(subject, workers=2, effort=EFFORT)
    adversarial, robust = stock(subject.student, subject.images, subject.labels, 16, 0, 12, EFFORT)
    assert np.array_equal((Store("results") / "adversarial.npz").read_npz()["images"], adversarial)
    assert result.autoattack_accuracy == robust.mean()
    assert result.subject["kind"] == "function"
    assert evaluate(subjects.read("my_nets:net", user()), effort=EFFORT) == result
    with pytest.raises(ConfigError, match="holds the result of another model"):
        evaluate(subjects.read("my_nets:probabilities", user()), effort=EFFORT)


def test_a_batch_that_does_not_fit_starts_over_with_half(ray_cluster, user):
    result = evaluate(subjects.read("my_nets:large", user()), workers=2, effort=EFFORT)
    asked = evaluate(
        subjects.read("my_nets:net", user("other", evaluation__batch=6)), effort=EFFORT
    )
    assert (result.batch, result.batch_asked) == (
        6,
        12,
    )
    assert "another reference configuration" in result.flags[-1]
    assert result.after_attack == asked.after_attack
    ours, theirs = (
        (Store(folder) / "adversarial.npz").read_npz()["images"] for folder in ("results", "other")
    )
    assert np.array_equal(ours, theirs)
    assert evaluate(subjects.read("my_nets:large", user()), effort=EFFORT) == result
    os.remove("results/autoattack.json")
    again = evaluate(subjects.read("my_nets:large", user()), effort=EFFORT)
    assert again.tasks_run == 0
    assert again.batch == 6


def test_a_randomised_student_is_told(ray_cluster, user):
    result = evaluate(
        subjects.read("my_nets:noisy", user(evaluation__eot=4)), workers=2, effort=EFFORT
    )
    assert result.randomised
    assert result.score == "pgd_accuracy"
    assert result.eot == 4
    assert any("the score that counts is PGD's" in flag for flag in result.flags)
    assert result.pgd_worst_accuracy < result.pgd_accuracy, "ten passes judge each image"
    again = evaluate(
        subjects.read("my_nets:noisy", user("other", evaluation__eot=4)), workers=1, effort=EFFORT
    )
    assert again.pgd_accuracy == result.pgd_accuracy
    assert again.after_attack == result.after_attack
    single = evaluate(subjects.read("my_nets:noisy", user("third")), effort=EFFORT)
    assert single.score == "autoattack_accuracy"
    assert any("set evaluation.eot" in flag for flag in single.flags)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("sums", r"gives float32 \[20\] for 2 images"),
        ("nothing", "gives logits that are not finite"),
        ("few", r"gives float32 \[2, 5\] for 2 images of 10 classes"),
    ],
)
def test_a_student_that_makes_no_sense_is_refused_before_ray_starts(user, function, words):
    with pytest.raises(ConfigError, match=words) as caught:
        subjects.read(f"my_nets:{function}", user())
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite(ray_cluster, user):
    with pytest.raises(DataError, match="logits that are NaN") as caught:
        evaluate(subjects.read("my_nets:later", user()), effort=EFFORT)
    assert "\n" not in str(caught.value)


def test_a_student_in_train_mode_is_put_into_eval_mode_and_this_is_said(user):
    subject = subjects.read("my_nets:training", user())
    assert not subject.student.training
    assert any("put into eval mode" in note for note in subject.notes)


def test_probabilities_instead_of_logits_are_told(ray_cluster, user):
    result = evaluate(subjects.read("my_nets:probabilities", user()), effort=Effort(2, 1, 4))
    assert any("probabilities, not logits" in flag for flag in result.flags)


@pytest.mark.slow
def test_the_driver_keeps_its_workers_busy(ray_cluster, tmp_path):
    (row,) = driver.efficiency(Store(str(tmp_path)), workers=(4,), chunks=4, chunk_s=1)
    assert (row["workers"], row["chunks"], row["ideal_s"]) == (4, 20, 5)
    assert 0.6 < row["efficiency"] <= 1, (
        row
    )  # `dra bench evaluate` measures it; here the machine has other things to do too


@pytest.mark.slow
def test_the_driver_holds_no_images(ray_cluster, tmp_path):
    row = driver.memory(Store(str(tmp_path)), images=1200, batch=20)
    assert row["images_gb"] > 0.7
    assert row["peak_gb"] < row["images_gb"] / 2


def test_nothing_to_evaluate():
    assert evaluate_many([]) == []


# -- the full form: two models, any number of workers, whatever is killed --------------------------
SMALL = Effort(apgd_steps=3, fab_steps=1, square_queries=25)
FASHION = Experiment(
    data=Data(name="fashion-mnist", validation_images=8, train_images=4000, test_images=256),
    model=Model(name="wrn-10-1"),
    threat=Threat(eps_255=16, step_255=4),
    evaluation=Evaluation(batch=64, seed=3, pgd_steps=3),
)
EVALUATE = (
    ASK
    + """
import sys
from dra_ray import cluster
from dra_ray.config.catalogue import Effort
from dra_ray.evaluation import subjects
from dra_ray.evaluation.subjects import Options
from dra_ray.storage import Store
from dra_ray.workloads.evaluate import evaluate_many

def chosen(to):
    fashion, weights, pictures, results = sys.argv[1:5]
    folder = Store(results) / to
    resnet = {"name": "cifar10", "model.name": "resnet-18", "model.normalise": False}
    resnet |= {"evaluation.batch": 8, "evaluation.pgd_steps": 2}
    attacked = Options(resnet, eps_255=0.5, images=pictures, to=folder / "resnet")
    return [
        subjects.read(fashion, Options(to=folder / "fashion")),
        subjects.read(weights, attacked),
    ]

if __name__ == "__main__":
    with cluster.connect():  # the cluster of the tests, by RAY_ADDRESS
        effort = Effort(*map(int, sys.argv[5:]))
        evaluate_many(chosen("killed"), 3, lambda row: ask(row.attack), effort)
"""
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Arguments of EVALUATE; a Fashion-MNIST student of a few steps, and the ResNet-18 and
    photographs that packages bring along.
    """
    if not Path(FASHION.data.uri).exists():
        pytest.skip(f"{FASHION.data.uri} is missing; install Debian's dataset-fashion-mnist")
    folder = Store(str(tmp_path_factory.mktemp("two")))
    fashion = trained_run(
        folder.uri + "/run", trained(FASHION, data.load(FASHION.data), 60), FASHION
    )
    packages = {
        name: Store(importlib.util.find_spec(name).submodule_search_locations[0])
        for name in ("foolbox", "pyautoattack")
    }
    photographs = packages["foolbox"] / "data"
    names = [name for name in photographs.names() if name.startswith("cifar10_")]
    images = np.stack(
        [np.array(Image.open(io.BytesIO((photographs / name).read_bytes()))) for name in names]
    )
    labels = np.array([int(name.removesuffix(".png").rsplit("_", 1)[1]) for name in names])
    (folder / "pictures.npz").write_npz(image=images, label=labels)
    return [
        fashion.uri,
        f"{packages['pyautoattack']}/examples/model_test.pt",
        f"{folder}/pictures.npz",
        f"{folder}/results",
    ]


def chosen(two, to):
    scope = {"__name__": "driver"}
    sys.argv, before = ["driver", *two], sys.argv
    exec(EVALUATE, scope)
    found = scope["chosen"](to)
    sys.argv = before
    return found


@pytest.fixture(scope="module")
def alone(two):
    """What pyautoattack finds: adversarial images and who is robust, of both models."""
    return [
        stock(
            one.student,
            one.images,
            one.labels,
            one.experiment.threat.eps_255,
            one.experiment.evaluation.seed,
            one.experiment.evaluation.batch,
            SMALL,
        )
        for one in chosen(two, "alone")
    ]


def check_both(alone, subjects_):
    for (adversarial, robust), subject in zip(alone, subjects_, strict=True):
        assert np.array_equal(
            (subject.folder / "adversarial.npz").read_npz()["images"], adversarial
        ), subject.name
        assert np.array_equal((subject.folder / "per_sample.npz").read_npz()["robust"], robust), (
            subject.name
        )
        assert 0 < robust.mean() < 1, "the model must be worth attacking"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_two_models_are_single_with_any_number_of_workers(ray_cluster, two, alone, workers):
    both = chosen(two, f"workers-{workers}")
    evaluate_many(both, workers, effort=SMALL)
    check_both(alone, both)


@pytest.mark.slow
def test_workers_killed_at_random_change_nothing(ray_cluster, two, alone):
    both, killed, chance = chosen(two, "workers-killed"), [], random.Random(0)

    def kill(row):
        """At about every third batch that ends, one of the workers that attack another."""
        if len(killed) < 6 and chance.random() < 0.4 and (pids := running(r".+:[a-z-]+-\d{5}")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid := chance.choice(pids), signal.SIGKILL)
                killed.append(pid)

    for _ in range(20):
        try:
            evaluate_many(both, 3, kill, SMALL)
            break
        except RunError:  # one batch was hit more often than a task is tried
            continue
    assert len(killed) >= 3, killed
    check_both(alone, both)


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(ray_cluster, two, alone, tmp_path):
    (tmp_path / "driver.py").write_text(EVALUATE)
    effort = [str(steps) for steps in dataclasses.astuple(SMALL)]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    command, pipe = [sys.executable, str(tmp_path / "driver.py"), *two, *effort], subprocess.PIPE
    stages = []
    for batches in (3, 8):  # killed twice, after so many of them
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        for batch in range(batches):
            if batch:
                go_on(process)
            stages.append(next_row(process))
        process.kill()
        process.communicate()
    assert all(stages), "it ended before it was killed"
    both = chosen(two, "killed")
    results = evaluate_many(both, 3, effort=SMALL)
    check_both(alone, both)
    assert sum(result.resumed_batches for result in results) >= len(stages)
    assert all(
        result.tasks_run + result.resumed_batches == sum(result.tasks.values())
        for result in results
    )
