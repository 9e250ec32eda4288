"""What every engine must do, as a pytest class: subclass it, say how your engine is made, and run it.

    from kani_nb.testing import EngineContract

    class TestMyEngine(EngineContract):
        def make_engine(self):
            return MyEngine("a small model")

It needs pytest and nothing else of it: every test has an event loop of its own. An engine that only gives `predict`
passes too. What an engine is for (its prompts, its quality, its errors' words) is not looked at here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, TypeVar

import pytest

from kani_nb.engines.base import BaseCompletion, BaseEngine, TextDelta, prompt_len
from kani_nb.errors import ConfigError, KaniNbError, PromptTooLongError
from kani_nb.messages import ChatMessage, ChatRole

T = TypeVar("T")

_TEXTS = (
    "Grüße aus Köln: ça va, 你好, こんにちは, שלום",
    "👩‍👩‍👧‍👦 🇫🇷 e\N{COMBINING ACUTE ACCENT} \N{ZERO WIDTH JOINER}",
    'a NUL \0 and a tab\t, "quotes", {braces}, $dollars$, <|im_end|>',
    "half of a pair: \ud83d",
)


class EngineContract:
    """Tests of one kind of engine. `make_engine` is all that must be defined.

    Attributes:
        params: hyperparameters that make answers short and the same each time.
        pause_s: the longest that the event loop may stand still while the engine works, in seconds. Imports count too.
        timeout_s: for each test, in seconds.
        counts_exactly: whether `prompt_len` is exact; an engine that estimates what its server counts sets it to False.
    """

    params: ClassVar[dict[str, Any]] = {"max_new_tokens": 12, "do_sample": False}
    pause_s: ClassVar[float] = 1.0
    timeout_s: ClassVar[float] = 120.0
    counts_exactly: ClassVar[bool] = True

    def make_engine(self) -> BaseEngine:
        """A new engine, not loaded, the same each time."""
        raise NotImplementedError(f"{type(self).__name__}.make_engine must return a new engine")

    def make_messages(self, text: str = "the quick brown fox jumps over the lazy dog") -> list[ChatMessage]:
        """A conversation that the engine answers with more than one token."""
        return [ChatMessage.user(text)]

    # -- loading and freeing ---------------------------------------------------------------------------------------

    def test_loading_and_closing_twice_is_as_good_as_once(self) -> None:
        """And an engine that was closed loads again, by itself."""

        async def check() -> None:
            engine = self.make_engine()
            await engine.close()  # before it was ever loaded
            await engine.load()
            await engine.load()
            assert engine.is_loaded
            assert engine.max_context_size > 0
            before = (await self._answer(engine)).message.text
            await engine.close()
            await engine.close()
            assert (await self._answer(engine)).message.text == before
            await engine.close()

        self._run(check())

    def test_the_first_use_loads(self) -> None:
        """Nobody has to call `load`."""
        self._with_engine(self._answer, load=False)

    def test_its_words_for_people_are_short(self) -> None:
        """`repr` is one line: no module tree, no secret."""

        async def check(engine: BaseEngine) -> None:
            for said in (repr(engine), str(engine)):
                assert len(said) < 300
                assert "\n" not in said
            memory = engine.memory()
            assert memory is None or (memory.weight_bytes >= 0 and memory.kv_bytes >= 0 and memory.device)

        self._with_engine(check)

    # -- answers ---------------------------------------------------------------------------------------------------

    def test_the_pieces_of_a_stream_are_the_answer_and_one_completion_is_last(self) -> None:
        """Deltas in order, then exactly one completion, whose text they make up."""

        async def check(engine: BaseEngine) -> None:
            events = [event async for event in engine.stream(self.make_messages(), **self.params)]
            completions = [each for each in events if isinstance(each, BaseCompletion)]
            assert len(completions) == 1
            assert events[-1] is completions[0]
            message = completions[0].message
            assert message.role is ChatRole.ASSISTANT
            assert "".join(each for each in events if isinstance(each, str)) == message.text
            tokens = [each.tokens for each in events if isinstance(each, TextDelta) and each.tokens is not None]
            assert tokens == sorted(tokens)

        self._with_engine(check)

    def test_predict_and_stream_give_the_same(self) -> None:
        """Whichever of the two the engine defines."""

        async def check(engine: BaseEngine) -> None:
            streamed = await self._answer(engine)
            predicted = await engine.predict(self.make_messages(), **self.params)
            assert predicted.message.text == streamed.message.text

        self._with_engine(check)

    def test_what_is_counted_agrees(self) -> None:
        """The prompt's tokens are those that `prompt_len` says, a part of them cached; the answer's keep the limit."""

        async def check(engine: BaseEngine) -> None:
            messages = self.make_messages()
            expected = await prompt_len(engine, messages)
            assert expected > 0
            for _ in range(2):
                completion = await self._answer(engine, messages)
                if completion.prompt_tokens is not None:
                    assert completion.prompt_tokens == expected or not self.counts_exactly
                    assert 0 <= (completion.cached_tokens or 0) <= completion.prompt_tokens
                if completion.completion_tokens is not None and "max_new_tokens" in self.params:
                    assert completion.completion_tokens <= self.params["max_new_tokens"]
            longer = [*messages, completion.message, ChatMessage.user("and more")]
            assert await prompt_len(engine, longer) > expected

        self._with_engine(check)

    def test_a_conversation_goes_on_and_nothing_that_was_passed_is_changed(self) -> None:
        """Three turns, the later ones with all that was said."""

        async def check(engine: BaseEngine) -> None:
            history: list[ChatMessage] = []
            for text in ("one", "two", "three"):
                history.append(ChatMessage.user(text))
                before = list(history)
                completion = await self._answer(engine, history)
                assert history == before
                history.append(completion.message)

        self._with_engine(check)

    @pytest.mark.parametrize("text", _TEXTS, ids=["scripts", "emoji", "markup", "lone surrogate"])
    def test_any_text_is_answered_or_refused_in_words(self, text: str) -> None:
        """And what comes back can be encoded, and holds no half character."""

        async def check(engine: BaseEngine) -> None:
            try:
                completion = await self._answer(engine, self.make_messages(text))
            except KaniNbError as error:
                assert str(error)
                return
            if "\ud83d" not in text:
                completion.message.text.encode()

        self._with_engine(check)

    def test_an_empty_prompt_is_answered_or_refused_in_words(self) -> None:
        """Neither hangs nor breaks the engine."""

        async def check(engine: BaseEngine) -> None:
            with contextlib.suppress(KaniNbError):
                await self._answer(engine, self.make_messages(""))
            await self._answer(engine)

        self._with_engine(check)

    def test_a_prompt_that_is_too_long_is_refused_and_the_engine_goes_on(self) -> None:
        """With the error that callers shorten a conversation by."""

        async def check(engine: BaseEngine) -> None:
            huge = self.make_messages("word " * (engine.max_context_size + 100))
            with pytest.raises(PromptTooLongError):
                await self._answer(engine, huge)
            await self._answer(engine)

        self._with_engine(check)

    def test_a_parameter_that_there_is_not_is_refused(self) -> None:
        """Before anything is computed, and with its name."""

        async def check(engine: BaseEngine) -> None:
            with pytest.raises(ConfigError, match="no_such_parameter"):
                await engine.predict(self.make_messages(), no_such_parameter=1)
            await self._answer(engine)

        self._with_engine(check)

    # -- stopping --------------------------------------------------------------------------------------------------

    def test_a_stream_can_be_left_after_any_piece(self) -> None:
        """And the next answer is what it always was."""

        async def check(engine: BaseEngine) -> None:
            expected = (await self._answer(engine)).message.text
            for pieces in range(6):
                async with aclosing(self._stream(engine)) as events:
                    for _ in range(pieces):
                        if await anext(events, None) is None:
                            break
                assert (await self._answer(engine)).message.text == expected

        self._with_engine(check)

    def test_a_call_can_be_cancelled_at_any_moment(self) -> None:
        """While it waits, computes or ends."""

        async def check(engine: BaseEngine) -> None:
            began = time.monotonic()
            expected = (await self._answer(engine)).message.text
            took = time.monotonic() - began
            for share in (0.0, 0.1, 0.3, 0.6, 0.9):
                call = asyncio.ensure_future(engine.predict(self.make_messages(), **self.params))
                await asyncio.sleep(share * took)
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await call
                assert (await self._answer(engine)).message.text == expected

        self._with_engine(check)

    def test_what_the_reader_of_a_stream_raises_stays_its_own(self) -> None:
        """And ends the answer, not the engine."""

        async def check(engine: BaseEngine) -> None:
            expected = (await self._answer(engine)).message.text
            with pytest.raises(ZeroDivisionError):
                async with aclosing(self._stream(engine)) as events:
                    async for _ in events:
                        raise ZeroDivisionError
            assert (await self._answer(engine)).message.text == expected

        self._with_engine(check)

    def test_closing_ends_the_answer_that_runs(self) -> None:
        """It comes to its end, or fails in words; either way soon, and nothing stays loaded by it."""

        async def check(engine: BaseEngine) -> None:
            call = asyncio.ensure_future(engine.predict(self.make_messages(), **self.params))
            await asyncio.sleep(0)
            await engine.close()
            with contextlib.suppress(KaniNbError):
                await call
            await self._answer(engine)

        self._with_engine(check)

    # -- beside each other -----------------------------------------------------------------------------------------

    def test_calls_at_once_get_their_own_answers(self) -> None:
        """Those that they would have got one after the other."""

        async def check(engine: BaseEngine) -> None:
            asked = [self.make_messages(text) for text in ("one two three", "vier fünf sechs", "sept huit neuf")]
            alone = [(await self._answer(engine, each)).message.text for each in asked]
            at_once = await asyncio.gather(*(self._answer(engine, each) for each in asked))
            assert [each.message.text for each in at_once] == alone

        self._with_engine(check)

    def test_the_event_loop_goes_on_meanwhile(self) -> None:
        """Loading and answering are done elsewhere, or in small steps."""

        async def check(engine: BaseEngine) -> None:
            longest, ended = 0.0, False

            async def watch() -> None:
                nonlocal longest
                while not ended:
                    began = time.monotonic()
                    await asyncio.sleep(0.005)
                    longest = max(longest, time.monotonic() - began)

            watching = asyncio.ensure_future(watch())
            await asyncio.sleep(0.02)  # it has begun
            await engine.load()
            await self._answer(engine)
            ended = True
            await watching
            assert longest < self.pause_s, f"the loop stood still for {longest:.2f} s"

        self._with_engine(check, load=False)

    # -- how it is run ---------------------------------------------------------------------------------------------

    def _stream(self, engine: BaseEngine) -> Any:
        return engine.stream(self.make_messages(), **self.params)

    async def _answer(self, engine: BaseEngine, messages: Sequence[ChatMessage] | None = None) -> BaseCompletion:
        asked = self.make_messages() if messages is None else messages
        events = [event async for event in engine.stream(asked, **self.params)]
        assert events, "the stream was empty"
        assert isinstance(events[-1], BaseCompletion), f"the stream ended with {events[-1]!r}"
        return events[-1]

    def _with_engine(self, check: Callable[[BaseEngine], Awaitable[T]], *, load: bool = True) -> None:
        async def checked() -> None:
            engine = self.make_engine()
            try:
                if load:
                    await engine.load()
                await check(engine)
            finally:
                await engine.close()

        self._run(checked())

    def _run(self, work: Awaitable[None]) -> None:
        async def within_time() -> None:
            await asyncio.wait_for(work, self.timeout_s)

        asyncio.run(within_time())
