"""Equal requests are computed once, in one replica and between replicas, and a maker that dies
delays and changes nothing.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dra_ray.pool.exchange import Exchange, Window


def features(value: float, count: int = 10) -> np.ndarray:
    return np.full((count, 4), value, dtype=np.float32)


def test_requests_under_way_and_answered_are_made_once() -> None:
    async def play() -> int:
        window, made = Window(1000), 0

        async def make() -> np.ndarray:
            nonlocal made
            made += 1
            await asyncio.sleep(0.01)
            return features(made)

        found = await asyncio.gather(*(window.get(b"a", make) for _ in range(5)))
        found.append(await window.get(b"a", make))
        assert all((part == 1).all() for part in found)
        return made

    assert asyncio.run(play()) == 1


def test_the_window_is_bounded_in_bytes() -> None:
    window = Window(3 * features(0).nbytes)
    for value in range(5):
        window.keep(str(value).encode(), features(value))
        assert window.bytes <= 3 * features(0).nbytes
    assert [window.find(str(value).encode()) is not None for value in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    window.keep(b"too large", features(0, 1000))
    assert window.find(b"too large") is None
    assert window.find(b"4") is not None


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    async def play() -> None:
        window = Window(1000)

        async def fail() -> np.ndarray:
            await asyncio.sleep(0.01)
            raise ValueError("poisoned")

        async def make() -> np.ndarray:
            return features(1)

        found = await asyncio.gather(
            *(window.get(b"a", fail) for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(error, ValueError) for error in found)
        assert (await window.get(b"a", make) == 1).all()

    asyncio.run(play())


def test_a_caller_that_leaves_takes_nobody_with_it() -> None:
    async def play() -> None:
        window = Window(1000)

        async def make() -> np.ndarray:
            await asyncio.sleep(0.05)
            return features(1)

        first, second = (asyncio.ensure_future(window.get(b"a", make)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await second == 1).all()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(play())


def test_replicas_share_through_the_exchange() -> None:
    async def play() -> None:
        exchange = Exchange(1000)
        assert await exchange.claim(b"a", 1.0) is None
        waiting = [asyncio.ensure_future(exchange.claim(b"a", 5.0)) for _ in range(3)]
        await asyncio.sleep(0.01)
        exchange.give(b"a", features(1))
        for found in await asyncio.gather(*waiting):
            assert found is not None
            assert (found == 1).all()
        assert await exchange.claim(b"a", 1.0) is not None

    asyncio.run(play())


def test_a_maker_that_dies_or_gives_up_is_replaced_by_one() -> None:
    async def play() -> None:
        exchange = Exchange(1000)
        assert await exchange.claim(b"a", 1.0) is None  # and this one dies
        waiting = [asyncio.ensure_future(exchange.claim(b"a", 0.05)) for _ in range(3)]
        done, pending = await asyncio.wait(waiting, timeout=0.08)
        assert [task.result() for task in done] == [None], "one takes over, the others wait for it"
        exchange.give(b"a", features(2))
        for found in await asyncio.gather(*pending):
            assert found is not None
            assert (found == 2).all()

        assert await exchange.claim(b"b", 1.0) is None
        other = asyncio.ensure_future(exchange.claim(b"b", 5.0))
        await asyncio.sleep(0.01)
        exchange.drop(b"b")
        assert await other is None

    asyncio.run(play())
