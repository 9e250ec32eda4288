"""From llama.cpp's logits to the next token: its samplers, in transformers' order and under transformers' names.

Each request has a chain and a random generator of its own. What the parameters leave open is taken from the file's
`general.sampling.*`, where it has them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kani_nb.engines.base import TokenLogprob
from kani_nb.engines.json_constraint import JsonConstraint
from kani_nb.engines.llamacpp.library import library
from kani_nb.engines.llamacpp.native import NativeModel
from kani_nb.engines.llamacpp.vocabulary import Vocabulary
from kani_nb.generation_params import GenerationParams

#: What transformers samples among where nobody says.
_TOP_K = 50
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_METADATA = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_MOST_SEED = 2**32 - 2  # the greatest number of 32 bits asks llama.cpp for a seed of its own


class Sampler:
    """Chooses the tokens of one request; used in a `with` block.

    Args:
        params: what was asked; None means the file's own default.
        metadata: of the file.
        native: the model.
        end_ids: tokens that end the answer, forbidden until `min_new_tokens`; may be empty where none is forbidden.
        context_tokens: how far a repetition is looked for.
    """

    def __init__(
        self,
        params: GenerationParams,
        metadata: Mapping[str, Any],
        native: NativeModel,
        end_ids: Sequence[int],
        context_tokens: int,
    ) -> None:
        def chosen(name: str) -> Any:
            asked = getattr(params, name)
            return asked if asked is not None else metadata.get(_METADATA.get(name, ""))

        asks_to_sample = any(getattr(params, name) is not None for name in _SAMPLING) and params.temperature != 0
        recommended = bool(metadata.get(_METADATA["temperature"]))
        do_sample = params.do_sample if params.do_sample is not None else asks_to_sample or recommended
        self.is_greedy = not do_sample or chosen("temperature") == 0
        self.seed: int | None = None
        self._native = native
        self._end_ids = end_ids
        self._min_new_tokens = params.min_new_tokens or 0
        self._ngrams = _Ngrams(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else None
        self._llama = llama = library()
        self._looks_back = (penalty := chosen("repetition_penalty")) not in (None, 1)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if self._looks_back:
            self._add(_penalties(llama, native.vocabulary_size, context_tokens, float(penalty)))
        if self.is_greedy:
            self._add(llama.llama_sampler_init_greedy())
            return
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4)) % _MOST_SEED
        if (temperature := chosen("temperature")) not in (None, 1):
            self._add(llama.llama_sampler_init_temp(float(temperature)))
        if top_k := _TOP_K if (said := chosen("top_k")) is None else int(said):
            self._add(llama.llama_sampler_init_top_k(top_k))
        if (top_p := chosen("top_p")) is not None and top_p < 1:
            self._add(llama.llama_sampler_init_top_p(float(top_p), 1))
        if min_p := chosen("min_p"):
            self._add(llama.llama_sampler_init_min_p(float(min_p), 1))
        if (typical_p := chosen("typical_p")) is not None and typical_p < 1:
            self._add(llama.llama_sampler_init_typical(float(typical_p), 1))
        self._add(llama.llama_sampler_init_dist((self.seed ^ (self.seed >> 32)) % _MOST_SEED))

    def _add(self, sampler: Any) -> None:
        self._llama.llama_sampler_chain_add(self._chain, sampler)

    def __enter__(self) -> Sampler:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the chain."""
        chain, self._chain = self._chain, None
        self._llama.llama_sampler_free(chain)

    def begin(self, ids: Sequence[int]) -> None:
        """Tell it the prompt."""
        if self._looks_back:
            for token in ids:
                self._llama.llama_sampler_accept(self._chain, token)

    def choose(self, ids: Sequence[int], new_tokens: int, constraint: JsonConstraint | None = None) -> int:
        """The next token.

        Args:
            ids: prompt and answer so far.
            new_tokens: how many of them are the answer's.
            constraint: that says which tokens may come; it is told of the choice by the caller.
        """
        forbidden: list[int] = []
        is_whole = constraint is not None and constraint.is_whole  # then nothing but the end may follow
        if new_tokens < self._min_new_tokens and not is_whole:
            forbidden += self._end_ids
        if self._ngrams is not None:
            forbidden += self._ngrams.after(ids)
        if constraint is not None or forbidden:
            logits = logits_of(self._native)
            logits[forbidden] = -float("inf")
            if constraint is not None:
                allowed = constraint.allowed()
                logits[: len(allowed)][~allowed] = -float("inf")
        return int(self._llama.llama_sampler_sample(self._chain, self._native.context, -1))


def logits_of(native: NativeModel) -> Any:
    """`(V,) float32` in NumPy, of the last token computed: llama.cpp's own memory, until it computes again."""
    import numpy as np

    return np.ctypeslib.as_array(native.logits(), shape=(native.vocabulary_size,))


class Certainty:
    """How sure the model is of each token that may come next; made before one is chosen."""

    def __init__(self, native: NativeModel, vocabulary: Vocabulary) -> None:
        import numpy as np

        logits = logits_of(native).astype(np.float64)
        highest = logits.max()
        self._logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
        self._vocabulary = vocabulary

    def of(self, token: int, alternatives: int) -> TokenLogprob:
        """That of `token`, and of the likeliest others."""
        best = self._logprobs.argsort()[::-1][:alternatives].tolist()
        others = tuple((self._text(other), float(self._logprobs[other])) for other in best)
        return TokenLogprob(self._text(token), float(self._logprobs[token]), others)

    def _text(self, token: int) -> str:
        return self._vocabulary.piece(token, special=True).decode("utf-8", "replace")


def _penalties(llama: Any, vocabulary_size: int, last: int, repeat: float) -> Any:
    make = llama.llama_sampler_init_penalties
    # The vocabulary's size was added to the arguments in 2026.
    sizes = (vocabulary_size, last) if len(make.argtypes) == 5 else (last,)
    return make(*sizes, repeat, 0.0, 0.0)


class _Ngrams:
    """The tokens that would repeat a run of `size` tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._read = 0

    def after(self, ids: Sequence[int]) -> list[int]:
        """The tokens that have followed the last `size - 1` of `ids` before."""
        before = self._size - 1
        for end in range(max(self._read, before), len(ids)):
            self._seen[tuple(ids[end - before : end])].append(ids[end])
        self._read = len(ids)
        return self._seen.get(tuple(ids[len(ids) - before :]), []) if len(ids) >= before else []
