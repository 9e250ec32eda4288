"""A conversation as an immutable tree of turns, and where a new turn belongs in it.

A node is a turn: the user's message, any tool steps and the answer, so that a round is one node or nothing. The head is
the turn that the next one follows; every way from a root to a leaf is a branch, and no operation removes a turn. This
module is pure: it never looks at a clock but to make a new conversation, and knows nothing of storage or engines.

What always holds (checked whenever a `Conversation` is made):

* the parent of every turn is None or a turn that was added before it, so there are no cycles;
* the head is None (before the first turn) or a turn of the tree;
* so there is exactly one path from a root to each turn.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from kani_nb.errors import ConversationError
from kani_nb.messages import ChatMessage, ChatRole


def new_id() -> str:
    """An id that no other turn or conversation has."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class CellRef:
    """The notebook cell that a turn came from, and which execution of it; None is what the front end did not send."""

    cell_id: str | None = None
    execution_id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One whole round.

    Attributes:
        id: unique in all conversations.
        parent_id: the turn before it, or None for the first one.
        messages: the user's message, any tool steps, and the answer.
        cell: the cell that asked.
        created_at: seconds since the epoch, when it was asked.
        interrupted: the answer was stopped, or its process died.
        model: what answered.
        metrics: `GenerationMetrics.to_dict()`, where known.
    """

    id: str
    parent_id: str | None
    messages: tuple[ChatMessage, ...]
    cell: CellRef = field(default_factory=CellRef)
    created_at: float = 0.0
    interrupted: bool = False
    model: str = ""
    metrics: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Copy what a caller might still change."""
        object.__setattr__(self, "messages", tuple(self.messages))

    @property
    def prompt(self) -> ChatMessage:
        """The user's message; an empty one in an imported turn that has none."""
        return next((each for each in self.messages if each.role is ChatRole.USER), ChatMessage.user(""))

    @property
    def answer(self) -> ChatMessage | None:
        """The model's last message, or None in an imported turn that was never answered."""
        return next((each for each in reversed(self.messages) if each.role is ChatRole.ASSISTANT), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe record."""
        return {
            "id": self.id,
            "parent_id": self.parent_id,
            "messages": [message.to_dict() for message in self.messages],
            "cell": {"cell_id": self.cell.cell_id, "execution_id": self.cell.execution_id},
            "created_at": self.created_at,
            "interrupted": self.interrupted,
            "model": self.model,
            "metrics": self.metrics,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The turn that `to_dict` described.

        Raises:
            ConfigError: a message that cannot be read.
            KeyError, TypeError: the record is not one of `to_dict`.
        """
        cell = record.get("cell") or {}
        return cls(
            record["id"],
            record["parent_id"],
            tuple(ChatMessage.from_dict(message) for message in record["messages"]),
            CellRef(cell.get("cell_id"), cell.get("execution_id")),
            float(record.get("created_at") or 0.0),
            bool(record.get("interrupted")),
            record.get("model") or "",
            record.get("metrics"),
        )


@dataclass(frozen=True)
class Conversation:
    """A tree of turns with a head. Every change gives a new conversation; the old one stays as it was.

    Raises:
        ConversationError: a turn whose parent does not come before it, or a head that is no turn.
    """

    id: str
    name: str
    notebook: str = ""
    system: str | None = None
    turns: Mapping[str, Turn] = field(default_factory=dict, hash=False, repr=False)
    head: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    def __post_init__(self) -> None:
        """Check the invariants."""
        seen: set[str] = set()
        for turn_id, turn in self.turns.items():
            if turn_id != turn.id or (turn.parent_id is not None and turn.parent_id not in seen):
                raise ConversationError(
                    f"turn {turn_id!r} of conversation {self.name!r} has no place",
                    why=f"its parent {turn.parent_id!r} does not come before it",
                )
            seen.add(turn_id)
        if self.head is not None and self.head not in seen:
            raise ConversationError(f"conversation {self.name!r} has no turn {self.head!r}")
        object.__setattr__(self, "turns", MappingProxyType(dict(self.turns)))

    @classmethod
    def new(cls, name: str, notebook: str = "", system: str | None = None) -> Self:
        """An empty conversation."""
        now = time.time()
        return cls(new_id(), name, notebook, system, created_at=now, updated_at=now)

    def path(self, tip: str | None = None) -> tuple[Turn, ...]:
        """The turns from the root to `tip` (the head when None).

        Raises:
            ConversationError: there is no turn `tip`.
        """
        at = self.head if tip is None else tip
        if at is not None and at not in self.turns:
            raise ConversationError(f"conversation {self.name!r} has no turn {at!r}")
        found = []
        while at is not None:
            found.append(self.turns[at])
            at = found[-1].parent_id
        return tuple(reversed(found))

    @property
    def history(self) -> list[ChatMessage]:
        """The messages along the current branch, without the system prompt."""
        return [message for turn in self.path() for message in turn.messages]

    def branches(self) -> tuple[Turn, ...]:
        """The leaves in the order of their creation: branch 1 is the first."""
        parents = {turn.parent_id for turn in self.turns.values()}
        return tuple(turn for turn in self.turns.values() if turn.id not in parents)

    def branch(self, number: int) -> Turn:
        """The leaf of branch `number`, counted from 1.

        Raises:
            ConversationError: there is no such branch.
        """
        leaves = self.branches()
        if not 1 <= number <= len(leaves):
            raise ConversationError(
                f"there is no branch {number}",
                why=f"this conversation has {_count(len(leaves), 'branch', 'branches')}",
                fix="%chat branches",
            )
        return leaves[number - 1]

    def turn_at(self, number: int | None = None) -> Turn:
        """Turn `number` of the current branch, counted from 1; the last one when None.

        Raises:
            ConversationError: there is no such turn.
        """
        path = self.path()
        if number is None and path:
            return path[-1]
        if number is None or not 1 <= number <= len(path):
            what = "there is no turn yet" if number is None else f"there is no turn {number}"
            raise ConversationError(
                what, why=f"this branch has {_count(len(path), 'turn', 'turns')}", fix="%chat history"
            )
        return path[number - 1]

    def place(self, text: str, cell: CellRef, *, append: bool = False) -> str | None:
        """The parent of a new turn that `cell` asks with `text`: cells are turns.

        Without any cell, with `append`, or when this same execution of the cell has already added a turn (a loop), that
        is the head. A cell that is run again replaces what its last execution added: the new turn forks at the parent
        of the first of those turns. Where the front end sends no cell id, a text that equals that of the branch's first
        turn starts again at the root (None), so that Run All repeats the conversation; any other appends.
        """
        if append or cell == CellRef():
            return self.head
        path = self.path()
        ours = [turn for turn in path if turn.cell.cell_id == cell.cell_id]
        if cell.execution_id is not None and any(turn.cell.execution_id == cell.execution_id for turn in ours):
            return self.head
        if cell.cell_id is None:
            return None if path and path[0].prompt.text == text else self.head
        if not ours:
            return self.head
        last = ours[-1]
        if last.cell.execution_id is None:
            return last.parent_id
        return next(turn.parent_id for turn in ours if turn.cell == last.cell)

    def with_turn(self, turn: Turn) -> Conversation:
        """This conversation with `turn`, which becomes the head.

        Raises:
            ConversationError: its parent is not there, or its id is.
        """
        if turn.id in self.turns:
            raise ConversationError(f"conversation {self.name!r} already has a turn {turn.id!r}")
        return replace(
            self,
            turns={**self.turns, turn.id: turn},
            head=turn.id,
            updated_at=max(self.updated_at, turn.created_at),
        )

    def moved_to(self, turn_id: str | None) -> Conversation:
        """This conversation with another head; None is before the first turn.

        Raises:
            ConversationError: there is no such turn.
        """
        return replace(self, head=turn_id)

    def with_turns_of(self, other: Conversation) -> Conversation:
        """This conversation with the turns that only `other` has; the head stays."""
        new = {turn_id: turn for turn_id, turn in other.turns.items() if turn_id not in self.turns}
        return replace(self, turns={**self.turns, **new}) if new else self

    def undone(self, n: int = 1) -> Conversation:
        """This conversation with the head `n` turns up, or before the first turn where there are fewer.

        Raises:
            ConversationError: `n` is below 1.
        """
        if n < 1:
            raise ConversationError(f"cannot undo {n} turns", why="it must be a whole number of at least 1")
        path = self.path()
        return self.moved_to(path[-n - 1].id if n < len(path) else None)

    def with_system(self, text: str | None) -> Conversation:
        """This conversation with another system prompt; None removes it."""
        return replace(self, system=text)

    def renamed(self, name: str) -> Conversation:
        """This conversation under another name."""
        return replace(self, name=name)

    def copied(self) -> Conversation:
        """The same words as another conversation: it and its turns have new ids."""
        ids = {turn_id: new_id() for turn_id in self.turns}
        turns = [
            replace(turn, id=ids[turn.id], parent_id=ids[turn.parent_id] if turn.parent_id is not None else None)
            for turn in self.turns.values()
        ]
        head = ids[self.head] if self.head is not None else None
        return replace(self, id=new_id(), turns={turn.id: turn for turn in turns}, head=head)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe record of everything, all branches included."""
        return {
            "id": self.id,
            "name": self.name,
            "notebook": self.notebook,
            "system": self.system,
            "head": self.head,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "turns": [turn.to_dict() for turn in self.turns.values()],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The conversation that `to_dict` described.

        Raises:
            ConversationError: the turns do not make a tree.
            ConfigError: a message that cannot be read.
            KeyError, TypeError: the record is not one of `to_dict`.
        """
        turns = [Turn.from_dict(each) for each in record["turns"]]
        return cls(
            record["id"],
            record["name"],
            record.get("notebook") or "",
            record.get("system"),
            {turn.id: turn for turn in turns},
            record["head"],
            float(record.get("created_at") or 0.0),
            float(record.get("updated_at") or 0.0),
        )


def replacement_notices(before: Conversation, after: Conversation) -> list[str]:
    """What the person should know of turns that `before` had on its branch, and that the new head of `after` left out.

    The turns that it replaced need no word; those behind them do.
    """
    old, new = before.path(), after.path()
    kept = len(new) - 1
    if kept >= len(old):
        return []
    first, added = old[kept], new[-1]
    replaced = 1
    if first.cell != added.cell and first.cell.cell_id is not None:  # all that the cell's last execution added
        same = [turn.cell == first.cell for turn in old[kept:]]
        replaced = same.index(False) if False in same else len(same)
    notices = []
    is_restart = kept == 0 and added.cell.cell_id is None and added.cell.execution_id is not None
    if is_restart and first.cell != added.cell:
        notices.append(
            "this is the text of turn 1, and this front end does not say which cell asks: the conversation starts over "
            "(%%chat --append adds a turn instead)"
        )
    if kept + replaced < len(old):
        leaves = after.branches()
        where = next(number for number, leaf in enumerate(leaves, 1) if old[-1] in after.path(leaf.id))
        left, last = kept + replaced + 1, len(old)
        turns = f"turn {last} is" if left == last else f"turns {left}-{last} are"
        notices.append(f"{turns} on branch {where} now: %chat branches")
    return notices


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
