"""The contract holds for our engines, for a stranger's of a dozen lines, and catches one that breaks it."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest

from kani_nb import BaseEngine, ChatMessage, Completion, EchoEngine, HuggingEngine, TextDelta
from kani_nb.errors import ConfigError, PromptTooLongError
from kani_nb.testing import EngineContract


class TestEchoEngine(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}

    def make_engine(self):
        return EchoEngine(max_context_size=400, delay=0.002)


@pytest.mark.slow
class TestHuggingEngine(EngineContract):
    @pytest.fixture(autouse=True)
    def folder(self, tiny_model):
        self.tiny_model = tiny_model

    def make_engine(self):
        return HuggingEngine(str(self.tiny_model), threads=1, dtype="float32")


class Reversing(BaseEngine):
    """As little as an engine can be: `predict`, `message_len` and a context."""

    max_context_size = 200

    def message_len(self, message):
        return 1 + len(message.text.split())

    async def predict(self, messages, functions=None, max_new_tokens=100, **others):
        if others:
            raise ConfigError(f"unknown parameter {next(iter(others))}")
        tokens = self.prompt_len(messages)
        if tokens >= self.max_context_size:
            raise PromptTooLongError(f"the prompt has {tokens} tokens")
        words = messages[-1].text.split()[::-1][:max_new_tokens]
        return Completion(ChatMessage.assistant(" ".join(words)), tokens, len(words))


class TestAnEngineOfADozenLines(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}

    def make_engine(self):
        return Reversing()


class TwoCompletions(Reversing):
    async def stream(self, messages, functions=None, **params):
        completion = await self.predict(messages, functions, **params)
        yield completion
        yield completion


class OtherText(Reversing):
    async def stream(self, messages, functions=None, **params):
        yield TextDelta("something else")
        yield await self.predict(messages, functions, **params)


class Miscounting(Reversing):
    async def predict(self, messages, functions=None, **params):
        completion = await super().predict(messages, functions, **params)
        return Completion(completion.message, completion.prompt_tokens + 1, completion.completion_tokens)


class Blocking(Reversing):
    async def predict(self, messages, functions=None, **params):
        time.sleep(0.3)
        return await super().predict(messages, functions, **params)


class Remembering(Reversing):
    said = 0

    async def predict(self, messages, functions=None, **params):
        self.said += 1
        return Completion(ChatMessage.assistant(f"answer {self.said}"))


class Taking(Reversing):
    async def predict(self, messages, functions=None, **params):
        completion = await super().predict(messages, functions, **params)
        messages.append(completion.message)
        return completion


@pytest.mark.parametrize(
    ("engine", "test"),
    [
        (TwoCompletions, "test_the_pieces_of_a_stream_are_the_answer_and_one_completion_is_last"),
        (OtherText, "test_the_pieces_of_a_stream_are_the_answer_and_one_completion_is_last"),
        (Miscounting, "test_what_is_counted_agrees"),
        (Blocking, "test_the_event_loop_goes_on_meanwhile"),
        (Remembering, "test_calls_at_once_get_their_own_answers"),
        (Taking, "test_a_conversation_goes_on_and_nothing_that_was_passed_is_changed"),
    ],
)
def test_an_engine_that_breaks_it_is_caught(engine, test):
    class Contract(EngineContract):
        params: ClassVar = {"max_new_tokens": 12}
        pause_s = 0.2

        def make_engine(self):
            return engine()

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()
