"""OpenAIEngine: a model behind any server that speaks OpenAI's chat API.

OpenAI itself, vLLM, llama.cpp's and llama-cpp-python's servers, `transformers serve`, Ollama, and whatever else answers
at `/v1/chat/completions`. One model too large for one machine is served by vLLM over several nodes, and used from here
by its address: `%load_engine vllm:http://host:8000/v1`. No vendor's SDK; how requests are sent, messages written, and
answers put together stands in the modules beside this one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from kani_nb.config import EngineConfig, check_limits
from kani_nb.engines.base import BaseEngine, LoadProgress, PrefillProgress, ProgressCallback, StreamEvent
from kani_nb.engines.kinds import Ability, EngineKind
from kani_nb.engines.openai.address import default_base, holds_credentials, is_address, read_address, split_address
from kani_nb.engines.openai.asking import ServerHabits, ask
from kani_nb.engines.openai.client import OpenAIClient
from kani_nb.engines.openai.counting import TokenCounter
from kani_nb.engines.openai.messages import api_messages
from kani_nb.engines.openai.params import HOLDING_TO_SCHEMAS, ServerKind, split_hyperparams
from kani_nb.engines.openai.server import ServerFacts, find_out
from kani_nb.engines.openai.stream import AnswerBuilder
from kani_nb.engines.worker import Slot
from kani_nb.errors import ConfigError, EngineError, GenerationError, ModelUnavailableError, PromptTooLongError
from kani_nb.functions import tool_schemas
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

#: What other libraries call `api_base`.
_OTHERS_NAMES = ("base_url", "openai_api_base", "url", "endpoint")
#: What a `%load_engine` line can say that a server decides by itself.
_NOT_OURS = {each.name for each in fields(EngineConfig)} - {"model", "max_context_size", "generation", "local_only"}


class OpenAIEngine(BaseEngine):
    """A model behind a server with OpenAI's chat API.

    Args:
        api_key: sent to this server alone; None looks in the environment: `OPENAI_API_KEY` for OpenAI,
            `KANI_NB_API_KEY` for servers of one's own (see `address`).
        model: the model's name there; None takes the only one that the server has.
        max_context_size: tokens of prompt and answer together; None asks the server, and assumes 8,192 where it does
            not say.
        api_base: the server's address, for example `http://127.0.0.1:8000/v1`; OpenAI's (or `OPENAI_BASE_URL`) by
            default. `#NAME` or `?model=NAME` at its end names the model.
        organization: OpenAI's organization, where a key belongs to several.
        retry: how often a request is sent again after 429, 5xx or a broken connection, before an answer has begun.
        client: an `OpenAIClient` to use instead of one of its own.
        headers: sent with every request; their values are never shown.
        timeout: longest silence of the server, in seconds; before the first word that is the whole prefill.
        connect_timeout: longest wait for the connection, in seconds.
        generation: defaults of every answer.
        hyperparams: generation parameters under transformers' names, laid over `generation`, and fields of the chat
            API (`tool_choice`, `response_format`, `presence_penalty`, `extra_body` ...).

    Raises:
        ConfigError: an unknown parameter, a value outside its range, an address that is none, or one that stands
            where the key or the model's name belongs.
    """

    kind = EngineKind(
        runs="any server with OpenAI's chat API: vLLM, llama.cpp, Ollama, OpenAI",
        example="%load_engine vllm:http://host:8000/v1",
        install="",
        can=(
            Ability.TOOLS,
            Ability.REASONING,
            Ability.SCHEMAS,
            Ability.IMAGES,
            Ability.AUDIO,
            Ability.LOGPROBS,
        ),
        tested="`transformers serve` and llama-cpp-python's server; others played by a stand-in",
    )

    #: kani's name for what a call gets when the functions' budget is used up.
    disable_function_calling_kwargs: ClassVar[dict[str, Any]] = {"tool_choice": "none"}

    def __init__(
        self,
        api_key: str | None = None,
        model: str | None = None,
        max_context_size: int | None = None,
        *,
        api_base: str | None = None,
        organization: str | None = None,
        retry: int = 5,
        client: OpenAIClient | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        generation: GenerationParams | None = None,
        **hyperparams: Any,
    ) -> None:
        check_limits(max_context_size=max_context_size, threads=None, cache_gib=None)
        _check_places(api_key, model, hyperparams)
        if client is not None and not isinstance(client, OpenAIClient):
            raise ConfigError(
                f"client is a {type(client).__name__}",
                why="a vendor's client is not used here",
                fix="client=kani_nb.engines.openai.OpenAIClient(api_key, api_base=...)",
            )
        if client is None:
            client = OpenAIClient(
                api_key,
                api_base=api_base,
                organization=organization,
                headers=headers,
                retry=retry,
                timeout=timeout,
                connect_timeout=connect_timeout,
            )
        self.client = client
        self.generation, self._fields = split_hyperparams(hyperparams, generation or GenerationParams(), {})
        self._named = model or split_address(api_base or default_base())[1]
        self._given_context = max_context_size
        self._is_vllm = False
        self._facts: ServerFacts | None = None
        self._counter: TokenCounter | None = None
        self._habits: ServerHabits | None = None
        self._loading = Slot()
        #: Held while a server answers that gives up an answer for the next request.
        self.slot = Slot()
        self._times_closed = 0

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """From `%load_engine openai:MODEL`, `vllm:http://host:8000/v1`, `http://host:8000/v1#MODEL` and their like.

        Raises:
            ConfigError: the model names no server, a password or a token stands in its address, or an option is given
                that the server decides by itself.
        """
        if holds_credentials(config.model):
            raise ConfigError(
                "a password or a token does not belong into a line",
                why="it would be saved with the notebook, and shown where the engine is named",
                fix="set KANI_NB_API_KEY in the environment; or OPENAI_BASE_URL, with all that is in the address, and "
                "load openai:MODEL",
            )
        default = EngineConfig(config.model)
        for name in sorted(_NOT_OURS):
            if getattr(config, name) != getattr(default, name):
                raise ConfigError(
                    f"{name} cannot be chosen for {cls.__name__}",
                    why="the server has loaded the model in its own way",
                    fix="leave it out here, and give it to the server when it is started",
                )
        address = read_address(config.model)
        engine = cls(
            model=address.model,
            max_context_size=config.max_context_size,
            api_base=address.api_base,
            generation=config.generation,
        )
        if config.local_only and not engine.client.is_local:
            raise ConfigError(f"local_only excludes {engine.client.address}", why="the server is not on this machine")
        engine._is_vllm = address.is_vllm
        return engine

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the server has been found, and the model there."""
        return self._facts is not None

    @property
    def holds_to_schemas(self) -> bool:  # type: ignore[override]
        """Whether the server is known to hold answers to a JSON schema."""
        return self._facts is not None and self._facts.kind in HOLDING_TO_SCHEMAS

    @property
    def counts_exactly(self) -> bool:  # type: ignore[override]
        """Whether prompts are counted by the server's own tokenizer and template."""
        return self._counter is not None and self._counter.is_exact

    @property
    def model(self) -> str | None:
        """The model's name at the server; None while it is not known."""
        return self._facts.model if self._facts is not None else self._named

    @property
    def max_context_size(self) -> int:  # type: ignore[override]
        """Tokens of prompt and answer together; 0 while that is not known."""
        if self._facts is None or self._habits is None:
            return self._given_context or 0
        return min(self._facts.max_context_size, self._habits.context or self._facts.max_context_size)

    def details(self) -> dict[str, Any]:
        """Which server, what it said of itself, and how prompts are counted."""
        known = {"model": self.model, "loaded": self.is_loaded, "address": self.client.address}
        known["key"] = str(self.client.key) if self.client.key is not None else "none"
        if self._facts is None or self._counter is None or self._habits is None:
            return known
        source = "told by the server" if self._habits.context else self._facts.context_source
        return {
            **known,
            "server": self._facts.kind.value,
            "context_tokens": self.max_context_size,
            "context_from": source,
            "counted_by": self._counter.counted_by,
            "tokens_from": self._habits.tokens_from,
            "max_new_tokens": self.generation.max_new_tokens,
            **({"notes": "; ".join(self._facts.notes)} if self._facts.notes else {}),
        }

    def __repr__(self) -> str:
        """The model and the address; no key."""
        return f"{type(self).__name__}({self.model or 'the only model'!r:.100}, {self.client.address!r:.100})"

    # -- loading and freeing ---------------------------------------------------------------------------------------

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """The same as `load`, which takes no memory: no engine is freed for a server that does not answer.

        Raises:
            EngineError, ConfigError: as `load`.
        """
        await self.load(progress)

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Find the server and the model, and what the model can read.

        Raises:
            ServerDownError: nothing answers at the address.
            AccessRefusedError: the server wants a key, or another one.
            UnknownModelError: it does not have the model.
            ConfigError: no model was named, and the server has several.
            ServerError: what answers there is no such server.
        """
        report = progress or (lambda _: None)
        await self._loading.acquire()
        try:
            if self._facts is not None:
                return
            closed_before = self._times_closed
            report(LoadProgress("asking", self.client.address))
            failure: EngineError | None = None
            try:
                facts = await find_out(
                    self.client, self._named, is_vllm=self._is_vllm, max_context_size=self._given_context
                )
            except EngineError as error:
                failure = error
            if self._times_closed != closed_before:
                failure = ModelUnavailableError(f"{self.client.address} was closed meanwhile", fix="load it again")
            if failure is not None:
                raise failure
            self._counter = TokenCounter(self.client, facts.kind, facts.model)
            name = "max_completion_tokens" if facts.kind is ServerKind.OPENAI else "max_tokens"
            self._habits = ServerHabits(facts.kind, name)
            self._facts = facts
            report(LoadProgress("ready", f"{facts.model} at {self.client.address}", 1.0))
        finally:
            self._loading.release()

    async def close(self) -> None:
        """Hang up. Answers under way fail."""
        self._times_closed += 1
        self._facts = self._counter = self._habits = None
        await self.client.close()

    async def _ready(self) -> tuple[ServerFacts, TokenCounter, ServerHabits]:
        if self._facts is None:
            await self.load()
        if self._facts is None or self._counter is None or self._habits is None:
            raise GenerationError(f"{self.client.address} was closed meanwhile", fix="load it again")
        return self._facts, self._counter, self._habits

    # -- prompts ---------------------------------------------------------------------------------------------------

    async def prompt_len(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any
    ) -> int:
        """Tokens of the prompt, counted by what `details` names.

        Raises:
            PromptError: a message cannot be sent, or the server makes no prompt of them.
            EngineError: the server cannot be asked; as `load`.
        """
        _, counter, _ = await self._ready()
        return await counter.count(api_messages(messages), tool_schemas(functions), ask=not self.slot.is_taken)

    # -- answering -------------------------------------------------------------------------------------------------

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncGenerator[StreamEvent]:
        """The answer as the server sends it. Closing the iterator hangs up, upon which servers stop.

        Raises:
            ConfigError: an unknown parameter, or one that this server has no field for.
            PromptError: a message cannot be sent; `PromptTooLongError` when they do not fit.
            GenerationError: the server failed, or broke off, in the midst of it.
            EngineError: it refused; `AccessRefusedError`, `RateLimitError`, `UnknownModelError` as their names say.
        """
        params, passed = split_hyperparams(hyperparams, self.generation, self._fields)
        chat, tools = api_messages(messages), tool_schemas(functions)
        facts, counter, habits = await self._ready()
        prompt_tokens = await counter.count(chat, tools, ask=not self.slot.is_taken)
        context = self.max_context_size
        if prompt_tokens >= context:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens:,} tokens",
                why=f"the context holds {context:,} ({facts.context_source}; counted by {counter.counted_by})",
                fix="shorten it, or give the server's own context with --max-context-size",
            )
        if facts.knows_context or habits.context:  # some servers refuse what does not fit, instead of ending there
            params = replace(params, max_new_tokens=min(params.max_new_tokens, context - prompt_tokens))
        body = habits.body(facts.model, chat, tools, params, passed)
        answer = AnswerBuilder(params.max_new_tokens, self.client.error_in, habits.sends_single_tokens)
        async with aclosing(self._in_turn(body, answer, habits, prompt_tokens)) as events:
            async for event in events:
                yield event
        completion = answer.completion(seed=params.seed)
        habits.gives_usage = answer.tokens("completion_tokens") is not None
        if completion.prompt_tokens:
            counter.learn(chat, tools, completion.prompt_tokens)
        yield completion

    async def _in_turn(
        self, body: dict[str, Any], answer: AnswerBuilder, habits: ServerHabits, prompt_tokens: int
    ) -> AsyncGenerator[StreamEvent]:
        """The answer's pieces; one answer after the other where the server would give one up for the next."""
        one_by_one, closed_before, asked = (
            habits.kind is ServerKind.LLAMACPP_PYTHON,
            self._times_closed,
            time.monotonic(),
        )
        if one_by_one:
            await self.slot.acquire()
        failure: EngineError | None = None
        try:
            if one_by_one:
                yield PrefillProgress(0, prompt_tokens, 0, queued_s=time.monotonic() - asked)
            async with aclosing(ask(self.client, body, answer, habits, prompt_tokens)) as events:
                async for event in events:
                    yield event
        except EngineError as error:
            failure = error
        finally:
            if one_by_one:
                self.slot.release()
        if self._times_closed != closed_before and (failure is not None or not answer.is_whole):
            failure = GenerationError(f"{self.client.address} was closed while it answered", fix="load it again")
        if failure is None and one_by_one and not answer.has_reason:
            failure = GenerationError(
                "the server gave this answer up for another request",
                why="llama-cpp-python's server does so, unless it is told otherwise",
                fix="start it with --interrupt_requests false",
            )
        if failure is not None:
            raise failure


def _check_places(api_key: str | None, model: str | None, hyperparams: Mapping[str, Any]) -> None:
    """Refuse what stands in another's place, before the model is looked for at OpenAI, or a file's name sent as a key.

    Raises:
        ConfigError: a model or a key that is an address, a key that is a file, or another name for `api_base`.
    """
    example = "OpenAIEngine(api_base='http://127.0.0.1:8000/v1')"
    for name in _OTHERS_NAMES:
        if name in hyperparams:
            raise ConfigError(f"OpenAIEngine has no parameter {name!r}", fix=f"did you mean api_base? {example}")
    if model is not None and is_address(model):
        shown = model.rpartition("@")[2].partition("?")[0]  # without a password, and keys
        raise ConfigError(
            f"the model's name is {shown!r}",
            why="that is a server's address",
            fix=f"give it as api_base={shown!r}, and the model's name as model=, where the server has several",
        )
    if api_key is None:
        return
    if is_address(api_key):
        raise ConfigError("the api_key is a server's address", fix=f"give it as api_base: {example}")
    if api_key.lower().endswith(".gguf") or _is_file(api_key):
        raise ConfigError(
            "the api_key is the name of a file",
            why="the first argument is the key that is sent to the server",
            fix=f"{example} for a server that runs; LlamaCppEngine(FILE) runs a .gguf file here",
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or no text for one
        return False
