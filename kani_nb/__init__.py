"""Chat with a language model you run yourself, in ordinary notebook cells, and see what it costs.

Public names are imported when first used, so that `import kani_nb` loads no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kani_nb._runtime import Runtime, runtime
    from kani_nb.config import EngineConfig
    from kani_nb.engines.base import BaseCompletion, BaseEngine, Completion, TextDelta
    from kani_nb.engines.echo import EchoEngine
    from kani_nb.engines.huggingface import HuggingEngine
    from kani_nb.engines.huggingface.llama2 import LlamaEngine
    from kani_nb.engines.llamacpp import LlamaCppEngine
    from kani_nb.engines.openai import OpenAIEngine
    from kani_nb.engines.prompts import PromptPipeline
    from kani_nb.errors import KaniNbError
    from kani_nb.functions import ai_function
    from kani_nb.messages import ChatMessage, ChatRole, ToolCall
    from kani_nb.metrics.recorder import GenerationMetrics

__version__ = "0.1.0"

_HOMES = {
    "BaseCompletion": "kani_nb.engines.base",
    "BaseEngine": "kani_nb.engines.base",
    "ChatMessage": "kani_nb.messages",
    "ChatRole": "kani_nb.messages",
    "Completion": "kani_nb.engines.base",
    "EchoEngine": "kani_nb.engines.echo",
    "EngineConfig": "kani_nb.config",
    "GenerationMetrics": "kani_nb.metrics.recorder",
    "GenerationParams": "kani_nb.generation_params",
    "HuggingEngine": "kani_nb.engines.huggingface",
    "KaniNbError": "kani_nb.errors",
    "LlamaCppEngine": "kani_nb.engines.llamacpp",
    "LlamaEngine": "kani_nb.engines.huggingface.llama2",
    "OpenAIEngine": "kani_nb.engines.openai",
    "PromptPipeline": "kani_nb.engines.prompts",
    "Runtime": "kani_nb._runtime",
    "TextDelta": "kani_nb.engines.base",
    "ToolCall": "kani_nb.messages",
    "ai_function": "kani_nb.functions",
    "runtime": "kani_nb._runtime",
}

__all__ = [
    "BaseCompletion",
    "BaseEngine",
    "ChatMessage",
    "ChatRole",
    "Completion",
    "EchoEngine",
    "EngineConfig",
    "GenerationMetrics",
    "GenerationParams",
    "HuggingEngine",
    "KaniNbError",
    "LlamaCppEngine",
    "LlamaEngine",
    "OpenAIEngine",
    "PromptPipeline",
    "Runtime",
    "TextDelta",
    "ToolCall",
    "ai_function",
    "runtime",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext kani_nb` calls."""
    from kani_nb.notebook.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What `%unload_ext kani_nb` calls."""
    from kani_nb.notebook.extension import unload

    unload(shell)
