"""Answers that cannot be anything but JSON of a schema: which tokens may come next, by llguidance.

Made for one tokenizer and one answer. Without llguidance there is none, and what is answered is only checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from kani_nb.errors import ConfigError


def can_constrain() -> bool:
    """Whether the library is there."""
    return importlib.util.find_spec("llguidance") is not None


def why_not_held(schema: str) -> str:
    """Why no answer can be held to this JSON schema; empty where one can."""
    if not can_constrain():
        return "llguidance is not installed"
    import llguidance

    try:
        problem: str = llguidance.LLMatcher.validate_grammar(_grammar(schema))
    except ValueError as error:
        problem = str(error)
    return problem.splitlines()[0][:200] if problem else ""


def _grammar(schema: str) -> Any:
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


class JsonConstraint:
    """The tokens that may come next.

    Args:
        tokens: the model's vocabulary, as llguidance reads it.
        schema: the JSON schema, as JSON.
        eos_ids: tokens that end the answer, allowed when the JSON is whole.

    Raises:
        ConfigError: llguidance cannot hold an answer to this schema.
    """

    def __init__(self, tokens: Any, schema: str, eos_ids: Sequence[int]) -> None:
        import llguidance
        import llguidance.numpy

        self._eos_ids = list(eos_ids)
        self._size = int(tokens.vocab_size)
        self._matcher = llguidance.LLMatcher(tokens, _grammar(schema))
        if problem := self._matcher.get_error():
            raise ConfigError("answers cannot be held to this schema", why=problem.splitlines()[0][:200])
        self._bits = llguidance.numpy.allocate_token_bitmask(1, self._size)

    def allowed(self) -> Any:
        """Which of the vocabulary's tokens may come next, `(V,) bool` in NumPy."""
        import llguidance.numpy
        import numpy as np

        if self._matcher.is_stopped():
            allowed = np.zeros(self._size, dtype=bool)
        else:
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
            allowed = np.unpackbits(self._bits.view(np.uint8).ravel(), bitorder="little")[: self._size].astype(bool)
        known = [token for token in self._eos_ids if token < self._size]
        allowed[known] = self._matcher.is_stopped() or self._matcher.is_accepting()
        return allowed

    @property
    def is_whole(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Go on with `token`, which was chosen."""
        if token not in self._eos_ids and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
