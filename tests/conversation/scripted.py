"""An engine that does what a test tells it to."""

import asyncio
import sqlite3
from contextlib import closing

from kani_nb.engines.base import (
    BaseEngine,
    Completion,
)
from kani_nb.messages import ChatMessage


def said(session):
    return [turn.prompt.text for turn in session.turns]


def journal_size(store):
    with closing(sqlite3.connect(store.path)) as connection:
        return connection.execute("SELECT count(*) FROM journal").fetchone()[0]


class Scripted(BaseEngine):
    """Yields, raises or awaits what the script says."""

    max_context_size = 1000

    def __init__(self, *script):
        self.script = script
        self.seen = []
        self.closed = 0

    def prompt_len(self, messages, functions=None, **kwargs):
        return sum(len(message.text) for message in messages)

    async def stream(self, messages, functions=None, **hyperparams):
        self.seen.append((messages, hyperparams))
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if callable(step):
                    await step()
                else:
                    yield step
        finally:
            self.closed += 1


async def forever():
    await asyncio.Event().wait()


def done(text, **fields):
    return Completion(ChatMessage.assistant(text), **fields)
