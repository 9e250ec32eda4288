"""CTransformersEngine: legacy GGML files, run by the ctransformers package in a process of its own.

The package has not been maintained since 2023; this engine is for code and files of that time. A subclass says how a
prompt is made (`build_prompt`), and may say how long a message is (`message_len`), as in kani 0.x. What the package
runs is listed in `files`; how it is kept from harming anybody, in `process` and `host`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import threading
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from kani_nb.config import check_limits
from kani_nb.engines.base import (
    BaseEngine,
    EngineMemory,
    LoadProgress,
    ProgressCallback,
    StreamEvent,
)
from kani_nb.engines.ctransformers.answering import Answer, Emit
from kani_nb.engines.ctransformers.files import LegacyFile, find_file
from kani_nb.engines.ctransformers.host import ChildHost, last_of, missing_package
from kani_nb.engines.ctransformers.sampling import sampling_of
from kani_nb.engines.huggingface.prompting import call_build_prompt, check_text
from kani_nb.engines.worker import Slot, iterate_in_thread, run_in_thread
from kani_nb.errors import EngineError, GenerationError, ModelUnavailableError, PromptError, PromptTooLongError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage, ChatRole

NOTICE = (
    "ctransformers has not been maintained since 2023, and runs GGML files of that time only; LlamaCppEngine is its "
    "successor, for GGUF files: %load_engine FILE.gguf"
)


@functools.cache
def _warn_once() -> None:
    warnings.warn(NOTICE, FutureWarning, stacklevel=4)


class CTransformersEngine(BaseEngine):
    """A legacy GGML file. Subclass it, and define `build_prompt`.

    Args:
        model_id: a file, a folder, or a repository of the Hub.
        model_file: the file in the folder or repository; None takes the only one.
        max_context_size: tokens of prompt and answer together, at most the model's own window.
        model_load_kwargs: ctransformers' own: `model_type`, `lib` (`avx2`, `avx`, `basic`, or a path), `gpu_layers`,
            `mmap`, `mlock`, `threads`.
        token: for gated repositories.
        generation: defaults of every answer.
        hyperparams: generation parameters under transformers' names, laid over `generation`.

    Raises:
        ConfigError: an unknown parameter, or a value outside its range.
    """

    def __init__(
        self,
        model_id: str,
        model_file: str | None = None,
        max_context_size: int = 1024,
        model_load_kwargs: dict[str, Any] | None = None,
        *,
        token: str | None = None,
        generation: GenerationParams | None = None,
        **hyperparams: Any,
    ) -> None:
        check_limits(max_context_size=max_context_size, threads=None, cache_gib=None)
        _warn_once()
        self.model_id = str(model_id)
        self.model_file = model_file
        self.generation = GenerationParams.from_kwargs(hyperparams, generation)
        sampling_of(self.generation)
        self.slot = Slot()
        self._token = token
        self._load_kwargs = dict(model_load_kwargs or {})
        self._asked_context = max_context_size
        self._file: LegacyFile | None = None
        self._host: ChildHost | None = None
        self._facts: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._times_closed = 0

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the process runs, with the model in it."""
        return self._host is not None and self._host.is_alive

    @property
    def max_context_size(self) -> int:  # type: ignore[override]
        """Tokens of prompt and answer together; at most the model's own, once that is known."""
        return min(self._asked_context, self._facts.get("context_tokens") or self._asked_context)

    def memory(self) -> EngineMemory | None:
        """Bytes of the weights, which lie in the other process; None where there is none."""
        if not self.is_loaded or self._file is None:
            return None
        return EngineMemory(self._file.path.stat().st_size, 0, "cpu")

    def details(self) -> dict[str, Any]:
        """What was decided when the model was loaded, and that the package is not maintained."""
        known = {"model": self.model_id, "loaded": self.is_loaded, "notice": NOTICE}
        if not self.is_loaded or self._host is None:
            return known
        return {**known, **self._facts, "process": self._host.pid, "max_new_tokens": self.generation.max_new_tokens}

    def __repr__(self) -> str:
        """The model and whether it is loaded."""
        return f"{type(self).__name__}({self.model_id!r}, {'loaded' if self.is_loaded else 'not loaded'})"

    # -- loading and freeing ---------------------------------------------------------------------------------------

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Find the package and the file, downloading it if need be; no process is started.

        Raises:
            MissingDependencyError: ctransformers is not installed.
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
        """
        await run_in_thread(lambda cancelled: self._find(progress, cancelled), name="kani-nb-prepare")

    def _find(self, progress: ProgressCallback | None, cancelled: threading.Event | None) -> LegacyFile:
        for package in ("ctransformers", "cpuinfo"):
            if importlib.util.find_spec(package) is None:  # importing it is the process's part
                raise missing_package(f"there is no package {package}")
        return find_file(
            self.model_id,
            self.model_file,
            self._load_kwargs.get("model_type"),
            token=self._token,
            progress=progress,
            cancelled=cancelled,
        )

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Start the process and load the model there. Cancelling ends the process.

        Raises:
            MissingDependencyError: ctransformers is not installed.
            UnknownModelError, ModelUnavailableError, ModelFilesError, ConfigError: as their names say.
            EngineError: the process died.
        """
        closed_before = self._times_closed
        await run_in_thread(lambda cancelled: self._ready(progress, cancelled), name="kani-nb-load")
        if self._times_closed != closed_before:
            await self.close()
            raise ModelUnavailableError(f"{self.model_id} was closed while it was loaded", fix="load it again")

    def _ready(self, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None) -> ChildHost:
        """The running process, started now if there is none. Blocks."""
        with self._lock:
            running = self._host
            if running is not None and running.is_alive:
                return running
            if running is not None:
                running.kill()  # what is left of it
            from kani_nb.hardware.devices import choose_threads

            report = progress or (lambda _: None)
            settings = dict(self._load_kwargs)
            lib, threads = settings.pop("lib", None), settings.pop("threads", None)
            settings.pop("model_type", None)
            self._file = file = self._find(progress, cancelled)
            settings.setdefault("context_length", self._asked_context)
            report(LoadProgress("weights", f"{file.path.name}, in a process of its own; {NOTICE}"))
            host = ChildHost(self.model_id)
            asked = {
                "path": str(file.path),
                "model_type": file.model_type,
                "lib": lib,
                "threads": choose_threads(threads).threads,
                "config": settings,
            }
            try:
                answer = last_of(host.ask("loading", cancelled, load=asked))
            except BaseException:
                host.kill()
                raise
            if "ready" not in answer:
                host.kill()
                raise ModelUnavailableError(f"loading {self.model_id} was interrupted", fix="load it again")
            self._facts = {**answer["ready"], "threads": asked["threads"]}
            self._host = host
            report(LoadProgress("ready", repr(self), 1.0))
            return host

    async def close(self) -> None:
        """End the process. The present answer fails in words."""
        self._times_closed += 1
        host, self._host = self._host, None
        if host is not None:
            await asyncio.to_thread(host.kill)

    def __del__(self) -> None:
        """End the process."""
        host = getattr(self, "_host", None)
        if host is not None:
            host.kill()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> str | list[int]:
        """The prompt, as text or as token ids. Defined by subclasses, which may leave `functions` out."""
        raise TypeError(f"{type(self).__name__} must define build_prompt(messages, functions)")

    def tokenize(self, text: str) -> list[int]:
        """The token ids of `text`; starts the process if it does not run. Blocks."""
        ids: list[int] = last_of(self._ready().ask("reading a text for", encode=text))["ids"]
        return ids

    def prompt_ids(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The token ids that the model is given. Blocks.

        Raises:
            PromptError: there is not a single token, or a text that is none.
        """
        for message in messages:
            if message.role is not ChatRole.ASSISTANT:
                check_text(message.text)
        self._ready()
        prompt = call_build_prompt(self.build_prompt, messages, functions)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise PromptError("the prompt has no tokens", why="build_prompt made none", fix="say something")
        size = self._facts["vocabulary"]
        if wrong := [token for token in ids if not 0 <= token < size]:  # the package would read beyond its memory
            raise PromptError(f"the prompt holds the token {wrong[0]}", why=f"the vocabulary has {size:,}")
        return ids

    def prompt_len(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any) -> int:
        """Exactly the tokens of the prompt that `stream` would compute for `messages`."""
        return len(self.prompt_ids(messages, functions))

    # -- answering -------------------------------------------------------------------------------------------------

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer, a token at a time. Closing the iterator stops it, or ends the process when it does not listen.

        Raises:
            ConfigError: a generation parameter that is unknown, or that ctransformers does not have.
            PromptError: the prompt cannot be made; `PromptTooLongError` when it does not fit.
            EngineError: the process died, or ctransformers failed.
        """
        params = GenerationParams.from_kwargs(hyperparams, self.generation)
        sampling_of(params)
        if not self.is_loaded:
            await self.load()
        asked = time.monotonic()

        def work(emit: Emit, stop: threading.Event) -> None:
            self._generate(list(messages), functions, params, emit, stop, time.monotonic() - asked)

        async with aclosing(iterate_in_thread(work, self.slot)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def _generate(
        self,
        messages: list[ChatMessage],
        functions: Sequence[Any] | None,
        params: GenerationParams,
        emit: Emit,
        stop: threading.Event,
        queued_s: float,
    ) -> None:
        """One answer, in the thread that holds the slot."""
        host = self._host
        if host is None:
            raise GenerationError(f"{self.model_id} was unloaded meanwhile", fix="load it again")
        ids = self.prompt_ids(messages, functions)
        room = self.max_context_size - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids):,} tokens",
                why=f"the model holds {self.max_context_size:,} of prompt and answer together",
                fix="shorten it, or start afresh with %chat new",
            )
        answer = Answer(params, len(ids), emit, stop, queued_s)
        answers = (self._host or host).ask(
            "answering with",
            stop,
            generate=ids,
            limit=min(params.max_new_tokens, room),
            end_ids=list(params.eos_token_id or ()),
            sampling=answer.sampling,
            seed=answer.seed or 0,
        )
        try:
            answer.end(last_of(answers, answer.hear)["done"])
        except EngineError as error:
            if self._host is None:  # that is why the process ended
                raise GenerationError(f"{self.model_id} was unloaded meanwhile", fix="load it again") from error
            raise
