"""SIGINT inside an InterruptGuard is a request, and outside it is what it was."""

import signal
import threading

import pytest

from kani_nb._interrupts import Interrupted, InterruptGuard


def test_an_interrupt_inside_raises_nothing_and_is_taken_once():
    with InterruptGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        assert guard.take()
        assert not guard.take()


def test_an_interrupt_that_nobody_took_raises_at_the_end_with_the_handler_restored():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), InterruptGuard():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_third_unanswered_interrupt_raises_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), InterruptGuard():
        for number in range(4):
            signal.raise_signal(signal.SIGINT)
            reached.append(number)
    assert reached == [0, 1]


def test_on_another_thread_it_does_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with InterruptGuard():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            assert not guard.take()
    finally:
        signal.signal(signal.SIGINT, before)


def test_front_ends_see_a_keyboard_interrupt_in_one_line():
    error = Interrupted("the answer was interrupted")
    assert isinstance(error, KeyboardInterrupt)
    assert type(error).__name__ == "KeyboardInterrupt"
    assert error._render_traceback_() == ["KeyboardInterrupt: the answer was interrupted"]
