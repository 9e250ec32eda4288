"""One generation on a loaded model: the prompt in chunks, then a token at a time, until something says stop.

A loop of our own instead of `generate`: it stops inside a long prompt, reuses the states of earlier prompts, gives each
request its own random generator, never holds a finished word back, and costs less per token. It blocks, and so runs in
a worker's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from kani_nb.engines.base import Completion, FinishReason, PrefillProgress, StreamEvent, TokenLogprob
from kani_nb.engines.huggingface.driving import CacheMode, Driving, forward
from kani_nb.engines.huggingface.model_inputs import ModelInputs
from kani_nb.engines.huggingface.parsers import ReadBy
from kani_nb.engines.huggingface.placing import Placing
from kani_nb.engines.huggingface.prefix_cache import CacheEntry, PrefixCache
from kani_nb.engines.huggingface.prompting import AnswerMemory
from kani_nb.engines.huggingface.sampling import Sampler, token_logprob
from kani_nb.engines.huggingface.text_stream import Detokenizer, StopStrings
from kani_nb.engines.json_constraint import JsonConstraint
from kani_nb.engines.parsers import PlainReader
from kani_nb.errors import PromptTooLongError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

Emit = Callable[[StreamEvent], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what was decided when it was loaded.

    Attributes:
        tokenizer_lock: entered for every use of the tokenizer: encoding user text changes its settings for a moment.
        eos_ids: tokens that end an answer.
        context_tokens: tokens of prompt and answer that the model can hold.
        chunk_tokens: tokens of a prompt that are computed in one forward pass.
        device: where the input ids go, for example `cpu` or `cuda:0`.
        held_bytes: bytes of weights and scales by device; `disk` among them.
        folder: that the weights were read from: of the model, or of the quantized copy of it.
        driving: how the model's forward is called.
        placing: where it was put and in what precision, and why.
    """

    model: Any
    tokenizer: Any
    tokenizer_lock: AbstractContextManager[Any]
    eos_ids: tuple[int, ...]
    context_tokens: int
    chunk_tokens: int
    device: str
    dtype: str
    held_bytes: dict[str, int]
    origin: str
    folder: Path
    threads: int | None
    driving: Driving
    placing: Placing

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and their scales, on whatever device."""
        return sum(self.held_bytes.values())

    def counted_again(self) -> Self:
        """The same, the bytes and the dtype those of the model as it is now: adapters were attached, weights cast."""
        from kani_nb.engines.huggingface.footprint import storage_bytes

        return replace(self, held_bytes=storage_bytes(self.model), dtype=str(self.model.dtype).removeprefix("torch."))

    def details(self) -> dict[str, Any]:
        """What was decided when it was loaded, for people."""
        placing = self.placing
        return {
            "origin": self.origin,
            "device": self.device,
            "dtype": self.dtype,
            "quantization": placing.label,
            "threads": self.threads,
            "context_tokens": self.context_tokens,
            "chunk_tokens": self.chunk_tokens,
            "cache_mode": self.driving.mode.value,
            "weight_bytes": self.weight_bytes,
            "planned_weight_bytes": placing.row.weight_bytes if placing.row is not None else None,
            "notes": "; ".join(placing.notes),
        }


class Generation:
    """One request: `run` it once, in the thread that holds the engine's slot.

    Args:
        loaded: the model.
        prompt: its tokens, and the tensors of its media.
        params: how to generate.
        cache: states of earlier prompts.
        memory: ids of earlier answers.
        stop: set by whoever no longer wants the answer.
        read_by: takes the answer apart into text, reasoning and calls; None where it is just text.
        constraint: what the answer is held to, from where its reasoning ends.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: ModelInputs,
        params: GenerationParams,
        cache: PrefixCache,
        memory: AnswerMemory,
        stop: threading.Event,
        read_by: ReadBy | None = None,
        constraint: JsonConstraint | None = None,
    ) -> None:
        room = loaded.context_tokens - len(prompt.ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.ids):,} tokens",
                why=f"the model holds {loaded.context_tokens:,} of prompt and answer together",
                fix="shorten it, or start afresh with %chat new",
            )
        self._loaded = loaded
        self._ids = list(prompt.ids)
        self._prompt = prompt
        self._prompt_tokens = len(prompt.ids)
        self._limit = min(params.max_new_tokens, room)
        self._params = params
        self._cache = cache
        self._memory = memory
        self._stop = stop
        self._read_by = read_by
        self._constraint = constraint
        self._logprobs: list[TokenLogprob] = []
        self._seen: Any = None
        self._eos_ids = params.eos_token_id or loaded.eos_ids
        self._sampler = Sampler(params, loaded.model.generation_config, self._eos_ids, loaded.device)

    def run(self, emit: Emit, queued_s: float) -> None:
        """Emit progress, text and at last the completion."""
        import torch

        driving = self._loaded.driving
        is_long = driving.is_beyond(self._prompt_tokens)
        if driving.mode is CacheMode.REUSE:
            entry = self._cache.take(self._prompt.keys, self._prompt_tokens + self._limit, is_long=is_long)
            if len(entry.ids) < self._prompt.media_end:  # what a medium stands behind is computed all at once
                entry.restart(self._cache.empty().cache, is_long=is_long)
        else:
            entry = self._cache.empty(is_long=is_long)
        cached = len(entry.ids)
        try:
            with torch.inference_mode():
                emit(PrefillProgress(cached, self._prompt_tokens, cached, queued_s))
                logits = self._prefill(entry, emit, cached)
                message, reason = self._decode(entry, logits, emit)
        except BaseException:
            self._cache.drop(entry)
            raise
        if driving.mode is CacheMode.REUSE:
            self._cache.give_back(entry)
        generated = len(self._ids) - self._prompt_tokens
        if generated and not self._prompt.media:
            with self._loaded.tokenizer_lock:
                self._memory.remember(self._ids)
        emit(
            Completion(
                message,
                self._prompt_tokens,
                generated,
                cached_tokens=cached,
                finish_reason=reason,
                seed=self._sampler.seed,
                logprobs=self._logprobs,
            )
        )

    def _forward(self, entry: CacheEntry, tokens: Sequence[int]) -> Any:
        """The logits `(1, V)` after `tokens`, whose states `entry` then holds."""
        loaded, start = self._loaded, len(entry.ids)
        end = start + len(tokens)
        entry.ids.extend(self._prompt.keys[start:end])  # empty beyond the prompt
        entry.ids.extend(self._ids[max(start, self._prompt_tokens) : end])
        media = self._prompt.media if start < self._prompt.media_end else None
        if loaded.driving.mode is CacheMode.NONE:
            media = self._prompt.media
            return forward(loaded.model, loaded.driving, None, self._ids[:end], 0, loaded.device, media=media)
        return forward(loaded.model, loaded.driving, entry.cache, tokens, start, loaded.device, media=media)

    def _prefill(self, entry: CacheEntry, emit: Emit, cached: int) -> Any:
        """The logits after the prompt, or None if the answer is no longer wanted."""
        logits = None
        in_one_piece = self._loaded.driving.mode is not CacheMode.REUSE or entry.is_long
        in_one_piece = in_one_piece or len(entry.ids) < self._prompt.media_end
        chunk = self._prompt_tokens if in_one_piece else self._loaded.chunk_tokens
        while (start := len(entry.ids)) < self._prompt_tokens:
            if self._stop.is_set():
                return None
            end = min(start + chunk, self._prompt_tokens)
            logits = self._forward(entry, self._ids[start:end])
            entry.chunks.append((start, end))
            if end < self._prompt_tokens:
                emit(PrefillProgress(end, self._prompt_tokens, cached))
        return logits

    def _step(self, entry: CacheEntry) -> Any:
        """The logits after the newest token."""
        if not entry.is_long and self._loaded.driving.is_beyond(len(self._ids)):
            entry.restart(self._cache.empty().cache, is_long=True)
            entry.chunks.append((0, len(self._ids)))
        return self._forward(entry, self._ids[len(entry.ids) :])

    def _decode(self, entry: CacheEntry, logits: Any, emit: Emit) -> tuple[ChatMessage, FinishReason]:
        """The answer after the prompt, whose logits these are; None if it is no longer wanted."""
        kept_ids = self._read_by.kept_ids if self._read_by is not None else frozenset()
        detokenizer = Detokenizer(self._loaded.tokenizer, self._ids, self._loaded.tokenizer_lock, kept_ids)
        stops = StopStrings(self._params.stop_strings)
        reader = self._read_by.reader if self._read_by is not None else PlainReader()

        def say(text: str) -> None:
            for event in reader.push(text, len(self._ids) - self._prompt_tokens) if text else ():
                emit(event)

        reason = FinishReason.LENGTH if logits is not None else FinishReason.CANCELLED
        for number in range(self._limit if logits is not None else 0):
            if self._stop.is_set():
                reason = FinishReason.CANCELLED
                break
            token = self._choose(logits, number, is_free=getattr(reader, "is_reasoning", False))
            self._ids.append(token)
            if token in self._eos_ids:
                reason = FinishReason.STOP
                break
            say(stops.push(detokenizer.push(token)))
            if stops.is_found:
                reason = FinishReason.STOP
                break
            if number + 1 < self._limit:
                logits = self._step(entry)
        if not stops.is_found:
            say(stops.push(detokenizer.finish()) + stops.finish())
        for event in reader.finish():
            emit(event)
        message = reader.message
        if message.tool_calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return message, reason

    def _choose(self, logits: Any, number: int, *, is_free: bool) -> int:
        """The next token; `is_free` where the constraint does not hold yet."""
        constraint = None if is_free else self._constraint
        token = self._sampler.choose(logits, self._ids_tensor(), number, constraint)
        if constraint is not None:
            constraint.accept(token)
        if self._params.logprobs is not None:
            with self._loaded.tokenizer_lock:
                self._logprobs.append(token_logprob(logits, token, self._params.logprobs, self._loaded.tokenizer))
        return token

    def _ids_tensor(self) -> Any:
        """All ids so far, `(1, T) int64`, for the processors that look back; None where none does."""
        if not self._sampler.needs_ids:
            return None
        import torch

        if self._seen is None:
            self._seen = torch.zeros(
                (1, self._prompt_tokens + self._limit), dtype=torch.long, device=self._loaded.device
            )
            self._seen[0, : len(self._ids)] = torch.tensor(self._ids)
        else:
            self._seen[0, len(self._ids) - 1] = self._ids[-1]
        return self._seen[:, : len(self._ids)]
