"""How a model's forward is called, and what its cache can be trusted with.

An attention cache may be filled in pieces, cropped and gone on with. The running state of a state-space layer may not,
in ways that differ from one architecture to the next and that raise no error: the text is only wrong. So whatever is
not plain attention is tried when it is loaded, on a few tokens, and driven only in ways that gave the right logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kani_nb.engines.huggingface import kv_layers

_TRIAL_TOKENS = 24
_TRIAL_SPLIT = 16
#: Largest difference of a logit, relative to the largest logit, that is rounding: for pieces, and for single steps.
_TOLERANCE = {"float32": (2e-3, 2e-3), "half": (1e-2, 2e-2)}


class CacheMode(StrEnum):
    """What a cache can be trusted with, best first."""

    #: Prompts in pieces, and states kept for later prompts.
    REUSE = "reuse"
    #: A prompt in one piece, then a token at a time; nothing is kept.
    STEPS = "steps"
    #: Nothing: each token computes the whole sequence. Slow, and right.
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Driving:
    """How to call one model's forward.

    Attributes:
        mode: what its cache can be trusted with.
        argument: the name of forward's cache argument.
        passes_positions: give positions and the mask explicitly.
        keeps_few_logits: forward takes `logits_to_keep`.
        rope_boundary: beyond so many tokens the rotary embedding has other factors (longrope), and states from before
            do not fit those after; None for all others.
    """

    mode: CacheMode
    argument: str
    passes_positions: bool
    keeps_few_logits: bool
    rope_boundary: int | None = None

    def is_beyond(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is computed with the factors of long ones."""
        return self.rope_boundary is not None and tokens > self.rope_boundary


def forward(
    model: Any,
    driving: Driving,
    cache: Any,
    tokens: Sequence[int],
    start: int,
    device: str,
    keep: int | None = None,
    media: Mapping[str, Any] | None = None,
) -> Any:
    """The logits `(1, V)` after `tokens`, the first of which is at position `start`; `cache` then holds their states.

    Without a cache `tokens` must be the whole sequence. With `keep` the logits after each of the last so many tokens,
    `(1, keep, V)`. `media` are the tensors behind some of the tokens, as a processor made them.
    """
    import torch

    options: dict[str, Any] = {"use_cache": cache is not None}
    for name, value in (media or {}).items():
        is_real = torch.is_tensor(value) and value.is_floating_point()
        moved = value.to(device, model.dtype) if is_real else value.to(device) if torch.is_tensor(value) else value
        options[name] = moved
    if cache is not None:
        options[driving.argument] = cache
    if driving.keeps_few_logits:
        options["logits_to_keep"] = keep or 1
    if driving.passes_positions:
        end = start + len(tokens)
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" in accepted:
            options["position_ids"] = torch.arange(start, end, device=device)[None]
        if "attention_mask" in accepted:
            options["attention_mask"] = torch.ones((1, end), dtype=torch.long, device=device)
    output = model(input_ids=torch.tensor([tokens], device=device), **options)
    return output.logits[:, -1, :] if keep is None else output.logits[:, -keep:, :]


def find_driving(model: Any, device: str) -> Driving:
    """How `model` can be driven; tries it out where that is not known from its kind."""
    accepted = inspect.signature(model.forward).parameters
    keeps_few_logits = "logits_to_keep" in accepted
    argument = next((name for name in ("past_key_values", "cache_params") if name in accepted), "past_key_values")
    boundary = _rope_boundary(model.config)
    if model.config.is_encoder_decoder:
        return Driving(CacheMode.STEPS, argument, False, False)
    is_plain = not getattr(model, "_is_stateful", False) and not _keeps_positions(model)
    if "past_key_values" in accepted and is_plain and _has_plain_layers(model.config):
        return Driving(CacheMode.REUSE, argument, False, keeps_few_logits, boundary)
    # A model with positions in several dimensions makes them itself: plain ones would put an image in a line.
    passes_positions = not _keeps_positions(model)
    tried = Driving(CacheMode.NONE, argument, passes_positions, keeps_few_logits, boundary)
    modes = (CacheMode.REUSE, CacheMode.STEPS) if passes_positions else (CacheMode.STEPS,)
    for mode in modes:
        if _gives_right_logits(model, tried, mode, device):
            return Driving(mode, argument, passes_positions, keeps_few_logits, boundary)
    return tried


def _keeps_positions(model: Any) -> bool:
    """Whether the model itself remembers how positions went on after its latest image: another prompt's would not."""
    return any(hasattr(module, "rope_deltas") for module in model.modules())


def _has_plain_layers(config: Any) -> bool:
    try:
        return kv_layers.is_plain(kv_layers.new_cache(config))
    except (ValueError, KeyError, AttributeError, NotImplementedError):  # a layer that transformers has no cache for
        return False


def _rope_boundary(config: Any) -> int | None:
    text_config = config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if not isinstance(rope, dict) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    boundary = rope.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", None
    )
    return int(boundary) if boundary else None


def _gives_right_logits(model: Any, driving: Driving, mode: CacheMode, device: str) -> bool:
    """Whether a few tokens, computed as `mode` would, end in the same logits as in one piece without a cache."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 + 13 * number) % vocabulary for number in range(_TRIAL_TOKENS)]
    rest = [len(ids) - _TRIAL_SPLIT - 2, 1, 1] if mode is CacheMode.REUSE else [1] * (len(ids) - _TRIAL_SPLIT)
    precision = "float32" if model.dtype == torch.float32 else "half"
    tolerance = _TOLERANCE[precision][0 if mode is CacheMode.REUSE else 1]

    def in_pieces() -> Any:
        cache, start, logits = kv_layers.new_cache(model.config), 0, None
        for size in (_TRIAL_SPLIT, *rest):
            logits = forward(model, driving, cache, ids[start : start + size], start, device)
            start += size
        return logits

    with torch.inference_mode():
        whole = forward(model, driving, None, ids, 0, device)
        pieces = _or_none(in_pieces)
    if pieces is None or not bool(torch.isfinite(pieces).all()):
        return False
    return float((whole - pieces).abs().max()) <= tolerance * float(whole.abs().max())


def _or_none(compute: Callable[[], Any]) -> Any:
    """What `compute` gives, or None where the model refuses our cache."""
    try:
        return compute()
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return None
    except RuntimeError as error:
        if "memory" in str(error).lower():
            raise
        return None
