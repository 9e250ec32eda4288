"""Random interrupts, errors, edits, undos, retries and cells run again: nothing committed is ever lost.

A real engine object, a real loop thread and a real store on disk; after every step the store, loaded anew, must equal
what is in memory.
"""

import asyncio
import sqlite3
import tempfile
from contextlib import aclosing, closing
from itertools import pairwise
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kani_nb._loop import LoopThread
from kani_nb.conversation.session import ChatReply, ChatSession
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import CellRef, Conversation
from kani_nb.engines.base import TextDelta
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import GenerationError
from kani_nb.metrics.recorder import Recorder

prompts = st.sampled_from(["a", "a b c", "one two three four five six", "\x00 \ud800 ```"])
cells = st.sampled_from([None, CellRef(None), CellRef("1"), CellRef("2"), CellRef("3")])
endings = st.one_of(
    st.just(("whole", 0)),
    st.tuples(st.sampled_from(["stop", "interrupt", "leave", "cancel", "fail"]), st.integers(0, 5)),
)


class SessionMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.loop = LoopThread()
        self.store = ConversationStore(Path(self.folder.name) / "c.db")
        self.engine = EchoEngine()
        self.recorder = Recorder()
        self.execution = 0
        self.committed = {}
        self.open(Conversation.new("machine"))
        self.store.create(self.session.conversation)

    def open(self, conversation):
        self.session = ChatSession(
            conversation,
            loop=self.loop,
            engine=lambda: self.engine,
            recorder=self.recorder,
            store=self.store,
            engine_name=lambda: "echo",
        )

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.loop.close()
            self.folder.cleanup()

    def run_round(self, open_stream, ending, parent, prompt):
        """Run a round that ends as `ending` says, and check what it left."""
        how, after = ending
        before = self.session.conversation
        recorded = len(self.recorder)
        self.engine.fail_after = after if how == "fail" else None
        seen, reply, has_failed = self.loop.run_sync(self.read(open_stream, how, after))
        conversation = self.session.conversation
        assert not self.session.is_busy
        assert not self.engine.slot.is_taken
        if has_failed or (reply is None and not seen):
            assert conversation == before
            assert len(self.recorder) == recorded
            return
        if reply is not None and reply.turn.id not in conversation.turns:  # stopped before any text
            assert (reply.text, conversation) == ("", before)
            assert reply.number == len(before.path())
            return
        turn = conversation.turns[conversation.head]
        assert set(conversation.turns) == {*before.turns, turn.id}
        assert (turn.parent_id, turn.prompt.text, turn.answer.text) == (parent, prompt, seen)
        assert turn.interrupted is (turn.metrics["finish_reason"] in ("cancelled", "interrupted"))
        assert not (turn.interrupted and how == "whole")
        if not turn.interrupted:  # also where it was whole before the cancellation arrived
            assert seen == prompt
        assert len(self.recorder) == recorded + 1
        self.committed[turn.id] = turn

    async def read(self, open_stream, how, after):
        """The text that was seen, the reply if there is one, and whether the round raised."""
        pieces, reply, task = [], None, asyncio.current_task()
        try:
            async with aclosing(open_stream()) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        pieces.append(event)
                    if isinstance(event, ChatReply):
                        reply = event
                    elif len(pieces) == after and how == "leave":
                        break
                    elif len(pieces) == after and how in ("stop", "interrupt"):
                        getattr(self.session, how)()
                    elif len(pieces) == after and how == "cancel":
                        task.cancel()
                        how = "cancelled"
        except GenerationError:
            return "".join(pieces), None, True
        except asyncio.CancelledError:
            task.uncancel()
        return "".join(pieces), reply, False

    @rule(prompt=prompts, cell=cells, append=st.booleans(), is_new_execution=st.booleans(), ending=endings)
    def ask(self, prompt, cell, append, is_new_execution, ending):
        self.execution += is_new_execution
        if cell is not None:
            cell = CellRef(cell.cell_id, str(self.execution))
        parent = self.session.conversation.place(prompt, cell or CellRef(), append=append)
        self.run_round(lambda: self.session.stream(prompt, cell=cell, append=append), ending, parent, prompt)

    @rule(back=st.integers(1, 4), ending=endings)
    def retry(self, back, ending):
        path = self.session.turns
        if path:
            number = max(1, len(path) - back + 1)
            turn = path[number - 1]
            self.run_round(lambda: self.session.stream_retry(number), ending, turn.parent_id, turn.prompt.text)

    @rule(number=st.integers(1, 6), prompt=prompts, ending=endings)
    def edit(self, number, prompt, ending):
        path = self.session.turns
        if number <= len(path):
            parent = path[number - 1].parent_id
            self.run_round(lambda: self.session.stream_edit(number, prompt), ending, parent, prompt)

    @rule(n=st.integers(1, 3))
    def undo(self, n):
        before = self.session.turns
        assert self.session.undo(n) == min(n, len(before))
        assert self.session.turns == before[: max(0, len(before) - n)]

    @rule(number=st.integers(1, 6))
    def switch(self, number):
        leaves = self.session.conversation.branches()
        if number <= len(leaves):
            self.session.switch(number)
            assert self.session.conversation.head == leaves[number - 1].id

    @rule(text=st.sampled_from([None, "be brief", "\udfff"]))
    def set_system(self, text):
        self.session.set_system(text)

    @rule()
    def restart_the_kernel(self):
        self.store.close()
        self.store = ConversationStore(self.store.path)
        self.open(self.store.load(self.session.conversation.id))

    @invariant()
    def nothing_is_lost_and_the_store_is_equal(self):
        conversation = self.session.conversation
        assert dict(conversation.turns) == self.committed
        again = self.store.load(conversation.id)
        assert again == conversation
        assert list(again.turns) == list(conversation.turns)
        path = conversation.path()
        assert all(after.parent_id == before.id for before, after in pairwise(path))
        assert [message for turn in path for message in turn.messages] == self.session.history
        with closing(sqlite3.connect(self.store.path)) as connection:
            assert connection.execute("SELECT count(*) FROM journal").fetchone() == (0,)


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=12, stateful_step_count=50, deadline=None)
