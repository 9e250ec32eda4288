"""A conversation that is kept and changed: one change at a time, in memory and in the store.

What a session is without its rounds. Reading is safe from any thread; how an answer comes about is `session`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kani_nb._watchers import Watchers
from kani_nb.conversation.running_turn import RunningTurn
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.errors import ConversationBusyError, ConversationError, StoreError
from kani_nb.messages import ChatMessage


class KeptConversation:
    """One conversation, in memory and in the store.

    Args:
        conversation: what is continued.
        store: where turns are kept; None keeps them in memory only.
    """

    def __init__(self, conversation: Conversation, store: ConversationStore | None) -> None:
        self._conversation = conversation
        self._store = store
        self._lock = threading.Lock()
        self._is_busy = False
        self._round: RunningTurn | None = None
        self._early_stop = ""
        self._is_in_step = True
        self._watchers = Watchers()
        self._is_deleted = False

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have `changed` called after each change, on the thread that made it; the result ends that."""
        return self._watchers.add(changed)

    @property
    def conversation(self) -> Conversation:
        """The conversation as it is now: immutable, so that it can be kept."""
        return self._conversation

    @property
    def history(self) -> list[ChatMessage]:
        """The messages along the current branch, without the system prompt."""
        return self._conversation.history

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._conversation.system

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns along the current branch."""
        return self._conversation.path()

    @property
    def is_busy(self) -> bool:
        """Whether a round is running."""
        return self._is_busy

    @property
    def is_deleted(self) -> bool:
        """Whether it was deleted for good, and cannot be changed any more."""
        return self._is_deleted

    def mark_deleted(self) -> None:
        """Refuse every change from now on: it would bring the conversation back into the store.

        Raises:
            ConversationBusyError: a round is running.
        """
        with self._changing():
            self._is_deleted = True

    def undo(self, n: int = 1) -> int:
        """Move the head `n` turns up, and return how many it moved (fewer where the branch is shorter).

        As with `switch`, `set_system` and `rename`: where the store cannot be written, the change holds in memory, is
        written with the next round, and the `StoreError` is raised.

        Raises:
            ConversationError: `n` is below 1.
            ConversationBusyError: a round is running.
        """
        with self._changing():
            before = len(self.turns)
            self._conversation = self._conversation.undone(n)
            self._write_head()
            return before - len(self.turns)

    def switch(self, branch_number: int) -> None:
        """Go to the end of another branch, by its number in `conversation.branches()`, from 1.

        Raises:
            ConversationError: there is no such branch.
            ConversationBusyError: a round is running.
        """
        with self._changing():
            self._conversation = self._conversation.moved_to(self._conversation.branch(branch_number).id)
            self._write_head()

    def set_system(self, text: str | None) -> None:
        """Set the system prompt for the rounds to come; None removes it.

        Raises:
            ConversationBusyError: a round is running.
        """
        with self._changing():
            self._conversation = self._conversation.with_system(text)
            self._write_words()

    def rename(self, name: str) -> None:
        """Give the conversation another name.

        Raises:
            ConversationError: the name is empty.
            ConversationBusyError: a round is running.
        """
        if not name.strip():
            raise ConversationError("a conversation needs a name", why="this one is empty")
        with self._changing():
            self._conversation = self._conversation.renamed(name)
            self._write_words()

    def merge(self, stored: Conversation) -> None:
        """Take in the turns that another process has added to the stored conversation; the head stays.

        Raises:
            ConversationBusyError: a round is running.
        """
        with self._changing():
            self._conversation = self._conversation.with_turns_of(stored)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Be the only one that changes the conversation, or be refused at once: another does, or it was deleted."""
        with self._lock:
            if self._is_deleted:
                name = self._conversation.name
                raise ConversationError(f"conversation {name!r} was deleted", fix="%chat new starts another")
            if self._is_busy:
                raise ConversationBusyError(
                    f"conversation {self._conversation.name!r} is answering",
                    why="one round at a time",
                    fix="wait for the answer, or end it with %chat stop",
                )
            self._is_busy = True
            self._early_stop = ""
        try:
            yield
        finally:
            with self._lock:
                self._is_busy = False
                self._round = None
            self._watchers.tell()

    def _write(self, change: Callable[[ConversationStore], None]) -> None:
        """Make `change` in the store, or write the whole conversation where the store has fallen behind."""
        if self._store is None:
            return
        if self._is_in_step:
            self._is_in_step = False
            try:
                change(self._store)
                self._is_in_step = True
            except StoreError:
                raise
            except ConversationError:  # not there yet, or deleted by another kernel
                self._is_in_step = False
        if not self._is_in_step:
            self._store.create(self._conversation)
            self._is_in_step = True

    def _write_head(self) -> None:
        conversation = self._conversation
        self._write(lambda store: store.set_head(conversation.id, conversation.head))

    def _write_words(self) -> None:
        conversation = self._conversation
        self._write(lambda store: store.update(conversation.id, name=conversation.name, system=conversation.system))
