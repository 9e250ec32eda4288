"""A model and its context in llama.cpp's memory: loading, computing tokens, going back, freeing.

Blocking, and for one thread at a time: the one that holds the engine's slot. Which tokens are computed, and what is
chosen from their logits, is decided elsewhere.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.llamacpp.library import Said, library, listening
from kani_nb.engines.llamacpp.settings import context_params, model_params
from kani_nb.engines.llamacpp.vocabulary import unreadable
from kani_nb.errors import EngineError, GenerationError, ModelFilesError, ModelUnavailableError, OutOfMemoryError

_ABORTED = 2
_BUFFERS = re.compile(r"\b(?:KV|RS) buffer size\s*=\s*([0-9.]+) MiB")
_MIB = 2**20


class NativeModel:
    """A loaded model with one sequence of states.

    Attributes:
        ids: the tokens whose states llama.cpp holds, in order.
        chunks: `(start, end)` of each piece of prompt among them that was computed at once.
        weight_bytes: of the tensors.
        kv_bytes: what llama.cpp reserved for the states of a full context.
    """

    def __init__(self, llama: Any, model: Any, context: Any, said: str) -> None:
        self._llama, self._model, self._context = llama, model, context
        self._memory = llama.llama_get_memory(context)
        self._window: int = llama.llama_model_n_swa(model)
        # Not at exit: a thread may still compute then.
        self._free = weakref.finalize(self, _free, llama, model, context)
        self._free.atexit = False
        self.ids: list[int] = []
        self.chunks: list[tuple[int, int]] = []
        self.weight_bytes = int(llama.llama_model_size(model))
        self.kv_bytes = _kv_bytes(llama, model, context, said)
        self.parameters = int(llama.llama_model_n_params(model))
        self.threads = int(llama.llama_n_threads(context))
        self.chunk_tokens = int(llama.llama_n_batch(context))
        self.can_go_back = not (llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model))
        #: `cpu`, or the first GPU where layers were put on one.
        self.device = _device(said)
        description = ctypes.create_string_buffer(256)
        llama.llama_model_desc(model, description, 256)
        self.description = description.value.decode("utf-8", "replace")

    @property
    def context(self) -> Any:
        """llama.cpp's context, for samplers.

        Raises:
            GenerationError: it was closed.
        """
        if not self._free.alive:
            raise GenerationError("the model was closed meanwhile", fix="ask again")
        return self._context

    @property
    def vocabulary_size(self) -> int:
        """Logits per token."""
        return int(self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model)))

    def logits(self) -> Any:
        """`(V,) float32` after the last token computed, as a pointer that may be written to."""
        return self._llama.llama_get_logits_ith(self.context, -1)

    def compute(self, tokens: Sequence[int]) -> bool:
        """Compute `tokens` after those held; False if `stoppable` was told to stop, and then they are not held.

        Raises:
            GenerationError: llama.cpp failed; the states are gone, and the model still works.
        """
        start = len(self.ids)
        array = (self._llama.llama_token * len(tokens))(*tokens)
        with listening() as said:
            status = self._llama.llama_decode(self.context, self._llama.llama_batch_get_one(array, len(tokens)))
        if status == 0:
            self.ids.extend(tokens)
            return True
        if status != _ABORTED or not self._cut(start):
            self.clear()
        if status == _ABORTED:
            return False
        raise GenerationError("llama.cpp failed to compute", why=said.reason or f"llama_decode gave {status}")

    def go_back(self, length: int) -> None:
        """Forget all but the first `length` tokens; all of them where their states cannot be separated any more."""
        if length >= len(self.ids):
            return
        if length <= 0 or not self.can_go_back or not self._cut(length) or not self._reaches_back(length):
            self.clear()
            return
        del self.ids[length:]
        self.chunks = [(start, min(end, length)) for start, end in self.chunks if start < length]

    def clear(self) -> None:
        """Forget every token."""
        self._llama.llama_memory_clear(self._memory, True)
        self.ids.clear()
        self.chunks.clear()

    def _cut(self, length: int) -> bool:
        return bool(self._llama.llama_memory_seq_rm(self._memory, 0, length, -1))

    def _reaches_back(self, length: int) -> bool:
        """Whether a sliding window that ends at `length` is whole: its beginning may have been overwritten."""
        first = int(self._llama.llama_memory_seq_pos_min(self._memory, 0))
        return self._window <= 0 or 0 <= first <= max(0, length - self._window)

    @contextmanager
    def stoppable(self, stop: threading.Event) -> Iterator[None]:
        """While it lasts, setting `stop` ends a computation within the present operation of a layer.

        llama.cpp asks after every operation. It asks the C library, whether the text that a byte begins is empty:
        a callback in Python would make the computation wait for whatever else runs in this process.
        """
        flag = ctypes.create_string_buffer(2)
        has_ended = False

        def watch() -> None:
            stop.wait()
            if not has_ended:
                flag[0] = b"!"

        ask = self._llama.ggml_abort_callback
        strlen = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).strlen
        self._llama.llama_set_abort_callback(self.context, ctypes.cast(strlen, ask), flag)
        watcher = threading.Thread(target=watch, name="kani-nb-stop", daemon=True)
        watcher.start()  # whoever runs a generation sets `stop` in the end, so that this thread ends too
        try:
            yield
        finally:
            has_ended = True
            if self._free.alive:
                self._llama.llama_set_abort_callback(self._context, ask(), None)

    def close(self) -> None:
        """Free it."""
        self.ids.clear()
        self._free()


def _kv_bytes(llama: Any, model: Any, context: Any, said: str) -> int:
    """Bytes of the states of a full context, as llama.cpp tells them: in MiB with two digits.

    Where every layer keeps every token, the model's shape gives the same to the byte.
    """
    buffers = [float(size) * _MIB for size in _BUFFERS.findall(said)]
    heads = max(1, llama.llama_model_n_head(model))
    width = llama.llama_model_n_embd(model) // heads * llama.llama_model_n_head_kv(model)
    exact = int(llama.llama_n_ctx(context) * llama.llama_model_n_layer(model) * 2 * width * 2)
    if not buffers or abs(sum(buffers) - exact) <= 0.01 * _MIB * len(buffers):
        return exact
    return int(sum(buffers))


def _device(said: str) -> str:
    offloaded = re.search(r"offloaded (\d+)/\d+ layers to GPU", said)
    if offloaded is None or offloaded[1] == "0":
        return "cpu"
    return "mps" if sys.platform == "darwin" else "cuda:0"


def _free(llama: Any, model: Any, context: Any) -> None:
    with listening():
        llama.llama_free(context)
        llama.llama_model_free(model)


def load_native(
    path: Path,
    *,
    settings: Mapping[str, Any],
    context_tokens: int,
    threads: int,
    use_gpu: bool,
    report: ProgressCallback,
    cancelled: threading.Event,
) -> NativeModel:
    """The model at `path` (the first shard where there are several), ready to compute. Blocks.

    Raises:
        ModelFilesError: llama.cpp cannot load it, with its reason; or it is no model that continues text.
        ModelUnavailableError: `cancelled` was set.
        OutOfMemoryError: it could not reserve the states' memory.
    """
    llama = library()
    params = model_params(llama, settings, use_gpu=use_gpu and bool(llama.llama_supports_gpu_offload()))
    told = 0.0

    def proceed(fraction: float, _: Any) -> bool:
        nonlocal told
        if time.monotonic() - told > 0.1:
            told = time.monotonic()
            report(LoadProgress("weights", path.name, float(fraction)))
        return not cancelled.is_set()

    params.progress_callback = callback = llama.llama_progress_callback(proceed)
    with listening() as said:
        model = llama.llama_model_load_from_file(str(path).encode(), params)
        del callback
        if cancelled.is_set():
            if model:
                llama.llama_model_free(model)
            raise ModelUnavailableError(f"loading {path.name} was interrupted", fix="load it again")
        if not model:
            raise _why_not(path, said)
        context = None
        try:
            _check_kind(llama, model, path)
            chunk = chunk_tokens(int(llama.llama_model_n_params(model)), threads)
            wanted = context_params(
                llama,
                {"n_threads": threads, "n_threads_batch": threads, **settings},
                context_tokens=context_tokens,
                chunk_tokens=min(chunk, context_tokens),
            )
            context = llama.llama_init_from_model(model, wanted)
            _check_context(llama, context, path, said)
        except BaseException:
            if context:
                llama.llama_free(context)
            llama.llama_model_free(model)
            raise
    return NativeModel(llama, model, context, said.text)


def chunk_tokens(parameters: int, threads: int) -> int:
    """Tokens of a prompt that are computed at once: the power of two that takes about 0.2 s on a CPU.

    Of 46 GFLOP/s per thread, measured with 4-bit weights on a server CPU of 2024. Depends on nothing else, so that
    the same prompt is always computed in the same shapes.
    """
    tokens = 0.2 * 46e9 * threads / (2 * max(1, parameters))
    return int(max(8, min(512, 2 ** (max(1, int(tokens)).bit_length() - 1))))


def _check_kind(llama: Any, model: Any, path: Path) -> None:
    if llama.llama_model_has_encoder(model) or not llama.llama_model_has_decoder(model):
        raise ModelFilesError(
            f"{path.name} is no model that continues a text",
            why="it has an encoder (as T5 and models of embeddings have)",
            fix="HuggingEngine runs T5: %load_engine org/model",
        )
    if llama.llama_model_is_diffusion(model):
        raise ModelFilesError(f"{path.name} is a diffusion model", why="it does not write from left to right")


def _check_context(llama: Any, context: Any, path: Path, said: Said) -> None:
    if not context:
        raise _why_not(path, said)
    if not llama.llama_get_memory(context):
        raise ModelFilesError(f"{path.name} is no model that continues a text", why="it makes embeddings (as BERT)")


def _why_not(path: Path, said: Said) -> EngineError:
    reason = said.reason
    if "alloc" in reason or "memory" in reason:
        return OutOfMemoryError(
            f"the memory does not suffice for {path.name}", why=reason, fix="ask for less: --max-context-size 2048"
        )
    return unreadable(path, reason)
