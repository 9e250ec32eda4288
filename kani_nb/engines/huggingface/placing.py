"""Decided before a byte is loaded: in what precision, on which devices, and whether it fits.

Everything that can be refused from the configuration alone is refused here, in one short error: a scheme the device
cannot run, a device map that names no module, weights that do not fit. Nothing is ever offloaded without being asked.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.engines.huggingface.arguments import LoadRequest, line_of
from kani_nb.engines.huggingface.held_weights import Held, checkpoint_dtype, held_weights, without_offloading
from kani_nb.errors import ConfigError, ModelFilesError, did_you_mean
from kani_nb.hardware.placement import SLOW
from kani_nb.hardware.plans import Budget, PlanRow
from kani_nb.hardware.schemes import Scheme, find_scheme, our_schemes
from kani_nb.hardware.shapes import ModelShape
from kani_nb.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Where a model goes and in what precision.

    Attributes:
        device: where the input ids go.
        device_map: for `from_pretrained`; None where the model is simply put on `device`.
        dtype: of what is not quantized.
        quantization: what the weights are held in; a pre-quantized checkpoint's own.
        label: what the precision is called, also where the checkpoint has it by a method without a scheme here.
        quantization_config: for `from_pretrained`; None for a pre-quantized checkpoint, whose own is taken.
        config: for `from_pretrained`, where the checkpoint's own would be wrong.
        is_prequantized: the checkpoint was quantized before.
        row: the plan; None where the model's shape could not be read.
        shape: what the model is made of, to be passed on to the next call.
        notes: what was decided on the way, in sentences.
    """

    device: str
    device_map: Any
    dtype: str
    quantization: Quantization
    label: str
    quantization_config: Any = None
    config: Any = None
    is_prequantized: bool = False
    row: PlanRow | None = None
    shape: ModelShape | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes multiplies these weights."""
        return find_scheme(self.quantization.scheme).backend == "bitsandbytes"

    @property
    def devices(self) -> tuple[str, ...]:
        """Every place that a part of it is in, by name."""
        if not isinstance(self.device_map, dict):
            return (self.device,)
        return tuple(sorted({str(each) for each in self.device_map.values()}))

    @property
    def has_parts_aside(self) -> bool:
        """Whether a GPU computes, and the CPU or the disk holds a part."""
        return len(self.devices) > 1 and not {"cpu", "disk"}.isdisjoint(self.devices)

    @property
    def words(self) -> str:
        """The precision and the place."""
        precision = self.dtype if self.label == "none" else self.label
        return f"{precision} on {' and '.join(self.devices)}"


def choose_placing(
    request: LoadRequest,
    config: Any,
    *,
    shape: ModelShape | None = None,
    is_empty: bool = False,
    also_free: Mapping[str, int] | None = None,
) -> Placing:
    """The place and the precision of a model, or an error that says why there is none.

    Args:
        request: what was asked for.
        config: the model's configuration.
        shape: what the model is made of, where that has been read before.
        is_empty: count all memory of the devices as free: what does not fit then will not fit whatever is unloaded.
        also_free: bytes by device that are held now and will have been given back.

    Raises:
        ConfigError: the scheme, a setting, the device or the device map cannot be used with this model here.
        MissingDependencyError: what the scheme or the checkpoint needs is not installed.
        DoesNotFitError: it needs more memory than there is, with the numbers and two remedies.
    """
    held = held_weights(request, config)
    scheme = find_scheme(held.settings.scheme)
    if scheme.engine != "hf":
        raise ConfigError(
            f"{scheme.name} is a type of GGUF files",
            why="transformers does not run it",
            fix="load a .gguf file that has it",
        )
    if request.gguf_file is not None and not request.quantization.is_none:
        raise ConfigError(
            f"{request.name} is a GGUF file, quantized already",
            why=f"{request.quantization.label} cannot be made of it directly",
            fix="load it without --quant, keep it with %engine save FOLDER, and load that folder with --quant",
        )
    budgets = _budgets(request, scheme, is_empty=is_empty, also_free=also_free)
    shape = shape or _shape(config, request)
    first = _first_device(request, budgets)
    precision, row = _fitted((first,), held, scheme, budgets, shape, request, config)
    if row is not None:  # it may take more devices than the first
        used = [each for each in budgets if each.name in row.device_map.values() and each.kind not in SLOW]
        if any(each != first for each in used):
            precision, row = _fitted(used, held, scheme, budgets, shape, request, config)
    settings, dtype = precision.settings, precision.dtype
    device, device_map = _places(request, first, shape, row)
    wanted, own_config = None, None
    if not held.is_prequantized:
        wanted = request.foreign_config
        if scheme.transformers_config is not None and not settings.is_none:
            wanted = scheme.transformers_config(_checked_for_map(settings, scheme, device_map), dtype)
    elif scheme.backend == "bitsandbytes":
        own_config = without_offloading(config, request.name, device_map)
    label = settings.label if held.label is None else held.label
    return Placing(
        device="cpu" if device == "disk" else device,
        device_map=device_map,
        dtype=dtype,
        quantization=settings,
        label="none" if held.is_prequantized and row is not None and row.settings.is_none else label,
        quantization_config=wanted,
        config=own_config,
        is_prequantized=held.is_prequantized,
        row=row,
        shape=shape,
        notes=tuple(dict.fromkeys((*precision.notes, *(row.notes if row is not None else ())))),
    )


@dataclass(frozen=True, slots=True)
class _Precision:
    """The settings and the dtype for the devices that compute, and what was decided about them."""

    settings: Quantization
    dtype: str
    notes: tuple[str, ...]


def _fitted(
    used: Sequence[Budget],
    held: Held,
    scheme: Scheme,
    budgets: tuple[Budget, ...],
    shape: ModelShape | None,
    request: LoadRequest,
    config: Any,
) -> tuple[_Precision, PlanRow | None]:
    """The precision that all of `used` can compute in, and the plan with it."""
    from kani_nb.hardware.arithmetic import sparing_tied_head

    for each in used:
        _check_runs(scheme, each)
    least = min(used, key=lambda each: each.compute_capability or (99, 0))
    notes: list[str] = []
    dtype = _dtype(request, config, least, scheme, notes)
    settings = _settings_on(held.settings, least, notes)
    row = None
    if shape is not None:
        _check_modules(shape, settings, request)
        settings = sparing_tied_head(shape, settings, scheme)
        row = _planned(shape, settings, dtype, budgets, request)
    return _Precision(settings, dtype, tuple(notes)), row


def _places(
    request: LoadRequest, first: Budget, shape: ModelShape | None, row: PlanRow | None
) -> tuple[str, str | dict[str, str] | None]:
    """The device that the input goes to, and the device map for `from_pretrained`.

    Raises:
        ConfigError: nothing is known of the model's parts, and what was asked for needs that; or all is on the disk.
    """
    from kani_nb.hardware.placement import device_of

    if shape is None or row is None or not row.device_map:
        asked = request.device_map if isinstance(request.device_map, dict) else None
        if request.max_memory is not None or (asked is not None and len(set(asked.values())) > 1):
            raise ConfigError(
                f"max_memory and device maps cannot be kept with {request.name}",
                why="its class cannot be built without its weights, so its parts are not known",
                fix=f"leave them out: it then goes to {first.name} as a whole",
            )
        return first.name, None if first.name == "cpu" else {"": first.name}
    if set(row.device_map.values()) == {"disk"}:
        example = json.dumps({"": "disk", shape.blocks[0]: "cpu"})
        raise ConfigError(
            f"{request.name} cannot be put on the disk as a whole",
            why="accelerate keeps at least one part in memory",
            fix=f"for example --device-map '{example}'",
        )
    if len(set(row.device_map.values())) > 1 or "disk" in row.device_map.values():
        return device_of(shape.blocks[0], row.device_map) or first.name, row.device_map
    device = next(iter(row.device_map.values()))
    return device, None if device == "cpu" else {"": device}


def _checked_for_map(settings: Quantization, scheme: Scheme, device_map: Any) -> Quantization:
    """The settings for a map over several devices: bitsandbytes leaves what lies on the CPU or the disk as it is.

    Raises:
        ConfigError: nothing would be quantized at all, which transformers does without a word.
    """
    if scheme.backend != "bitsandbytes":
        return settings
    places = {str(each) for each in device_map.values()} if isinstance(device_map, dict) else {"cpu"}
    is_off_gpu = places <= {"cpu", "disk"}
    if is_off_gpu and (settings.llm_int8_enable_fp32_cpu_offload or "disk" in places):
        where = " and ".join(sorted(places))
        if "disk" in places:
            raise ConfigError(
                f"{scheme.name} cannot be put on {where}",
                why="bitsandbytes keeps nothing on the disk but beside a GPU, and unquantized",
                fix="put all of it on the CPU",
            )
        raise ConfigError(
            f"{scheme.name} with llm_int8_enable_fp32_cpu_offload on {where} alone",
            why="what is offloaded is not quantized, and that would be the whole model",
            fix="leave llm_int8_enable_fp32_cpu_offload out: the scheme runs on a CPU without it",
        )
    if not is_off_gpu and places & {"cpu", "disk"}:
        return replace(settings, llm_int8_enable_fp32_cpu_offload=True)
    return settings


def _budgets(
    request: LoadRequest, scheme: Scheme, *, is_empty: bool, also_free: Mapping[str, int] | None
) -> tuple[Budget, ...]:
    """What may be used here, the devices that the scheme cannot use left out where none was named."""
    from kani_nb.hardware.budgets import budgets_here
    from kani_nb.hardware.placement import parse_max_memory

    budgets = budgets_here(request.max_memory, also_free=also_free)
    if is_empty:
        limits = parse_max_memory(request.max_memory)
        budgets = tuple(replace(each, usable_bytes=limits.get(each.name, each.total_bytes)) for each in budgets)
    if request.device is None and request.device_map is None:
        return tuple(each for each in budgets if each.kind in scheme.devices) or budgets
    return budgets


def _first_device(request: LoadRequest, budgets: Iterable[Budget]) -> Budget:
    """The device that decides about precision: the one that was named, or the first that is filled.

    Raises:
        ConfigError: it is not there.
    """
    from kani_nb.hardware.placement import STRATEGIES, device_name, there_is

    known = {each.name: each for each in budgets}
    named = request.device
    if named is None and isinstance(request.device_map, str | int) and request.device_map not in STRATEGIES:
        named = there_is(request.device_map, known)
    if named is None and isinstance(request.device_map, dict):
        places = [device_name(each) for each in request.device_map.values()]
        named = next((each for each in places if each not in ("cpu", "disk")), "cpu")
    if named is None:
        best = [each for each in known.values() if each.kind not in ("cpu", "disk")]
        return max(best, key=lambda each: each.usable_bytes) if best else known["cpu"]
    named = device_name(named)
    if named not in known:
        import torch

        sees = [each for each in known if each != "disk"]
        lacks = f", and torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else ""
        why = f"torch sees {', '.join(sees)}{lacks if named.startswith('cuda') else ''}"
        raise ConfigError(f"there is no device {named!r} here", why=why, fix=f"--device {sees[0]}, or none")
    return known[named]


def _dtype(request: LoadRequest, config: Any, budget: Budget, scheme: Scheme, notes: list[str]) -> str:
    """The dtype of what is not quantized, one that the device can compute in."""
    from kani_nb.hardware.precision import choose_dtype

    checkpoint = checkpoint_dtype(request, config)
    choice = choose_dtype(request.dtype, checkpoint, budget.kind, budget.compute_capability, scheme)
    if choice.reason:
        notes.append(choice.reason)
    if choice.dtype != "auto" or scheme.transformers_config is None:
        return choice.dtype
    # Quantizers must be told; a CPU and newer cards have bfloat16.
    halved = choose_dtype("bfloat16", None, budget.kind, budget.compute_capability, scheme).dtype
    notes.append(f"the checkpoint does not say in what dtype it is, so {halved} is taken for what is not quantized")
    return halved


def _settings_on(held: Quantization, budget: Budget, notes: list[str]) -> Quantization:
    """The settings, the compute dtype one that the device has."""
    from kani_nb.hardware.precision import choose_dtype

    if held.compute_dtype == "auto":
        return held
    choice = choose_dtype(held.compute_dtype, None, budget.kind, budget.compute_capability)
    if choice.reason:
        notes.append(choice.reason)
    return replace(held, compute_dtype=choice.dtype)


def _check_runs(scheme: Scheme, budget: Budget) -> None:
    """Refuse a scheme that the device cannot run, or whose package is missing, too old or without its CUDA library."""
    from kani_nb.hardware.gptq_check import needs_of
    from kani_nb.hardware.precision import why_not

    if scheme.backend == "gptq" and (lacking := needs_of(scheme.name)) is not None:
        raise lacking
    if scheme.backend == "bitsandbytes":
        from kani_nb.hardware.bitsandbytes_check import check_bitsandbytes

        if problem := check_bitsandbytes(budget.name):
            raise problem
    if why := why_not(scheme, budget):
        others = " or ".join(each.name for each in our_schemes() if not why_not(each, budget) and each.name != "none")
        raise ConfigError(
            f"{scheme.name} cannot run on {budget.name} ({budget.description})",
            why=why,
            fix=f"--quant {others}" if others else "load it without --quant",
        )


def _shape(config: Any, request: LoadRequest) -> ModelShape | None:
    """What the model is made of; None for encoder-decoder models, and for foreign classes that need their weights.

    Raises:
        ModelFilesError, ConfigError: transformers does not know the architecture, or its code must be trusted first.
    """
    from kani_nb.hardware.shape_reading import shape_of

    if getattr(config, "is_encoder_decoder", False):
        return None
    try:
        return shape_of(config, request.name, request.model_cls, trust_remote_code=request.trust_remote_code)
    except ModelFilesError:
        if request.model_cls is None and not getattr(config, "auto_map", None):
            raise
        return None


def _check_modules(shape: ModelShape, settings: Quantization, request: LoadRequest) -> None:
    """Refuse module names that name nothing: a list that skips nothing would go unnoticed."""
    from kani_nb.hardware.arithmetic import unmatched

    modules = list(dict.fromkeys(each.module for each in shape.tensors))
    if wrong := unmatched(shape, settings.llm_int8_skip_modules or ()):
        # A tied head holds nothing of its own, and can be named all the same.
        tail = list(dict.fromkeys(each.rpartition(".")[2] for each in (*modules, *shape.blocks, shape.head or "")))
        tail = [each for each in tail if each and not each.isdigit()]
        raise ConfigError(
            f"llm_int8_skip_modules names {wrong[0]!r}",
            why=f"no module of {request.name} is matched by it (from its start, or at its end)",
            fix=did_you_mean(wrong[0], [*modules, *tail])
            or f"for example {', '.join(tail[:6])}, or r'.*\\.{wrong[0]}'",
        )


def _planned(
    shape: ModelShape,
    settings: Quantization,
    dtype: str,
    budgets: tuple[Budget, ...],
    request: LoadRequest,
) -> PlanRow:
    """The plan of this load, on the devices that were asked for.

    Raises:
        ConfigError: a device cannot compute it.
        DoesNotFitError: it would not fit, and nobody asked for offloading.
    """
    from kani_nb.hardware.planner import plan_row, refusal

    asked: dict[str, Any] = {
        "context_tokens": request.max_context_size,
        "dtype": dtype,
        "device_map": request.device if request.device is not None else request.device_map,
        "allow_offload": request.allow_offload,
        "line": line_of(request),
    }
    row = plan_row(shape, settings, name=request.name, budgets=budgets, **asked)
    if not row.can_run:
        raise ConfigError(
            f"{request.name} cannot run here in {row.label}", why=row.why_not, fix="%engine plan shows what can"
        )
    may_offload = request.allow_offload or isinstance(request.device_map, dict)
    if not row.fits and not (may_offload and row.device_map and _holds(row, budgets)):
        raise refusal(shape, row, budgets=budgets, name=request.name, **asked)
    if request.offload_folder is not None:
        check_offload_folder(Path(request.offload_folder), row)
    return row


def _holds(row: PlanRow, budgets: Iterable[Budget]) -> bool:
    """Whether no device would hold more than it may; the disk holds what it must."""
    usable = {each.name: each.usable_bytes for each in budgets}
    return all(share.peak_bytes <= usable.get(share.device, share.peak_bytes) for share in row.shares)


def check_offload_folder(folder: Path, row: PlanRow) -> None:
    """Refuse a folder that cannot take what the plan puts on the disk, before anything is loaded.

    Raises:
        ConfigError: it cannot be made or written to, or its disk has too little room.
    """
    needed = sum(share.weight_bytes for share in row.shares if share.device == "disk")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(
            f"the offload folder {folder} cannot be written to", why=error.strerror or str(error), fix="name another"
        ) from None
    if needed > free:
        raise ConfigError(
            f"the offload folder {folder} has {in_words(free)} free",
            why=f"{in_words(needed)} of weights would be kept there",
            fix="name one on another disk, or take fewer bits (%engine plan compares)",
        )
