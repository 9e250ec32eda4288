"""LlamaCppEngine: any GGUF file that llama.cpp can run, as an engine.

It describes, loads, answers and frees. Which file it is, how a prompt is made, what llama.cpp is told and how tokens
are drawn stand in the modules beside this one. Blocking work runs in threads; the event loop only hands over what they
emit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Self

from kani_nb.config import EngineConfig, check_limits
from kani_nb.engines.base import BaseEngine, EngineMemory, EngineNotice, LoadProgress, ProgressCallback, StreamEvent
from kani_nb.engines.huggingface.library_errors import free_memory
from kani_nb.engines.huggingface.prompting import call_build_prompt
from kani_nb.engines.kinds import Ability, EngineKind
from kani_nb.engines.llamacpp.files import GgufRequest, parse_model
from kani_nb.engines.llamacpp.fitting import check_fits, context_of
from kani_nb.engines.llamacpp.generation import Generation
from kani_nb.engines.llamacpp.guard import encode_prompt
from kani_nb.engines.llamacpp.library import listening
from kani_nb.engines.llamacpp.native import NativeModel, load_native
from kani_nb.engines.llamacpp.pipeline import Pipeline
from kani_nb.engines.llamacpp.prepared import Prepared
from kani_nb.engines.llamacpp.reading import reader_for
from kani_nb.engines.llamacpp.settings import check_settings
from kani_nb.engines.worker import Slot, iterate_in_thread, run_in_thread
from kani_nb.errors import ConfigError, GenerationError, ModelUnavailableError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

#: Options of `%load_engine` that are about how transformers places or quantizes weights.
_TRANSFORMERS_ONLY = ("device_map", "max_memory", "allow_offload", "offload_folder", "cache_quantized")


class LlamaCppEngine(BaseEngine):
    """A GGUF file, run by llama.cpp in this process (`pip install llama-cpp-python`).

    Args:
        repo_id: a repository of the Hub; exactly one of this and `model_path` is given. Alone it may be whatever
            `%load_engine` takes: a file, an alias, `org/model:FILE.gguf`.
        filename: the file in it, or a pattern such as `*Q4_K_M*`; None takes the only one.
        model_path: a file on this disk. Of a model in shards any one stands for all.
        max_context_size: tokens of prompt and answer together; 0 is the model's own window.
        prompt_pipeline: makes the prompt's text of `(messages, functions)`; None takes the file's chat template.
        model_load_kwargs: settings under the names that llama-cpp-python's `Llama` has for them.
        generation: defaults of every answer.
        chat_template_kwargs: further variables of the chat template.
        token, revision, local_only: of the repository, as for `HuggingEngine`.
        device: `cpu` keeps the layers off a GPU; None takes one where llama.cpp was built for it.
        threads: CPU threads; None chooses for the machine and its load.
        cache_gib: 0 computes every prompt anew; anything else reuses what the prompt before left.
        hyperparams: generation parameters under transformers' names, laid over `generation`.

    Raises:
        ConfigError: both or neither of a repository and a path, an unknown parameter, or a value outside its range.
    """

    kind = EngineKind(
        runs="GGUF files",
        example="%load_engine model.gguf",
        install="pip install 'kani-nb[llamacpp]'",
        can=(
            Ability.TOOLS,
            Ability.REASONING,
            Ability.SCHEMAS,
            Ability.LOGPROBS,
            Ability.REUSE,
        ),
        tested="tiny Llama, Gemma 3 and Mamba files; SmolLM2-135M in Q4_1",
    )

    holds_to_schemas = True

    def __init__(
        self,
        repo_id: str | None = None,
        filename: str | None = None,
        model_path: str | None = None,
        max_context_size: int = 0,
        prompt_pipeline: Pipeline | None = None,
        *,
        model_load_kwargs: dict[str, Any] | None = None,
        generation: GenerationParams | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        token: str | None = None,
        revision: str | None = None,
        local_only: bool = False,
        device: str | None = None,
        threads: int | None = None,
        cache_gib: float | None = None,
        _alias: str | None = None,
        **hyperparams: Any,
    ) -> None:
        if repo_id is not None and filename is None and model_path is None and _alias is None:
            named_so = parse_model(repo_id)  # as a line names it: a file, an alias, org/model:FILE.gguf
            repo_id, filename = named_so.get("repo"), named_so.get("filename")
            model_path, _alias = named_so.get("path"), named_so.get("alias")
        settings = dict(model_load_kwargs or {})
        asked = max_context_size or settings.pop("n_ctx", 0) or None
        check_limits(max_context_size=asked, threads=threads, cache_gib=cache_gib)
        check_settings(settings)
        named = [each for each in (repo_id, model_path, _alias) if each is not None]
        if len(named) != 1 or (filename is not None and repo_id is None):
            raise ConfigError(
                "LlamaCppEngine needs a file",
                why=f"{len(named)} were named; it takes either repo_id (with filename), or model_path",
                fix='LlamaCppEngine(model_path="model.gguf"), or LlamaCppEngine("org/model", "*Q4_K_M.gguf")',
            )
        if "repeat_penalty" in hyperparams:  # llama.cpp's own name for it
            hyperparams["repetition_penalty"] = hyperparams.pop("repeat_penalty")
        self.generation = GenerationParams.from_kwargs(hyperparams, generation)
        self.slot = Slot()
        request = GgufRequest(
            path=None if model_path is None else str(model_path),
            alias=_alias,
            repo=repo_id,
            filename=filename,
            revision=revision,
            token=token,
            local_only=local_only,
        )
        self._name = request.name
        self._prepared = Prepared(request, prompt_pipeline, chat_template_kwargs)
        self._settings = settings
        self._asked_context = asked
        self._use_gpu = device != "cpu"
        self._threads = threads
        self._reuses = cache_gib is None or cache_gib > 0
        self._native: NativeModel | None = None
        self._context_tokens = 0
        self._loading = Slot()
        self._times_closed = 0
        self._running: tuple[threading.Event, threading.Event] | None = None  # (stop, has ended) of the present answer

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """The engine that a `%load_engine` line describes.

        Raises:
            ConfigError: an option that only transformers can follow.
        """
        fields = parse_model(config.model)
        refused = [name for name in _TRANSFORMERS_ONLY if getattr(config, name)]
        if config.quantization.scheme != "none":
            refused.append("quant")
        if config.dtype != "auto":
            refused.append("dtype")
        if refused:
            option = f"--{refused[0].replace('_', '-')}"
            raise ConfigError(
                f"{option} was given for {config.model}",
                why="llama.cpp runs a GGUF file in the precision that it was written in, and places it itself",
                fix=f"leave it out, or use transformers: %load_engine hf:{fields.get('path', 'FILE.gguf')}",
            )
        return cls(
            fields.get("repo"),
            fields.get("filename"),
            fields.get("path"),
            config.max_context_size or 0,
            generation=config.generation,
            revision=config.revision,
            local_only=config.local_only,
            device=config.device,
            threads=config.threads,
            cache_gib=config.cache_gib,
            _alias=fields.get("alias"),
        )

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._native is not None

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence; empty before they were found."""
        return self._prepared.origin

    @property
    def max_context_size(self) -> int:  # type: ignore[override]
        """Tokens of prompt and answer together. Before `load` it reads the file's header."""
        if self._native is not None:
            return self._context_tokens
        return self._asked_context or self._context_size()

    def _context_size(self) -> int:
        return context_of(self._prepared.files(), self._asked_context, self._settings)

    def memory(self) -> EngineMemory | None:
        """Bytes of the weights, and of the states of a full context, which llama.cpp reserves; None before `load`."""
        native = self._native
        return EngineMemory(native.weight_bytes, native.kv_bytes, native.device) if native is not None else None

    def details(self) -> dict[str, Any]:
        """What was decided when the model was loaded: threads, sizes, chunks."""
        native = self._native
        if native is None:
            return {"model": self._name, "loaded": False}
        return {
            "model": self._name,
            "loaded": True,
            "origin": self.origin,
            "description": native.description,
            "device": native.device,
            "threads": native.threads,
            "parameters": native.parameters,
            "context_tokens": self._context_tokens,
            "chunk_tokens": native.chunk_tokens,
            "reuses_states": self._reuses,
            "weight_bytes": native.weight_bytes,
            "kv_bytes": native.kv_bytes,
            "max_new_tokens": self.generation.max_new_tokens,
        }

    def __repr__(self) -> str:
        """The model and whether it is loaded."""
        native = self._native
        return f"{type(self).__name__}({self._name!r}, {native.description if native is not None else 'not loaded'})"

    # -- loading and freeing ---------------------------------------------------------------------------------------

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Find the file, downloading it if need be, and check what can be checked; no weights are loaded.

        Raises:
            MissingDependencyError: llama-cpp-python is not installed.
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """

        def check(cancelled: threading.Event) -> None:
            self._prepared.check(progress, cancelled)
            self._context_size()

        await run_in_thread(check, name="kani-nb-prepare")

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Load the weights. Cancelling returns at once; llama.cpp then stops at the next tensor.

        Raises:
            MissingDependencyError: llama-cpp-python is not installed.
            UnknownModelError, ModelUnavailableError, ModelFilesError, DoesNotFitError, OutOfMemoryError: as they say.
        """
        await self._loading.acquire()
        try:
            if self._native is not None:
                return
            report = progress or (lambda _: None)
            closed_before = self._times_closed
            await self.prepare(report)
            started = time.monotonic()
            native = await run_in_thread(
                lambda cancelled: self._load_weights(report, cancelled),
                name="kani-nb-load",
                slot=self.slot,
                discard=NativeModel.close,
            )
            if self._times_closed != closed_before:
                native.close()
                raise ModelUnavailableError(f"{self._name} was closed while it was loaded", fix="load it again")
            self._native = native
            report(LoadProgress("ready", f"{self!r} in {time.monotonic() - started:.1f} s", 1.0))
        finally:
            self._loading.release()

    def _load_weights(self, report: ProgressCallback, cancelled: threading.Event) -> NativeModel:
        from kani_nb.hardware.devices import choose_threads

        files = self._prepared.files()
        context_tokens = self._context_size()
        if not self._use_gpu or not self._settings.get("n_gpu_layers"):
            check_fits(files, context_tokens, self._asked_context is not None)
        native = load_native(
            files.path,
            settings=self._settings,
            context_tokens=context_tokens,
            threads=choose_threads(self._threads).threads,
            use_gpu=self._use_gpu,
            report=report,
            cancelled=cancelled,
        )
        self._context_tokens = context_tokens
        return native

    async def close(self) -> None:
        """Free the weights and all states. The present answer ends at its next token, and those that wait fail."""
        self._times_closed += 1  # a load that is under way is dropped when it ends
        native, self._native = self._native, None
        if (running := self._running) is not None:
            stop, has_ended = running
            stop.set()
            await asyncio.to_thread(has_ended.wait)
        await asyncio.to_thread(self._free, native)

    def _free(self, native: NativeModel | None) -> None:
        self._prepared.close()
        if native is not None:
            native.close()
            free_memory()  # else the C library keeps tens of MiB of each load

    # -- prompts ---------------------------------------------------------------------------------------------------

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> Any:
        """The prompt as token ids, by the pipeline or the file's chat template. A subclass may return text instead.

        Raises:
            PromptError: the template refuses these messages, or there is none.
        """
        return self._prepared.prompt().encode(messages, functions)

    def prompt_ids(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The token ids that the model is given, its earlier answers in the very tokens it generated."""
        ids = encode_prompt(call_build_prompt(self.build_prompt, messages, functions), self._prepared.vocabulary())
        return self._prepared.memory().restore(ids)

    def prompt_len(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any) -> int:
        """Exactly the tokens of the prompt that `stream` would compute for `messages`."""
        return len(self.prompt_ids(messages, functions))

    # -- answering -------------------------------------------------------------------------------------------------

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer, a token at a time. Closing the iterator stops within a token or a layer of the prompt.

        Raises:
            ConfigError: an unknown generation parameter.
            PromptError: the prompt cannot be made; `PromptTooLongError` when it does not fit.
            GenerationError: it failed on the way.
        """
        params = GenerationParams.from_kwargs(hyperparams, self.generation)
        if self._native is None:
            await self.load()
        asked = time.monotonic()

        def work(emit: Callable[[StreamEvent], None], stop: threading.Event) -> None:
            self._generate(list(messages), functions, params, emit, stop, time.monotonic() - asked)

        async with aclosing(iterate_in_thread(work, self.slot)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

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
        with self._in_use(stop) as native:
            vocabulary, prompt = self._prepared.vocabulary(), self._prepared.prompt()
            ids = self.prompt_ids(messages, functions)
            if functions and prompt.ignores_tools:
                emit(EngineNotice(f"the prompt format of {self._name} ignores tools: they are described in words"))
            generation = Generation(
                native,
                vocabulary,
                ids,
                params,
                read_by=reader_for(prompt.source, vocabulary, ids, functions),
                constraint=self._prepared.constraint(params.json_schema, params.eos_token_id),
                metadata=self._prepared.files().header.metadata,
                context_tokens=self._context_tokens,
                reuses=self._reuses,
                memory=self._prepared.memory(),
                stop=stop,
            )
            generation.run(emit, queued_s)

    @contextmanager
    def _in_use(self, stop: threading.Event) -> Iterator[NativeModel]:
        """While the model computes, in the thread that holds the slot: `close` waits for the end."""
        has_ended = threading.Event()
        self._running = (stop, has_ended)
        try:
            native = self._native
            if native is None:
                raise GenerationError(f"{self._name} was unloaded meanwhile", fix=f"%load_engine {self._name}")
            with listening():
                yield native
        finally:
            self._running = None
            has_ended.set()
