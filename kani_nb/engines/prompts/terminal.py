"""The steps that end a prompt pipeline: one string, or the dicts that chat templates and APIs are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from kani_nb.engines.prompts.base import PipelineStep, check_function, check_text
from kani_nb.errors import PromptError
from kani_nb.messages import ChatMessage, ChatRole

Transform = Callable[[ChatMessage], Any]


@dataclass(frozen=True, kw_only=True)
class ConversationFmt(PipelineStep):
    """One string, each message between the prefix and suffix of its role."""

    name: ClassVar[str] = "conversation_fmt"
    is_terminal: ClassVar[bool] = True
    prefix: str = ""
    sep: str = ""
    suffix: str = ""
    generation_suffix: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    assistant_suffix: str = ""
    assistant_suffix_if_last: str | None = None
    system_prefix: str = ""
    system_suffix: str = ""
    function_prefix: str | None = None
    function_suffix: str | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        maybe = ("assistant_suffix_if_last", "function_prefix", "function_suffix")
        check_text(self.name, **{name: given.pop(name) for name in maybe})
        check_text(self.name, optional=False, **given)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> str:
        """See `PipelineStep.execute`."""
        around = {
            ChatRole.USER: (self.user_prefix, self.user_suffix),
            ChatRole.ASSISTANT: (self.assistant_prefix, self.assistant_suffix),
            ChatRole.SYSTEM: (self.system_prefix, self.system_suffix),
            ChatRole.FUNCTION: (
                self.user_prefix if self.function_prefix is None else self.function_prefix,
                self.user_suffix if self.function_suffix is None else self.function_suffix,
            ),
        }
        said = []
        for message in msgs:
            before, after = around[message.role]
            said.append(f"{before}{message.text}{after}")
        if msgs and msgs[-1].role is ChatRole.ASSISTANT and self.assistant_suffix_if_last is not None:
            # The model goes on with an answer that it began: nothing may end it, or begin another.
            said[-1] = f"{self.assistant_prefix}{msgs[-1].text}{self.assistant_suffix_if_last}"
        else:
            said.append(self.generation_suffix)
        return self.prefix + self.sep.join(said) + self.suffix

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return "Write the messages as one string"

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        has_own = self.function_prefix is not None or self.function_suffix is not None
        cases = ["function_call"] if has_own else []
        return frozenset([*cases, *(["end_on_assistant"] if self.assistant_suffix_if_last is not None else [])])


@dataclass(frozen=True, kw_only=True)
class ConversationDict(PipelineStep):
    """A dict with `role` and `content` for each message, and what else `additional_keys` gives."""

    name: ClassVar[str] = "conversation_dict"
    is_terminal: ClassVar[bool] = True
    system_role: str = "system"
    user_role: str = "user"
    assistant_role: str = "assistant"
    function_role: str = "tool"
    content_transform: Transform | None = None
    additional_keys: Callable[[ChatMessage], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        roles = {each.name: getattr(self, each.name) for each in fields(self) if each.name.endswith("_role")}
        check_text(self.name, optional=False, **roles)
        for name in ("content_transform", "additional_keys"):
            check_function(getattr(self, name), 1, f"conversation_dict({name}=)", optional=True)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[dict[str, Any]]:
        """See `PipelineStep.execute`.

        Raises:
            PromptError: `additional_keys` gave something else than a dict.
        """
        roles = {
            ChatRole.SYSTEM: self.system_role,
            ChatRole.USER: self.user_role,
            ChatRole.ASSISTANT: self.assistant_role,
            ChatRole.FUNCTION: self.function_role,
        }
        content = self.content_transform or text_or_none
        return [{"role": roles[each.role], "content": content(each), **self._more(each)} for each in msgs]

    def _more(self, message: ChatMessage) -> Mapping[str, Any]:
        more = {} if self.additional_keys is None else self.additional_keys(message)
        if not isinstance(more, Mapping):
            raise PromptError(f"additional_keys gave {more!r}", why="it must give a dict", fix="return {} for no keys")
        return more

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return "Write each message as a dict with role and content"

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        return frozenset({"function_call"})


def text_or_none(message: ChatMessage) -> str | None:
    """The message's text; None where it has no content at all, as APIs want it of a bare tool call."""
    return None if message.content is None else message.text


def check_ended(made: Any) -> Any:
    """What a pipeline made, if it is a prompt and not messages still.

    Raises:
        PromptError: no step of the pipeline ends it.
    """
    if isinstance(made, ChatMessage) or (
        isinstance(made, list) and any(isinstance(each, ChatMessage) for each in made)
    ):
        raise PromptError(
            "the prompt pipeline gives messages, and no prompt",
            why="none of its steps ends it",
            fix="end it with .conversation_fmt(...) or .conversation_dict()",
        )
    return made
