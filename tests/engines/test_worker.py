"""Blocking work in a thread: order, errors, leaving early, fairness, and a loop that stays responsive."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from kani_nb.engines.worker import Slot, iterate_in_thread, run_in_thread


async def collect(work, slot):
    return [item async for item in iterate_in_thread(work, slot)]


async def test_what_is_emitted_arrives_in_order():
    def work(emit, stop):
        for number in range(1000):
            emit(number)

    assert await collect(work, Slot()) == list(range(1000))


async def test_an_exception_arrives_after_what_was_emitted_before_it():
    def work(emit, stop):
        emit("first")
        raise ZeroDivisionError("in the thread")

    seen = []
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        async for item in iterate_in_thread(work, Slot()):
            seen.append(item)
    assert seen == ["first"]


async def test_leaving_early_sets_the_stop_flag_and_frees_the_slot():
    slot, ended = Slot(), threading.Event()

    def work(emit, stop):
        emit("once")
        assert stop.wait(10)
        ended.set()

    async with aclosing(iterate_in_thread(work, slot)) as items:
        async for _ in items:
            break
    assert await asyncio.to_thread(ended.wait, 10)
    await asyncio.wait_for(slot.acquire(), 10)


async def test_requests_take_turns_first_come_first_served():
    slot, order, gate = Slot(), [], threading.Event()

    def first(emit, stop):
        gate.wait(10)
        order.append("first")

    tasks = [asyncio.create_task(collect(first, slot))]
    await asyncio.sleep(0)
    for name in ("second", "third", "fourth"):
        tasks.append(asyncio.create_task(collect(lambda emit, stop, name=name: order.append(name), slot)))
        await asyncio.sleep(0)
    assert slot.queue_length == 3
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["first", "second", "third", "fourth"]
    assert not slot.is_taken


async def test_a_request_cancelled_in_the_queue_never_touches_the_device():
    slot, touched = Slot(), []
    await slot.acquire()
    waiting = asyncio.create_task(collect(lambda emit, stop: touched.append(1), slot))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    slot.release()
    await asyncio.wait_for(slot.acquire(), 10)
    assert not touched


async def test_a_slot_handed_over_in_the_moment_of_cancellation_is_passed_on():
    slot = Slot()
    await slot.acquire()
    doomed = asyncio.create_task(slot.acquire())
    heir = asyncio.create_task(slot.acquire())
    await asyncio.sleep(0)
    slot.release()  # schedules the hand-over to `doomed`
    doomed.cancel()
    await asyncio.wait_for(heir, 10)
    assert slot.is_taken


async def test_the_slot_is_held_until_the_thread_really_ends():
    slot, may_end = Slot(), threading.Event()

    def work(emit, stop):
        emit(1)
        may_end.wait(10)

    async with aclosing(iterate_in_thread(work, slot)) as items:
        async for _ in items:
            break
    assert slot.is_taken
    may_end.set()
    await asyncio.wait_for(slot.acquire(), 10)


def test_a_slot_is_shared_between_event_loops():
    slot, order = Slot(), []

    def use(name):
        async def main():
            def work(emit, stop):
                order.append((name, "in"))
                time.sleep(0.01)
                order.append((name, "out"))

            for _ in range(5):
                await collect(work, slot)

        asyncio.run(main())

    threads = [threading.Thread(target=use, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 30
    assert all(order[at][0] == order[at + 1][0] for at in range(0, 30, 2)), "two were in at once"


async def test_what_an_abandoned_call_returns_is_discarded():
    discarded, go = [], threading.Event()

    def call(cancelled):
        go.wait(10)
        return "too late"

    task = asyncio.create_task(run_in_thread(call, name="t", discard=discarded.append))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    for _ in range(200):
        if discarded:
            break
        await asyncio.sleep(0.01)
    assert discarded == ["too late"]
