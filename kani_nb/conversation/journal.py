"""The journal of one running answer: what has come so far is in the store at most a second later.

Writes happen in a thread, one at a time, and never hold up the answer. This module does not commit: the turn itself
ends its entry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.errors import ConversationError, StoreError

#: Between two writes. Below a second, so that with the write itself no more than a second of text is ever lost.
INTERVAL_S = 0.7

#: A silent engine's entry is renewed so often, so that no other machine takes it for abandoned.
RENEWAL_S = 15.0


class Journal:
    """Writes one answer as it grows, from its first text on. Used on one event loop.

    Args:
        store: where it is written; None writes nothing.
        conversation: what is answered; made in the store if it is not there.
        draft: gives the turn so far.

    Attributes:
        problems: why the journal could not be written, for the person to read.
    """

    def __init__(self, store: ConversationStore | None, conversation: Conversation, draft: Callable[[], Turn]) -> None:
        self._store = store
        self._conversation = conversation
        self._draft = draft
        self._has_ended = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self.problems: tuple[str, ...] = ()

    def begin(self) -> None:
        """Start writing. Calling it again does nothing."""
        if self._store is not None and self._writer is None:
            self._writer = asyncio.create_task(self._write_on(self._store), name="kani-nb-journal")

    async def _write_on(self, store: ConversationStore) -> None:
        written: Turn | None = None
        written_at = 0.0
        while not self._has_ended.is_set():
            draft = self._draft()
            if draft != written or time.monotonic() - written_at > RENEWAL_S:
                try:
                    await asyncio.to_thread(self._write, store, draft)
                except StoreError as error:
                    self.problems = (f"the running answer could not be journalled: {error}",)
                    return
                written, written_at = draft, time.monotonic()
            try:
                await asyncio.wait_for(self._has_ended.wait(), INTERVAL_S)
            except TimeoutError:
                continue

    def _write(self, store: ConversationStore, draft: Turn) -> None:
        try:
            store.journal(self._conversation.id, draft)
        except StoreError:
            raise
        except ConversationError:  # not there yet, or deleted by another kernel
            store.create(self._conversation)
            store.journal(self._conversation.id, draft)

    async def end(self) -> None:
        """Write no more; returns when no write is under way."""
        self._has_ended.set()
        if self._writer is not None:
            await asyncio.wait({self._writer})

    async def discard(self) -> None:
        """Write no more, and forget what was written."""
        await self.end()
        if self._store is not None and self._writer is not None:
            try:
                await asyncio.to_thread(self._store.end_journal, self._draft().id)
            except StoreError as error:
                self.problems = (f"the journal of this answer could not be ended: {error}",)
