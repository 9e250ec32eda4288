"""What a model is made of, read from its configuration alone: tensors, cache layers, and what must stay together.

The model is built on the meta device, where tensors have shapes and no memory. Nothing here counts bytes or decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TensorKind = Literal["linear", "embedding", "head", "experts", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One parameter or buffer that a checkpoint fills; those that share storage are listed once.

    Attributes:
        name: its full name, `model.layers.0.mlp.up_proj.weight`.
        module: the module that owns it, `model.layers.0.mlp.up_proj`.
        block: the part of a device map that it moves with, `model.layers.0`.
        kind: `linear` weights can be quantized; `head` is the output head; `experts` are several matrices in one tensor.
        elements: how many numbers it holds.
        out_features, in_features: of a linear weight; 0 for the rest.
        active: the share that one token reads: 1, or experts per token over experts; 0 for an embedding that is only
            looked up.
        is_kept_float32: transformers keeps it in float32, whatever dtype is asked for.
        is_computed: a buffer that no checkpoint holds and no dtype changes (rotary frequencies); float32.
    """

    name: str
    module: str
    block: str
    kind: TensorKind
    elements: int
    out_features: int = 0
    in_features: int = 0
    active: float = 1.0
    is_kept_float32: bool = False
    is_computed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """What one layer keeps of the tokens it has seen.

    Attributes:
        block: the part of a device map that it moves with.
        elements_per_token: numbers kept of each token, keys and values together.
        window: most tokens that are kept (sliding window or chunk); None keeps all.
        fixed_elements: numbers kept whatever the length (the state of a recurrent layer).
    """

    block: str
    elements_per_token: int
    window: int | None = None
    fixed_elements: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model, as far as memory is concerned.

    Attributes:
        name: what the user called it.
        architecture: `LlamaForCausalLM`.
        checkpoint_dtype: `bfloat16`, or None where the configuration does not say.
        context_tokens: the model's own window; None where the configuration does not say.
        blocks: the parts of a device map in the order they run.
        has_tied_head: the head is the embedding; it then is no tensor of its own.
        prequantized: the checkpoint's own `quantization_config` as a dict, or None.
    """

    name: str
    architecture: str
    checkpoint_dtype: str | None
    context_tokens: int | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    tensors: tuple[TensorShape, ...]
    cache_layers: tuple[CacheLayer, ...]
    blocks: tuple[str, ...]
    has_tied_head: bool
    prequantized: dict[str, object] | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(tensor.elements for tensor in self.tensors if not tensor.is_computed)
