"""From token ids to text that can be shown at once: whole characters only, and nothing of a stop string.

A byte-level tokenizer may spread one character over several tokens, and a stop string may begin in one token and end in
another. What cannot be decided yet is held back, and no longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_UNDECIDED = "\ufffd"
#: A character has at most four bytes, so a replacement character that stays longer was really meant.
_MOST_PENDING_TOKENS = 8


class Detokenizer:
    """Text of a growing list of token ids, special tokens left out.

    Each step decodes only a short window: the tokens of the last piece, for the spaces that depend on what stands
    before, and those not shown yet.

    Args:
        tokenizer: with `decode`.
        prompt_ids: what stands before.
        lock: entered for every use of the tokenizer.
        kept_ids: special tokens that are given as text all the same.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int] = (),
        lock: AbstractContextManager[Any] | None = None,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._lock = lock or nullcontext()
        self._kept_ids = kept_ids
        # A few tokens of the prompt settle whether the first word keeps its space.
        self._ids = list(prompt_ids[-4:])
        self._start = 0
        self._shown = len(self._ids)

    def _decode(self, start: int, end: int) -> str:
        with self._lock:
            text: str = self._tokenizer.decode(
                self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if token_id in self._kept_ids:
            return self.finish() + self._kept(token_id)
        self._ids.append(token_id)
        return self._advance(is_final=False)

    def _kept(self, token_id: int) -> str:
        """A special token as text; what follows is decoded as if it stood after it."""
        self._ids.append(token_id)
        self._start = self._shown = len(self._ids)
        with self._lock:
            text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that never became one."""
        return self._advance(is_final=True) if self._shown < len(self._ids) else ""

    def _advance(self, *, is_final: bool) -> str:
        before = self._decode(self._start, self._shown)
        after = self._decode(self._start, len(self._ids))
        is_pending = after.endswith(_UNDECIDED) and len(self._ids) - self._shown < _MOST_PENDING_TOKENS
        if is_pending and not is_final:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        # The window's first tokens decode to the same text both times, whatever stood before them.
        return after[len(before) :] if after.startswith(before) else after


class StopStrings:
    """Cuts a stream of text before the first stop string; the stop string itself is not shown."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """What of `text` (and of what was held back) can be shown now."""
        if not self._stops:
            return text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_found = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
