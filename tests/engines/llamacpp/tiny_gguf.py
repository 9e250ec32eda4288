"""Tiny random models as GGUF files: a Llama, a Gemma with sliding windows, a Mamba; with vocabularies that chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import CHAT_TEMPLATE, make_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
WIDTH, HEADS, KV_HEADS = 64, 4, 2


def write_gguf(
    path: Path,
    kind: str = "llama",
    *,
    template: str | None = CHAT_TEMPLATE,
    vocabulary: str = "bpe",
    context: int = 512,
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """A model of a few hundred thousand weights in float32, the same each time; its answers are text.

    Args:
        path: of the file.
        kind: `llama`, `gemma3` (six layers, five of them with a window of 16 tokens) or `mamba`.
        template: the chat template; None for none.
        vocabulary: `bpe` (byte level, with merges) or `spm`.
        context: the window that it claims.
        architecture: claims to be another one.
        metadata: further values.
        tensors_per_file: split it into shards, named as llama.cpp names them; 0 for one file.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture or kind, split_max_tensors=tensors_per_file)
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    unlikely = _add_bpe(writer) if vocabulary == "bpe" else _add_spm(writer)
    if template is not None:
        writer.add_chat_template(template)
    for name, value in (metadata or {}).items():
        writer.add_float32(name, value)
    weights = _Weights(writer)
    weights.add("token_embd", len(unlikely), WIDTH)
    weights.ones("output_norm", WIDTH)
    weights.add("output", len(unlikely), WIDTH, silent=unlikely)
    {"llama": _add_llama, "gemma3": _add_gemma, "mamba": _add_mamba}[kind](writer, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Weights:
    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._random = np.random.default_rng(0)

    def add(self, name: str, *shape: int, scale: float = 0.3, silent: np.ndarray | None = None) -> None:
        values = self._random.normal(0, scale, shape).astype(np.float32)
        if silent is not None:
            values[silent] = 0
        self._writer.add_tensor(f"{name}.weight", values)

    def ones(self, name: str, size: int) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def raw(self, name: str, values: np.ndarray) -> None:
        self._writer.add_tensor(name, values.astype(np.float32))


def _add_bpe(writer: Any) -> np.ndarray:
    """The tests' own tokenizer; gives which tokens should never be the likeliest."""
    tokenizer = make_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in range(len(tokens))])
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    spelled = [tokenizer.decode([token]) for token in range(len(tokens))]
    bad = [not text.isprintable() or "\ufffd" in text or token in special for token, text in enumerate(spelled)]
    return np.array(bad)


def _add_spm(writer: Any) -> np.ndarray:
    words = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", *(f"\u2581w{number}" for number in range(40))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([each.encode() for each in tokens])
    writer.add_token_scores([0.0] * 259 + [-float(number) for number in range(len(words))])
    writer.add_token_types([_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    # The bytes of é are among the few that may come, so that characters are split over tokens.
    likely = [*(3 + byte for byte in "é".encode()), *range(len(tokens) - 6, len(tokens))]
    return np.array([token not in likely for token in range(len(tokens))])


def _add_attention(writer: Any, layers: int, head: int) -> None:
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)


def _add_blocks(weights: _Weights, layers: int, head: int, norms: tuple[tuple[str, int], ...]) -> None:
    for layer in range(layers):
        block = f"blk.{layer}"
        for name, size in norms:
            weights.ones(f"{block}.{name}", size)
        weights.add(f"{block}.attn_q", HEADS * head, WIDTH)
        weights.add(f"{block}.attn_k", KV_HEADS * head, WIDTH)
        weights.add(f"{block}.attn_v", KV_HEADS * head, WIDTH)
        weights.add(f"{block}.attn_output", WIDTH, HEADS * head)
        weights.add(f"{block}.ffn_gate", 2 * WIDTH, WIDTH)
        weights.add(f"{block}.ffn_up", 2 * WIDTH, WIDTH)
        weights.add(f"{block}.ffn_down", WIDTH, 2 * WIDTH)


def _add_llama(writer: Any, weights: _Weights) -> None:
    _add_attention(writer, 2, 16)
    writer.add_rope_dimension_count(16)
    _add_blocks(weights, 2, 16, (("attn_norm", WIDTH), ("ffn_norm", WIDTH)))


def _add_gemma(writer: Any, weights: _Weights) -> None:
    _add_attention(writer, 6, 16)
    writer.add_sliding_window(16)
    names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    _add_blocks(weights, 6, 16, (*((each, WIDTH) for each in names), ("attn_q_norm", 16), ("attn_k_norm", 16)))


def _add_mamba(writer: Any, weights: _Weights) -> None:
    inner, state, rank, kernel, layers = 2 * WIDTH, 8, 4, 4, 2
    writer.add_block_count(layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-6)
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.ones(f"{block}.attn_norm", WIDTH)
        weights.add(f"{block}.ssm_in", 2 * inner, WIDTH)
        weights.add(f"{block}.ssm_conv1d", inner, kernel)
        weights.raw(f"{block}.ssm_conv1d.bias", np.zeros(inner))
        weights.add(f"{block}.ssm_x", rank + 2 * state, inner)
        weights.add(f"{block}.ssm_dt", inner, rank)
        weights.raw(f"{block}.ssm_dt.bias", np.zeros(inner))
        weights.raw(f"{block}.ssm_a", -np.ones((inner, state)))
        weights.raw(f"{block}.ssm_d", np.ones(inner))
        weights.add(f"{block}.ssm_out", WIDTH, inner)
