"""What a GGUF engine has before its weights: the file, its vocabulary, and how prompts are made. Each made once.

Several threads may ask at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.huggingface.prompting import AnswerMemory
from kani_nb.engines.json_constraint import JsonConstraint, can_constrain
from kani_nb.engines.llamacpp.files import GgufFiles, GgufRequest, find_gguf
from kani_nb.engines.llamacpp.library import library
from kani_nb.engines.llamacpp.pipeline import Pipeline, PipelinePrompt
from kani_nb.engines.llamacpp.template import ChatTemplate
from kani_nb.engines.llamacpp.vocabulary import Vocabulary


class Prepared:
    """The file, the vocabulary and the prompts of one model.

    Args:
        request: which file.
        pipeline: makes prompts in the place of the file's template.
        template_kwargs: further variables of the chat template.
    """

    def __init__(
        self, request: GgufRequest, pipeline: Pipeline | None, template_kwargs: Mapping[str, Any] | None
    ) -> None:
        self._request = request
        self._pipeline = pipeline
        self._template_kwargs = template_kwargs
        self._lock = threading.RLock()
        self._files: GgufFiles | None = None
        self._vocabulary: Vocabulary | None = None
        self._prompt: ChatTemplate | PipelinePrompt | None = None
        self._memory: AnswerMemory | None = None

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence; empty before they were found."""
        return self._files.origin if self._files is not None else ""

    def files(self, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None) -> GgufFiles:
        """The model's file, downloaded if need be.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        with self._lock:
            if self._files is None:
                self._files = find_gguf(self._request, progress, cancelled)
            return self._files

    def check(self, progress: ProgressCallback | None, cancelled: threading.Event) -> None:
        """Do everything that loading needs and that takes little memory, and refuse what can never be loaded.

        Raises:
            MissingDependencyError: llama-cpp-python is not installed.
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        library()  # before anything is downloaded
        self.files(progress, cancelled)
        if progress is not None:
            progress(LoadProgress("vocabulary", self._request.name))
        self.vocabulary()

    def vocabulary(self) -> Vocabulary:
        """The vocabulary, read anew after `close`."""
        with self._lock:
            if self._vocabulary is None:
                files = self.files()
                self._vocabulary = vocabulary = Vocabulary(files.path)
                source = files.header.metadata.get("tokenizer.chat_template")
                template = ChatTemplate(
                    str(source) if source else None, self._request.name, vocabulary, self._template_kwargs
                )
                self._prompt = (
                    template if self._pipeline is None else PipelinePrompt(self._pipeline, vocabulary, template)
                )
            return self._vocabulary

    def prompt(self) -> ChatTemplate | PipelinePrompt:
        """What makes prompts: the pipeline, or the file's chat template."""
        with self._lock:
            self.vocabulary()
            assert self._prompt is not None
            return self._prompt

    def constraint(self, schema: str | None, eos_ids: Sequence[int] | None = None) -> JsonConstraint | None:
        """What holds an answer to `schema`; None where there is none, or llguidance is not installed.

        Args:
            schema: the JSON schema, as JSON.
            eos_ids: tokens that end the answer; the file's own where None.

        Raises:
            ConfigError: answers cannot be held to it.
        """
        if schema is None or not can_constrain():
            return None
        vocabulary = self.vocabulary()
        return JsonConstraint(vocabulary.guided_tokens, schema, eos_ids or vocabulary.end_ids)

    def memory(self) -> AnswerMemory:
        """The tokens of earlier answers."""
        with self._lock:
            if self._memory is None:
                self._memory = AnswerMemory(self)
            return self._memory

    def close(self) -> None:
        """Free the vocabulary."""
        with self._lock:
            vocabulary, self._vocabulary = self._vocabulary, None
        if vocabulary is not None:
            vocabulary.close()

    # What `AnswerMemory` asks of a tokenizer.

    @property
    def all_special_ids(self) -> list[int]:
        """The tokens that are no text."""
        return self.vocabulary().all_special_ids

    def convert_ids_to_tokens(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        return self.vocabulary().convert_ids_to_tokens(token)
