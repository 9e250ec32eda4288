"""One generation of an encoder-decoder model (T5, BART): the prompt is read once by the encoder, the answer decoded.

The decoder begins anew for each answer, so that no states are kept for later prompts.
"""

from __future__ import annotations

from typing import Any

from kani_nb.engines.huggingface.generation import Emit, Generation
from kani_nb.engines.huggingface.prefix_cache import CacheEntry


class EncoderDecoderGeneration(Generation):
    """As `Generation`."""

    _encoded: Any = None
    _states: Any = None
    _start: Any = 0

    def _prefill(self, entry: CacheEntry, emit: Emit, cached: int) -> Any:
        """The logits of the answer's first token, or None if the answer is no longer wanted."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        if self._stop.is_set():
            return None
        model, device = self._loaded.model, self._loaded.device
        ids = torch.tensor([self._ids], device=device)
        self._encoded = model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))
        self._states = EncoderDecoderCache(DynamicCache(), DynamicCache())
        generation = model.generation_config
        self._start = start = next(
            each
            for each in (
                generation.decoder_start_token_id,
                getattr(model.config, "decoder_start_token_id", None),
                generation.bos_token_id,
                0,
            )
            if each is not None
        )
        return self._decoded(int(start))

    def _step(self, entry: CacheEntry) -> Any:
        """The logits after the newest token."""
        return self._decoded(self._ids[-1])

    def _choose(self, logits: Any, number: int, *, is_free: bool) -> int:
        """The next token; the first is the one that the model always begins with (its target language), if it does."""
        forced = getattr(self._loaded.model.generation_config, "forced_bos_token_id", None)
        return int(forced) if number == 0 and forced is not None else super()._choose(logits, number, is_free=is_free)

    def _ids_tensor(self) -> Any:
        """The decoder's ids so far, `(1, T) int64`: what repeats the prompt repeats nothing."""
        import torch

        return torch.tensor([[int(self._start), *self._ids[self._prompt_tokens :]]], device=self._loaded.device)

    def _decoded(self, token: int) -> Any:
        import torch

        output = self._loaded.model(
            encoder_outputs=self._encoded,
            decoder_input_ids=torch.tensor([[token]], device=self._loaded.device),
            past_key_values=self._states,
            use_cache=True,
        )
        return output.logits[:, -1, :]
