"""`model_load_kwargs` in the words of llama-cpp-python's `Llama`, put into llama.cpp's own records."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from kani_nb.errors import ConfigError, did_you_mean

_MODEL = ("split_mode", "main_gpu", "check_tensors", "use_extra_bufts")
_CONTEXT = (
    *("n_batch", "n_ubatch", "n_threads", "n_threads_batch", "rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "type_k", "type_v"),
    *("offload_kqv", "no_perf", "op_offload", "swa_full"),
)
#: Given in kani's examples, and without a meaning for this engine.
_WITHOUT_EFFECT = ("verbose", "logits_all", "last_n_tokens_size", "chat_format")
_OWN = ("n_gpu_layers", "tensor_split", "use_mmap", "use_mlock", "flash_attn", "n_ctx")
#: With these a model can be run beyond the context that it was made for.
STRETCHING = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx")


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp cannot be told from here.

    Raises:
        ConfigError: an unknown name; offers the near misses.
    """
    known = [*_MODEL, *_CONTEXT, *_OWN, *_WITHOUT_EFFECT]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"model_load_kwargs holds {name!r}",
                why="it is not a setting of llama.cpp that this engine passes on",
                fix=did_you_mean(name, known) or f"known are {', '.join(sorted(known))}",
            )


def model_params(llama: Any, given: Mapping[str, Any], *, use_gpu: bool) -> Any:
    """llama.cpp's parameters of a model."""
    params = llama.llama_model_default_params()
    params.n_gpu_layers = int(given.get("n_gpu_layers", -1 if use_gpu else 0))
    if params.n_gpu_layers < 0:
        params.n_gpu_layers = 2**31 - 1
    _set(params, given, _MODEL)
    if (shares := given.get("tensor_split")) is not None:
        most = llama.llama_max_devices()
        if len(shares) > most:
            raise ConfigError(f"tensor_split has {len(shares)} shares", why=f"there are at most {most} devices")
        params.tensor_split = (ctypes.c_float * most)(*shares)  # ctypes keeps the array alive with the record
    maps, locks = bool(given.get("use_mmap", True)), bool(given.get("use_mlock", False))
    if hasattr(params, "load_mode"):
        modes = {(True, True): "MMAP_MLOCK", (False, True): "MLOCK", (True, False): "MMAP", (False, False): "NONE"}
        params.load_mode = getattr(llama, f"LLAMA_LOAD_MODE_{modes[maps, locks]}")
    else:  # versions before 0.3.30 or so
        params.use_mmap, params.use_mlock = maps, locks
    return params


def context_params(llama: Any, given: Mapping[str, Any], *, context_tokens: int, chunk_tokens: int) -> Any:
    """llama.cpp's parameters of a context; one sequence."""
    params = llama.llama_context_default_params()
    params.n_ctx = context_tokens
    params.n_seq_max = 1
    params.n_batch = params.n_ubatch = chunk_tokens
    params.no_perf = True
    _set(params, given, _CONTEXT)
    if given.get("flash_attn") is not None:
        params.flash_attn_type = 1 if given["flash_attn"] else 0
    return params


def _set(params: Any, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if given.get(name) is not None:
            try:
                setattr(params, name, given[name])
            except TypeError as error:
                raise ConfigError(f"{name} is {given[name]!r} in model_load_kwargs", why=str(error)) from None
