"""HuggingEngine: any causal language model that transformers can run, as an engine.

It describes, loads, answers and frees. How a prompt is made, how states are reused and how tokens are drawn stand in
the modules beside this one. Blocking work runs in threads; the event loop only hands over what they emit.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

from kani_nb.config import EngineConfig
from kani_nb.engines.base import (
    BaseEngine,
    EngineMemory,
    LoadProgress,
    ProgressCallback,
    StreamEvent,
)
from kani_nb.engines.worker import Slot, iterate_in_thread, run_in_thread
from kani_nb.errors import ConfigError, GenerationError, KaniNbError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage
from kani_nb.quantization import dtype_name

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.generation import LoadedModel
    from kani_nb.engines.huggingface.loading import LoadRequest
    from kani_nb.engines.huggingface.prefix_cache import PrefixCache
    from kani_nb.engines.huggingface.prompting import AnswerMemory, ChatTemplate

_GIB = 2**30


class HuggingEngine(BaseEngine):
    """A model on the Hugging Face Hub, in a folder, or in a GGUF file, run by transformers in this process.

    Args:
        model_id: an alias (`smollm2`), `org/model`, a folder, or a `.gguf` file.
        max_context_size: tokens of prompt and answer together; None is the model's own window.
        token: for gated repositories; None looks in the environment, the saved login and Colab's Secrets.
        device: `cuda`, `cuda:1`, `mps` or `cpu`; None takes the best there is.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16`, `float16`, or a torch dtype.
        device_map: accelerate's, for models over several devices.
        tokenizer_cls, model_cls: classes to use instead of the automatic ones.
        tokenizer_kwargs, model_load_kwargs: passed on to their `from_pretrained`; never changed.
        chat_template_kwargs: further variables of the chat template.
        revision: branch, tag or commit of a repository.
        local_only: never ask the network.
        trust_remote_code: run Python code that the repository ships.
        allow_pickle: load pickled weights, which can run code too.
        cache_gib: GiB of KV states kept for reuse; None is one full context (at most a quarter of the free memory), 0
        none.
        threads: CPU threads; None chooses for the machine and its load.
        generation: defaults of every answer; `generation_defaults` are laid over them.
        generation_defaults: generation parameters under transformers' names, for example `temperature=0.7`.

    Raises:
        ConfigError: an unknown generation parameter, or a value outside its range.
    """

    def __init__(
        self,
        model_id: str,
        max_context_size: int | None = None,
        *,
        token: str | None = None,
        device: str | None = None,
        dtype: Any = "auto",
        device_map: Any = None,
        tokenizer_cls: Any = None,
        model_cls: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        model_load_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
        local_only: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        cache_gib: float | None = None,
        threads: int | None = None,
        generation: GenerationParams | None = None,
        **generation_defaults: Any,
    ) -> None:
        if device is not None and device_map is not None:
            raise ConfigError(
                f"device={device!r} and device_map={device_map!r} exclude each other", fix="give one of them"
            )
        old_names = {name: generation_defaults.pop(name, None) for name in ("torch_dtype", "use_auth_token")}
        self.model_id = str(model_id)
        self.generation = GenerationParams.from_kwargs(generation_defaults, generation)
        self.slot = Slot()
        self._asked_context = max_context_size
        self._token = token or (old_names["use_auth_token"] if isinstance(old_names["use_auth_token"], str) else None)
        self._device = device
        self._device_map = device_map
        self._dtype = dtype_name(old_names["torch_dtype"] or dtype)
        self._tokenizer_cls = tokenizer_cls
        self._model_cls = model_cls
        self._tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self._model_load_kwargs = dict(model_load_kwargs or {})
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._revision = revision
        self._local_only = local_only
        self._trust_remote_code = trust_remote_code
        self._allow_pickle = allow_pickle
        self._cache_gib = cache_gib
        self._threads = threads
        self._lock = threading.Lock()  # of the lazily made parts below, which several threads may ask for
        self._tokenizer_lock = threading.RLock()
        self._request: LoadRequest | None = None
        self._tokenizer: Any = None
        self._template: ChatTemplate | None = None
        self._memory: AnswerMemory | None = None
        self._loaded: LoadedModel | None = None
        self._cache: PrefixCache | None = None
        self._loading = Slot()
        self._running: tuple[threading.Event, threading.Event] | None = None  # (stop, has ended) of the present answer

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """The engine that a `%load_engine` line describes."""
        device_map: Any = config.device_map
        if device_map is not None and device_map.lstrip().startswith("{"):
            import json

            try:
                device_map = json.loads(device_map)
            except json.JSONDecodeError as error:
                raise ConfigError(f"device_map is {config.device_map!r}", why=f"it is not JSON: {error}") from None
        return cls(
            config.model,
            config.max_context_size,
            device=config.device,
            dtype=config.dtype,
            device_map=device_map,
            revision=config.revision,
            local_only=config.local_only,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
            cache_gib=config.cache_gib,
            threads=config.threads,
            generation=config.generation,
        )

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    @property
    def model(self) -> Any:
        """The transformers model; None before `load`."""
        return self._loaded.model if self._loaded is not None else None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; loaded alone when it is asked for before `load`."""
        return self._need_tokenizer()

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence; empty before they were found."""
        return self._request.origin if self._request is not None else ""

    @property
    def max_context_size(self) -> int:  # type: ignore[override]
        """Tokens of prompt and answer together. Before `load` it reads the model's configuration."""
        if self._loaded is not None:
            return self._loaded.context_tokens
        if self._asked_context is not None:
            return self._asked_context
        from kani_nb.engines.huggingface.loading import context_of, load_config

        request = self._need_request()
        return context_of(load_config(request), None, request.name)

    def memory(self) -> EngineMemory | None:
        """Bytes of the weights and of all KV states; None before `load`."""
        if self._loaded is None or self._cache is None:
            return None
        return EngineMemory(self._loaded.weight_bytes, self._cache.nbytes, self._loaded.device)

    def details(self) -> dict[str, Any]:
        """What was decided when the model was loaded: device, dtype, threads, sizes."""
        if self._loaded is None or self._cache is None:
            return {"model": self.model_id, "loaded": False}
        return {
            "model": self.model_id,
            "loaded": True,
            "origin": self._loaded.origin,
            "device": self._loaded.device,
            "dtype": self._loaded.dtype,
            "threads": self._loaded.threads,
            "context_tokens": self._loaded.context_tokens,
            "chunk_tokens": self._loaded.chunk_tokens,
            "cache_mode": self._loaded.driving.mode.value,
            "weight_bytes": self._loaded.weight_bytes,
            "kv_budget_bytes": self._cache.budget_bytes,
            "max_new_tokens": self.generation.max_new_tokens,
        }

    def __repr__(self) -> str:
        """The model and whether it is loaded; never a module tree or a token."""
        if self._loaded is None:
            return f"{type(self).__name__}({self.model_id!r}, not loaded)"
        return f"{type(self).__name__}({self.model_id!r}, {self._loaded.dtype} on {self._loaded.device})"

    # -- loading and freeing ---------------------------------------------------------------------------------------

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Find the model's files, downloading them if need be, and check what can be checked; no weights are loaded.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        await run_in_thread(lambda cancelled: self._prepare(progress or _ignore, cancelled), name="kani-nb-prepare")

    def _prepare(self, report: ProgressCallback, cancelled: threading.Event) -> None:
        from kani_nb.engines.huggingface.loading import check_device, context_of, load_config

        request = self._need_request(report, cancelled)
        report(LoadProgress("tokenizer", request.name))
        self._need_tokenizer()
        context_of(load_config(request), self._asked_context, request.name)
        check_device(self._device)

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Load the weights. Cancelling returns at once; weights that still arrive are dropped.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, OutOfMemoryError: as their names say.
        """
        await self._loading.acquire()
        try:
            if self._loaded is not None:
                return
            report = progress or _ignore
            await self.prepare(report)
            started = time.monotonic()
            loaded = await run_in_thread(
                lambda cancelled: self._load_weights(report, cancelled), name="kani-nb-load", slot=self.slot
            )
            self._adopt(loaded)
            report(LoadProgress("ready", f"{self!r} in {time.monotonic() - started:.1f} s", 1.0))
        finally:
            self._loading.release()

    def _load_weights(self, report: ProgressCallback, cancelled: threading.Event) -> LoadedModel:
        from kani_nb.engines.huggingface import loading

        request = self._need_request(report, cancelled)
        try:
            tokenizer = self._need_tokenizer()
            with loading.one_at_a_time(request.name, cancelled):
                return loading.load_model(request, tokenizer, self._tokenizer_lock, report, cancelled)
        except KaniNbError as error:
            _forget_frames(error)
            loading.free_memory()
            raise

    def _adopt(self, loaded: LoadedModel) -> None:
        from kani_nb.engines.huggingface.kv_layers import full_context_bytes
        from kani_nb.engines.huggingface.prefix_cache import PrefixCache
        from kani_nb.hardware.devices import free_bytes

        if self._cache_gib is not None:
            budget = int(self._cache_gib * _GIB)
        else:
            budget = min(full_context_bytes(loaded.model, loaded.context_tokens), free_bytes(loaded.device) // 4)
        self._cache = PrefixCache(loaded.model.config, budget)
        self._loaded = loaded

    async def close(self) -> None:
        """Free the weights and all states. The present answer ends at its next token, and those that wait fail."""
        if self._loaded is None:
            return
        self._loaded = None
        self._cache = None
        if (running := self._running) is not None:
            stop, has_ended = running
            stop.set()
            await asyncio.to_thread(has_ended.wait)
        from kani_nb.engines.huggingface.loading import free_memory

        await asyncio.to_thread(free_memory)

    def _need_request(
        self, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None
    ) -> LoadRequest:
        with self._lock:
            if self._request is None:
                from kani_nb.engines import sources
                from kani_nb.engines.huggingface.loading import LoadRequest

                source = sources.resolve(
                    self.model_id,
                    revision=self._revision,
                    local_only=self._local_only,
                    allow_pickle=self._allow_pickle,
                    token=self._token,
                    progress=progress,
                    cancelled=cancelled,
                )
                self._request = LoadRequest(
                    folder=source.folder,
                    gguf_file=source.gguf_file,
                    origin=source.origin,
                    name=self.model_id,
                    dtype=self._dtype,
                    device=self._device,
                    device_map=self._device_map,
                    max_context_size=self._asked_context,
                    threads=self._threads,
                    trust_remote_code=self._trust_remote_code,
                    allow_pickle=self._allow_pickle,
                    tokenizer_cls=self._tokenizer_cls,
                    model_cls=self._model_cls,
                    tokenizer_kwargs=self._tokenizer_kwargs,
                    model_load_kwargs=self._model_load_kwargs,
                )
            return self._request

    def _need_tokenizer(self) -> Any:
        request = self._need_request()
        with self._lock:
            if self._tokenizer is None:
                from kani_nb.engines.huggingface.loading import load_tokenizer
                from kani_nb.engines.huggingface.prompting import AnswerMemory, ChatTemplate

                tokenizer = load_tokenizer(request)
                self._template = ChatTemplate(tokenizer, request.name, self._template_kwargs)
                self._memory = AnswerMemory(tokenizer)
                self._tokenizer = tokenizer
            return self._tokenizer

    # -- prompts ---------------------------------------------------------------------------------------------------

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> Any:
        """The prompt as token ids, by the model's chat template. A subclass may return text, ids or a tensor instead.

        Raises:
            PromptError: the template refuses these messages, or there is none.
        """
        self._need_tokenizer()
        assert self._template is not None
        return self._template.encode(messages, functions)

    def prompt_ids(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The token ids that the model is given, its earlier answers in the very tokens it generated."""
        from kani_nb.engines.huggingface.prompting import call_build_prompt, ids_of

        tokenizer = self._need_tokenizer()
        assert self._memory is not None
        with self._tokenizer_lock:
            ids = ids_of(call_build_prompt(self.build_prompt, messages, functions), tokenizer)
            return self._memory.restore(ids)

    def prompt_len(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any) -> int:
        """Exactly the tokens of the prompt that `stream` would compute for `messages`."""
        return len(self.prompt_ids(messages, functions))

    # -- answering -------------------------------------------------------------------------------------------------

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer, a token at a time. Closing the iterator stops after the current token or chunk of the prompt.

        Raises:
            ConfigError: an unknown generation parameter.
            PromptError: the prompt cannot be made; `PromptTooLongError` when it does not fit.
            GenerationError, OutOfMemoryError: it failed on the way.
        """
        params = GenerationParams.from_kwargs(hyperparams, self.generation)
        if self._loaded is None:
            await self.load()
        asked = time.monotonic()

        def work(emit: Callable[[StreamEvent], None], stop: threading.Event) -> None:
            self._generate(list(messages), functions, params, emit, stop, time.monotonic() - asked)

        async with aclosing(iterate_in_thread(work, self.slot)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def _parts(self) -> tuple[LoadedModel, PrefixCache, AnswerMemory]:
        if self._loaded is None or self._cache is None or self._memory is None:
            raise GenerationError(f"{self.model_id} was unloaded meanwhile", fix=f"%load_engine {self.model_id}")
        return self._loaded, self._cache, self._memory

    def _generate(
        self,
        messages: list[ChatMessage],
        functions: Sequence[Any] | None,
        params: GenerationParams,
        emit: Callable[[StreamEvent], None],
        stop: threading.Event,
        queued_s: float,
    ) -> None:
        """One answer, in the thread that holds the slot."""
        from kani_nb.engines.huggingface import loading
        from kani_nb.engines.huggingface.generation import Generation

        has_ended = threading.Event()
        self._running = (stop, has_ended)
        cache = self._cache
        try:
            loaded, cache, memory = self._parts()
            if loaded.threads is not None:
                import torch

                torch.set_num_threads(loaded.threads)  # a thread's own setting
            ids = self.prompt_ids(messages, functions)
            Generation(loaded, ids, params, cache, memory, stop).run(emit, queued_s)
        except KaniNbError:
            raise
        except Exception as error:
            _forget_frames(error)
            if cache is not None and loading.is_out_of_memory(error):
                cache.clear()
                raise loading.out_of_memory(f"{self.model_id} was answering") from None
            raise GenerationError(f"{self.model_id} failed while answering", why=loading.short(error)) from error
        finally:
            self._running = None
            has_ended.set()


def _forget_frames(error: BaseException) -> None:
    """Let go of the tensors that a traceback's frames still hold; the lines stay."""
    if error.__traceback__ is not None and sys.exc_info()[1] is not None:
        traceback.clear_frames(error.__traceback__)
    for earlier in (error.__cause__, error.__context__):
        if earlier is not None:
            _forget_frames(earlier)


def _ignore(progress: LoadProgress) -> None:
    """Progress that nobody asked for."""
