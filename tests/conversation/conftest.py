"""Fixtures of the conversation tests: a loop thread, a store on disk, sessions."""

import pytest

from kani_nb._loop import LoopThread
from kani_nb.conversation.session import ChatSession
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import Conversation
from kani_nb.engines.echo import EchoEngine
from kani_nb.metrics.recorder import Recorder


@pytest.fixture
def loop():
    loop = LoopThread()
    yield loop
    loop.close()


@pytest.fixture
def store(tmp_path):
    with ConversationStore(tmp_path / "c.db") as store:
        yield store


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def open_session(loop, store, recorder):
    """Open a session on an engine (EchoEngine by default) and, optionally, another conversation or store."""

    def open_it(engine=None, conversation=None, store=store):
        engine = engine or EchoEngine()
        return ChatSession(
            conversation or Conversation.new("main"),
            loop=loop,
            engine=lambda: engine,
            recorder=recorder,
            store=store,
            engine_name=lambda: type(engine).__name__,
        )

    return open_it
