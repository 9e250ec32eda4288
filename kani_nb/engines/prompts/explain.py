"""What a prompt pipeline does, in words and by an example that is made to show each of its steps at work."""

from __future__ import annotations

import pprint
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.functions import AIFunction
from kani_nb.messages import ChatMessage, FunctionCall, ToolCall

if TYPE_CHECKING:
    from kani_nb.engines.prompts.pipeline import PromptPipeline

#: What an example conversation may have; kani's names.
CASES = (
    "function_call",
    "multi_function_call",
    "consecutive_system",
    "consecutive_user",
    "consecutive_assistant",
    "end_on_assistant",
)


def explanation(
    pipeline: PromptPipeline[Any],
    example: Sequence[ChatMessage] | None = None,
    functions: Sequence[Any] | None = None,
    *,
    all_cases: bool = False,
    **cases: bool,
) -> str:
    """The text that `PromptPipeline.explain` prints.

    Raises:
        ConfigError: a case that there is not.
    """
    for name in cases:
        if name not in CASES:
            hint = did_you_mean(name, list(CASES)) or f"cases are {', '.join(CASES)}"
            raise ConfigError(f"there is no example case {name!r}", fix=hint)
    shown = {name for name, is_wanted in cases.items() if is_wanted}.union(*(step.example_cases() for step in pipeline))
    shown = set(CASES) if all_cases else shown - {name for name, is_wanted in cases.items() if not is_wanted}
    messages = list(example) if example is not None else example_conversation(shown)
    if functions is None:
        functions = [_ages()] if shown & {"function_call", "multi_function_call"} else []

    title = f"Prompt pipeline of {len(pipeline)} step{'' if len(pipeline) == 1 else 's'}"
    lines = [title, "=" * len(title)]
    lines += [f"{number}. {step.explain()}." for number, step in enumerate(pipeline, 1)]
    lines += ["", "Input", "-----", *(_line(message) for message in messages)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made = pipeline(messages, functions)
    lines += ["", "Output", "------", made if isinstance(made, str) else pprint.pformat(made, width=110)]
    lines += [f"\nIt warns: {each.message}" for each in warned]
    left = [name for name in CASES if name not in shown]
    if left and example is None:
        lines.append(
            f"\nNot in this example: {', '.join(left)}. See .explain(all_cases=True), or name one: ({left[0]}=True)."
        )
    return "\n".join(lines)


def example_conversation(cases: set[str]) -> list[ChatMessage]:
    """A short conversation that has the `cases`, and ends with a question unless it must not."""
    said = [ChatMessage.system("You keep the harbour's log.")]
    if "consecutive_system" in cases:
        said.append(ChatMessage.system("Answer in one sentence."))
    said += [ChatMessage.user("Good morning."), ChatMessage.assistant("Good morning! What shall I look up?")]
    if "function_call" in cases:
        call = ToolCall("call-0001", FunctionCall.with_args("ship_age", name="Alma"))
        said += [
            ChatMessage.user("How old is the Alma?"),
            ChatMessage.assistant(None, tool_calls=[call]),
            ChatMessage.function("ship_age", "41", call.id),
            ChatMessage.assistant("The Alma is 41 years old."),
        ]
    if "multi_function_call" in cases:
        calls = [
            ToolCall(f"call-000{number}", FunctionCall.with_args("ship_age", name=name))
            for number, name in enumerate(("Berta", "Clara"), 2)
        ]
        said += [
            ChatMessage.user("And the Berta and the Clara?"),
            ChatMessage.assistant("I look up both.", tool_calls=calls),
            ChatMessage.function("ship_age", "7", calls[0].id),
            ChatMessage.function("ship_age", "no such ship", calls[1].id, is_tool_call_error=True),
            ChatMessage.assistant("The Berta is 7 years old; there is no Clara."),
        ]
    if "consecutive_user" in cases:
        said += [
            ChatMessage.user("Which ship came last?"),
            ChatMessage.user("I mean yesterday."),
            ChatMessage.assistant("The Berta, at noon."),
        ]
    if "consecutive_assistant" in cases:
        said += [
            ChatMessage.user("And before her?"),
            ChatMessage.assistant("The Alma,"),
            ChatMessage.assistant("two hours earlier."),
        ]
    said.append(ChatMessage.user("Which one leaves first?"))
    if "end_on_assistant" in cases:
        said.append(ChatMessage.assistant("The first to leave is"))
    return said


def _ages() -> AIFunction:
    def ship_age(name: str) -> int:
        """How many years old a ship is.

        Args:
            name: the ship's name
        """
        return len(name)

    return AIFunction(ship_age)


def _line(message: ChatMessage) -> str:
    calls = [f"calls {call.function.name}({call.function.arguments}) as {call.id}" for call in message.tool_calls or ()]
    answers = [f"answers {message.tool_call_id}"] if message.tool_call_id is not None else []
    said = message.content if message.content is None else repr(message.text)
    return f"{message.role + ':':<10} {said}{''.join(f' ({each})' for each in (*calls, *answers))}"
