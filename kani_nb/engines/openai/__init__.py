"""Any OpenAI-compatible server as an engine."""

from kani_nb.engines.openai.client import OpenAIClient
from kani_nb.engines.openai.engine import OpenAIEngine

__all__ = ["OpenAIClient", "OpenAIEngine"]
