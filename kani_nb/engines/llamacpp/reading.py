"""What takes an answer apart: text, reasoning and tool calls, by the markers that the file's chat template shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kani_nb.engines.huggingface.parsers import ReadBy
from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.engines.parsers import AnswerReader, PlainReader, format_of
from kani_nb.functions import tool_schemas

#: How many of the prompt's last tokens are looked at: what a template writes before the answer is short.
_PROMPT_END = 48


def reader_for(
    template: str | None, vocabulary: Vocabulary, prompt_ids: Sequence[int], functions: Sequence[Any] | None
) -> ReadBy:
    """The reader of an answer to this prompt, and the control tokens that it must see as text."""
    tools = tool_schemas(functions)
    names = [each["function"]["name"] for each in tools if "function" in each]
    end = b"".join(vocabulary.piece(token, special=True) for token in prompt_ids[-_PROMPT_END:]).decode(
        errors="replace"
    )
    opens_reasoning = end.rstrip().endswith(("<think>", "[THINK]", "<thinking>"))
    answer_format = format_of(template, has_tools=bool(tools), reasons=opens_reasoning)
    if answer_format.is_plain:
        return ReadBy(PlainReader(), frozenset())
    markers = set(answer_format.marker_texts)
    kept = frozenset(each for each in vocabulary.all_special_ids if vocabulary.convert_ids_to_tokens(each) in markers)
    return ReadBy(AnswerReader(answer_format, names, end if opens_reasoning else ""), kept)
