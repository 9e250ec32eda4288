"""HuggingEngine: any causal language model that transformers can run, as an engine.

It describes, loads, answers and frees. How a prompt is made, how states are reused and how tokens are drawn stand in
the modules beside this one. Blocking work runs in threads; the event loop only hands over what they emit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kani_nb._frames import release_frames
from kani_nb.config import EngineConfig, check_limits
from kani_nb.engines.base import (
    EngineMemory,
    EngineNotice,
    LoadProgress,
    ProgressCallback,
    StreamEvent,
)
from kani_nb.engines.huggingface.arguments import (
    KNOWN_NAMES,
    LoadRequest,
    device_map_of,
    read_arguments,
    split_arguments,
    split_media,
)
from kani_nb.engines.huggingface.keeping import KeepsWeights
from kani_nb.engines.huggingface.prepared import Prepared
from kani_nb.engines.kinds import Ability, EngineKind
from kani_nb.engines.worker import Slot, iterate_in_thread, run_in_thread
from kani_nb.errors import ConfigError, GenerationError, KaniNbError, ModelUnavailableError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage
from kani_nb.quantization import dtype_name

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.generation import LoadedModel
    from kani_nb.engines.huggingface.model_inputs import ModelInputs
    from kani_nb.engines.huggingface.pipeline_prompt import Pipeline
    from kani_nb.engines.huggingface.prefix_cache import PrefixCache
    from kani_nb.engines.huggingface.prompting import AnswerMemory
    from kani_nb.engines.huggingface.weights import Weights

#: Fields of a configuration that are not passed on under their own name and as they are.
_CHANGED = ("model", "max_context_size", "device_map")

T = TypeVar("T")


class HuggingEngine(KeepsWeights):
    """A model on the Hugging Face Hub, in a folder, or in a GGUF file, run by transformers in this process.

    Args:
        model_id: an alias (`smollm2`), `org/model`, a folder, or a `.gguf` file.
        max_context_size: tokens of prompt and answer together; None is the model's own window.
        prompt_pipeline: makes prompts instead of the chat template: a `PromptPipeline`, or any function of messages and
            functions that gives text.
        token: for gated repositories; None looks in the environment, the saved login and Colab's Secrets.
        device: `cuda`, `cuda:1`, `mps` or `cpu`; None takes the best there is.
        quantization: the name of a scheme (`nf4`, `int8`, `cpu-int8`, ...), a `Quantization`, a `BitsAndBytesConfig` or
            a dict of its arguments. A checkpoint that is quantized already is loaded as it is.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16`, `float16`, or a torch dtype.
        device_map: `auto`, `balanced`, `sequential`, a device, or a dict from modules to devices.
        max_memory: most of each device: a dict as accelerate takes it, or `0=10GiB,cpu=30GiB`.
        allow_offload: let what does not fit run from main memory or the disk; without it, it is refused before loading.
        offload_folder: where weights go that are offloaded to the disk and cannot be read where they are.
        cache_quantized: keep a quantized copy of the weights on the disk, and take it the next time.
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
        generation: defaults of every answer.
        settings: of the scheme (`double_quant`, `compute_dtype`, `quant_storage`, `group_size`, `llm_int8_threshold`,
            `llm_int8_skip_modules`, ...; also `load_in_4bit` and others in transformers 4's way), and generation
            parameters under transformers' names, laid over `generation`: `temperature=0.7`; and, for models that read
            media, `audio_sample_rate` in Hz (also `audio_sr`) and `video_fps`.

    Raises:
        ConfigError: an unknown scheme or parameter, a setting the scheme does not have, or a value outside its range.
    """

    kind = EngineKind(
        runs="models of transformers, in any precision, on any device map; media with the extra `multimodal`",
        example="%load_engine org/model --quant nf4",
        install="",
        can=(
            Ability.TOOLS,
            Ability.REASONING,
            Ability.SCHEMAS,
            Ability.IMAGES,
            Ability.AUDIO,
            Ability.LOGPROBS,
            Ability.REUSE,
            Ability.MEMORY,
        ),
        tested="tiny models of 29 architectures, LLaVA, Qwen2-Audio and T5 among them; SmolLM2-135M",
    )

    def __init__(
        self,
        model_id: str,
        max_context_size: int | None = None,
        prompt_pipeline: Pipeline | None = None,
        *,
        token: str | None = None,
        quantization: Any = None,
        dtype: Any = "auto",
        device: str | None = None,
        device_map: Any = None,
        max_memory: Any = None,
        allow_offload: bool = False,
        offload_folder: str | None = None,
        cache_quantized: bool = False,
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
        **settings: Any,
    ) -> None:
        check_limits(max_context_size=max_context_size, threads=threads, cache_gib=cache_gib)
        if prompt_pipeline is not None and not callable(prompt_pipeline):
            raise ConfigError(
                f"prompt_pipeline is {prompt_pipeline!r}", why="it must be a PromptPipeline or a function"
            )
        precision, generation_defaults = split_arguments(settings)
        media, generation_defaults = split_media(generation_defaults)
        self.model_id = str(model_id)
        self.generation = GenerationParams.from_kwargs(generation_defaults, generation, also=KNOWN_NAMES)
        self.slot = Slot()
        self._cache_gib = cache_gib
        asked = LoadRequest(
            name=self.model_id,
            dtype=dtype_name(dtype),
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            allow_offload=allow_offload,
            offload_folder=offload_folder,
            cache_quantized=cache_quantized,
            max_context_size=max_context_size,
            threads=threads,
            token=token,
            revision=revision,
            local_only=local_only,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            tokenizer_cls=tokenizer_cls,
            model_cls=model_cls,
            tokenizer_kwargs=dict(tokenizer_kwargs or {}),
            model_load_kwargs=dict(model_load_kwargs or {}),
        )
        self._asked = read_arguments(asked, quantization, precision)
        self._prepared = Prepared(self._asked, dict(chat_template_kwargs or {}), prompt_pipeline, media)
        self._loaded: LoadedModel | None = None
        self._cache: PrefixCache | None = None
        self._weights: Weights | None = None
        self._loading = Slot()
        self._times_closed = 0
        self._running: tuple[threading.Event, threading.Event] | None = None  # (stop, has ended) of the present answer

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """The engine that a `%load_engine` line describes."""
        same = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _CHANGED}
        return cls(config.model, config.max_context_size, device_map=device_map_of(config.device_map), **same)

    # -- what it is ------------------------------------------------------------------------------------------------

    holds_to_schemas = True

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    @property
    def model(self) -> Any:
        """The transformers model; None before `load`. What changes it is noticed (see `weights` for what is not)."""
        return self._loaded.model if self._loaded is not None else None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; loaded alone when it is asked for before `load`."""
        return self._prepared.tokenizer()

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence; empty before they were found."""
        return self._prepared.origin

    @property
    def max_context_size(self) -> int:  # type: ignore[override]
        """Tokens of prompt and answer together. Before `load` it reads the model's configuration."""
        if self._loaded is not None:
            return self._loaded.context_tokens
        if self._asked.max_context_size is not None:
            return self._asked.max_context_size
        from kani_nb.engines.huggingface.loading import context_of

        return context_of(self._prepared.config(), None, self.model_id)

    def memory(self) -> EngineMemory | None:
        """Bytes of the weights and of all KV states; None before `load`."""
        if self._loaded is None or self._cache is None:
            return None
        loaded = self._loaded
        return EngineMemory(loaded.weight_bytes, self._cache.nbytes, loaded.device, loaded.held_bytes)

    def details(self) -> dict[str, Any]:
        """What was decided when the model was loaded: device, dtype, threads, sizes."""
        if self._loaded is None or self._cache is None:
            return {"model": self.model_id, "loaded": False}
        return {
            "model": self.model_id,
            "loaded": True,
            **self._loaded.details(),
            "kv_budget_bytes": self._cache.budget_bytes,
            "max_new_tokens": self.generation.max_new_tokens,
        }

    def __repr__(self) -> str:
        """The model and whether it is loaded; never a module tree or a token."""
        if self._loaded is None:
            return f"{type(self).__name__}({self.model_id!r}, not loaded)"
        return f"{type(self).__name__}({self.model_id!r}, {self._loaded.placing.words})"

    # -- loading and freeing ---------------------------------------------------------------------------------------

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Find the model's files, downloading them if need be, and check what can be checked; no weights are loaded.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        report = progress or (lambda _: None)
        await run_in_thread(lambda cancelled: self._prepared.check(report, cancelled), name="kani-nb-prepare")

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Load the weights. Cancelling returns at once; weights that still arrive are dropped.

        Raises:
            UnknownModelError, ModelUnavailableError, ModelFilesError, OutOfMemoryError: as their names say.
        """
        await self._loading.acquire()
        try:
            if self._loaded is not None:
                return
            report = progress or (lambda _: None)
            closed_before = self._times_closed
            await self.prepare(report)
            started = time.monotonic()
            loaded = await run_in_thread(
                lambda cancelled: self._load_weights(report, cancelled), name="kani-nb-load", slot=self.slot
            )
            if self._times_closed != closed_before:
                del loaded
                await self._free()
                raise ModelUnavailableError(f"{self.model_id} was closed while it was loaded", fix="load it again")
            self._adopt(loaded)
            report(LoadProgress("ready", f"{self!r} in {time.monotonic() - started:.1f} s", 1.0))
        finally:
            self._loading.release()

    def _load_weights(self, report: ProgressCallback, cancelled: threading.Event) -> LoadedModel:
        from kani_nb.engines.huggingface import library_errors, loading

        request = self._prepared.request(report, cancelled)
        try:
            tokenizer = self._prepared.tokenizer()
            lock = self._prepared.tokenizer_lock
            return loading.load_model(request, tokenizer, lock, report, cancelled, self._prepared.shape)
        except KaniNbError as error:
            release_frames(error)
            library_errors.free_memory()
            raise

    def _adopt(self, loaded: LoadedModel) -> None:
        from kani_nb.engines.huggingface.prefix_cache import PrefixCache, cache_budget
        from kani_nb.engines.huggingface.weights import Weights

        budget = cache_budget(loaded, self._cache_gib)
        self._cache = PrefixCache(loaded.model.config, budget, loaded.context_tokens)
        self._weights = Weights(loaded.model, self.model_id)
        self._loaded = loaded

    async def close(self) -> None:
        """Free the weights and all states. The present answer ends at its next token, and those that wait fail."""
        self._times_closed += 1  # a load that is under way is dropped when it ends
        if self._loaded is None:
            return
        self._loaded = None
        self._cache = None
        self._weights = None
        self._prepared.forget_media()
        if (running := self._running) is not None:
            stop, has_ended = running
            stop.set()
            await asyncio.to_thread(has_ended.wait)
            self._loaded = None  # it may just have been counted again
        await self._free()

    async def _free(self) -> None:
        from kani_nb.engines.huggingface.library_errors import free_memory

        await asyncio.to_thread(free_memory)

    # -- prompts ---------------------------------------------------------------------------------------------------

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> Any:
        """The prompt as token ids, by the model's chat template. A subclass may return text, ids or a tensor instead.

        Raises:
            PromptError: the template refuses these messages, or there is none.
        """
        return self._prepared.encode(messages, functions)

    def prompt_ids(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The token ids that the model is given, its earlier answers in the very tokens it generated."""
        return self._prompt_inputs(messages, functions).ids

    def _prompt_inputs(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> ModelInputs:
        from kani_nb.engines.huggingface.model_inputs import ModelInputs
        from kani_nb.engines.huggingface.prompting import call_build_prompt, ids_of

        tokenizer, memory = self._prepared.tokenizer(), self._prepared.memory()
        with self._prepared.tokenizer_lock:
            made = call_build_prompt(self.build_prompt, messages, functions)
            return (
                made if isinstance(made, ModelInputs) else ModelInputs.of_text(memory.restore(ids_of(made, tokenizer)))
            )

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
        if self._loaded is None or self._cache is None:
            raise GenerationError(f"{self.model_id} was unloaded meanwhile", fix=f"%load_engine {self.model_id}")
        return self._loaded, self._cache, self._prepared.memory()

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
        from kani_nb.engines.huggingface.generation import Generation
        from kani_nb.engines.huggingface.seq2seq import EncoderDecoderGeneration

        with self._in_use(stop, "answering"):
            loaded, cache, memory = self._parts()
            prompt = self._prompt_inputs(messages, functions)
            if functions and self._prepared.ignores_tools:
                emit(EngineNotice(f"the prompt format of {self.model_id} ignores tools: they are described in words"))
            read_by = self._prepared.reader(prompt.ids, functions)
            kind = EncoderDecoderGeneration if loaded.model.config.is_encoder_decoder else Generation
            held = self._prepared.constraint(
                params.json_schema,
                params.eos_token_id or loaded.eos_ids,
                loaded.model.config.get_text_config().vocab_size,
            )
            kind(loaded, prompt, params, cache, memory, stop, read_by, held).run(emit, queued_s)

    @contextmanager
    def _in_use(self, stop: threading.Event, doing: str) -> Iterator[LoadedModel]:
        """While the model computes, in the thread that holds the slot: `close` waits for the end."""
        from kani_nb.engines.huggingface.using import in_use

        has_ended = threading.Event()
        self._running = (stop, has_ended)
        weights = self._weights
        try:
            loaded, cache, _ = self._parts()
            assert weights is not None
            with in_use(loaded, cache, weights, self.model_id, doing) as now:
                self._loaded = now
                yield now
        finally:
            self._running = None
            has_ended.set()
