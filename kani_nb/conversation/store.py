"""Where conversations are kept: one SQLite file per user, append-only turns, and a journal of running answers.

A turn is written once, together with the head and the end of its journal entry, in one transaction. Several kernels may
use one file: each appends, and nothing is lost. Every call blocks for the length of a small transaction: coroutines
call it with `asyncio.to_thread`. This module does not decide where a turn belongs; that is `tree`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from kani_nb.conversation.database import connect, default_store_path, transaction, translated_errors
from kani_nb.conversation.tool_calls import answered
from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.errors import ConversationError, StoreError

__all__ = ["ConversationStore", "ConversationSummary", "default_store_path"]

#: A journal entry of another machine counts as abandoned when it was not renewed for so long.
STALE_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class ConversationSummary:
    """One conversation in a list; times are seconds since the epoch."""

    id: str
    name: str
    notebook: str
    turns: int
    created_at: float
    updated_at: float


class ConversationStore:
    """The conversations in the file at `path`. Safe from any thread; the file is opened when first used.

    Every method raises `StoreError` when the file cannot be read or written: it is corrupt, of a newer version, locked,
    read-only, or its disk is full.

    Args:
        path: the SQLite file; made when it is not there. By default `default_store_path()`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else default_store_path()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        """Whether the file could be opened."""
        return self._connection is not None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time, with its errors translated."""
        with self._lock, translated_errors(self.path):
            if self._connection is None:
                self._connection = connect(self.path)
                self._recover(self._connection)
            yield self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as connection, transaction(connection):
            yield connection

    def conversations(self, notebook: str | None = None) -> list[ConversationSummary]:
        """Every conversation, or those of one notebook, the latest used first."""
        query = (
            "SELECT c.id, c.name, c.notebook, (SELECT count(*) FROM turns t WHERE t.conversation_id = c.id),"
            " c.created_at, c.updated_at FROM conversations c"
            " WHERE ?1 IS NULL OR c.notebook = ?1 ORDER BY c.updated_at DESC, c.rowid DESC"
        )
        with self._open() as connection:
            rows = connection.execute(query, (_packed(notebook),)).fetchall()
        return [
            ConversationSummary(_unpacked(row[0]), _unpacked(row[1]), _unpacked(row[2]), row[3], row[4], row[5])
            for row in rows
        ]

    def search(self, text: str, notebook: str | None = None) -> set[str]:
        """Ids of the conversations in which somebody said `text`, in whichever case; of one notebook, or of all."""
        # The record is JSON: it narrows the search, and each find is looked at.
        wanted = json.dumps(text, ensure_ascii=False)[1:-1]
        # SQLite folds the case of ASCII alone.
        pattern = "%" + re.sub(r"([%_!])", r"!\1", wanted) + "%" if text.isascii() else "%"
        query = (
            "SELECT t.conversation_id, t.record FROM turns t JOIN conversations c ON c.id = t.conversation_id "
            "WHERE (t.record LIKE ?1 ESCAPE '!' OR typeof(t.record) = 'blob') AND (?2 IS NULL OR c.notebook = ?2)"
        )
        with self._open() as connection:
            rows = connection.execute(query, (pattern, _packed(notebook))).fetchall()
        folded = text.casefold()
        return {
            conversation_id
            for conversation_id, record in rows
            if any(folded in message.text.casefold() for message in _decode_turn(record).messages)
        }

    def load(self, conversation_id: str) -> Conversation:
        """The conversation with all its branches; answers whose process has died meanwhile are in it.

        Raises:
            ConversationError: there is no such conversation.
        """
        with self._open() as connection:
            self._recover(connection)
            query = "SELECT id, name, notebook, system, head, created_at, updated_at FROM conversations WHERE id = ?"
            row = connection.execute(query, (conversation_id,)).fetchone()
            if row is None:
                raise _unknown(conversation_id)
            conversation_id, name, notebook, system, head = (_unpacked(value) for value in row[:5])
            query = "SELECT record FROM turns WHERE conversation_id = ? ORDER BY seq"
            turns = [_decode_turn(record) for (record,) in connection.execute(query, (conversation_id,))]
        by_id = {turn.id: turn for turn in turns}
        return Conversation(conversation_id, name, notebook, system, by_id, head, row[5], row[6])

    def create(self, conversation: Conversation) -> None:
        """Write the conversation, its head, and whichever of its turns are not stored yet."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO conversations (id, notebook, name, system, head, created_at, updated_at)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (id) DO UPDATE SET"
                " notebook = ?2, name = ?3, system = ?4, head = ?5, updated_at = max(updated_at, ?7)",
                (
                    conversation.id,
                    _packed(conversation.notebook),
                    _packed(conversation.name),
                    _packed(conversation.system),
                    conversation.head,
                    conversation.created_at,
                    conversation.updated_at,
                ),
            )
            query = "SELECT id FROM turns WHERE conversation_id = ? AND NOT interrupted"
            stored = {turn_id for (turn_id,) in connection.execute(query, (conversation.id,))}
            for turn in conversation.turns.values():
                if turn.id not in stored:
                    _insert_turn(connection, conversation.id, turn)

    def save_turn(self, conversation_id: str, turn: Turn, head: str | None) -> None:
        """Append `turn`, move the head, and end the turn's journal entry: all in one transaction, or nothing.

        Raises:
            ConversationError: there is no such conversation (another kernel may have deleted it).
        """
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE conversations SET head = ?, updated_at = max(updated_at, ?) WHERE id = ?",
                (head, turn.created_at, conversation_id),
            )
            if not changed.rowcount:
                raise _unknown(conversation_id)
            _insert_turn(connection, conversation_id, turn)

    def set_head(self, conversation_id: str, head: str | None) -> None:
        """Move the head.

        Raises:
            ConversationError: there is no such conversation.
        """
        self._update(conversation_id, "head = ?", head)

    def update(self, conversation_id: str, *, name: str, system: str | None) -> None:
        """Set the name and the system prompt.

        Raises:
            ConversationError: there is no such conversation.
        """
        self._update(conversation_id, "name = ?, system = ?", _packed(name), _packed(system))

    def _update(self, conversation_id: str, assignments: str, *values: Any) -> None:
        with self._transaction() as connection:
            query = f"UPDATE conversations SET {assignments} WHERE id = ?"  # noqa: S608 - constants of this class
            if not connection.execute(query, (*values, conversation_id)).rowcount:
                raise _unknown(conversation_id)

    def delete(self, conversation_id: str) -> None:
        """Remove the conversation and its turns for good.

        Raises:
            ConversationError: there is no such conversation.
        """
        with self._transaction() as connection:
            if not connection.execute("DELETE FROM conversations WHERE id = ?", (conversation_id,)).rowcount:
                raise _unknown(conversation_id)

    def journal(self, conversation_id: str, turn: Turn) -> None:
        """Note a running answer as it is so far. It is no turn yet; `save_turn` or `end_journal` ends the entry.

        Raises:
            ConversationError: there is no such conversation.
        """
        with self._transaction() as connection:
            query = (
                "SELECT (SELECT count(*) FROM conversations WHERE id = ?), (SELECT count(*) FROM turns WHERE id = ?)"
            )
            is_known, is_saved = connection.execute(query, (conversation_id, turn.id)).fetchone()
            if not is_known:
                raise _unknown(conversation_id)
            if not is_saved:
                connection.execute(
                    "INSERT OR REPLACE INTO journal VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (turn.id, conversation_id, _encode_turn(turn), time.time(), _host(), os.getpid(), _started_at()),
                )

    def end_journal(self, turn_id: str) -> None:
        """Forget a running answer: it failed, or nothing of it is to be kept."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM journal WHERE turn_id = ?", (turn_id,))

    def recover(self) -> list[Turn]:
        """Turn the answers whose process has died into interrupted turns, and return those.

        The head moves to such a turn if it still is that turn's parent. Called by itself when the file is opened and
        when a conversation is loaded. An entry without any text is dropped: nothing of an answer was there.
        """
        with self._open() as connection:
            return self._recover(connection)

    def _recover(self, connection: sqlite3.Connection) -> list[Turn]:
        query = "SELECT turn_id, conversation_id, record, written_at, host, pid, process_started_at FROM journal"
        if not any(_is_abandoned(*row[3:]) for row in connection.execute(query).fetchall()):
            return []
        recovered = []
        with transaction(connection):
            for turn_id, conversation_id, record, *owner in connection.execute(query).fetchall():
                if not _is_abandoned(*owner):
                    continue
                turn = replace(_decode_turn(record), interrupted=True)
                if turn.answer is not None and (turn.answer.content or turn.answer.tool_calls):
                    turn = replace(turn, messages=answered(turn.messages))
                    _insert_turn(connection, conversation_id, turn)
                    connection.execute(
                        "UPDATE conversations SET head = ?, updated_at = max(updated_at, ?) WHERE id = ? AND head IS ?",
                        (turn.id, turn.created_at, conversation_id, turn.parent_id),
                    )
                    recovered.append(turn)
                connection.execute("DELETE FROM journal WHERE turn_id = ?", (turn_id,))
        return recovered

    def check_writable(self) -> None:
        """Raise if nothing can be written now; nothing is."""
        with self._transaction():
            pass

    def close(self) -> None:
        """Close the file. Safe to call twice; the next use opens it again."""
        with self._lock, translated_errors(self.path):
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """The path."""
        return f"ConversationStore({str(self.path)!r})"


def _insert_turn(connection: sqlite3.Connection, conversation_id: str, turn: Turn) -> None:
    """Append `turn`. The only row that may be replaced is one that was taken for dead and then ended after all."""
    connection.execute(
        "INSERT INTO turns (id, conversation_id, created_at, interrupted, record) VALUES (?1, ?2, ?3, ?4, ?5)"
        " ON CONFLICT (id) DO UPDATE SET interrupted = ?4, record = ?5 WHERE interrupted",
        (turn.id, conversation_id, turn.created_at, turn.interrupted, _encode_turn(turn)),
    )
    connection.execute("DELETE FROM journal WHERE turn_id = ?", (turn.id,))


def _unknown(conversation_id: str) -> ConversationError:
    return ConversationError(f"there is no conversation {conversation_id!r}", why="it may have been deleted")


def _encode_turn(turn: Turn) -> str | bytes:
    """The turn as JSON; what an engine left in `extra` that JSON cannot hold becomes its repr."""
    record: str | bytes = _packed(json.dumps(turn.to_dict(), ensure_ascii=False, default=repr))
    return record


def _decode_turn(record: str | bytes) -> Turn:
    try:
        return Turn.from_dict(json.loads(_unpacked(record)))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError("a turn in the conversations' store cannot be read", why=repr(error)) from error


def _packed(text: str | None) -> Any:
    """`text` as SQLite can hold it: TEXT where it is valid Unicode, else the bytes that give it back exactly."""
    if text is None:
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _unpacked(value: Any) -> Any:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def _host() -> str:
    return socket.gethostname()


def _started_at(pid: int | None = None) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def _is_abandoned(written_at: float, host: str, pid: int, started_at: float) -> bool:
    """Whether the process that wrote a journal entry is gone. A reused pid is told by its start time."""
    if host != _host():
        return time.time() - written_at > STALE_AFTER_S
    import psutil

    try:
        # The start time is counted from the boot time, which moves a little when the clock is set.
        return abs(_started_at(pid) - started_at) > 2.0 or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
