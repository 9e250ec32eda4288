"""Chat templates with tools, without, and with rules of their own; for the engines that read templates."""

from __future__ import annotations

from kani_nb import ChatMessage
from kani_nb.messages import FunctionCall, ToolCall
from tests.conftest import CHAT_TEMPLATE

HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call them as <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_TEMPLATE = HERMES_TEMPLATE.replace("<tool_call></tool_call>", "[TOOL_CALLS]")
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
)
MISTRAL_IDS = (
    "{% for message in messages %}{% for call in message.tool_calls or [] %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
ONE_CALL = (
    "{% for message in messages %}{% if (message.tool_calls or []) | length > 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)


def two_calls(*ids):
    calls = tuple(ToolCall(each, FunctionCall("weather", '{"city": "Rome"}')) for each in ids)
    results = [ChatMessage.function("weather", f"result {number}", each) for number, each in enumerate(ids)]
    return [ChatMessage.user("Rome?"), ChatMessage.assistant("", tool_calls=calls), *results]
