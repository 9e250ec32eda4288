"""One generation by llama.cpp: the prompt in chunks, then a token at a time, until something says stop.

It reuses the states that llama.cpp still holds: a prompt is matched to them by their longest common prefix, they are
cut there, and only the rest is computed. It blocks, and so runs in a worker's thread.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable, Mapping
from typing import Any

from kani_nb.engines.base import Completion, FinishReason, PrefillProgress, StreamEvent, TokenLogprob
from kani_nb.engines.huggingface.parsers import ReadBy
from kani_nb.engines.huggingface.prefix_cache import common_prefix
from kani_nb.engines.huggingface.prompting import AnswerMemory
from kani_nb.engines.huggingface.text_stream import StopStrings
from kani_nb.engines.json_constraint import JsonConstraint
from kani_nb.engines.llamacpp.native import NativeModel
from kani_nb.engines.llamacpp.sampling import Certainty, Sampler
from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.errors import PromptTooLongError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

Emit = Callable[[StreamEvent], None]


class Generation:
    """One request: `run` it once, in the thread that holds the engine's slot.

    Args:
        native: the model.
        vocabulary: its vocabulary.
        ids: the prompt's tokens.
        params: how to generate.
        read_by: takes the answer apart into text, reasoning and calls.
        constraint: what the answer is held to, from where its reasoning ends.
        metadata: of the file.
        context_tokens: tokens of prompt and answer that the model can hold.
        reuses: whether states of the prompt before are used.
        memory: ids of earlier answers.
        stop: set by whoever no longer wants the answer, and in any case when it has ended.

    Raises:
        PromptTooLongError: no room is left for an answer.
    """

    def __init__(
        self,
        native: NativeModel,
        vocabulary: Vocabulary,
        ids: list[int],
        params: GenerationParams,
        *,
        read_by: ReadBy,
        constraint: JsonConstraint | None,
        metadata: Mapping[str, Any],
        context_tokens: int,
        reuses: bool,
        memory: AnswerMemory,
        stop: threading.Event,
    ) -> None:
        room = context_tokens - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids):,} tokens",
                why=f"the model holds {context_tokens:,} of prompt and answer together",
                fix="shorten it, or start afresh with %chat new",
            )
        self._native = native
        self._vocabulary = vocabulary
        self._ids = list(ids)
        self._prompt_tokens = len(ids)
        self._limit = min(params.max_new_tokens, room)
        self._params = params
        self._read_by = read_by
        self._constraint = constraint
        self._logprobs: list[TokenLogprob] = []
        self._metadata = metadata
        self._context_tokens = context_tokens
        self._reuses = reuses
        self._memory = memory
        self._stop = stop

    def run(self, emit: Emit, queued_s: float) -> None:
        """Emit progress, text and at last the completion."""
        native, params = self._native, self._params
        end_ids = params.eos_token_id or (self._vocabulary.end_ids if params.min_new_tokens else ())
        native.go_back(self._reusable() if self._reuses else 0)
        cached = len(native.ids)
        with (
            native.stoppable(self._stop),
            Sampler(params, self._metadata, native, end_ids, self._context_tokens) as sampler,
        ):
            sampler.begin(self._ids)
            emit(PrefillProgress(cached, self._prompt_tokens, cached, queued_s))
            is_wanted = self._prefill(emit, cached)
            message, reason = self._decode(sampler, emit, is_wanted=is_wanted)
            seed = sampler.seed
        generated = len(self._ids) - self._prompt_tokens
        if generated:
            self._memory.remember(self._ids)
        emit(
            Completion(
                message,
                self._prompt_tokens,
                generated,
                cached_tokens=cached,
                finish_reason=reason,
                seed=seed,
                logprobs=self._logprobs,
            )
        )

    def _reusable(self) -> int:
        """Tokens of the prompt that need not be computed again.

        Where the prompt leaves the held sequence in the middle of a chunk, that chunk is computed again in its former
        shape, so that a retry gives the same numbers bit for bit. At least one token is left to compute.
        """
        held = self._native.ids
        common = common_prefix(held, self._ids)
        if common == len(held) and common < len(self._ids):
            return common
        wanted = min(common, len(self._ids) - 1)
        return next((start for start, end in self._native.chunks if start <= wanted < end), wanted)

    def _prefill(self, emit: Emit, cached: int) -> bool:
        """Compute the prompt; False if the answer is no longer wanted."""
        native = self._native
        while (start := len(native.ids)) < self._prompt_tokens:
            end = min(start + native.chunk_tokens, self._prompt_tokens)
            if self._stop.is_set() or not native.compute(self._ids[start:end]):
                return False
            native.chunks.append((start, end))
            if end < self._prompt_tokens:
                emit(PrefillProgress(end, self._prompt_tokens, cached))
        return True

    def _decode(self, sampler: Sampler, emit: Emit, *, is_wanted: bool) -> tuple[ChatMessage, FinishReason]:
        # A character's bytes may stand in several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stops = StopStrings(self._params.stop_strings)
        reader, kept = self._read_by.reader, self._read_by.kept_ids

        def say(text: str) -> None:
            for event in reader.push(text, len(self._ids) - self._prompt_tokens) if text else ():
                emit(event)

        reason = FinishReason.LENGTH if is_wanted else FinishReason.CANCELLED
        for number in range(self._limit if is_wanted else 0):
            if self._stop.is_set():
                reason = FinishReason.CANCELLED
                break
            token = self._choose(sampler, number, is_free=getattr(reader, "is_reasoning", False))
            self._ids.append(token)
            if self._ends(token):
                reason = FinishReason.STOP
                break
            say(stops.push(decoder.decode(self._vocabulary.piece(token, special=token in kept))))
            if stops.is_found:
                reason = FinishReason.STOP
                break
            if number + 1 < self._limit and not self._native.compute([token]):
                reason = FinishReason.CANCELLED
                break
        if not stops.is_found:
            say(stops.push(decoder.decode(b"", final=True)) + stops.finish())
        for event in reader.finish():
            emit(event)
        if reader.message.tool_calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return reader.message, reason

    def _choose(self, sampler: Sampler, number: int, *, is_free: bool) -> int:
        """The next token; `is_free` where the constraint does not hold yet."""
        constraint = None if is_free else self._constraint
        sure = Certainty(self._native, self._vocabulary) if self._params.logprobs is not None else None
        token = sampler.choose(self._ids, number, constraint)
        if constraint is not None:
            constraint.accept(token)
        if sure is not None:
            self._logprobs.append(sure.of(token, self._params.logprobs or 0))
        return token

    def _ends(self, token: int) -> bool:
        if self._params.eos_token_id is not None:
            return token in self._params.eos_token_id
        return self._vocabulary.is_end(token)
