"""What a model thinks of a given text: the probabilities of every token at every position, for comparing precisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kani_nb.engines.huggingface.driving import CacheMode, forward
from kani_nb.engines.huggingface.generation import LoadedModel
from kani_nb.engines.huggingface.kv_layers import new_cache
from kani_nb.errors import ConfigError, PromptTooLongError


def log_probs(loaded: LoadedModel, ids: Sequence[int]) -> Any:
    """Natural-log probabilities `(T, V) float32` on the CPU: row t is what the model expects after `ids[: t + 1]`.

    Computed in the chunks in which prompts are; the device holds the logits of one chunk at a time.

    Raises:
        ConfigError: there are no ids.
        PromptTooLongError: there are more than the model's context holds.
    """
    import torch

    if not ids:
        raise ConfigError("no tokens were given", fix="a text of at least one word")
    if len(ids) > loaded.context_tokens:
        raise PromptTooLongError(
            f"the text has {len(ids):,} tokens", why=f"the model holds {loaded.context_tokens:,}", fix="a shorter text"
        )
    rows = []
    # Beyond the boundary of a longrope every position is computed with other factors, its first ones too.
    has_cache = loaded.driving.mode is CacheMode.REUSE and not loaded.driving.is_beyond(len(ids))
    cache = new_cache(loaded.model.config) if has_cache else None
    size = loaded.chunk_tokens if has_cache else len(ids)
    with torch.inference_mode():
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            logits = forward(loaded.model, loaded.driving, cache, piece, start, loaded.device, keep=len(piece))
            rows.append(torch.log_softmax(logits[0].float(), dim=-1).cpu())
    return torch.cat(rows)
