"""Planning: arithmetic by hand and against the real batch plan, and every kind of config."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dra_ray import data, students
from dra_ray import plan as planning
from dra_ray.config import (
    Asha,
    Data,
    Experiment,
    Loss,
    Quickstart,
    Selection,
    Sweep,
    Synthesis,
    TeacherTraining,
    Threat,
    UNet,
    load,
    override,
    recipe_names,
)
from dra_ray.config.catalogue import STAGES
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students.wrn import WideResNet
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.noisy import NoisyClassifier
from dra_ray.training import losses, objective

TINY = UNet(model_channels=32, channel_mult=(1,))
SWEEP = Sweep(
    space={"align.weight": [0, 0.5, 1.0]},
    asha=Asha(grace_epochs=2, reduction_factor=2),
    base=override(Experiment(), {"optim.epochs": 8}),
)


class Counted(TorchDispatchMode):
    """FLOP of what runs inside, gradients of inputs included (FlopCounterMode follows modules,
    which torch.autograd.grad does not allow).
    """

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture
def teacher(tmp_path) -> str:
    checkpoint.save(Store(str(tmp_path)), EDM(TINY, 8, 1, 10), {})
    return str(tmp_path)


def test_macs_of_a_convolution_by_hand():
    net = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert planning.macs(lambda: net(torch.zeros(2, 3, 7, 7))) == 2 * 5 * 7 * 7 * 3 * 9


def test_step_units():
    """By hand. TRADES-k: k+2 forwards (one is also the target), k gradients of the input, two full
    backward passes of 2.
    """
    ikl, awp = Loss(name="ikl"), Threat(mode="eval", steps=5, step_255=4)
    assert [planning.step_units(Loss(), Threat(steps=k)) for k in (10, 3)] == [26, 12]
    assert planning.step_units(ikl, Threat()) == 26
    assert planning.step_units(Loss(name="pgd-at"), Threat()) == 10 + 10 + 3
    assert planning.step_units(Loss(name="fgsm-rs"), Threat(steps=1)) == 5
    assert planning.step_units(ikl, awp) == 5 + 5 + 6 + 1  # a target in eval mode
    assert (
        planning.step_units(ikl, awp, perturbed=True) == 5 + 5 + 6 + 1 + 6
    )  # two forwards and two full backward passes more


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("changes", "perturbed"),
    [
        ({}, False),
        ({"threat.mode": "eval"}, False),
        ({"loss.name": "pgd-at"}, False),
        ({"loss.name": "ikl", "threat.steps": 5, "threat.mode": "eval"}, False),
        ({"loss.awp": 0.005, "loss.awp_from_epoch": 0}, True),
        ({"loss.name": "pgd-at", "loss.awp": 0.005, "loss.awp_from_epoch": 0}, True),
    ],
    ids=str,
)
def test_step_units_are_what_a_step_costs(changes, perturbed):
    """Counted in a real step; the first layer's input needs no gradient where weights are trained,
    so it may be a little less.
    """
    config = override(Experiment(), changes)
    student = WideResNet(10, 2, 10, [0.5], [0.25])
    x, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    forward = planning.macs(lambda: student(x))
    means = losses.ClassMeans(10)
    attacked = objective.attacked(
        student,
        x,
        labels,
        torch.rand(x.shape),
        loss=config.loss,
        threat=config.threat,
        class_means=means,
        epoch=0,
    )
    with Counted() as counted, attacked as found:
        clean, robust, _ = found.losses()
        (clean + robust).backward()
    assert counted.flop / 2 / forward == pytest.approx(
        planning.step_units(config.loss, config.threat, perturbed), rel=0.02
    )


def test_weight_perturbation_counts_from_its_epoch():
    config = override(
        Experiment(), {"loss.awp": 0.005, "loss.awp_from_epoch": 5, "optim.epochs": 20}
    )
    plain, perturbed = (
        planning.step_units(config.loss, config.threat, awp) for awp in (False, True)
    )
    assert planning.mean_step_units(config) == (5 * plain + 15 * perturbed) / 20
    assert planning.plan(config).step.forward_units == planning.mean_step_units(config)
    assert planning.mean_step_units(override(config, {"optim.epochs": 4})) == plain


# [steps, passes over the synthetic images] that follow from batch, epochs and DM-AT's epoch of
# 50,000 images
@pytest.mark.parametrize(
    ("name", "steps", "passes"),
    [
        ("cifar10-wrn-34-10-at", 78_200, None),
        ("cifar10-wrn-28-10-1m-dm-at", 39_200, 14.0),
        ("cifar10-wrn-28-10-1m-b1024-dm-at", 39_200, 28.1),
        ("cifar10-wrn-28-10-20m-dra", 60_000, 4.9),
        ("cifar10-vit-b-2-20m-dm-at", 24_500, 1.0),
        ("cifar10-vit-b-2-50m-dra", 98_000, 1.6),
        ("cifar10-rawrn-70-16-50m-dm-at", 98_000, 1.6),
    ],
)
def test_steps_of_the_papers_runs(name, steps, passes):
    recipe = load(name, Experiment)
    small = override(recipe, {"model.name": "wrn-10-1", "model.normalise": True})
    run = planning.plan(small).run
    assert run.steps == steps
    assert run.images_seen == steps * recipe.optim.batch
    assert (
        run.synthetic_passes is None if passes is None else round(run.synthetic_passes, 1) == passes
    )


def test_a_second_feature_doubles_the_teachers_work(teacher):
    small = override(Experiment(), {"teacher.uri": teacher, "align.hidden": 16})
    one, two = (planning.plan(override(small, {"align.extra_weight": extra})) for extra in (0, 1))
    assert two.run.teacher_pflop == 2 * one.run.teacher_pflop
    assert two.teacher.feature_gmacs == one.teacher.feature_gmacs
    assert two.resources.replicas_needed == pytest.approx(
        2 * one.resources.replicas_needed, rel=0.05
    )


def test_each_layer_has_a_pool(teacher):
    plain = override(Experiment(), {"teacher.uri": teacher})
    layers = [{"share": 0.5}, {"share": 0.25}, {"layer": "enc.8x8_conv", "share": 0.25}]
    one, two = (planning.plan(override(plain, {"align.terms": terms})) for terms in ([], layers))
    assert two.resources.min_replicas == 2 * one.resources.min_replicas
    assert two.resources.max_replicas == 2 * one.resources.max_replicas
    assert 2 < two.run.teacher_pflop / one.run.teacher_pflop < 3, "the first layer costs little"


def test_a_projector_of_tokens_runs_once_for_every_position(teacher):
    """This teacher has 8x8 of them; the teacher's own work is the same."""
    plain = override(Experiment(), {"teacher.uri": teacher, "align.hidden": 16})
    changes = ({"align.weight": 0.0}, {}, {"teacher.tokens": True})
    without, pooled, tokens = (planning.plan(override(plain, change)) for change in changes)
    costs = [plan.step.gflop_per_image for plan in (without, pooled, tokens)]
    assert costs[2] - costs[0] == pytest.approx(64 * (costs[1] - costs[0]), rel=1e-3)
    assert tokens.run.teacher_pflop == pooled.run.teacher_pflop


def test_fewest_workers_are_shown():
    config = override(Experiment(), {"resources.workers": 4, "resources.min_workers": 2})
    assert any(
        row.quantity.startswith("workers, at least") and row.value == 2
        for row in planning.rows(planning.plan(config))
    )


def test_meta_student_costs_what_the_real_one_does():
    """The student that training builds, with real weights and real images."""
    config = Experiment()
    images = data.load(config.data)
    student = students.build(config.model, images.shape).eval()
    planned = planning.plan(config).student
    assert planned.params == sum(p.numel() for p in student.parameters())
    assert planned.forward_gmacs == planning.macs(lambda: student(torch.rand(4, 1, 8, 8))) / 4 / 1e9


def test_images_and_passes_are_those_of_the_batch_plan():
    config = override(
        Experiment(),
        {
            "optim.epochs": 2,
            "synthetic.images": 500,
            "synthetic.uri": "elsewhere",
            "align.weight": 0,
        },
    )
    run = planning.plan(config).run
    images = data.load(config.data)
    batches = data.batch_plan(config, len(images.train), 500)
    drawn = torch.cat([batches.indices(step) for step in range(run.steps)])
    assert run.images_seen == len(drawn)
    assert run.synthetic_passes == pytest.approx(int((drawn >= len(images.train)).sum()) / 500)


def test_the_teacher_on_disk_is_counted(teacher):
    with_teacher = planning.plan(override(Experiment(), {"teacher.uri": teacher}))
    without = planning.plan(override(Experiment(), {"align.weight": 0}))
    net = checkpoint.load(Store(teacher))
    encode = planning.macs(
        lambda: net.features(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10))
    )
    assert with_teacher.teacher.feature_gmacs == encode / 1e9
    assert with_teacher.teacher.params == planning.parameters(net)
    assert with_teacher.run.teacher_pflop == pytest.approx(
        2 * encode * with_teacher.run.images_seen / 1e15
    )
    assert with_teacher.step.gflop_per_image > without.step.gflop_per_image  # the projector
    assert without.teacher is None
    assert without.resources.min_replicas == 0
    assert with_teacher.notes == without.notes == ()


def test_a_noisy_classifier_is_a_teacher_that_makes_no_images(tmp_path):
    net = NoisyClassifier(TINY, 8, 1, 10)
    checkpoint.save(Store(str(tmp_path)), net, {})
    made = planning.plan(override(Experiment(), {"teacher.uri": str(tmp_path)})).teacher
    assert made.params == planning.parameters(net)
    assert (
        made.feature_gmacs
        == planning.macs(lambda: net.features(torch.zeros(1, 1, 8, 8), torch.ones(1))) / 1e9
    )
    with pytest.raises(ConfigError, match="noisy-classifier.*makes no images"):
        planning.plan(Synthesis(teacher=str(tmp_path)))


def test_replicas_follow_the_ratio_of_work(teacher):
    one = override(Experiment(), {"teacher.uri": teacher, "pool.max_replicas": 1})
    made = planning.plan(one)
    ratio = made.step.teacher_gflop_per_image / made.step.gflop_per_image
    assert made.resources.replicas_needed == pytest.approx(ratio / one.pool.target_utilisation)
    many = planning.plan(override(one, {"resources.workers": 64}))
    assert many.resources.replicas_needed == pytest.approx(64 * made.resources.replicas_needed)
    assert any("pool.max_replicas=1" in note for note in many.notes)
    mixed = planning.plan(override(one, {"resources.gpus_per_worker": 1}))
    assert mixed.resources.replicas_needed is None
    resting = planning.plan(override(one, {"pool.min_replicas": 0}))
    assert resting.resources.replicas_needed == made.resources.replicas_needed
    assert (resting.resources.min_replicas, resting.resources.max_replicas) == (0, 1)
    assert mixed.notes


def test_without_a_teacher_the_plan_says_so():
    made = planning.plan(Experiment())
    assert made.teacher is None
    assert "teacher.uri" in made.notes[0]
    assert made.resources.min_replicas == 1  # it will still be asked for
    assert "teacher is not set" in planning.plan(Synthesis()).notes[0]


def test_sweep_worst_case_and_expectation():
    """Rungs at 2 and 4 of 8 epochs; what is expected lies between all trials stopped at the first
    but a finalist of each kind, and none stopped.
    """
    made = planning.plan(SWEEP)
    assert made.rung_epochs == (2, 4)
    assert made.trials == 3
    one = planning.plan(SWEEP.base).run.images_seen
    assert made.worst_images_seen == 3 * one
    kinds = len({weight > 0 for weight in SWEEP.space["align.weight"]})
    least = (kinds + (3 - kinds) * 2 / 8) * one
    assert least <= made.images_range.low <= made.expected_images_seen <= made.images_range.high
    assert made.images_range.high <= made.worst_images_seen
    assert made.saved == pytest.approx(
        1 - made.expected_images_seen / made.worst_images_seen, abs=1e-3
    )
    assert "noise_aware saves" in planning.summary(made)
    assert made.resources.workers == made.concurrent == 2
    assert made.resources.cpus == 3  # two training workers and one replica for both


def test_a_plan_is_of_the_scheduler_the_repeats_and_the_budget():
    none = planning.plan(override(SWEEP, {"scheduler": "none"}), tflops=0.01)
    assert none.saved == 0
    assert none.expected_images_seen == none.worst_images_seen
    assert none.hours.expected == pytest.approx(none.hours.worst)
    wide = override(SWEEP, {"space": {"align.weight": [1, 2, 3, 4, 5, 6, 7, 8]}})
    saved = {
        name: planning.plan(override(wide, {"scheduler": name})).saved
        for name in ("asha", "noise_aware")
    }
    assert saved["asha"] > saved["noise_aware"] > 0
    repeated = planning.plan(override(none_of(SWEEP), {"repeats": {"seeds": 3, "of": "all"}}))
    assert repeated.expected_images_seen == 3 * none.expected_images_seen
    limit = none.expected_images_seen // 2
    prices = planning.Prices(2.0, 2.0, "EUR")
    half = planning.plan(override(none_of(SWEEP), {"budget.images": limit}), 0.01, prices)
    assert half.expected_images_seen == limit
    assert half.hours.expected == pytest.approx(none.hours.expected / 2)
    money = planning.recorded(half, SWEEP.budget).money
    assert money.low == money.expected == money.high == pytest.approx(half.cost.money, abs=1e-4)


def test_late_verdicts_are_counted_as_the_most_that_they_take():
    """Of 8 epochs validated after each, the last three are late; three trials run to their end."""
    prices = planning.Prices(2.0, 2.0, "EUR")
    fidelity = {"apgd_from": 0.75, "apgd_images": 64, "apgd_steps": 10, "finalists": "standard"}
    sweep = override(none_of(SWEEP), {"fidelity": fidelity, "base.selection.every_epochs": 1})
    made = planning.plan(sweep, 0.01, prices)
    without = planning.plan(override(sweep, {"fidelity": {}}), 0.01, prices)
    assert without.verdicts is None
    assert without.hours.verdicts is None
    forward = 2 * made.largest_trial.student.forward_gmacs * 1e9  # FLOP
    assert made.verdicts.validations == 3 * 3
    assert made.verdicts.finalists == 3
    apgd = STAGES["clean"].passes + (200 + 620) * 10 / 100
    assert made.verdicts.beside_pflop == pytest.approx(9 * 64 * apgd * forward / 1e15)
    strongest = sum(STAGES[n].passes for n in ("clean", "apgd-ce", "apgd-t", "fab-t", "square"))
    after = 3 * Data().validation_images * strongest * forward / 1e15
    assert made.verdicts.after_pflop == pytest.approx(after)
    hours = (made.verdicts.beside_pflop + after) * 1e3 / 0.01 / 3600
    assert made.hours.verdicts == pytest.approx(hours)
    late = made.hours.expected - without.hours.expected
    assert late == pytest.approx(after * 1e3 / 0.01 / 3600)
    assert made.cost.money - without.cost.money == pytest.approx(2 * hours)
    assert made.cost.money_range.low == pytest.approx(without.cost.money_range.low)
    two = planning.plan(override(sweep, {"fidelity.workers": 2, "repeats.seeds": 2}), 0.01)
    assert two.verdicts.finalists == 6
    assert two.verdicts.after_pflop == pytest.approx(2 * after)
    stopped = planning.plan(override(sweep, {"scheduler": "asha"}), 0.01)
    assert stopped.verdicts.validations < 9


@pytest.mark.parametrize("share", [0.0, 0.4, 0.5, 0.74, 0.75, 0.9, 1.0, 1.5, 2.0, 2.75])
def test_a_trial_comes_to_its_late_validations(share):
    """After epochs 2, 4, 6, 7 of 7; from 0.8 on the last two. A share above 1 is of repeats."""
    experiment = override(Experiment(), {"optim.epochs": 7, "selection.every_epochs": 2})
    late = [6 / 7, 1.0]
    expected = sum(at <= share - run for run in range(3) for at in late)
    assert planning._late(experiment, 0.8, np.array([share])).tolist() == [expected]


def none_of(sweep):
    return override(sweep, {"scheduler": "none"})


def test_a_first_rung_before_batchnorm_has_settled_is_noted():
    """After n steps of momentum m, (1-m)^n of the running statistics are the first batch's."""
    known = load("digits-sweep", Sweep)
    slow = override(known, {"base.optim.norm_momentum": 0.01})

    def noted(sweep):
        return [note for note in planning.plan(sweep, 0.05).notes if "BatchNorm" in note]

    assert noted(known) == []
    (note,) = noted(slow)
    assert f"after 40 steps, when {0.99**40:.0%} of" in note
    assert noted(override(slow, {"asha.grace_epochs": 8})) == []  # 80 steps
    assert noted(none_of(slow)) == []
    assert noted(override(slow, {"base.model.name": "vit-t-2"})) == []


def test_trials_at_the_same_time_share_the_pool(teacher):
    base = override(
        SWEEP.base, {"teacher.uri": teacher, "pool.max_replicas": 1, "optim.norm_momentum": 0.1}
    )
    busy = Sweep(space={"align.weight": [1, 2, 3]}, asha=Asha(max_concurrent=3), base=base)
    needed = planning.plan(busy).resources.replicas_needed
    assert needed == pytest.approx(3 * planning.plan(base).resources.replicas_needed)
    noted = any("3 trials at a time" in note for note in planning.plan(busy).notes)
    assert noted == (needed > 1)
    wide = planning.plan(override(busy, {"base.pool.threads_per_replica": 64}))
    assert wide.resources.replicas_needed == pytest.approx(needed / 64)
    assert wide.notes == ()


def test_synthesis(teacher):
    made = planning.plan(Synthesis(teacher=teacher, images=2500, steps=18))
    net = checkpoint.load(Store(teacher))
    forward = planning.macs(lambda: net(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10)))
    assert made.run.shards == 3
    assert made.run.gflop_per_image == pytest.approx(
        2 * 35 * forward / 1e9
    )  # 2N-1 calls (Karras et al. 2022)


def test_teacher_training():
    made = planning.plan(
        TeacherTraining(net=TINY, images_seen=1000, batch=128, checkpoint_images=300)
    )
    assert made.run.steps == 8
    assert made.run.images_seen == 1024
    assert made.run.checkpoints == 4
    assert made.teacher.params == planning.parameters(EDM(TINY, 8, 1, 10))


def test_hours_follow_the_devices_and_their_speed(teacher):
    local = override(Experiment(), {"teacher.uri": teacher, "pool.kind": "local"})
    slow, fast = planning.plan(local, tflops=0.01), planning.plan(local, tflops=0.02)
    assert slow.hours.wall == pytest.approx(2 * fast.hours.wall)
    pflop = slow.run.student_pflop + slow.run.teacher_pflop
    assert slow.hours.wall == pytest.approx(pflop * 1e15 / 0.01e12 / 3600)
    pooled = planning.plan(override(local, {"pool.kind": "pool"}), tflops=0.01)
    assert pooled.hours.wall < slow.hours.wall  # the teacher works beside the student
    two = planning.plan(override(local, {"resources.workers": 2}), tflops=0.01)
    assert two.hours.wall == pytest.approx(slow.hours.wall / 2)
    assert planning.plan(local).hours is None


def test_a_quickstart_counts_the_teacher_that_it_will_train():
    sweep = override(SWEEP, {"base.optim.norm_momentum": 0.1})
    config = Quickstart(teacher=TeacherTraining(net=TINY), sweep=sweep)
    made = planning.plan(config, tflops=0.01)
    assert made.notes == ()
    assert (
        made.synthesis.teacher.params
        == made.teacher.teacher.params
        == made.sweep.largest_trial.teacher.params
    )
    parts = made.teacher.hours.wall, made.synthesis.hours.wall, made.sweep.hours.expected
    assert made.hours.wall == pytest.approx(sum(parts))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "config",
    [Experiment(), SWEEP, TeacherTraining(), Synthesis(), Quickstart(sweep=SWEEP)],
    ids=lambda config: config.kind,
)
def test_every_kind_gives_rows(config):
    made = planning.plan(config, tflops=1.0)
    shown = planning.rows(made)
    assert shown
    assert all(isinstance(row.text, str) and row.quantity for row in shown)
    assert json.dumps([row.value for row in shown])  # numbers, texts and lists of them
    assert [row.value for row in shown if row.quantity == "note"] == list(made.notes)
    assert "\n" not in planning.summary(made)
    known = made.hours is not None
    assert known == any(word in planning.summary(made) for word in ("minutes", "hours"))


# what a quickstart prints, stage by stage, in reading order
PRINTED = {
    "teacher": [
        "teacher parameters",
        "teacher forward, GMAC per image",
        "teacher feature layer",
        "teacher up to its feature, GMAC per image",
        "steps",
        "training images",
        "checkpoints",
        "PFLOP",
        "workers",
        "CPUs asked for, smallest pool",
        "GPUs asked for, smallest pool",
        "hours",
    ],
    "synthesis": [
        "teacher parameters",
        "teacher forward, GMAC per image",
        "images to make",
        "shards",
        "network calls per image",
        "GFLOP per image",
        "PFLOP",
        "workers",
        "CPUs asked for, smallest pool",
        "GPUs asked for, smallest pool",
        "hours",
    ],
    "sweep": [
        "trials",
        "trials at the same time",
        "early stopping by",
        "rungs after epochs",
        "training images if nothing is stopped",
        "training images expected",
        "training images expected, 95 %",
        "images saved, expected",
        "images saved, 95 %",
        "PFLOP if nothing is stopped",
        "PFLOP expected",
        "workers",
        "CPUs asked for, smallest pool",
        "GPUs asked for, smallest pool",
        "teacher replicas, at least",
        "teacher replicas, at most",
        "teacher replicas that keep up",
        "GPUs of students",
        "GPUs of the teacher, smallest pool",
        "student device hours",
        "of them validation",
        "teacher device hours",
        "hours if nothing is stopped",
        "hours expected",
        "hours expected, 95 %",
    ],
    "largest trial": [
        "student",
        "student parameters",
        "student forward, GMAC per image",
        "teacher parameters",
        "teacher feature layer",
        "teacher up to its feature, GMAC per image",
        "forward passes a training image is worth",
        "student training, GFLOP per image",
        "teacher, GFLOP per training image",
        "epochs",
        "steps",
        "training images",
        "real images to draw from",
        "synthetic images to draw from",
        "checkpoints",
        "student PFLOP, validation included",
        "of it validation, PFLOP",
        "teacher PFLOP",
        "memory of a worker, GB (estimate)",
        "disk, GB (estimate)",
        "AutoAttack PFLOP, at most",
        "AutoAttack's share of all, at most",
        "workers",
        "CPUs asked for, smallest pool",
        "GPUs asked for, smallest pool",
        "teacher replicas, at least",
        "teacher replicas, at most",
        "teacher replicas that keep up",
        "student device hours",
        "of them validation",
        "teacher device hours",
        "hours",
    ],
    "quickstart": [
        "hours",
    ],
}


def test_everything_that_was_counted_is_printed():
    printed: dict[str, list[str]] = {}
    for row in planning.rows(planning.plan(load("quickstart"), tflops=1.0)):
        if row.quantity != "note":
            printed.setdefault(row.stage, []).append(row.quantity)
    assert printed == PRINTED


@pytest.mark.seconds
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name):
    made = planning.plan(load(name))
    assert made.kind
    assert planning.rows(made)


def test_validation_is_counted():
    often, never = (
        planning.plan(override(Experiment(), {"selection.every_epochs": every})).run
        for every in (1, 20)
    )
    extra = (
        (often.checkpoints - never.checkpoints)
        * Data().validation_images
        * (2 * Selection().steps + 2)
    )
    forward = planning.plan(Experiment()).student.forward_gmacs * 1e9
    assert often.student_pflop - never.student_pflop == pytest.approx(2 * extra * forward / 1e15)
    assert often.checkpoints == 20
    assert never.checkpoints == math.ceil(20 / 20)


def test_activations_are_the_outputs_of_layers():
    """Against what a forward pass of two images gives, layer by layer."""
    config, kept = Experiment(), []
    shape = data.outline(config.data).shape
    student = students.check(config.model, shape).eval()
    for module in student.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, a, out: kept.append(out.numel()))
    student(torch.empty(2, shape.channels, shape.resolution, shape.resolution, device="meta"))
    assert 2 * planning.activations(config.model, shape) == sum(kept)


def test_memory_is_shared_by_workers_and_weights_are_not():
    one, two = (planning.plan(override(Experiment(), {"resources.workers": n})) for n in (1, 2))
    weights = 4 * 4 * one.student.params / 1e9
    assert two.needs.memory_gb - weights == pytest.approx((one.needs.memory_gb - weights) / 2)
    assert two.needs.disk_gb == one.needs.disk_gb


def test_autoattack_counts_every_image_as_robust():
    made = planning.plan(Experiment())
    tested = data.outline(Data()).test
    forward = made.student.forward_gmacs * 1e9
    passes = sum(STAGES[name].passes for name in ("clean", "apgd-ce", "apgd-t", "fab-t", "square"))
    assert made.needs.autoattack_pflop == pytest.approx(2 * forward * passes * tested / 1e15)
    assert 0 < made.needs.autoattack_share < 1


def test_a_teacher_of_other_images_is_refused(tmp_path):
    checkpoint.save(Store(str(tmp_path)), EDM(TINY, 32, 3, 10), {})
    with pytest.raises(ConfigError, match=r"takes images of \(3, 32, 32\), but.*\(1, 8, 8\)"):
        planning.plan(override(Experiment(), {"teacher.uri": str(tmp_path)}))


def test_money_is_device_hours_times_price(teacher):
    config = override(Experiment(), {"teacher.uri": teacher})
    prices = planning.Prices(student=2.0, teacher=3.0, currency="EUR")
    made = planning.plan(config, tflops=0.001, prices=prices)
    assert made.cost.money == pytest.approx(2 * made.hours.student + 3 * made.hours.teacher)
    assert "EUR" in planning.summary(made)
    busy = Sweep(space={"align.weight": [1, 2, 3]}, base=override(config, {"optim.epochs": 8}))
    swept = planning.plan(busy, tflops=0.001, prices=prices)
    assert 0 < swept.cost.money < 3 * swept.largest_trial.cost.money  # what stops is not paid
    assert planning.plan(config, tflops=0.001).cost is None
