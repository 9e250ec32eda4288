"""Prompts made by a pipeline in the place of a file's chat template; see `template.ChatTemplate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from kani_nb.engines.described_tools import encode_with_tools, ignores_tools
from kani_nb.engines.huggingface.prompting import check_text, template_records
from kani_nb.engines.llamacpp.guard import Guard, encode_prompt
from kani_nb.engines.llamacpp.template import ChatTemplate
from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.engines.prompts.terminal import check_ended
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage, ChatRole

Pipeline = Callable[..., Any]


class PipelinePrompt:
    """Messages to token ids by a pipeline.

    Args:
        pipeline: of `(messages, functions)`; gives text, token ids, or the records that the file's template reads.
        vocabulary: of the file.
        template: for pipelines that end in records.
    """

    def __init__(self, pipeline: Pipeline, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self._pipeline = pipeline
        self._vocabulary = vocabulary
        self._template = template
        self.source = template.source

    @cached_property
    def ignores_tools(self) -> bool:
        """Whether the pipeline says nothing of the tools it is given."""
        return ignores_tools(self._pipeline)

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The prompt's token ids.

        Text that does not begin with the model's beginning-of-sequence token gets it.

        Raises:
            PromptError: a message is not text, or the pipeline refuses them.
        """
        return encode_with_tools(
            lambda said, tools: self._encode(said, functions if tools else None),
            messages,
            functions,
            lambda: self.ignores_tools,
        )

    def _encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> list[int]:
        template_records(messages)  # nothing but text
        texts = [each.text if each.role is ChatRole.ASSISTANT else check_text(each.text) for each in messages]
        guard = Guard(self._vocabulary, "".join(texts))
        guarded = [each.copy_with(text=guard.marked(text)) for each, text in zip(messages, texts, strict=True)]
        prompt = check_ended(self._pipeline(guarded, functions))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return self._template.encode_records(guard.unmarked(prompt), tool_schemas(functions) or None)
        return encode_prompt(prompt, self._vocabulary, guard)
