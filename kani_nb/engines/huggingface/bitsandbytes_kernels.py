"""bitsandbytes' ways that a person should not have to know: its log lines, and layers that its CPU kernels cannot take.

Looked up in bitsandbytes 0.46 to 0.50. Other versions are left as they are.
"""

from __future__ import annotations

import logging
from typing import Any

#: On CPUs with AVX512-BF16 4-bit weights are packed again for a faster product, in tiles of outputs x inputs.
_OUTPUT_TILE, _INPUT_TILE = 32, 64


#: Logger -> what its line says: that each 8-bit product casts its inputs (210 lines for every token of a small model),
#: and that an optional package of kernels, which is fetched from the Hub, is not installed.
_NOISE = {
    "bitsandbytes.autograd._functions": "inputs will be cast from",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


class _Without(logging.Filter):
    """Leaves out lines that hold a certain text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        return self._text not in str(record.msg)


def silence_noise() -> None:
    """Keep the log readable while quantized weights are multiplied; may be called again."""
    for name, text in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(text))


def keep_odd_layers_unpacked(model: Any) -> int:
    """Take the slower, general product for 4-bit layers whose shape the packed one would crash on; how many there are.

    The packed product asserts that outputs are a multiple of 32 and fails on inputs that are no multiple of 64.
    """
    import bitsandbytes

    count = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and hasattr(module, "support_avx512bf16_for_cpu"):
            is_odd = module.out_features % _OUTPUT_TILE or module.in_features % _INPUT_TILE
            if is_odd and module.support_avx512bf16_for_cpu:
                module.support_avx512bf16_for_cpu = False
                count += 1
    return count
