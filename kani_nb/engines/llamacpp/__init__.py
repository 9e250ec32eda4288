"""GGUF files, run by llama.cpp in this process."""

from kani_nb.engines.llamacpp.base import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
