"""How many tokens of a prompt are computed in one forward pass: what sets the working memory of a prefill.

Depends on nothing but the model and the kind of device, so that the same prompt is always computed in the same shapes
and gives the same numbers.
"""

from __future__ import annotations

import math

#: What one CPU thread (float32, half precision) and a GPU do in a prefill, in FLOP/s: measured on a server CPU of
#: 2024, and low on purpose for the GPU. It only sets how often a Stop is looked at.
_ASSUMED_FLOPS = {"cpu": 95e9, "cpu half": 150e9, "gpu": 20e12}
_CHUNK_SECONDS = 0.2


def chunk_size(parameters: int, *, is_gpu: bool, is_half: bool) -> int:
    """Tokens of a prompt that one forward pass takes: the power of two that needs about 0.2 s.

    Smaller pieces would stop sooner and cost more: on one thread a prompt of 768 tokens in bfloat16 takes 1.72 s in
    pieces of 64, 1.47 s of 128 and 1.34 s in one.
    """
    flops = _ASSUMED_FLOPS["gpu" if is_gpu else "cpu half" if is_half else "cpu"]
    tokens = max(1.0, _CHUNK_SECONDS * flops / (2 * max(1, parameters)))
    lowest, highest = (256, 4096) if is_gpu else (8, 256)
    return int(max(lowest, min(highest, 2 ** round(math.log2(tokens)))))
