"""From a model's files to a model that runs: the right class, precision and place, with errors that say what to do.

Blocking, and called in a thread of its own. What was decided (context, end-of-sequence tokens, size of a prompt's
chunks) is kept in the `LoadedModel`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.huggingface.generation import LoadedModel
from kani_nb.errors import (
    ConfigError,
    KaniNbError,
    MissingDependencyError,
    ModelFilesError,
    ModelUnavailableError,
    OutOfMemoryError,
)

#: transformers changes attributes of its own classes while it loads, and puts them back: two loads at once, and every
#: model that is loaded later may be wrong. So a process loads one at a time, an abandoned load included.
_ONE_AT_A_TIME = threading.RLock()

#: What one CPU thread (float32, half precision) and a GPU do in a prefill, in FLOP/s: measured on a server CPU of
#: 2024, and low on purpose for the GPU. It only sets how often a Stop is looked at.
_ASSUMED_FLOPS = {"cpu": 95e9, "cpu half": 150e9, "gpu": 20e12}
_CHUNK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load, and how; see `HuggingEngine` for the fields."""

    folder: Path
    gguf_file: str | None
    origin: str
    name: str
    dtype: str = "auto"
    device: str | None = None
    device_map: Any = None
    max_context_size: int | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    tokenizer_cls: Any = None
    model_cls: Any = None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    model_load_kwargs: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def one_at_a_time(name: str, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Wait until no other thread of this process loads a model, and keep others waiting meanwhile.

    Raises:
        ModelUnavailableError: `cancelled` was set while it waited.
    """
    while not _ONE_AT_A_TIME.acquire(timeout=0.1):
        if cancelled is not None and cancelled.is_set():
            raise _interrupted(name)
    try:
        yield
    finally:
        _ONE_AT_A_TIME.release()


def _interrupted(name: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"loading {name} was interrupted", fix=f"%load_engine {name}")


def load_tokenizer(request: LoadRequest) -> Any:
    """The model's tokenizer.

    Raises:
        ModelFilesError: its files are missing or broken.
    """
    options: dict[str, Any] = {"trust_remote_code": request.trust_remote_code, **request.tokenizer_kwargs}
    if request.gguf_file is not None:
        options["gguf_file"] = request.gguf_file
    with one_at_a_time(request.name), _translated(request), _quiet():
        from transformers import AutoTokenizer

        return (request.tokenizer_cls or AutoTokenizer).from_pretrained(str(request.folder), **options)


def load_config(request: LoadRequest) -> Any:
    """The model's configuration.

    Raises:
        ModelFilesError: it is missing, broken, or of an architecture that this transformers does not know.
    """
    options: dict[str, Any] = {"trust_remote_code": request.trust_remote_code}
    if request.gguf_file is not None:
        options["gguf_file"] = request.gguf_file
    with one_at_a_time(request.name), _translated(request), _quiet():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(request.folder), **options)


def context_of(config: Any, asked: int | None, name: str) -> int:
    """Tokens of prompt and answer that the model can hold.

    Raises:
        ConfigError: the configuration does not say, and nothing was asked for; or more was asked for than there is.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "seq_length", "n_ctx")
    own = next((value for each in names if isinstance(value := getattr(text_config, each, None), int)), None)
    if asked is None and own is None:
        raise ConfigError(f"{name} does not say how long its context is", fix="say it: --max-context-size 2048")
    if asked is not None and own is not None and asked > own:
        raise ConfigError(
            f"max_context_size is {asked:,}", why=f"{name} was made for {own:,} tokens", fix=f"at most {own}"
        )
    return int(asked if asked is not None else own or 0)


def load_model(
    request: LoadRequest,
    tokenizer: Any,
    tokenizer_lock: contextlib.AbstractContextManager[Any],
    progress: ProgressCallback,
    cancelled: threading.Event,
) -> LoadedModel:
    """The model, in place and ready. Called within `one_at_a_time`.

    Raises:
        ModelFilesError, ModelUnavailableError, OutOfMemoryError, MissingDependencyError, ConfigError: as their names
        say.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kani_nb.engines.huggingface.driving import find_driving
    from kani_nb.hardware.devices import best_device, choose_threads

    config = load_config(request)
    context = context_of(config, request.max_context_size, request.name)
    device = request.device or best_device()
    threads = request.threads
    if _is_cpu(device, request.device_map):
        threads = threads or choose_threads().threads
        torch.set_num_threads(threads)
    options = _load_options(request, config, device)
    progress(LoadProgress("weights", f"{request.name} to {request.device_map or device}"))
    model_cls = request.model_cls or AutoModelForCausalLM
    with _translated(request), _quiet():
        model, report = model_cls.from_pretrained(str(request.folder), output_loading_info=True, **options)
        _check_complete(request, report)
        if request.device_map is None and "device_map" not in options and str(model.device) != device:
            model = model.to(device)
        model.eval()
        if cancelled.is_set():
            raise _interrupted(request.name)
        driving = find_driving(model, str(model.device))
    parameters = sum(each.numel() for each in model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        tokenizer_lock=tokenizer_lock,
        eos_ids=_eos_ids(model, tokenizer),
        context_tokens=context,
        chunk_tokens=chunk_size(
            parameters, is_gpu=not _is_cpu(str(model.device), None), is_half=model.dtype != torch.float32
        ),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=_storage_bytes(model),
        origin=request.origin,
        threads=threads,
        driving=driving,
    )


def _check_complete(request: LoadRequest, report: dict[str, Any]) -> None:
    """Refuse a model some of whose weights would be random numbers."""
    missing = sorted(report.get("missing_keys") or ())
    wrong = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report.get("mismatched_keys") or ())
    if not missing and not wrong:
        return
    names = (missing + wrong)[:3]
    raise ModelFilesError(
        f"{len(missing) + len(wrong)} weights of {request.name} are missing or of the wrong shape in {request.folder}",
        why=f"for example {', '.join(names)}; they would be random numbers",
        fix="download the model again, or check that the files belong to this configuration",
    )


def chunk_size(parameters: int, *, is_gpu: bool, is_half: bool) -> int:
    """Tokens of a prompt that one forward pass takes: the power of two that needs about 0.2 s.

    It depends on nothing but the model and the kind of device, so that the same prompt is always computed in the same
    shapes and gives the same numbers. Smaller pieces would stop sooner and cost more: on one thread a prompt of 768
    tokens in bfloat16 takes 1.72 s in pieces of 64, 1.47 s of 128 and 1.34 s in one.
    """
    flops = _ASSUMED_FLOPS["gpu" if is_gpu else "cpu half" if is_half else "cpu"]
    tokens = max(1.0, _CHUNK_SECONDS * flops / (2 * max(1, parameters)))
    lowest, highest = (256, 4096) if is_gpu else (8, 256)
    return int(max(lowest, min(highest, 2 ** round(math.log2(tokens)))))


def _is_cpu(device: str, device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return all(str(place) == "cpu" for place in device_map.values())
    return str(device_map if isinstance(device_map, str) else device).startswith("cpu")


def check_device(device: str | None) -> None:
    """Refuse a device that is not there, before anything is loaded.

    Raises:
        ConfigError: torch does not see it.
    """
    if device is not None:
        from kani_nb.hardware.devices import free_bytes

        free_bytes(device)


def _load_options(request: LoadRequest, config: Any, device: str) -> dict[str, Any]:
    """The arguments of `from_pretrained`; a copy, since callers keep theirs."""
    import torch

    options: dict[str, Any] = {"dtype": request.dtype, "trust_remote_code": request.trust_remote_code}
    if request.dtype == "auto" and device == "cpu" and getattr(config, "dtype", None) in (torch.float16, "float16"):
        options["dtype"] = torch.float32  # half precision is emulated on a CPU, slowly
    elif request.dtype != "auto":
        options["dtype"] = getattr(torch, request.dtype)
    if request.gguf_file is not None:
        options["gguf_file"] = request.gguf_file
        with contextlib.suppress(ImportError):
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
    if not request.allow_pickle and request.gguf_file is None:
        options["use_safetensors"] = True
    if request.device_map is not None:
        options["device_map"] = request.device_map
    elif device.startswith("cuda"):
        options["device_map"] = {"": device}
    given = dict(request.model_load_kwargs)
    if "torch_dtype" in given:
        given.setdefault("dtype", given.pop("torch_dtype"))
    given.pop("use_auth_token", None)
    return options | given


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: those of the generation config, and the tokenizer's own."""
    found: list[Any] = []
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found += value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(int(each) for each in found if each is not None))


def _storage_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers meanwhile: progress is shown once, by whoever asked for it."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _translated(request: LoadRequest) -> Iterator[None]:
    """Errors of the libraries in our words, the originals as their cause."""
    where = request.folder / request.gguf_file if request.gguf_file else request.folder
    try:
        yield
    except KaniNbError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(f"loading {request.name}") from None
        raise ModelFilesError(f"{request.name} could not be loaded from {where}", why=short(error)) from error
    except ImportError as error:
        raise MissingDependencyError(
            f"{request.name} needs a library that is not installed", why=short(error)
        ) from error
    except Exception as error:
        if isinstance(error, TypeError | AssertionError | AttributeError):
            raise  # a wrong argument or a defect: its traceback says more than we could
        fix = "delete that folder and load again" if "safetensor" in type(error).__name__.lower() else ""
        if "trust_remote_code" in str(error):
            fix = "--trust-remote-code runs the repository's Python code; read it first"
        raise ModelFilesError(f"{request.name} could not be loaded from {where}", why=short(error), fix=fix) from error


def short(error: BaseException) -> str:
    """The first line of an exception, with its type, for a person."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the process ran out of memory; torch says it in several ways."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
        or "defaultcpuallocator" in text
    )


def out_of_memory(doing: str) -> OutOfMemoryError:
    """The error for it, after what the attempt held has been freed."""
    free_memory()
    return OutOfMemoryError(
        f"out of memory while {doing}",
        why="what it held has been freed",
        fix="a smaller model or --max-context-size, or %unload_engine another one first",
    )


def free_memory() -> None:
    """Give memory that nobody uses back to the device and to the system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
