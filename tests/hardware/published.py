"""Configurations of published models, made from their papers' and repositories' numbers; no weights are fetched."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from kani_nb.hardware.shape_reading import shape_of
from kani_nb.hardware.shapes import ModelShape

#: Hidden size, layers, heads, width of the MLP: Table 2 of arXiv 2302.13971, and the released `params.json`.
LLAMA_SIZES = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "30B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
}


def _llama(size: str) -> Any:
    from transformers import LlamaConfig

    hidden, layers, heads, width = LLAMA_SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=width,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float16",
    )


def _llama_3_70b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _mixtral_8x7b() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _qwen3_30b_a3b() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _gemma_3_27b() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        hidden_size=5376,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=21504,
        vocab_size=262208,
        sliding_window=1024,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def published_config(name: str) -> Any:
    """The configuration of `llama-7B`, `llama-3-70B`, `mixtral-8x7B`, `qwen3-30B-A3B` or `gemma-3-27B`."""
    others = {
        "llama-3-70B": _llama_3_70b,
        "mixtral-8x7B": _mixtral_8x7b,
        "qwen3-30B-A3B": _qwen3_30b_a3b,
        "gemma-3-27B": _gemma_3_27b,
    }
    return others[name]() if name in others else _llama(name.removeprefix("llama-"))


@cache
def _read(name: str) -> tuple[ModelShape, float]:
    config = published_config(name)
    started = time.process_time()
    return shape_of(config, name), time.process_time() - started


def published(name: str) -> ModelShape:
    """The shape of that model, read once for all tests."""
    return _read(name)[0]


def seconds_of_reading(name: str) -> float:
    """CPU time that its shape took to read."""
    return _read(name)[1]
