"""From logits to the next token, with transformers' own processors and a random generator per request.

`generate` draws from the process's global generator, so that two answers at once, or a plot in another cell, change
each other's text. Here each request owns its generator. What the parameters leave open is taken from the model's
generation config, in transformers' order and with its defaults.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kani_nb.engines.base import TokenLogprob
from kani_nb.generation_params import GenerationParams

if TYPE_CHECKING:
    from kani_nb.engines.json_constraint import JsonConstraint

#: What transformers samples among where neither the request nor the model says.
_TOP_K = 50
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def token_logprob(logits: Any, token: int, alternatives: int, tokenizer: Any) -> TokenLogprob:
    """How sure the model was of `token`, and what else it thought of.

    Args:
        logits: `(1, V)`, as the model gave them.
        token: that was chosen.
        alternatives: how many of the likeliest to give.
        tokenizer: for their text.
    """
    import torch

    logprobs = torch.log_softmax(logits[0].float(), dim=-1)
    best = torch.topk(logprobs, alternatives) if alternatives else None
    others = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best is not None else ()
    return TokenLogprob(
        tokenizer.decode([token]),
        float(logprobs[token]),
        tuple((tokenizer.decode([other]), value) for other, value in others),
    )


class Sampler:
    """Chooses tokens for one request.

    Args:
        params: what was asked; None means the model's own default.
        defaults: the model's generation config.
        eos_ids: tokens that end the answer, forbidden until `min_new_tokens`.
        device: where the logits are.
    """

    def __init__(self, params: GenerationParams, defaults: Any, eos_ids: Sequence[int], device: Any) -> None:
        import torch

        def chosen(name: str) -> Any:
            asked = getattr(params, name)
            return asked if asked is not None else getattr(defaults, name, None)

        asks_to_sample = any(getattr(params, name) is not None for name in _SAMPLING) and params.temperature != 0
        do_sample = params.do_sample
        if do_sample is None:
            do_sample = asks_to_sample or bool(getattr(defaults, "do_sample", False))
        self.is_greedy = not do_sample or chosen("temperature") == 0
        self.seed: int | None = None
        #: Whether `choose` must be given the ids so far.
        self.needs_ids = False
        self._generator: Any = None
        self._processors = self._build(chosen, defaults)
        if not self.is_greedy:
            self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4))
            self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._min_new_tokens = chosen("min_new_tokens") or 0
        self._eos_ids = list(eos_ids)

    def _build(self, chosen: Any, defaults: Any) -> list[Any]:
        from transformers.generation import logits_process as lp

        processors: list[Any] = []
        if (penalty := chosen("repetition_penalty")) not in (None, 1, 1.0):
            processors.append(lp.RepetitionPenaltyLogitsProcessor(penalty=float(penalty)))
        if size := chosen("no_repeat_ngram_size"):
            processors.append(lp.NoRepeatNGramLogitsProcessor(size))
        self.needs_ids = bool(processors)
        if suppressed := getattr(defaults, "suppress_tokens", None):
            processors.append(lp.SuppressTokensLogitsProcessor(suppressed))
        if self.is_greedy:
            return processors
        temperature = chosen("temperature")
        if temperature not in (None, 1, 1.0):
            processors.append(lp.TemperatureLogitsWarper(float(temperature)))
        top_k = chosen("top_k")
        if top_k is None:
            top_k = _TOP_K
        if top_k:
            processors.append(lp.TopKLogitsWarper(top_k=top_k))
        if (top_p := chosen("top_p")) is not None and top_p < 1:
            processors.append(lp.TopPLogitsWarper(top_p=float(top_p)))
        if min_p := chosen("min_p"):
            processors.append(lp.MinPLogitsWarper(min_p=float(min_p)))
        if (typical_p := chosen("typical_p")) is not None and typical_p < 1:
            processors.append(lp.TypicalLogitsWarper(mass=float(typical_p)))
        return processors

    def choose(self, logits: Any, ids: Any, new_tokens: int, constraint: JsonConstraint | None = None) -> int:
        """The next token.

        Args:
            logits: `(1, V)`, of the last position.
            ids: `(1, T) int64`, prompt and answer so far; may be None unless `needs_ids`.
            new_tokens: how many tokens the answer has already.
            constraint: that says which tokens may come; it is told of the choice by the caller.
        """
        import torch

        is_early = new_tokens < self._min_new_tokens and bool(self._eos_ids)
        if constraint is not None:
            allowed = torch.from_numpy(constraint.allowed()).to(logits.device)
            logits = logits[:, : len(allowed)].masked_fill(~allowed[None, : logits.shape[1]], -torch.inf)
            is_early = is_early and not constraint.is_whole
        if is_early:
            logits = logits.clone()
            logits[:, self._eos_ids] = -torch.inf
        if self.is_greedy and not self._processors:
            return int(logits.argmax(dim=-1))
        scores = logits.float()
        for processor in self._processors:
            scores = processor(ids, scores)
        if self.is_greedy:
            return int(scores.argmax(dim=-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
