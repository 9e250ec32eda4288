"""AbacusEngine: says how long each word of the user's last message is, in the base that was asked for."""

import asyncio
import re

from kani_nb import BaseEngine, ChatMessage, Completion, GenerationParams, TextDelta
from kani_nb.engines.base import FinishReason
from kani_nb.errors import ConfigError, PromptTooLongError

_DIGITS = "0123456789abcdef"


class AbacusEngine(BaseEngine):
    """Answers with the lengths of words.

    Args:
        base: of the numbers, 2 to 16.
        max_context_size: words and numbers together.
        generation: of these it obeys `max_new_tokens`.
    """

    def __init__(self, base: int = 10, max_context_size: int = 500, generation: GenerationParams | None = None):
        if not 2 <= base <= len(_DIGITS):
            raise ConfigError(f"base is {base}", why="an abacus has 2 to 16 beads", fix="%load_engine abacus:base=2")
        self.base = base
        self.max_context_size = max_context_size
        self.generation = generation or GenerationParams()

    @classmethod
    def from_config(cls, config):
        """From `%load_engine abacus` or `%load_engine abacus:base=2`."""
        _, _, said = config.model.partition(":")
        name, _, value = said.partition("=")
        if said and (name != "base" or not value.isdigit()):
            raise ConfigError(f"the abacus has no option {said!r}", fix="%load_engine abacus:base=2")
        return cls(int(value or 10), config.max_context_size or 500, config.generation)

    def prompt_len(self, messages, functions=None, **kwargs):
        """Words of all messages, and one for each message."""
        return sum(1 + len(message.text.split()) for message in messages)

    async def stream(self, messages, functions=None, **hyperparams):
        """One number after the other."""
        params = GenerationParams.from_kwargs(hyperparams, self.generation)
        tokens = self.prompt_len(messages)
        room = self.max_context_size - tokens
        if room < 1:
            raise PromptTooLongError(f"the prompt has {tokens} tokens", why=f"{self.max_context_size} fit")
        words = messages[-1].text.split() if messages else []
        limit = min(room, params.max_new_tokens)
        said = []
        for word in words[:limit]:
            await asyncio.sleep(0)
            said.append(" " * bool(said) + self._number(len(re.sub(r"\W", "", word))))
            yield TextDelta(said[-1], len(said))
        reason = FinishReason.LENGTH if len(words) > limit else FinishReason.STOP
        yield Completion(ChatMessage.assistant("".join(said)), tokens, len(said), finish_reason=reason)

    def _number(self, value):
        digits = ""
        while value or not digits:
            value, digit = divmod(value, self.base)
            digits = _DIGITS[digit] + digits
        return digits
