"""From a model's name to a plan: its configuration is found, its shape read, and the planner asked; no weights.

What the magics, the command line and `%load_engine auto` call. Blocking: call it in a worker thread. The bytes are
counted in `hardware.planner`, the configuration is found by the engines, and which model `auto` takes is decided in
`kani_nb.auto_choice`.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kani_nb.config import EngineConfig
from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.registry import parse_spec
from kani_nb.engines.sources_aliases import find_alias
from kani_nb.errors import ConfigError, ModelUnavailableError
from kani_nb.hardware.plans import Budget, Plan
from kani_nb.hardware.schemes import find_scheme
from kani_nb.quantization import DTYPES, Quantization, dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What can be asked of a plan: the arguments of `plan_model`, read from a line and checked."""

    model: str
    context: int | None = None
    cards: str | None = None
    quantizations: tuple[Quantization, ...] | None = None
    dtype: str = "auto"
    kv_bits: int | None = None
    max_memory: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As `plan_model` takes them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a plan: the same for the magic and the command line."""
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer to plan for")
    parser.add_argument("--card", metavar="CARD", help="plan for T4, 2x3090, H100, ... instead of this machine")
    parser.add_argument("--schemes", metavar="A,B", help="only these: none,int8,nf4+dq,cpu-int4 (dq: double quant)")
    parser.add_argument("--dtype", metavar="DTYPE", help=f"of what is not quantized: {', '.join(DTYPES)}")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), metavar="4|8", help="of a quantized KV cache")
    parser.add_argument("--max-memory", metavar="MAX_MEMORY", help="most of each device, as 0=10GiB,cpu=30GiB")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of the repository")


def request_from_args(given: Mapping[str, Any]) -> PlanRequest:
    """The request that parsed options describe; other names in `given` are ignored.

    Raises:
        ConfigError: a value that cannot be used.
    """
    context = given.get("context")
    if context is not None and context < 1:
        raise ConfigError(f"--context is {context}", why="it must be a whole number of at least 1")
    return PlanRequest(
        model=given["model"],
        context=context,
        cards=given.get("card"),
        quantizations=read_schemes(given["schemes"]) if given.get("schemes") is not None else None,
        dtype=dtype_name(given.get("dtype")),
        kv_bits=given.get("kv_bits"),
        max_memory=given.get("max_memory"),
        revision=given.get("revision"),
    )


def read_schemes(text: str) -> tuple[Quantization, ...]:
    """The schemes of a list: `none,int8,nf4+dq`, `cpu-int4+g32`. A `+dq` is double quantization, a `+g32` a group size.

    Raises:
        ConfigError: a scheme that there is not (with the near misses), or a setting that it does not have.
    """
    found = []
    for part in text.split(","):
        if not part.strip():
            continue
        asked = Quantization(part.strip())
        scheme = find_scheme(asked.scheme)
        found.append(replace(asked, scheme=scheme.name))
        scheme.check_settings(found[-1])
    if not found:
        raise ConfigError(f"--schemes is {text!r}", fix="--schemes none,int8,nf4")
    return tuple(dict.fromkeys(found))


def plan_model(
    model: str,
    *,
    context: int | None = None,
    cards: str | None = None,
    quantizations: tuple[Quantization, ...] | None = None,
    dtype: str = "auto",
    kv_bits: int | None = None,
    max_memory: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> Plan:
    """What `model` would take under each scheme, on this machine or on `cards`. Reads its configuration alone. Blocks.

    A GGUF file that llama.cpp runs has one row, that of the type it was written in.

    Args:
        model: an alias, `org/model`, a folder or a `.gguf` file.
        context: tokens to count the KV cache for; None leaves it to the planner.
        cards: the cards to plan for, `2x3090`; None is this machine.
        quantizations: the schemes to plan; None is every one that could be used.
        dtype: of what is not quantized.
        kv_bits: of a quantized KV cache.
        max_memory: most of each device of this machine.
        revision: branch, tag or commit of a repository.
        token: for gated repositories.
        progress: called on the calling thread.
        cancelled: ends it at the next step.

    Raises:
        ConfigError: a value that cannot be used, an unknown card, or a model that no weights of ours belong to.
        UnknownModelError, ModelUnavailableError, GatedModelError, ModelFilesError: its configuration cannot be had.
    """
    from kani_nb.hardware.budgets import budgets_here, budgets_of
    from kani_nb.hardware.planner import make_plan
    from kani_nb.hardware.shape_reading import shape_of

    if cards is not None and max_memory is not None:
        raise ConfigError("--card and --max-memory were both given", why="a card's memory is known", fix="drop one")
    budgets = budgets_of(cards) if cards is not None else None  # a misspelt card is told before anything is fetched
    spec = weights_of(model)
    end_if(cancelled, model)
    gguf = None
    if parse_spec(model).engine == "llamacpp":
        from kani_nb.engines.llamacpp.planning import check_settings, gguf_weights

        check_settings(model, quantizations, dtype, kv_bits, max_memory)
        gguf = gguf_weights(spec, model)
        spec = gguf.config_from
    if progress is not None:
        progress(LoadProgress("reading", "the configuration"))
    source = find_config(spec, revision=revision, token=token, progress=progress, cancelled=cancelled)
    config, file_bytes, offline = source.config, source.file_bytes, source.note
    end_if(cancelled, model)
    cpu_speeds = None
    if gguf is not None:
        from kani_nb.engines.llamacpp.planning import make_gguf_plan

        devices = tuple(budgets_here(with_bandwidth=True) if budgets is None else budgets)
        plan = make_gguf_plan(shape_of(config, model), gguf, model, context=context, budgets=devices)
        return replace(plan, notes=(*plan.notes, offline)) if offline else plan
    if budgets is None:
        budgets = budgets_here(max_memory, with_bandwidth=True)
        cpu_speeds = speeds_of(budgets)
    plan = make_plan(
        shape_of(config, model),
        name=model,
        context_tokens=context,
        budgets=budgets,
        cpu_speeds=cpu_speeds,
        line=EngineConfig(model, revision=revision, dtype=dtype, max_memory=max_memory, max_context_size=context),
        quantizations=quantizations,
        dtype=dtype,
        kv_bits=kv_bits,
        file_bytes=file_bytes,
    )
    return replace(plan, notes=(*plan.notes, offline)) if offline else plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundConfig:
    """A model's configuration.

    Attributes:
        config: transformers' configuration object.
        file_bytes: of the weight files; None where that is not known.
        note: where it is not the model's own, a sentence about that.
    """

    config: Any
    file_bytes: int | None = None
    note: str = ""


def find_config(
    spec: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> FoundConfig:
    """The configuration of `spec`; where the Hub cannot be asked, the sizes that ship with us for some. Blocks.

    Raises:
        UnknownModelError, ModelUnavailableError, GatedModelError, ModelFilesError: it cannot be had.
    """
    from kani_nb.engines.sources_config import config_of

    try:
        source = config_of(
            spec,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            progress=progress,
            cancelled=cancelled,
        )
    except ModelUnavailableError as error:
        end_if(cancelled, spec)
        known = _known_config(spec) if revision is None else None
        if known is None:
            raise
        why = error.why or error.what
        note = f"from the sizes that ship with kani_nb, since the Hub could not be asked: {why}"
        return FoundConfig(config=known, note=note)
    return FoundConfig(config=source.config, file_bytes=source.file_bytes)


def speeds_of(budgets: Iterable[Budget]) -> Mapping[str, float] | None:
    """How fast schemes multiply on this machine's CPU, where it is the CPU that computes."""
    from kani_nb.hardware.cpu_probe import cpu_speeds

    return cpu_speeds() if all(each.kind in ("cpu", "disk") for each in budgets) else None


def _known_config(model: str) -> Any:
    """The configuration of a model of the short list of `auto`, whose sizes ship with us; None for any other."""
    from kani_nb.engines.auto_models import AUTO_MODELS

    alias = find_alias(model)
    known = next((each for each in AUTO_MODELS if alias is not None and each.name == alias.name), None)
    return known.config() if known is not None else None


def weights_of(model: str) -> str:
    """`model` without the engine's own prefix.

    Raises:
        ConfigError: the engine that runs it holds no weights on this machine.
    """
    spec = parse_spec(model)
    if spec.engine not in ("hf", "llamacpp"):
        raise ConfigError(
            f"{model} cannot be planned",
            why=f"the engine {spec.engine} holds no weights here",
            fix="name an alias (smollm2), org/model, a folder or a .gguf file",
        )
    return spec.model


def end_if(cancelled: threading.Event | None, subject: str) -> None:
    """End here where the caller asked for it.

    Raises:
        ModelUnavailableError: `cancelled` is set.
    """
    if cancelled is not None and cancelled.is_set():
        raise ModelUnavailableError(f"planning {subject} was interrupted", fix="run it again")
