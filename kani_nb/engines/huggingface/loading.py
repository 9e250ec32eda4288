"""From a model's files to a model that runs: the right class, precision and place, with errors that say what to do.

Blocking, and called in a thread of its own. What was decided (context, end-of-sequence tokens, size of a prompt's
chunks) is kept in the `LoadedModel`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.huggingface.arguments import LoadRequest
from kani_nb.engines.huggingface.bitsandbytes_kernels import keep_odd_layers_unpacked, silence_noise
from kani_nb.engines.huggingface.four_bit_packing import guard_state_dict
from kani_nb.engines.huggingface.generation import LoadedModel
from kani_nb.engines.huggingface.library_errors import free_memory, quiet, translated
from kani_nb.engines.huggingface.placing import Placing
from kani_nb.errors import ConfigError, ModelFilesError, ModelUnavailableError
from kani_nb.hardware.prompt_chunks import chunk_size
from kani_nb.hardware.schemes import DEFAULT_GROUP_SIZE
from kani_nb.hardware.shape_reading import BUILDING
from kani_nb.hardware.shapes import ModelShape

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.driving import Driving

#: transformers changes attributes of its own classes while it loads, and puts them back: two loads at once, and every
#: model that is loaded later may be wrong. So a process loads one at a time, an abandoned load included.
_ONE_AT_A_TIME = BUILDING


#: Said after bitsandbytes has quantized on the fly, which leaves hundreds of MiB behind (`pytest -m timing -s`).
_OFFER = "quantized on the fly; --cache-quantized keeps a copy, which loads faster and in less memory"


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
    with one_at_a_time(request.name), translated(request.name, request.files), quiet():
        from transformers import AutoTokenizer

        loaded = (request.tokenizer_cls or AutoTokenizer).from_pretrained(str(request.folder), **options)
        return getattr(loaded, "tokenizer", loaded)  # the documents give a processor's class here


def load_config(request: LoadRequest) -> Any:
    """The model's configuration.

    Raises:
        ModelFilesError: it is missing, broken, or of an architecture that this transformers does not know.
    """
    options: dict[str, Any] = {"trust_remote_code": request.trust_remote_code}
    if request.gguf_file is not None:
        options["gguf_file"] = request.gguf_file
    with one_at_a_time(request.name), translated(request.name, request.files), quiet():
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
    shape: ModelShape | None = None,
    driving: Driving | None = None,
) -> LoadedModel:
    """The model, in place and ready. While this thread waits for another process, other threads may load.

    Args:
        request: what to load.
        tokenizer: the model's.
        tokenizer_lock: entered for every use of it.
        progress: told of each step.
        cancelled: ends it at the next step.
        shape: what the model is made of, where that has been read before.
        driving: how its forward is called, where that has been found out before; the model is then not run.

    Raises:
        ModelFilesError, ModelUnavailableError, OutOfMemoryError, MissingDependencyError, ConfigError: as their names
        say.
    """
    from kani_nb.engines.huggingface.placing import choose_placing

    config = load_config(request)
    context = context_of(config, request.max_context_size, request.name)
    with one_at_a_time(request.name, cancelled):
        placing = choose_placing(request, config, shape=shape)
        obstacle = _why_no_copy(request, placing)
        if obstacle is not None:
            progress(LoadProgress("weights", f"{request.name}, {placing.words}"))
            found = _FromFiles(request, placing, obstacle)
            return _loaded(found, tokenizer, tokenizer_lock, context, cancelled, driving)
    found = _copied(request, placing, tokenizer, progress, cancelled)
    with one_at_a_time(request.name, cancelled):
        progress(LoadProgress("weights", f"{request.name}, {placing.words}, quantized before"))
        return _loaded(found, tokenizer, tokenizer_lock, context, cancelled, driving)


@dataclass(frozen=True, slots=True)
class _FromFiles:
    """What is read, where it goes, and what there is to say about it."""

    request: LoadRequest
    placing: Placing
    note: str = ""


def _loaded(
    found: _FromFiles,
    tokenizer: Any,
    tokenizer_lock: contextlib.AbstractContextManager[Any],
    context: int,
    cancelled: threading.Event,
    driving: Driving | None,
) -> LoadedModel:
    """The model that the files hold, ready. Called within `one_at_a_time`."""
    import torch

    from kani_nb.engines.huggingface.driving import find_driving
    from kani_nb.engines.huggingface.footprint import storage_bytes
    from kani_nb.hardware.devices import choose_threads

    request, placing = found.request, found.placing
    threads = request.threads
    if placing.device.startswith("cpu"):
        threads = threads or choose_threads().threads
        torch.set_num_threads(threads)
    with translated(request.name, request.files), quiet():
        model = _from_files(request, placing)
        if cancelled.is_set():
            raise _interrupted(request.name)
        driving = driving or find_driving(model, placing.device)
    free_memory()  # what quantizing left behind
    shape = placing.shape
    parameters = shape.parameters if shape is not None else sum(each.numel() for each in model.parameters())
    assert request.folder is not None
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        tokenizer_lock=tokenizer_lock,
        eos_ids=_eos_ids(model, tokenizer),
        context_tokens=context,
        chunk_tokens=chunk_size(
            parameters, is_gpu=not placing.device.startswith("cpu"), is_half=model.dtype != torch.float32
        ),
        device=placing.device,
        dtype=str(model.dtype).removeprefix("torch."),
        held_bytes=storage_bytes(model),
        origin=request.origin,
        folder=request.folder,
        threads=threads,
        driving=driving,
        placing=replace(placing, notes=tuple(filter(None, (*placing.notes, found.note)))),
    )


def _why_no_copy(request: LoadRequest, placing: Placing) -> str | None:
    """None where the model is loaded from a quantized copy of it; else what there is to say of loading it directly."""
    is_as_stored = placing.is_prequantized or placing.quantization_config is None
    if is_as_stored or request.foreign_config is not None:
        why = "nothing is quantized while it is loaded" if is_as_stored else "its quantization has no scheme here"
        return f"no quantized copy is kept: {why}" if request.cache_quantized else ""
    if placing.quantization.scheme == "gptq":
        return None
    if not request.cache_quantized:
        return _OFFER if placing.is_bitsandbytes else ""
    if placing.is_bitsandbytes and placing.has_parts_aside:
        return "no quantized copy is kept: the parts of it on the CPU or the disk are not quantized"
    return None


def _copied(
    request: LoadRequest, placing: Placing, tokenizer: Any, progress: ProgressCallback, cancelled: threading.Event
) -> _FromFiles:
    """The quantized copy of a model, made now if need be; one process makes it, and others wait for it."""
    from kani_nb.engines.quantized_copies import copy_key, find_copy, keep_copy

    def waiting(seconds: float) -> None:
        if cancelled.is_set():
            raise _interrupted(request.name)
        progress(LoadProgress("waiting", f"for another process that quantizes {request.name}, {seconds:.0f} s so far"))

    assert request.folder is not None
    key = copy_key(
        request.folder,
        placing.quantization,
        placing.dtype,
        name=request.name,
        device=placing.device,
        model_cls=request.model_cls,
    )
    note = f"from the quantized copy in {key.folder}"
    if find_copy(key) is None:
        progress(LoadProgress("weights", f"{request.name}, {placing.words}, quantizing once"))
        with translated(request.name, request.files), quiet():
            keep_copy(
                key,
                lambda folder: _make_copy(request, placing, tokenizer, folder, progress, cancelled),
                waiting=waiting,
            )
        free_memory()
        note = f"a quantized copy is kept in {key.folder}"
    return _FromFiles(replace(request, folder=key.folder), replace(placing, quantization_config=None), note)


def _make_copy(
    request: LoadRequest,
    placing: Placing,
    tokenizer: Any,
    folder: Path,
    progress: ProgressCallback,
    cancelled: threading.Event,
) -> None:
    """Write the quantized model into `folder`: fitted to texts by gptqmodel, or as it is loaded on the fly."""
    if placing.quantization.scheme == "gptq":
        from kani_nb.engines.huggingface.gptq import quantize_gptq

        assert request.folder is not None
        size = placing.quantization.group_size or DEFAULT_GROUP_SIZE["gptq"]
        quantize_gptq(request.folder, folder, group_size=size, progress=progress, cancelled=cancelled)
        return
    from kani_nb.engines.huggingface.saving import save_model

    with one_at_a_time(request.name, cancelled):
        save_model(_from_files(request, placing), tokenizer, folder, source=request.folder)


def _from_files(request: LoadRequest, placing: Placing) -> Any:
    """The model that the files hold, complete, and in evaluation mode."""
    from transformers import AutoModelForCausalLM

    from kani_nb.hardware.auto_classes import auto_class_of

    options = _load_options(request, placing)
    model_cls = request.model_cls or auto_class_of(load_config(request)) or AutoModelForCausalLM
    _prepare_libraries(placing)
    model, report = model_cls.from_pretrained(str(request.folder), output_loading_info=True, **options)
    _check_complete(request, report)
    if "device_map" not in options and str(model.device) != placing.device:
        model = model.to(placing.device)
    model.eval()
    if placing.is_bitsandbytes:
        guard_state_dict(model)
        keep_odd_layers_unpacked(model)
    return model


def origin_of(request: LoadRequest, loaded: LoadedModel) -> dict[str, Any]:
    """Where the weights of a loaded model came from, and how to have them once more as they were: for `saving`."""
    return {"source": loaded.folder, "reload": lambda: load_again(request, loaded)}


def load_again(request: LoadRequest, loaded: LoadedModel) -> Any:
    """A second copy of a loaded model, fresh from its files and never run; its bytes are taken once more meanwhile.

    Raises:
        DoesNotFitError, OutOfMemoryError, ModelFilesError: as their names say.
    """
    lock, shape = loaded.tokenizer_lock, loaded.placing.shape
    again = load_model(
        request, loaded.tokenizer, lock, lambda _: None, threading.Event(), shape, driving=loaded.driving
    )
    return again.model


def _prepare_libraries(placing: Placing) -> None:
    """What must be said to the libraries before they load."""
    if placing.is_bitsandbytes:
        silence_noise()
    if placing.quantization.scheme.startswith("cpu-"):
        from kani_nb.hardware.packed_quantizer import register

        register()


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


def _load_options(request: LoadRequest, placing: Placing) -> dict[str, Any]:
    """The arguments of `from_pretrained`; a copy, since callers keep theirs."""
    import torch

    options: dict[str, Any] = {"trust_remote_code": request.trust_remote_code}
    options["dtype"] = "auto" if placing.dtype == "auto" else getattr(torch, placing.dtype)
    if request.gguf_file is not None:
        options["gguf_file"] = request.gguf_file
        with contextlib.suppress(ImportError):
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
    elif placing.quantization_config is not None:
        options["quantization_config"] = placing.quantization_config
    if not request.allow_pickle and request.gguf_file is None:
        options["use_safetensors"] = True
    if placing.config is not None:
        options["config"] = placing.config
    if placing.device_map is not None:
        options["device_map"] = placing.device_map
    if request.offload_folder is not None:
        options["offload_folder"] = request.offload_folder
    return options | request.model_load_kwargs


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: those of the generation config, and the tokenizer's own."""
    found: list[Any] = []
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found += value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(int(each) for each in found if each is not None))
