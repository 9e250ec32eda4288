"""From messages to token ids, by the chat template that a GGUF carries.

A template is a program by a stranger: it runs in jinja2's sandbox, with the functions that transformers gives it. One
that takes no notice of tools gets them in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from kani_nb.engines.described_tools import encode_with_tools, ignores_tools
from kani_nb.engines.huggingface.prompting import template_records
from kani_nb.engines.llamacpp.guard import Guard
from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.errors import PromptError
from kani_nb.messages import ChatMessage


class ChatTemplate:
    """The chat template of a GGUF file.

    Args:
        source: the template; None where the file has none.
        name: of the model, for messages to people.
        vocabulary: of the same file.
        template_kwargs: further variables of the chat template.
    """

    def __init__(
        self, source: str | None, name: str, vocabulary: Vocabulary, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.source = source
        self._name = name
        self._vocabulary = vocabulary
        self._kwargs = dict(template_kwargs or {})

    @cached_property
    def ignores_tools(self) -> bool:
        """Whether the template says nothing of the tools it is given."""
        return ignores_tools(lambda said, tools: self._render(template_records(said), tools))

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The prompt's token ids, ready for the model's answer.

        Raises:
            PromptError: there is no template, or it refuses these messages.
        """
        if not messages:
            raise PromptError("there is no message to answer")
        _ = self._template  # what is wrong with the template itself is said first
        return encode_with_tools(
            lambda said, tools: self.encode_records(template_records(said), tools),
            messages,
            functions,
            lambda: self.ignores_tools,
        )

    def encode_records(self, records: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids of messages that are in the template's own form already.

        Raises:
            PromptError: the template refuses them.
        """
        guard = Guard(self._vocabulary, json.dumps([records, tools], ensure_ascii=False, default=str))
        return guard.encode(self._render(guard.marked(records), guard.marked(tools)), add_special=False)

    def _render(self, records: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        from jinja2 import TemplateError

        variables = {
            **self._vocabulary.special_texts,
            "messages": records,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **self._kwargs,
        }
        try:
            rendered: str = self._template.render(**variables)
        except TemplateError as error:
            spoken = "system" in str(error).lower() and records[0]["role"] == "system"
            raise PromptError(
                f"the chat template of {self._name} refuses these messages",
                why=str(error),
                fix="%chat system --clear, and say it in the first message instead"
                if spoken
                else "%chat history shows the messages; %chat new starts afresh",
            ) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise PromptError(
                f"the chat template of {self._name} failed on these messages", why=f"{type(error).__name__}: {error}"
            ) from error
        return rendered

    @cached_property
    def _template(self) -> Any:
        if self.source is None:
            raise PromptError(
                f"{self._name} has no chat template",
                why="it is a base model, or was converted without one",
                fix="take an instruct variant, or say how a prompt is made: LlamaCppEngine(..., prompt_pipeline=...)",
            )
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            raise PromptError(
                f"the chat template of {self._name} is no template",
                why=f"{error.message}, in line {error.lineno}",
                fix="say how a prompt is made: LlamaCppEngine(..., prompt_pipeline=...)",
            ) from error


def _environment() -> Any:
    """A sandbox with what transformers gives to templates."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which only marks what the model said."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment
