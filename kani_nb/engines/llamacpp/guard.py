"""What people and tools say never becomes a control token.

Where a text spells one, it is marked before a template or a pipeline sees it, and encoded as text afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.errors import PromptError

_PRIVATE = range(0xE000, 0xF8FF)


class Guard:
    """Marks control tokens that a text spells, and encodes what was rendered from marked texts.

    Args:
        vocabulary: whose control tokens these are.
        texts: everything that will be rendered; the mark is a character that does not occur in it.
    """

    def __init__(self, vocabulary: Vocabulary, texts: str) -> None:
        self._vocabulary = vocabulary
        self._controls = vocabulary.control_texts
        self._mark = next(chr(code) for code in _PRIVATE if chr(code) not in texts)

    def marked(self, value: Any) -> Any:
        """`value` with a mark inside every control token that its strings spell; lists and dicts in depth."""
        if isinstance(value, str):
            if self._controls is None:
                return value
            return self._controls.sub(lambda found: f"{found[0][0]}{self._mark}{found[0][1:]}", value)
        if isinstance(value, Mapping):
            return {name: each if name == "role" else self.marked(each) for name, each in value.items()}
        return [self.marked(each) for each in value] if isinstance(value, list | tuple) else value

    def unmarked(self, value: Any) -> Any:
        """`value` as it was before `marked`."""
        if isinstance(value, str):
            return value.replace(self._mark, "")
        if isinstance(value, Mapping):
            return {name: self.unmarked(each) for name, each in value.items()}
        return [self.unmarked(each) for each in value] if isinstance(value, list | tuple) else value

    def encode(self, rendered: str, *, add_special: bool) -> list[int]:
        """The ids of a rendered text: what was marked as text, the rest with its control tokens."""
        ids: list[int] = []
        pieces = self._split(rendered)
        for number, (piece, is_text) in enumerate(pieces):
            first = add_special and number == 0
            ids += self._vocabulary.encode(piece, special=not is_text, add_special=first) if piece else []
        return ids

    def _split(self, rendered: str) -> list[tuple[str, bool]]:
        if self._mark not in rendered:
            return [(rendered, False)]
        pieces: list[tuple[str, bool]] = []
        rest = 0
        for found in re.finditer(re.escape(self._mark), rendered):
            at = found.start()
            whole = self._controls.match(rendered[max(rest, at - 1) : at] + rendered[at + 1 : at + 256])  # type: ignore[union-attr]
            if at <= rest or whole is None:  # the template took it apart
                continue
            pieces += [(rendered[rest : at - 1], False), (whole[0], True)]
            rest = at + len(whole[0])
        pieces.append((rendered[rest:], False))
        return [(piece.replace(self._mark, ""), is_text) for piece, is_text in pieces]


def encode_prompt(prompt: Any, vocabulary: Vocabulary, guard: Guard | None = None) -> list[int]:
    """The token ids of a prompt as text, or as ids already.

    Raises:
        PromptError: it is neither.
    """
    if isinstance(prompt, str):
        has_bos = prompt.startswith(vocabulary.special_texts.get("bos_token", "\0"))
        return (guard or Guard(vocabulary, prompt)).encode(prompt, add_special=not has_bos)
    try:
        return [int(token) for token in prompt]
    except (TypeError, ValueError):
        raise PromptError(
            f"the prompt is a {type(prompt).__name__}", why="it must be text, or a list of token ids"
        ) from None
