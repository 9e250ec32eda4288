"""What fits, before a byte is loaded: a model under one scheme, or under all of them side by side.

From a `ModelShape` and budgets alone; no weights are touched, and no file is read. A row is made in
`hardware.plan_rows`, and one of them recommended in `hardware.recommending`.

Headroom: a scheme fits where weights, KV cache and working memory are within what each device has usable. It is
recommended where a tenth more would fit too, for what an allocator cannot use again. The memory to have
(`recommended_bytes`) is that, and the half GiB that a process takes of each card.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.config import EngineConfig
from kani_nb.errors import DoesNotFitError
from kani_nb.hardware.arithmetic import can_quantize_kv
from kani_nb.hardware.budgets import budgets_here, budgets_of
from kani_nb.hardware.checkpoint_schemes import checkpoint_of
from kani_nb.hardware.placement import SLOW, check_device_map
from kani_nb.hardware.plan_rows import DEFAULT_CONTEXT_TOKENS, Question, default_context, kept_aside, make_row
from kani_nb.hardware.plans import Budget, Plan, PlanRow
from kani_nb.hardware.precision import missing_packages
from kani_nb.hardware.recommending import recommend
from kani_nb.hardware.schemes import gguf_schemes, our_schemes
from kani_nb.hardware.shapes import ModelShape
from kani_nb.quantization import Quantization

__all__ = [
    "DEFAULT_CONTEXT_TOKENS",
    "budgets_here",
    "budgets_of",
    "default_context",
    "make_plan",
    "plan_row",
    "refusal",
]

#: A context shorter than this is no remedy, and those that are tried when what is offloaded leaves too little room.
_FEWEST_TOKENS, _SHORTER = 256, (1024, 512, 256)


def make_plan(
    shape: ModelShape,
    *,
    name: str = "",
    context_tokens: int | None = None,
    budgets: Sequence[Budget] | None = None,
    quantizations: Iterable[Quantization | str] | None = None,
    dtype: str = "auto",
    kv_bits: int | None = None,
    file_bytes: int | None = None,
    device_map: Any = None,
    allow_offload: bool = False,
    cpu_speeds: Mapping[str, float] | None = None,
    line: EngineConfig | None = None,
) -> Plan:
    """The model under several schemes on one set of devices, with the row to take.

    Args:
        shape: from `hardware.shape_reading.shape_of`.
        name: what `%load_engine` calls the model; the shape's own by default.
        context_tokens: of prompt and answer, that the KV cache is counted for; see `default_context`.
        budgets: the devices; those of this machine by default, whose bandwidth is then found out too.
        quantizations: the schemes; by default all that the devices could run. A checkpoint that is quantized already
            has its own only.
        dtype: of what is not quantized.
        kv_bits: of a quantized KV cache.
        file_bytes: of the weight files, where they are known.
        device_map: as the engine takes it.
        allow_offload: let what does not fit be kept in main memory or on the disk.
        cpu_speeds: how fast schemes are on this CPU, times bfloat16 (`cpu_probe.cpu_speeds`); by default what was
            measured on another.
        line: what the user asked for, to be said again with the scheme of a row; by default only what is said here.

    Raises:
        ConfigError: a scheme, a setting or the device map cannot be used with this model.
    """
    devices = tuple(budgets_here(with_bandwidth=True) if budgets is None else budgets)
    question = Question(
        shape=shape,
        name=name or shape.name,
        asked_tokens=context_tokens,
        budgets=devices,
        dtype=dtype,
        kv_bits=kv_bits,
        file_bytes=file_bytes,
        device_map=_checked(shape, device_map, devices),
        allow_offload=allow_offload,
        line=line,
    )
    computing = question.computing(devices)
    kind = computing[0].kind if computing else ""
    rows = [make_row(question, settings) for settings in _settings(shape, kind, quantizations)]
    rows.sort(key=lambda row: -row.peak_bytes)
    has_fast_4bit = any("avx512_bf16" in each.cpu_features for each in computing)
    best, why = recommend(rows, kind, cpu_speeds, has_fast_4bit=has_fast_4bit)
    if best is not None:
        rows[best] = replace(rows[best], notes=(*rows[best].notes, why))
    return Plan(
        model=question.name,
        architecture=shape.architecture,
        parameters=shape.parameters,
        context_tokens=question.context_tokens,
        budgets=devices,
        rows=tuple(rows),
        recommended=best,
        notes=tuple(_notes(question, has_cards=kind == "cuda")),
    )


def plan_row(
    shape: ModelShape,
    settings: Quantization,
    *,
    budgets: Sequence[Budget],
    name: str = "",
    context_tokens: int | None = None,
    dtype: str = "auto",
    kv_bits: int | None = None,
    file_bytes: int | None = None,
    device_map: Any = None,
    allow_offload: bool = False,
    chunk_tokens: int | None = None,
    line: EngineConfig | None = None,
) -> PlanRow:
    """One scheme: what a load would take, and whether it may.

    Where something has to be kept aside because `allow_offload` says that it may, `fits` is false and `device_map` says
    where all goes; where there is no way at all, `device_map` is empty. A dict of the user's own is taken as it is:
    what it puts on the CPU or the disk was asked for.

    Args:
        shape: from `hardware.shape_reading.shape_of`.
        settings: the scheme and its settings; a checkpoint that is quantized already keeps its own.
        budgets: the devices.
        name: what `%load_engine` calls the model; the shape's own by default.
        context_tokens: of prompt and answer; see `default_context`.
        dtype: of what is not quantized.
        kv_bits: of a quantized KV cache.
        file_bytes: of the weight files, where they are known.
        device_map: as the engine takes it.
        allow_offload: let what does not fit be kept in main memory or on the disk.
        chunk_tokens: of a prompt, that are computed at once; by default what the engine chooses.
        line: as in `make_plan`.

    Raises:
        ConfigError: the setting is not the scheme's, or the device map cannot be used with this model.
    """
    devices = tuple(budgets)
    question = Question(
        shape=shape,
        name=name or shape.name,
        asked_tokens=context_tokens,
        budgets=devices,
        dtype=dtype,
        kv_bits=kv_bits,
        file_bytes=file_bytes,
        device_map=_checked(shape, device_map, devices),
        allow_offload=allow_offload,
        chunk_tokens=chunk_tokens,
        line=line,
    )
    return make_row(question, settings)


def refusal(
    shape: ModelShape, row: PlanRow, *, budgets: Sequence[Budget], name: str = "", **arguments: Any
) -> DoesNotFitError:
    """The error for a row that does not fit: the numbers, and two things that would help, best first.

    Args:
        shape: the model's.
        row: from `plan_row`, of the same shape and budgets.
        budgets: the devices.
        name: what `%load_engine` calls the model.
        **arguments: the others of `plan_row`, as they were given there.
    """
    arguments.pop("chunk_tokens", None)
    tokens = arguments.get("context_tokens") or default_context(shape)
    remedies = _remedies(shape, row, tuple(budgets), name or shape.name, arguments)
    error = DoesNotFitError(
        f"{name or shape.name} in {row.dtype if row.settings.is_none else row.label} does not fit: {row.why_not}",
        why=f"{in_words(row.weight_bytes)} of weights, {in_words(row.kv_bytes)} of KV cache at {tokens:,} tokens and "
        f"{in_words(row.working_bytes)} to work in",
        fix="; or ".join(each for each, _ in zip(remedies, range(2), strict=False)),
    )
    error.row = row
    return error


def _remedies(
    shape: ModelShape, row: PlanRow, budgets: tuple[Budget, ...], name: str, arguments: Mapping[str, Any]
) -> Iterator[str]:
    if shape.prequantized is None:
        best = make_plan(shape, name=name, budgets=budgets, **{**arguments, "allow_offload": False}).best
        if best is not None and best.label != row.label:
            yield f"{best.line} takes {in_words(best.peak_bytes)}"
    if row.most_context_tokens >= _FEWEST_TOKENS:
        yield f"--max-context-size {row.most_context_tokens} fits"

    def offloaded(context_tokens: int | None) -> PlanRow:
        changes = {"allow_offload": True, "context_tokens": context_tokens}
        return plan_row(shape, row.settings, name=name, budgets=budgets, **{**arguments, **changes})

    computing = [each for each in budgets if each.kind not in SLOW] or [each for each in budgets if each.name == "cpu"]
    asked, tokens = bool(arguments.get("allow_offload")), arguments.get("context_tokens")
    for fewer in (tokens, *_SHORTER):
        found = offloaded(fewer)
        aside = sum(each.weight_bytes for each in kept_aside(found.shares, computing))
        if found.device_map and aside and (fewer != tokens or not asked):
            words = ["--allow-offload"] * (not asked) + [f"--max-context-size {fewer}"] * (fewer != tokens)
            yield f"{' '.join(words)} keeps {in_words(aside)} of the weights in slower memory"
            break
    line: EngineConfig | None = arguments.get("line")
    if line is not None and line.max_memory is not None:
        yield f"allow more than --max-memory={line.max_memory}"
    yield "take a smaller model"
    yield "free what else holds memory (%unload_engine)"


def _checked(shape: ModelShape, device_map: Any, budgets: Sequence[Budget]) -> str | dict[str, str]:
    modules = dict.fromkeys((*shape.blocks, *(each.module for each in shape.tensors)))
    return check_device_map(device_map, modules, [each.name for each in shape.tensors], [each.name for each in budgets])


def _settings(shape: ModelShape, kind: str, quantizations: Iterable[Quantization | str] | None) -> list[Quantization]:
    """What to make rows of."""
    if shape.prequantized is not None:
        return [checkpoint_of(shape.prequantized).settings or Quantization()]
    if quantizations is not None:
        return [Quantization(each) if isinstance(each, str) else each for each in quantizations]
    found = []
    for scheme in our_schemes():
        if kind in scheme.devices:
            found.append(Quantization(scheme.name))
            if scheme.name == "nf4":
                found.append(Quantization("nf4", double_quant=True))
    engines = {each.name for each in entry_points(group="kani_nb.engines")}
    found += [
        Quantization(scheme.name)
        for scheme in gguf_schemes()
        if scheme.engine in engines and kind in scheme.devices and not missing_packages(scheme)
    ]
    return found


def _notes(question: Question, *, has_cards: bool) -> Iterator[str]:
    """What concerns every row."""
    shape = question.shape
    window = shape.context_tokens
    if question.asked_tokens is None:
        whole = f"; the model's whole window is {window:,}" if window and window > question.context_tokens else ""
        yield f"the KV cache is counted at {question.context_tokens:,} tokens, since none were asked for{whole}"
    elif window and question.asked_tokens > window:
        yield f"{question.asked_tokens:,} tokens are more than the {window:,} that the model was made for"
    if shape.prequantized is not None:
        yield "the checkpoint is quantized already, and can be loaded in no other scheme"
    if shape.experts:
        yield (
            f"a mixture of experts: all {shape.experts} experts of a layer are held, and each token reads "
            f"{shape.experts_per_token}"
        )
    windows = {layer.window for layer in shape.cache_layers if layer.window is not None}
    if windows:
        number = sum(layer.window is not None for layer in shape.cache_layers)
        yield f"{number} of {len(shape.cache_layers)} layers keep no more than {max(windows):,} tokens"
    if question.kv_bits is not None:
        if can_quantize_kv(shape):
            yield (
                f"the KV cache is counted in {question.kv_bits} bits, all but its last 128 tokens, to see what that "
                "would save: the engine keeps all of it as it is computed"
            )
        else:
            yield "the KV cache cannot be quantized: transformers wants full attention in every layer for that"
    process = ", and half a GiB that a process takes of a card" if has_cards else ""
    yield f"to have: a tenth more than the total, for what an allocator cannot use again{process}"
