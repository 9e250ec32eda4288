"""Decided before a byte is loaded: in what precision, on which devices, and whether it fits.

Everything that can be refused from the configuration alone is refused here, in one short error: a scheme the device
cannot run, a device map that names no module, weights that do not fit. Nothing is ever offloaded without being asked.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.engines.huggingface.arguments import LoadRequest
from kani_nb.engines.huggingface.checkpoint_packages import check_checkpoint_packages
from kani_nb.errors import ConfigError, did_you_mean
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
        quantization_config: for `from_pretrained`; None for a pre-quantized checkpoint, whose own is taken.
        is_prequantized: the checkpoint was quantized before.
        row: the plan; None where the model's shape could not be read.
        shape: what the model is made of, to be passed on to the next call.
        notes: what was decided on the way, in sentences.
    """

    device: str
    device_map: Any
    dtype: str
    quantization: Quantization
    quantization_config: Any = None
    is_prequantized: bool = False
    row: PlanRow | None = None
    shape: ModelShape | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes multiplies these weights."""
        return find_scheme(self.quantization.scheme).backend == "bitsandbytes"

    @property
    def words(self) -> str:
        """The precision and the place."""
        precision = self.dtype if self.quantization.is_none else self.quantization.label
        devices = sorted({str(each) for each in self.device_map.values()}) if isinstance(self.device_map, dict) else []
        return f"{precision} on {' and '.join(devices) if len(devices) > 1 else self.device}"


def choose_placing(
    request: LoadRequest,
    config: Any,
    *,
    shape: ModelShape | None = None,
    is_empty: bool = False,
) -> Placing:
    """The place and the precision of a model, or an error that says why there is none.

    Args:
        request: what was asked for.
        config: the model's configuration.
        shape: what the model is made of, where that has been read before.
        is_empty: count all memory of the devices as free: what does not fit then will not fit whatever is unloaded.

    Raises:
        ConfigError: the scheme, a setting, the device or the device map cannot be used with this model here.
        MissingDependencyError: what the scheme or the checkpoint needs is not installed.
        DoesNotFitError: it needs more memory than there is, with the numbers and two remedies.
    """
    held, is_prequantized = _what_it_is_held_in(request, config)
    scheme = find_scheme(held.scheme)
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
    budgets = _budgets(request, scheme, is_empty=is_empty)
    first = _first_device(request, budgets)
    _check_runs(scheme, first)
    notes: list[str] = []
    dtype = _dtype(request, config, first, scheme, notes)
    settings = _settings_on(held, first, notes)
    from kani_nb.hardware.arithmetic import sparing_tied_head

    shape = shape or _shape(config, request)
    row = None
    device_map: Any = request.device_map
    if shape is not None:
        _check_modules(shape, settings, request)
        settings = sparing_tied_head(shape, settings, scheme)
        row = _planned(shape, settings, dtype, budgets, request)
        device_map = row.device_map if len(set(row.device_map.values())) > 1 else None
    device = first.name
    if row is not None and row.device_map:
        device = next(iter(row.device_map.values()))
    if device_map is None and not device.startswith("cpu"):
        device_map = {"": device}
    wanted = None
    if not is_prequantized:
        wanted = request.foreign_config
        if scheme.transformers_config is not None and not settings.is_none:
            wanted = scheme.transformers_config(_checked_for_map(settings, scheme, device_map), dtype)
    return Placing(
        device="cpu" if device == "disk" else device,
        device_map=device_map,
        dtype=dtype,
        quantization=settings,
        quantization_config=wanted,
        is_prequantized=is_prequantized,
        row=row,
        shape=shape,
        notes=tuple(dict.fromkeys((*notes, *(row.notes if row is not None else ())))),
    )


def _what_it_is_held_in(request: LoadRequest, config: Any) -> tuple[Quantization, bool]:
    """The scheme and settings of the weights once loaded, and whether the checkpoint has them already."""
    from kani_nb.hardware.checkpoint_schemes import settings_of_checkpoint

    own = getattr(config, "quantization_config", None)
    if own is None or request.gguf_file is not None:
        return request.quantization, False
    own = own if isinstance(own, dict) else own.to_dict()
    settings, _ = settings_of_checkpoint(own)
    method = settings.label if settings is not None else str(own.get("quant_method", "an unknown method"))
    asked = request.quantization
    if request.foreign_config is not None or not (asked.is_none or _agrees(asked, settings)):
        wanted = asked.label if request.foreign_config is None else type(request.foreign_config).__name__
        raise ConfigError(
            f"{request.name} is quantized already, with {method}",
            why=f"it cannot be quantized again, with {wanted}",
            fix="load it as it is, without --quant, or load the model that it was made from",
        )
    check_checkpoint_packages(request.name, str(own.get("quant_method", "")))
    if settings is not None and settings.compute_dtype == _checkpoint_dtype(request, config):
        settings = replace(settings, compute_dtype="auto")  # which is the same, and not worth a word
    return settings or Quantization(), True


def _agrees(asked: Quantization, own: Quantization | None) -> bool:
    """Whether what was asked for is what the checkpoint has, as far as that was said."""
    if own is None or asked.scheme != own.scheme:
        return False
    return all(getattr(own, name) == value for name, value in asked.given.items())


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
        asked = "llm_int8_enable_fp32_cpu_offload" if settings.llm_int8_enable_fp32_cpu_offload else "the disk"
        raise ConfigError(
            f"{scheme.name} with {asked} on {' and '.join(sorted(places))} alone",
            why="what is offloaded is not quantized, and that would be the whole model",
            fix="leave it out: the scheme runs on a CPU without offloading",
        )
    if not is_off_gpu and places & {"cpu", "disk"}:
        return replace(settings, llm_int8_enable_fp32_cpu_offload=True)
    return settings


def _budgets(request: LoadRequest, scheme: Scheme, *, is_empty: bool) -> tuple[Budget, ...]:
    """What may be used here, the devices that the scheme cannot use left out where none was named."""
    from kani_nb.hardware.budgets import budgets_here
    from kani_nb.hardware.placement import parse_max_memory

    budgets = budgets_here(request.max_memory)
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
    from kani_nb.hardware.placement import device_name

    known = {each.name: each for each in budgets}
    named = request.device
    if named is None and isinstance(request.device_map, str | int):
        named = None if request.device_map in ("auto", "balanced", "sequential") else str(request.device_map)
    if named is None and isinstance(request.device_map, dict):
        places = [device_name(each) for each in request.device_map.values()]
        named = next((each for each in places if each not in ("cpu", "disk")), "cpu")
    if named is None:
        best = [each for each in known.values() if each.kind not in ("cpu", "disk")]
        return max(best, key=lambda each: each.usable_bytes) if best else known["cpu"]
    named = device_name(named)
    if named not in known:
        raise ConfigError(f"there is no device {named!r} here", why=f"torch sees {', '.join(known)}")
    return known[named]


def _dtype(request: LoadRequest, config: Any, budget: Budget, scheme: Scheme, notes: list[str]) -> str:
    """The dtype of what is not quantized, one that the device can compute in."""
    from kani_nb.hardware.precision import choose_dtype

    checkpoint = _checkpoint_dtype(request, config)
    choice = choose_dtype(request.dtype, checkpoint, budget.kind, budget.compute_capability, scheme)
    if choice.reason:
        notes.append(choice.reason)
    return choice.dtype


def _checkpoint_dtype(request: LoadRequest, config: Any) -> str | None:
    """What the configuration says, or else what most of the first file's weights are; None where neither is known."""
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if named is not None or request.gguf_file is not None or request.folder is None:
        return None if named is None else str(named).removeprefix("torch.")
    from collections import Counter

    from safetensors import safe_open

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for path in sorted(request.folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            found = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 - it is no dict
        return names.get(found.most_common(1)[0][0]) if found else None
    return None


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
    """What the model is made of; None where only its own code could say."""
    from kani_nb.hardware.shape_reading import shape_of

    if request.model_cls is not None or getattr(config, "auto_map", None):
        return None
    return shape_of(config, request.name)


def _check_modules(shape: ModelShape, settings: Quantization, request: LoadRequest) -> None:
    """Refuse module names that name nothing: a list that skips nothing would go unnoticed."""
    from kani_nb.hardware.arithmetic import unmatched

    modules = list(dict.fromkeys(each.module for each in shape.tensors))
    if wrong := unmatched(shape, settings.llm_int8_skip_modules or ()):
        tail = list(dict.fromkeys(each.rpartition(".")[2] for each in modules))
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
        DoesNotFitError: it would not fit, and nobody asked for offloading.
    """
    from kani_nb.hardware.planner import plan_row, refusal

    asked: dict[str, Any] = {
        "context_tokens": request.max_context_size,
        "dtype": dtype,
        "device_map": request.device if request.device is not None else request.device_map,
        "allow_offload": request.allow_offload,
    }
    row = plan_row(shape, settings, name=request.name, budgets=budgets, **asked)
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
