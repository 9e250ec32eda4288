"""`PromptPipeline`: from messages to what one model reads, as a chain of named steps.

The steps, their names and their arguments are kani's, so that a pipeline written for kani runs here. It differs in what
it never does: change the messages that it is given (they are immutable; a function given to `apply` returns
`msg.copy_with(...)`). How a step works is in `steps` and `terminal`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError
from typing import Any, Generic, Self, TypeVar, cast, overload

from kani_nb.engines.prompts import steps as step_kinds
from kani_nb.engines.prompts.base import PipelineStep, Predicate, RoleFilter
from kani_nb.engines.prompts.explain import explanation
from kani_nb.engines.prompts.terminal import ConversationDict, ConversationFmt, Transform
from kani_nb.errors import ConfigError, PromptError
from kani_nb.messages import ChatMessage, ChatRole, Content, MessagePart, ToolCall

T = TypeVar("T")


class PromptPipeline(Generic[T]):
    r"""A chain of steps that makes a prompt of messages. Each method adds its step and gives the pipeline again.

        pipeline = (
            PromptPipeline()
            .wrap(role="system", prefix="<<SYS>>\n", suffix="\n<</SYS>>\n")
            .translate_role(role="system", to="user")
            .merge_consecutive(role="user", sep="\n")
            .conversation_fmt(user_prefix="<s>[INST] ", user_suffix=" [/INST]", assistant_suffix=" </s>")
        )
        pipeline.explain()
        prompt = pipeline(messages)

    Where a step takes `role` (one or several) and `predicate` (a function of a message), it is for the messages that
    match both. A misuse that can be seen when a step is added is a `ConfigError` there, any other a `PromptError` when
    the pipeline runs.
    """

    def __init__(self: PromptPipeline[list[ChatMessage]], steps: Iterable[PipelineStep] | None = None) -> None:
        self._steps: list[PipelineStep] = []
        for step in steps or ():
            self.add(step)

    @property
    def steps(self) -> tuple[PipelineStep, ...]:
        """The steps, in their order."""
        return tuple(self._steps)

    def add(self, step: PipelineStep) -> Self:
        """Add a step, for example one of your own.

        Raises:
            ConfigError: it is no step, or the pipeline has ended.
        """
        if not isinstance(step, PipelineStep):
            raise ConfigError(
                f"{step!r} is not a step", fix="make it a subclass of PipelineStep, or use .macro_apply()"
            )
        if self._steps and self._steps[-1].is_terminal:
            raise ConfigError(
                f"{step.name} comes after {self._steps[-1].name}",
                why=f"{self._steps[-1].name} gives no messages any more",
                fix=f"put it before {self._steps[-1].name}",
            )
        self._steps.append(step)
        return self

    def translate_role(
        self,
        *,
        to: ChatRole | str,
        warn: str | None = None,
        role: RoleFilter = None,
        predicate: Predicate | None = None,
    ) -> Self:
        """Give the matching messages the role `to`; with `warn`, warn where there are any."""
        return self.add(step_kinds.TranslateRole(to=cast("ChatRole", to), warn=warn, role=role, predicate=predicate))

    def wrap(
        self,
        *,
        prefix: str | None = None,
        suffix: str | None = None,
        role: RoleFilter = None,
        predicate: Predicate | None = None,
    ) -> Self:
        """Put text before and after the content of the matching messages."""
        return self.add(step_kinds.Wrap(prefix=prefix, suffix=suffix, role=role, predicate=predicate))

    def merge_consecutive(
        self,
        *,
        sep: str | None = None,
        joiner: Callable[[list[ChatMessage]], Content | list[MessagePart | str]] | None = None,
        out_role: ChatRole | str | None = None,
        role: RoleFilter = None,
        predicate: Predicate | None = None,
    ) -> Self:
        """Merge matching messages that follow each other, with `sep` between them or by `joiner(messages)`.

        Several roles are merged as one group, and then need `out_role`.
        """
        merge = step_kinds.MergeConsecutive(
            sep=sep, joiner=joiner, out_role=cast("ChatRole | None", out_role), role=role, predicate=predicate
        )
        return self.add(merge)

    def function_call_fmt(
        self, func: Callable[[ToolCall], str | None], *, prefix: str = "\n", sep: str = "", suffix: str = ""
    ) -> Self:
        """Append a message's tool calls to its content, each as `func` writes it (None leaves it out).

        `prefix` and `suffix` are added where at least one call is written.
        """
        return self.add(step_kinds.FunctionCallFmt(func=func, prefix=prefix, sep=sep, suffix=suffix))

    def remove(self, *, role: RoleFilter = None, predicate: Predicate | None = None) -> Self:
        """Leave the matching messages out."""
        return self.add(step_kinds.Remove(role=role, predicate=predicate))

    def ensure_start(self, *, role: RoleFilter = None, predicate: Predicate | None = None) -> Self:
        """Leave out everything before the first message that matches.

        For results and answers whose question no longer fits the context; not for requiring a system message.
        """
        return self.add(step_kinds.EnsureStart(role=role, predicate=predicate))

    def ensure_bound_function_calls(self, id_translator: Callable[[str], str] | None = None) -> Self:
        """Give each function's result the id of the call before it, and drop results that no call asked for.

        `id_translator` rewrites the ids, for models that want them in a form of their own. The pipeline raises
        `PromptError` where a result is missing, or could belong to several calls.
        """
        return self.add(step_kinds.EnsureBoundFunctionCalls(id_translator=id_translator))

    def apply(
        self,
        func: Callable[[ChatMessage], Any] | Callable[[ChatMessage, step_kinds.ApplyContext], Any],
        *,
        role: RoleFilter = None,
        predicate: Predicate | None = None,
    ) -> PromptPipeline[list[Any]]:
        """Replace each matching message by `func(msg)` or `func(msg, context)`; None removes it.

        Only the last step may give something else than messages.
        """
        return cast("PromptPipeline[list[Any]]", self.add(step_kinds.Apply(func=func, role=role, predicate=predicate)))

    def macro_apply(self, func: Callable[[list[ChatMessage], list[Any]], Any]) -> PromptPipeline[Any]:
        """Replace all messages by `func(messages, functions)`."""
        return cast("PromptPipeline[Any]", self.add(step_kinds.MacroApply(func=func)))

    def conversation_fmt(
        self,
        *,
        prefix: str = "",
        sep: str = "",
        suffix: str = "",
        generation_suffix: str = "",
        user_prefix: str = "",
        user_suffix: str = "",
        assistant_prefix: str = "",
        assistant_suffix: str = "",
        assistant_suffix_if_last: str | None = None,
        system_prefix: str = "",
        system_suffix: str = "",
        function_prefix: str | None = None,
        function_suffix: str | None = None,
    ) -> PromptPipeline[str]:
        """End with one string: the messages between their role's prefix and suffix, joined by `sep`.

        `generation_suffix` is added to prompt the model. Where the last message is the assistant's and
        `assistant_suffix_if_last` is not None, that replaces both its suffix and the `generation_suffix`, so that the
        model goes on with what it began. Function messages are written as the user's unless they have their own.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return cast("PromptPipeline[str]", self.add(ConversationFmt(**given)))

    def conversation_dict(
        self,
        *,
        system_role: str = "system",
        user_role: str = "user",
        assistant_role: str = "assistant",
        function_role: str = "tool",
        content_transform: Transform | None = None,
        additional_keys: Callable[[ChatMessage], Mapping[str, Any]] | None = None,
    ) -> PromptPipeline[list[dict[str, Any]]]:
        """End with a list of dicts: `role`, `content` (the text by default), and what `additional_keys(msg)` gives.

        Tool calls and their ids are only in it where `additional_keys` adds them.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return cast("PromptPipeline[list[dict[str, Any]]]", self.add(ConversationDict(**given)))

    def __call__(self, msgs: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **how: Any) -> T:
        """What the steps make of `msgs`; see `execute`."""
        return self._run(msgs, functions, **how)

    def execute(
        self,
        msgs: Sequence[ChatMessage],
        functions: Sequence[Any] | None = None,
        *,
        deepcopy: bool = False,
        for_measurement: bool = False,
    ) -> T:
        """What the steps make of `msgs`: copies of the messages where no step makes something else of them.

        Args:
            msgs: the conversation.
            functions: those that the model may call, for steps that tell it of them.
            deepcopy: copy what is inside each message's `extra` too, for functions that write there.
            for_measurement: `msgs` are out of their conversation, and only the length of the result counts: nothing is
                left out because of what should stand before it.

        Raises:
            PromptError: a step was given something else than messages, or gave nothing, or cannot do its work.
        """
        return self._run(msgs, functions, deepcopy=deepcopy, for_measurement=for_measurement)

    def _run(
        self,
        msgs: Sequence[ChatMessage],
        functions: Sequence[Any] | None,
        *,
        deepcopy: bool = False,
        for_measurement: bool = False,
    ) -> T:
        made: Any = list(msgs)
        _check_messages(made, "the pipeline was given", "the input must be a list of kani_nb.ChatMessage")
        # A copy has an `extra` of its own, the one thing of a message that can be changed.
        made = [each.copy_with(extra=copy.deepcopy(each.extra)) if deepcopy else each.copy_with() for each in made]
        before = ""
        for number, step in enumerate(self._steps, 1):
            here = f"step {number} ({step.name})"
            made = list(made) if isinstance(made, tuple) else made
            if step.needs_messages:
                _check_messages(made, f"{here} was given", f"{before} gave it: only the last step may do that")
            try:
                made = (step.measure if for_measurement else step.execute)(made, list(functions or ()))
            except FrozenInstanceError as error:
                raise PromptError(
                    f"{here} failed: {error}", why="messages are immutable", fix="return msg.copy_with(content=...)"
                ) from error
            if made is None:
                raise PromptError(f"{here} gave nothing", why="its function returned None", fix="return the messages")
            before = here
        return cast("T", made)

    def explain(
        self,
        example: Sequence[ChatMessage] | None = None,
        functions: Sequence[Any] | None = None,
        *,
        all_cases: bool = False,
        **cases: bool,
    ) -> None:
        """Print the steps, and an example with what they make of it.

        The example is made for these steps unless one is given; `all_cases`, or the name of a case (`function_call`,
        `consecutive_user`, ...), makes it longer. Functions given to the steps are really called.

        Raises:
            ConfigError: a case that there is not.
        """
        print(explanation(self, example, functions, all_cases=all_cases, **cases))  # noqa: T201 - that is what it is for

    def __repr__(self) -> str:
        """The steps' names."""
        return f"PromptPipeline({' → '.join(step.name for step in self._steps) or 'no steps'})"

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[PipelineStep]:
        """The steps, in their order."""
        return iter(self.steps)

    def __bool__(self) -> bool:
        """True, also where it has no steps: a pipeline is not the absence of one."""
        return True

    @overload
    def __getitem__(self, item: int) -> PipelineStep: ...
    @overload
    def __getitem__(self, item: slice) -> list[PipelineStep]: ...
    def __getitem__(self, item: int | slice) -> PipelineStep | list[PipelineStep]:
        """One step, or some of them."""
        return self._steps[item]


def _check_messages(made: Any, what: str, why: str) -> None:
    if not isinstance(made, list):
        raise PromptError(f"{what} a {type(made).__name__} instead of messages", why=why)
    for each in made:
        if not isinstance(each, ChatMessage):
            kind = f"{type(each).__module__}.{type(each).__qualname__}".removeprefix("builtins.")
            raise PromptError(f"{what} a {kind} instead of a message", why=why)
