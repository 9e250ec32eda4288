"""EchoEngine: a deterministic engine without a model, for trying things out, for tutorials and for tests.

It answers with the user's last message, word by word, at a speed that can be set. It takes no memory, loads at once,
and obeys the whole contract: it queues, it can be stopped at any word, and it counts its tokens (words with the space
before them).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from kani_nb.config import EngineConfig
from kani_nb.engines.base import BaseEngine, Completion, FinishReason, PrefillProgress, StreamEvent, TextDelta
from kani_nb.engines.kinds import EngineKind
from kani_nb.engines.worker import Slot
from kani_nb.errors import ConfigError, GenerationError, PromptTooLongError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage, ChatRole

_WORD = re.compile(r"\s*\S+|\s+$")


class EchoEngine(BaseEngine):
    """Answers with the user's last message.

    Args:
        max_context_size: tokens (words) of prompt and answer together.
        delay: seconds per word.
        prefill: seconds before the first word.
        reply: say this instead of the user's message.
        fail_after: raise inside the generation after so many words.
        generation: defaults of every answer; of these it obeys `max_new_tokens` and `stop_strings`.

    Raises:
        ConfigError: a negative time.
    """

    kind = EngineKind(
        runs="nothing: it repeats what it is told, for trying things out",
        example="%load_engine echo:delay=0.05",
        install="",
        can=(),
        tested="the contract",
    )

    def __init__(
        self,
        max_context_size: int = 8192,
        *,
        delay: float = 0.0,
        prefill: float = 0.0,
        reply: str | None = None,
        fail_after: int | None = None,
        generation: GenerationParams | None = None,
    ) -> None:
        if delay < 0 or prefill < 0:
            raise ConfigError(f"delay is {delay!r} and prefill {prefill!r}", why="seconds cannot be negative")
        self.max_context_size = max_context_size
        self.delay = delay
        self.prefill = prefill
        self.reply = reply
        self.fail_after = fail_after
        self.generation = generation or GenerationParams()
        self.slot = Slot()

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """From `%load_engine echo` or `%load_engine echo:delay=0.05,prefill=1`.

        Raises:
            ConfigError: an option that is not `delay`, `prefill`, `reply` or `fail_after`, or a bad value.
        """
        options: dict[str, Any] = {}
        kinds = {"delay": float, "prefill": float, "reply": str, "fail_after": int}
        _, _, text = config.model.partition(":")
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            if name not in kinds:
                raise ConfigError(f"EchoEngine has no option {name!r}", fix="%load_engine echo:delay=0.05,prefill=1")
            try:
                options[name] = kinds[name](value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}", why="it must be a number") from None
        return cls(config.max_context_size or 8192, generation=config.generation, **options)

    def prompt_len(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any) -> int:
        """Words of all messages, and one for each message's role."""
        return sum(1 + len(_WORD.findall(message.text)) for message in messages)

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The user's last message, a word at a time.

        Raises:
            ConfigError: an unknown generation parameter.
            PromptTooLongError: no room for an answer.
            GenerationError: `fail_after` words were said.
        """
        params = GenerationParams.from_kwargs(hyperparams, self.generation)
        prompt_tokens = self.prompt_len(messages)
        room = self.max_context_size - prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens:,} tokens", why=f"the context holds {self.max_context_size:,}"
            )
        asked = time.monotonic()
        await self.slot.acquire()
        try:
            yield PrefillProgress(0, prompt_tokens, 0, queued_s=time.monotonic() - asked)
            await asyncio.sleep(self.prefill)
            users = [message.text for message in messages if message.role is ChatRole.USER]
            text = self.reply if self.reply is not None else (users[-1] if users else "")
            ends = [found for stop in params.stop_strings if (found := text.find(stop)) >= 0]
            words = _WORD.findall(text[: min(ends)] if ends else text)
            limit = min(params.max_new_tokens, room)
            said = []
            for number, word in enumerate(words[:limit]):
                if number == self.fail_after:
                    raise GenerationError(f"EchoEngine failed after {number} words", why="fail_after asked for it")
                await asyncio.sleep(self.delay)
                said.append(word)
                yield TextDelta(word, len(said))
            yield Completion(
                ChatMessage.assistant("".join(said)),
                prompt_tokens,
                len(said),
                finish_reason=FinishReason.LENGTH if len(words) > limit else FinishReason.STOP,
            )
        finally:
            self.slot.release()

    def __repr__(self) -> str:
        """The speed and the context."""
        return f"EchoEngine(max_context_size={self.max_context_size}, delay={self.delay}, prefill={self.prefill})"
