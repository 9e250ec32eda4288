"""Prompts made by a `PromptPipeline` instead of a chat template; see `prompting.ChatTemplate`, whose place this takes.

The user's text stays text here too: what is spelled like a control token is encoded by itself, as long as the pipeline
passes contents through as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from kani_nb.engines.described_tools import encode_with_tools, ignores_tools
from kani_nb.engines.huggingface.prompting import ChatTemplate, check_text, ids_of
from kani_nb.engines.prompts.terminal import check_ended
from kani_nb.errors import PromptError
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage, ChatRole, MediaPart

Pipeline = Callable[[Sequence[ChatMessage], Sequence[Any] | None], Any]

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("(\ue000[0-9]+\ue001)")


class PipelinePrompt:
    """Messages to token ids by a pipeline.

    Args:
        pipeline: gives text, or the records that the tokenizer's chat template reads.
        tokenizer: of the model.
        template: for pipelines that end in records.
    """

    def __init__(self, pipeline: Pipeline, tokenizer: Any, template: ChatTemplate) -> None:
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._template = template

    @cached_property
    def ignores_tools(self) -> bool:
        """Whether the pipeline says nothing of the tools it is given."""
        return ignores_tools(self._pipeline)

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The prompt's token ids.

        Raises:
            PromptError: the pipeline refuses these messages, or gives no prompt.
        """
        return encode_with_tools(
            lambda said, tools: self._encode(said, functions if tools else None),
            messages,
            functions,
            lambda: self.ignores_tools,
        )

    def _encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> list[int]:
        for message in messages:
            if any(isinstance(part, MediaPart) for part in message.parts):
                raise PromptError("a pipeline of text cannot hold images or sound", fix="remove them")
            if message.role is not ChatRole.ASSISTANT:
                check_text(message.text)
        made = check_ended(self._pipeline(messages, functions))
        if isinstance(made, list):
            return self._template.encode_records(made, tool_schemas(functions) or None)
        if not isinstance(made, str):
            raise PromptError(f"the prompt pipeline gave a {type(made).__name__}", why="it must give text or records")
        control = [token for token in self._tokenizer.all_special_tokens if token]
        if any(token in message.text for message in messages for token in control):
            marked = [each.copy_with(content=_MARK.format(number)) for number, each in enumerate(messages)]
            pieces = _MARKS.split(str(self._pipeline(marked, functions)))
            if sorted(pieces[1::2]) == sorted(_MARK.format(number) for number in range(len(messages))):
                return self._encoded(pieces, messages)
        return ids_of(made, self._tokenizer)

    def _encoded(self, pieces: Sequence[str], messages: Sequence[ChatMessage]) -> list[int]:
        """Control tokens in what the pipeline wrote, and none in what stood in the messages."""
        ids = ids_of(pieces[0], self._tokenizer) if pieces[0] else []
        for number, piece in enumerate(pieces[1:], 1):
            is_content = number % 2 == 1
            text = messages[int(piece[1:-1])].text if is_content else piece
            options = {"add_special_tokens": False, "split_special_tokens": is_content}
            ids += self._tokenizer(text, **options)["input_ids"] if text else []
        return ids
