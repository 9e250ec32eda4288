"""Legacy GGML files, run by the ctransformers package in a process of its own. `LlamaCppEngine` is the successor."""

from kani_nb.engines.ctransformers.base import CTransformersEngine
from kani_nb.engines.ctransformers.llama2 import LlamaCTransformersEngine

__all__ = ["CTransformersEngine", "LlamaCTransformersEngine"]
