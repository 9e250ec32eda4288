"""The plan is that of what was asked for last, and a model is read once for it."""

import threading

import pytest

from kani_nb.config import EngineConfig
from kani_nb.notebook.panels import plan_follower
from kani_nb.notebook.panels.plan_follower import PlanFollower


@pytest.fixture
def reads(monkeypatch):
    """The models that were read, each once it `may_go` on."""
    seen, may_go = [], threading.Event()
    read = plan_follower.read_model

    def waiting(config, *, cancelled):
        seen.append(config.model)
        may_go.wait(20)
        return read(config, cancelled=cancelled)

    monkeypatch.setattr(plan_follower, "read_model", waiting)
    waiting.seen, waiting.may_go = seen, may_go
    return waiting


@pytest.fixture
def follower():
    made = PlanFollower(dict, lambda: None)
    yield made
    made.close()


def test_a_model_that_is_being_read_is_not_read_again_for_each_change(follower, reads, tiny_model):
    for context in (100, 200, 300):
        follower.follow(EngineConfig(str(tiny_model), max_context_size=context))
    assert follower.is_reading
    reads.may_go.set()
    assert follower.wait(30)
    assert reads.seen == [str(tiny_model)]
    assert "with a context of 300 tokens" in follower.view()["verdict"]


def test_another_model_ends_the_reading_of_the_one_before(follower, reads, tiny_model):
    reads.may_go.set()
    follower.follow(EngineConfig("echo"))
    assert follower.wait(30)
    reads.may_go.clear()
    follower.follow(EngineConfig(str(tiny_model)))
    assert follower.is_reading
    follower.follow(EngineConfig("echo"))
    assert not follower.is_reading
    reads.may_go.set()
    assert follower.wait(30)
    assert follower.reading.engine == "echo"
    assert not follower.errors


def test_what_cannot_be_read_has_no_plan_and_no_errors_of_its_own(follower):
    follower.follow(None)
    assert follower.wait(5)
    assert (follower.view(), follower.reading, follower.errors) == (None, None, {})
