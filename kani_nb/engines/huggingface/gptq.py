"""Quantizing a model with GPTQ, into a folder that loads again without any argument.

gptqmodel does it, through optimum, in a process of its own: it changes transformers while it is imported, writes to
the terminal, and leaves the memory of two models behind. That process can be ended at any moment, and then nothing
stays. What it writes is checked like an old checkpoint is (`gptq_folder`): left to itself, gptqmodel packs the weights
for the CPU that it runs on before they are saved, and such files load nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.gptq_checkpoint import check_settings
from kani_nb.engines.gptq_folder import GptqFolder, read_config
from kani_nb.engines.staging import check_empty, staged_folder
from kani_nb.engines.wheel_process import parse_record, remaining, running
from kani_nb.errors import (
    ConfigError,
    EngineError,
    KaniNbError,
    MissingDependencyError,
    ModelFilesError,
    ModelUnavailableError,
    OutOfMemoryError,
)
from kani_nb.hardware.gptq_check import needs_of

#: What a failure in that process is here, by the kind that it tells.
_ERRORS: dict[str, type[KaniNbError]] = {
    "files": ModelFilesError,
    "settings": ConfigError,
    "memory": OutOfMemoryError,
    "library": MissingDependencyError,
}


def quantize_gptq(
    folder: Path | str,
    out_folder: Path | str,
    *,
    texts: Sequence[str] | None = None,
    group_size: int = 128,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> GptqFolder:
    """A folder with the model of `folder` in 4 bits, fitted to `texts`. Takes minutes; blocks.

    Args:
        folder: a model that is not quantized, with its tokenizer.
        out_folder: a new or empty folder; it appears whole or not at all.
        texts: what the weights are fitted to; text of the kind that the model will see. By default the short passages
            of `hardware.calibration`.
        group_size: input weights that share a scale. One that does not divide the inputs of every layer is fitted as
            it is, and written as smaller groups; a smaller one would then be better in the same bytes.
        progress: called on this thread.
        cancelled: setting it ends the quantization within about a tenth of a second.

    Raises:
        MissingDependencyError: gptqmodel or optimum is missing, or torch too old for them.
        ConfigError: the model is quantized already, or a value cannot be used.
        ModelFilesError: the model cannot be loaded, or no tensor of it can be quantized.
        ModelUnavailableError: it was cancelled.
        OutOfMemoryError: as it says.
        EngineError: the disk is full, or quantizing failed.
    """
    if (lacking := needs_of("gptq")) is not None:
        raise lacking
    source, out = Path(folder).expanduser().absolute(), Path(out_folder).expanduser().absolute()
    check_settings(group_size)
    wanted = _checked_texts(texts)
    check_empty(out)
    read_config(source)
    with staged_folder(out) as work:
        job = {"folder": str(source), "work": str(work), "group_size": group_size, "texts": wanted}
        record = _run(job, source.name, progress or _nothing, cancelled or threading.Event())
    return GptqFolder(folder=out, **record)


def _nothing(_step: LoadProgress) -> None:
    pass


def _checked_texts(texts: Sequence[str] | None) -> list[str]:
    from kani_nb.hardware.calibration import CALIBRATION_TEXTS

    if texts is None:
        return list(CALIBRATION_TEXTS)
    given: Any = texts
    if isinstance(given, str) or not given or not all(isinstance(each, str) and each.strip() for each in given):
        raise ConfigError(f"texts is {given!r:.80}", why="it must be a list of texts, none of them empty")
    return list(given)


def _run(job: dict[str, Any], name: str, progress: ProgressCallback, cancelled: threading.Event) -> dict[str, Any]:
    """Start the process, show what it tells, and return its last word."""
    command = [sys.executable, "-m", "kani_nb.engines.huggingface.gptq_process"]
    stage, fraction, said = "starting gptqmodel", 0.0, ""
    failure: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    started = told = time.monotonic()
    progress(LoadProgress("quantizing", stage, fraction))
    with running(command, _environment()) as (process, lines):
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, and its exit is told below
            process.stdin.write(f"{json.dumps(job)}\n")
            process.stdin.flush()
        for line in _each(process, lines):
            if cancelled.is_set():
                raise ModelUnavailableError(f"quantizing {name} was interrupted", why="nothing of it was kept")
            record: dict[str, Any] = dict(parse_record(line))
            if "stage" in record:
                stage, fraction = record["stage"], record["fraction"]
            elif "error" in record:
                failure = record
            elif "written" in record:
                result = record["written"]
            elif line.strip():
                said = line.strip()
            if "stage" in record or time.monotonic() - told > 1:
                told = time.monotonic()
                progress(LoadProgress("quantizing", f"{stage}, {told - started:.0f} s so far", fraction))
    if result is not None and process.returncode == 0:
        return result
    raise _error(name, failure, f"exit status {process.returncode}: {said}")


def _each(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> Iterator[str]:
    """Every line as it comes, the last ones too, and an empty one ten times a second meanwhile."""
    while process.poll() is None:
        try:
            yield lines.get(timeout=0.1)
        except queue.Empty:
            yield ""
    yield from remaining(lines)


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
        # gptqmodel 7.7 starts two threads for its loader, and refuses on a machine with two cores or fewer.
        "GPTQMODEL_CPU_WORKERS": str(max(2, (os.cpu_count() or 1) // 2)),
    }


def _error(name: str, failure: dict[str, Any] | None, ended: str) -> KaniNbError | OSError:
    if failure is None:
        return EngineError(f"quantizing {name} ended before it was done", why=ended, fix="close what holds memory")
    if failure["kind"] == "disk":
        return OSError(errno.ENOSPC, failure["error"])  # said in our words where the folder is staged
    kind = _ERRORS.get(failure["kind"], EngineError)
    return kind(
        failure.get("what") or f"{name} could not be quantized", why=failure["error"], fix=failure.get("fix", "")
    )
