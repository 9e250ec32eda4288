"""The latest request is always done, whatever happens to those before it."""

import sys
import threading

from kani_nb.notebook.panels.latest import Latest


def test_the_last_job_is_always_done():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    latest = Latest("test-latest")
    try:
        for number in range(3000):
            done = []
            latest.submit(lambda number=number, done=done: done.append(number))
            assert latest.wait(10)
            assert done == [number]
    finally:
        sys.setswitchinterval(interval)


def test_what_waits_is_replaced_by_what_comes_later():
    may_end, done = threading.Event(), []
    latest = Latest("test-latest")
    latest.submit(may_end.wait)
    for number in range(5):
        latest.submit(lambda number=number: done.append(number))
    may_end.set()
    assert latest.wait(10)
    assert done in ([4], [0, 4], [1, 4], [2, 4], [3, 4]), "the first of them may come before the one that blocks"


def test_a_job_that_fails_is_reported_and_takes_no_other_with_it(monkeypatch):
    began, may_fail, done, reported = threading.Event(), threading.Event(), [], []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def fail():
        began.set()
        may_fail.wait(10)
        raise ValueError("on purpose")

    latest = Latest("test-latest")
    latest.submit(fail)
    assert began.wait(10)
    latest.submit(lambda: done.append(1))
    may_fail.set()
    assert latest.wait(10)
    latest.submit(lambda: done.append(2))
    assert latest.wait(10)
    assert done[-1] == 2
    assert [str(each.exc_value) for each in reported] == ["on purpose"]


def test_a_closed_one_does_nothing_more():
    latest, done = Latest("test-latest"), []
    latest.close()
    latest.submit(lambda: done.append(1))
    assert latest.wait(1)
    assert done == []
