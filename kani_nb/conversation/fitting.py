"""Fitting a prompt to the model's context: whole oldest turns are left out of it, and it says which.

The conversation itself is never changed: what is dropped here is still in the tree. Only `prompt_len` is asked, and
seldom (at most about log2 of the turns, and two more). Chat templates may raise for a window, and need not grow
monotonically, so the window that is used is always one whose length was counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kani_nb.conversation.tree import Turn
from kani_nb.engines.base import BaseEngine, prompt_len
from kani_nb.errors import PromptError, PromptTooLongError
from kani_nb.generation_params import DEFAULT_MAX_NEW_TOKENS, GenerationParams
from kani_nb.messages import ChatMessage

#: How many windows are tried beyond one that the template refuses.
_MAX_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """What the engine is given.

    Attributes:
        messages: the system prompt, the turns that fit, and the new message.
        prompt_tokens: their length in tokens.
        dropped_turns: how many of the oldest turns were left out.
        notice: what was left out, for people to read; empty when nothing was.
    """

    messages: list[ChatMessage]
    prompt_tokens: int
    dropped_turns: int = 0
    notice: str = ""


async def fit_to_context(
    engine: BaseEngine,
    system: str | None,
    turns: Sequence[Turn],
    pending: Sequence[ChatMessage],
    params: Mapping[str, Any] | None = None,
    functions: Sequence[Any] = (),
) -> FittedPrompt:
    """The longest end of `turns` that leaves room for an answer, with the system prompt before it and `pending` after.

    The room is the `max_new_tokens` that `params` (or the engine's own defaults) ask for, but no more than a quarter of
    the context. An engine whose `max_context_size` is not positive is given everything.

    Raises:
        PromptTooLongError: `pending` (and the system prompt) alone do not fit.
        PromptError: the engine refuses the whole prompt for another reason.
    """
    windows = _Windows(engine, system, turns, pending, list(functions) or None)
    context = engine.max_context_size
    budget = context - reserved_tokens(engine, params or {})
    whole = await windows.length(0)
    if isinstance(whole, PromptError) and not isinstance(whole, PromptTooLongError):
        raise whole
    if isinstance(whole, int) and (context <= 0 or whole <= budget):
        return FittedPrompt(windows.messages(0), whole)

    low, high, length = 0, *await _smallest_usable(windows, budget, context)
    while high - low > 1:  # dropping `low` turns is too little, dropping `high` was counted and fits
        middle = (low + high) // 2
        found = await windows.length(middle)
        if isinstance(found, int) and found <= budget:
            high, length = middle, found
        else:
            low = middle
    saved = f" ({whole - length:,} tokens)" if isinstance(whole, int) else ""
    which = "turn 1" if high == 1 else f"turns 1-{high}"
    notice = f"context: dropped {which} of {len(turns)}{saved} to fit {context:,}"
    return FittedPrompt(windows.messages(high), length, high, notice)


def reserved_tokens(engine: BaseEngine, params: Mapping[str, Any]) -> int:
    """Tokens of the context that are kept free for the answer: what was asked for, at most a quarter, at least one."""
    asked = params.get("max_new_tokens", params.get("max_tokens"))
    if not isinstance(asked, int):
        defaults = getattr(engine, "generation", None)
        asked = defaults.max_new_tokens if isinstance(defaults, GenerationParams) else DEFAULT_MAX_NEW_TOKENS
    return max(1, min(asked, engine.max_context_size // 4))


@dataclass(frozen=True, slots=True)
class _Windows:
    """The prompts that leave out the oldest 0, 1, 2 ... turns."""

    engine: BaseEngine
    system: str | None
    turns: Sequence[Turn]
    pending: Sequence[ChatMessage]
    functions: list[Any] | None = None

    def messages(self, dropped: int) -> list[ChatMessage]:
        head = [ChatMessage.system(self.system)] if self.system else []
        return [*head, *(each for turn in self.turns[dropped:] for each in turn.messages), *self.pending]

    async def length(self, dropped: int) -> int | PromptError:
        """Tokens of the prompt without the oldest `dropped` turns, or why it cannot be made."""
        try:
            return await prompt_len(self.engine, self.messages(dropped), self.functions)
        except PromptError as error:
            return error


async def _smallest_usable(windows: _Windows, budget: int, context: int) -> tuple[int, int]:
    """How many turns the smallest prompt that can be made leaves out, and its length, which fits."""
    refusal: PromptError | None = None
    everything = len(windows.turns)
    for dropped in range(everything, max(everything - _MAX_REFUSALS, -1), -1):
        length = await windows.length(dropped)
        if isinstance(length, int) and length <= budget:
            return dropped, length
        if isinstance(length, int | PromptTooLongError):
            if refusal is None:
                raise _too_long(windows, length, budget, context)
            break
        refusal = refusal or length
    assert refusal is not None
    raise refusal


def _too_long(windows: _Windows, length: int | PromptTooLongError, budget: int, context: int) -> PromptTooLongError:
    if isinstance(length, PromptTooLongError):
        return length
    alone = "the prompt and the system prompt have" if windows.system else "the prompt has"
    return PromptTooLongError(
        f"{alone} {length:,} tokens",
        why=f"the context holds {context:,}, of which {context - budget:,} are kept for the answer",
        fix=f"shorten it by {length - budget:,} tokens, or load the model with a larger --max-context-size, if it can",
    )
