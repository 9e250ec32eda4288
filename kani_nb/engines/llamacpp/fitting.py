"""Whether a GGUF file fits this machine's memory with the context that is asked for, by its header alone.

llama.cpp reserves the states of a full context when it loads, so that a long window costs memory that no prompt may
ever use. What surely does not fit is refused before; the numbers here are the least that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kani_nb.engines.llamacpp.files import GgufFiles
from kani_nb.engines.llamacpp.settings import STRETCHING
from kani_nb.engines.sources_cache import human_bytes
from kani_nb.engines.sources_gguf import GgufHeader
from kani_nb.errors import ConfigError, DoesNotFitError

#: The sparsest known pattern of a model with sliding windows has one full layer in six.
_FEWEST_FULL = 6


def context_of(files: GgufFiles, asked: int | None, settings: Mapping[str, Any]) -> int:
    """Tokens of prompt and answer that the model can hold.

    Raises:
        ConfigError: the file does not say, and nothing was asked for; or more was asked for than there is.
    """
    own = _number(files.header, "context_length")
    name = files.path.name
    if asked is None and own is None:
        raise ConfigError(f"{name} does not say how long its context is", fix="say it: --max-context-size 2048")
    if asked is not None and own is not None and asked > own and not any(each in settings for each in STRETCHING):
        raise ConfigError(
            f"max_context_size is {asked:,}",
            why=f"{name} was made for {own:,} tokens",
            fix=f"at most {own}; or stretch it: model_load_kwargs={{'rope_freq_scale': ...}}",
        )
    return int(asked or own or 0)


def state_bytes_per_token(header: GgufHeader) -> int | None:
    """The least bytes of states for each token of a context, in half precision; None where the header does not say."""
    layers, heads, width = (_number(header, key) for key in ("block_count", "attention.head_count", "embedding_length"))
    if not (layers and heads and width) or any(".ssm." in key for key in header.metadata):
        return None
    groups = _number(header, "attention.head_count_kv")
    if groups is None and f"{header.architecture}.attention.head_count_kv" not in header.metadata:
        return None  # a list, one for each layer, or none at all
    keys = _number(header, "attention.key_length") or width // heads
    values = _number(header, "attention.value_length") or width // heads
    if _number(header, "attention.sliding_window"):
        layers = max(1, layers // _FEWEST_FULL)
    return 2 * layers * (groups or heads) * (keys + values)


def check_fits(files: GgufFiles, context_tokens: int, is_asked: bool) -> None:
    """Refuse what cannot fit into main memory.

    Raises:
        DoesNotFitError: with the numbers, and the context that fits.
    """
    from kani_nb.hardware.devices import free_bytes

    free = free_bytes("cpu")
    per_token = state_bytes_per_token(files.header) or 0
    needed = files.size_bytes + per_token * context_tokens
    if needed <= free:
        return
    fits = (free - files.size_bytes) // per_token // 256 * 256 if per_token else 0
    whose = "that context" if is_asked else "its own context"
    raise DoesNotFitError(
        f"{files.path.name} with {whose} of {context_tokens:,} tokens needs {human_bytes(needed)}",
        why=f"{human_bytes(files.size_bytes)} for the weights and {human_bytes(needed - files.size_bytes)} for the "
        f"context, and {human_bytes(free)} are free",
        fix=f"--max-context-size {min(fits, context_tokens // 2)}" if fits >= 256 else "take a smaller model",
    )


def _number(header: GgufHeader, key: str) -> int | None:
    value = header.metadata.get(f"{header.architecture}.{key}")
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
