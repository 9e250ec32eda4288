"""What a person is told beside an answer, and of one that failed: once, and so that it helps."""

import sqlite3
from contextlib import closing

import pytest

from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import CellRef
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import GenerationError
from tests.conversation.scripted import Scripted, said


async def test_a_locked_store_is_told_once_and_the_answer_is_kept_in_memory(open_session, tmp_path, monkeypatch):
    from kani_nb.conversation import database

    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    store = ConversationStore(tmp_path / "locked.db")
    session = open_session(EchoEngine(delay=0.01), store=store)
    await session.ask("before")
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        reply = await session.ask("while it is locked")
    assert len(reply.notices) == 1
    assert "kept in memory only" in reply.notices[0]
    assert said(session) == ["before", "while it is locked"]
    assert (await session.ask("after")).notices == ()
    assert store.load(session.conversation.id) == session.conversation
    store.close()


async def test_turns_left_out_by_a_repeated_cell_are_noticed(open_session):
    session = open_session()
    for text in "abcd":
        await session.ask(text, cell=CellRef(text, "run-1"))
    reply = await session.ask("B", cell=CellRef("b", "run-2"))
    assert reply.notices == ("turns 3-4 are on branch 1 now: %chat branches",)


async def test_what_failed_is_named_with_the_innermost_line_that_is_not_ours(open_session):
    session = open_session(Scripted(RuntimeError("kaboom")))
    with pytest.raises(GenerationError, match=r"RuntimeError: kaboom \(scripted\.py:\d+\)"):
        await session.ask("x")
