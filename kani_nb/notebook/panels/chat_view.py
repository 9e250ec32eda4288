"""A conversation as the chat pane shows it: JSON-safe records of its turns, and what stands around them. Pure.

An answer goes out as the text that it is; the front end draws its Markdown. Whatever else is said is made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kani_nb.conversation.store import ConversationSummary
from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.stat_line import stat_line
from kani_nb.notebook.thumbnails import prompt_pictures
from kani_nb.notebook.transcript import StepText, plain, prompt_text, shortened, step_texts
from kani_nb.notebook.turn_text import prompt_of_turn

#: Characters of a call and its result that the pane holds; the conversation has all of it.
_LONGEST_STEP = 4_000


class TurnViews:
    """The turns of one conversation. A turn never changes, so that it is drawn once, its pictures with it."""

    def __init__(self) -> None:
        self._drawn: dict[str, dict[str, Any]] = {}

    def draw(self, conversation: Conversation, first: int = 1) -> list[dict[str, Any]]:
        """The turns of the branch in order, from number `first` on."""
        children: dict[str | None, list[str]] = {}
        for turn in conversation.turns.values():
            children.setdefault(turn.parent_id, []).append(turn.id)
        return [
            {**self._draw(turn), "number": number, "siblings": children[turn.parent_id]}
            for number, turn in enumerate(conversation.path(), 1)
            if number >= first
        ]

    def _draw(self, turn: Turn) -> dict[str, Any]:
        if turn.id not in self._drawn:
            self._drawn[turn.id] = _turn_view(turn)
        return self._drawn[turn.id]


def _turn_view(turn: Turn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "prompt": plain(prompt_text(prompt_of_turn(turn))),
        "pictures": prompt_pictures(prompt_of_turn(turn)),
        "can_edit": isinstance(turn.prompt.content, str),
        "answer": plain(turn.answer.text) if turn.answer is not None else "",
        "reasoning": plain("\n\n".join(filter(None, (each.reasoning for each in turn.messages)))),
        "steps": [step_view(step) for step in step_texts(turn.messages)],
        "model": plain(turn.model) or "Assistant",
        "is_cut": turn.interrupted,
        "stat": stat_line(GenerationMetrics.from_dict(turn.metrics)) if turn.metrics else "",
    }


def step_view(step: StepText) -> dict[str, Any]:
    """One call of a tool."""
    return {
        "line": plain(step.line),
        "said": plain(step.said),
        "arguments": plain(shortened(step.arguments, _LONGEST_STEP)),
        "result": None if step.result is None else plain(shortened(step.result, _LONGEST_STEP)),
        "is_error": step.is_error,
    }


def leaf_below(conversation: Conversation, turn_id: str) -> int:
    """The number of the branch that was last used among those through a turn.

    Raises:
        ConversationError: there is no such turn.
    """
    conversation.path(turn_id)
    parents = {turn.id: turn.parent_id for turn in conversation.turns.values()}

    def is_below(leaf: str) -> bool:
        at: str | None = leaf
        while at is not None and at != turn_id:
            at = parents[at]
        return at is not None

    leaves = conversation.branches()
    return max(number for number, leaf in enumerate(leaves, 1) if is_below(leaf.id))


def around_view(
    conversation: Conversation, *, engine: str, window_tokens: int | None, params: Mapping[str, Any]
) -> dict[str, Any]:
    """What stands around the turns.

    Args:
        conversation: the one that is shown.
        engine: name of the one that answers.
        window_tokens: its longest context.
        params: how answers are generated.
    """
    return {
        "name": plain(conversation.name),
        "system": plain(conversation.system or ""),
        "branches": len(conversation.branches()),
        "engine": plain(engine),
        "context": _context_view(conversation.path(), window_tokens),
        "params": {name: plain(str(value)) for name, value in params.items()},
    }


def _context_view(turns: Sequence[Turn], window_tokens: int | None) -> dict[str, Any]:
    """How full the context is: as the last answer left it."""
    metrics = next((turn.metrics for turn in reversed(turns) if turn.metrics), None)
    used = None
    if metrics is not None:
        used = (metrics.get("prompt_tokens") or 0) + (metrics.get("completion_tokens") or 0)
        window_tokens = metrics.get("max_context_size") or window_tokens
    return {"used": used, "window": window_tokens}


def summary_view(summary: ConversationSummary, current_id: str) -> dict[str, Any]:
    """One entry of the list of conversations."""
    return {
        "name": plain(summary.name),
        "turns": summary.turns,
        "notebook": plain(summary.notebook),
        "updated_at": summary.updated_at,
        "is_current": summary.id == current_id,
    }
