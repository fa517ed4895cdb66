"""Planning: known sizes and costs of published networks, arithmetic against the real batch plan, and every kind of config."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dra_ray import data, models
from dra_ray import plan as planning
from dra_ray.config import Asha, Data, Experiment, Quickstart, Sweep, Synthesis, TeacherTraining, UNet, load, override, recipe_names
from dra_ray.data.plan import BatchPlan
from dra_ray.models.wrn import WideResNet
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM

TINY = UNet(model_channels=32, channel_mult=(1,))
SWEEP = Sweep(space={"align.weight": [0, 0.5, 1.0]}, asha=Asha(grace_epochs=2, reduction_factor=2), base=override(Experiment(), {"optim.epochs": 8}))


@pytest.fixture
def teacher(tmp_path) -> str:
    checkpoint.save(Store(str(tmp_path)), EDM(TINY, 8, 1, 10), {})
    return str(tmp_path)


@pytest.mark.parametrize(("depth", "width", "params_m", "gmacs"), [(28, 10, 36.48, 5.24), (34, 10, 46.16, 6.66), (70, 16, 266.80, 38.76)])
def test_students_have_the_published_size_and_cost(depth, width, params_m, gmacs):
    """DM-AT's networks at 32x32 (arXiv 2302.04638)."""
    with torch.device("meta"):
        student = WideResNet(depth, width, 10, [0.5] * 3, [0.25] * 3).eval()
        cost = planning.macs(lambda: student(torch.empty(1, 3, 32, 32)))
    assert planning.parameters(student) / 1e6 == pytest.approx(params_m, abs=0.005)
    assert cost / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_macs_of_a_convolution_by_hand():
    net = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert planning.macs(lambda: net(torch.zeros(2, 3, 7, 7))) == 2 * 5 * 7 * 7 * 3 * 9


def test_step_units():
    """One target shared with the clean forward, k gradients of the input, two full backward passes: 26 at k=10, 12 at k=3."""
    assert [planning.step_units(k) for k in (10, 3)] == [26, 12]


def test_meta_student_costs_what_the_real_one_does():
    """The student that training builds, with real weights and real images."""
    config = Experiment()
    images = data.load(config.data)
    student = models.build(config.model, images).eval()
    planned = planning.plan(config)["student"]
    assert planned["params"] == sum(p.numel() for p in student.parameters())
    assert planned["forward_gmacs"] == planning.macs(lambda: student(torch.rand(4, 1, 8, 8))) / 4 / 1e9


def test_images_and_passes_are_those_of_the_batch_plan():
    config = override(Experiment(), {"optim.epochs": 2, "synthetic.images": 500, "synthetic.uri": "elsewhere", "align.weight": 0})
    run = planning.plan(config)["run"]
    images = data.load(config.data)
    batches = BatchPlan(config.seed, len(images.train), 500, config.optim.batch, config.synthetic.fraction)
    drawn = torch.cat([batches.indices(step) for step in range(run["steps"])])
    assert run["images_seen"] == len(drawn)
    assert run["synthetic_passes"] == pytest.approx(int((drawn >= len(images.train)).sum()) / 500)


def test_the_teacher_on_disk_is_counted(teacher):
    with_teacher = planning.plan(override(Experiment(), {"teacher.uri": teacher}))
    without = planning.plan(override(Experiment(), {"align.weight": 0}))
    net = checkpoint.load(Store(teacher))
    encode = planning.macs(lambda: net.features(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10)))
    assert with_teacher["teacher"]["feature_gmacs"] == encode / 1e9
    assert with_teacher["teacher"]["params"] == planning.parameters(net)
    assert with_teacher["run"]["teacher_pflop"] == pytest.approx(2 * encode * with_teacher["run"]["images_seen"] / 1e15)
    assert with_teacher["step"]["gflop_per_image"] > without["step"]["gflop_per_image"]  # the projector
    assert "teacher" not in without and without["resources"]["min_replicas"] == 0
    assert with_teacher["notes"] == without["notes"] == []


def test_replicas_follow_the_ratio_of_work(teacher):
    one = override(Experiment(), {"teacher.uri": teacher, "pool.max_replicas": 1})
    made = planning.plan(one)
    ratio = made["step"]["teacher_gflop_per_image"] / made["step"]["gflop_per_image"]
    assert made["resources"]["replicas_needed"] == pytest.approx(ratio / one.pool.target_utilisation)
    many = planning.plan(override(one, {"resources.workers": 64}))
    assert many["resources"]["replicas_needed"] == pytest.approx(64 * made["resources"]["replicas_needed"])
    assert any("pool.max_replicas=1" in note for note in many["notes"])
    mixed = planning.plan(override(one, {"resources.gpus_per_worker": 1}))
    assert "replicas_needed" not in mixed["resources"] and mixed["notes"]


def test_without_a_teacher_the_plan_says_so():
    made = planning.plan(Experiment())
    assert "teacher" not in made and "teacher.uri" in made["notes"][0]
    assert made["resources"]["min_replicas"] == 1  # it will still be asked for
    assert "teacher is not set" in planning.plan(Synthesis())["notes"][0]


def test_sweep_worst_case_and_expectation():
    """Rungs at 2 and 4 of 8 epochs, one in two kept: 2 + 2/2 + 4/4 = 4 of 8 epochs on average."""
    made = planning.plan(SWEEP)
    assert made["rung_epochs"] == [2, 4]
    assert made["trials"] == 3
    one = planning.plan(SWEEP.base)["run"]["images_seen"]
    assert made["worst_images_seen"] == 3 * one
    assert made["expected_images_seen"] == 3 * one // 2
    assert made["resources"]["workers"] == made["concurrent"] == 2
    assert made["resources"]["cpus"] == 3  # two training workers and one replica for both


def test_trials_at_the_same_time_share_the_pool(teacher):
    base = override(SWEEP.base, {"teacher.uri": teacher, "pool.max_replicas": 1})
    busy = Sweep(space={"align.weight": [1, 2, 3]}, asha=Asha(max_concurrent=3), base=base)
    needed = planning.plan(busy)["resources"]["replicas_needed"]
    assert needed == pytest.approx(3 * planning.plan(base)["resources"]["replicas_needed"])
    noted = any("3 trials at a time" in note for note in planning.plan(busy)["notes"])
    assert noted == (needed > 1)
    wide = planning.plan(override(busy, {"base.pool.threads_per_replica": 64}))
    assert wide["resources"]["replicas_needed"] == pytest.approx(needed / 64) and wide["notes"] == []


def test_synthesis(teacher):
    made = planning.plan(Synthesis(teacher=teacher, images=2500, steps=18))
    net = checkpoint.load(Store(teacher))
    forward = planning.macs(lambda: net(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10)))
    assert made["run"]["shards"] == 3
    assert made["run"]["gflop_per_image"] == pytest.approx(2 * 35 * forward / 1e9)  # 2N-1 calls (Karras et al. 2022)


def test_teacher_training():
    made = planning.plan(TeacherTraining(net=TINY, images_seen=1000, batch=128, checkpoint_images=300))
    assert made["run"]["steps"] == 8 and made["run"]["images_seen"] == 1024 and made["run"]["checkpoints"] == 4
    assert made["teacher"]["params"] == planning.parameters(EDM(TINY, 8, 1, 10))


def test_hours_follow_the_devices_and_their_speed(teacher):
    local = override(Experiment(), {"teacher.uri": teacher, "pool.kind": "local"})
    slow, fast = planning.plan(local, tflops=0.01), planning.plan(local, tflops=0.02)
    assert slow["hours"]["wall"] == pytest.approx(2 * fast["hours"]["wall"])
    pflop = slow["run"]["student_pflop"] + slow["run"]["teacher_pflop"]
    assert slow["hours"]["wall"] == pytest.approx(pflop * 1e15 / 0.01e12 / 3600)
    pooled = planning.plan(override(local, {"pool.kind": "pool"}), tflops=0.01)
    assert pooled["hours"]["wall"] < slow["hours"]["wall"]  # the teacher works beside the student
    two = planning.plan(override(local, {"resources.workers": 2}), tflops=0.01)
    assert two["hours"]["wall"] == pytest.approx(slow["hours"]["wall"] / 2)
    assert "hours" not in planning.plan(local)


def test_a_quickstart_counts_the_teacher_that_it_will_train():
    config = Quickstart(teacher=TeacherTraining(net=TINY), sweep=SWEEP)
    made = planning.plan(config, tflops=0.01)
    assert made["notes"] == []
    assert made["synthesis"]["teacher"]["params"] == made["teacher"]["teacher"]["params"] == made["sweep"]["largest_trial"]["teacher"]["params"]
    assert made["hours"]["wall"] == pytest.approx(
        sum(made[stage]["hours"].get("wall", made[stage]["hours"].get("expected")) for stage in ("teacher", "synthesis", "sweep"))
    )


@pytest.mark.parametrize("config", [Experiment(), SWEEP, TeacherTraining(), Synthesis(), Quickstart(sweep=SWEEP)], ids=lambda config: config.kind)
def test_every_kind_gives_plain_data_and_rows(config):
    made = planning.plan(config, tflops=1.0)
    assert json.loads(json.dumps(made)) == made
    shown = planning.rows(made)
    assert shown and all(set(row) == {"stage", "quantity", "value"} and all(isinstance(text, str) for text in row.values()) for row in shown)
    assert [row["value"] for row in shown if row["quantity"] == "note"] == made["notes"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name):
    made = planning.plan(load(name))
    assert made["kind"] and planning.rows(made)


def test_validation_is_counted():
    often, never = (planning.plan(override(Experiment(), {"selection.every_epochs": every}))["run"] for every in (1, 20))
    extra = (often["checkpoints"] - never["checkpoints"]) * Data().validation_images * (2 * 20 + 2)
    forward = planning.plan(Experiment())["student"]["forward_gmacs"] * 1e9
    assert often["student_pflop"] - never["student_pflop"] == pytest.approx(2 * extra * forward / 1e15)
    assert often["checkpoints"] == 20 and never["checkpoints"] == math.ceil(20 / 20)
