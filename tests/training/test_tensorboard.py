"""The event file of a run, read back by TensorBoard's own reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dra_ray import runs
from dra_ray.runs import StepRow, ValidationRow
from dra_ray.storage import Store
from dra_ray.training.tensorboard import EVENTS, EventFile, Mirror, Row, events, logged

START_S = 1_764_000_000.0


def validation(step: int) -> ValidationRow:
    return ValidationRow(
        step=step,
        epoch=step // 10,
        images_seen=32 * step,
        loss=1 / step,
        loss_clean=0.5,
        loss_robust=0.25,
        loss_align=0.0,
        lr=0.1,
        clean_accuracy=0.75,
        robust_accuracy=step / 128,
        elapsed_s=float(step),
        at=START_S + step,
    )


def a_step(step: int, loss: float = 2.0) -> StepRow:
    return StepRow(
        step=step,
        epoch=step / 10,
        loss=loss,
        loss_clean=1.0,
        loss_robust=1.0,
        loss_align=0.0,
        lr=0.1,
        images_per_s=100.0,
        at=START_S + step,
    )


ROWS: list[Row] = [
    a_step(5),
    a_step(10),
    a_step(15, math.nan),
    validation(10),  # a validation's row comes after later steps
    a_step(20),
    validation(20),
]


def points(folder: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard shows them."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    accumulator = reader.EventAccumulator(folder).Reload()
    return {
        tag: [(point.step, point.value) for point in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def fill(file: Store, rows: list[Row]) -> None:
    mirrored = EventFile(file)
    for row in rows:
        mirrored.add(row)
        mirrored.send()


def own_points(file: Store) -> list[tuple[str, int, float, float]]:
    return [
        (value.tag, message.step, message.wall_time, value.simple_value)
        for message, _ in events(file.read_bytes())
        for value in message.summary.value
    ]


def test_tensorboard_reads_every_point_once(tmp_path: Path) -> None:
    file = Store(str(tmp_path)) / EVENTS
    fill(file, ROWS[:4])
    fill(file, ROWS)  # a resumed run hands over what it has, too
    shown = points(str(tmp_path))
    assert shown["validation/robust_accuracy"] == [(10, 10 / 128), (20, 20 / 128)]
    assert [step for step, _ in shown["steps/loss"]] == [5, 10, 15, 20]
    assert math.isnan(shown["steps/loss"][2][1])
    assert shown["validation/images_seen"] == [(10, 320), (20, 640)]


def test_points_keep_their_time_and_come_once(tmp_path: Path) -> None:
    file = Store(str(tmp_path)) / EVENTS
    for _ in range(3):
        fill(file, ROWS)
    robust = [point for point in own_points(file) if point[0] == "validation/robust_accuracy"]
    assert robust == [
        ("validation/robust_accuracy", step, START_S + step, step / 128) for step in (10, 20)
    ]


@pytest.mark.parametrize("lost_bytes", [1, 4, 11, 60])
def test_a_writer_that_was_killed_within_a_row_is_repaired(tmp_path: Path, lost_bytes: int) -> None:
    whole, file = Store(str(tmp_path)) / "whole", Store(str(tmp_path)) / EVENTS
    for target in (whole, file):
        fill(target, ROWS)
    file.write_bytes(file.read_bytes()[:-lost_bytes])
    fill(file, ROWS)
    assert file.read_bytes() == whole.read_bytes()


def test_an_object_store_has_the_same_file(tmp_path: Path) -> None:
    remote, local = Store("memory://tensorboard/events"), Store(str(tmp_path)) / EVENTS
    for file in (remote, local):
        fill(file, ROWS[:3])
        fill(file, ROWS)
    assert remote.read_bytes() == local.read_bytes()


def test_a_mirror_follows_logs_that_grow(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    steps = runs.Log(run / runs.STEPS, StepRow)
    mirror = Mirror(run)
    mirror.look()
    for row in (a_step(5), a_step(10)):
        steps.append(row)
        mirror.look()
    runs.write_rows(run / runs.METRICS, [validation(10)])
    mirror.look()
    before = (run / EVENTS).read_bytes()
    Mirror(run).look()
    assert (run / EVENTS).read_bytes() == before
    assert [row.step for row in logged(run)] == [5, 10, 10]
    assert len({point[:2] for point in own_points(run / EVENTS)}) == 2 * 6 + 8
