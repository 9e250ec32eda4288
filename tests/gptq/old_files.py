"""Checkpoints as GPTQ-for-LLaMa wrote them in 2023, made of known weights by code that shares nothing with ours."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import make_model

WIDTH, INNER = 64, 128


def old_model(folder: Path, width: int = WIDTH, inner: int = INNER) -> Path:
    """Configuration and tokenizer of the Llama of two layers that the files are of; no weights."""
    make_model(folder, hidden_size=width, intermediate_size=inner)
    (folder / "model.safetensors").unlink()
    return folder


def words(values: Any, bits: int) -> torch.Tensor:
    """`(K, N)` codes as int32 words: every column one number, its lowest 32 bits first."""
    columns = []
    for column in values.T.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(column))
        size = math.ceil(len(column) * bits / 32)
        columns.append(struct.unpack(f"<{size}i", number.to_bytes(4 * size, "little")))
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def codes(packed: Any, bits: int, count: int) -> Any:
    """The other way, for the first `count` values of each column."""
    columns = []
    for column in packed.T.tolist():
        number = int.from_bytes(struct.pack(f"<{len(column)}i", *column), "little")
        columns.append([(number >> (bits * place)) & (2**bits - 1) for place in range(count)])
    return np.array(columns).T


class OldFile:
    """A checkpoint as it was written in 2023, and the weights that it stands for."""

    def __init__(
        self,
        *,
        bits=4,
        group_size=32,
        is_symmetric=False,
        act_order=False,
        index=True,
        seed=0,
        layers=2,
        width=WIDTH,
        inner=INNER,
    ):
        self.rng, self.bits, self.group_size = np.random.default_rng(seed), bits, group_size
        self.is_symmetric, self.act_order, self.index = is_symmetric, act_order, index
        self.weights, self.tensors = {}, {}
        half = self.rng.standard_normal((400, width)).astype(np.float16)
        self.tensors["model.embed_tokens.weight"] = torch.from_numpy(half)
        for number in range(layers):
            layer = f"model.layers.{number}"
            for name, outputs in (("q", width), ("k", width // 2), ("v", width // 2), ("o", width)):
                self.add(f"{layer}.self_attn.{name}_proj", outputs, width)
            for name, outputs, inputs in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
                self.add(f"{layer}.mlp.{name}_proj", outputs, inputs)
            self.tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.tensors[f"{layer}.{name}.weight"] = torch.ones(width, dtype=torch.float16)
        self.tensors["model.norm.weight"] = torch.ones(width, dtype=torch.float16)
        self.tensors["lm_head.weight"] = torch.from_numpy(half).clone()

    def add(self, name, outputs, inputs):
        size = inputs if self.group_size == -1 else self.group_size
        groups, highest = math.ceil(inputs / size), 2**self.bits - 1
        code = self.rng.integers(0, highest + 1, (inputs, outputs))
        middle = (highest + 1) // 2
        zero = (
            np.full((groups, outputs), middle)
            if self.is_symmetric
            else self.rng.integers(1, highest + 1, (groups, outputs))
        )
        scale = (self.rng.uniform(0.1, 1, (groups, outputs)) / highest).astype(np.float16)
        group = np.arange(inputs) // size
        if self.act_order:
            group = self.rng.permutation(group)
        self.weights[name] = (scale.astype(np.float64)[group] * (code - zero[group])).T
        self.tensors[f"{name}.qweight"] = words(code, self.bits)
        self.tensors[f"{name}.qzeros"] = words((zero - 1).T, self.bits).T.contiguous()
        self.tensors[f"{name}.scales"] = torch.from_numpy(scale)
        if self.index or self.act_order:
            self.tensors[f"{name}.g_idx"] = torch.from_numpy(group.astype(np.int32))

    def save(self, path, **how):
        torch.save(self.tensors, path, **how)
        return path
