"""Saves a model in memory as a folder that gives back exactly what was loaded, or refuses; or pushes it to the Hub.

The folder holds safetensors, the configuration with its quantization, the tokenizer and the chat template, and loads
with plain `from_pretrained(folder)`. It appears whole or not at all (`staging`). Whether the running model can still
give its weights is decided in `saving_checks` and `four_bit_packing`; when it cannot, a fresh copy is loaded and saved
in its place. All of it blocks, and must not run while the model answers.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.hub_http import HubToken
from kani_nb.engines.huggingface import saving_checks
from kani_nb.engines.huggingface.footprint import storage_bytes
from kani_nb.engines.huggingface.four_bit_packing import LostWeight, exact_state_dict, lost_weights
from kani_nb.engines.huggingface.hub_push import push_folder, require_push
from kani_nb.engines.huggingface.library_errors import free_memory, is_out_of_memory, out_of_memory, quiet, short
from kani_nb.engines.sources_cache import cache_folder, is_disk_full
from kani_nb.engines.sources_checks import check_weights
from kani_nb.engines.staging import check_empty, require_space, staged_folder
from kani_nb.engines.wheel_model import STAMP, read_stamp
from kani_nb.errors import EngineError, KaniNbError

#: Gives a freshly loaded model that never ran, the same as the one in use; or raises.
Reload = Callable[[], Any]

#: What of a folder makes its weights loadable, when they are copied as they are.
_COPIED = ("config.json", "generation_config.json", "quantize_config.json", "*.safetensors", "*.index.json", "*.py")


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    source: Path | None = None,
    reload: Reload | None = None,
    weights_changed: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Save `model` and `tokenizer` in `folder`, which must be new or empty, and give its path.

    The model answers after it exactly as before. Blocks.

    Args:
        model: a transformers model, loaded in this process.
        tokenizer: its tokenizer, whose chat template is saved too.
        folder: new, or empty.
        source: what the model was loaded from: for the record, and to copy files that memory no longer holds.
        reload: gives the same model again, never run; called when the one in use cannot give back what was loaded.
        weights_changed: the weights are not those of `source` any more (training, merging), so that `reload` would
            give others; what is there now is saved.
        progress: told of each step.

    Raises:
        ConfigError: the folder is not empty, or cannot be written.
        EngineError: the weights cannot be given back exactly, or cannot be saved; or the disk is full.
        OutOfMemoryError: there is no room for the copies that this takes.
    """
    target = Path(folder).expanduser().absolute()
    lost = _check(model, target, source=source, reload=reload, weights_changed=weights_changed)
    _write_folder(model, tokenizer, target, source, reload if lost else None, lost, progress)
    return target


@dataclass(frozen=True, slots=True)
class ReadyPush:
    """A model written for the Hub, which is no longer needed in memory: `send` it, or `discard` it.

    Attributes:
        folder: what is pushed.
        repo_id: where it goes.
        scheme: what the weights are held in.
    """

    folder: Path
    repo_id: str
    scheme: str
    _access: HubToken

    def send(self, private: bool | None = None, commit_message: str | None = None) -> str:
        """Push the folder as one commit, and give the repository's address; the folder is then removed. Blocks.

        The repository is made when it is not there; what is in it keeps its history.

        Raises:
            GatedModelError: the token may not write there.
            UnknownModelError: there is no such user or organization.
            ModelUnavailableError: the Hub does not answer.
        """
        message = commit_message or f"Upload {self.scheme} weights with kani_nb"
        try:
            return push_folder(self.folder, self.repo_id, self._access, private=private, commit_message=message)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def prepare_push(
    model: Any,
    tokenizer: Any,
    repo_id: str,
    *,
    token: str | None = None,
    source: Path | None = None,
    reload: Reload | None = None,
    weights_changed: bool = False,
    progress: ProgressCallback | None = None,
) -> ReadyPush:
    """Save the model in a folder of our cache, to be pushed from there. Blocks.

    Other arguments, and further errors, as in `save_model`. Folders that a killed process left are removed.

    Raises:
        ConfigError: no token, or no such name can be.
        GatedModelError: the token is none of the Hub's.
        ModelUnavailableError: offline, or the Hub does not answer.
    """
    access = require_push(repo_id, token)
    target = _folder_of_push()
    lost = _check(model, target, source=source, reload=reload, weights_changed=weights_changed)
    _write_folder(model, tokenizer, target, source, reload if lost else None, lost, progress, is_public=True)
    return ReadyPush(target, repo_id, saving_checks.scheme_of(model), access)


def _check(
    model: Any, target: Path, *, source: Path | None, reload: Reload | None, weights_changed: bool
) -> list[LostWeight]:
    """Refuse before anything is written; the tensors for which the model must be loaded again."""
    check_empty(target)
    saving_checks.check_savable(model)
    if saving_checks.needs_copying(model):
        if weights_changed or source is None:
            why = "its weights were changed" if weights_changed else "where it came from is not known"
            raise EngineError(
                f"weights quantized by {saving_checks.scheme_of(model)} are saved by copying their files",
                why=f"and {why}",
                fix="save the adapter, or the unquantized model",
            )
        return []
    lost = lost_weights(model)
    if lost and weights_changed:
        further = "and they were changed since, so that loading them again would give others"
        raise saving_checks.refusal(model, lost, further, "save the adapter, or save before the first answer")
    if lost and reload is None:
        raise saving_checks.refusal(model, lost, "and there is no source to load them from again")
    return lost


def _write_folder(
    model: Any,
    tokenizer: Any,
    target: Path,
    source: Path | None,
    reload: Reload | None,
    lost: Sequence[LostWeight],
    progress: ProgressCallback | None,
    *,
    is_public: bool = False,
) -> None:
    with staged_folder(target) as work:
        if reload is not None:
            _tell(progress, "loading", "a fresh copy, since the running one can no longer give its weights")
            model = _fresh(model, reload, lost)
        try:
            with _errors(target):
                if source is not None and saving_checks.needs_copying(model):
                    _copy(source, work)
                else:
                    require_space(target, sum(storage_bytes(model).values()))
                    _tell(progress, "writing", str(target))
                    _save_weights(model, work)
                tokenizer.save_pretrained(work)
            check_weights(work)
            _write_stamp(model, work, source, is_public=is_public)
        finally:
            del model
            if reload is not None:
                free_memory()


def _fresh(model: Any, reload: Reload, lost: Sequence[LostWeight]) -> Any:
    """A copy of `model` that never ran.

    Raises:
        EngineError: it cannot be had, or is another.
    """
    try:
        fresh = reload()
    except Exception as error:
        reason = error.what if isinstance(error, KaniNbError) else short(error)
        raise saving_checks.refusal(model, lost, f"and loading them again failed ({reason})") from error
    settings = saving_checks.quantization_settings
    if lost_weights(fresh) or settings(fresh) != settings(model) or fresh.dtype != model.dtype:
        raise saving_checks.refusal(model, lost, "and what was loaded again is not the same")
    return fresh


def _save_weights(model: Any, work: Path) -> None:
    with quiet(), exact_state_dict(model), _config_kept(model), _own_conversions(model), _no_offload_warning(model):
        generation = _lenient_generation_config(model)
        try:
            model.save_pretrained(work)
        finally:
            if generation is not None:
                model.generation_config = generation
        if generation is not None:
            generation.to_json_file(work / "generation_config.json", use_diff=True)


@contextlib.contextmanager
def _own_conversions(model: Any) -> Iterator[None]:
    """Only those conversions of names and shapes that can be undone, so that the file has the checkpoint's own names.

    transformers (5.15 to 5.23) keeps the reading of quantized weights among them, which has no way back, and ends in a
    bare NotImplementedError when a model that was loaded quantized is saved.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        yield
        return
    model._weight_conversions = [each for each in conversions if _can_be_undone(each)]
    try:
        yield
    finally:
        model._weight_conversions = conversions


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def _config_kept(model: Any) -> Iterator[None]:
    """Undo what saving writes into the running model's configuration."""
    kept = {name: getattr(model.config, name, None) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


@contextlib.contextmanager
def _no_offload_warning(model: Any) -> Iterator[None]:
    """No warning of memory: transformers warns of every part on the CPU or disk, and reads tensor by tensor."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if not places & {"cpu", "disk"}:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        yield


def _lenient_generation_config(model: Any) -> Any:
    """The generation settings, when transformers would refuse to write them; the model then has plain ones meanwhile.

    Published models have settings that contradict each other (a temperature without sampling), and load with them.
    """
    from transformers import GenerationConfig

    generation = getattr(model, "generation_config", None)
    if generation is None:
        return None
    try:
        generation.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        return generation
    return None


def _copy(source: Path, work: Path) -> None:
    """The files of `source` that make its weights loadable, as they are."""
    paths = sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()})
    require_space(work, sum(path.stat().st_size for path in paths))
    for path in paths:
        shutil.copyfile(path, work / path.name)


def _write_stamp(model: Any, work: Path, source: Path | None, *, is_public: bool) -> None:
    """What the folder was made from, in a small JSON beside it; of this machine's folders only where it stays here."""
    import kani_nb

    earlier = (read_stamp(source) if source is not None else None) or {}
    scheme = saving_checks.scheme_of(model)
    quantizer = getattr(model, "hf_quantizer", None)
    came_from = str(earlier.get("origin") or _source_name(source, is_public=is_public))
    was_quantized = quantizer is not None and quantizer.pre_quantized
    stamp = {
        "origin": came_from if scheme == "none" or was_quantized else f"{came_from}, quantized to {scheme}",
        "scheme": scheme,
        "dtype": str(model.dtype).removeprefix("torch."),
        "saved_by": f"kani_nb {kani_nb.__version__}",
        "saved_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("transformers", "torch", "bitsandbytes")},
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir()) if path.is_file()},
    }
    (work / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _source_name(source: Path | None, *, is_public: bool) -> str:
    if source is None:
        return "a model in memory"
    if source.parent.name == "snapshots" and source.parent.parent.name.startswith("models--"):
        repo = source.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return f"{repo}@{source.name[:7]}"
    return source.name if is_public else str(source)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _folder_of_push() -> Path:
    """Where one push is written: in our cache, since a folder for temporary files may lie in memory."""
    import psutil

    parent = cache_folder() / "pushes"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        process = left.name.lstrip(".").partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return parent / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def _errors(target: Path) -> Iterator[None]:
    """What the libraries raise while writing, in our words; a full disk is told by whoever made the folder."""
    try:
        yield
    except KaniNbError:
        raise
    except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(f"saving into {target}") from None
        if is_disk_full(error):
            raise
        raise EngineError(f"the model could not be saved into {target}", why=short(error)) from error


def _tell(progress: ProgressCallback | None, stage: str, detail: str) -> None:
    if progress is not None:
        progress(LoadProgress(stage, detail))
