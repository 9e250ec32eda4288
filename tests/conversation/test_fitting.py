"""Fitting to the context: whole turns, few counts, and errors that are never hidden."""

import math
import time

import pytest

from kani_nb.conversation.fitting import fit_to_context, reserved_tokens
from kani_nb.conversation.tree import Turn
from kani_nb.engines.base import BaseEngine
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import PromptError, PromptTooLongError
from kani_nb.messages import ChatMessage


class Counting(BaseEngine):
    """Counts a token a character, and how often it was asked; `refuse` raises for some prompts."""

    def __init__(self, max_context_size, refuse=lambda messages: None):
        self.max_context_size = max_context_size
        self.refuse = refuse
        self.calls = 0

    def prompt_len(self, messages, functions=None, **kwargs):
        self.calls += 1
        error = self.refuse(messages)
        if error is not None:
            raise error
        return sum(len(message.text) for message in messages)


def turns(*lengths):
    return [
        Turn(str(number), None, (ChatMessage.user("q" * (length // 2)), ChatMessage.assistant("a" * (length // 2))))
        for number, length in enumerate(lengths)
    ]


ASK = ChatMessage.user("ask!")


async def test_everything_is_kept_when_it_fits_and_is_counted_once():
    engine = Counting(100)
    fitted = await fit_to_context(engine, "sys", turns(10, 10), [ASK], {"max_new_tokens": 20})
    assert [message.role.value for message in fitted.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert (fitted.prompt_tokens, fitted.dropped_turns, fitted.notice, engine.calls) == (27, 0, "", 1)


async def test_the_oldest_whole_turns_are_dropped_and_it_says_which():
    engine = Counting(2048)
    history = turns(600, 800, 704, *[100] * 6)
    fitted = await fit_to_context(engine, "system", history, [ASK], {"max_new_tokens": 1024})
    assert fitted.notice == "context: dropped turns 1-2 of 9 (1,400 tokens) to fit 2,048"
    assert fitted.messages[0].text == "system"
    assert fitted.messages[1:-1] == [message for turn in history[2:] for message in turn.messages]
    assert fitted.messages[-1] is ASK


@pytest.mark.parametrize("count", [1, 2, 9, 64, 1000])
async def test_few_counts_are_enough_and_as_little_as_possible_is_dropped(count):
    for context in (40, 40 + 10 * (count // 2), 39 + 10 * count):
        engine = Counting(context)
        history = turns(*[10] * count)
        fitted = await fit_to_context(engine, None, history, [ASK], {"max_new_tokens": 1})
        assert fitted.dropped_turns == max(0, math.ceil((10 * count + 4 - (context - 1)) / 10))
        assert engine.calls <= math.log2(count) + 3


async def test_the_room_for_the_answer_is_what_was_asked_for_and_at_most_a_quarter():
    engine = Counting(1000)
    assert reserved_tokens(engine, {}) == 250
    assert reserved_tokens(engine, {"max_new_tokens": 7}) == reserved_tokens(engine, {"max_tokens": 7}) == 7
    assert reserved_tokens(engine, {"max_new_tokens": "many"}) == 250
    assert reserved_tokens(Counting(2), {}) == 1


async def test_a_prompt_of_200000_characters_is_refused_quickly_with_the_numbers():
    began = time.perf_counter()
    with pytest.raises(PromptTooLongError) as caught:
        await fit_to_context(EchoEngine(4096), "be brief", turns(100), [ChatMessage.user("word " * 40_000)], {})
    assert time.perf_counter() - began < 20
    assert "40,0" in str(caught.value)
    assert "4,096" in str(caught.value)
    assert "shorten" in str(caught.value)


async def test_a_template_error_of_the_whole_prompt_surfaces_unchanged():
    error = PromptError("no system messages, please")
    engine = Counting(100, lambda messages: error)
    with pytest.raises(PromptError) as caught:
        await fit_to_context(engine, "sys", turns(10), [ASK])
    assert caught.value is error
    assert engine.calls == 1


async def test_a_window_that_the_template_refuses_is_not_used():
    def refuse(messages):
        return PromptError("odd") if len(messages) // 2 % 2 else None

    engine = Counting(100, refuse)
    fitted = await fit_to_context(engine, None, turns(*[20] * 10), [ASK], {"max_new_tokens": 10})
    assert fitted.prompt_tokens <= 90
    assert refuse(fitted.messages) is None


async def test_an_engine_that_itself_says_too_long_for_the_whole_is_fitted():
    def refuse(messages):
        long = sum(len(message.text) for message in messages) > 60
        return PromptTooLongError("too long") if long else None

    fitted = await fit_to_context(Counting(80, refuse), None, turns(*[10] * 20), [ASK], {"max_new_tokens": 10})
    assert fitted.notice == "context: dropped turns 1-15 of 20 to fit 80"
    assert fitted.prompt_tokens == 54


async def test_when_the_smallest_window_is_refused_for_another_reason_that_reason_surfaces():
    def refuse(messages):
        return PromptError("needs an example first") if len(messages) == 1 else None

    with pytest.raises(PromptError, match="needs an example first"):
        await fit_to_context(Counting(20, refuse), None, turns(100, 100), [ASK])


async def test_an_engine_of_the_old_style_is_fitted_by_message_len():
    class Old(BaseEngine):
        max_context_size = 40
        token_reserve = 3

        def message_len(self, message):
            return len(message.text)

    fitted = await fit_to_context(Old(), None, turns(10, 10, 10), [ASK], {"max_new_tokens": 5})
    assert (fitted.dropped_turns, fitted.prompt_tokens) == (1, 27)


async def test_an_engine_that_counts_in_a_coroutine_is_fitted():
    class Remote(Counting):
        async def prompt_len(self, messages, functions=None, **kwargs):
            return super().prompt_len(messages)

    fitted = await fit_to_context(Remote(40), None, turns(10, 10, 10), [ASK], {"max_new_tokens": 5})
    assert fitted.dropped_turns == 0
