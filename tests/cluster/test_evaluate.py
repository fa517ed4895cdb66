"""Sharded over Ray tasks, interrupted or not: the verdicts and images of one AutoAttack process, to the bit."""

import os
import signal

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from ray.util.state import list_tasks
from torch.nn import functional as F

from dra_ray import data, models, storage
from dra_ray.analysis.intervals import wilson
from dra_ray.config import Data, Evaluation, Experiment, Model, Threat
from dra_ray.errors import CheckpointError, ConfigError, DataError
from dra_ray.evaluate import evaluate, evaluate_many, table
from dra_ray.models import checkpoint
from dra_ray.robust.attacks import evaluate_pgd
from dra_ray.robust.autoattack import Effort
from dra_ray.storage import Store

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
    """A few seconds of one-step adversarial training."""
    torch.manual_seed(0)
    student = models.build(EXPERIMENT.model, images.shape)
    optim = torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(80):
        index = torch.randint(len(images.train), (128,), generator=torch.Generator().manual_seed(step))
        x, y = data.to_float(images.train.images[index]).requires_grad_(True), images.train.labels[index]
        (gradient,) = torch.autograd.grad(F.cross_entropy(student(x), y), x)
        optim.zero_grad()
        F.cross_entropy(student((x + EXPERIMENT.threat.eps * gradient.sign()).clamp(0, 1).detach()), y).backward()
        optim.step()
    return student.state_dict()


@pytest.fixture
def run(tmp_path, weights):
    return trained_run(tmp_path / "run", weights)


def trained_run(path, weights, experiment=EXPERIMENT):
    run = Store(str(path))
    storage.begin_run(run, "train", experiment.model_dump(mode="json"), experiment.digest())
    checkpoint.save(run, weights)
    return run


@pytest.fixture(scope="module")
def single(images, weights):
    """What one process of the package finds: clean and PGD verdicts, adversarial images, robust flags."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student = models.build(EXPERIMENT.model, images.shape).eval()
    student.load_state_dict(weights)
    x, y = data.to_float(images.test.images), images.test.labels
    seed, threat, batch = EXPERIMENT.evaluation.seed, EXPERIMENT.threat, EXPERIMENT.evaluation.batch
    run = AutoAttack(student, norm="Linf", eps=threat.eps, seed=seed, version="standard")
    common = {"n_iter": EFFORT.apgd_steps, "eps": threat.eps, "norm": "Linf", "n_restarts": 1, "seed": seed, "device": "cpu", "logger": run.logger}
    run.apgd, run.apgd_targeted = APGDAttack(student, **common), APGDAttack_targeted(student, n_target_classes=9, **common)
    run.fab.n_iter, run.square.n_queries = EFFORT.fab_steps, EFFORT.square_queries
    adversarial, predicted = run.run_standard_evaluation(x, y, batch_size=batch)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    pgd = evaluate_pgd(student, x, y, threat, noise, EXPERIMENT.evaluation.pgd_steps)
    with torch.no_grad():
        clean = student(x).argmax(1) == y
    torch.set_num_threads(threads)
    return {"clean": clean.numpy(), "pgd": pgd.numpy(), "adversarial": adversarial.numpy(), "robust": (predicted == y).numpy()}


def check_against(single, run, result):
    sample = (run / "evaluation" / "per_sample.npz").read_npz()
    assert np.array_equal((run / "evaluation" / "adversarial.npz").read_npz()["images"], single["adversarial"])
    assert np.array_equal(sample["robust"], single["robust"])
    assert np.array_equal(sample["clean_correct"], single["clean"]) and np.array_equal(sample["pgd_correct"], single["pgd"])
    assert np.array_equal(sample["first_failure"] == "", single["robust"])
    assert np.array_equal(sample["first_failure"] == "clean", ~single["clean"])
    assert result["autoattack_accuracy"] == single["robust"].mean() and result["clean_accuracy"] == single["clean"].mean()


def same_but_for_time(one, other):
    changing = {"elapsed_s", "attack_s", "resumed_batches"}
    return {k: v for k, v in one.items() if k not in changing} == {k: v for k, v in other.items() if k not in changing}


def test_sharded_is_single_with_two_workers(ray_cluster, run, single):
    rows = []
    result = evaluate(run, workers=2, progress=rows.append, effort=EFFORT)
    check_against(single, run, result)
    assert 0.05 < result["autoattack_accuracy"] < single["clean"].mean() - 0.1, "the net must be worth attacking"
    assert result == (run / "evaluation" / "autoattack.json").read_json()
    assert result["interval"] == pytest.approx(wilson(int(single["robust"].sum()), 44))
    assert list(result["after_attack"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert "not standard AutoAttack" in result["flags"][0]
    assert result["numerics"]["threads"] == 1 and result["threat"] == {"norm": "linf", "eps_255": 20.0}
    assert [row["attack"] for row in rows[:4]] == ["clean"] * 4 and rows[-1]["attack"] == "square" and rows[-1]["done"] == rows[-1]["of"]
    assert rows[-1]["robust"] == single["robust"].sum()
    again = []
    assert evaluate(run, workers=2, progress=again.append, effort=EFFORT) == result
    assert again == [], "a finished evaluation is not run again"


def test_an_interrupted_evaluation_goes_on(ray_cluster, run, single):
    def interrupt(row):
        if row["attack"] == "apgd-t":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, workers=1, progress=interrupt, effort=EFFORT)
    assert not (run / "evaluation" / "autoattack.json").exists()
    finished = [name for name in (run / "evaluation" / "chunks").names() if name.startswith(("clean", "apgd-ce"))]
    rows = []
    result = evaluate(run, workers=1, progress=rows.append, effort=EFFORT)
    check_against(single, run, result)
    assert result["resumed_batches"] >= len(finished) and {row["attack"] for row in rows} <= {"apgd-t", "fab-t", "square"}


def test_lost_damaged_and_foreign_batches_are_made_again(ray_cluster, run, single, tmp_path, weights):
    first = evaluate(run, effort=EFFORT)
    chunks = run / "evaluation" / "chunks"
    os.remove(f"{run}/evaluation/autoattack.json")
    os.remove(f"{chunks}/apgd-t-00000.npz")
    (chunks / "fab-t-00000.npz").write_bytes((chunks / "fab-t-00000.npz").read_bytes()[:100])
    stale = (chunks / "square-00000.npz").read_npz()
    (chunks / "square-00000.npz").write_npz(**{**stale, "broken": ~stale["broken"], "digest": np.array("of another model")})
    rows = []
    second = evaluate(run, progress=rows.append, effort=EFFORT)
    check_against(single, run, second)
    assert same_but_for_time(first, second)
    assert [(row["attack"], row["done"]) for row in rows] == [("apgd-t", rows[0]["of"]), ("fab-t", rows[1]["of"]), ("square", rows[2]["of"])]


def test_other_weights_or_settings_are_evaluated_anew(ray_cluster, run, weights):
    first = evaluate(run, effort=Effort(2, 1, 4))
    checkpoint.save(run, {name: tensor * (0.5 if name == "logits.weight" else 1) for name, tensor in weights.items()})
    second = evaluate(run, effort=Effort(2, 1, 4))
    assert second["digest"] != first["digest"] and second["resumed_batches"] == 0
    third = evaluate(run, effort=Effort(2, 1, 5))
    assert third["digest"] != second["digest"] and third["effort"]["square_queries"] == 5


def test_two_models_share_the_workers(ray_cluster, tmp_path, weights, single):
    other = {name: tensor * (0.9 if name == "logits.weight" else 1) for name, tensor in weights.items()}
    runs = [trained_run(tmp_path / "one", weights), trained_run(tmp_path / "two", other)]
    rows = []
    results = evaluate_many(runs, workers=2, progress=rows.append, effort=EFFORT)
    check_against(single, runs[0], results[0])
    alone = evaluate(trained_run(tmp_path / "three", other), effort=EFFORT)
    assert same_but_for_time(alone, results[1])
    names = [row["run"] for row in rows]
    assert names != sorted(names), "batches of both are interleaved"


def test_a_killed_worker_changes_nothing(ray_cluster, run, single):
    killed = []

    def kill(row):
        for task in list_tasks(ray_cluster.address_info["gcs_address"], filters=[("state", "=", "RUNNING")], detail=True):
            if not killed and task.worker_pid and task.func_or_class_name.endswith("_attack"):
                os.kill(task.worker_pid, signal.SIGKILL)
                killed.append(task.worker_pid)

    result = evaluate(run, workers=2, progress=kill, effort=EFFORT)
    assert killed
    check_against(single, run, result)


def test_a_table_for_people(ray_cluster, run, single):
    result = evaluate(run, effort=Effort(2, 1, 4))
    rows = table(result)
    assert [row["what"] for row in rows] == ["Clean", "PGD-6", "after apgd-ce", "after apgd-t", "after fab-t", "AutoAttack"]
    assert rows[-1]["interval"] == pytest.approx(result["interval"])
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)


def test_what_cannot_be_evaluated_is_said(ray_cluster, tmp_path, run, weights):
    with pytest.raises(CheckpointError, match="not a training run"):
        evaluate(Store(str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="workers=0"):
        evaluate(run, workers=0)
    diverged = {name: tensor * (float("nan") if name == "logits.weight" else 1) for name, tensor in weights.items()}
    with pytest.raises(DataError, match="12 of 12 images have logits that are NaN"):
        evaluate(trained_run(tmp_path / "diverged", diverged), effort=EFFORT)


def test_nothing_to_evaluate():
    assert evaluate_many([]) == []
