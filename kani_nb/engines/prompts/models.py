"""Pipelines for the published prompt formats of models whose files may have no chat template.

Each gives the text that kani's pipeline of the same name gives for the same messages of text. They end with a string,
so that no step can be added to one by accident.
"""

from __future__ import annotations

import json
from typing import Any

from kani_nb.engines.prompts.pipeline import PromptPipeline
from kani_nb.engines.prompts.steps import ApplyContext, wrapped
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage, ChatRole, ToolCall

#: LLaMA 2 chat: https://github.com/meta-llama/llama (`chat_completion`). System text goes into the first instruction.
LLAMA2_PIPELINE = (
    PromptPipeline()
    .wrap(role=ChatRole.SYSTEM, prefix="<<SYS>>\n", suffix="\n<</SYS>>\n")
    .translate_role(role=ChatRole.SYSTEM, to=ChatRole.USER)
    .merge_consecutive(role=ChatRole.USER, sep="\n")
    .merge_consecutive(role=ChatRole.ASSISTANT, sep=" ")
    .conversation_fmt(
        user_prefix="<s>[INST] ",
        user_suffix=" [/INST]",
        assistant_prefix=" ",
        assistant_suffix=" </s>",
        assistant_suffix_if_last="",
    )
)


def _llama3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


#: Llama 3 (not 3.1, whose template knows tools): https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
LLAMA3_PIPELINE = (
    PromptPipeline()
    .translate_role(
        role=ChatRole.FUNCTION,
        to=ChatRole.USER,
        warn="Llama 3 has no messages of functions: their results are given to it as the user's",
    )
    .conversation_fmt(
        prefix="<|begin_of_text|>",
        generation_suffix=_llama3_header("assistant"),
        system_prefix=_llama3_header("system"),
        system_suffix="<|eot_id|>",
        user_prefix=_llama3_header("user"),
        user_suffix="<|eot_id|>",
        assistant_prefix=_llama3_header("assistant"),
        assistant_suffix="<|eot_id|>",
        assistant_suffix_if_last="",
    )
)


def _as_json(text: str) -> Any:
    """What the text says as JSON, or the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _mistral_call(call: ToolCall) -> str:
    arguments = _as_json(call.function.arguments)
    return json.dumps({"name": call.function.name, "arguments": arguments, "id": call.id})


def _mistral_result(message: ChatMessage) -> ChatMessage:
    said = json.dumps({"content": _as_json(message.text), "call_id": message.tool_call_id})
    return message.copy_with(content=said)


def _mistral_tools(functions: Any) -> str:
    return f"[AVAILABLE_TOOLS] {json.dumps(tool_schemas(functions))}[/AVAILABLE_TOOLS]"


def _with_tools(message: ChatMessage, context: ApplyContext) -> ChatMessage:
    if not context.functions or not context.is_last_of_type:
        return message
    return wrapped(message, _mistral_tools(context.functions), None)


def _tools_alone(messages: list[ChatMessage], functions: list[Any]) -> list[ChatMessage]:
    return messages if messages or not functions else [ChatMessage.user(_mistral_tools(functions))]


#: Mistral's tokenizer version 3: https://github.com/mistralai/mistral-common. Its ids of calls have nine characters.
MISTRAL_V3_PIPELINE = (
    PromptPipeline()
    .translate_role(
        role=ChatRole.SYSTEM,
        to=ChatRole.USER,
        warn="Mistral's format has no system messages: they are given to the model as the user's",
    )
    .merge_consecutive(role=ChatRole.USER, sep="\n\n")
    .merge_consecutive(role=ChatRole.ASSISTANT, sep=" ")
    # The instruction's marks come before the tools are added: the tools stand in front of them.
    .wrap(role=ChatRole.USER, prefix="[INST] ", suffix="[/INST]")
    .ensure_bound_function_calls(id_translator=lambda call_id: call_id.replace("-", "")[:9])
    .function_call_fmt(_mistral_call, prefix="[TOOL_CALLS] [", sep=",", suffix="]")
    .apply(_mistral_result, role=ChatRole.FUNCTION)
    .apply(_with_tools, role=ChatRole.USER)
    .macro_apply(_tools_alone)
    .conversation_fmt(
        prefix="<s>",
        assistant_prefix=" ",
        assistant_suffix="</s>",
        assistant_suffix_if_last="",
        function_prefix="[TOOL_RESULTS] ",
        function_suffix="[/TOOL_RESULTS]",
    )
)
