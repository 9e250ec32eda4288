"""The steps of a prompt pipeline that give messages again: kani's, with its names and arguments.

Messages go in and messages come out, and none of them is ever changed. The two exceptions give whatever the caller's
function gives: `Apply` and `MacroApply`. What ends a pipeline is in `terminal`.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kani_nb.engines.prompts.base import (
    FilteredStep,
    PipelineStep,
    accepts,
    check_function,
    check_text,
    checked_role,
)
from kani_nb.errors import ConfigError, PromptError
from kani_nb.messages import ChatMessage, ChatRole, Content, MessagePart, ToolCall


@dataclass(frozen=True)
class ApplyContext:
    """Where a message stands in the prompt, for the functions given to `apply`."""

    msg: ChatMessage
    is_last: bool
    idx: int
    messages: Sequence[ChatMessage]
    functions: Sequence[Any]

    @property
    def is_last_of_type(self) -> bool:
        """Whether no later message has the same role."""
        return all(later.role is not self.msg.role for later in self.messages[self.idx + 1 :])


@dataclass(frozen=True, kw_only=True)
class TranslateRole(FilteredStep):
    """Gives the matching messages another role."""

    name: ClassVar[str] = "translate_role"
    to: ChatRole
    warn: str | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        super().__post_init__()
        object.__setattr__(self, "to", checked_role(self.to, "translate_role(to=)"))
        check_text(self.name, warn=self.warn)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`; warns once where there is something to translate."""
        found = [self.matches(each) for each in msgs]
        if self.warn and any(found):
            warnings.warn(self.warn, stacklevel=4)  # the line that called the pipeline
        return [each.copy_with(role=self.to) if hit else each for each, hit in zip(msgs, found, strict=True)]

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return f"Give all {self.described()} the role {self.to}"


@dataclass(frozen=True, kw_only=True)
class Wrap(FilteredStep):
    """Puts text before and after the matching messages."""

    name: ClassVar[str] = "wrap"
    prefix: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        super().__post_init__()
        check_text(self.name, prefix=self.prefix, suffix=self.suffix)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`."""
        return [wrapped(each, self.prefix, self.suffix) if self.matches(each) else each for each in msgs]

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        around = [f"{text!r} {where}" for text, where in ((self.prefix, "before"), (self.suffix, "after")) if text]
        return f"Put {' and '.join(around) or 'nothing around'} each of the {self.described()}"


@dataclass(frozen=True, kw_only=True)
class MergeConsecutive(FilteredStep):
    """Makes one message of matching messages that follow each other.

    The first gives the name, the extra and (by default) the role; tool calls are put together, and the id of the call
    that a message answers is dropped. A `sep` leaves a message that stands alone as it is; a `joiner` is given it too.

    Raises:
        ConfigError: both or neither of `sep` and `joiner`, or several roles and no `out_role`.
    """

    name: ClassVar[str] = "merge_consecutive"
    sep: str | None = None
    joiner: Callable[[list[ChatMessage]], Content | list[MessagePart | str]] | None = None
    out_role: ChatRole | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        super().__post_init__()
        check_text(self.name, sep=self.sep)
        check_function(self.joiner, 1, "merge_consecutive(joiner=)", optional=True)
        if (self.sep is None) == (self.joiner is None):
            given = "neither" if self.sep is None else "both"
            raise ConfigError(f"merge_consecutive has {given} of sep and joiner", fix="give one of the two")
        if self.out_role is not None:
            object.__setattr__(self, "out_role", checked_role(self.out_role, "merge_consecutive(out_role=)"))
        elif len(self.roles) == 1:
            object.__setattr__(self, "out_role", self.roles[0])
        else:
            raise ConfigError(
                "merge_consecutive has no out_role",
                why=f"messages of {len(self.roles)} roles can be merged into one",
                fix="add out_role=ChatRole.USER, or one role= to merge",
            )

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`."""
        made: list[ChatMessage] = []
        for is_match, group in itertools.groupby(msgs, key=self.matches):
            together = list(group)
            if not is_match or (self.joiner is None and len(together) == 1):
                made += together
            else:
                made.append(self._merged(together))
        return made

    def _merged(self, together: list[ChatMessage]) -> ChatMessage:
        calls = None
        if any(each.tool_calls is not None for each in together):
            calls = tuple(call for each in together for call in each.tool_calls or ())
        if self.joiner is not None:
            content = _checked_content(self.joiner(list(together)))
        else:
            content = _joined(together, self.sep or "")
        return together[0].copy_with(role=self.out_role, content=content, tool_calls=calls, tool_call_id=None)

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        how = f"with {self.sep!r} between them" if self.joiner is None else "as the given function joins them"
        return f"Merge consecutive {self.described()} into one {self.out_role} message, {how}"

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        several = {
            ChatRole.USER: "consecutive_user",
            ChatRole.ASSISTANT: "consecutive_assistant",
            ChatRole.SYSTEM: "consecutive_system",
            ChatRole.FUNCTION: "multi_function_call",
        }
        return super().example_cases() | {several[role] for role in self.roles}


@dataclass(frozen=True, kw_only=True)
class FunctionCallFmt(PipelineStep):
    """Appends the tool calls that a message asks for to its text."""

    name: ClassVar[str] = "function_call_fmt"
    func: Callable[[ToolCall], str | None]
    prefix: str = "\n"
    sep: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        """Check each value once, here."""
        check_function(self.func, 1, "function_call_fmt's function")
        check_text(self.name, optional=False, prefix=self.prefix, sep=self.sep, suffix=self.suffix)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`.

        Raises:
            PromptError: the function gave something else than text or None.
        """
        return [self._with_calls(each) if each.tool_calls else each for each in msgs]

    def _with_calls(self, message: ChatMessage) -> ChatMessage:
        said = [text for call in message.tool_calls or () if (text := self.func(call)) is not None]
        for text in said:
            if not isinstance(text, str):
                raise PromptError(
                    f"function_call_fmt's function gave {text!r}", why="a call is written as text, or None to skip it"
                )
        return wrapped(message, None, f"{self.prefix}{self.sep.join(said)}{self.suffix}") if said else message

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return (
            f"Append {self.prefix!r}, each tool call as the given function writes it (with {self.sep!r} between them) "
            f"and {self.suffix!r} to each message with tool calls"
        )

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        return frozenset({"function_call", *(["multi_function_call"] if self.sep else [])})


@dataclass(frozen=True, kw_only=True)
class Remove(FilteredStep):
    """Leaves the matching messages out."""

    name: ClassVar[str] = "remove"

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`."""
        return [each for each in msgs if not self.matches(each)]

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return f"Leave out all {self.described()}"


@dataclass(frozen=True, kw_only=True)
class EnsureStart(FilteredStep):
    """Leaves out all messages before the first that matches; all, where none does."""

    name: ClassVar[str] = "ensure_start"

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`."""
        return list(itertools.dropwhile(lambda each: not self.matches(each), msgs))

    def measure(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """All of them: a message that is measured is not the first of its conversation."""
        return msgs

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return f"Leave out what comes before the first of the {self.described()}"


@dataclass(frozen=True, kw_only=True)
class EnsureBoundFunctionCalls(PipelineStep):
    """Binds each function's result to the call that asked for it, and drops results that nobody asked for."""

    name: ClassVar[str] = "ensure_bound_function_calls"
    id_translator: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        check_function(self.id_translator, 1, "ensure_bound_function_calls(id_translator=)", optional=True)

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """See `PipelineStep.execute`.

        Raises:
            PromptError: a call has no result, or a result without an id could belong to several calls.
        """
        pending: dict[str, str] = {}  # the id of each call without a result, and its function's name, in their order
        made = []
        for message in msgs:
            if message.role is not ChatRole.FUNCTION:
                if pending:
                    raise PromptError(
                        f"a {message.role} message comes before the result of {_calls(pending)}",
                        why="every tool call must be followed by a function message with its result",
                    )
                if message.role is ChatRole.ASSISTANT:
                    pending = {call.id: call.function.name for call in message.tool_calls or ()}
                made.append(message)
            elif message.tool_call_id is not None:
                # One whose call was left out of the context, with what is always kept before it, says nothing.
                if pending.pop(message.tool_call_id, None) is not None:
                    made.append(message)
            elif len(pending) > 1:
                raise PromptError(
                    f"the result of {message.name or 'a function'} has no tool_call_id",
                    why=f"it could belong to {_calls(pending)}",
                    fix="ChatMessage.function(name, result, tool_call_id)",
                )
            else:
                made.append(message.copy_with(tool_call_id=pending.popitem()[0]) if pending else message)
        return self.measure(made, functions)

    def measure(self, msgs: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
        """The messages with their ids translated; none is dropped because it was taken out of its conversation."""
        if self.id_translator is None:
            return msgs
        return [self._translated(each) for each in msgs]

    def _translated(self, message: ChatMessage) -> ChatMessage:
        changes: dict[str, Any] = {}
        if message.tool_calls is not None:
            changes["tool_calls"] = tuple(replace(call, id=self._new_id(call.id)) for call in message.tool_calls)
        if message.tool_call_id is not None:
            changes["tool_call_id"] = self._new_id(message.tool_call_id)
        return message.copy_with(**changes) if changes else message

    def _new_id(self, old: str) -> str:
        assert self.id_translator is not None
        new = self.id_translator(old)
        if not isinstance(new, str):
            raise PromptError(f"id_translator gave {new!r} for {old!r}", why="the id of a tool call is text")
        return new

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        also = "" if self.id_translator is None else ", and translate the ids"
        return f"Bind each function's result to its call{also}"

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        return frozenset({"function_call"})


@dataclass(frozen=True, kw_only=True)
class Apply(FilteredStep):
    """Puts what a function gives for each matching message in its place; nothing where it gives None."""

    name: ClassVar[str] = "apply"
    func: Callable[[ChatMessage], Any] | Callable[[ChatMessage, ApplyContext], Any]

    def __post_init__(self) -> None:
        """Check each value once, here."""
        super().__post_init__()
        check_function(self.func, 2 if self._wants_context() else 1, "apply's function")

    def _wants_context(self) -> bool:
        # As in kani: `f(*args)` is a function of one argument, `f(msg, other=1)` one of two.
        return accepts(self.func, 2) is True and len(inspect.signature(self.func).parameters) > 1

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> list[Any]:
        """See `PipelineStep.execute`."""
        wants_context = self._wants_context()
        call: Any = self.func
        made: list[Any] = []
        for index, message in enumerate(msgs):
            if not self.matches(message):
                made.append(message)
                continue
            if wants_context:
                context = ApplyContext(message, index == len(msgs) - 1, index, tuple(msgs), tuple(functions))
                result = call(message, context)
            else:
                result = call(message)
            if result is not None:
                made.append(result)
        return made

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        name = getattr(self.func, "__name__", "the given function")
        return f"Put what {name} gives in the place of each of the {self.described()}"


@dataclass(frozen=True, kw_only=True)
class MacroApply(PipelineStep):
    """Gives what a function makes of all messages and the available functions."""

    name: ClassVar[str] = "macro_apply"
    needs_messages: ClassVar[bool] = False
    func: Callable[[list[ChatMessage], list[Any]], Any]

    def __post_init__(self) -> None:
        """Check each value once, here."""
        check_function(self.func, 2, "macro_apply's function")

    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> Any:
        """See `PipelineStep.execute`."""
        return self.func(msgs, functions)

    def explain(self) -> str:
        """See `PipelineStep.explain`."""
        return f"Give all messages to {getattr(self.func, '__name__', 'the given function')}"


def wrapped(message: ChatMessage, prefix: str | None, suffix: str | None) -> ChatMessage:
    """The message with text before and after its content, whose parts stay parts."""
    if isinstance(message.content, tuple):
        before, after = ((text,) if text else () for text in (prefix, suffix))
        return message.copy_with(content=(*before, *message.content, *after))
    return message.copy_with(content=f"{prefix or ''}{message.content or ''}{suffix or ''}")


def _joined(messages: Sequence[ChatMessage], sep: str) -> Content:
    if not any(isinstance(each.content, tuple) for each in messages):
        return sep.join(each.text for each in messages)
    parts = list(messages[0].parts)
    for message in messages[1:]:
        parts += [sep, *message.parts] if sep else message.parts
    return tuple(parts)


def _checked_content(content: Any) -> Content:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and all(isinstance(each, str | MessagePart) for each in content):
        return tuple(content)
    raise PromptError(
        f"merge_consecutive's joiner gave {type(content).__name__}",
        why="a message's content is text, a list of parts, or None",
    )


def _calls(pending: dict[str, str]) -> str:
    return ", ".join(f"{name} ({call_id})" for call_id, name in pending.items())
