"""From settings to the `quantization_config` that `from_pretrained` takes; the libraries are imported when called."""

from __future__ import annotations

from typing import Any

from kani_nb.quantization import Quantization


def bitsandbytes_config(settings: Quantization, dtype: str) -> Any:
    """Transformers' `BitsAndBytesConfig` for `int8`, `nf4` and `fp4`; `dtype` is the name of the model's."""
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {}
    if settings.llm_int8_skip_modules is not None:
        options["llm_int8_skip_modules"] = list(settings.llm_int8_skip_modules)
    if settings.llm_int8_enable_fp32_cpu_offload is not None:
        options["llm_int8_enable_fp32_cpu_offload"] = settings.llm_int8_enable_fp32_cpu_offload
    if settings.scheme == "int8":
        for name in ("llm_int8_threshold", "llm_int8_has_fp16_weight"):
            if (value := getattr(settings, name)) is not None:
                options[name] = value
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.scheme,
        bnb_4bit_use_double_quant=bool(settings.double_quant),
        bnb_4bit_compute_dtype=dtype if settings.compute_dtype == "auto" else settings.compute_dtype,
        bnb_4bit_quant_storage=settings.quant_storage or "uint8",
        **options,
    )


def packed_config(settings: Quantization, dtype: str) -> Any:
    """Our own `PackedConfig` for `cpu-int8` and `cpu-int4`."""
    from kani_nb.hardware import packed_quantizer

    config: Any = packed_quantizer.PackedConfig
    return config(
        bits=8 if settings.scheme == "cpu-int8" else 4,
        group_size=settings.group_size,
        skip_modules=settings.llm_int8_skip_modules,
    )


def gptq_config(settings: Quantization, dtype: str) -> Any:
    """Transformers' `GPTQConfig` for quantizing while loading; to keep the result, `quantize_gptq` is the way.

    Without a back end named, gptqmodel arranges the weights for this machine at once, and saving them loses them.
    """
    from transformers import GPTQConfig

    from kani_nb.hardware.calibration import CALIBRATION_TEXTS

    return GPTQConfig(
        bits=4, group_size=settings.group_size or 128, dataset=list(CALIBRATION_TEXTS), sym=True, backend="torch"
    )
