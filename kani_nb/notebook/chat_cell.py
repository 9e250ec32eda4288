"""One answer in one cell: the stream on the loop thread, its view on the main thread, and how it ends.

A Stop ends the answer and the cell succeeds. An interrupt ends it too, but the cell fails with one line, so that a
queued Run All stops there. Either way the round is committed before the cell ends, or it is not there at all: see
`InterruptGuard`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._waiting import Call
from kani_nb.errors import GenerationError
from kani_nb.messages import MessagePart
from kani_nb.notebook.main_thread import MainThreadHost

if TYPE_CHECKING:
    from kani_nb._loop import LoopThread
    from kani_nb.conversation.session import ChatReply, ChatSession
    from kani_nb.notebook.stream_view import StreamView

OpenStream = Callable[[], AsyncIterator[Any]]


def run_answer(
    loop: LoopThread,
    session: ChatSession,
    open_stream: OpenStream,
    make_view: Callable[[], StreamView | None],
    *,
    can_ask: bool = False,
) -> ChatReply:
    """Run one round to its end on the calling thread, and return its reply.

    Args:
        loop: where the session lives.
        session: whose `interrupt` ends the round.
        open_stream: makes the session's stream, on the loop.
        make_view: opens the output, which is pumped while waiting; None for a quiet round.
        can_ask: the front end shows what `input()` asks.

    Raises:
        Interrupted: an interrupt came; what there was of the answer has been committed and shown.
        KaniNbError: the round failed, and nothing was committed.
    """
    with InterruptGuard() as guard:
        call: Call[ChatReply] | None = None
        view = make_view()
        host = MainThreadHost(guard, can_ask=can_ask)

        def pump() -> None:
            if call is not None and call.was_interrupted:
                host.begin_no_more()
            host.pump()
            if view is not None:
                view.pump()

        reply: ChatReply | None = None
        failure: BaseException | None = None
        host_before, session.host = session.host, host
        try:
            call = Call(loop, _consume(open_stream, view), guard, pump=pump, ask_to_end=session.interrupt)
            reply = call.result()
        except BaseException as error:
            failure = error
            raise
        finally:
            session.host = host_before
            if view is not None:
                view.finish(reply, failure)
        assert call is not None
        if call.was_interrupted or guard.take():
            raise Interrupted(_kept(session, reply))
    return reply


async def _consume(open_stream: OpenStream, view: StreamView | None) -> ChatReply:
    from kani_nb.conversation.session import ChatReply

    reply = None
    async with aclosing(open_stream()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, ChatReply):
                reply = event
            elif view is not None:
                view.feed(event)
    if reply is None:
        raise GenerationError("the conversation's stream ended without a reply")
    return reply


def _kept(session: ChatSession, reply: ChatReply) -> str:
    if reply.turn.id not in session.conversation.turns:
        return "interrupted before the first word; nothing was added to the conversation"
    if not reply.turn.interrupted:
        return "interrupted; the answer was complete and is kept"
    return "interrupted; the answer so far is kept in the conversation"


def prompt_of(body: str) -> str:
    """The prompt that a cell's body is: without blank lines around it, and otherwise as it was typed."""
    lines = body.split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    return "\n".join(lines).rstrip()


def is_blank(prompt: str | Sequence[MessagePart | str]) -> bool:
    """Whether there is nothing to send."""
    return all(isinstance(part, str) and not part.strip() for part in ([prompt] if isinstance(prompt, str) else prompt))
