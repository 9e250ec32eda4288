"""What a model is made of, as records: tensors, cache layers, and what must stay together.

Read from a configuration by `hardware.shape_reading`; `hardware.arithmetic` makes bytes of them. Nothing here counts
bytes or decides, and no library is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TensorKind = Literal["linear", "embedding", "head", "experts", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One parameter or buffer of a model; those that share storage are listed once.

    Attributes:
        name: its full name, `model.layers.0.mlp.up_proj.weight`.
        module: the module that owns it, `model.layers.0.mlp.up_proj`.
        block: the part of a device map that it moves with, `model.layers.0`.
        kind: `linear` weights can be quantized; `head` is the output head; `experts` are several matrices in one.
        elements: how many numbers it holds.
        out_features, in_features: of a linear weight, a head, or one matrix of `experts`; 0 where no scheme could
            quantize it.
        matrices: how many matrices it holds: 1, or the number of experts.
        active: the share that one token reads: 1, or experts per token over experts; 0 for an embedding that is only
            looked up.
        is_kept_float32: stays in float32, whatever dtype is asked for.
        is_kept_from_float16: is float32 where float16 is asked for, and otherwise follows.
        is_conv1d: a weight of transformers' `Conv1D`, a linear layer whose weight lies inputs first.
        is_computed: a buffer that no checkpoint holds (rotary frequencies).
        own_bytes: bytes of one number where no dtype changes it (float32 frequencies, int64 positions); 0 where it
            follows the model's dtype.
    """

    name: str
    module: str
    block: str
    kind: TensorKind
    elements: int
    out_features: int = 0
    in_features: int = 0
    matrices: int = 1
    active: float = 1.0
    is_kept_float32: bool = False
    is_kept_from_float16: bool = False
    is_conv1d: bool = False
    is_computed: bool = False
    own_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """What one layer keeps of the tokens it has seen.

    Attributes:
        block: the part of a device map that it moves with.
        elements_per_token: numbers kept of each token, keys and values together; 0 where it uses another layer's.
        window: most tokens that are kept (sliding window or chunk); None keeps all.
        fixed_elements: numbers kept in the model's dtype whatever the length (the state of a recurrent layer).
        fixed_float32_elements: the same, kept in float32 whatever the dtype.
        can_quantize: a quantized KV cache quantizes it: plain keys and values.
    """

    block: str
    elements_per_token: int
    window: int | None = None
    fixed_elements: int = 0
    fixed_float32_elements: int = 0
    can_quantize: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is alive at one moment of a forward pass, beside weights and cache.

    Each tuple holds the factors of 1, the chunk's tokens, the context's tokens, and the product of both.

    Attributes:
        elements: numbers in the model's dtype.
        fixed_bytes: bytes of what no dtype changes: masks, positions, float32 steps of norms and softmax.
        raised_bytes: bytes of float32 copies of numbers in the model's dtype, which a model in float32 does not make.
    """

    elements: tuple[float, ...]
    fixed_bytes: tuple[float, ...]
    raised_bytes: tuple[float, ...]

    def bytes_at(self, chunk_tokens: int, context_tokens: int, dtype_bytes: int) -> float:
        """Bytes for one chunk at the end of a context."""
        lengths = (1, chunk_tokens, context_tokens, chunk_tokens * context_tokens)
        raised = 1 if dtype_bytes < 4 else 0
        return sum(
            (elements * dtype_bytes + fixed + copies * raised) * length
            for elements, fixed, copies, length in zip(
                self.elements, self.fixed_bytes, self.raised_bytes, lengths, strict=True
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model, as far as memory is concerned.

    Attributes:
        name: what the user called it.
        architecture: `LlamaForCausalLM`.
        checkpoint_dtype: `bfloat16`, or None where the configuration does not say.
        context_tokens: the model's own window; None where the configuration does not say.
        blocks: the parts of a device map in the order they run.
        head: the output head's module, `lm_head`; empty where there is none.
        has_tied_head: the head is the embedding; it then is no tensor of its own.
        prequantized: the checkpoint's own `quantization_config` as a dict, or None.
        default_skips: modules that bitsandbytes leaves alone unless told otherwise: the head, and what is tied.
        constant_skips: modules that it leaves alone whatever it is told.
        attention: transformers' name of the attention function: `sdpa`, `eager`, ...
        experts, experts_per_token: of a mixture of experts; else 0.
        moments: the fullest moments of a forward pass; empty where the model could not be watched.
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
    head: str = "lm_head"
    prequantized: dict[str, object] | None = None
    default_skips: tuple[str, ...] = ()
    constant_skips: tuple[str, ...] = ()
    attention: str = "sdpa"
    experts: int = 0
    experts_per_token: int = 0
    moments: tuple[Moment, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(tensor.elements for tensor in self.tensors if not tensor.is_computed)
