"""Models run by transformers in this process."""

from kani_nb.engines.huggingface.base import HuggingEngine

__all__ = ["HuggingEngine"]
