"""Engines written for the kani package, that the tests of the adapter run. Import it only where kani is installed."""

from __future__ import annotations

import time

import kani
from kani.engines.base import BaseEngine as TheirEngine
from kani.engines.base import Completion as TheirCompletion

from kani_nb import ChatMessage


class Repeating(TheirEngine):
    """Repeats the last message word by word, as kani's local engines do: without ever giving the loop back."""

    max_context_size = 200

    def __init__(self, pause_s=0.0, gate=None):
        self.pause_s = pause_s
        self.gate = gate
        self.seen = []

    def prompt_len(self, messages, functions=None, **kwargs):
        return sum(1 + len((each.text or "").split()) for each in messages)

    async def predict(self, messages, functions=None, max_new_tokens=100, **hyperparams):
        return [each async for each in self.stream(messages, functions, max_new_tokens, **hyperparams)][-1]

    async def stream(self, messages, functions=None, max_new_tokens=100, **hyperparams):
        self.seen.append((messages, functions, {"max_new_tokens": max_new_tokens, **hyperparams}))
        words = (messages[-1].text or "").split()[:max_new_tokens]
        for number, word in enumerate(words):
            time.sleep(self.pause_s)
            if self.gate is not None:
                self.gate.wait(20)
            yield word if number == 0 else f" {word}"
        answer = kani.ChatMessage.assistant(" ".join(words))
        yield TheirCompletion(answer, self.prompt_len(messages), len(words))


class Predicting(Repeating):
    """Only predicts, counts in a coroutine, and blocks while it does either."""

    stream = TheirEngine.stream

    async def prompt_len(self, messages, functions=None, **kwargs):
        time.sleep(self.pause_s)
        return Repeating.prompt_len(self, messages)

    async def predict(self, messages, functions=None, max_new_tokens=100, **hyperparams):
        time.sleep(self.pause_s)
        words = (messages[-1].text or "").split()[:max_new_tokens]
        return TheirCompletion(kani.ChatMessage.assistant(" ".join(words)))


class Saying(TheirEngine):
    """Streams what it was made with: strings, then perhaps a message."""

    max_context_size = 100

    def __init__(self, *said):
        self.said = said
        self.seen = None

    def prompt_len(self, messages, functions=None, **kwargs):
        return 3

    async def predict(self, messages, functions=None, **hyperparams):
        raise NotImplementedError

    async def stream(self, messages, functions=None, **hyperparams):
        self.seen = (messages, functions, hyperparams)
        for each in self.said:
            if isinstance(each, BaseException):
                raise each
            yield TheirCompletion(each) if isinstance(each, kani.ChatMessage) else each


HELLO = [ChatMessage.user("one two three")]


async def answer(engine, messages=HELLO, functions=None, **params):
    events = [event async for event in engine.stream(messages, functions, **params)]
    return [each for each in events if isinstance(each, str)], events[-1]
