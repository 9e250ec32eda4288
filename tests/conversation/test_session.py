"""A round is a transaction: on real engines, a real store and a real loop thread."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from kani_nb.conversation.session import ChatReply, ChatSession, Notice
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import CellRef, Conversation
from kani_nb.engines.base import (
    BaseEngine,
    Completion,
    EngineMemory,
    FinishReason,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
)
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import (
    ConversationBusyError,
    ConversationError,
    GenerationError,
    NoEngineError,
    OutOfMemoryError,
    PromptError,
    PromptTooLongError,
    StoreError,
)
from kani_nb.messages import ChatMessage, ImagePart, TextPart
from tests.conversation.scripted import Scripted, done, forever, journal_size, said

# One round.


async def test_an_answer_is_committed_saved_recorded_and_returned(open_session, store, recorder):
    session = open_session()
    heard = []
    recorder.listen(heard.append)
    reply = await session.ask("one two three")
    assert (reply.text, str(reply), repr(reply)) == ("one two three",) * 2 + ("ChatReply('one two three')",)
    assert (reply.number, reply.notices) == (1, ())
    assert session.history == [ChatMessage.user("one two three"), ChatMessage.assistant("one two three")]
    assert session.turns == (reply.turn,)
    assert reply.turn.metrics == reply.metrics.to_dict()
    assert store.load(session.conversation.id) == session.conversation
    assert heard == [recorder[-1]] == [reply.metrics]
    assert not session.is_busy


async def test_the_engine_gets_the_system_prompt_the_history_and_the_parameters_as_given(open_session):
    engine = Scripted(done("ok"))
    session = open_session(engine)
    session.set_system("be brief")
    await session.ask("a", max_new_tokens=7, whatever=1)
    await session.ask((TextPart("b"), ImagePart(b"1", "image/png")))
    messages, params = engine.seen[1]
    assert [message.role.value for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1].parts == (TextPart("b"), ImagePart(b"1", "image/png"))
    assert (engine.seen[0][1], params) == ({"max_new_tokens": 7, "whatever": 1}, {})
    assert len(session.history) == 4


@pytest.mark.parametrize("prompt", ["  spaces stay \n", "{x} $y$ {{z}}", "a\x00\ud800"])
async def test_nothing_of_a_prompt_is_changed(open_session, store, prompt):
    session = open_session()
    await session.ask(prompt)
    assert session.turns[0].prompt.text == prompt
    assert store.load(session.conversation.id) == session.conversation


@pytest.mark.parametrize("prompt", ["", "  \n\t", (), (" ",), (TextPart(""),), 5, None])
async def test_an_empty_prompt_is_refused(open_session, prompt):
    session = open_session()
    with pytest.raises(PromptError, match="prompt"):
        await session.ask(prompt)
    assert session.conversation.turns == {}
    assert not session.is_busy


async def test_a_stream_gives_the_deltas_and_last_the_reply(open_session):
    session = open_session()
    events = [event async for event in session.stream("one two three")]
    assert isinstance(events[0], PrefillProgress)
    assert events[1:-1] == ["one", " two", " three"]
    assert all(isinstance(event, TextDelta) for event in events[1:-1])
    assert isinstance(events[-1], ChatReply)


async def test_a_new_round_can_begin_as_soon_as_the_reply_is_seen(open_session):
    session = open_session()
    async with aclosing(session.stream("one")) as events:
        async for event in events:
            if isinstance(event, ChatReply):
                assert (await session.ask("two")).number == 2


def test_ask_sync_works_without_any_loop_and_is_refused_on_the_loop_thread(open_session, loop):
    session = open_session()
    assert session.ask_sync("hi").text == "hi"

    async def on_the_loop():
        return session.ask_sync("hi")

    with pytest.raises(RuntimeError, match="await"):
        loop.run_sync(on_the_loop())


def test_history_can_be_read_from_any_thread_while_rounds_run(open_session):
    session, wrong = open_session(), []
    ended = threading.Event()

    def watch():
        while not ended.wait(0.0005):  # without a pause it would hold up the rounds themselves
            history = session.history
            if len(history) % 2 or any(user.text != said.text for user, said in zip(*[iter(history)] * 2, strict=True)):
                wrong.append(history)

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(30):
        session.ask_sync(f"message {number}")
    ended.set()
    thread.join()
    assert wrong == []
    assert len(session.history) == 60


# Errors: nothing is committed.


@pytest.mark.parametrize(
    ("script", "expected", "text"),
    [
        ([TextDelta("par"), ValueError("bad luck")], GenerationError, "ValueError: bad luck"),
        ([GenerationError("as it is")], GenerationError, "^as it is$"),
        ([PromptError("no template")], PromptError, "^no template$"),
        ([MemoryError()], OutOfMemoryError, "ran out of memory"),
        ([type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried")], OutOfMemoryError, "Tried"),
        ([RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")], OutOfMemoryError, "allocate"),
        ([SystemExit(3)], GenerationError, "SystemExit"),
        ([TextDelta("x")], GenerationError, "without a completion"),
    ],
)
async def test_an_error_inside_generation_commits_nothing(open_session, store, recorder, script, expected, text):
    await (session := open_session()).ask("before")
    before = session.conversation
    failing = open_session(Scripted(*script), before)
    with pytest.raises(expected, match=text) as caught:
        await failing.ask("now")
    if isinstance(script[-1], ValueError):
        assert caught.value.__cause__ is script[-1]
    assert failing.conversation == before == store.load(before.id)
    assert (len(recorder), journal_size(store), failing.is_busy) == (1, 0, False)


async def test_running_out_of_memory_in_mid_answer_keeps_what_had_come(open_session, store):
    session = open_session(Scripted(TextDelta("half an ans"), MemoryError()))
    with pytest.raises(OutOfMemoryError):
        await session.ask("now")
    turn = list(session.conversation.turns.values())[-1]
    assert (turn.messages[-1].text, turn.interrupted) == ("half an ans", True)
    assert store.load(session.conversation.id) == session.conversation


async def test_out_of_memory_frees_what_the_failed_frames_held(open_session):
    import gc
    import weakref

    class Big:
        pass

    held = []

    async def allocate():
        big = Big()
        held.append(weakref.ref(big))
        raise MemoryError

    session = open_session(Scripted(allocate))
    with pytest.raises(OutOfMemoryError) as caught:
        await session.ask("hi")
    gc.collect()
    assert held[0]() is None
    assert caught.value.__cause__ is None


async def test_a_chat_without_an_engine_says_so(loop, recorder):
    def no_engine():
        raise NoEngineError("no engine is loaded", fix="%load_engine smollm2")

    session = ChatSession(
        Conversation.new("x"), loop=loop, engine=no_engine, recorder=recorder, store=None, engine_name=lambda: ""
    )
    with pytest.raises(NoEngineError):
        await session.ask("hi")
    assert not session.is_busy


async def test_a_prompt_longer_than_the_context_is_refused_quickly(open_session):
    session = open_session(EchoEngine(4096))
    began = time.perf_counter()
    with pytest.raises(PromptTooLongError, match="tokens"):
        await session.ask("x " * 100_000)
    assert time.perf_counter() - began < 20
    assert session.turns == ()


async def test_what_does_not_fit_is_dropped_with_a_notice_and_stays_in_the_tree(open_session):
    session = open_session(EchoEngine(40))
    for number in range(4):
        await session.ask(f"{number} b c d e f")
    events = [event async for event in session.stream("and now")]
    notices = [event for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert notices[0].startswith("context: dropped turn")
    assert events[-1].notices == tuple(notices)
    assert events[-1].text == "and now"
    assert len(session.turns) == 5


# Several at once.


async def test_a_second_round_on_one_conversation_is_refused_and_so_are_changes(open_session):
    session = open_session(Scripted(TextDelta("x"), forever))
    async with aclosing(session.stream("first")) as events:
        assert await anext(events) == "x"
        assert session.is_busy
        with pytest.raises(ConversationBusyError, match="one round at a time"):
            await session.ask("second")
        for change in (
            session.undo,
            lambda: session.switch(1),
            lambda: session.set_system("x"),
            lambda: session.rename("y"),
        ):
            with pytest.raises(ConversationBusyError):
                change()
        session.stop()
        assert [event async for event in events][-1].text == "x"
    assert said(session) == ["first"]


async def test_two_conversations_on_one_engine_queue(open_session):
    engine = EchoEngine(delay=0.02)
    first, second = open_session(engine), open_session(engine)
    began = time.monotonic()
    replies = await asyncio.gather(first.ask("a b c d e f g h"), second.ask("x y"))
    took = time.monotonic() - began
    assert [reply.text for reply in replies] == ["a b c d e f g h", "x y"]
    waits = [reply.metrics.queued_s for reply in replies]
    assert waits[0] < waits[1] / 2
    assert waits[1] - waits[0] > 0.1, "it waited for the whole of the first answer"
    assert replies[1].metrics.ttft_s < replies[1].metrics.duration_s <= took - waits[1], "the wait is no part of it"
    assert not engine.slot.is_taken


# The tree.


async def test_retry_edit_undo_and_switch_keep_every_branch(open_session, store):
    session = open_session()
    for text in ("a", "b", "c"):
        await session.ask(text, cell=CellRef(text, "e1"))
    retried = await session.retry()
    assert (retried.number, said(session)) == (3, ["a", "b", "c"])
    edited = await session.edit(2, "B")
    assert (edited.number, said(session)) == (2, ["a", "B"])
    assert edited.turn.cell == CellRef("b", "e1")
    assert len(session.conversation.branches()) == 3
    session.switch(1)
    assert said(session) == ["a", "b", "c"]
    assert session.undo(2) == 2
    assert said(session) == ["a"]
    assert session.undo(5) == 1
    assert session.undo() == 0
    assert store.load(session.conversation.id) == session.conversation
    with pytest.raises(ConversationError, match="no turn"):
        await session.retry()
    assert [event async for event in open_session(None, session.conversation.moved_to(retried.turn.id)).stream_retry(1)]


async def test_retry_and_edit_exist_as_streams(open_session):
    session = open_session()
    await session.ask("a")
    assert [event async for event in session.stream_retry()][-1].text == "a"
    assert [event async for event in session.stream_edit(1, "z")][-1].text == "z"
    assert len(session.conversation.branches()) == 3


async def test_a_cell_run_again_replaces_its_turn(open_session):
    session = open_session()
    for execution in ("1", "2"):
        for cell in ("a", "b"):
            await session.ask(f"cell {cell}", cell=CellRef(cell, execution + cell))
    assert said(session) == ["cell a", "cell b"]
    await session.ask("cell a", cell=CellRef("a", "3"), append=True)
    assert said(session) == ["cell a", "cell b", "cell a"]


async def test_the_system_prompt_and_the_name_are_stored(open_session, store):
    session = open_session()
    session.set_system("be brief")
    session.rename("trip")
    assert store.load(session.conversation.id) == session.conversation
    assert (session.system, session.conversation.name) == ("be brief", "trip")
    with pytest.raises(ConversationError, match="needs a name"):
        session.rename(" ")


# The store.


async def test_an_answer_that_cannot_be_saved_is_kept_said_so_and_saved_later(open_session, tmp_path):
    folder = tmp_path / "blocked"
    folder.write_text("a file where the folder should be")
    store = ConversationStore(folder / "c.db")
    session = open_session(store=store)
    reply = await session.ask("a")
    assert reply.text == "a"
    assert any("could not be saved" in notice and str(folder) in notice for notice in reply.notices)
    with pytest.raises(StoreError):
        session.rename("named meanwhile")
    folder.unlink()
    assert (await session.ask("b")).notices == ()
    assert store.load(session.conversation.id) == session.conversation
    assert said(session) == ["a", "b"]
    assert session.conversation.name == "named meanwhile"
    store.close()


async def test_a_conversation_that_another_kernel_deleted_is_written_again(open_session, store):
    session = open_session()
    await session.ask("a")
    store.delete(session.conversation.id)
    assert (await session.ask("b")).notices == ()
    assert store.load(session.conversation.id) == session.conversation


async def test_two_sessions_on_one_stored_conversation_lose_nothing(open_session, store):
    first = open_session()
    await first.ask("shared")
    second = open_session(conversation=store.load(first.conversation.id))
    await first.ask("mine")
    await second.ask("yours")
    conversation = store.load(first.conversation.id)
    assert [leaf.prompt.text for leaf in conversation.branches()] == ["mine", "yours"]


async def test_a_session_without_a_store_works(open_session):
    session = open_session(store=None)
    await session.ask("a")
    assert session.undo() == 1


# Metrics.


async def test_an_engine_that_only_predicts_is_fully_functional(open_session):
    class Old(BaseEngine):
        max_context_size = 100

        def message_len(self, message):
            return len(message.text)

        async def predict(self, messages, functions=None, **hyperparams):
            if messages[-1].text == "wait":
                await forever()
            return Completion(ChatMessage.assistant("a whole answer"), 4, 12)

    session = open_session(Old())
    reply = await session.ask("hi")
    metrics = reply.metrics
    assert (reply.text, metrics.finish_reason) == ("a whole answer", "stop")
    assert (metrics.prompt_tokens, metrics.completion_tokens, metrics.context_tokens) == (4, 12, 16)
    assert metrics.ttft_s is not None
    assert metrics.tpot_s is None  # one piece tells nothing of its tokens
    assert metrics.tokens_per_s is None
    threading.Timer(0.1, session.stop).start()
    assert (await session.ask("wait")).text == ""
    assert len(session.turns) == 1


async def test_the_times_are_those_of_the_engine_even_when_the_reader_is_slow(open_session):
    session = open_session(EchoEngine(delay=0.02, prefill=0.1))
    events, began = [], time.monotonic()
    async for event in session.stream("a b c d e f"):
        events.append(event)
        await asyncio.sleep(0.2)
    took = time.monotonic() - began
    metrics = events[-1].metrics
    assert metrics.ttft_s > 0.11
    assert metrics.tpot_s > 0.019
    assert metrics.tokens_per_s == pytest.approx(1 / metrics.tpot_s)
    assert metrics.duration_s == pytest.approx(metrics.ttft_s + 5 * metrics.tpot_s, abs=0.1)
    assert 0.21 < metrics.duration_s < took - 0.6
    assert (metrics.prompt_tokens, metrics.completion_tokens, metrics.cached_tokens) == (7, 6, None)
    assert (metrics.turn, metrics.model, metrics.max_context_size) == (1, "EchoEngine", 8192)
    assert metrics.peak_source == "rss"
    assert metrics.peak_bytes > 1_000_000
    assert abs(metrics.started_at - time.time()) < 5


async def test_memory_counts_and_reasoning_are_the_engines_own(open_session):
    class Full(Scripted):
        def memory(self):
            return EngineMemory(1234, 56, "cpu")

    script = [
        PrefillProgress(0, 9, 4, queued_s=0.0),
        ReasoningDelta("hm"),
        "plain",
        done("plain", completion_tokens=2, cached_tokens=5, finish_reason=FinishReason.LENGTH),
    ]
    session = open_session(Full(*script))
    events = [event async for event in session.stream("hi")]
    assert type(events[2]) is TextDelta
    metrics = events[-1].metrics
    assert (metrics.weight_bytes, metrics.kv_bytes, metrics.prompt_tokens, metrics.cached_tokens) == (1234, 56, 9, 5)
    assert metrics.free_bytes > 0
    assert metrics.finish_reason == "length"
    stopped = open_session(Full(*script[:3], forever))
    threading.Timer(0.1, stopped.stop).start()
    reply = await stopped.ask("hi")
    assert [str(part) for part in reply.message.parts] == ["", "plain"]
    assert reply.text == "plain"


async def test_a_failing_listener_costs_no_answer(open_session, recorder):
    recorder.listen(lambda metrics: 1 / 0)
    session = open_session()
    reply = await session.ask("hi")
    assert reply.notices == ("a listener of the metrics failed: ZeroDivisionError('division by zero')",)
    assert len(session.turns) == 1


async def test_what_fails_after_the_answer_is_said_and_costs_nothing(open_session):
    session = open_session(Scripted(TextDelta("ok"), done("ok"), ValueError("late")))
    reply = await session.ask("hi")
    assert reply.text == "ok"
    assert reply.notices == ("Scripted failed after its answer was whole: ValueError('late')",)
