"""Micro-batches shared by requests: the same features as one by one, turns for clients, and errors
that stay with their sender.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time

import pytest
import torch
from torch import Tensor

from dra_ray.errors import DataError, PoolError
from dra_ray.pool.rows import Encoder, independent_rows
from dra_ray.teachers.source import Request
from tests.support.requests import request
from tests.support.teachers import Sums, expected

SIZE, BAD, LARGE = 8, 666, 667


class Gated(Sums):
    """Notes the labels of every micro-batch, waits for `go`, and fails on images of some labels."""

    def __init__(self, depends_on_place: bool = False) -> None:
        super().__init__(micro_batch=SIZE)
        self.depends_on_place = depends_on_place
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def encode(self, request: Request) -> Tensor:
        self.go.wait()
        self.batches.append(request.labels.tolist())
        if (request.labels == BAD).any():
            raise RuntimeError("bad image")
        if (request.labels == LARGE).any():
            raise torch.OutOfMemoryError("out of memory")
        place = torch.arange(len(request))[:, None]
        return super().encode(request) + (place if self.depends_on_place else 0)


def held(teacher: Gated) -> Encoder:
    """An encoder at work on a first micro-batch, so that what is submitted now waits."""
    encoder = Encoder(teacher)
    teacher.batches.clear()
    teacher.go.clear()
    encoder.submit("first", request(0, SIZE))
    while encoder.waiting:
        time.sleep(0.001)
    return encoder


def test_requests_share_micro_batches_and_keep_their_features() -> None:
    teacher = Gated()
    encoder = held(teacher)
    sizes = [3, 5, 1, 20, 2, SIZE, 13]
    calls = [
        encoder.submit(f"client-{index % 3}", request(index, count, index + 1))
        for index, count in enumerate(sizes)
    ]
    assert encoder.waiting == len(sizes)
    teacher.go.set()
    for index, (count, call) in enumerate(zip(sizes, calls, strict=True)):
        assert torch.equal(call.result(10).features, expected(index, count, index + 1))
    assert len(teacher.batches) == 1 + -(-sum(sizes) // SIZE), (
        "not one micro-batch more than the rows fill"
    )
    assert sum(map(len, teacher.batches)) == SIZE + sum(sizes), "no row twice"
    encoder.close()


def test_a_teacher_whose_rows_depend_on_their_place_gets_each_request_alone() -> None:
    assert independent_rows(Gated())
    assert not independent_rows(Gated(depends_on_place=True))
    teacher = Gated(depends_on_place=True)
    encoder = held(teacher)
    assert not encoder.merges
    calls = [encoder.submit("a", request(count, count)) for count in (3, 5, 11)]
    teacher.go.set()
    for count, call in zip((3, 5, 11), calls, strict=True):
        place = torch.arange(count) % SIZE
        assert torch.equal(call.result(10).features, expected(count, count) + place[:, None])
    assert [len(batch) for batch in teacher.batches] == [SIZE, 3, 5, SIZE, 3]
    encoder.close()


def test_who_asks_for_much_does_not_starve_the_others() -> None:
    teacher = Gated()
    encoder = held(teacher)
    for number in range(4):
        encoder.submit("greedy", request(100 + number, 10 * SIZE, 100 + number))
    modest = encoder.submit("modest", request(1, SIZE, 1))
    teacher.go.set()
    modest.result(10)
    at = next(index for index, batch in enumerate(teacher.batches) if 1 in batch)
    assert at <= 2, "after the one under way and one of the greedy client's"
    encoder.close()


def test_errors_stay_with_their_sender() -> None:
    teacher = Gated()
    encoder = held(teacher)
    good = request(0, 2)
    with pytest.raises(DataError, match="not what the teacher takes"):
        encoder.submit("poison", dataclasses.replace(good, sigma=torch.tensor([1.0, math.nan])))
    calls = [encoder.submit(str(label), request(label, 2, label)) for label in (1, BAD, 2, LARGE)]
    teacher.go.set()
    assert torch.equal(calls[0].result(10).features, expected(1, 2, 1))
    assert torch.equal(calls[2].result(10).features, expected(2, 2, 2))
    with pytest.raises(RuntimeError, match="bad image"):
        calls[1].result(10)
    with pytest.raises(PoolError, match="out of memory at teacher.micro_batch=8; lower it"):
        calls[3].result(10)
    assert torch.equal(
        encoder.submit("later", request(5, 9, 5)).result(10).features, expected(5, 9, 5)
    )
    encoder.close()


def test_a_long_request_that_fails_leaves_the_line() -> None:
    teacher = Gated()
    encoder = held(teacher)
    bad = encoder.submit("bad", request(4, 40 * SIZE, BAD))
    good = encoder.submit("good", request(3, SIZE, 3))
    teacher.go.set()
    with pytest.raises(RuntimeError, match="bad image"):
        bad.result(10)
    assert torch.equal(good.result(10).features, expected(3, SIZE, 3))
    encoder.close()
    assert len(teacher.batches) < 6, "the rest of it is not done"


def test_an_incomplete_micro_batch_waits_only_for_company() -> None:
    teacher = Gated()
    encoder = Encoder(teacher, merge_wait_s=30.0)
    encoder.submit("one", request(1, 3, 1)).result(10)  # nobody else is there to wait for
    encoder.submit("two", request(1, SIZE, 1)).result(10)  # full at once
    teacher.batches.clear()
    calls = [encoder.submit(client, request(2, 4, 2)) for client in ("one", "two")]
    for call in calls:
        call.result(10)
    assert teacher.batches == [[2] * SIZE]
    encoder.close()


def test_costs_are_told() -> None:
    seen: list[tuple[int, float]] = []
    encoder = Encoder(Gated(), on_batch=lambda rows, seconds: seen.append((rows, seconds)))
    answer = encoder.submit("one", request(1, 20, 1)).result(10)
    encoder.close()
    assert [rows for rows, _ in seen] == [8, 8, 4]
    assert answer.service_s == pytest.approx(sum(seconds for _, seconds in seen))
    assert answer.waited_s >= 0
    assert encoder.busy_for_s() == 0
    assert len(Encoder(Gated()).submit("none", request(1, 0, 1)).result(1).features) == 0
