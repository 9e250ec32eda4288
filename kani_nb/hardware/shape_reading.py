"""From a transformers configuration to a `ModelShape`, without weights.

The model is built on the meta device, where tensors have shapes and no memory, and run there once on a few tokens: so
its tensors, its ties, the order of its parts and what its cache keeps are transformers' own answers, not a formula of
ours for each architecture. Bytes are counted in `hardware.arithmetic`; configurations are found by the engines.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from kani_nb.errors import ConfigError, ModelFilesError
from kani_nb.hardware.cache_reading import number, observe
from kani_nb.hardware.shapes import ModelShape, TensorKind, TensorShape
from kani_nb.hardware.workspace_reading import read_moments

#: transformers changes torch's default dtype while it builds a model, for the whole process: one at a time, and none
#: while another model loads.
BUILDING = threading.RLock()

_UPDATE = "`pip install -U transformers`, then restart the kernel"
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "seq_length", "n_ctx")
_EXPERTS_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_NAMES = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "top_k"),
    "num_selected_experts",
)


def shape_of(config: Any, name: str = "", model_cls: Any = None, *, trust_remote_code: bool = False) -> ModelShape:
    """What a model of this configuration is made of; well under a second for most, whatever its size.

    Waits while another model is being built. Imports torch and transformers.

    Args:
        config: a transformers configuration.
        name: what messages call the model.
        model_cls: the class that will load it, instead of the causal language model of the configuration.
        trust_remote_code: build classes whose code lies beside the checkpoint.

    Raises:
        ModelFilesError: this transformers does not know the architecture, a library of it is missing, or it cannot be
            built from these values.
        ConfigError: it is no model that goes on with a text, or its code would have to be trusted first.
    """
    name = name or str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", "the model"))
    with BUILDING, _silent():
        model = _on_meta(config, name, model_cls, trust_remote_code)
        reading = _Reading(model)
        observed = observe(model, reading.block_of)
        text = model.config.get_text_config(decoder=True)
        context = number(text, _CONTEXT_NAMES) or None
        running = sorted(reading.blocks, key=lambda block: observed.order.get(block, len(observed.order)))
        moments = read_moments(model, running, observed, context)
    experts = number(text, _EXPERTS_NAMES)
    return ModelShape(
        name=name,
        architecture=type(model).__name__,
        checkpoint_dtype=_dtype_of(config),
        context_tokens=context,
        vocab_size=number(text, ("vocab_size",)),
        hidden_size=number(text, ("hidden_size", "n_embd", "d_model")),
        intermediate_size=number(text, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
        or reading.widest_linear(),
        attention_heads=number(text, ("num_attention_heads", "n_head")),
        tensors=tuple(reading.tensors),
        cache_layers=observed.layers,
        blocks=tuple(running),
        head=reading.head,
        has_tied_head=reading.has_tied_head,
        prequantized=prequantized_of(config),
        default_skips=tuple(sorted(_default_skips(model))),
        constant_skips=tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
        attention=str(getattr(model.config, "_attn_implementation", None) or "eager"),
        experts=experts,
        experts_per_token=number(text, _EXPERTS_PER_TOKEN_NAMES) if experts else 0,
        moments=moments,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing logged by transformers meanwhile: what it would miss when running is no news when planning."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def prequantized_of(config: Any) -> dict[str, object] | None:
    """The checkpoint's own `quantization_config`, or None where its weights are plain."""
    for each in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
        found = getattr(each, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return None


def _on_meta(config: Any, name: str, model_cls: Any, trust_remote_code: bool) -> Any:
    """The model on the meta device, ties kept, in bfloat16 except for what no dtype changes."""
    import torch
    from transformers import AutoModelForCausalLM

    from kani_nb.hardware.auto_classes import auto_class_of

    kind = str(getattr(config, "model_type", "") or type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name} is an encoder-decoder model ({kind})",
            why="what it takes is known only when it is loaded",
            fix="%load_engine loads it all the same",
        )
    config = copy.deepcopy(config)  # building writes into it
    known = auto_class_of(config)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if model_cls is None and known is None:
        if not remote:
            raise ModelFilesError(
                f"{name} is of the architecture {kind!r}",
                why="this transformers has no language model of it",
                fix=_UPDATE,
            )
        if not trust_remote_code:
            raise ConfigError(
                f"{name} brings code of its own ({kind})",
                why="it would run on this computer",
                fix="read it first, then add --trust-remote-code",
            )
    builder = model_cls or known or AutoModelForCausalLM
    build = builder.from_config if hasattr(builder, "from_config") else builder._from_config
    options = {"trust_remote_code": trust_remote_code} if hasattr(builder, "from_config") and remote else {}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(config, dtype=torch.bfloat16, **options).eval()
    except ImportError as error:
        raise ModelFilesError(f"{name} ({kind}) needs a library that is not installed", why=_first(error)) from error
    except Exception as error:
        raise ModelFilesError(
            f"{name} ({kind}) cannot be built from its configuration",
            why=f"{type(error).__name__}: {_first(error)}",
            fix=f"check its config.json, or {_UPDATE}",
        ) from error


class _Reading:
    """One walk over a model: its blocks, and its tensors with what they are."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._no_split = set(getattr(model, "_no_split_modules", None) or ())
        self.blocks: list[str] = []
        self._add_blocks(model, "")
        head = model.get_output_embeddings()
        self.head = next((path for path, module in model.named_modules() if module is head), "")
        self._head_weight = getattr(head, "weight", None)
        self._looked_up = self._lookups()
        self.has_tied_head = self._head_weight is not None and id(self._head_weight) in self._looked_up
        self._text = model.config.get_text_config(decoder=True)
        self._per_token = number(self._text, _EXPERTS_PER_TOKEN_NAMES)
        strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self._kept = _pattern(strict)
        self._kept_from_half = _pattern(set(getattr(model, "_keep_in_fp32_modules", None) or ()) - strict)
        self.tensors = list(self._read())

    def block_of(self, path: str) -> str:
        """The block that a module or a tensor belongs to."""
        while path and path not in self._known:
            path = path.rpartition(".")[0]
        return path

    def widest_linear(self) -> int:
        """The most numbers that a linear layer makes of one token."""
        return max((each.out_features for each in self.tensors if each.kind == "linear"), default=0)

    def _add_blocks(self, module: Any, path: str) -> None:
        """Split `module` into what a device map may place apart: layers stay whole, as accelerate has it."""
        children = list(module.named_children())
        holds = bool(list(module.parameters())) or bool(list(module.buffers()))
        if path and (not children or type(module).__name__ in self._no_split):
            if holds:
                self.blocks.append(path)
        else:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            self.blocks += [f"{path}.{name}".lstrip(".") for name, _ in own]
            for name, child in children:
                self._add_blocks(child, f"{path}.{name}".lstrip("."))
        self._known = set(self.blocks)

    def _lookups(self) -> set[int]:
        """Ids of the tensors that embeddings look up in."""
        import torch

        found = {id(m.weight) for m in self._model.modules() if isinstance(m, torch.nn.Embedding)}
        embedding = self._model.get_input_embeddings()
        return found | ({id(embedding.weight)} if hasattr(embedding, "weight") else set())

    def _read(self) -> Iterator[TensorShape]:
        computed = {name for name, _ in _non_persistent(self._model)}
        modules = dict(self._model.named_modules())
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            path, _, leaf = name.rpartition(".")
            yield self._tensor(name, leaf, path, modules[path], tensor, name in computed)

    def _tensor(self, name: str, leaf: str, path: str, module: Any, tensor: Any, is_computed: bool) -> TensorShape:
        import torch

        kind, outputs, inputs, matrices = self._kind(leaf, module, tensor)
        return TensorShape(
            name=name,
            module=path,
            block=self.block_of(name),
            kind=kind,
            elements=tensor.numel(),
            out_features=outputs,
            in_features=inputs,
            matrices=matrices,
            active=self._active(kind, path, module, tensor),
            is_kept_float32=bool(self._kept.search(name)) or tensor.dtype is torch.float32,
            is_kept_from_float16=bool(self._kept_from_half.search(name)),
            is_conv1d=type(module).__name__ == "Conv1D",
            is_computed=is_computed,
            own_bytes=0 if tensor.dtype is torch.bfloat16 else tensor.element_size(),
        )

    def _kind(self, leaf: str, module: Any, tensor: Any) -> tuple[TensorKind, int, int, int]:
        """Kind, outputs, inputs and number of matrices. What bitsandbytes would replace is a linear weight."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if id(tensor) in self._looked_up:
            rows, width = (tensor.shape[0], tensor.shape[-1]) if tensor.ndim == 2 else (0, 0)
            return "embedding", rows, width, 1
        if leaf == "weight" and type(module) is nn.Linear:
            kind: TensorKind = "head" if tensor is self._head_weight else "linear"
            return kind, module.out_features, module.in_features, 1
        if leaf == "weight" and isinstance(module, Conv1D):
            return "linear", tensor.shape[1], tensor.shape[0], 1
        if tensor is self._head_weight:
            return "head", 0, 0, 1
        if tensor.ndim == 3 and _is_experts(module):
            return "experts", tensor.shape[1], tensor.shape[2], tensor.shape[0]
        return "other", 0, 0, 1

    def _active(self, kind: str, path: str, module: Any, tensor: Any) -> float:
        if kind == "embedding":
            return 1.0 if tensor is self._head_weight else 0.0
        if not self._per_token:
            return 1.0
        if _is_experts(module) and tensor.ndim >= 2:
            return min(1.0, self._per_token / int(tensor.shape[0]))
        # Experts as modules of their own, `...experts.7.up_proj`.
        parts = path.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.endswith("experts") and parts[place + 1].isdigit():
                siblings = len(self._model.get_submodule(".".join(parts[: place + 1])))
                return min(1.0, self._per_token / siblings)
        return 1.0


def _is_experts(module: Any) -> bool:
    return "experts" in type(module).__name__.lower()


def _non_persistent(model: Any) -> Iterator[tuple[str, Any]]:
    """Buffers that no checkpoint holds."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}".lstrip("."), module._buffers.get(name)


def _pattern(globs: set[str]) -> re.Pattern[str]:
    """What transformers looks for in a tensor's name to keep it in float32; matches nothing where there is nothing."""
    return re.compile("|".join(each.replace("*", ".*") for each in sorted(globs)) or r"(?!)")


def _default_skips(model: Any) -> set[str]:
    """What transformers' quantizers leave alone unless `llm_int8_skip_modules` says otherwise."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return set(get_keys_to_not_convert(model))


def _dtype_of(config: Any) -> str | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for each in (config, text):
        found = getattr(each, "dtype", None)
        if found is not None:
            return str(found).removeprefix("torch.")
    return None


def _first(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
