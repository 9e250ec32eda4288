"""Tiny random models in the GGML formats of 2023, from before GGUF: one file, no metadata, every tensor named.

Layouts as in the examples of the ggml repository of that year (gpt-2, gpt-j, gpt-neox, mpt) and of llama.cpp (ggjt,
version 3).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 128
_PLAIN, _LLAMA = 0x67676D6C, 0x67676A74
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "more", "one", "two", "three")
_WRITTEN = [bytes([code]) for code in (10, *range(32, 127))] + [f" {word}".encode() for word in _WORDS]
VOCABULARY = [*_WRITTEN, b"<|endoftext|>"]
#: LLaMA's: the first three, all bytes, and words.
LLAMA_VOCABULARY = [b"<unk>", b"<s>", b"</s>", *(bytes([code]) for code in range(256)), *_WRITTEN[96:]]


class _Writer:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._random = np.random.default_rng(0)
        self.alignment = 1

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def numbers(self, *values: int) -> None:
        self._file.write(struct.pack(f"<{len(values)}i", *values))

    def reals(self, *values: float) -> None:
        self._file.write(struct.pack(f"<{len(values)}f", *values))

    def words(self, words: list[bytes], *, scores: bool = False) -> None:
        for word in words:
            self.numbers(len(word))
            self._file.write(word)
            if scores:
                self.reals(0.0)

    def tensor(self, name: str, *shape: int, scale: float = 0.3, silent: list[int] | None = None) -> None:
        self._write(name, self._random.normal(0, scale, shape), silent)

    def filled(self, name: str, size: int, value: float) -> None:
        self._write(name, np.full(size, value), None)

    def norm(self, name: str, *, weight: str = "weight", bias: str | None = "bias") -> None:
        self.filled(f"{name}{weight}", WIDTH, 1.0)
        if bias is not None:
            self.filled(f"{name}{bias}", WIDTH, 0.0)

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.tensor(f"{name}weight", outputs, inputs)
        self.filled(f"{name}bias", outputs, 0.0)

    def _write(self, name: str, values: np.ndarray, silent: list[int] | None) -> None:
        values = values.astype("<f4")
        if silent:
            values[silent] = 0
        self.numbers(values.ndim, len(name), 0, *reversed(values.shape))
        self._file.write(name.encode())
        self._file.write(b"\0" * (-self._file.tell() % self.alignment))
        self._file.write(values.tobytes())


def write_ggml(path: Path, model_type: str) -> Path:
    """A model of a hundred thousand weights, the same each time; its answers are letters and words."""
    with _Writer(path) as file:
        _KINDS[model_type](file)
    return path


def _gpt2(file: _Writer) -> None:
    file.numbers(_PLAIN, len(VOCABULARY), CONTEXT, WIDTH, HEADS, LAYERS, 0, len(VOCABULARY))
    file.words(VOCABULARY)
    norm = {"weight": "/g", "bias": "/b"}
    file.norm("model/ln_f", **norm)
    file.tensor("model/wte", len(VOCABULARY), WIDTH)
    file.tensor("model/wpe", CONTEXT, WIDTH, scale=0.1)
    file.tensor("model/lm_head", len(VOCABULARY), WIDTH, silent=[0, len(VOCABULARY) - 1])
    shapes = {"attn/c_attn": (3, 1), "attn/c_proj": (1, 1), "mlp/c_fc": (4, 1), "mlp/c_proj": (1, 4)}
    for layer in range(LAYERS):
        file.norm(f"model/h{layer}/ln_1", **norm)
        file.norm(f"model/h{layer}/ln_2", **norm)
        for name, (outputs, inputs) in shapes.items():
            file.tensor(f"model/h{layer}/{name}/w", outputs * WIDTH, inputs * WIDTH)
            file.filled(f"model/h{layer}/{name}/b", outputs * WIDTH, 0.0)


def _gptj(file: _Writer) -> None:
    file.numbers(_PLAIN, len(VOCABULARY), CONTEXT, WIDTH, HEADS, LAYERS, WIDTH // HEADS, 0, len(VOCABULARY))
    file.words(VOCABULARY)
    file.tensor("transformer.wte.weight", len(VOCABULARY), WIDTH)
    file.norm("transformer.ln_f.")
    file.linear("lm_head.", len(VOCABULARY), WIDTH)
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}."
        file.norm(f"{block}ln_1.")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            file.tensor(f"{block}attn.{name}.weight", WIDTH, WIDTH)
        file.linear(f"{block}mlp.fc_in.", 4 * WIDTH, WIDTH)
        file.linear(f"{block}mlp.fc_out.", WIDTH, 4 * WIDTH)


def _gpt_neox(file: _Writer) -> None:
    file.numbers(_PLAIN, len(VOCABULARY), CONTEXT, WIDTH, HEADS, LAYERS, WIDTH // HEADS, 1, 0)
    file.words(VOCABULARY)
    file.tensor("gpt_neox.embed_in.weight", len(VOCABULARY), WIDTH)
    file.norm("gpt_neox.final_layer_norm.")
    file.tensor("embed_out.weight", len(VOCABULARY), WIDTH)
    for layer in range(LAYERS):
        block = f"gpt_neox.layers.{layer}."
        file.norm(f"{block}input_layernorm.")
        file.norm(f"{block}post_attention_layernorm.")
        file.linear(f"{block}attention.query_key_value.", 3 * WIDTH, WIDTH)
        file.linear(f"{block}attention.dense.", WIDTH, WIDTH)
        file.linear(f"{block}mlp.dense_h_to_4h.", 4 * WIDTH, WIDTH)
        file.linear(f"{block}mlp.dense_4h_to_h.", WIDTH, 4 * WIDTH)


def _mpt(file: _Writer) -> None:
    file.numbers(_PLAIN, WIDTH, CONTEXT, HEADS, LAYERS, len(VOCABULARY))
    file.reals(8.0, 0.0)
    file.numbers(0)
    file.words(VOCABULARY)
    file.tensor("transformer.wte.weight", len(VOCABULARY), WIDTH)
    file.norm("transformer.norm_f.", bias=None)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}."
        file.norm(f"{block}norm_1.", bias=None)
        file.norm(f"{block}norm_2.", bias=None)
        file.tensor(f"{block}attn.Wqkv.weight", 3 * WIDTH, WIDTH)
        file.tensor(f"{block}attn.out_proj.weight", WIDTH, WIDTH)
        file.tensor(f"{block}ffn.up_proj.weight", 4 * WIDTH, WIDTH)
        file.tensor(f"{block}ffn.down_proj.weight", WIDTH, 4 * WIDTH)


def _llama(file: _Writer) -> None:
    multiple = 32
    inner = -(-(2 * 4 * WIDTH // 3) // multiple) * multiple
    file.numbers(_LLAMA, 3, len(LLAMA_VOCABULARY), WIDTH, multiple, HEADS, LAYERS, WIDTH // HEADS, 0)
    file.words(LLAMA_VOCABULARY, scores=True)
    file.alignment = 32
    written = set(_WRITTEN[1:])
    silent = [token for token, text in enumerate(LLAMA_VOCABULARY) if text not in written]
    file.tensor("tok_embeddings.weight", len(LLAMA_VOCABULARY), WIDTH)
    file.norm("norm.", bias=None)
    file.tensor("output.weight", len(LLAMA_VOCABULARY), WIDTH, silent=silent)
    for layer in range(LAYERS):
        block = f"layers.{layer}."
        for name in ("wq", "wk", "wv", "wo"):
            file.tensor(f"{block}attention.{name}.weight", WIDTH, WIDTH)
        file.norm(f"{block}attention_norm.", bias=None)
        file.norm(f"{block}ffn_norm.", bias=None)
        file.tensor(f"{block}feed_forward.w1.weight", inner, WIDTH)
        file.tensor(f"{block}feed_forward.w2.weight", WIDTH, inner)
        file.tensor(f"{block}feed_forward.w3.weight", inner, WIDTH)


_KINDS = {
    "gpt2": _gpt2,
    "starcoder": _gpt2,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "dolly-v2": _gpt_neox,
    "mpt": _mpt,
    "llama": _llama,
}
