"""The short list that `%load_engine auto` chooses from, with what must be known of each model to plan it offline.

Chat models that anyone may download and use (Apache-2.0, no account), in steps of size, each of which answers at once:
models that think first need hundreds of tokens before the answer begins. Sizes are those of their published
`config.json`; nothing here decides, and nothing is asked of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kani_nb.engines.sources_aliases import ALIASES, Alias


@dataclass(frozen=True, slots=True)
class AutoModel:
    """One model of the short list.

    Attributes:
        name: its alias.
        model_type: transformers' name of the architecture.
        sizes: the values of its configuration that decide what it takes.
    """

    name: str
    model_type: str
    sizes: Mapping[str, Any]

    @property
    def alias(self) -> Alias:
        """Its repository, licence and number of parameters."""
        return ALIASES[self.name]

    @property
    def context_tokens(self) -> int:
        """Its own window."""
        return int(self.sizes["max_position_embeddings"])

    def config(self) -> Any:
        """A transformers configuration of these sizes, good for planning. Imports transformers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.sizes, dtype="bfloat16")


def _sizes(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, context: int, **more: Any
) -> Mapping[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }
    return MappingProxyType({"tie_word_embeddings": True} | sizes | more)


#: Smallest first: of two that would do, the larger one is taken for the better.
AUTO_MODELS = (
    AutoModel("smollm2", "llama", _sizes(30, 576, 1536, 9, 3, 49152, 8192)),
    AutoModel("smollm2-360m", "llama", _sizes(32, 960, 2560, 15, 5, 49152, 8192)),
    AutoModel("qwen2.5-0.5b", "qwen2", _sizes(24, 896, 4864, 14, 2, 151936, 32768)),
    AutoModel("qwen2.5-1.5b", "qwen2", _sizes(28, 1536, 8960, 12, 2, 151936, 32768)),
    AutoModel("qwen3-4b", "qwen3", _sizes(36, 2560, 9728, 32, 8, 151936, 262144, head_dim=128)),
    AutoModel("qwen2.5-14b", "qwen2", _sizes(48, 5120, 13824, 40, 8, 152064, 32768, tie_word_embeddings=False)),
    AutoModel("qwen2.5-32b", "qwen2", _sizes(64, 5120, 27648, 40, 8, 152064, 32768, tie_word_embeddings=False)),
)
