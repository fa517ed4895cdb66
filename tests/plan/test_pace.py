"""Hours of a measured pace: how trials share a machine, and how FLOPs scale, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dra_ray import plan as planning
from dra_ray.config import Asha, Experiment, Sweep, Threat, override
from dra_ray.plan import pace as pacing
from dra_ray.plan.pace import Pace, makespan
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from tests.plan.test_plan import TINY

PACE = Pace(training=1000.0, validation=500.0, encoding=200.0, process_s=6.0, cores=2, what="given")
PLAIN = override(Experiment(), {"align.weight": 0.0})


@pytest.fixture
def aligned(tmp_path) -> Experiment:
    checkpoint.save(Store(str(tmp_path)), EDM(TINY, 8, 1, 10), {})
    return override(Experiment(), {"teacher.uri": str(tmp_path)})


def hours(config: Experiment, pace: Pace = PACE) -> planning.Hours:
    made = planning.plan(config, pace=pace)
    assert isinstance(made, planning.RunPlan)
    assert made.hours
    return made.hours


@pytest.mark.parametrize(
    ("durations", "slots", "expected"),
    [
        ([3, 3, 3], 1, 9),
        ([4, 2, 1], 2, 4),  # the third goes on where the second ended
        ([2, 2, 3], 2, 5),
        ([10, 10, 10, 10], 2, 20),
        ([5, 0, 5], 2, 5),
        ([], 2, 0),
    ],
)
def test_trials_start_in_their_order_where_a_slot_is_free(
    durations: Sequence[float], slots: int, expected: float
) -> None:
    assert makespan(durations, slots) == pytest.approx(expected)


def test_trials_slow_each_other_beyond_the_cores() -> None:
    """Four of 10 s on two cores: three at a time take 15 s, the last one is then alone."""
    assert makespan([10] * 4, 3, PACE.factor) == pytest.approx(15 + 10)
    assert makespan([10] * 4, 2, PACE.factor) == pytest.approx(20)
    # on one core the work is the time: 2 s each until the shorter ends, then what is left
    alone = Pace(1.0, 1.0, None, 1.0, cores=1, what="")
    assert makespan([4, 2], 2, alone.factor) == pytest.approx(2 * 2 + 2)


def test_the_factor_is_busy_threads_over_cores() -> None:
    assert [PACE.factor(threads) for threads in (0.5, 2, 3, 8)] == [1.0, 1.0, 1.5, 4.0]
    gpus = Pace(1.0, 1.0, None, 1.0, cores=0, what="")
    assert gpus.factor(8) == 1.0


def test_a_run_is_its_steps_its_validations_and_its_start() -> None:
    made = planning.plan(PLAIN, pace=PACE)
    assert isinstance(made, planning.RunPlan)
    run, found = made.run, made.hours
    assert found
    start_s = pacing.PROCESSES_OF_TRAIN * 6.0
    validation_s = run.validation_pflop * 500
    training_s = (run.student_pflop - run.validation_pflop) * 1000
    assert found.start == pytest.approx(start_s / 3600)
    assert found.validation == pytest.approx(validation_s / 3600)
    assert found.student == pytest.approx((training_s + validation_s + start_s) / 3600)
    assert found.teacher == 0.0
    assert found.wall == pytest.approx(found.student)


def test_steps_scale_by_the_flops_of_the_attack() -> None:
    """A step of TRADES-k is worth 2k+6 passes: 26 of ten steps, 12 of three."""

    def training(config: Experiment) -> float:
        found = hours(config)
        return (found.student or 0) - (found.validation or 0) - (found.start or 0)

    short = PLAIN.model_copy(update={"threat": Threat(steps=3)})
    assert training(short) / training(PLAIN) == pytest.approx(12 / 26)


def test_a_teacher_works_beside_the_student_or_within_it(aligned: Experiment) -> None:
    pooled = hours(aligned)
    within = hours(override(aligned, {"pool.kind": "local"}))
    assert pooled.teacher == pytest.approx(within.teacher)
    process = PACE.process_s / 3600
    assert within.wall == pytest.approx((within.student or 0) + (within.teacher or 0))
    # the student needs more than its teacher, so that the pool only has to come up
    assert pooled.wall == pytest.approx(
        (pooled.student or 0) + pacing.PROCESSES_OF_POOL * process, rel=1e-6
    )
    slow = hours(aligned, Pace(1.0, 1.0, 1e6, 0.0, 2, ""))
    replicas = aligned.pool.max_replicas
    assert slow.wall == pytest.approx((slow.teacher or 0) / replicas, rel=0.01)


def test_two_workers_share_the_steps_and_both_start() -> None:
    one, two = hours(PLAIN), hours(override(PLAIN, {"resources.workers": 2}))
    assert two.start == pytest.approx(2 * (one.start or 0))
    alone, shared = ((each.student or 0) - (each.start or 0) for each in (one, two))
    assert shared == pytest.approx(alone)
    start = one.start or 0
    assert (two.wall or 0) - start == pytest.approx(((one.wall or 0) - start) / 2)


def test_a_sweep_is_its_slots_then_its_trials() -> None:
    config = Sweep(
        space={"seed": [1, 2, 3]},
        base=PLAIN,
        scheduler="none",
        asha=Asha(max_concurrent=3),
    )
    made = planning.plan(config, pace=PACE)
    assert isinstance(made, planning.SweepPlan)
    assert made.concurrent == 2  # of a core each, on two cores
    each, process = made.largest_trial.hours, 6.0 / 3600
    assert made.hours
    assert each
    assert each.start == pytest.approx(pacing.PROCESSES_OF_WARM_TRIAL * process)
    # one trial beside another, then the last one: two cores are enough for two
    assert made.hours.worst == pytest.approx(
        pacing.PROCESSES_OF_SLOT * process + 2 * (each.wall or 0)
    )
    assert made.hours.expected == pytest.approx(made.hours.worst)
    assert made.hours.start == pytest.approx(
        3 * (each.start or 0) + 2 * pacing.PROCESSES_OF_SLOT * process
    )
    assert made.hours.validation == pytest.approx(3 * (each.validation or 0))
    prices = planning.Prices(1.0, 1.0, "EUR")
    cost = planning.plan(config, pace=PACE, prices=prices).cost
    assert cost.money == pytest.approx(made.hours.student)
    assert planning.plan(config, pace=PACE, slots=1).concurrent == 1


def test_parts_of_the_hours_are_printed() -> None:
    shown = [row.quantity for row in planning.rows(planning.plan(PLAIN, pace=PACE))]
    assert {"of them validation", "of them start-up", "of it validation, PFLOP"} <= set(shown)
