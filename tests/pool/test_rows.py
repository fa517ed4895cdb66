"""Micro-batches shared by requests: the same features as one by one, turns for clients, and errors
that stay with their sender.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from dra_ray.errors import DataError, PoolError
from dra_ray.pool.rows import Encoder, independent_rows

SIZE = 8


class Sums:
    """A teacher whose feature is a function of the image, its label, noise level and seed; it notes
    every micro-batch.
    """

    micro_batch, feature_dim = SIZE, 2

    def __init__(self, depends_on_place: bool = False) -> None:
        self.depends_on_place = depends_on_place
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def check(self, images: Tensor, labels: Tensor, sigma: Tensor) -> None:
        if not sigma.isfinite().all():
            raise DataError("sigma=nan")

    def encode_each(
        self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seeds: Tensor
    ) -> Tensor:
        assert 0 < len(images) <= SIZE
        self.go.wait()
        self.batches.append(labels.tolist())
        if (labels == 666).any():
            raise RuntimeError("bad image")
        if (labels == 667).any():
            raise torch.OutOfMemoryError("out of memory")
        feature = torch.stack(
            [images.float().flatten(1).sum(1) * sigma, labels + noise_seeds.float()], 1
        )
        return feature + torch.arange(len(images))[:, None] if self.depends_on_place else feature

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.ones(SIZE, 1, 2, 2, dtype=torch.uint8),
            torch.arange(SIZE),
            torch.ones(SIZE),
            torch.arange(SIZE),
        )


def request(count: int, label: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    draws = torch.Generator().manual_seed(label + seed)
    images = torch.randint(256, (count, 1, 2, 2), dtype=torch.uint8, generator=draws)
    return images, torch.full((count,), label), torch.rand(count, generator=draws), seed


def expected(count: int, label: int, seed: int = 0) -> Tensor:
    images, labels, sigma, noise_seed = request(count, label, seed)
    return torch.stack(
        [
            images.float().flatten(1).sum(1) * sigma,
            labels + noise_seed + torch.arange(count).float(),
        ],
        1,
    )


def held(teacher: Sums) -> Encoder:
    """An encoder at work on a first micro-batch, so that what is submitted now waits."""
    encoder = Encoder(teacher)
    teacher.batches.clear()
    teacher.go.clear()
    encoder.submit("first", *request(SIZE, 0))
    while encoder.waiting:
        time.sleep(0.001)
    return encoder


def test_requests_share_micro_batches_and_keep_their_features() -> None:
    teacher = Sums()
    encoder = held(teacher)
    sizes = [3, 5, 1, 20, 2, SIZE, 13]
    calls = [
        encoder.submit(f"client-{index % 3}", *request(count, index + 1, 7 * index))
        for index, count in enumerate(sizes)
    ]
    assert encoder.waiting == len(sizes)
    teacher.go.set()
    for index, (count, call) in enumerate(zip(sizes, calls, strict=True)):
        assert torch.equal(call.result(10).features, expected(count, index + 1, 7 * index))
    assert len(teacher.batches) == 1 + -(-sum(sizes) // SIZE), (
        "not one micro-batch more than the rows fill"
    )
    assert sum(map(len, teacher.batches)) == SIZE + sum(sizes), "no row twice"
    encoder.close()


def test_a_teacher_whose_rows_depend_on_their_place_gets_each_request_alone() -> None:
    assert independent_rows(Sums()) and not independent_rows(Sums(depends_on_place=True))
    teacher = Sums(depends_on_place=True)
    encoder = held(teacher)
    assert not encoder.merges
    calls = [encoder.submit("a", *request(count, count)) for count in (3, 5, 11)]
    teacher.go.set()
    for count, call in zip((3, 5, 11), calls, strict=True):
        place = torch.arange(count) % SIZE
        assert torch.equal(call.result(10).features, expected(count, count) + place[:, None])
    assert [len(batch) for batch in teacher.batches] == [SIZE, 3, 5, SIZE, 3]
    encoder.close()


def test_who_asks_for_much_does_not_starve_the_others() -> None:
    teacher = Sums()
    encoder = held(teacher)
    for number in range(4):
        encoder.submit("greedy", *request(10 * SIZE, 100 + number))
    modest = encoder.submit("modest", *request(SIZE, 1))
    teacher.go.set()
    modest.result(10)
    at = next(index for index, batch in enumerate(teacher.batches) if 1 in batch)
    assert at <= 2, "after the one under way and one of the greedy client's"
    encoder.close()


def test_errors_stay_with_their_sender() -> None:
    teacher = Sums()
    encoder = held(teacher)
    with pytest.raises(DataError, match="sigma=nan"):
        encoder.submit(
            "poison",
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(2),
            torch.tensor([1.0, float("nan")]),
            0,
        )
    calls = [encoder.submit(str(label), *request(2, label)) for label in (1, 666, 2, 667)]
    teacher.go.set()
    assert torch.equal(calls[0].result(10).features, expected(2, 1))
    assert torch.equal(calls[2].result(10).features, expected(2, 2))
    with pytest.raises(RuntimeError, match="bad image"):
        calls[1].result(10)
    with pytest.raises(PoolError, match="out of memory at teacher.micro_batch=8; lower it"):
        calls[3].result(10)
    assert torch.equal(encoder.submit("later", *request(9, 5)).result(10).features, expected(9, 5))
    encoder.close()


def test_a_long_request_that_fails_leaves_the_line() -> None:
    teacher = Sums()
    encoder = held(teacher)
    bad = encoder.submit("bad", *request(40 * SIZE, 666))
    good = encoder.submit("good", *request(SIZE, 3))
    teacher.go.set()
    with pytest.raises(RuntimeError, match="bad image"):
        bad.result(10)
    assert torch.equal(good.result(10).features, expected(SIZE, 3))
    encoder.close()
    assert len(teacher.batches) < 6, "the rest of it is not done"


def test_an_incomplete_micro_batch_waits_only_for_company() -> None:
    teacher = Sums()
    encoder = Encoder(teacher, merge_wait_s=30.0)
    encoder.submit("one", *request(3, 1)).result(10)  # nobody else is there to wait for
    encoder.submit("two", *request(SIZE, 1)).result(10)  # full at once
    teacher.batches.clear()
    calls = [encoder.submit(client, *request(4, 2)) for client in ("one", "two")]
    for call in calls:
        call.result(10)
    assert teacher.batches == [[2] * SIZE]
    encoder.close()


def test_costs_are_told() -> None:
    seen: list[tuple[int, float]] = []
    encoder = Encoder(Sums(), on_batch=lambda rows, seconds: seen.append((rows, seconds)))
    answer = encoder.submit("one", *request(20, 1)).result(10)
    encoder.close()
    assert [rows for rows, _ in seen] == [8, 8, 4]
    assert answer.service_s == pytest.approx(sum(seconds for _, seconds in seen))
    assert answer.waited_s >= 0 and encoder.busy_for_s() == 0
    assert len(Encoder(Sums()).submit("none", *request(0, 1)).result(1).features) == 0
