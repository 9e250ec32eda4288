"""What an engine has before its weights: the model's files, its tokenizer, and how prompts are made. Each made once.

Several threads may ask at once. Nothing here takes a device's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.described_tools import with_described_tools
from kani_nb.engines.huggingface.arguments import LoadRequest
from kani_nb.functions import tool_schemas
from kani_nb.hardware.shapes import ModelShape
from kani_nb.messages import ChatMessage, ChatRole, MediaPart

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.model_inputs import ModelInputs
    from kani_nb.engines.huggingface.multimodal import MediaOptions, MediaPrompts
    from kani_nb.engines.huggingface.parsers import ReadBy
    from kani_nb.engines.huggingface.pipeline_prompt import Pipeline, PipelinePrompt
    from kani_nb.engines.huggingface.prompting import AnswerMemory, ChatTemplate
    from kani_nb.engines.json_constraint import JsonConstraint


class Prepared:
    """The files, the tokenizer and the chat template of one model.

    Args:
        asked: what to load.
        template_kwargs: further variables of the chat template.
        pipeline: makes prompts instead of the chat template.
        media: how images and sound are read.

    Attributes:
        tokenizer_lock: entered for every use of the tokenizer: encoding user text changes its settings for a moment.
        shape: what the model is made of; None before `check`, or where only its own code could say.
    """

    def __init__(
        self,
        asked: LoadRequest,
        template_kwargs: dict[str, Any],
        pipeline: Pipeline | None = None,
        media: MediaOptions | None = None,
    ) -> None:
        self.tokenizer_lock = threading.RLock()
        self.shape: ModelShape | None = None
        self._asked = asked
        self._template_kwargs = template_kwargs
        self._pipeline = pipeline
        self._media = media
        self._media_prompts: MediaPrompts | None = None
        self._tokens: Any = None  # the vocabulary, as constraints read it
        self._lock = threading.Lock()
        self._request: LoadRequest | None = None
        self._tokenizer: Any = None
        self._template: ChatTemplate | PipelinePrompt | None = None
        self._memory: AnswerMemory | None = None

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence; empty before they were found."""
        return self._request.origin if self._request is not None else ""

    def request(
        self, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None
    ) -> LoadRequest:
        """What to load, its files found, and downloaded if need be.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        with self._lock:
            if self._request is None:
                from kani_nb.engines import sources

                asked = self._asked
                source = sources.resolve(
                    asked.name,
                    revision=asked.revision,
                    local_only=asked.local_only,
                    allow_pickle=asked.allow_pickle,
                    token=asked.token,
                    progress=progress,
                    cancelled=cancelled,
                )
                self._request = replace(asked, folder=source.folder, gguf_file=source.gguf_file, origin=source.origin)
            return self._request

    def check(self, report: ProgressCallback, cancelled: threading.Event) -> None:
        """Do everything that loading needs and that takes no device's memory, and refuse what can never be loaded.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError, DoesNotFitError: as their names say.
        """
        from kani_nb.engines.huggingface.loading import context_of
        from kani_nb.engines.huggingface.placing import choose_placing

        request = self.request(report, cancelled)
        report(LoadProgress("tokenizer", request.name))
        self.tokenizer()
        config = self.config()
        context_of(config, request.max_context_size, request.name)
        # Another engine may still hold the memory that this one will have: only what can never fit is refused now.
        self.shape = choose_placing(request, config, shape=self.shape, is_empty=True).shape

    def config(self) -> Any:
        """The model's configuration.

        Raises:
            ModelFilesError: it is missing, broken, or of an architecture that this transformers does not know.
        """
        from kani_nb.engines.huggingface.loading import load_config

        return load_config(self.request())

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        request = self.request()
        with self._lock:
            if self._tokenizer is None:
                from kani_nb.engines.huggingface.loading import load_tokenizer
                from kani_nb.engines.huggingface.prompting import AnswerMemory, ChatTemplate

                tokenizer, pipeline = load_tokenizer(request), self._pipeline
                if getattr(tokenizer, "chat_template", None) is None and pipeline is None:
                    pipeline = self._find_format(tokenizer, request)
                template = ChatTemplate(tokenizer, request.name, self._template_kwargs)
                self._template = template
                if pipeline is not None:
                    from kani_nb.engines.huggingface.pipeline_prompt import PipelinePrompt

                    self._template = PipelinePrompt(pipeline, tokenizer, template)
                self._memory = AnswerMemory(tokenizer)
                self._tokenizer = tokenizer
            return self._tokenizer

    def _find_format(self, tokenizer: Any, request: LoadRequest) -> Pipeline | None:
        """Where a tokenizer has no chat template: the processor's, or plain text for an encoder."""
        from kani_nb.engines.huggingface.loading import load_config
        from kani_nb.engines.huggingface.multimodal import load_processor, media_of

        config = load_config(request)
        if getattr(config, "is_encoder_decoder", False):
            return lambda messages, _: "\n".join(message.text for message in messages)
        if media_of(config):
            tokenizer.chat_template = getattr(load_processor(request), "chat_template", None)
        return None

    def memory(self) -> AnswerMemory:
        """The tokens of earlier answers."""
        self.tokenizer()
        assert self._memory is not None
        return self._memory

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> list[int] | ModelInputs:
        """The prompt as token ids, by the model's chat template or the pipeline; with media, what the processor makes.

        Raises:
            PromptError: it refuses these messages, or there is none.
        """
        self.tokenizer()
        assert self._template is not None
        if any(isinstance(part, MediaPart) for message in messages for part in message.parts):
            from kani_nb.engines.huggingface.multimodal import MediaOptions, MediaPrompts, media_of

            config = self.config()
            if media_of(config) and self._pipeline is None:
                if self._media_prompts is None:
                    options = self._media or MediaOptions()
                    self._media_prompts = MediaPrompts(self.request(), config, options, self._template_kwargs)
                tools = tool_schemas(functions)
                has_calls = any(each.tool_calls or each.role is ChatRole.FUNCTION for each in messages)
                if (tools or has_calls) and self._template.ignores_tools:
                    messages, functions = with_described_tools(messages, tools), None
                return self._media_prompts.encode(messages, functions)
        return self._template.encode(messages, functions)

    def constraint(self, schema: str | None, eos_ids: Sequence[int], vocab_size: int) -> JsonConstraint | None:
        """What holds an answer to a JSON schema; None where nothing was asked for, or nothing can.

        Raises:
            ConfigError: no answer can be held to this schema.
        """
        from kani_nb.engines.json_constraint import JsonConstraint, can_constrain

        tokenizer = self.tokenizer()
        if schema is None or not can_constrain() or not getattr(tokenizer, "is_fast", False):
            return None
        with self.tokenizer_lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                self._tokens = from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)))
            return JsonConstraint(self._tokens, schema, eos_ids)

    def forget_media(self) -> None:
        """Drop the tensors of the latest prompts with media."""
        if self._media_prompts is not None:
            self._media_prompts.forget()

    @property
    def ignores_tools(self) -> bool:
        """Whether the chat template says nothing of tools, so that they are described in words."""
        self.tokenizer()
        assert self._template is not None
        return self._template.ignores_tools

    def reader(self, prompt_ids: Sequence[int], functions: Sequence[Any] | None) -> ReadBy | None:
        """What takes an answer to this prompt apart; None where it is just text."""
        from kani_nb.engines.huggingface.parsers import reader_for

        tokenizer = self.tokenizer()
        with self.tokenizer_lock:
            return reader_for(tokenizer, prompt_ids, functions)
