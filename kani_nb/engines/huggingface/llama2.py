"""LlamaEngine: LLaMA 2 chat in its own format, and the worked example of an engine on `HuggingEngine`.

A model whose files have no chat template needs two methods at most: `build_prompt`, which turns messages into text (or
token ids), and, in the style of kani 0.x, `message_len`. All the rest, from loading to stopping, is inherited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kani_nb.engines.huggingface.base import HuggingEngine
from kani_nb.engines.kinds import Ability, EngineKind
from kani_nb.engines.prompts import LLAMA2_PIPELINE
from kani_nb.errors import PromptError
from kani_nb.messages import ChatMessage, ChatRole

#: What follows an answer that is not the last: ` </s>`, in at most so many tokens.
_AFTER_ANSWER = 3


class LlamaEngine(HuggingEngine):
    """LLaMA 2 chat, or a model that was taught its format.

    Args:
        model_id: see `HuggingEngine`; the repository of the default is gated.
        strict: refuse conversations in which user and assistant do not take turns, instead of merging messages.
        args, kwargs: see `HuggingEngine`, whose older names are taken too: `use_auth_token`,
            `model_load_kwargs={"load_in_4bit": True}`.
    """

    kind = EngineKind(
        runs="LLaMA 2 chat, and what was taught its format",
        example="%load_engine llama2:meta-llama/Llama-2-7b-chat-hf",
        install="",
        can=(
            Ability.TOOLS,
            Ability.SCHEMAS,
            Ability.LOGPROBS,
            Ability.REUSE,
            Ability.MEMORY,
        ),
        tested="a tiny Llama with such a tokenizer",
    )

    def __init__(
        self, model_id: str = "meta-llama/Llama-2-7b-chat-hf", *args: Any, strict: bool = False, **kwargs: Any
    ) -> None:
        kwargs.setdefault("prompt_pipeline", LLAMA2_PIPELINE)
        super().__init__(model_id, *args, **kwargs)
        self.strict = strict

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> Any:
        """`<s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s><s>[INST] ... [/INST]` as token ids.

        Raises:
            PromptError: with `strict`, the messages do not take turns.
        """
        if self.strict:
            check_turns(messages)
        return super().build_prompt(messages, functions)

    def message_len(self, message: ChatMessage) -> int:
        """Tokens of one message with what the format puts around it, at most; `prompt_len` counts exactly."""
        return len(super().build_prompt([message])) + (_AFTER_ANSWER if message.role is ChatRole.ASSISTANT else 0)


def check_turns(messages: Sequence[ChatMessage]) -> None:
    """Refuse what is not: at most one system message, then user and assistant in turns, the user last.

    Raises:
        PromptError: it is not; the first message out of place is named.
    """
    spoken = messages[1:] if messages and messages[0].role is ChatRole.SYSTEM else messages
    for number, message in enumerate(spoken):
        expected = ChatRole.USER if number % 2 == 0 else ChatRole.ASSISTANT
        if message.role is not expected:
            place = number + 1 + len(messages) - len(spoken)
            raise PromptError(
                f"message {place} is by the {message.role.value}",
                why=f"LLaMA 2 wants user and assistant in turns, and here the {expected.value}'s (strict=True)",
                fix="%chat undo, or load it without strict",
            )
    if not spoken or spoken[-1].role is not ChatRole.USER:
        raise PromptError("the last message is not the user's", why="LLaMA 2 answers only to one (strict=True)")
