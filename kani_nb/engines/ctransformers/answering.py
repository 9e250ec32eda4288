"""From the process's answers to the events of a stream: bytes to text, stop strings, counts, the completion."""

from __future__ import annotations

import base64
import codecs
import os
import threading
from collections.abc import Callable
from typing import Any

from kani_nb.engines.base import Completion, FinishReason, PrefillProgress, StreamEvent, TextDelta
from kani_nb.engines.ctransformers.sampling import sampling_of
from kani_nb.engines.huggingface.text_stream import StopStrings
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

Emit = Callable[[StreamEvent], None]


class Answer:
    """One answer as it comes.

    Args:
        params: how it is generated.
        prompt_tokens: of its prompt.
        emit: gets its events.
        stop: is set when a stop string has come.
        queued_s: how long the request waited.

    Attributes:
        sampling: the arguments of the package's sampler.
        seed: given or drawn; None where nothing is sampled.
    """

    def __init__(
        self, params: GenerationParams, prompt_tokens: int, emit: Emit, stop: threading.Event, queued_s: float
    ) -> None:
        self.sampling = sampling_of(params)
        self.seed: int | None = None
        if self.sampling["top_k"] != 1:
            self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4)) >> 1
        self._prompt_tokens = prompt_tokens
        self._emit = emit
        self._stop = stop
        self._queued_s = queued_s
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(params.stop_strings)
        self._said: list[str] = []
        self._tokens = self._cached = 0

    def hear(self, answer: dict[str, Any]) -> None:
        """Take one answer of the process."""
        if "prefilled" in answer:
            self._cached = answer["cached"]
            self._emit(PrefillProgress(answer["prefilled"], self._prompt_tokens, self._cached, self._queued_s))
            self._queued_s = 0.0
        elif "token" in answer and not self._stops.is_found:
            self._tokens += 1
            self._say(self._stops.push(self._decoder.decode(base64.b64decode(answer["text"]))))
            if self._stops.is_found:
                self._stop.set()

    def end(self, why: str) -> None:
        """Emit what was held back, and the completion."""
        if self._stops.is_found:
            why = "stop"
        else:
            self._say(self._stops.push(self._decoder.decode(b"", final=True)) + self._stops.finish())
        self._emit(
            Completion(
                ChatMessage.assistant("".join(self._said)),
                self._prompt_tokens,
                self._tokens,
                cached_tokens=self._cached,
                finish_reason=FinishReason(why),
                seed=self.seed,
            )
        )

    def _say(self, text: str) -> None:
        if text:
            self._said.append(text)
            self._emit(TextDelta(text, self._tokens))
