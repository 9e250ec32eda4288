"""An engine that calls, functions to be called, and a person who answers."""

from kani_nb.engines.base import BaseEngine, Completion, FinishReason, TextDelta, ToolCallDelta
from kani_nb.functions import ai_function
from kani_nb.messages import ChatMessage, FunctionCall, ToolCall


class Calling(BaseEngine):
    """Says what each round of the script says: text, or calls as `(name, arguments as JSON)`."""

    max_context_size = 10_000

    def __init__(self, *rounds):
        self.rounds = list(rounds)
        self.seen = []

    def prompt_len(self, messages, functions=None, **kwargs):
        return sum(len(message.text) for message in messages)

    async def stream(self, messages, functions=None, **hyperparams):
        self.seen.append((messages, [each.name for each in functions or ()]))
        said = self.rounds[min(len(self.seen), len(self.rounds)) - 1]
        if isinstance(said, BaseException):
            raise said
        calls = None
        if isinstance(said, str):
            yield TextDelta(said)
        else:
            calls = tuple(
                ToolCall(f"call-{len(self.seen)}-{number}", FunctionCall(name, arguments))
                for number, (name, arguments) in enumerate(said)
            )
            for number, call in enumerate(calls):
                yield ToolCallDelta(number, call.function.name, call.function.arguments)
        reason = FinishReason.TOOL_CALLS if calls else FinishReason.STOP
        message = ChatMessage.assistant(said if isinstance(said, str) else "", tool_calls=calls)
        yield Completion(message, 10, 5, finish_reason=reason)


@ai_function(read_only=True)
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TWO_AND_THREE = [("add", '{"a": 2, "b": 3}')]


def told(session):
    """Roles and texts of the last turn."""
    return [(each.role, each.text) for each in session.turns[-1].messages]


class Answering:
    """A host that answers as it was told, and keeps the questions."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def run(self, call):
        return call()

    async def ask(self, question):
        self.asked.append(question)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def deletes(path: str) -> str:
    """Delete a file."""
    return f"deleted {path}"


DELETE = [("deletes", '{"path": "a.txt"}')]
