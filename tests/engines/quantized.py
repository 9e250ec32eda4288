"""Quantized models for the tests of saving: loaded by plain transformers, compared by logits and bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import make_model

SCHEMES = ("float32", "bfloat16", "int8", "fp4", "fp4 + double quant", "nf4", "nf4 + double quant")
OURS = ("cpu-int8", "cpu-int4")


def make_bfloat16(folder: Path, **changes: Any) -> Path:
    """A tiny model whose checkpoint is bfloat16, as most are."""
    import torch
    from transformers import AutoModelForCausalLM

    make_model(folder, **changes)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def four_bit(
    kind: str = "nf4", *, double_quant: bool = False, compute: str = "bfloat16", storage: str = "uint8"
) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
    )


def config_of(scheme: str) -> Any:
    """The `quantization_config` of one of `SCHEMES` or `OURS`."""
    from transformers import BitsAndBytesConfig

    if scheme in ("float32", "bfloat16"):
        return None
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if scheme in OURS:
        from kani_nb.hardware.packed_quantizer import PackedConfig, register

        register()
        return PackedConfig(bits=int(scheme[-1]))
    kind, _, nested = scheme.partition(" ")
    return four_bit(kind, double_quant=bool(nested))


def load(folder: Path, scheme: str | None = None, **options: Any) -> Any:
    """The model in `folder`; without a scheme as anyone would load it."""
    from transformers import AutoModelForCausalLM

    if scheme is not None:
        options = {"quantization_config": config_of(scheme), "dtype": "bfloat16"} | options
        if scheme == "float32":
            options["dtype"] = "float32"
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> Any:
    """What the model says to a few tokens, `(1, T, V)`."""
    import torch

    with torch.inference_mode():
        return model(torch.arange(5, 17, device=model.device)[None]).logits.clone()


def four_bit_layers(model: Any) -> list[Any]:
    import bitsandbytes

    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def pack(model: Any) -> Any:
    """Do to every 4-bit layer what its first use does on a CPU with AVX512_BF16, whatever CPU this is."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for layer in four_bit_layers(model):
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    return model


def file_of(model: Any, folder: Path) -> dict[str, Any]:
    """The tensors that transformers itself writes for a model that never ran."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


def assert_same_tensors(folder: Path, expected: dict[str, Any]) -> None:
    """The weights in `folder` are those, bit for bit: names, dtypes, shapes and numbers."""
    from safetensors.torch import load_file

    assert_equal(load_file(folder / "model.safetensors"), expected)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both hold the same tensors, bit for bit; as bytes, since codes that are stored as floats may spell NaN."""
    import torch

    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        both = [each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*both), name
