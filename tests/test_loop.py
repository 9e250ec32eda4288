"""The background loop, reached from threads and from other loops."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from kani_nb._loop import LoopThread


@pytest.fixture
def loop():
    loop = LoopThread("test-loop")
    yield loop
    loop.close()


async def where():
    return threading.current_thread().name


async def test_a_coroutine_runs_on_the_loops_thread_from_any_other_loop(loop):
    assert await loop.run(where()) == "test-loop"
    assert await asyncio.to_thread(loop.run_sync, where()) == "test-loop"


def test_waiting_on_its_own_thread_is_refused(loop):
    async def on_the_loop():
        loop.run_sync(where())

    with pytest.raises(RuntimeError, match="own thread"):
        loop.run_sync(on_the_loop())


async def test_a_generator_is_iterated_across_loops_in_order_with_its_error(loop):
    async def numbers():
        for number in range(100):
            yield number
        raise ZeroDivisionError("at the end")

    seen = []
    with pytest.raises(ZeroDivisionError, match="at the end"):
        async for number in loop.iterate(numbers):
            seen.append(number)
    assert seen == list(range(100))


async def test_leaving_early_closes_the_generator_before_it_returns(loop):
    closed = threading.Event()

    async def endless():
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0.05)
            closed.set()

    async with aclosing(loop.iterate(endless)) as stream:
        async for _ in stream:
            break
    assert closed.is_set()


def test_closing_cancels_what_runs_and_the_loop_can_be_used_again(loop):
    ended = threading.Event()

    async def forever():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    future = loop.submit(forever())
    loop.run_sync(asyncio.sleep(0))
    loop.close()
    assert ended.is_set()
    assert future.cancelled()
    assert loop.run_sync(where()) == "test-loop"
